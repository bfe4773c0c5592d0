//! Media that do not give back what was written to them.

use std::fs::File;
use std::os::unix::fs::FileExt;

use diskmover::digest::CHUNK;
use diskmover::error::{Code, Side};
use diskmover::push::Push;
use diskmover::target::{Care, Proof};

use crate::rig::{Rig, TAG, eventually, finish, noise, run};

const SEGMENT: u64 = 64 * CHUNK;
const SIZE: u64 = 3 * SEGMENT;

/// Copies, and changes what was written before the copy ends.
fn copy_that_rots(rig: &Rig) -> (std::path::PathBuf, Push) {
    let source = rig.source(
        "disk",
        SIZE,
        &[
            (CHUNK, &noise(1, 1 << 20)),
            (SEGMENT, &noise(2, 1 << 20)),
            (2 * SEGMENT, &noise(3, 1 << 20)),
        ],
    );
    rig.open(&[("disk", SIZE)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.limit = Some(256 << 10);
    let push = Push::start(job).unwrap();
    let part = rig.root().join(format!(".disk.dm-{TAG}.part"));
    eventually("the first data is there", || {
        let mut found = vec![0; 1 << 20];
        let part = File::open(&part).ok()?;
        part.read_exact_at(&mut found, CHUNK).ok()?;
        (found == noise(1, 1 << 20)).then_some(())
    });
    let part = File::options().write(true).open(part).unwrap();
    part.write_all_at(b"rot", CHUNK + 5).unwrap();
    part.sync_all().unwrap();
    push.set_limit(None).unwrap();
    (source, push)
}

#[test]
fn a_medium_that_forgets_is_found_out_before_publishing() {
    let rig = Rig::new();
    rig.care.borrow_mut().proof = Proof::Readback;
    let (source, push) = copy_that_rots(&rig);
    let error = finish(&push).unwrap_err();
    assert_eq!((error.code, error.side), (Code::TargetIo, Side::Receiver));
    assert_eq!(error.offset, Some(0), "{error}");
    assert!(!rig.root().join("disk").exists(), "published");
    // The next attempt writes that segment again, and only that one.
    rig.open_as("s2", TAG, &[("disk", SIZE)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.session = "s2".into();
    let push = Push::start(job).unwrap();
    finish(&push).unwrap();
    let wire = push.progress().wire;
    assert!(wire < CHUNK + CHUNK / 2, "{wire} bytes were sent");
    assert!(std::fs::read(rig.root().join("disk")).unwrap() == std::fs::read(source).unwrap());
}

#[test]
fn without_a_proof_of_the_medium_there_is_none() {
    let rig = Rig::new();
    assert_eq!(*rig.care.borrow(), Care::default());
    let (_, push) = copy_that_rots(&rig);
    finish(&push).unwrap();
}

#[test]
fn a_proof_of_a_good_medium_costs_nothing_but_time() {
    let rig = Rig::new();
    rig.care.borrow_mut().proof = Proof::Readback;
    let source = rig.source("disk", SIZE + 77, &[(SIZE - 5, &noise(4, 82))]);
    rig.open(&[("disk", SIZE + 77)]).unwrap();
    run(rig.job(&[&source])).unwrap();
    assert!(std::fs::read(rig.root().join("disk")).unwrap() == std::fs::read(source).unwrap());
}
