//! Payloads of the frames that are not content. All integers little-endian,
//! strings with a length in front; layouts in docs/wire-protocol.md.

use crate::digest::{CHUNK, Hash};
use crate::entry::take;
use crate::error::{Code, MoverError, Side};
use crate::mode::CopyMode;
use crate::source::Identity;
use crate::unreadable::Unreadable;

/// Version that this code speaks.
pub const VERSION: u16 = 1;
/// ALPN name of the protocol.
pub const ALPN: &[u8] = b"diskmover/1";
/// Label of the TLS exporter that HELLO proves the key over.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-diskmover-1";

/// First frame of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Protocol version.
    pub version: u16,
    /// The sender's chunk size.
    pub chunk: u32,
    /// Same in all connections of one attempt, else random.
    pub nonce: [u8; 16],
    /// Proof of the session key.
    pub proof: Hash,
    /// The session.
    pub session: String,
    /// The copy, across sessions.
    pub tag: String,
}

impl Hello {
    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.version.to_le_bytes());
        out.extend(self.chunk.to_le_bytes());
        out.extend(self.nonce);
        out.extend(self.proof);
        put_text(&mut out, &self.session);
        put_text(&mut out, &self.tag);
        out
    }

    /// Parses a payload.
    pub fn decode(mut bytes: &[u8]) -> Option<Hello> {
        let bytes = &mut bytes;
        let hello = Hello {
            version: u16::from_le_bytes(take(bytes)?),
            chunk: u32::from_le_bytes(take(bytes)?),
            nonce: take(bytes)?,
            proof: take(bytes)?,
            session: take_text(bytes)?,
            tag: take_text(bytes)?,
        };
        bytes.is_empty().then_some(hello)
    }
}

/// The two keys that follow from a session key.
#[derive(Clone)]
pub struct Keys {
    proof: Hash,
    /// Keys the authenticators of frames.
    pub frame: Hash,
}

impl Keys {
    /// Derives them.
    pub fn derive(session_key: &Hash) -> Keys {
        Keys {
            proof: blake3::derive_key("diskmover 1 proof key", session_key),
            frame: blake3::derive_key("diskmover 1 frame key", session_key),
        }
    }

    /// The proof for one TLS connection of one attempt.
    pub fn prove(&self, exporter: &Hash, nonce: &[u8; 16], session: &str) -> Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.proof);
        hasher
            .update(exporter)
            .update(nonce)
            .update(session.as_bytes());
        *hasher.finalize().as_bytes()
    }
}

/// Announces a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// Identity of the source.
    pub identity: Identity,
    /// What its bytes are.
    pub mode: CopyMode,
    /// Id of the volume.
    pub volume: String,
}

impl Open {
    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.identity.encode());
        out.push(self.mode as u8);
        put_text(&mut out, &self.volume);
        out
    }

    /// Parses a payload.
    pub fn decode(mut bytes: &[u8]) -> Option<Open> {
        let bytes = &mut bytes;
        let open = Open {
            identity: Identity::decode(take(bytes)?),
            mode: take_mode(bytes)?,
            volume: take_text(bytes)?,
        };
        bytes.is_empty().then_some(open)
    }
}

impl Identity {
    /// As bytes.
    pub fn encode(&self) -> [u8; 32] {
        let mut out = [0; 32];
        out[..8].copy_from_slice(&self.size.to_le_bytes());
        out[8..16].copy_from_slice(&self.mtime_ns.to_le_bytes());
        out[16..24].copy_from_slice(&self.ctime_ns.to_le_bytes());
        out[24..].copy_from_slice(&self.inode.to_le_bytes());
        out
    }

    /// From bytes.
    pub fn decode(bytes: [u8; 32]) -> Identity {
        let mut rest = bytes.as_slice();
        let mut word = || take(&mut rest).map_or(0, u64::from_le_bytes);
        let size = word();
        let (mtime_ns, ctime_ns) = (word() as i64, word() as i64);
        Identity {
            size,
            mtime_ns,
            ctime_ns,
            inode: word(),
        }
    }
}

/// What was placed on the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The volume.
    pub volume: String,
    /// Its length.
    pub size: u64,
    /// Bytes in blocks that are not zero.
    pub data: u64,
    /// Bytes of frames sent for it.
    pub wire: u64,
    /// Root digest.
    pub root: Hash,
    /// What its bytes are.
    pub mode: CopyMode,
    /// Where zeros stand for what could not be read: then the copy is DEGRADED.
    pub unreadable: Unreadable,
    /// Bytes that the file system has allocated for it; None for a device. A finding,
    /// no part of the proof: it travels in the header, see [`Receipt::allocated_word`].
    pub allocated: Option<u64>,
}

impl Receipt {
    /// What the header of a frame with this receipt has as its length.
    pub fn allocated_word(&self) -> u64 {
        self.allocated.unwrap_or(u64::MAX)
    }

    /// The same receipt, with what its frame's header has as its length.
    pub fn with_allocated_word(self, word: u64) -> Receipt {
        Receipt {
            allocated: (word != u64::MAX).then_some(word),
            ..self
        }
    }

    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for word in [self.size, self.data, self.wire] {
            out.extend(word.to_le_bytes());
        }
        out.extend(self.root);
        out.push(self.mode as u8);
        put_text(&mut out, &self.volume);
        out.extend(self.unreadable.encode());
        out
    }

    /// Parses a payload.
    pub fn decode(mut bytes: &[u8]) -> Option<Receipt> {
        let bytes = &mut bytes;
        let mut word = || take(bytes).map(u64::from_le_bytes);
        let (size, data, wire) = (word()?, word()?, word()?);
        let root = take(bytes)?;
        let mode = take_mode(bytes)?;
        let volume = take_text(bytes)?;
        Some(Receipt {
            volume,
            size,
            data,
            wire,
            root,
            mode,
            unreadable: Unreadable::decode(bytes, size)?,
            allocated: None,
        })
    }
}

/// Encodes an error; long texts are cut.
pub fn encode_error(error: &MoverError) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend((error.code as u16).to_le_bytes());
    out.push(u8::from(error.retryable));
    out.push(u8::from(error.side == Side::Receiver));
    out.extend(error.offset.unwrap_or(u64::MAX).to_le_bytes());
    put_text(&mut out, error.volume.as_deref().unwrap_or_default());
    let mut end = error.message.len().min(1024);
    while !error.message.is_char_boundary(end) {
        end -= 1;
    }
    out.extend(&error.message.as_bytes()[..end]);
    out
}

/// Parses an error of the peer; control characters in its texts are replaced.
pub fn decode_error(mut bytes: &[u8]) -> Option<MoverError> {
    let bytes = &mut bytes;
    let code = Code::from_wire(u16::from_le_bytes(take(bytes)?))?;
    let [retryable, side] = take(bytes)?;
    let offset = u64::from_le_bytes(take(bytes)?);
    let volume = take_text(bytes)?;
    let text = String::from_utf8_lossy(bytes);
    Some(MoverError {
        code,
        message: printable(&text),
        volume: (!volume.is_empty()).then(|| printable(&volume)),
        offset: (offset != u64::MAX).then_some(offset),
        side: if side == 0 {
            Side::Sender
        } else {
            Side::Receiver
        },
        retryable: retryable != 0,
    })
}

/// Whether the peer's chunk size is ours.
pub fn chunk_matches(chunk: u32) -> bool {
    u64::from(chunk) == CHUNK
}

fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    let bytes = &text.as_bytes()[..text.len().min(255)];
    out.push(bytes.len() as u8);
    out.extend(bytes);
}

fn take_mode(bytes: &mut &[u8]) -> Option<CopyMode> {
    let [mode] = take(bytes)?;
    CopyMode::from_wire(mode)
}

fn take_text(bytes: &mut &[u8]) -> Option<String> {
    let [len] = take(bytes)?;
    let (text, rest) = bytes.split_at_checked(usize::from(len))?;
    *bytes = rest;
    String::from_utf8(text.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refuse_all_cuts<T: PartialEq + std::fmt::Debug>(
        bytes: &[u8],
        decode: impl Fn(&[u8]) -> Option<T>,
    ) {
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len]), None, "cut at {len}");
        }
        assert_eq!(decode(&[bytes, b"x"].concat()), None, "trailing byte");
    }

    #[test]
    fn messages_survive_the_wire_and_cuts_do_not() {
        let identity = Identity {
            size: 5,
            mtime_ns: -7,
            ctime_ns: 9,
            inode: 11,
        };
        let hello = Hello {
            version: 1,
            chunk: 1 << 20,
            nonce: [3; 16],
            proof: [4; 32],
            session: "s1".into(),
            tag: "t1".into(),
        };
        assert_eq!(Hello::decode(&hello.encode()), Some(hello.clone()));
        refuse_all_cuts(&hello.encode(), Hello::decode);
        let open = Open {
            identity,
            mode: CopyMode::GuestVisible,
            volume: "vda".into(),
        };
        assert_eq!(Open::decode(&open.encode()), Some(open.clone()));
        refuse_all_cuts(&open.encode(), Open::decode);
        let receipt = Receipt {
            volume: "vda".into(),
            size: 1,
            data: 2,
            wire: 3,
            root: [5; 32],
            mode: CopyMode::GuestVisible,
            unreadable: Unreadable::default(),
            allocated: None,
        };
        for allocated in [None, Some(0), Some(4096)] {
            let told = Receipt {
                allocated,
                ..receipt.clone()
            };
            let heard = receipt.clone().with_allocated_word(told.allocated_word());
            assert_eq!(heard, told);
        }
        let mut unknown = receipt.encode();
        unknown[56] = 2;
        assert_eq!(Receipt::decode(&unknown), None, "a mode that is not known");
        assert_eq!(Receipt::decode(&receipt.encode()), Some(receipt.clone()));
        refuse_all_cuts(&receipt.encode(), Receipt::decode);
        let degraded = Receipt {
            size: 9000,
            unreadable: Unreadable::of(vec![512..1024, 4096..8192], 9000).unwrap(),
            ..receipt
        };
        assert_eq!(Receipt::decode(&degraded.encode()), Some(degraded));
    }

    #[test]
    fn errors_survive_the_wire_without_their_control_characters() {
        let error = MoverError::new(Code::NoSpace, "full\x1b[31m")
            .in_volume("vda")
            .at(77);
        let back = decode_error(&encode_error(&error.clone().at_receiver())).unwrap();
        assert_eq!(back.message, "full?[31m");
        assert_eq!(
            (back.code, back.offset, back.side),
            (Code::NoSpace, Some(77), Side::Receiver)
        );
        let long = MoverError::new(Code::NoSpace, "\u{fc}".repeat(2000));
        assert!(encode_error(&long).len() <= 2048);
        assert!(decode_error(&encode_error(&long)).is_some());
        assert_eq!(decode_error(&[0; 5]), None);
    }

    #[test]
    fn proofs_depend_on_everything() {
        let keys = Keys::derive(&[1; 32]);
        let proof = keys.prove(&[2; 32], &[3; 16], "s");
        assert_ne!(proof, Keys::derive(&[9; 32]).prove(&[2; 32], &[3; 16], "s"));
        assert_ne!(proof, keys.prove(&[9; 32], &[3; 16], "s"));
        assert_ne!(proof, keys.prove(&[2; 32], &[9; 16], "s"));
        assert_ne!(proof, keys.prove(&[2; 32], &[3; 16], "t"));
        assert_ne!(keys.frame, keys.proof);
    }
}
