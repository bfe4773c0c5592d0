//! The fixed newstyle handshake: from a fresh connection to an export.
//!
//! ```text
//! server                          client
//! NBDMAGIC IHAVEOPT flags     ->
//!                            <-   flags
//!                            <-   STRUCTURED_REPLY
//! ACK, or "unsupported": then simple replies, and no block status
//!                            <-   SET_META_CONTEXT base:allocation, a bitmap
//! META_CONTEXT id name, ACK   ->
//!                            <-   GO
//! INFO export, block size, ACK ->
//! ```

use std::io::{Read, Write};

use crate::entry::take;
use crate::nbd::error::{NbdError, Result, printable};
use crate::nbd::proto::{
    OPTION_MAGIC, OPTION_REPLY_MAGIC, SERVER_MAGIC, export_flag, handshake_flag, info, option,
    option_reply,
};

/// The context that tells what reads as zero.
pub const ALLOCATION: &str = "base:allocation";
/// Prefix of the contexts that tell what was written.
pub const DIRTY_PREFIX: &str = "qemu:dirty-bitmap:";
/// Most bytes of an answer to an option; the protocol's texts have 4096.
const MAX_ANSWER: u32 = 1 << 16;
/// Most answers to an option.
const MAX_ANSWERS: usize = 64;

/// What the server says about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// Nobody can write through it.
    pub read_only: bool,
    /// Several connections see the same.
    pub multi_conn: bool,
    /// Requests are multiples of so many bytes, a power of two.
    pub min_block: u32,
    /// Most bytes of a request.
    pub max_block: u32,
    /// READ and BLOCK_STATUS are answered in chunks.
    pub structured: bool,
    /// Ids of the contexts asked for, in the order asked; None where refused.
    pub contexts: Vec<Option<u32>>,
}

impl Export {
    /// Whether it is what another connection saw.
    pub fn is_same(&self, other: &Export) -> bool {
        (self.size, self.read_only, self.min_block, self.structured)
            == (
                other.size,
                other.read_only,
                other.min_block,
                other.structured,
            )
    }
}

struct Answer {
    kind: u32,
    payload: Vec<u8>,
}

/// Negotiates an export by name with these meta contexts.
pub fn negotiate(
    wire: &mut (impl Read + Write),
    name: &str,
    contexts: &[String],
) -> Result<Export> {
    greet(wire)?;
    let structured = ask_structured(wire)?;
    let mut ids = vec![None; contexts.len()];
    if structured && !contexts.is_empty() {
        ids = ask_contexts(wire, name, contexts)?;
    }
    go(wire, name).map(|export| Export {
        structured,
        contexts: ids,
        ..export
    })
}

fn greet(wire: &mut (impl Read + Write)) -> Result<()> {
    let mut hello = [0; 18];
    wire.read_exact(&mut hello)?;
    if hello[..8] != SERVER_MAGIC || hello[8..16] != OPTION_MAGIC {
        return Err(NbdError::protocol("no NBD greeting of the newstyle kind"));
    }
    let flags = u16::from_be_bytes([hello[16], hello[17]]);
    if flags & handshake_flag::FIXED_NEWSTYLE == 0 {
        let text = "the server speaks an NBD dialect from before 2011, without options";
        return Err(NbdError::Refused(text.to_owned()));
    }
    let own = flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    wire.write_all(&u32::from(own).to_be_bytes())?;
    Ok(())
}

fn ask_structured(wire: &mut (impl Read + Write)) -> Result<bool> {
    ask(wire, option::STRUCTURED_REPLY, &[])?;
    match answer(wire, option::STRUCTURED_REPLY)? {
        Answer { kind, .. } if kind == option_reply::ACK => Ok(true),
        Answer { kind, payload } if kind == option_reply::ERR_TLS_REQD => {
            Err(refused(kind, &payload))
        }
        Answer { kind, .. } if kind & option_reply::ERROR != 0 => Ok(false),
        Answer { kind, .. } => Err(unexpected(option::STRUCTURED_REPLY, kind)),
    }
}

fn ask_contexts(
    wire: &mut (impl Read + Write),
    name: &str,
    contexts: &[String],
) -> Result<Vec<Option<u32>>> {
    let mut payload = Vec::new();
    put(&mut payload, name);
    payload.extend((contexts.len() as u32).to_be_bytes());
    contexts.iter().for_each(|one| put(&mut payload, one));
    ask(wire, option::SET_META_CONTEXT, &payload)?;
    let mut ids = vec![None; contexts.len()];
    for _ in 0..MAX_ANSWERS {
        let Answer { kind, payload } = answer(wire, option::SET_META_CONTEXT)?;
        match kind {
            option_reply::ACK => return Ok(ids),
            option_reply::META_CONTEXT => {
                let mut rest = payload.as_slice();
                let short = || NbdError::protocol("a meta context without an id");
                let id = u32::from_be_bytes(take(&mut rest).ok_or_else(short)?);
                let asked = contexts.iter().position(|one| one.as_bytes() == rest);
                let Some(asked) = asked.filter(|_| !ids.contains(&Some(id))) else {
                    return Err(NbdError::protocol("a meta context that was not asked for"));
                };
                ids[asked] = Some(id);
            }
            // Without contexts we can still read everything.
            kind if kind & option_reply::ERROR != 0 => return Ok(vec![None; contexts.len()]),
            kind => return Err(unexpected(option::SET_META_CONTEXT, kind)),
        }
    }
    Err(NbdError::protocol("meta contexts without end"))
}

fn go(wire: &mut (impl Read + Write), name: &str) -> Result<Export> {
    let mut payload = Vec::new();
    put(&mut payload, name);
    payload.extend(1u16.to_be_bytes());
    payload.extend(info::BLOCK_SIZE.to_be_bytes());
    ask(wire, option::GO, &payload)?;
    let mut seen = None;
    let mut blocks = (1, 1 << 25);
    for _ in 0..MAX_ANSWERS {
        let Answer { kind, payload } = answer(wire, option::GO)?;
        match kind {
            option_reply::ACK => {
                let none = || NbdError::protocol("no size of the export");
                let (size, flags): (u64, u16) = seen.ok_or_else(none)?;
                return Ok(Export {
                    size,
                    read_only: flags & export_flag::READ_ONLY != 0,
                    multi_conn: flags & export_flag::CAN_MULTI_CONN != 0,
                    min_block: blocks.0,
                    max_block: blocks.1,
                    structured: false,
                    contexts: Vec::new(),
                });
            }
            option_reply::INFO => {
                let mut rest = payload.as_slice();
                let short = || NbdError::protocol("information that is cut short");
                match u16::from_be_bytes(take(&mut rest).ok_or_else(short)?) {
                    info::EXPORT => {
                        let size = u64::from_be_bytes(take(&mut rest).ok_or_else(short)?);
                        let flags = u16::from_be_bytes(take(&mut rest).ok_or_else(short)?);
                        seen = Some((size, flags));
                    }
                    info::BLOCK_SIZE => {
                        let min = u32::from_be_bytes(take(&mut rest).ok_or_else(short)?);
                        let _preferred: [u8; 4] = take(&mut rest).ok_or_else(short)?;
                        let max = u32::from_be_bytes(take(&mut rest).ok_or_else(short)?);
                        blocks = check_blocks(min, max)?;
                    }
                    _ => {} // more than we asked for
                }
            }
            kind if kind & option_reply::ERROR != 0 => return Err(refused(kind, &payload)),
            kind => return Err(unexpected(option::GO, kind)),
        }
    }
    Err(NbdError::protocol("information without end"))
}

/// The protocol's own bounds: a power of two up to 64 KiB, and a multiple of it.
fn check_blocks(min: u32, max: u32) -> Result<(u32, u32)> {
    if !min.is_power_of_two() || min > 1 << 16 || max < min {
        let text = format!("block sizes from {min} to {max}");
        return Err(NbdError::protocol(text));
    }
    Ok((min, max & !(min - 1)))
}

fn ask(wire: &mut impl Write, option: u32, payload: &[u8]) -> Result<()> {
    let mut out = OPTION_MAGIC.to_vec();
    out.extend(option.to_be_bytes());
    out.extend((payload.len() as u32).to_be_bytes());
    out.extend(payload);
    wire.write_all(&out)?;
    Ok(())
}

fn answer(wire: &mut impl Read, option: u32) -> Result<Answer> {
    let mut head = [0; 20];
    wire.read_exact(&mut head)?;
    let mut rest = head.as_slice();
    let word = |rest: &mut &[u8]| take(rest).map_or(0, u32::from_be_bytes);
    let magic = take(&mut rest).map_or(0, u64::from_be_bytes);
    let (about, kind, len) = (word(&mut rest), word(&mut rest), word(&mut rest));
    if magic != OPTION_REPLY_MAGIC || about != option {
        return Err(NbdError::protocol("something else than an answer"));
    }
    if len > MAX_ANSWER {
        return Err(NbdError::protocol(format!("an answer of {len} bytes")));
    }
    let mut payload = vec![0; len as usize];
    wire.read_exact(&mut payload)?;
    Ok(Answer { kind, payload })
}

fn refused(kind: u32, payload: &[u8]) -> NbdError {
    let why = match kind {
        option_reply::ERR_UNSUP => "the server is too old: it does not know NBD_OPT_GO".to_owned(),
        option_reply::ERR_POLICY => "the server forbids it".to_owned(),
        option_reply::ERR_TLS_REQD => {
            "the server wants TLS; export it on a UNIX socket without".to_owned()
        }
        option_reply::ERR_UNKNOWN => "the server has no export of that name".to_owned(),
        other => format!("the server refuses (error {:#x})", other),
    };
    let told = printable(payload);
    NbdError::Refused(match told.as_str() {
        "" => why,
        told => format!("{why} ({told})"),
    })
}

fn unexpected(option: u32, kind: u32) -> NbdError {
    NbdError::protocol(format!("answer {kind} to option {option}"))
}

fn put(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u32).to_be_bytes());
    out.extend(text.as_bytes());
}
