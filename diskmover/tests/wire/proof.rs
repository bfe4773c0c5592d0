//! Media that do not give back what was written to them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use diskmover::digest::CHUNK;
use diskmover::error::{Code, Side};
use diskmover::push::Push;
use diskmover::target::{Care, Place, Proof};

use crate::devices::Loop;
use crate::rig::{Rig, TAG, eventually, finish, noise, run};

const SEGMENT: u64 = 64 * CHUNK;
const SIZE: u64 = 3 * SEGMENT;
/// About one chunk in a second.
const SLOW: u64 = CHUNK;

/// A source with data at the beginning and at the end of each segment, so that none
/// is complete before its end came.
fn source(rig: &Rig) -> PathBuf {
    let data = noise(1, CHUNK as usize);
    let edges = |segment| [segment * SEGMENT, (segment + 1) * SEGMENT - CHUNK];
    let places: Vec<u64> = (0..3).flat_map(edges).collect();
    let pieces: Vec<(u64, &[u8])> = places.iter().map(|at| (*at, data.as_slice())).collect();
    rig.source("disk", SIZE, &pieces)
}

/// Copies slowly, and changes a segment before it is complete.
fn copy_that_rots(rig: &Rig, source: &Path, name: &str, medium: &Path, segment: u64) -> Push {
    rig.open(&[(name, SIZE)]).unwrap();
    let mut job = rig.job(&[source]);
    job.volumes[0].0 = name.to_owned();
    (job.limit, job.connections) = (Some(SLOW), 1);
    let push = Push::start(job).unwrap();
    let data = noise(1, CHUNK as usize);
    eventually("its first data is there", || {
        let mut found = vec![0; CHUNK as usize];
        let medium = File::open(medium).ok()?;
        medium.read_exact_at(&mut found, segment * SEGMENT).ok()?;
        (found == data).then_some(())
    });
    let medium = File::options().write(true).open(medium).unwrap();
    medium.write_all_at(b"rot", segment * SEGMENT + 5).unwrap();
    medium.sync_all().unwrap();
    push
}

fn part(rig: &Rig) -> PathBuf {
    rig.root().join(format!(".disk.dm-{TAG}.part"))
}

#[test]
fn a_medium_that_forgets_is_found_out_before_publishing() {
    let rig = Rig::new();
    rig.care.borrow_mut().proof = Proof::Readback;
    let source = source(&rig);
    let push = copy_that_rots(&rig, &source, "disk", &part(&rig), 2);
    push.set_limit(None).unwrap();
    let error = finish(&push).unwrap_err();
    assert_eq!((error.code, error.side), (Code::TargetIo, Side::Receiver));
    assert_eq!(error.offset, Some(2 * SEGMENT), "{error}");
    assert!(!rig.root().join("disk").exists(), "published");
    // The next attempt writes that segment again, and only that one.
    rig.open_as("s2", TAG, &[("disk", SIZE)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.session = "s2".into();
    let push = Push::start(job).unwrap();
    finish(&push).unwrap();
    assert_eq!(push.progress().resumed, 2 * SEGMENT);
    assert!(std::fs::read(rig.root().join("disk")).unwrap() == std::fs::read(source).unwrap());
}

#[test]
fn it_is_found_out_while_the_rest_still_comes() {
    let rig = Rig::new();
    rig.care.borrow_mut().proof = Proof::Readback;
    let source = source(&rig);
    let push = copy_that_rots(&rig, &source, "disk", &part(&rig), 0);
    eventually("all of the first segment is there", || {
        (push.progress().done >= SEGMENT).then_some(())
    });
    // What is left would take days.
    push.set_limit(Some(1)).unwrap();
    let error = finish(&push).unwrap_err();
    assert_eq!((error.code, error.offset), (Code::TargetIo, Some(0)));
    let done = push.progress().done;
    assert!(done < SIZE, "all of it had to come first");
}

#[test]
fn a_device_is_read_back_unless_that_is_not_wanted() {
    for proof in [Proof::Usual, Proof::Written] {
        let rig = Rig::new();
        let state = rig.root().join("state");
        std::fs::create_dir(&state).unwrap();
        *rig.care.borrow_mut() = Care {
            place: Place::Device { state },
            proof,
            ..Care::default()
        };
        *rig.targets.borrow_mut() = "/dev".into();
        let device = Loop::new(rig.root().join("backing"), SIZE, 512);
        let source = source(&rig);
        // What stands on a device is asked for first: the copy begins with hashes.
        let push = copy_that_rots(&rig, &source, device.name(), &device.path, 0);
        push.set_limit(None).unwrap();
        match (proof, finish(&push)) {
            (Proof::Written, Ok(_)) => {}
            (Proof::Usual, Err(error)) => assert_eq!(error.code, Code::TargetIo, "{error}"),
            (proof, other) => panic!("{proof:?}: {other:?}"),
        }
    }
}

#[test]
fn without_a_proof_of_the_medium_there_is_none() {
    let rig = Rig::new();
    assert_eq!(*rig.care.borrow(), Care::default());
    let source = source(&rig);
    let push = copy_that_rots(&rig, &source, "disk", &part(&rig), 0);
    push.set_limit(None).unwrap();
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
