//! The fuzz targets in cargo test: all of the corpus, and a fixed number of
//! changes to it. The same seed gives the same changes.
//!
//! The corpus is in tests/fuzz/corpus, a directory for each target. What `make
//! fuzz` finds belongs there, once it is mended.

#![allow(missing_docs)]

mod mutator;
mod targets;

use std::panic::{self, AssertUnwindSafe};
use std::path::PathBuf;

use mutator::Mutator;
use targets::{TARGETS, Target};

/// Changes to each target's corpus.
const CHANGES: usize = 5000;

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let dir = root.join("tests/fuzz/corpus").join(name);
    let mut paths: Vec<_> = std::fs::read_dir(&dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths
        .into_iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect()
}

/// Runs a target; when it panics, the input is shown.
fn run(name: &str, target: Target, input: &[u8]) {
    let outcome = panic::catch_unwind(AssertUnwindSafe(|| target(input)));
    if let Err(panicked) = outcome {
        eprintln!("{name} does not survive these bytes: {input:02x?}");
        panic::resume_unwind(panicked);
    }
}

fn smoke(name: &str) {
    let (_, target) = TARGETS.iter().find(|(other, _)| *other == name).unwrap();
    let corpus = corpus(name);
    assert!(!corpus.is_empty(), "no corpus for {name}");
    corpus.iter().for_each(|input| run(name, *target, input));
    let mut mutator = Mutator::new(name);
    for _ in 0..CHANGES {
        run(name, *target, &mutator.change(&corpus));
    }
}

macro_rules! smoke_tests {
    ($($name:ident)*) => { $(
        #[test]
        fn $name() {
            smoke(stringify!($name));
        }
    )* };
}

smoke_tests! { frame message state dirty journal zstd nbd }

#[test]
fn every_target_has_its_test() {
    let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names,
        [
            "frame", "message", "state", "dirty", "journal", "zstd", "nbd"
        ]
    );
}
