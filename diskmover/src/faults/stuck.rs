//! A disk that does not answer holds up what it has to do with, and nothing else.

use std::time::Duration;

use super::{Fault, Injected, Op, Rule, inject};
use crate::digest::CHUNK;
use crate::error::Code;
use crate::listener::Limits;
use crate::offer::Offer;
use crate::pki::uri;
use crate::push::{Job, Push};
use crate::rig::{Rig, eventually, finish, limits, noise, run};

const SIZE: u64 = 2 * CHUNK;

/// A disk that hangs as soon as the second chunk of such a part is written.
fn hung(rig: &Rig, part: &'static str) -> Injected {
    let rule = Rule {
        file: part,
        op: Op::Write,
        at: Some(CHUNK),
        after: 0,
        times: u32::MAX,
        fault: Fault::Stuck,
    };
    inject(&rig.root(), rule)
}

fn await_hang(disk: &Injected) {
    eventually("the disk hangs", || disk.has_struck().then_some(()));
}

#[test]
fn all_sessions_of_a_receiver_that_closes_are_told_at_once() {
    let rig = Rig::new();
    std::thread::scope(|scope| {
        let disks = [".one.dm-t1.part", ".two.dm-t1.part"].map(|part| hung(&rig, part));
        let pushes = ["one", "two"].map(|name| {
            rig.open_as(name, "t1", &[(name, SIZE)]).unwrap();
            let source = rig.source(name, SIZE, &[(0, &noise(1, SIZE as usize))]);
            let mut job = rig.job(&[&source]);
            job.session = name.to_owned();
            Push::start(job).unwrap()
        });
        disks.iter().for_each(await_hang);
        let closing = scope.spawn(|| rig.receiver.close());
        for push in &pushes {
            assert_eq!(finish(push).unwrap_err().code, Code::SessionClosed);
        }
        assert!(!closing.is_finished(), "they have let go of nothing yet");
        drop(disks);
        closing.join().unwrap();
    });
    for name in ["one", "two"] {
        assert!(rig.receiver.status(name).is_err());
    }
}

/// A listener without sessions, which takes so many copies and waits shortly.
fn serving(sessions: usize) -> Rig {
    let rig = Rig::with(Limits {
        sessions,
        hello: Duration::from_secs(3),
        ..limits()
    });
    rig.receiver.serve_names(Offer::files(rig.root())).unwrap();
    rig
}

fn job_for(rig: &Rig, name: &str, size: u64) -> Job {
    let source = rig.source(name, size, &[(0, &noise(1, size as usize))]);
    let mut job = rig.job(&[&source]);
    job.session = format!("open/{name}");
    job.key = [0; 32];
    job
}

/// Leaves a session of "one" whose sender is gone and whose disk hangs.
fn leave_hung(rig: &Rig) -> Injected {
    let disk = hung(rig, ".part");
    let push = Push::start(job_for(rig, "one", SIZE)).unwrap();
    await_hang(&disk);
    push.cancel();
    let id = format!("open/one/{}", uri("a"));
    eventually("the sender is gone", || {
        let (_, progress, _) = rig.receiver.status(&id).unwrap();
        (progress.connections == 0).then_some(())
    });
    disk
}

#[test]
fn a_copy_that_nobody_sends_any_more_does_not_hold_up_those_of_other_names() {
    let rig = serving(16);
    let disk = leave_hung(&rig);
    run(job_for(&rig, "two", CHUNK)).unwrap();
    let error = run(job_for(&rig, "one", SIZE)).unwrap_err();
    assert_eq!(error.code, Code::TargetBusy, "{error}");
    assert!(error.message.contains("has not let go"), "{error}");
    // Who comes while it is let go of waits: all connections of it, for one session.
    let mut job = job_for(&rig, "one", SIZE);
    job.connections = 8;
    let push = Push::start(job).unwrap();
    drop(disk);
    finish(&push).unwrap();
}

#[test]
fn a_copy_that_is_let_go_of_counts_until_then() {
    let rig = serving(1);
    let disk = leave_hung(&rig);
    let error = run(job_for(&rig, "two", CHUNK)).unwrap_err();
    assert_eq!(error.code, Code::LimitExceeded, "{error}");
    drop(disk);
    run(job_for(&rig, "two", CHUNK)).unwrap();
}
