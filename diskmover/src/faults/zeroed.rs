//! Zeros over something else, where the target cannot zero or says wrongly what it holds.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use super::{Fault, Injected, Op, Rule, inject};
use crate::digest::CHUNK;
use crate::push::Push;
use crate::rig::{PATIENCE, Rig, SESSION, TAG, eventually, run};
use crate::target::Proof;

fn part(rig: &Rig) -> PathBuf {
    rig.root().join(format!(".disk.dm-{TAG}.part"))
}

fn always(rig: &Rig, op: Op, fault: Fault) -> Injected {
    let rule = Rule {
        file: ".part",
        op,
        at: None,
        after: 0,
        times: u32::MAX,
        fault,
    };
    inject(&rig.root(), rule)
}

/// Three GiB of zeros would take minutes; closing must not wait for them.
#[test]
fn a_session_ends_soon_while_zeros_are_placed_by_hand() {
    let size = 3072 * CHUNK;
    let rig = Rig::new();
    let source = rig.source("disk", size, &[]);
    std::fs::write(part(&rig), b"older").unwrap();
    let _refused = always(&rig, Op::Zero, Fault::Error(libc::EOPNOTSUPP));
    let read = always(&rig, Op::Read, Fault::Slow(Duration::from_millis(5)));
    rig.open(&[("disk", size)]).unwrap();
    let push = Push::start(rig.job(&[&source])).unwrap();
    eventually("zeros are placed", || read.has_struck().then_some(()));
    let (closed, told) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            rig.receiver.close_session(SESSION);
            closed.send(()).unwrap();
        });
        told.recv_timeout(PATIENCE).expect("it does not end");
    });
    push.cancel();
}

/// A file system without a good record, and without a call to punch holes.
struct Ramfs(PathBuf);

impl Ramfs {
    fn at(path: &Path) -> Ramfs {
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "ramfs", "none"]).arg(path).status();
        assert!(mounted.unwrap().success());
        Ramfs(path.to_owned())
    }
}

impl Drop for Ramfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_target_is_not_believed_either_when_it_reports_holes_over_data() {
    let size = 3 * CHUNK;
    let rig = Rig::new();
    let _ramfs = Ramfs::at(&rig.root());
    rig.care.borrow_mut().proof = Proof::Readback;
    let source = rig.source("disk", size, &[(CHUNK, b"data")]);
    std::fs::write(part(&rig), vec![9; size as usize]).unwrap();
    let lie = always(&rig, Op::Map, Fault::AllHole);
    rig.open(&[("disk", size)]).unwrap();
    run(rig.job(&[&source])).unwrap();
    let placed = std::fs::read(rig.root().join("disk")).unwrap();
    assert!(
        placed == std::fs::read(&source).unwrap(),
        "older content shows through"
    );
    assert!(!lie.has_struck(), "it was asked");
}
