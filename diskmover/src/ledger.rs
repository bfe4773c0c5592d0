//! What is known of a volume, chunk by chunk, in memory that does not grow with it.
//!
//! A chunk is first *known* (its hash is), then *done* (sender: acknowledged;
//! receiver: written). When all chunks of a segment are done, `close_if_full` folds
//! their hashes into one (ledger/segment.rs).

mod segment;

use std::ops::Range;

use crate::digest::{self, CHUNK, Hash, SEGMENT_CHUNKS, ZERO_HASH};
use segment::Slot;

pub use segment::OpenSegment;

/// The state of all chunks of one volume.
pub struct Ledger {
    size: u64,
    slots: Vec<Slot>,
    done_bytes: u64,
    data_bytes: u64,
}

/// A chunk was given two different contents.
#[derive(Debug, PartialEq, Eq)]
pub struct Conflict;

impl Ledger {
    /// Nothing known about a volume of `size` bytes, at most `MAX_SIZE`.
    pub fn new(size: u64) -> Self {
        let count = digest::segment_count(size) as usize;
        Ledger {
            size,
            slots: std::iter::repeat_with(|| Slot::Empty).take(count).collect(),
            done_bytes: 0,
            data_bytes: 0,
        }
    }

    /// Bytes of the volume.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of the chunks that are done.
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes
    }

    /// Bytes in blocks that are not zero, of the chunks that are done.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Whether all chunks are done.
    pub fn is_complete(&self) -> bool {
        self.done_bytes == self.size
    }

    /// The bits that chunks of this segment can have.
    pub fn full_mask(&self, segment: usize) -> u64 {
        let chunks = digest::chunk_count(self.size) - segment as u64 * SEGMENT_CHUNKS;
        if chunks >= SEGMENT_CHUNKS {
            u64::MAX
        } else {
            (1 << chunks) - 1
        }
    }

    /// Whether a chunk is done.
    pub fn is_done(&self, chunk: u64) -> bool {
        let slot = &self.slots[(chunk / SEGMENT_CHUNKS) as usize];
        slot.is_done((chunk % SEGMENT_CHUNKS) as usize)
    }

    /// Whether a chunk is known to be done and all zero.
    pub fn is_zero(&self, chunk: u64) -> bool {
        let slot = &self.slots[(chunk / SEGMENT_CHUNKS) as usize];
        slot.is_zero((chunk % SEGMENT_CHUNKS) as usize)
    }

    /// The done chunks of a segment.
    pub fn done_bits(&self, segment: usize) -> u64 {
        match &self.slots[segment] {
            Slot::Empty => 0,
            Slot::Open(open) => open.done,
            Slot::Closed(..) => self.full_mask(segment),
        }
    }

    /// The segment, unless it is untouched or folded.
    pub fn open_segment(&self, segment: usize) -> Option<&OpenSegment> {
        match &self.slots[segment] {
            Slot::Open(open) => Some(open),
            _ => None,
        }
    }

    /// The hash of a folded segment.
    pub fn closed_hash(&self, segment: usize) -> Option<Hash> {
        match &self.slots[segment] {
            Slot::Closed(hash, _) => Some(*hash),
            _ => None,
        }
    }

    /// The hash of a folded segment, and its data bytes as far as known.
    pub fn closed(&self, segment: usize) -> Option<(Hash, u32)> {
        match &self.slots[segment] {
            Slot::Closed(hash, data) => Some((*hash, *data as u32)),
            _ => None,
        }
    }

    /// Number of segments.
    pub fn segments(&self) -> usize {
        self.slots.len()
    }

    /// Notes the content of a chunk. The same content again is fine.
    pub fn offer(&mut self, chunk: u64, hash: Hash, data: u32) -> Result<(), Conflict> {
        let bit = 1 << (chunk % SEGMENT_CHUNKS);
        let index = (chunk % SEGMENT_CHUNKS) as usize;
        let Some(open) = self.slots[(chunk / SEGMENT_CHUNKS) as usize].open() else {
            return Ok(()); // folded: the root digest will tell
        };
        if open.known & bit != 0 && open.hashes[index] != hash {
            return Err(Conflict);
        }
        if open.done & bit != 0 {
            return Ok(()); // counted as it is
        }
        open.known |= bit;
        open.hashes[index] = hash;
        open.data[index] = data;
        Ok(())
    }

    /// Marks a known chunk as done; true when it was not before.
    pub fn confirm(&mut self, chunk: u64) -> bool {
        let bit = 1 << (chunk % SEGMENT_CHUNKS);
        let Some(open) = self.slots[(chunk / SEGMENT_CHUNKS) as usize].open() else {
            return false;
        };
        if open.known & bit == 0 || open.done & bit != 0 {
            return false;
        }
        open.done |= bit;
        let data = open.data[(chunk % SEGMENT_CHUNKS) as usize];
        self.done_bytes += digest::chunk_len(self.size, chunk) as u64;
        self.data_bytes += u64::from(data);
        true
    }

    /// Runs of chunks among `first..end` that are not done. Fails when one is
    /// known to have content; in folded segments that is for the root digest to
    /// find out.
    pub fn missing_zeros(&self, first: u64, end: u64) -> Result<Vec<Range<u64>>, Conflict> {
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut add = |run: Range<u64>| match found.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => found.push(run),
        };
        let mut chunk = first;
        while chunk < end {
            let stop = ((chunk / SEGMENT_CHUNKS + 1) * SEGMENT_CHUNKS).min(end);
            match &self.slots[(chunk / SEGMENT_CHUNKS) as usize] {
                Slot::Empty => add(chunk..stop),
                Slot::Closed(..) => {}
                Slot::Open(open) => {
                    for one in chunk..stop {
                        let index = (one % SEGMENT_CHUNKS) as usize;
                        if open.known & (1 << index) != 0 && open.hashes[index] != ZERO_HASH {
                            return Err(Conflict);
                        }
                        if open.done & (1 << index) == 0 {
                            add(one..one + 1);
                        }
                    }
                }
            }
            chunk = stop;
        }
        Ok(found)
    }

    /// Marks the zero chunks `first..end` as done; fails if one has content.
    pub fn confirm_zeros(&mut self, first: u64, end: u64) -> Result<(), Conflict> {
        let mut chunk = first;
        while chunk < end {
            let segment = (chunk / SEGMENT_CHUNKS) as usize;
            let stop = ((segment as u64 + 1) * SEGMENT_CHUNKS).min(end);
            if self.covers(segment, chunk, stop) && matches!(self.slots[segment], Slot::Empty) {
                self.slots[segment] = Slot::Closed(ZERO_HASH, 0);
                self.done_bytes += (stop * CHUNK).min(self.size) - chunk * CHUNK;
            } else {
                for one in chunk..stop {
                    self.offer(one, ZERO_HASH, 0)?;
                    self.confirm(one);
                }
            }
            chunk = stop;
        }
        Ok(())
    }

    /// Folds a segment when all its chunks are done.
    pub fn close_if_full(&mut self, segment: usize) {
        let full = self.full_mask(segment);
        self.slots[segment].close_if_full(full);
    }

    /// Forgets all that is known of a segment.
    pub fn forget(&mut self, segment: usize) {
        let first = segment as u64 * SEGMENT_CHUNKS;
        let done = self.done_bits(segment);
        let chunks = (0..SEGMENT_CHUNKS).filter(|i| done & (1 << i) != 0);
        self.done_bytes -= chunks
            .map(|i| digest::chunk_len(self.size, first + i) as u64)
            .sum::<u64>();
        self.data_bytes -= self.slots[segment].done_data_bytes();
        self.slots[segment] = Slot::Empty;
    }

    /// Takes over a whole segment that the other end has made durable.
    pub fn adopt_closed(&mut self, segment: usize, hash: Hash, data: u64) {
        if matches!(self.slots[segment], Slot::Empty) {
            let first = segment as u64 * SEGMENT_CHUNKS;
            let end = (first + SEGMENT_CHUNKS) * CHUNK;
            self.slots[segment] = Slot::Closed(hash, data);
            self.data_bytes += data;
            self.done_bytes += end.min(self.size) - first * CHUNK;
        }
    }

    /// Takes over the other end's count of data bytes.
    pub fn set_data_bytes(&mut self, data_bytes: u64) {
        self.data_bytes = data_bytes;
    }

    /// The root digest; None while a segment is not folded.
    pub fn root(&self) -> Option<Hash> {
        let closed = |slot: &Slot| matches!(slot, Slot::Closed(..));
        self.slots.iter().all(closed).then(|| {
            digest::root(
                self.size,
                self.slots.iter().filter_map(|slot| match slot {
                    Slot::Closed(hash, _) => Some(hash),
                    _ => None,
                }),
            )
        })
    }

    fn covers(&self, segment: usize, first: u64, end: u64) -> bool {
        first == segment as u64 * SEGMENT_CHUNKS
            && end - first == u64::from(self.full_mask(segment).count_ones())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 70 * CHUNK + 5;

    #[test]
    fn a_volume_is_complete_when_all_chunks_are_done() {
        let mut ledger = Ledger::new(SIZE);
        assert_eq!(ledger.full_mask(1), 0b111_1111);
        for chunk in 0..71 {
            ledger.offer(chunk, [chunk as u8 + 1; 32], 9).unwrap();
            assert!(ledger.confirm(chunk));
            assert!(!ledger.confirm(chunk), "counted twice");
        }
        assert!(ledger.is_complete());
        assert_eq!(ledger.data_bytes(), 71 * 9);
        assert_eq!(ledger.root(), None);
        ledger.close_if_full(0);
        ledger.close_if_full(1);
        assert!(ledger.root().is_some());
    }

    #[test]
    fn changed_content_is_a_conflict() {
        let mut ledger = Ledger::new(SIZE);
        ledger.offer(3, [1; 32], 1).unwrap();
        assert_eq!(ledger.offer(3, [2; 32], 1), Err(Conflict));
        assert_eq!(ledger.confirm_zeros(0, 10), Err(Conflict));
    }

    #[test]
    fn zeros_in_one_go_and_one_by_one_give_the_same_root() {
        let mut at_once = Ledger::new(SIZE);
        at_once.confirm_zeros(0, 71).unwrap();
        let mut single = Ledger::new(SIZE);
        for chunk in (0..71).rev() {
            single.confirm_zeros(chunk, chunk + 1).unwrap();
        }
        single.close_if_full(0);
        single.close_if_full(1);
        assert!(at_once.is_complete() && single.is_complete());
        assert_eq!(at_once.root(), single.root());
    }

    #[test]
    fn zeros_are_missing_where_nothing_is_done() {
        let mut ledger = Ledger::new(SIZE);
        assert_eq!(ledger.missing_zeros(0, 71), Ok(vec![0..71]));
        ledger.confirm_zeros(2, 4).unwrap();
        assert_eq!(ledger.missing_zeros(1, 71), Ok(vec![1..2, 4..71]));
        ledger.offer(70, [1; 32], 1).unwrap();
        assert_eq!(ledger.missing_zeros(60, 71), Err(Conflict));
        assert_eq!(ledger.missing_zeros(60, 70), Ok(vec![60..70]));
        for chunk in 64..71 {
            let _ = ledger.offer(chunk, [1; 32], 1);
            ledger.confirm(chunk);
        }
        ledger.close_if_full(1);
        assert_eq!(ledger.missing_zeros(60, 71), Ok(vec![60..64]));
    }

    #[test]
    fn an_unknown_chunk_cannot_be_confirmed() {
        let mut ledger = Ledger::new(SIZE);
        assert!(!ledger.confirm(0));
        assert_eq!(ledger.done_bytes(), 0);
    }

    #[test]
    fn a_forgotten_segment_counts_no_more() {
        let mut ledger = Ledger::new(SIZE);
        for chunk in 0..70 {
            ledger.offer(chunk, [1; 32], 9).unwrap();
            ledger.confirm(chunk);
        }
        ledger.close_if_full(0);
        ledger.forget(1);
        assert_eq!(
            (ledger.done_bytes(), ledger.data_bytes()),
            (64 * CHUNK, 64 * 9)
        );
        ledger.forget(0);
        assert_eq!((ledger.done_bytes(), ledger.data_bytes()), (0, 0));
        assert!(!ledger.is_done(0));
        ledger.offer(0, [2; 32], 9).unwrap();
    }

    #[test]
    fn an_empty_volume_has_a_root() {
        let ledger = Ledger::new(0);
        assert!(ledger.is_complete());
        assert!(ledger.root().is_some());
    }
}
