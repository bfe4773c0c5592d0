//! The 64-byte frame header.
//!
//! ```text
//!  0  magic "DM"      2   8  payload length u32   28  authenticator [32]
//!  2  type u8             12  offset u64          60  CRC-32C of bytes 0..60
//!  3  codec u8            20  logical length u64
//!  4  volume u16
//!  6  zero u16                                        all little-endian
//! ```
//! The authenticator of DATA, PATCH, HASHES, ZERO and FINISH is
//! `BLAKE3-keyed(frame key, bytes 0..28 | hash)`, where `hash` is the chunk hash,
//! 32 zero bytes, or the root digest. It ties content to its place and to the
//! session. All other frames carry zeros there; TLS protects them.

use crate::base;
use crate::digest::{self, CHUNK, Hash};
use crate::revision;
use crate::unreadable;

/// Bytes of a header.
pub const HEADER: usize = 64;
/// Most bytes of payload of a DATA frame: the bitmap and a whole chunk.
pub const MAX_DATA_PAYLOAD: u32 = CHUNK as u32 + 32;
/// Most bytes of payload of a HASHES frame: the chunk's hash and its blocks'.
pub const MAX_HASHES_PAYLOAD: u32 = 32 + 32 * base::PIECES as u32;
const MAGIC: [u8; 2] = *b"DM";
const SIGNED: usize = 28;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $max:expr;)*) => {
        /// Type of a frame.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            fn from_wire(number: u8) -> Option<Kind> {
                match number { $($number => Some(Kind::$name),)* _ => None }
            }

            /// Most bytes of payload.
            pub fn max_payload(self) -> u32 {
                match self { $(Kind::$name => $max,)* }
            }
        }
    };
}

kinds! {
    /// Sender: first frame of each connection; proves the session key.
    Hello = 1, 512;
    /// Sender: announces a volume.
    Open = 2, 512;
    /// Sender: one chunk.
    Data = 3, MAX_DATA_PAYLOAD;
    /// Sender: a run of zero chunks.
    Zero = 4, 0;
    /// Sender: all chunks of a volume are acknowledged; here is its root digest.
    Finish = 5, 64 + unreadable::MAX_ENCODED;
    /// Sender: what a chunk holds, for a receiver that has older content.
    Hashes = 6, MAX_HASHES_PAYLOAD;
    /// Sender: the blocks of a chunk that differ from the older content.
    Patch = 7, MAX_DATA_PAYLOAD + 2;
    /// Sender: what has changed since an earlier copy; before its OPEN.
    Dirty = 8, revision::MAX_PAYLOAD as u32;
    /// Receiver: the HELLO was accepted.
    Welcome = 16, 64;
    /// Receiver: what is durable already.
    State = 17, 1 << 20;
    /// Receiver: the volume is ready; all STATE frames have been sent.
    Opened = 18, 512 + unreadable::MAX_ENCODED;
    /// Receiver: a DATA or ZERO frame is written.
    Ack = 19, 0;
    /// Receiver: the volume is published.
    Receipt = 20, 512 + unreadable::MAX_ENCODED;
    /// Receiver: it does not have these blocks of a HASHES or PATCH frame's chunk, or
    /// a frame came corrupt.
    Want = 21, 2;
    /// Either: the session has failed.
    Error = 30, 2048;
    /// Either: a sign of life.
    Ping = 31, 0;
}

/// DATA payload is the blocks as they are.
pub const CODEC_RAW: u8 = 0;
/// DATA payload is one zstd frame of the blocks.
pub const CODEC_ZSTD: u8 = 1;
/// HELLO, in its length: the sender knows WANT as an answer to DATA and ZERO.
pub const HELLO_SENDS_AGAIN: u64 = 1;
/// ACK: the target's queue is nearly full, so its disk is the bottleneck.
pub const ACK_TARGET_SLOW: u8 = 1;

/// A parsed header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Type.
    pub kind: Kind,
    /// Codec of DATA, flags of ACK, else 0.
    pub codec: u8,
    /// Index of the volume in the session.
    pub volume: u16,
    /// Bytes that follow the header.
    pub payload_len: u32,
    /// Offset in the volume.
    pub offset: u64,
    /// Bytes of the volume that the frame is about.
    pub logical_len: u64,
    /// Authenticator.
    pub auth: Hash,
}

/// Why a header is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not a frame at all.
    #[error("not a diskmover frame")]
    Magic,
    /// Damaged.
    #[error("frame header checksum does not match")]
    Checksum,
    /// A type or a codec that this version does not know.
    #[error("unknown frame type {0} or codec {1}")]
    Unknown(u8, u8),
    /// Reserved bytes are not zero.
    #[error("reserved header bytes are set")]
    Reserved,
    /// The payload is longer than its type allows.
    #[error("payload of {0} bytes is longer than its type allows")]
    TooLong(u32),
    /// Offset or length lies outside the volume or off the chunk grid.
    #[error("range at {0} of {1} bytes does not fit the volume")]
    Range(u64, u64),
}

impl Header {
    /// A header without payload, offset and authenticator.
    pub fn new(kind: Kind, volume: u16) -> Self {
        Header {
            kind,
            codec: 0,
            volume,
            payload_len: 0,
            offset: 0,
            logical_len: 0,
            auth: [0; 32],
        }
    }

    /// The bytes that go over the wire.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..SIGNED].copy_from_slice(&self.signed_part());
        bytes[SIGNED..60].copy_from_slice(&self.auth);
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Parses and checks everything that needs no knowledge of the session.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Header, FrameError> {
        if bytes[..2] != MAGIC {
            return Err(FrameError::Magic);
        }
        if crc32c::crc32c(&bytes[..60]).to_le_bytes() != bytes[60..] {
            return Err(FrameError::Checksum);
        }
        let unknown = FrameError::Unknown(bytes[2], bytes[3]);
        let kind = Kind::from_wire(bytes[2]).ok_or(unknown.clone())?;
        let codec_max = if matches!(kind, Kind::Data | Kind::Patch | Kind::Ack) {
            1
        } else {
            0
        };
        if bytes[3] > codec_max {
            return Err(unknown);
        }
        if bytes[6..8] != [0, 0] {
            return Err(FrameError::Reserved);
        }
        let mut auth = [0; 32];
        auth.copy_from_slice(&bytes[SIGNED..60]);
        let header = Header {
            kind,
            codec: bytes[3],
            volume: u16::from_le_bytes([bytes[4], bytes[5]]),
            payload_len: u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]),
            offset: word(&bytes[12..20]),
            logical_len: word(&bytes[20..28]),
            auth,
        };
        if header.payload_len > kind.max_payload() {
            return Err(FrameError::TooLong(header.payload_len));
        }
        Ok(header)
    }

    /// Sets the authenticator for content with this hash.
    pub fn sign(&mut self, key: &Hash, hash: &Hash) {
        self.auth = self.authenticator(key, hash);
    }

    /// Whether the authenticator is right for content with this hash.
    pub fn is_authentic(&self, key: &Hash, hash: &Hash) -> bool {
        // blake3::Hash compares in constant time.
        blake3::Hash::from_bytes(self.auth)
            == blake3::Hash::from_bytes(self.authenticator(key, hash))
    }

    /// The chunks of a ZERO or DATA frame in a volume of `size` bytes.
    pub fn chunks(&self, size: u64) -> Result<std::ops::Range<u64>, FrameError> {
        let error = FrameError::Range(self.offset, self.logical_len);
        let end = self
            .offset
            .checked_add(self.logical_len)
            .ok_or(error.clone())?;
        let on_grid = self.offset.is_multiple_of(CHUNK) && (end % CHUNK == 0 || end == size);
        if self.logical_len == 0 || end > size || !on_grid {
            return Err(error);
        }
        let range = self.offset / CHUNK..end.div_ceil(CHUNK);
        if self.kind != Kind::Zero && range.end - range.start != 1 {
            return Err(error);
        }
        Ok(range)
    }

    fn authenticator(&self, key: &Hash, hash: &Hash) -> Hash {
        *blake3::Hasher::new_keyed(key)
            .update(&self.signed_part())
            .update(hash)
            .finalize()
            .as_bytes()
    }

    fn signed_part(&self) -> [u8; SIGNED] {
        let mut bytes = [0; SIGNED];
        bytes[..2].copy_from_slice(&MAGIC);
        bytes[2] = self.kind as u8;
        bytes[3] = self.codec;
        bytes[4..6].copy_from_slice(&self.volume.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.payload_len.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.offset.to_le_bytes());
        bytes[20..28].copy_from_slice(&self.logical_len.to_le_bytes());
        bytes
    }
}

/// A header for chunks `chunks` of a volume of `size` bytes.
pub fn ranged(kind: Kind, volume: u16, chunks: std::ops::Range<u64>, size: u64) -> Header {
    let offset = chunks.start * CHUNK;
    let mut header = Header::new(kind, volume);
    header.offset = offset;
    header.logical_len = (chunks.end * CHUNK).min(size) - offset;
    debug_assert!(digest::chunk_count(size) >= chunks.end);
    header
}

fn word(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> Header {
        let mut header = ranged(Kind::Data, 3, 5..6, 5 * CHUNK + 10);
        header.codec = CODEC_ZSTD;
        header.payload_len = 77;
        header.sign(&[7; 32], &[9; 32]);
        header
    }

    #[test]
    fn headers_survive_the_wire() {
        assert_eq!(Header::decode(&data().encode()), Ok(data()));
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let good = data().encode();
        for bit in 0..HEADER * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_valid_checksum_does_not_excuse_nonsense() {
        let forge = |at: usize, value: u8| {
            let mut bytes = data().encode();
            bytes[at] = value;
            let crc = crc32c::crc32c(&bytes[..60]);
            bytes[60..].copy_from_slice(&crc.to_le_bytes());
            Header::decode(&bytes)
        };
        assert!(matches!(forge(2, 99), Err(FrameError::Unknown(99, _))));
        assert!(matches!(forge(3, 2), Err(FrameError::Unknown(_, 2))));
        assert_eq!(forge(6, 1), Err(FrameError::Reserved));
        assert!(matches!(forge(11, 0x80), Err(FrameError::TooLong(_))));
    }

    #[test]
    fn ranges_must_lie_on_the_grid_and_inside() {
        let size = 3 * CHUNK + 1;
        let chunks = |kind, offset, logical_len| {
            Header {
                offset,
                logical_len,
                ..Header::new(kind, 0)
            }
            .chunks(size)
        };
        assert_eq!(chunks(Kind::Zero, 0, size), Ok(0..4));
        assert_eq!(chunks(Kind::Data, 3 * CHUNK, 1), Ok(3..4));
        for (kind, offset, len) in [
            (Kind::Zero, 0, 0),
            (Kind::Zero, 1, CHUNK),
            (Kind::Zero, 0, CHUNK - 1),
            (Kind::Zero, u64::MAX - 5, 10),
            (Kind::Zero, 4 * CHUNK, CHUNK),
            (Kind::Zero, 3 * CHUNK, CHUNK),
            (Kind::Data, 0, 2 * CHUNK),
            (Kind::Zero, !(CHUNK - 1), CHUNK),
        ] {
            assert!(
                chunks(kind, offset, len).is_err(),
                "{kind:?} {offset} {len}"
            );
        }
    }

    #[test]
    fn the_authenticator_binds_place_and_content() {
        let header = data();
        assert!(header.is_authentic(&[7; 32], &[9; 32]));
        assert!(!header.is_authentic(&[8; 32], &[9; 32]));
        assert!(!header.is_authentic(&[7; 32], &[8; 32]));
        for moved in [
            Header {
                offset: 0,
                ..header.clone()
            },
            Header {
                volume: 4,
                ..header.clone()
            },
            Header {
                logical_len: 11,
                ..header.clone()
            },
        ] {
            assert!(!moved.is_authentic(&[7; 32], &[9; 32]));
        }
    }
}
