//! Several volumes: the last look is at all of them.

use std::os::unix::fs::FileExt;

use super::{Fault, Op, Rule, inject};
use crate::digest::CHUNK;
use crate::push::Push;
use crate::rig::{Rig, eventually, finish};

#[test]
fn what_changes_while_the_holes_of_another_volume_are_read_is_noticed() {
    let rig = Rig::new();
    let size = 4 * CHUNK;
    let first = rig.source("first", size, &[(0, b"data")]);
    let second = rig.source("second", size, &[(0, b"data")]);
    let stuck = Rule {
        file: "out/second",
        op: Op::Read,
        // In a hole: only the sample reads there.
        at: Some(2 * CHUNK),
        after: 0,
        times: u32::MAX,
        fault: Fault::Stuck,
    };
    let stuck = inject(first.parent().unwrap(), stuck);
    rig.open(&[("first", size), ("second", size)]).unwrap();
    let push = Push::start(rig.job(&[&first, &second])).unwrap();
    eventually("the holes are read", || stuck.has_struck().then_some(()));
    let file = std::fs::File::options().write(true).open(&first).unwrap();
    file.write_all_at(b"changed", CHUNK).unwrap();
    drop(stuck);
    finish(&push).unwrap();
    for source in [first, second] {
        let placed = rig.root().join(source.file_name().unwrap());
        assert!(
            std::fs::read(&placed).unwrap() == std::fs::read(&source).unwrap(),
            "a change of {} went unnoticed",
            source.display()
        );
    }
}
