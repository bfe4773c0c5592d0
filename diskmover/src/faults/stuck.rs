//! A disk that does not answer holds up what it has to do with, and nothing else.

use super::{Fault, Injected, Op, Rule, inject};
use crate::digest::CHUNK;
use crate::error::Code;
use crate::push::Push;
use crate::rig::{Rig, eventually, finish, noise};

const SIZE: u64 = 2 * CHUNK;

/// A disk that hangs as soon as this part is written.
fn hung(rig: &Rig, part: &'static str) -> Injected {
    let rule = Rule {
        file: part,
        op: Op::Write,
        at: None,
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
