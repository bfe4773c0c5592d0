//! Tests: a source that cannot be read everywhere, where the caller goes on.
//!
//! Whatever happens to such a copy, it is never taken for a good one: not by who
//! asked for it, not by the receiver, and not by what goes on from it later.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};

use super::{Fault, Injected, Op, Rule, inject};
use crate::digest::{self, CHUNK};
use crate::error::{Code, MoverError, Side};
use crate::messages::Receipt;
use crate::origin::Origin;
use crate::push::{Job, Push};
use crate::rig::{Rig, SESSION, TAG, eventually, finish, noise};
use crate::salvage::OnReadError;
use crate::sample;
use crate::session::Phase;
use crate::sys::AlignedBuf;
use crate::target::Place;
use crate::unreadable::MOST_BYTES;

const SIZE: u64 = 4 * CHUNK + 5000;
/// Somewhere in a sector in the middle of a block.
const BAD: u64 = 2 * CHUNK + 5 * 4096 + 2 * 512 + 9;

const fn broken(error: i32, at: Option<u64>) -> Rule {
    Rule {
        file: "out/disk",
        op: Op::Read,
        at,
        after: 0,
        times: u32::MAX,
        fault: Fault::Error(error),
    }
}

struct Scene {
    rig: Rig,
    source: PathBuf,
}

impl Scene {
    /// A source full of noise, and a receiver that takes degraded copies, or not.
    fn new(takes: bool) -> Scene {
        let rig = Rig::new();
        rig.care.borrow_mut().degraded = takes;
        let source = rig.source("disk", SIZE, &[(0, &noise(1, SIZE as usize))]);
        Scene { rig, source }
    }

    fn break_at(&self, at: u64) -> Injected {
        inject(self.source.parent().unwrap(), broken(libc::EIO, Some(at)))
    }

    fn job(&self, on_read_error: OnReadError) -> Job {
        self.rig.open(&[("disk", SIZE)]).unwrap();
        Job {
            on_read_error,
            ..self.rig.job(&[&self.source])
        }
    }

    fn copy(&self, on_read_error: OnReadError) -> Result<Receipt, MoverError> {
        let push = Push::start(self.job(on_read_error))?;
        let receipt = finish(&push)?.remove(0);
        // Of what stands there already this attempt has read nothing that counts.
        let unreadable = push.progress().unreadable;
        assert_eq!(unreadable, receipt.unreadable.bytes());
        Ok(receipt)
    }

    /// Goes on with zeros until so many chunks are noted as durable.
    fn interrupt_after(&self, chunks: u64) {
        let push = Push::start(Job {
            limit: Some(CHUNK / 4),
            connections: 1,
            ..self.job(OnReadError::Zero)
        });
        let push = push.unwrap();
        eventually("some of it is there", || {
            let (_, progress, _) = self.rig.receiver.status(SESSION).unwrap();
            (progress.done >= chunks * CHUNK).then_some(())
        });
        push.cancel();
        self.rig.receiver.close_session(SESSION);
    }

    fn target(&self) -> PathBuf {
        self.rig.root().join("disk")
    }

    /// What arrived is the source, with zeros in these ranges and nowhere else.
    fn arrived_without(&self, lost: &[Range<u64>]) {
        let mut expected = std::fs::read(&self.source).unwrap();
        for range in lost {
            expected[range.start as usize..range.end as usize].fill(0);
        }
        assert!(std::fs::read(self.target()).unwrap() == expected);
    }

    /// The unit in which the source's medium loses what it holds.
    fn unit(&self) -> u64 {
        let flags = OFlags::RDONLY | OFlags::DIRECT;
        let mut memory = AlignedBuf::new(4096).unwrap();
        let direct = rustix::fs::open(&self.source, flags, Mode::empty());
        let sector = direct.map(|fd| File::from(fd).read_at(&mut memory[..512], 512));
        if matches!(sector, Ok(Ok(512))) {
            512
        } else {
            4096
        }
    }

    /// The smallest range around a byte that its medium can lose.
    fn around(&self, at: u64) -> Range<u64> {
        let start = at / self.unit() * self.unit();
        start..start + self.unit()
    }
}

#[test]
fn only_what_is_lost_becomes_zeros_and_everybody_is_told() {
    let scene = Scene::new(true);
    let _bad = scene.break_at(BAD);
    let receipt = scene.copy(OnReadError::Zero).unwrap();
    let lost = [scene.around(BAD)];
    assert_eq!(receipt.unreadable.ranges(), lost);
    scene.arrived_without(&lost);
    let (phase, _, receipts) = scene.rig.receiver.status(SESSION).unwrap();
    assert_eq!((phase, receipts), (Phase::Done, vec![receipt.clone()]));
    // Its digest is that of what was placed, so it is not the source's.
    let placed = crate::local::digest(&scene.target()).unwrap();
    assert_eq!(placed.2, receipt.root);
}

#[test]
fn what_is_lost_side_by_side_is_told_as_one() {
    let scene = Scene::new(true);
    let edge = 3 * CHUNK;
    let bad = [edge - 1, edge, BAD, SIZE - 1];
    let _bad = bad.map(|at| scene.break_at(at));
    let receipt = scene.copy(OnReadError::Zero).unwrap();
    let across = scene.around(edge - 1).start..scene.around(edge).end;
    let tail = scene.around(SIZE - 1).start..SIZE;
    let lost = [scene.around(BAD), across, tail];
    assert_eq!(receipt.unreadable.ranges(), lost);
    scene.arrived_without(&lost);
}

#[test]
fn other_errors_and_an_end_that_comes_early_are_not_made_zeros() {
    for (fault, code) in [
        (Fault::Error(libc::ENODEV), Code::SourceIo),
        (Fault::Error(libc::ENXIO), Code::SourceIo),
        (Fault::Short(0), Code::SourceChanged),
    ] {
        let scene = Scene::new(true);
        let rule = Rule {
            fault,
            ..broken(0, Some(BAD))
        };
        let _bad = inject(scene.source.parent().unwrap(), rule);
        let error = scene.copy(OnReadError::Zero).unwrap_err();
        assert_eq!((error.code, error.side), (code, Side::Sender), "{error}");
        assert!(!scene.target().exists());
    }
}

#[test]
fn a_receiver_that_did_not_say_so_takes_no_degraded_copy() {
    let scene = Scene::new(false);
    let bad = scene.break_at(BAD);
    let error = scene.copy(OnReadError::Zero).unwrap_err();
    assert_eq!((error.code, error.side), (Code::SourceIo, Side::Receiver));
    assert_eq!(error.offset, Some(scene.around(BAD).start));
    assert!(error.message.contains("no degraded copy"), "{error}");
    assert!(!scene.target().exists());
    drop(bad);
    let receipt = scene.copy(OnReadError::Fail).unwrap();
    assert!(receipt.unreadable.is_empty());
    scene.arrived_without(&[]);
}

#[test]
fn an_interrupted_copy_with_zeros_is_not_gone_on_from_as_a_good_one() {
    // What the next attempt does, and whether the source can be read again then.
    for (on_read_error, healed) in [
        (OnReadError::Fail, true),
        (OnReadError::Fail, false),
        (OnReadError::Zero, true),
        (OnReadError::Zero, false),
    ] {
        let what = format!("{on_read_error:?}, {healed}");
        let scene = Scene::new(true);
        // In every chunk, so in the one that is placed.
        let places = [0, 1, 2, 3].map(|chunk| chunk * CHUNK + 9);
        let bad = places.map(|at| scene.break_at(at));
        scene.interrupt_after(1);
        let lost = places.map(|at| scene.around(at));
        let bad = Some(bad).filter(|_| !healed);
        match scene.copy(on_read_error) {
            Ok(receipt) if healed => {
                assert!(receipt.unreadable.is_empty(), "{what}");
                scene.arrived_without(&[]);
            }
            Ok(receipt) => {
                assert_eq!(on_read_error, OnReadError::Zero, "{what}: taken for good");
                assert_eq!(receipt.unreadable.ranges(), lost, "{what}");
                scene.arrived_without(&lost);
            }
            Err(error) => {
                let expected = (OnReadError::Fail, false, Code::SourceIo);
                assert_eq!((on_read_error, healed, error.code), expected, "{error}");
                assert!(!scene.target().exists());
            }
        }
        drop(bad);
    }
}

#[test]
fn a_degraded_copy_answers_for_no_other_one() {
    let scene = Scene::new(true);
    let bad = scene.break_at(BAD);
    let first = scene.copy(OnReadError::Zero).unwrap();
    // The same again is the same again.
    assert_eq!(scene.copy(OnReadError::Zero).unwrap(), first);
    drop(bad);
    let refused = |on_read_error| {
        let error = scene.copy(on_read_error).unwrap_err();
        assert_eq!(error.code, Code::TargetExists, "{error}");
        error
    };
    // The source has other content than what was placed.
    refused(OnReadError::Zero);
    let error = refused(OnReadError::Fail);
    assert!(error.message.contains("DEGRADED"), "{error}");
    // Nor does it where no degraded copy is taken, whatever the sender thinks of it.
    scene.rig.care.borrow_mut().degraded = false;
    let error = refused(OnReadError::Zero);
    assert_eq!(error.side, Side::Receiver);
    assert!(error.message.contains("DEGRADED"), "{error}");
}

#[test]
fn no_bitmap_builds_on_a_degraded_copy() {
    let scene = Scene::new(true);
    let bad = scene.break_at(BAD);
    let first = scene.copy(OnReadError::Zero).unwrap();
    drop(bad);
    scene.rig.receiver.close_session(SESSION);
    let mut care = scene.rig.care.borrow().clone();
    (care.update, care.place) = (true, Place::File);
    let spec = sample::spec(&scene.rig.root(), care);
    assert_eq!(sample::unchanged(&spec, TAG, SIZE, first.root), first);
}

#[test]
fn a_disk_that_gives_nothing_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("out")).unwrap();
    let path = dir.path().join("out/disk");
    let size = 2 * MOST_BYTES;
    File::create(&path).unwrap().set_len(size).unwrap();
    let _bad = inject(dir.path(), broken(libc::EIO, None));
    let source = Origin::File(path)
        .open(&[3; 16], OnReadError::Zero)
        .unwrap();
    let mut buffer = AlignedBuf::new(CHUNK as usize).unwrap();
    buffer.fill(7);
    let mut read = |chunk: u64| {
        let whole = [chunk * CHUNK..(chunk + 1) * CHUNK];
        let read = source.read_chunk(chunk, &whole, &mut buffer);
        read.map(|_| assert!(digest::is_zero(&buffer)))
    };
    let most = MOST_BYTES / CHUNK;
    (0..most).for_each(|chunk| read(chunk).unwrap());
    let error = read(most).unwrap_err();
    assert_eq!(
        (error.code, error.offset),
        (Code::SourceIo, Some(MOST_BYTES))
    );
    assert!(error.message.contains("dying disks"), "{error}");
}

#[test]
fn a_copy_that_has_ended_goes_on_with_no_block() {
    let scene = Scene::new(true);
    let _bad = scene.break_at(9);
    let origin = Origin::File(scene.source.clone());
    let source = origin.open(&[3; 16], OnReadError::Zero).unwrap();
    source.abort();
    let mut buffer = AlignedBuf::new(CHUNK as usize).unwrap();
    let error = source.read_chunk(0, &[0..CHUNK], &mut buffer).unwrap_err();
    assert!(error.message.contains("has ended"), "{error}");
}
