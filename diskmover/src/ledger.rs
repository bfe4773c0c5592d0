//! What is known of a volume, chunk by chunk, in memory that is bounded.
//!
//! A chunk is first *known* (its hash is), then *done* (sender: acknowledged;
//! receiver: written). When all chunks of a segment are done, `close_if_full` folds
//! their hashes into one (ledger/segment.rs).
//!
//! A segment costs 40 bytes, whatever is done of it: 40 MiB for the largest volume.
//! A chunk with content of a segment that is not folded costs 40 more. A copy goes
//! through a volume in order and has few of those, but the other end can name them
//! all; so there is a most, and what would be more is refused.

mod segment;

use std::ops::Range;

use crate::digest::{self, CHUNK, Hash, SEGMENT_CHUNKS, ZERO_HASH};
use segment::{Open, Slot};

/// Most chunks with content in segments that are not folded: 80 MiB, and 2 TiB.
pub const MOST_HELD: usize = 2 << 20;

/// How many of them are taken over from an earlier copy. It leaves room for what
/// is under way.
pub const MOST_ADOPTED: usize = MOST_HELD / 4 * 3;

/// The state of all chunks of one volume.
pub struct Ledger {
    size: u64,
    slots: Vec<Slot>,
    held: usize,
    done_bytes: u64,
    data_bytes: u64,
}

/// Why what a chunk holds is not noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It was given another content before.
    Conflict,
    /// There are `MOST_HELD` already.
    Full,
}

impl Ledger {
    /// Nothing known about a volume of `size` bytes, at most `MAX_SIZE`.
    pub fn new(size: u64) -> Self {
        let count = digest::segment_count(size) as usize;
        Ledger {
            size,
            slots: std::iter::repeat_with(|| Slot::Open(Open::default()))
                .take(count)
                .collect(),
            held: 0,
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

    /// Chunks with content in segments that are not folded.
    pub fn held(&self) -> usize {
        self.held
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
        let open = self.slots[segment].open();
        open.map_or_else(|| self.full_mask(segment), Open::done)
    }

    /// The chunks of a segment whose hash is known; all, when it is folded.
    pub fn known_bits(&self, segment: usize) -> u64 {
        let open = self.slots[segment].open();
        open.map_or_else(|| self.full_mask(segment), Open::known)
    }

    /// Hash and data bytes of a chunk; None when it is not known, or folded.
    pub fn chunk(&self, segment: usize, index: usize) -> Option<(Hash, u32)> {
        self.slots[segment].open()?.chunk(index)
    }

    /// The hash of a folded segment, and its data bytes as far as known.
    pub fn closed(&self, segment: usize) -> Option<(Hash, u32)> {
        match &self.slots[segment] {
            Slot::Closed(hash, data) => Some((*hash, *data)),
            Slot::Open(_) => None,
        }
    }

    /// Number of segments.
    pub fn segments(&self) -> usize {
        self.slots.len()
    }

    /// Notes the content of a chunk. The same content again is fine.
    pub fn offer(&mut self, chunk: u64, hash: Hash, data: u32) -> Result<(), Unfit> {
        let index = (chunk % SEGMENT_CHUNKS) as usize;
        let Some(open) = self.slots[(chunk / SEGMENT_CHUNKS) as usize].open_mut() else {
            return Ok(()); // folded: the root digest will tell
        };
        let known = open.chunk(index);
        if known.is_some_and(|(other, _)| other != hash) {
            return Err(Unfit::Conflict);
        }
        if open.done() & (1 << index) != 0 {
            return Ok(()); // counted as it is
        }
        let more = known.is_none() && hash != ZERO_HASH;
        if more && self.held >= MOST_HELD {
            return Err(Unfit::Full);
        }
        self.held += usize::from(more);
        open.note(index, hash, data);
        Ok(())
    }

    /// Marks a known chunk as done; true when it was not before.
    pub fn confirm(&mut self, chunk: u64) -> bool {
        let index = (chunk % SEGMENT_CHUNKS) as usize;
        let Some(open) = self.slots[(chunk / SEGMENT_CHUNKS) as usize].open_mut() else {
            return false;
        };
        let Some((_, data)) = open
            .chunk(index)
            .filter(|_| open.done() & (1 << index) == 0)
        else {
            return false;
        };
        open.finish(1 << index);
        self.done_bytes += digest::chunk_len(self.size, chunk) as u64;
        self.data_bytes += u64::from(data);
        true
    }

    /// Whether chunks `first..end` can be zeros: fails when one is known to have
    /// content. In folded segments that is for the root digest to find out.
    pub fn check_zeros(&self, first: u64, end: u64) -> Result<(), Unfit> {
        let filled = pieces(first..end).any(|(segment, bits)| {
            let open = self.slots[segment].open();
            open.is_some_and(|open| open.content_bits() & bits != 0)
        });
        if filled { Err(Unfit::Conflict) } else { Ok(()) }
    }

    /// The first run of chunks among `first..end` that are not done.
    pub fn next_missing(&self, first: u64, end: u64) -> Option<Range<u64>> {
        let start = lowest(first..end, |segment| !self.done_bits(segment))?;
        let stop = lowest(start..end, |segment| self.done_bits(segment));
        Some(start..stop.unwrap_or(end))
    }

    /// Marks the zero chunks `first..end` as done; fails if one has content.
    pub fn confirm_zeros(&mut self, first: u64, end: u64) -> Result<(), Unfit> {
        for (segment, bits) in pieces(first..end) {
            let base = segment as u64 * SEGMENT_CHUNKS;
            if bits == self.full_mask(segment) && self.slots[segment].is_untouched() {
                self.slots[segment] = Slot::Closed(ZERO_HASH, 0);
                self.done_bytes += ((base + SEGMENT_CHUNKS) * CHUNK).min(self.size) - base * CHUNK;
            } else {
                for index in (0..SEGMENT_CHUNKS).filter(|index| bits & (1 << index) != 0) {
                    self.offer(base + index, ZERO_HASH, 0)?;
                    self.confirm(base + index);
                }
            }
        }
        Ok(())
    }

    /// Folds a segment when all its chunks are done.
    pub fn close_if_full(&mut self, segment: usize) {
        let full = self.full_mask(segment);
        let before = self.slots[segment].held();
        self.slots[segment].close_if_full(full);
        self.held -= before - self.slots[segment].held();
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
        self.held -= self.slots[segment].held();
        self.slots[segment] = Slot::Open(Open::default());
    }

    /// Takes over a whole segment that the other end has made durable.
    pub fn adopt_closed(&mut self, segment: usize, hash: Hash, data: u32) {
        if self.slots[segment].is_untouched() {
            let first = segment as u64 * SEGMENT_CHUNKS;
            let end = (first + SEGMENT_CHUNKS) * CHUNK;
            self.slots[segment] = Slot::Closed(hash, data);
            self.data_bytes += u64::from(data);
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
                    Slot::Open(_) => None,
                }),
            )
        })
    }
}

/// The segments that a range of chunks touches, each with its chunks of the range.
pub fn pieces(chunks: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let segments = chunks.start / SEGMENT_CHUNKS..chunks.end.div_ceil(SEGMENT_CHUNKS);
    segments.map(move |segment| {
        let base = segment * SEGMENT_CHUNKS;
        let from = chunks.start.saturating_sub(base);
        let to = (chunks.end - base).min(SEGMENT_CHUNKS);
        let bits = (u64::MAX >> (SEGMENT_CHUNKS - to)) & (u64::MAX << from);
        (segment as usize, bits)
    })
}

/// The first chunk of a range whose bit is set in what `bits` says of its segment.
fn lowest(chunks: Range<u64>, bits: impl Fn(usize) -> u64) -> Option<u64> {
    pieces(chunks).find_map(|(segment, asked)| {
        let found = asked & bits(segment);
        let index = u64::from(found.trailing_zeros());
        (found != 0).then_some(segment as u64 * SEGMENT_CHUNKS + index)
    })
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
        assert_eq!(ledger.offer(3, [2; 32], 1), Err(Unfit::Conflict));
        assert_eq!(ledger.confirm_zeros(0, 10), Err(Unfit::Conflict));
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

    fn missing(ledger: &Ledger, chunks: Range<u64>) -> Vec<Range<u64>> {
        let mut from = chunks.start;
        let next = || {
            let run = ledger.next_missing(from, chunks.end)?;
            from = run.end;
            Some(run)
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn zeros_are_missing_where_nothing_is_done() {
        let mut ledger = Ledger::new(SIZE);
        assert_eq!(missing(&ledger, 0..71), [0..71]);
        ledger.confirm_zeros(2, 4).unwrap();
        assert_eq!(missing(&ledger, 1..71), [1..2, 4..71]);
        ledger.offer(70, [1; 32], 1).unwrap();
        assert_eq!(ledger.check_zeros(60, 71), Err(Unfit::Conflict));
        assert_eq!(ledger.check_zeros(60, 70), Ok(()));
        assert_eq!(missing(&ledger, 60..70), [60..70]);
        for chunk in 64..71 {
            let _ = ledger.offer(chunk, [1; 32], 1);
            ledger.confirm(chunk);
        }
        ledger.close_if_full(1);
        assert_eq!(ledger.check_zeros(60, 71), Ok(()), "folded");
        assert_eq!(missing(&ledger, 60..71), [60..64]);
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
