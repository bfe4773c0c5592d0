//! One bound for what a process keeps in mind of all volumes that it receives.
//!
//! What is known of one volume has a most of its own (ledger.rs, seeds.rs, qcow2.rs);
//! sessions and their volumes are many. So each volume has a share of one budget:
//!
//! ```text
//! when it is opened   what all of it can cost, and a first grain    else refused
//! its seeds           each block that is looked up                  else left out
//! while it arrives    chunks of segments that are not folded, by
//!                     the grain                                     else refused
//! ```
//! Whoever is refused may come again: LIMIT_EXCEEDED, and it goes on from what is
//! durable. A copy goes through a volume about in order, for which the first grain is
//! enough: so one that touches its volumes everywhere uses up what is left, and
//! nothing of what others have.

use std::sync::{Arc, Mutex};

use crate::digest::{chunk_count, segment_count};
use crate::error::{Code, MoverError, Result};
use crate::pool::lock;

/// A segment: 40 bytes of the ledger, and the most of what comes and goes: the hashes
/// and the second ledger of an earlier copy that is looked at, or what of it is
/// written and not noted.
const SEGMENT: u64 = 112;
/// A segment of a volume that becomes an image: which of its clusters hold data.
const MAPPED_SEGMENT: u64 = 128;
/// A chunk with content in a segment that is not folded.
const HELD_CHUNK: u64 = 40;
/// Chunks for which room is taken in one go: 8 GiB of a volume.
pub const GRAIN: usize = 8192;
/// A block that is looked up in seeds, while its table grows.
pub const SEED_BLOCK: u64 = 60;
/// A segment that a dirty bitmap tells of.
pub const DIRTY_SEGMENT: u64 = 32;

/// Memory for what is known of volumes.
pub struct Budget {
    most: u64,
    taken: Mutex<u64>,
}

/// What somebody has of it. Dropped, it is given back.
pub struct Share {
    budget: Arc<Budget>,
    bytes: u64,
    /// Chunks for which there is room, and for which there always is.
    held: usize,
    first: usize,
}

impl Budget {
    /// At most so many bytes.
    pub fn new(most: u64) -> Arc<Budget> {
        let taken = Mutex::default();
        Arc::new(Budget { most, taken })
    }

    /// A share of nothing yet.
    pub fn share(self: &Arc<Self>) -> Share {
        Share {
            budget: Arc::clone(self),
            bytes: 0,
            held: 0,
            first: 0,
        }
    }

    /// Bytes that are shared out.
    pub fn taken(&self) -> u64 {
        *lock(&self.taken)
    }
}

impl Share {
    /// Takes what a volume of `size` bytes can cost as a whole, and its first grain.
    pub fn take_volume(&mut self, size: u64, becomes_image: bool) -> Result<()> {
        let each = SEGMENT + if becomes_image { MAPPED_SEGMENT } else { 0 };
        self.take(segment_count(size) * each)?;
        self.first = chunk_count(size).min(GRAIN as u64) as usize;
        self.hold(0)
    }

    /// Takes or gives back until there is room for so many chunks with content in
    /// segments that are not folded.
    pub fn hold(&mut self, chunks: usize) -> Result<()> {
        let wanted = match chunks > self.first {
            true => chunks.next_multiple_of(GRAIN),
            false => self.first,
        };
        if wanted > self.held {
            self.take((wanted - self.held) as u64 * HELD_CHUNK)?;
        } else {
            self.give_back((self.held - wanted) as u64 * HELD_CHUNK);
        }
        self.held = wanted;
        Ok(())
    }

    /// Takes so many bytes more.
    pub fn take(&mut self, bytes: u64) -> Result<()> {
        let most = self.budget.most;
        let mut taken = lock(&self.budget.taken);
        if bytes > most - *taken {
            let text = format!(
                "what is kept in memory of the volumes that arrive here takes {} of the {} KiB for it, and this volume needs {} KiB more; copy again when another copy has ended, or give this receiver more memory for volumes",
                *taken >> 10,
                most >> 10,
                bytes.div_ceil(1024)
            );
            return Err(MoverError::new(Code::LimitExceeded, text).at_receiver());
        }
        *taken += bytes;
        self.bytes += bytes;
        Ok(())
    }

    /// Gives so many bytes back.
    pub fn give_back(&mut self, bytes: u64) {
        self.bytes -= bytes;
        *lock(&self.budget.taken) -= bytes;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRAIN_BYTES: u64 = GRAIN as u64 * HELD_CHUNK;
    const MIB: u64 = 1 << 20;

    #[test]
    fn what_is_dropped_is_there_for_others() {
        let budget = Budget::new(2 * SEGMENT + 128 * HELD_CHUNK);
        let mut share = budget.share();
        share.take_volume(128 * MIB, false).unwrap();
        let error = budget.share().take_volume(1, false).unwrap_err();
        assert_eq!((error.code, error.retryable), (Code::LimitExceeded, true));
        drop(share);
        assert_eq!(budget.taken(), 0);
        budget.share().take_volume(1, false).unwrap();
        assert!(budget.share().take_volume(128 * MIB, true).is_err());
        assert_eq!(budget.taken(), 0, "what was refused is held");
    }

    #[test]
    fn chunks_are_counted_by_the_grain_and_given_back() {
        let budget = Budget::new(3 * GRAIN_BYTES);
        let mut share = budget.share();
        share.first = 5;
        let grains = |count| count * GRAIN;
        for (chunks, held) in [
            (0, 5),
            (5, 5),
            (6, grains(1)),
            (grains(1) + 1, grains(2)),
            (grains(3), grains(3)),
        ] {
            share.hold(chunks).unwrap();
            assert_eq!(budget.taken(), held as u64 * HELD_CHUNK, "{chunks} chunks");
        }
        assert!(share.hold(grains(3) + 1).is_err());
        assert_eq!(budget.taken(), 3 * GRAIN_BYTES, "of what was refused");
        share.hold(1).unwrap();
        assert_eq!(budget.taken(), 5 * HELD_CHUNK);
    }
}
