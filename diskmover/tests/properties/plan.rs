//! The planner hands out every chunk once, and reads all that a map calls data.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

use diskmover::digest::{self, CHUNK};
use diskmover::plan::{Extents, Plan, Work};
use proptest::prelude::*;

const CHUNKS: u64 = 12;

/// A map that is what it was made of.
struct Honest(Vec<Range<u64>>);

/// A map that says anything, something else each time.
struct Lying(Vec<Option<Range<u64>>>, usize);

impl Extents for Honest {
    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        let next = self.0.iter().find(|data| data.end > from);
        Ok(next.map(|data| data.start.max(from)..data.end))
    }
}

impl Extents for Lying {
    fn next_data(&mut self, _from: u64) -> io::Result<Option<Range<u64>>> {
        self.1 += 1;
        Ok(self.0[self.1 % self.0.len()].clone())
    }
}

fn size() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..CHUNKS * CHUNK,
        (0..=CHUNKS).prop_map(|chunks| chunks * CHUNK)
    ]
}

/// Ranges in order, apart, in steps that make edges meet chunks.
fn data(size: u64) -> impl Strategy<Value = Vec<Range<u64>>> {
    let step = prop_oneof![1..4096u64, Just(CHUNK / 2), Just(CHUNK), 1..3 * CHUNK];
    prop::collection::vec((step.clone(), step), 0..12).prop_map(move |steps| {
        let mut at = 0;
        let mut all = Vec::new();
        for (gap, len) in steps {
            let range = (at + gap - 1).min(size)..(at + gap - 1 + len).min(size);
            at = range.end + 1;
            if range.start < range.end {
                all.push(range);
            }
        }
        all
    })
}

/// Every chunk that is not done comes once, in order; returns what is read.
fn walk(extents: impl Extents, size: u64, done: &BTreeSet<u64>) -> Vec<Range<u64>> {
    let mut plan = Plan::new(extents, size);
    let mut seen = Vec::new();
    let mut read = Vec::new();
    while let Some(work) = plan.next(|chunk| done.contains(&chunk)).unwrap() {
        match work {
            Work::Zeros(chunks) => {
                assert!(!chunks.is_empty(), "a run of nothing");
                seen.extend(chunks);
            }
            Work::Chunk(chunk, ranges) => {
                let start = chunk * CHUNK;
                let end = start + digest::chunk_len(size, chunk) as u64;
                let mut at = start;
                for range in &ranges {
                    assert!(at <= range.start && range.start < range.end && range.end <= end);
                    at = range.end;
                }
                seen.push(chunk);
                read.extend(ranges);
            }
        }
        assert!(seen.len() <= CHUNKS as usize, "chunks without end");
    }
    let all = 0..digest::chunk_count(size);
    let missing: Vec<u64> = all.filter(|chunk| !done.contains(chunk)).collect();
    assert_eq!(seen, missing);
    read
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn all_data_is_read_and_each_chunk_comes_once(
        (size, data) in size().prop_flat_map(|size| (Just(size), data(size))),
        done in prop::collection::btree_set(0..CHUNKS, 0..6),
    ) {
        let read = walk(Honest(data.clone()), size, &done);
        for range in data {
            for at in [range.start, (range.start + range.end) / 2, range.end - 1] {
                let is_read = read.iter().any(|one| one.contains(&at));
                prop_assert!(is_read || done.contains(&(at / CHUNK)), "byte {} is left out", at);
            }
        }
    }

    #[test]
    fn a_map_that_lies_costs_no_chunk(
        size in size(),
        said in prop::collection::vec(
            prop::option::of((0..2 * CHUNKS * CHUNK, 0..2 * CHUNKS * CHUNK).prop_map(|(a, b)| a..b)),
            1..6,
        ),
        done in prop::collection::btree_set(0..CHUNKS, 0..6),
    ) {
        walk(Lying(said, 0), size, &done);
    }
}
