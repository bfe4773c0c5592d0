//! What is read back, how often, and who waits for it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::{Fault, Op, Rule, inject};
use crate::digest::{self, CHUNK};
use crate::frame::Kind;
use crate::peer::Peer;
use crate::push::{Job, Push};
use crate::rig::{Rig, eventually, finish, noise, run};
use crate::target::Proof;

/// Two segments, and a bit.
const CHUNKS: u64 = 130;

#[test]
fn every_chunk_is_read_back_once() {
    let rig = Rig::new();
    rig.care.borrow_mut().proof = Proof::Readback;
    let chunks = [0, 1, 63, 64, 129];
    let data = noise(1, CHUNK as usize);
    let pieces = chunks.map(|chunk| (chunk * CHUNK, data.as_slice()));
    let source = rig.source("disk", CHUNKS * CHUNK, &pieces);
    let reads = chunks.map(|chunk| {
        let read = Rule {
            file: ".part",
            op: Op::Read,
            at: Some(chunk * CHUNK + 9),
            after: 0,
            times: u32::MAX,
            fault: Fault::Slow(Duration::ZERO),
        };
        inject(&rig.root(), read)
    });
    rig.open(&[("disk", CHUNKS * CHUNK)]).unwrap();
    run(rig.job(&[&source])).unwrap();
    assert_eq!(reads.map(|read| read.met()), [1; 5]);
}

#[test]
fn what_comes_twice_and_is_written_when_all_is_there_is_read_back_again() {
    let rig = Rig::new();
    rig.care.borrow_mut().proof = Proof::Readback;
    let on = |op, time, times| Rule {
        file: ".part",
        op,
        at: Some(9),
        after: 0,
        times,
        fault: Fault::Slow(time),
    };
    let late = inject(&rig.root(), on(Op::Write, Duration::from_secs(3), 1));
    let reads = inject(&rig.root(), on(Op::Read, Duration::ZERO, u32::MAX));
    rig.open(&[("disk", CHUNK)]).unwrap();
    let content = noise(1, CHUNK as usize);
    let mut first = Peer::sending(&rig, "disk", CHUNK);
    first.data(0, 0, CHUNK, &content);
    eventually("it is about to be written", || {
        late.has_struck().then_some(())
    });
    let mut second = Peer::dial(&rig, &rig.pki.host("a"));
    second.hello(|_| {});
    second.hear_kind(Kind::Welcome);
    second.data(0, 0, CHUNK, &content);
    second.hear_kind(Kind::Ack);
    let hash = digest::chunk_hash(&digest::scan(&content), &content);
    let root = digest::root(CHUNK, [digest::segment_hash(&[hash])].iter());
    second.finish(0, CHUNK, &root);
    second.hear_kind(Kind::Receipt);
    assert_eq!(reads.met(), 2, "not read back after its last write");
}

#[test]
fn a_source_that_changes_while_a_medium_is_slow_to_give_back_is_gone_through_again() {
    let rig = Rig::new();
    rig.care.borrow_mut().proof = Proof::Readback;
    let data = noise(1, CHUNK as usize);
    // Much is still to come when the first segment is complete.
    let pieces = [0, 63, 64, 65, 66, 67, 68, 69, 70, 71];
    let pieces = pieces.map(|chunk| (chunk * CHUNK, data.as_slice()));
    let source = rig.source("disk", CHUNKS * CHUNK, &pieces);
    let slow = Rule {
        file: ".part",
        op: Op::Read,
        at: Some(0),
        after: 0,
        times: 1,
        fault: Fault::Slow(Duration::from_secs(3)),
    };
    let slow = inject(&rig.root(), slow);
    rig.open(&[("disk", CHUNKS * CHUNK)]).unwrap();
    let job = rig.job(&[&source]);
    let push = Push::start(Job {
        limit: Some(CHUNK),
        connections: 1,
        ..job
    });
    let push = push.unwrap();
    eventually("the first segment is read back", || {
        slow.has_struck().then_some(())
    });
    let file = File::options().write(true).open(&source).unwrap();
    file.write_all_at(b"changed", 5).unwrap();
    push.set_limit(None).unwrap();
    finish(&push).unwrap();
    let placed = std::fs::read(rig.root().join("disk")).unwrap();
    assert!(placed == std::fs::read(&source).unwrap());
}
