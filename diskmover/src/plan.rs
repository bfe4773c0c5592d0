//! What to read, in order: chunks with data, runs of zero chunks.
//!
//! The extent map of a file is a hint to skip, never to write, and it may change
//! while it is read: every step makes progress, whatever the map says.

use std::io;
use std::ops::Range;

use crate::digest::{self, CHUNK};

/// Chunks of zeros that are one piece of work: 4 GiB. Where the receiver's disk cannot
/// zero by itself it reads all of them, and its answer has to come in time.
const MOST_ZEROS: u64 = 4096;

/// Tells where data is.
pub trait Extents {
    /// The first range of data at or after `from`; None when there is no more.
    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>>;
}

impl<E: Extents + ?Sized> Extents for Box<E> {
    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        (**self).next_data(from)
    }
}

/// A piece of work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Chunks that the map says are holes.
    Zeros(Range<u64>),
    /// A chunk, and the ranges of it (in bytes of the volume) to read.
    Chunk(u64, Vec<Range<u64>>),
}

/// Walks over a volume once.
pub struct Plan<E> {
    extents: E,
    size: u64,
    next: u64,
    /// The last answer: from there on, this is the first data.
    known: Option<(u64, Option<Range<u64>>)>,
}

impl<E: Extents> Plan<E> {
    /// A plan for a volume of `size` bytes.
    pub fn new(extents: E, size: u64) -> Self {
        Plan {
            extents,
            size,
            next: 0,
            known: None,
        }
    }

    /// The next piece among the chunks that `is_done` denies.
    pub fn next(&mut self, is_done: impl Fn(u64) -> bool) -> io::Result<Option<Work>> {
        let end = digest::chunk_count(self.size);
        while self.next < end && is_done(self.next) {
            self.next += 1;
        }
        if self.next == end {
            return Ok(None);
        }
        let first = self.next;
        let data_start = self
            .data_from(first * CHUNK)?
            .map_or(self.size, |data| data.start);
        let holes_end = if data_start >= self.size {
            end
        } else {
            data_start / CHUNK
        };
        if holes_end > first {
            let end = holes_end.min((first / MOST_ZEROS + 1) * MOST_ZEROS);
            self.next = (first..end).find(|chunk| is_done(*chunk)).unwrap_or(end);
            return Ok(Some(Work::Zeros(first..self.next)));
        }
        self.next += 1;
        Ok(Some(Work::Chunk(first, self.ranges(first)?)))
    }

    /// The ranges to read of one chunk, for reading it again.
    pub fn ranges(&mut self, chunk: u64) -> io::Result<Vec<Range<u64>>> {
        let end = chunk * CHUNK + digest::chunk_len(self.size, chunk) as u64;
        let mut found = Vec::new();
        let mut from = chunk * CHUNK;
        while from < end {
            match self.data_from(from)? {
                Some(data) if data.start < end => {
                    found.push(data.start.max(from)..data.end.min(end));
                    from = data.end;
                }
                _ => break,
            }
        }
        Ok(found)
    }

    /// The first data at or after `from`. The map is asked once for each hole, which
    /// can be many questions to an export.
    fn data_from(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        if let Some((asked, data)) = &self.known
            && *asked <= from
            && data.as_ref().is_none_or(|data| from < data.end)
        {
            return Ok(data.clone());
        }
        let data = self.extents.next_data(from)?.map(|data| {
            let start = data.start.max(from);
            // A map that goes backwards is not worth believing: read on.
            let end = if data.end > start {
                data.end
            } else {
                self.size
            };
            start..end.min(self.size)
        });
        let data = data.filter(|data| data.start < self.size);
        self.known = Some((from, data.clone()));
        Ok(data)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    struct Map(Vec<Range<u64>>);

    impl Extents for Map {
        fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
            Ok(self
                .0
                .iter()
                .find(|r| r.end > from)
                .map(|r| r.start.max(from)..r.end))
        }
    }

    fn walk(extents: impl Extents, size: u64, done: &[u64]) -> Vec<Work> {
        let mut plan = Plan::new(extents, size);
        let mut all = Vec::new();
        while let Some(work) = plan.next(|chunk| done.contains(&chunk)).unwrap() {
            all.push(work);
            assert!(all.len() < 1000, "no progress");
        }
        all
    }

    #[test]
    fn holes_become_runs_and_data_becomes_chunks() {
        let size = 10 * CHUNK + 7;
        let map = Map(vec![
            2 * CHUNK + 8192..3 * CHUNK + 4096,
            3 * CHUNK + 8192..3 * CHUNK + 12288,
        ]);
        assert_eq!(
            walk(map, size, &[]),
            [
                Work::Zeros(0..2),
                Work::Chunk(2, vec![2 * CHUNK + 8192..3 * CHUNK]),
                Work::Chunk(
                    3,
                    vec![
                        3 * CHUNK..3 * CHUNK + 4096,
                        3 * CHUNK + 8192..3 * CHUNK + 12288
                    ]
                ),
                Work::Zeros(4..11),
            ]
        );
    }

    #[test]
    fn all_hole_empty_and_all_data() {
        assert_eq!(walk(Map(vec![]), 5 * CHUNK, &[]), [Work::Zeros(0..5)]);
        assert_eq!(walk(Map(vec![]), 0, &[]), []);
        assert_eq!(walk(Map(vec![0..1]), 1, &[]), [Work::Chunk(0, vec![0..1])]);
    }

    #[test]
    fn a_long_hole_is_many_pieces() {
        let far = 3 * MOST_ZEROS * CHUNK + 5 * CHUNK;
        let pieces = [0, 1, 2].map(|n| Work::Zeros(n * MOST_ZEROS..(n + 1) * MOST_ZEROS));
        let found = walk(Map(vec![]), far, &[]);
        assert_eq!(found[..3], pieces);
        let last = Work::Zeros(3 * MOST_ZEROS..3 * MOST_ZEROS + 5);
        assert_eq!(found[3..], [last]);
    }

    #[test]
    fn the_map_is_asked_once_for_a_hole() {
        struct Counted<'a>(Map, &'a Cell<u32>);
        impl Extents for Counted<'_> {
            fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
                self.1.set(self.1.get() + 1);
                self.0.next_data(from)
            }
        }
        let far = 3 * MOST_ZEROS * CHUNK;
        let asked = Cell::new(0);
        let map = Map(vec![far + 4096..far + 8192]);
        let found = walk(Counted(map, &asked), 2 * far, &[]);
        assert_eq!(found.len(), 3 + 1 + 3);
        assert_eq!(
            asked.get(),
            2,
            "for the hole before the data, and behind it"
        );
    }

    #[test]
    fn done_chunks_are_left_out() {
        assert_eq!(
            walk(Map(vec![CHUNK..2 * CHUNK]), 6 * CHUNK, &[1, 3]),
            [Work::Zeros(0..1), Work::Zeros(2..3), Work::Zeros(4..6)]
        );
    }

    #[test]
    fn a_lying_map_cannot_stop_the_walk() {
        struct Backwards;
        impl Extents for Backwards {
            fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
                Ok(Some(from.saturating_sub(10)..from.saturating_sub(5)))
            }
        }
        let size = 3 * CHUNK;
        let expected: Vec<_> = (0..3)
            .map(|c| Work::Chunk(c, vec![c * CHUNK..(c + 1) * CHUNK]))
            .collect();
        assert_eq!(walk(Backwards, size, &[]), expected);
        // Ranges beyond the end are cut.
        assert_eq!(
            walk(Map(vec![0..u64::MAX]), 10, &[]),
            [Work::Chunk(0, vec![0..10])]
        );
    }
}
