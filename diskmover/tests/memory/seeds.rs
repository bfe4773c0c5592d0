//! Older content of many TiB.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use diskmover::budget::Budget;
use diskmover::seedlist::List;
use diskmover::seeds::{SeedSpec, Seeds};

use crate::within;

fn open_seeds(spec: &SeedSpec) -> Seeds {
    let mut share = Budget::new(u64::MAX).share();
    Seeds::open(std::slice::from_ref(spec), &mut share, &|| true).unwrap()
}

#[test]
fn a_seed_of_a_tib_is_hashed_listed_and_looked_up_in_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let file = File::create(dir.path().join("seed")).unwrap();
    file.set_len(1 << 40).unwrap();
    for tenth in 0..10 {
        file.write_all_at(&[tenth + 1; 100_000], (u64::from(tenth) * 100) << 30)
            .unwrap();
    }
    drop(file);
    let spec = SeedSpec {
        root: dir.path().into(),
        name: "seed".into(),
    };
    within(150, || assert!(!open_seeds(&spec).is_empty()));
    let list = dir.path().join(".seed.dm-hashes").metadata().unwrap();
    assert_eq!(list.len(), 72 + (32 << 40 >> 16));
    assert!(list.blocks() * 512 < 1 << 20, "holes are written out");
    within(150, || {
        let mut blocks = 0;
        let mut sink = |_, hashes: &[[u8; 32]]| {
            blocks += hashes.iter().filter(|hash| **hash != [0; 32]).count();
        };
        let list = List::open(&spec).unwrap();
        assert!(list.load(&mut sink, &|| true), "it is not that of the seed");
        assert_eq!(blocks, 20);
        assert!(!open_seeds(&spec).is_empty());
    });
}

#[test]
fn a_seed_of_more_blocks_than_are_looked_up_costs_what_those_cost() {
    const BLOCKS: u64 = 4 << 20;
    let dir = tempfile::tempdir().unwrap();
    let file = File::create(dir.path().join("seed")).unwrap();
    file.set_len(BLOCKS << 16).unwrap();
    drop(file);
    let spec = SeedSpec {
        root: dir.path().into(),
        name: "seed".into(),
    };
    let list = List::open(&spec).unwrap();
    let mut draft = list.draft().unwrap();
    // As if each block had content of its own: 256 GiB of it.
    for first in (0..BLOCKS).step_by(1 << 12) {
        let mut hashes = [[0; 32]; 1 << 12];
        blake3::Hasher::new()
            .update(&first.to_le_bytes())
            .finalize_xof()
            .fill(hashes.as_flattened_mut());
        draft.put(first, &hashes);
    }
    draft.keep(&|| true);
    within(150, || {
        let seeds = open_seeds(&spec);
        assert!(!seeds.is_empty(), "the list is not believed");
    });
}
