//! READ and BLOCK_STATUS over one connection.
//!
//! A server answers requests in any order and a structured READ in pieces of any
//! order. Each piece has to lie inside its request, and together they have to
//! cover it exactly once: else old bytes of a buffer would pass for content.

use std::io::{BufReader, Read, Write};
use std::ops::Range;
use std::time::Duration;

use crate::entry::take;
use crate::nbd::error::{NbdError, Result};
use crate::nbd::handshake::{self, Export};
use crate::nbd::proto::{self, CHUNK_MAGIC, SIMPLE_REPLY_MAGIC, chunk, command};
use crate::nbd::socket::Wire;
use crate::nbd::status::Extent;

/// How long a server may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For connecting, and then for the handshake.
    pub hello: Duration,
    /// For the answers to the requests of one call.
    pub reply: Duration,
}

/// Bytes of a READ: small enough for caches, large enough to cost little.
const REQUEST_BYTES: u64 = 256 << 10;
/// Most requests under way.
const WINDOW: usize = 16;
/// Most separate pieces that a request may be answered with at a time.
const MAX_PIECES: usize = 1024;
/// Most extents of an answer: what nbdkit sends at most; QEMU sends an eighth.
const MAX_EXTENTS: u32 = 1 << 20;
/// Most bytes of a chunk that only carries a message.
const MAX_MESSAGE: u32 = 1 << 13;
const READ_AHEAD: usize = 16 << 10;

impl Default for Patience {
    fn default() -> Self {
        Patience {
            hello: Duration::from_secs(10),
            reply: Duration::from_secs(60),
        }
    }
}

/// A connection to an export.
pub struct Client<W: Wire> {
    wire: BufReader<W>,
    export: Export,
    patience: Patience,
    cookie: u64,
}

/// A READ that is not answered in full.
struct Reading {
    cookie: u64,
    range: Range<u64>,
    got: Coverage,
}

struct Head {
    done: bool,
    kind: u16,
    cookie: u64,
    len: u32,
}

impl<W: Wire> Client<W> {
    /// Shakes hands over a fresh connection.
    pub fn new(
        mut wire: W,
        name: &str,
        contexts: &[String],
        patience: Patience,
    ) -> Result<Client<W>> {
        wire.arm(patience.hello);
        let mut wire = BufReader::with_capacity(READ_AHEAD, wire);
        let export = handshake::negotiate(&mut Both(&mut wire), name, contexts)?;
        Ok(Client {
            wire,
            export,
            patience,
            cookie: 0,
        })
    }

    /// What the server said about the export.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Reads ranges of the export; byte 0 of `buffer` is its byte `base`.
    ///
    /// The ranges are multiples of the smallest block and lie in the buffer.
    /// After an error the connection is of no more use.
    pub fn read(&mut self, ranges: &[Range<u64>], base: u64, buffer: &mut [u8]) -> Result<()> {
        self.wire.get_mut().arm(self.patience.reply);
        let most = REQUEST_BYTES.min(u64::from(self.export.max_block));
        let mut requests = ranges.iter().flat_map(|range| pieces(range, most));
        let mut open: Vec<Reading> = Vec::with_capacity(WINDOW);
        loop {
            let mut out = Vec::new();
            while open.len() < WINDOW
                && let Some(range) = requests.next()
            {
                self.cookie += 1;
                let len = (range.end - range.start) as u32;
                out.extend(proto::request(command::READ, self.cookie, range.start, len));
                open.push(Reading {
                    cookie: self.cookie,
                    range,
                    got: Coverage::default(),
                });
            }
            if open.is_empty() {
                return Ok(());
            }
            self.wire.get_mut().write_all(&out)?;
            if self.export.structured {
                self.hear_chunk(&mut open, base, buffer)?;
            } else {
                self.hear_simple(&mut open, base, buffer)?;
            }
        }
    }

    /// What the server knows of a range, for each context of the handshake; a
    /// context that it says nothing about is empty.
    ///
    /// After `NbdError::Server` the connection can still be used.
    pub fn block_status(&mut self, offset: u64, len: u32) -> Result<Vec<Vec<Extent>>> {
        self.wire.get_mut().arm(self.patience.reply);
        self.cookie += 1;
        let request = proto::request(command::BLOCK_STATUS, self.cookie, offset, len);
        self.wire.get_mut().write_all(&request)?;
        let mut found = vec![Vec::new(); self.export.contexts.len()];
        let mut failed = None;
        loop {
            let head = self.chunk_head()?;
            if head.cookie != self.cookie {
                return Err(NbdError::protocol("a reply to no request"));
            }
            match head.kind {
                chunk::NONE if head.len == 0 => {}
                chunk::BLOCK_STATUS => self.extents(head.len, &mut found)?,
                kind if kind & chunk::ERROR != 0 => failed = Some(self.error(&head)?),
                kind => return Err(unexpected(kind, head.len)),
            }
            if head.done {
                return failed.map_or(Ok(found), Err);
            }
        }
    }

    /// Says goodbye; the server needs no answer.
    pub fn disconnect(&mut self) {
        self.wire.get_mut().arm(Duration::from_secs(1));
        let request = proto::request(command::DISCONNECT, 0, 0, 0);
        let _ = self.wire.get_mut().write_all(&request);
    }

    fn hear_simple(&mut self, open: &mut Vec<Reading>, base: u64, out: &mut [u8]) -> Result<()> {
        let mut head = [0; 16];
        self.wire.read_exact(&mut head)?;
        let mut rest = head.as_slice();
        let magic = take(&mut rest).map_or(0, u32::from_be_bytes);
        let error = take(&mut rest).map_or(0, u32::from_be_bytes);
        let cookie = take(&mut rest).map_or(0, u64::from_be_bytes);
        if magic != SIMPLE_REPLY_MAGIC {
            return Err(NbdError::protocol("something else than a reply"));
        }
        let index = find(open, cookie)?;
        let range = open.swap_remove(index).range;
        if error != 0 {
            return Err(NbdError::server(error, &[], Some(range.start)));
        }
        self.wire.read_exact(slice(out, base, &range))?;
        Ok(())
    }

    fn hear_chunk(&mut self, open: &mut Vec<Reading>, base: u64, out: &mut [u8]) -> Result<()> {
        let head = self.chunk_head()?;
        let index = find(open, head.cookie)?;
        let reading = &mut open[index];
        match head.kind {
            chunk::NONE if head.len == 0 => {}
            chunk::OFFSET_DATA if head.len > 8 => {
                let offset = u64::from_be_bytes(self.array()?);
                let range = reading.take(offset, u64::from(head.len) - 8)?;
                self.wire.read_exact(slice(out, base, &range))?;
            }
            chunk::OFFSET_HOLE if head.len == 12 => {
                let offset = u64::from_be_bytes(self.array()?);
                let len = u32::from_be_bytes(self.array()?);
                let range = reading.take(offset, u64::from(len))?;
                slice(out, base, &range).fill(0);
            }
            kind if kind & chunk::ERROR != 0 => {
                let start = reading.range.start;
                return Err(match self.error(&head)? {
                    NbdError::Server {
                        error,
                        message,
                        offset,
                    } => NbdError::Server {
                        error,
                        message,
                        offset: offset.or(Some(start)),
                    },
                    other => other,
                });
            }
            kind => return Err(unexpected(kind, head.len)),
        }
        if head.done {
            if !reading.is_whole() {
                return Err(NbdError::protocol("a read that is not answered in full"));
            }
            open.swap_remove(index);
        }
        Ok(())
    }

    fn chunk_head(&mut self) -> Result<Head> {
        let head: [u8; 20] = self.array()?;
        let mut rest = head.as_slice();
        let magic = take(&mut rest).map_or(0, u32::from_be_bytes);
        if magic != CHUNK_MAGIC {
            return Err(NbdError::protocol("something else than a structured reply"));
        }
        let flags = take(&mut rest).map_or(0, u16::from_be_bytes);
        Ok(Head {
            done: flags & chunk::DONE != 0,
            kind: take(&mut rest).map_or(0, u16::from_be_bytes),
            cookie: take(&mut rest).map_or(0, u64::from_be_bytes),
            len: take(&mut rest).map_or(0, u32::from_be_bytes),
        })
    }

    fn extents(&mut self, len: u32, found: &mut [Vec<Extent>]) -> Result<()> {
        if len < 12 || !(len - 4).is_multiple_of(8) || (len - 4) / 8 > MAX_EXTENTS {
            return Err(NbdError::protocol(format!("a block status of {len} bytes")));
        }
        let id = u32::from_be_bytes(self.array()?);
        let known = self.export.contexts.iter().position(|one| *one == Some(id));
        let list = known.map(|index| &mut found[index]);
        let Some(list) = list.filter(|list| list.is_empty()) else {
            return Err(NbdError::protocol("a block status that was not asked for"));
        };
        for _ in 0..(len - 4) / 8 {
            let mut pair = [0; 8];
            self.wire.read_exact(&mut pair)?;
            let mut rest = pair.as_slice();
            let len = take(&mut rest).map_or(0, u32::from_be_bytes);
            let flags = take(&mut rest).map_or(0, u32::from_be_bytes);
            list.push(Extent { len, flags });
        }
        Ok(())
    }

    /// Takes an error off the wire.
    fn error(&mut self, head: &Head) -> Result<NbdError> {
        if head.len < 6 || head.len > MAX_MESSAGE {
            return Err(unexpected(head.kind, head.len));
        }
        let mut payload = vec![0; head.len as usize];
        self.wire.read_exact(&mut payload)?;
        let mut rest = payload.as_slice();
        let number = take(&mut rest).map_or(0, u32::from_be_bytes);
        let said = take(&mut rest).map_or(0, u16::from_be_bytes);
        let Some((message, mut rest)) = rest.split_at_checked(usize::from(said)) else {
            return Err(unexpected(head.kind, head.len));
        };
        if number == 0 {
            return Err(NbdError::protocol("an error without an error"));
        }
        let offset = match head.kind {
            chunk::ERROR_OFFSET => take(&mut rest).map(u64::from_be_bytes),
            _ => None,
        };
        Ok(NbdError::server(number, message, offset))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        self.wire.read_exact(&mut out)?;
        Ok(out)
    }
}

impl Reading {
    /// Notes a piece of the answer; fails when it cannot be one.
    fn take(&mut self, offset: u64, len: u64) -> Result<Range<u64>> {
        let end = offset.checked_add(len).filter(|end| *end <= self.range.end);
        let range = match end {
            Some(end) if offset >= self.range.start && len > 0 => offset..end,
            _ => return Err(NbdError::protocol("bytes that were not asked for")),
        };
        self.got.add(range.clone())?;
        Ok(range)
    }

    fn is_whole(&self) -> bool {
        self.got.0 == [self.range.clone()]
    }
}

/// Ranges that have been answered: in order, apart and not touching.
#[derive(Default)]
struct Coverage(Vec<Range<u64>>);

impl Coverage {
    fn add(&mut self, new: Range<u64>) -> Result<()> {
        let at = self.0.partition_point(|one| one.end <= new.start);
        if self.0.get(at).is_some_and(|next| next.start < new.end) {
            return Err(NbdError::protocol("the same bytes twice"));
        }
        let joins_next = self.0.get(at).is_some_and(|next| next.start == new.end);
        let joins_last = at > 0 && self.0[at - 1].end == new.start;
        match (joins_last, joins_next) {
            (true, true) => self.0[at - 1].end = self.0.remove(at).end,
            (true, false) => self.0[at - 1].end = new.end,
            (false, true) => self.0[at].start = new.start,
            (false, false) if self.0.len() < MAX_PIECES => self.0.insert(at, new),
            (false, false) => return Err(NbdError::protocol("an answer in crumbs")),
        }
        Ok(())
    }
}

/// Reads through the buffer, writes past it.
struct Both<'a, W: Wire>(&'a mut BufReader<W>);

impl<W: Wire> Read for Both<'_, W> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(out)
    }
}

impl<W: Wire> Write for Both<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.get_mut().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.get_mut().flush()
    }
}

fn pieces(range: &Range<u64>, most: u64) -> impl Iterator<Item = Range<u64>> + use<> {
    let end = range.end;
    (range.start..end)
        .step_by(most as usize)
        .map(move |start| start..(start + most).min(end))
}

fn find(open: &[Reading], cookie: u64) -> Result<usize> {
    let unknown = || NbdError::protocol("a reply to no request");
    open.iter()
        .position(|reading| reading.cookie == cookie)
        .ok_or_else(unknown)
}

fn slice<'a>(out: &'a mut [u8], base: u64, range: &Range<u64>) -> &'a mut [u8] {
    &mut out[(range.start - base) as usize..(range.end - base) as usize]
}

fn unexpected(kind: u16, len: u32) -> NbdError {
    NbdError::protocol(format!("a chunk of kind {kind:#x} with {len} bytes"))
}
