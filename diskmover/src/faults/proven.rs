//! What is read back, how often, and who waits for it; and what is written last of all.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::{Fault, Op, Rule, inject};
use crate::digest::{self, BLOCK, CHUNK, Hash};
use crate::dirt;
use crate::error::Code;
use crate::frame::Kind;
use crate::peer::Peer;
use crate::push::{Job, Push};
use crate::rig::{Rig, SESSION, eventually, finish, noise, run};
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
        let read = on(Op::Read, chunk * CHUNK + 9, Fault::Slow(Duration::ZERO));
        inject(&rig.root(), read)
    });
    rig.open(&[("disk", CHUNKS * CHUNK)]).unwrap();
    run(rig.job(&[&source])).unwrap();
    assert_eq!(reads.map(|read| read.met()), [1; 5]);
}

/// Something that is done to a byte of the part.
fn on(op: Op, at: u64, fault: Fault) -> Rule {
    Rule {
        file: ".part",
        op,
        at: Some(at),
        after: 0,
        times: u32::MAX,
        fault,
    }
}

/// A chunk comes over two connections, and what the first one brought is written when
/// the other one has said that all is there; the latter.
fn written_late(rig: &Rig, content: &[u8]) -> Peer {
    let late = Rule {
        times: 1,
        ..on(Op::Write, 9, Fault::Stuck)
    };
    let late = inject(&rig.root(), late);
    rig.open(&[("disk", CHUNK)]).unwrap();
    let mut first = Peer::sending(rig, "disk", CHUNK);
    first.data(0, 0, CHUNK, content);
    eventually("it is about to be written", || {
        late.has_struck().then_some(())
    });
    let mut second = Peer::dial(rig, &rig.pki.host("a"));
    second.hello(|_| {});
    second.hear_kind(Kind::Welcome);
    second.data(0, 0, CHUNK, content);
    second.hear_kind(Kind::Ack);
    second.finish(0, CHUNK, &root(content));
    let session = rig.receiver.session(SESSION).unwrap();
    eventually("all is there", || session.drained.has_come().then_some(()));
    drop(late);
    second
}

/// The root digest of a volume of one chunk.
fn root(content: &[u8]) -> Hash {
    let mut data = content.to_vec();
    let bitmap = digest::scan(content);
    let len = digest::compact(&mut data, &bitmap);
    let hash = digest::chunk_hash(&bitmap, &data[..len]);
    digest::root(CHUNK, [digest::segment_hash(&[hash])].iter())
}

#[test]
fn what_comes_twice_and_waits_for_room_does_not_hold_up_the_end() {
    let rig = Rig::new();
    let content = noise(1, CHUNK as usize);
    let sync = Rule {
        file: ".part",
        op: Op::Sync,
        at: None,
        after: 0,
        times: 1,
        fault: Fault::Stuck,
    };
    let sync = inject(&rig.root(), sync);
    rig.open(&[("disk", CHUNK)]).unwrap();
    let mut peer = Peer::sending(&rig, "disk", CHUNK);
    peer.data(0, 0, CHUNK, &content);
    peer.hear_kind(Kind::Ack);
    let session = rig.receiver.session(SESSION).unwrap();
    session.dirt.add(dirt::BARRIER);
    eventually("it is made durable", || sync.has_struck().then_some(()));
    // As much is written meanwhile as may be, and the keeper hears of the end before it
    // hears of that.
    session.dirt.add(dirt::MOST);
    session.dirt.alarm().try_recv().unwrap();
    peer.data(0, 0, CHUNK, &content);
    peer.finish(0, CHUNK, &root(&content));
    eventually("the end is heard of", || {
        (!session.orders().is_empty()).then_some(())
    });
    drop(sync);
    peer.hear_kind(Kind::Receipt);
}

#[test]
fn what_comes_twice_and_is_written_when_all_is_there_is_read_back_again() {
    let rig = Rig::new();
    rig.care.borrow_mut().proof = Proof::Readback;
    let reads = inject(&rig.root(), on(Op::Read, 9, Fault::Slow(Duration::ZERO)));
    let mut peer = written_late(&rig, &noise(1, CHUNK as usize));
    peer.hear_kind(Kind::Receipt);
    assert_eq!(reads.met(), 2, "not read back after its last write");
}

#[test]
fn what_cannot_be_written_when_all_is_there_is_not_published() {
    let rig = Rig::new();
    let mut content = noise(1, CHUNK as usize);
    content[BLOCK..2 * BLOCK].fill(0);
    // Behind the hole: where the late one goes on.
    let rule = Rule {
        after: 1,
        ..on(Op::Write, 2 * BLOCK as u64 + 9, Fault::Error(libc::EIO))
    };
    let broken = inject(&rig.root(), rule);
    let mut peer = written_late(&rig, &content);
    let error = peer.hear_error().unwrap();
    assert_eq!(error.code, Code::TargetIo, "{error}");
    assert!(broken.has_struck());
    rig.receiver.close_session(SESSION);
    assert!(!rig.root().join("disk").exists(), "published");
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
        times: 1,
        ..on(Op::Read, 0, Fault::Slow(Duration::from_secs(3)))
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
