//! The 64 chunks of a segment, in as little memory as what is known of them needs.
//!
//! ```text
//!        a chunk is known           all chunks are done
//! open ------------------> open ------------------------> closed: one hash for all
//!  0 bytes     zeros: 0 bytes, content: 40 bytes each
//! ```
//! A zero chunk is a bit, so a peer cannot make a sparse volume expensive by touching
//! it in many places; content costs memory only once somebody had it.

use crate::digest::{self, Hash, ZERO_HASH};

/// A chunk that has content.
struct Content {
    index: u8,
    /// Bytes in blocks that are not zero.
    data: u32,
    hash: Hash,
}

/// The chunks of a segment that is not folded yet.
#[derive(Default)]
pub(super) struct Open {
    /// Chunks whose hash is known, a bit each.
    known: u64,
    /// Chunks that are done.
    done: u64,
    /// Those of the known chunks that are not zero, by their index.
    contents: Box<[Content]>,
}

pub(super) enum Slot {
    Open(Open),
    /// Hash of all chunks, and their data bytes as far as known.
    Closed(Hash, u32),
}

// A volume of the largest size has a million of them.
const _: () = assert!(size_of::<Slot>() <= 40 && size_of::<Content>() <= 40);

impl Open {
    pub(super) fn known(&self) -> u64 {
        self.known
    }

    pub(super) fn done(&self) -> u64 {
        self.done
    }

    /// How many chunks have their hash kept.
    pub(super) fn held(&self) -> usize {
        self.contents.len()
    }

    /// Hash and data bytes of a chunk; None when it is not known.
    pub(super) fn chunk(&self, index: usize) -> Option<(Hash, u32)> {
        if self.known & (1 << index) == 0 {
            return None;
        }
        let found = self.place_of(index).ok().map(|at| &self.contents[at]);
        Some(found.map_or((ZERO_HASH, 0), |content| (content.hash, content.data)))
    }

    /// Notes what a chunk holds that was not known, or not done.
    pub(super) fn note(&mut self, index: usize, hash: Hash, data: u32) {
        self.known |= 1 << index;
        if hash == ZERO_HASH {
            return;
        }
        let content = Content {
            index: index as u8,
            data,
            hash,
        };
        match self.place_of(index) {
            Ok(at) => self.contents[at] = content,
            Err(at) => {
                let mut grown = std::mem::take(&mut self.contents).into_vec();
                grown.reserve_exact(1);
                grown.insert(at, content);
                self.contents = grown.into_boxed_slice();
            }
        }
    }

    /// Marks chunks as done.
    pub(super) fn finish(&mut self, bits: u64) {
        self.done |= bits;
    }

    /// Chunks that are known to have content.
    pub(super) fn content_bits(&self) -> u64 {
        let bits = self.contents.iter().map(|content| 1 << content.index);
        bits.fold(0, |all, bit: u64| all | bit)
    }

    fn place_of(&self, index: usize) -> Result<usize, usize> {
        self.contents
            .binary_search_by_key(&index, |content| usize::from(content.index))
    }
}

impl Slot {
    /// The segment as long as it is not folded.
    pub(super) fn open(&self) -> Option<&Open> {
        match self {
            Slot::Open(open) => Some(open),
            Slot::Closed(..) => None,
        }
    }

    pub(super) fn open_mut(&mut self) -> Option<&mut Open> {
        match self {
            Slot::Open(open) => Some(open),
            Slot::Closed(..) => None,
        }
    }

    /// Whether nothing is known of it.
    pub(super) fn is_untouched(&self) -> bool {
        self.open().is_some_and(|open| open.known == 0)
    }

    pub(super) fn is_done(&self, index: usize) -> bool {
        self.open().is_none_or(|open| open.done & (1 << index) != 0)
    }

    /// Whether a chunk is known to be done and all zero.
    pub(super) fn is_zero(&self, index: usize) -> bool {
        match self {
            Slot::Open(open) => {
                open.done & (1 << index) != 0
                    && open.chunk(index).is_some_and(|(hash, _)| hash == ZERO_HASH)
            }
            Slot::Closed(hash, _) => *hash == ZERO_HASH,
        }
    }

    /// Bytes in blocks that are not zero, of the chunks that are done.
    pub(super) fn done_data_bytes(&self) -> u64 {
        match self {
            Slot::Closed(_, data) => u64::from(*data),
            Slot::Open(open) => open
                .contents
                .iter()
                .filter(|content| open.done & (1 << content.index) != 0)
                .map(|content| u64::from(content.data))
                .sum(),
        }
    }

    /// How many chunks have their hash kept.
    pub(super) fn held(&self) -> usize {
        self.open().map_or(0, Open::held)
    }

    /// Folds it when all its chunks, those of `full`, are done.
    pub(super) fn close_if_full(&mut self, full: u64) {
        if let Slot::Open(open) = self
            && open.done == full
        {
            let mut hashes = [ZERO_HASH; 64];
            let mut data = 0;
            for content in &open.contents {
                hashes[usize::from(content.index)] = content.hash;
                data += content.data;
            }
            let hash = digest::segment_hash(&hashes[..full.count_ones() as usize]);
            *self = Slot::Closed(hash, data);
        }
    }
}
