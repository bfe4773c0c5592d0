//! Whatever STATE says that the receiver has, the sender hands out exactly the rest:
//! each chunk once, and all that is data of it.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::thread;

use diskmover::digest::{self, Bitmap, CHUNK, Hash, SEGMENT_CHUNKS, ZERO_HASH};
use diskmover::entry::{self, Entry};
use diskmover::error::Result;
use diskmover::feed::{Feed, Volume};
use diskmover::ledger::Ledger;
use diskmover::plan::{Extents, Work};
use diskmover::source::{Identity, Source};
use proptest::prelude::*;

use crate::sample;

/// A few segments, and a chunk that is not whole.
const MOST_CHUNKS: u64 = 4 * SEGMENT_CHUNKS + 7;

/// What became of chunks at the receiver.
#[derive(Clone, Debug)]
enum Step {
    Placed(Range<u64>, u8),
    Zeroed(Range<u64>),
    /// It came, and was never durable.
    Offered(u64),
    Folded(usize),
}

/// A volume as it is at both ends.
#[derive(Clone, Debug)]
struct Case {
    size: u64,
    data: Vec<Range<u64>>,
    steps: Vec<Step>,
}

struct Mapped(u64, Vec<Range<u64>>);

impl Extents for Mapped {
    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        let next = self.1.iter().find(|data| data.end > from);
        Ok(next.map(|data| data.start.max(from)..data.end))
    }
}

impl Source for Mapped {
    fn identity(&self) -> Identity {
        sample::identity(self.0)
    }

    fn extents(&self, _trust_holes: bool) -> Result<Box<dyn Extents + Send>> {
        Ok(Box::new(Mapped(self.0, self.1.clone())))
    }

    fn read_chunk(&self, _: u64, _: &[Range<u64>], _: &mut [u8]) -> Result<Bitmap> {
        unreachable!("nothing is read here")
    }

    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }

    fn shown(&self) -> String {
        "a map".to_owned()
    }
}

fn cases() -> impl Strategy<Value = Vec<Case>> {
    prop::collection::vec(sizes().prop_flat_map(case), 1..4)
}

fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![
        1 => 0..3 * CHUNK,
        4 => 0..MOST_CHUNKS * CHUNK,
        4 => (0..=MOST_CHUNKS).prop_map(|chunks| chunks * CHUNK),
        1 => (0..=4u64).prop_map(|segments| segments * SEGMENT_CHUNKS * CHUNK),
    ]
}

fn case(size: u64) -> impl Strategy<Value = Case> {
    let chunks = digest::chunk_count(size).max(1);
    let len = prop_oneof![1..4u64, 1..2 * SEGMENT_CHUNKS, Just(SEGMENT_CHUNKS)];
    let range = (0..chunks, len).prop_map(move |(first, len)| first..(first + len).min(chunks));
    let whole = (0..chunks / SEGMENT_CHUNKS + 1, 1..3u64).prop_map(move |(first, count)| {
        let first = first * SEGMENT_CHUNKS;
        first.min(chunks)..(first + count * SEGMENT_CHUNKS).min(chunks)
    });
    let step = prop_oneof![
        4 => (range.clone(), 0..3u8).prop_map(|(chunks, content)| Step::Placed(chunks, content)),
        1 => (whole.clone(), 1..3u8).prop_map(|(chunks, content)| Step::Placed(chunks, content)),
        3 => range.prop_map(Step::Zeroed),
        2 => whole.prop_map(Step::Zeroed),
        1 => (0..chunks).prop_map(Step::Offered),
        1 => (0..chunks.div_ceil(SEGMENT_CHUNKS) as usize).prop_map(Step::Folded),
    ];
    let gap = prop_oneof![1..9000u64, Just(CHUNK), 1..90 * CHUNK];
    let data = prop::collection::vec((gap.clone(), gap), 0..12).prop_map(move |gaps| {
        let (mut at, mut all) = (0, Vec::new());
        for (gap, len) in gaps {
            let range = (at + gap - 1).min(size)..(at + gap - 1 + len).min(size);
            at = range.end + 1;
            all.extend((!range.is_empty()).then_some(range));
        }
        all
    });
    let steps = prop::collection::vec(step, 0..24);
    (Just(size), data, steps).prop_map(|(size, data, steps)| Case { size, data, steps })
}

/// Content 0 is zeros.
fn content(number: u8, size: u64, chunk: u64) -> (Hash, u32) {
    match number {
        0 => (ZERO_HASH, 0),
        _ => (
            [number; 32],
            digest::chunk_len(size, chunk).min(4096) as u32,
        ),
    }
}

/// What the receiver knows, and the chunks that it has: noted by what was done, not by
/// what the ledger says.
fn receiver(case: &Case) -> (Ledger, BTreeSet<u64>) {
    let (mut ledger, mut has) = (Ledger::new(case.size), BTreeSet::new());
    let all = digest::chunk_count(case.size);
    for step in &case.steps {
        match step {
            Step::Placed(chunks, number) => {
                for chunk in chunks.start..chunks.end.min(all) {
                    let (hash, data) = content(*number, case.size, chunk);
                    if ledger.offer(chunk, hash, data).is_ok() {
                        ledger.confirm(chunk);
                        has.insert(chunk);
                    }
                }
            }
            Step::Zeroed(chunks) => {
                let end = chunks.end.min(all);
                if chunks.start < end && ledger.check_zeros(chunks.start, end).is_ok() {
                    ledger.confirm_zeros(chunks.start, end).unwrap();
                    has.extend(chunks.start..end);
                }
            }
            Step::Offered(chunk) if *chunk < all => {
                let (hash, data) = content(3, case.size, *chunk);
                let _ = ledger.offer(*chunk, hash, data);
            }
            Step::Folded(segment) if *segment < ledger.segments() => {
                ledger.close_if_full(*segment);
            }
            Step::Offered(_) | Step::Folded(_) => {}
        }
    }
    (ledger, has)
}

/// A sender that has heard STATE of a volume.
fn sender(case: &Case, receiver: &Ledger) -> Volume {
    let mut state = Vec::new();
    entry::all(receiver).for_each(|entry| entry.encode(&mut state));
    let source = Mapped(case.size, case.data.clone());
    let volume = Volume::new("disk".to_owned(), Box::new(source), true).unwrap();
    let mut heard = volume.ledger.lock().unwrap();
    let mut rest = &state[..];
    while !rest.is_empty() {
        let entry = Entry::decode(&mut rest).expect("STATE that cannot be read");
        entry.apply(&mut heard).expect("STATE that cannot be");
    }
    assert_eq!(heard.done_bytes(), receiver.done_bytes());
    drop(heard);
    volume
}

/// All that the feed hands out, by volume, until nothing is left.
fn handed_out(volumes: &[Volume]) -> Vec<Vec<Work>> {
    let feed = Feed::default();
    feed.start();
    let mut all = vec![Vec::new(); volumes.len()];
    thread::scope(|scope| {
        // A reader waits, when nothing is left, for what others may lose.
        scope.spawn(|| {
            while !feed.is_idle(volumes) {
                thread::yield_now();
            }
            feed.close();
        });
        while let Some(task) = feed.next(volumes).unwrap() {
            assert!(task.wanted.is_none());
            let of_volume: &mut Vec<Work> = &mut all[task.volume];
            of_volume.push(task.work);
            if of_volume.len() > MOST_CHUNKS as usize {
                feed.close(); // work without end
            }
        }
    });
    all
}

fn check(case: &Case, has: &BTreeSet<u64>, work: &[Work]) {
    let mut seen = Vec::new();
    let mut read: Vec<Range<u64>> = Vec::new();
    for piece in work {
        match piece {
            Work::Zeros(chunks) => {
                assert!(!chunks.is_empty(), "a run of nothing");
                seen.extend(chunks.clone());
            }
            Work::Chunk(chunk, ranges) => {
                let start = chunk * CHUNK;
                let mut at = start;
                for range in ranges {
                    assert!(at <= range.start && range.start < range.end, "{ranges:?}");
                    at = range.end;
                }
                assert!(at <= start + digest::chunk_len(case.size, *chunk) as u64);
                seen.push(*chunk);
                read.extend(ranges.iter().cloned());
            }
        }
    }
    let missing: Vec<u64> = (0..digest::chunk_count(case.size))
        .filter(|chunk| !has.contains(chunk))
        .collect();
    assert_eq!(seen, missing);
    for data in &case.data {
        for chunk in data.start / CHUNK..data.end.div_ceil(CHUNK) {
            let of_chunk = data.start.max(chunk * CHUNK)..data.end.min((chunk + 1) * CHUNK);
            let is_read = || read.contains(&of_chunk);
            assert!(
                has.contains(&chunk) || is_read(),
                "{of_chunk:?} is left out"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn what_the_receiver_does_not_have_is_handed_out_once(cases in cases()) {
        let (ledgers, has): (Vec<_>, Vec<_>) = cases.iter().map(receiver).unzip();
        let volumes: Vec<Volume> =
            cases.iter().zip(&ledgers).map(|(case, ledger)| sender(case, ledger)).collect();
        for ((case, has), work) in cases.iter().zip(&has).zip(handed_out(&volumes)) {
            check(case, has, &work);
        }
    }
}
