//! From block status to ranges that have to be read.
//!
//! The server's word only ever lets us skip. Where it says nothing, says it
//! wrongly, or reaches beyond the end, we read.

use std::ops::Range;

/// Some bytes, in order, and what the server says of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub len: u32,
    /// Flags of the context.
    pub flags: u32,
}

/// What is known of a part of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// The part.
    pub range: Range<u64>,
    /// What of it counts, in order, apart and not touching.
    pub counts: Vec<Range<u64>>,
}

impl Known {
    /// Reads the extents that answer for `asked`.
    ///
    /// An answer may be shorter than asked for: then less is known. One that says
    /// nothing at all makes all of `asked` count.
    pub fn of(asked: Range<u64>, extents: &[Extent], counts: impl Fn(u32) -> bool) -> Known {
        let mut known = Known {
            range: asked.start..asked.start,
            counts: Vec::new(),
        };
        for extent in extents.iter().take_while(|extent| extent.len > 0) {
            let start = known.range.end;
            let end = (start + u64::from(extent.len)).min(asked.end);
            if counts(extent.flags) {
                known.add(start..end);
            }
            known.range.end = end;
            if end == asked.end {
                break;
            }
        }
        if known.range.is_empty() {
            known = Known::all(asked);
        }
        known
    }

    /// Nothing is known: all of it counts.
    pub fn all(range: Range<u64>) -> Known {
        Known {
            counts: vec![range.clone()],
            range,
        }
    }

    /// The first part at or after `from` that counts.
    pub fn next(&self, from: u64) -> Option<Range<u64>> {
        let index = self.counts.partition_point(|one| one.end <= from);
        self.counts
            .get(index)
            .map(|one| one.start.max(from)..one.end)
    }

    fn add(&mut self, new: Range<u64>) {
        match self.counts.last_mut() {
            Some(last) if last.end == new.start => last.end = new.end,
            _ => self.counts.push(new),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::proto::allocation::ZERO;

    const HOLE: u32 = 1;

    fn known(extents: &[(u32, u32)]) -> Known {
        let extents: Vec<_> = extents
            .iter()
            .map(|(len, flags)| Extent {
                len: *len,
                flags: *flags,
            })
            .collect();
        Known::of(100..200, &extents, |flags| flags & ZERO == 0)
    }

    #[test]
    fn only_zero_lets_us_skip() {
        let found = known(&[(10, 0), (10, HOLE), (10, ZERO), (10, ZERO | HOLE), (60, 0)]);
        assert_eq!(found.range, 100..200);
        assert_eq!(found.counts, [100..120, 140..200]);
        assert_eq!(found.next(105), Some(105..120));
        assert_eq!(found.next(120), Some(140..200));
        assert_eq!(found.next(200), None);
    }

    #[test]
    fn flags_that_we_do_not_know_change_nothing() {
        assert_eq!(known(&[(100, 1 << 31)]).counts, [100..200]);
        assert_eq!(known(&[(100, 1 << 31 | ZERO)]).counts, []);
    }

    #[test]
    fn an_answer_that_is_short_is_known_so_far() {
        let found = known(&[(10, ZERO)]);
        assert_eq!((found.range, found.counts), (100..110, vec![]));
    }

    #[test]
    fn an_answer_that_reaches_beyond_is_cut() {
        assert_eq!(
            known(&[(10, ZERO), (u32::MAX, 0), (9, 0)]).counts,
            [110..200]
        );
        assert_eq!(
            known(&[(u32::MAX, ZERO)]),
            Known {
                range: 100..200,
                counts: vec![]
            }
        );
    }

    #[test]
    fn an_answer_that_says_nothing_means_data() {
        assert_eq!(known(&[]), Known::all(100..200));
        assert_eq!(known(&[(0, ZERO), (100, ZERO)]), Known::all(100..200));
    }

    #[test]
    fn what_follows_an_empty_extent_is_not_believed() {
        let found = known(&[(10, ZERO), (0, 0), (90, ZERO)]);
        assert_eq!(found.range, 100..110);
    }
}
