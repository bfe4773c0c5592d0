//! A ledger in little memory says what a plain one says, which keeps all it was told.

use std::ops::Range;

use diskmover::digest::{self, CHUNK, Hash, SEGMENT_CHUNKS, ZERO_HASH};
use diskmover::ledger::{Ledger, Unfit};
use proptest::prelude::*;

const CHUNKS: u64 = 3 * SEGMENT_CHUNKS + 7;
const SIZE: u64 = (CHUNKS - 1) * CHUNK + 77;
const SEGMENTS: usize = 4;

#[derive(Clone, Debug)]
enum Step {
    Offer(u64, u8),
    Confirm(u64),
    Place(Range<u64>, u8),
    Zeros(Range<u64>),
    Close(usize),
    Forget(usize),
    Adopt(usize, u8),
}

#[derive(Clone, Copy, Default)]
struct Chunk {
    content: Option<(Hash, u32)>,
    done: bool,
}

/// What was told, as it was told.
struct Plain {
    chunks: Vec<Chunk>,
    closed: [Option<(Hash, u32)>; SEGMENTS],
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = (0..CHUNKS, 1..130u64).prop_map(|(first, len)| first..(first + len).min(CHUNKS));
    let step = prop_oneof![
        4 => (0..CHUNKS, 0..3u8).prop_map(|(chunk, content)| Step::Offer(chunk, content)),
        4 => (0..CHUNKS).prop_map(Step::Confirm),
        4 => (range.clone(), 0..3u8).prop_map(|(chunks, content)| Step::Place(chunks, content)),
        3 => range.prop_map(Step::Zeros),
        3 => (0..SEGMENTS).prop_map(Step::Close),
        1 => (0..SEGMENTS).prop_map(Step::Forget),
        1 => (0..SEGMENTS, 0..3u8).prop_map(|(segment, content)| Step::Adopt(segment, content)),
    ];
    prop::collection::vec(step, 0..40)
}

/// Content 0 is zeros.
fn content(number: u8) -> (Hash, u32) {
    match number {
        0 => (ZERO_HASH, 0),
        _ => ([number; 32], 70 + u32::from(number)),
    }
}

fn segment_of(chunk: u64) -> usize {
    (chunk / SEGMENT_CHUNKS) as usize
}

fn chunks_of(segment: usize) -> Range<u64> {
    let first = segment as u64 * SEGMENT_CHUNKS;
    first..(first + SEGMENT_CHUNKS).min(CHUNKS)
}

impl Plain {
    fn offer(&mut self, chunk: u64, told: (Hash, u32)) -> Result<(), Unfit> {
        if self.closed[segment_of(chunk)].is_some() {
            return Ok(());
        }
        let known = &mut self.chunks[chunk as usize];
        match known.content {
            Some((hash, _)) if hash != told.0 => Err(Unfit::Conflict),
            _ => {
                known.content = Some(told);
                Ok(())
            }
        }
    }

    fn confirm(&mut self, chunk: u64) -> bool {
        let known = &mut self.chunks[chunk as usize];
        let fresh = self.closed[segment_of(chunk)].is_none() && known.content.is_some();
        fresh && !std::mem::replace(&mut known.done, true)
    }

    fn is_done(&self, chunk: u64) -> bool {
        self.closed[segment_of(chunk)].is_some() || self.chunks[chunk as usize].done
    }

    fn is_untouched(&self, segment: usize) -> bool {
        let mut chunks = chunks_of(segment);
        let unknown = chunks.all(|chunk| self.chunks[chunk as usize].content.is_none());
        unknown && self.closed[segment].is_none()
    }

    fn check_zeros(&self, mut chunks: Range<u64>) -> Result<(), Unfit> {
        let holds = |chunk: u64| {
            let content = self.chunks[chunk as usize].content;
            let open = self.closed[segment_of(chunk)].is_none();
            open && content.is_some_and(|(hash, _)| hash != ZERO_HASH)
        };
        match chunks.any(holds) {
            true => Err(Unfit::Conflict),
            false => Ok(()),
        }
    }

    fn close(&mut self, segment: usize) {
        let chunks: Vec<Chunk> = chunks_of(segment)
            .map(|chunk| self.chunks[chunk as usize])
            .collect();
        if self.closed[segment].is_none() && chunks.iter().all(|chunk| chunk.done) {
            let contents: Vec<_> = chunks.iter().filter_map(|chunk| chunk.content).collect();
            let hashes: Vec<Hash> = contents.iter().map(|(hash, _)| *hash).collect();
            let data = contents.iter().map(|(_, data)| data).sum();
            self.closed[segment] = Some((digest::segment_hash(&hashes), data));
        }
    }

    fn forget(&mut self, segment: usize) {
        self.closed[segment] = None;
        for chunk in chunks_of(segment) {
            self.chunks[chunk as usize] = Chunk::default();
        }
    }

    fn data_bytes(&self) -> u64 {
        let of = |segment: usize| match self.closed[segment] {
            Some((_, data)) => u64::from(data),
            None => chunks_of(segment)
                .map(|chunk| self.chunks[chunk as usize])
                .filter(|chunk| chunk.done)
                .filter_map(|chunk| chunk.content)
                .map(|(_, data)| u64::from(data))
                .sum(),
        };
        (0..SEGMENTS).map(of).sum()
    }

    fn held(&self) -> usize {
        let open = (0..SEGMENTS).filter(|segment| self.closed[*segment].is_none());
        open.flat_map(chunks_of)
            .filter_map(|chunk| self.chunks[chunk as usize].content)
            .filter(|(hash, _)| *hash != ZERO_HASH)
            .count()
    }
}

/// Takes one step with both.
fn take(step: &Step, ledger: &mut Ledger, plain: &mut Plain) {
    match step {
        Step::Offer(chunk, number) => {
            let (hash, data) = content(*number);
            let offered = ledger.offer(*chunk, hash, data);
            assert_eq!(offered, plain.offer(*chunk, (hash, data)));
        }
        Step::Confirm(chunk) => assert_eq!(ledger.confirm(*chunk), plain.confirm(*chunk)),
        Step::Place(chunks, number) => {
            let (hash, data) = content(*number);
            for chunk in chunks.clone() {
                let offered = ledger.offer(chunk, hash, data);
                assert_eq!(offered, plain.offer(chunk, (hash, data)));
                if offered.is_ok() {
                    assert_eq!(ledger.confirm(chunk), plain.confirm(chunk));
                }
            }
        }
        Step::Zeros(chunks) => {
            let checked = ledger.check_zeros(chunks.start, chunks.end);
            assert_eq!(checked, plain.check_zeros(chunks.clone()));
            if checked.is_err() {
                return;
            }
            ledger.confirm_zeros(chunks.start, chunks.end).unwrap();
            for segment in segment_of(chunks.start)..=segment_of(chunks.end - 1) {
                let all = chunks_of(segment);
                let whole = chunks.start <= all.start && all.end <= chunks.end;
                let at_once = whole && plain.is_untouched(segment);
                for chunk in all.filter(|chunk| chunks.contains(chunk)) {
                    plain.offer(chunk, content(0)).unwrap();
                    plain.confirm(chunk);
                }
                if at_once {
                    plain.close(segment);
                }
            }
        }
        Step::Close(segment) => {
            ledger.close_if_full(*segment);
            plain.close(*segment);
        }
        Step::Forget(segment) => {
            ledger.forget(*segment);
            plain.forget(*segment);
        }
        Step::Adopt(segment, number) => {
            let (hash, data) = content(*number);
            ledger.adopt_closed(*segment, hash, data);
            if plain.is_untouched(*segment) {
                plain.closed[*segment] = Some((hash, data));
            }
        }
    }
}

/// All that a ledger can be asked.
fn compare(ledger: &Ledger, plain: &Plain) {
    for chunk in 0..CHUNKS {
        assert_eq!(ledger.is_done(chunk), plain.is_done(chunk), "chunk {chunk}");
        let segment = segment_of(chunk);
        let known = plain.chunks[chunk as usize];
        let zero = match plain.closed[segment] {
            Some((hash, _)) => hash == ZERO_HASH,
            None => known.done && known.content == Some(content(0)),
        };
        assert_eq!(ledger.is_zero(chunk), zero, "chunk {chunk}");
        if plain.closed[segment].is_none() {
            let index = (chunk % SEGMENT_CHUNKS) as usize;
            assert_eq!(ledger.chunk(segment, index), known.content);
            let bit = ledger.known_bits(segment) >> index & 1;
            assert_eq!(bit == 1, known.content.is_some());
        }
    }
    for segment in 0..SEGMENTS {
        assert_eq!(ledger.closed(segment), plain.closed[segment]);
    }
    let done = (0..CHUNKS).filter(|chunk| plain.is_done(*chunk));
    let bytes: u64 = done
        .map(|chunk| digest::chunk_len(SIZE, chunk) as u64)
        .sum();
    assert_eq!(ledger.done_bytes(), bytes);
    assert_eq!(ledger.is_complete(), bytes == SIZE);
    assert_eq!(ledger.data_bytes(), plain.data_bytes());
    assert_eq!(ledger.held(), plain.held());
    let hashes: Option<Vec<Hash>> = plain.closed.iter().map(|it| Some((*it)?.0)).collect();
    let root = hashes.map(|hashes| digest::root(SIZE, hashes.iter()));
    assert_eq!(ledger.root(), root);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn little_memory_tells_what_much_memory_tells(steps in steps()) {
        let mut ledger = Ledger::new(SIZE);
        let mut plain = Plain {
            chunks: vec![Chunk::default(); CHUNKS as usize],
            closed: [None; SEGMENTS],
        };
        for step in &steps {
            take(step, &mut ledger, &mut plain);
            compare(&ledger, &plain);
        }
    }

    #[test]
    fn runs_of_what_is_missing_are_all_of_it(steps in steps(), asked in (0..CHUNKS, 1..CHUNKS)) {
        let mut ledger = Ledger::new(SIZE);
        for step in &steps {
            if let Step::Zeros(chunks) = step {
                ledger.confirm_zeros(chunks.start, chunks.end).unwrap();
            }
        }
        let asked = asked.0..(asked.0 + asked.1).min(CHUNKS);
        let (mut from, mut found) = (asked.start, Vec::new());
        while let Some(run) = ledger.next_missing(from, asked.end) {
            prop_assert!(from <= run.start && run.start < run.end && run.end <= asked.end);
            prop_assert!(run.end == asked.end || ledger.is_done(run.end), "a run is cut");
            from = run.end;
            found.extend(run);
        }
        let missing: Vec<u64> = asked.filter(|chunk| !ledger.is_done(*chunk)).collect();
        prop_assert_eq!(found, missing);
    }
}
