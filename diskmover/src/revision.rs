//! What has changed since an earlier copy, as a dirty bitmap tells.
//!
//! ```text
//! sender                                   receiver
//! DIRTY  digest of the earlier copy,  ->
//!        chunks written since
//! OPEN                                ->   reads what stands at the target
//!                                          digest as in DIRTY: all other chunks are done
//!                                          another one: nothing is, all is compared
//!                                     <-   STATE, OPENED
//! ```
//! So a bitmap saves reading the source, and is never a reason to publish
//! something else than was promised: the root digest of the result follows from
//! what the receiver read and what it was sent.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::digest::{CHUNK, Hash, SEGMENT_CHUNKS, chunk_count, segment_count};
use crate::entry::take;

/// Most bytes of a DIRTY frame.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Most segments that a revision may name: those of the largest volume.
pub const MAX_SEGMENTS: usize = 1 << 20;
const ENTRY: usize = 12;

/// An earlier copy, and the chunks that may differ from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revision {
    /// Root digest of the earlier copy.
    pub since: Hash,
    /// By segment, a bit for each chunk.
    dirty: BTreeMap<u32, u64>,
}

impl Revision {
    /// Nothing has changed since.
    pub fn new(since: Hash) -> Revision {
        Revision {
            since,
            dirty: BTreeMap::new(),
        }
    }

    /// Notes that bytes may have changed.
    pub fn mark(&mut self, bytes: Range<u64>) {
        if bytes.is_empty() {
            return;
        }
        let (first, end) = (bytes.start / CHUNK, bytes.end.div_ceil(CHUNK));
        for segment in first / SEGMENT_CHUNKS..end.div_ceil(SEGMENT_CHUNKS) {
            let base = segment * SEGMENT_CHUNKS;
            let from = first.saturating_sub(base);
            let to = (end - base).min(SEGMENT_CHUNKS);
            let bits = (u64::MAX >> (SEGMENT_CHUNKS - to)) & (u64::MAX << from);
            *self.dirty.entry(segment as u32).or_default() |= bits;
        }
    }

    /// The chunks of a segment that may have changed.
    pub fn dirty_bits(&self, segment: usize) -> u64 {
        let segment = u32::try_from(segment).ok();
        segment
            .and_then(|s| self.dirty.get(&s))
            .copied()
            .unwrap_or(0)
    }

    /// Segments of which something may have changed.
    pub fn dirty_segments(&self) -> usize {
        self.dirty.len()
    }

    /// Whether nothing of a volume of this size can be relied on.
    pub fn is_all(&self, size: u64) -> bool {
        let dirty = self.dirty.values().map(|bits| u64::from(bits.count_ones()));
        dirty.sum::<u64>() >= chunk_count(size)
    }

    /// Whether it can be about a volume of this size.
    pub fn fits(&self, size: u64) -> bool {
        let last = self.dirty.last_key_value();
        last.is_none_or(|(segment, bits)| {
            let chunk = u64::from(*segment) * SEGMENT_CHUNKS + u64::from(63 - bits.leading_zeros());
            u64::from(*segment) < segment_count(size) && chunk < chunk_count(size)
        })
    }

    /// The payloads of the DIRTY frames that tell it: one at least.
    pub fn encode(&self) -> Vec<Vec<u8>> {
        let most = (MAX_PAYLOAD - self.since.len()) / ENTRY;
        let mut out = vec![self.since.to_vec()];
        let mut room = most;
        for (segment, bits) in &self.dirty {
            if room == 0 {
                out.push(self.since.to_vec());
                room = most;
            }
            room -= 1;
            if let Some(last) = out.last_mut() {
                last.extend(segment.to_le_bytes());
                last.extend(bits.to_le_bytes());
            }
        }
        out
    }

    /// Parses a payload.
    pub fn decode(mut payload: &[u8]) -> Option<Revision> {
        let rest = &mut payload;
        let mut revision = Revision::new(take(rest)?);
        while !rest.is_empty() {
            let segment = u32::from_le_bytes(take(rest)?);
            let bits = u64::from_le_bytes(take(rest)?);
            if segment as usize >= MAX_SEGMENTS || bits == 0 {
                return None;
            }
            *revision.dirty.entry(segment).or_default() |= bits;
        }
        Some(revision)
    }

    /// Adds what a further frame tells; one of another earlier copy begins anew.
    pub fn join(&mut self, more: Revision) {
        if self.since != more.since {
            *self = more;
            return;
        }
        for (segment, bits) in more.dirty {
            *self.dirty.entry(segment).or_default() |= bits;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 200 * CHUNK + 5;

    fn revision(ranges: &[Range<u64>]) -> Revision {
        let mut revision = Revision::new([3; 32]);
        ranges.iter().for_each(|range| revision.mark(range.clone()));
        revision
    }

    #[test]
    fn every_chunk_that_is_touched_is_dirty() {
        let found = revision(&[
            0..1,
            5 * CHUNK - 1..5 * CHUNK + 1,
            7..7,
            63 * CHUNK..65 * CHUNK,
        ]);
        assert_eq!(found.dirty_bits(0), 1 | 0b11_0000 | 1 << 63);
        assert_eq!(found.dirty_bits(1), 1);
        assert_eq!((found.dirty_bits(2), found.dirty_segments()), (0, 2));
        let all = revision(&[0..SIZE]);
        assert_eq!(all.dirty_bits(2), u64::MAX);
        assert_eq!(all.dirty_bits(3), (1 << 9) - 1);
        assert!(all.is_all(SIZE) && !found.is_all(SIZE));
    }

    #[test]
    fn what_reaches_beyond_the_volume_does_not_fit() {
        assert!(revision(&[]).fits(0));
        assert!(revision(&[0..SIZE]).fits(SIZE));
        assert!(!revision(&[0..SIZE]).fits(SIZE - 5));
        assert!(!revision(&[0..1]).fits(0));
    }

    #[test]
    fn it_survives_the_wire_in_as_many_frames_as_it_takes() {
        let mut long = Revision::new([9; 32]);
        for segment in 0..200_000 {
            long.mark(segment * 64 * CHUNK..segment * 64 * CHUNK + 1);
        }
        for sent in [revision(&[]), revision(&[0..SIZE]), long] {
            let payloads = sent.encode();
            assert!(payloads.iter().all(|payload| payload.len() <= MAX_PAYLOAD));
            let mut heard = payloads
                .iter()
                .map(|payload| Revision::decode(payload).unwrap());
            let mut joined = heard.next().unwrap();
            heard.for_each(|more| joined.join(more));
            assert_eq!(joined, sent);
        }
    }

    #[test]
    fn crumbs_and_impossible_segments_are_refused() {
        let good = revision(&[0..1]).encode().remove(0);
        for len in 0..good.len() {
            assert_eq!(Revision::decode(&good[..len]).is_some(), len == 32, "{len}");
        }
        let far = [&good[..32], &(MAX_SEGMENTS as u32).to_le_bytes(), &[1; 8]].concat();
        assert_eq!(Revision::decode(&far), None);
        let none = [&good[..36], &[0; 8]].concat();
        assert_eq!(Revision::decode(&none), None);
    }
}
