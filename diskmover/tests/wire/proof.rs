//! Media that do not give back what was written to them.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use diskmover::digest::{CHUNK, SEGMENT_CHUNKS};
use diskmover::error::{Code, Result, Side};
use diskmover::frame::Kind;
use diskmover::messages;
use diskmover::target::{Care, Place, Proof};

use crate::devices::Loop;
use crate::peer::{Heard, Peer};
use crate::rig::{Rig, SESSION, TAG, noise, run};

const SEGMENT: u64 = SEGMENT_CHUNKS * CHUNK;
const SIZE: u64 = 3 * SEGMENT;

/// A source with data at the beginning and at the end of each segment, so that none
/// is complete before its end came.
fn source(rig: &Rig) -> PathBuf {
    let data = noise(1, CHUNK as usize);
    let edges = |segment| [segment * SEGMENT, (segment + 1) * SEGMENT - CHUNK];
    let places: Vec<u64> = (0..3).flat_map(edges).collect();
    let pieces: Vec<(u64, &[u8])> = places.iter().map(|at| (*at, data.as_slice())).collect();
    rig.source("disk", SIZE, &pieces)
}

/// Sends a segment. When its first data has been written, and nothing of it can be
/// proven yet, something else happens. Two answers are still to come.
fn send(peer: &mut Peer, segment: u64, meanwhile: impl FnOnce()) {
    let data = noise(1, CHUNK as usize);
    let first = segment * SEGMENT_CHUNKS;
    let last = first + SEGMENT_CHUNKS - 1;
    peer.data(0, first, SIZE, &data);
    peer.hear_kind(Kind::Ack);
    meanwhile();
    peer.zeros(0, first + 1..last, SIZE);
    peer.data(0, last, SIZE, &data);
}

/// A sender that has sent these segments, of which the medium changes the last one.
fn sending_what_rots(rig: &Rig, name: &str, medium: &Path, segments: Range<u64>) -> Peer {
    rig.open(&[(name, SIZE)]).unwrap();
    let mut peer = Peer::sending(rig, name, SIZE);
    let rotten = segments.end - 1;
    for segment in segments.start..rotten {
        send(&mut peer, segment, || {});
        (0..2).for_each(|_| drop(peer.hear_kind(Kind::Ack)));
    }
    send(&mut peer, rotten, || {
        let medium = File::options().write(true).open(medium).unwrap();
        medium.write_all_at(b"rot", rotten * SEGMENT + 5).unwrap();
        medium.sync_all().unwrap();
    });
    peer
}

/// How the copy ends once the last segment is there, too.
fn finished(mut peer: Peer, source: &Path) -> Result<()> {
    let mut answers = 0;
    loop {
        match peer.hear() {
            Heard::Frame(header, _) if header.kind == Kind::Ack => answers += 1,
            Heard::Frame(header, _) if header.kind == Kind::Receipt => return Ok(()),
            Heard::Frame(header, payload) if header.kind == Kind::Error => {
                return Err(messages::decode_error(&payload).unwrap());
            }
            Heard::Frame(..) => continue,
            Heard::End => panic!("an end without a reason"),
        }
        if answers == 2 {
            let root = diskmover::local::digest(source).unwrap().2;
            peer.finish(0, SIZE, &root);
        }
    }
}

fn part(rig: &Rig) -> PathBuf {
    rig.root().join(format!(".disk.dm-{TAG}.part"))
}

#[test]
fn a_medium_that_forgets_is_found_out_before_publishing() {
    let rig = Rig::new();
    rig.care.borrow_mut().proof = Proof::Readback;
    let source = source(&rig);
    let peer = sending_what_rots(&rig, "disk", &part(&rig), 0..3);
    let error = finished(peer, &source).unwrap_err();
    assert_eq!((error.code, error.side), (Code::TargetIo, Side::Receiver));
    assert_eq!(error.offset, Some(2 * SEGMENT), "{error}");
    assert!(!rig.root().join("disk").exists(), "published");
    // The next attempt writes that segment again, and only that one.
    rig.receiver.close_session(SESSION);
    rig.open(&[("disk", SIZE)]).unwrap();
    let mut peer = Peer::dial(&rig, &rig.pki.host("a"));
    peer.hello(|_| {});
    peer.hear_kind(Kind::Welcome);
    peer.open(0, "disk", SIZE);
    assert_eq!(peer.hear_state(SIZE).done_bytes(), 2 * SEGMENT);
    send(&mut peer, 2, || {});
    finished(peer, &source).unwrap();
    assert!(std::fs::read(rig.root().join("disk")).unwrap() == std::fs::read(source).unwrap());
}

#[test]
fn it_is_found_out_while_the_rest_still_comes() {
    let rig = Rig::new();
    rig.care.borrow_mut().proof = Proof::Readback;
    let mut peer = sending_what_rots(&rig, "disk", &part(&rig), 0..1);
    let error = peer.hear_error().expect("an end without a reason");
    assert_eq!((error.code, error.offset), (Code::TargetIo, Some(0)));
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
        let peer = sending_what_rots(&rig, device.name(), &device.path, 0..3);
        match (proof, finished(peer, &source)) {
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
    let peer = sending_what_rots(&rig, "disk", &part(&rig), 0..3);
    finished(peer, &source).unwrap();
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
