//! The 64 chunks of a segment, in as little memory as what is known of them needs.
//!
//! ```text
//!        a chunk is known         all chunks are done
//! empty -----------------> open ----------------------> closed: one hash for all
//! ```

use crate::digest::{self, Hash, ZERO_HASH};

/// The chunks of a segment that is not folded yet.
#[derive(Clone)]
pub struct OpenSegment {
    /// Chunks whose hash is known, a bit each.
    pub known: u64,
    /// Chunks that are done.
    pub done: u64,
    /// Hashes of the known chunks; zero for a zero chunk.
    pub hashes: [Hash; 64],
    /// Bytes in blocks that are not zero, of the known chunks.
    pub data: [u32; 64],
}

pub(super) enum Slot {
    Empty,
    Open(Box<OpenSegment>),
    /// Hash of all chunks, and their data bytes as far as known.
    Closed(Hash, u64),
}

impl Slot {
    pub(super) fn is_done(&self, index: usize) -> bool {
        match self {
            Slot::Empty => false,
            Slot::Open(open) => open.done & (1 << index) != 0,
            Slot::Closed(..) => true,
        }
    }

    /// Whether a chunk is known to be done and all zero.
    pub(super) fn is_zero(&self, index: usize) -> bool {
        match self {
            Slot::Empty => false,
            Slot::Open(open) => open.done & (1 << index) != 0 && open.hashes[index] == ZERO_HASH,
            Slot::Closed(hash, _) => *hash == ZERO_HASH,
        }
    }

    /// Bytes in blocks that are not zero, of the chunks that are done.
    pub(super) fn done_data_bytes(&self) -> u64 {
        match self {
            Slot::Empty => 0,
            Slot::Closed(_, data) => *data,
            Slot::Open(open) => (0..64)
                .filter(|i| open.done & (1 << i) != 0)
                .map(|i| u64::from(open.data[i]))
                .sum(),
        }
    }

    /// What is known, to add to it; None when it is folded.
    pub(super) fn open(&mut self) -> Option<&mut OpenSegment> {
        if matches!(self, Slot::Empty) {
            *self = Slot::Open(Box::new(OpenSegment {
                known: 0,
                done: 0,
                hashes: [ZERO_HASH; 64],
                data: [0; 64],
            }));
        }
        match self {
            Slot::Open(open) => Some(open),
            _ => None,
        }
    }

    /// Folds it when all its chunks, those of `full`, are done.
    pub(super) fn close_if_full(&mut self, full: u64) {
        if let Slot::Open(open) = self
            && open.done == full
        {
            let hash = digest::segment_hash(&open.hashes[..full.count_ones() as usize]);
            let data = open.data.iter().map(|bytes| u64::from(*bytes)).sum();
            *self = Slot::Closed(hash, data);
        }
    }
}
