//! Whatever happens, in whatever order: only what the source holds is published.
//!
//! Chunks come in any order, the power goes at any operation, what was not durable
//! is lost in any part, the source changes between attempts. After each opening
//! what the target says that it has must be what its disk holds, and in the end
//! the source's content, and nothing else, gets the name.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;

use super::{Grid, connect};
use crate::base;
use crate::digest::{self, BLOCK, CHUNK, Hash, SEGMENT_CHUNKS, ZERO_HASH};
use crate::error::Result;
use crate::ledger::Ledger;
use crate::sample;
use crate::source::Identity;
use crate::sys::AlignedBuf;
use crate::target::{Care, Taken, Target, Trust};
use crate::unreadable::Unreadable;

/// Four segments, three chunks more, and an odd tail: two segments are never believed.
const SIZE: u64 = (4 * SEGMENT_CHUNKS + 3) * CHUNK + 4096 + 99;
const CHUNKS: u64 = 4 * SEGMENT_CHUNKS + 4;

#[derive(Clone, Debug)]
enum Step {
    /// A chunk arrives, with those that follow it.
    Chunks(u64, u64),
    /// All of it arrives.
    Rest,
    /// What arrived is made durable.
    Barrier,
    /// The power will go at an operation, soon.
    Cut(u64),
    /// The power goes, and what was not durable is lost in part.
    Crash(u64),
    /// The source is written between two attempts.
    Change,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..CHUNKS, 1..20u64).prop_map(|(first, count)| Step::Chunks(first, count)),
        1 => Just(Step::Rest),
        4 => Just(Step::Barrier),
        2 => (1..12u64).prop_map(Step::Cut),
        3 => any::<u64>().prop_map(Step::Crash),
        2 => Just(Step::Change),
    ];
    prop::collection::vec(step, 1..20)
}

/// The first block of a chunk of a version of the source; all else is zero.
fn block(version: u64, chunk: u64) -> [u8; BLOCK] {
    match (chunk * 7 + version * 5 + chunk / 9) % 4 {
        0 | 1 => [0; BLOCK],
        _ => [(1 + version * 31 + chunk) as u8 | 1; BLOCK],
    }
}

fn hash(version: u64, chunk: u64) -> Hash {
    match block(version, chunk) {
        block if digest::is_zero(&block) => ZERO_HASH,
        block => digest::chunk_hash(&digest::scan(&block), &block),
    }
}

fn root(version: u64) -> Hash {
    let chunks: Vec<Hash> = (0..CHUNKS).map(|chunk| hash(version, chunk)).collect();
    let segments = chunks.chunks(SEGMENT_CHUNKS as usize);
    let hashes: Vec<Hash> = segments.map(digest::segment_hash).collect();
    digest::root(SIZE, hashes.iter())
}

struct Scene {
    dir: tempfile::TempDir,
    grid: Arc<Grid>,
    version: u64,
    trust: Trust,
}

impl Scene {
    fn open(&self) -> Result<Box<Target>> {
        let identity = Identity {
            mtime_ns: self.version as i64,
            ..sample::identity(SIZE)
        };
        let care = Care {
            trust: self.trust,
            ..Care::default()
        };
        connect(Some(Arc::clone(&self.grid)));
        let opened = sample::open(self.dir.path(), care, identity);
        connect(None);
        opened
    }

    /// Opens it after a crash, and looks whether what it claims is there.
    fn reopen(&self) -> Box<Target> {
        let target = self.open().expect("it opens once the power is back");
        let part = File::open(self.dir.path().join(sample::PART)).unwrap();
        let claimed = claims(&target);
        for chunk in (0..CHUNKS).filter(|chunk| claimed.is_done(*chunk)) {
            let mut found = [1; BLOCK];
            part.read_exact_at(&mut found, chunk * CHUNK).unwrap();
            assert!(
                found == block(self.version, chunk),
                "chunk {chunk} is claimed, and is not there"
            );
        }
        target
    }

    fn place(&self, target: &Target, chunks: std::ops::Range<u64>) -> Result<()> {
        for chunk in chunks {
            let content = block(self.version, chunk);
            if digest::is_zero(&content) {
                target.place_zeros(chunk, chunk + 1, &|| true)?;
                continue;
            }
            let hash = hash(self.version, chunk);
            if target.base_bytes() > 0 && offer(target, chunk, &content, hash)? == Taken::Whole {
                continue;
            }
            let mut memory = AlignedBuf::new(BLOCK).unwrap();
            memory.copy_from_slice(&content);
            let bitmap = digest::scan(&content);
            target.place(chunk, &bitmap, &memory, hash)?;
        }
        Ok(())
    }

    /// Goes through one step; an error means that the power is off.
    fn go(&mut self, target: &mut Option<Box<Target>>, step: &Step) -> Result<()> {
        let open = target.as_ref().unwrap();
        match step {
            Step::Chunks(first, count) => {
                self.place(open, *first..(first + count).min(CHUNKS))?;
            }
            Step::Rest => self.place(open, 0..CHUNKS)?,
            Step::Barrier => open.barrier()?,
            Step::Cut(operations) => self.grid.cut_after(*operations),
            Step::Crash(seed) => self.restart(target, *seed),
            Step::Change => {
                *target = None;
                self.version += 1;
                self.restart(target, self.version);
            }
        }
        Ok(())
    }

    fn restart(&self, target: &mut Option<Box<Target>>, seed: u64) {
        *target = None;
        self.grid.lose(seed);
        *target = Some(self.reopen());
    }
}

/// Offers the hashes of a chunk that begins with `content`.
fn offer(target: &Target, chunk: u64, content: &[u8], hash: Hash) -> Result<Taken> {
    let mut whole = vec![0; digest::chunk_len(SIZE, chunk)];
    whole[..content.len()].copy_from_slice(content);
    let mut buffer = AlignedBuf::new(CHUNK as usize).unwrap();
    let taken = target.take(chunk, hash, &base::hashes(&whole), &mut buffer)?;
    Ok(taken.0)
}

/// What a target tells a sender that it has.
fn claims(target: &Target) -> Ledger {
    let mut ledger = Ledger::new(SIZE);
    for entry in target.state() {
        entry.apply(&mut ledger).unwrap();
    }
    ledger
}

fn live_through(steps: &[Step], trust: Trust) {
    let mut scene = Scene {
        dir: tempfile::tempdir_in("/dev/shm").unwrap(),
        grid: Arc::default(),
        version: 0,
        trust,
    };
    let published = scene.dir.path().join("disk");
    let mut target = Some(scene.open().unwrap());
    for (number, step) in steps.iter().enumerate() {
        if scene.go(&mut target, step).is_err() {
            scene.restart(&mut target, number as u64);
        }
        assert!(!published.exists(), "published before all was verified");
    }
    // From here on the power stays.
    scene.restart(&mut target, 77);
    let target = target.unwrap();
    if !target.is_complete() {
        let early = target.verify(&root(scene.version));
        assert!(early.is_err(), "verified while chunks are missing");
    }
    scene.place(&target, 0..CHUNKS).unwrap();
    target.verify(&root(scene.version)).unwrap();
    target.publish(0, Unreadable::default()).unwrap();
    let file = File::open(published).unwrap();
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    for chunk in 0..CHUNKS {
        let mut found = [1; BLOCK];
        file.read_exact_at(&mut found, chunk * CHUNK).unwrap();
        assert!(found == block(scene.version, chunk), "chunk {chunk}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn only_what_the_source_holds_is_published(steps in steps(), paranoid: bool) {
        let trust = if paranoid { Trust::Paranoid } else { Trust::Normal };
        live_through(&steps, trust);
    }
}
