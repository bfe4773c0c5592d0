//! Chunks that come corrupt, and peers that make something of being asked again.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use diskmover::digest::CHUNK;
use diskmover::error::{Code, MoverError};
use diskmover::frame::{self, HELLO_SENDS_AGAIN, Header, Kind};
use diskmover::messages::{Open, VERSION};
use diskmover::push::{Job, Push};
use diskmover::repeats::{MOST_CHUNKS, TRIES};

use crate::hostile_receiver::opened;
use crate::hostile_sender::{FAULTS, SIZE};
use crate::peer::{Heard, Peer, about, listener};
use crate::pki::Pki;
use crate::rig::{PATIENCE, Rig, SESSION, job_to, noise};

/// A sender that knows how to send again, with volume 0 open.
fn sending(rig: &Rig, size: u64) -> Peer {
    rig.open(&[("disk", size)]).unwrap();
    Peer::sending_with(rig, "disk", size, HELLO_SENDS_AGAIN)
}

/// Sends a chunk with a bit flipped.
fn flipped(peer: &mut Peer, chunk: u64, size: u64) {
    let (header, mut payload) = peer.data_frame(0, chunk, size, &[1; CHUNK as usize]);
    payload[40] ^= 1;
    peer.send(header, &payload);
}

fn asked(peer: &mut Peer, what: &str) -> (u64, u64) {
    match peer.hear() {
        Heard::Frame(header, payload) if header.kind == Kind::Want => {
            assert_eq!(payload.len(), 2, "{what}");
            (header.offset, header.logical_len)
        }
        other => panic!("{what}: {other:?}"),
    }
}

#[test]
fn only_what_memory_can_spoil_is_asked_for_again() {
    let rig = Rig::new();
    for fault in FAULTS {
        let mut peer = sending(&rig, SIZE);
        (fault.act)(&mut peer);
        // A zero block sent as data is authentic: its sender meant it.
        if fault.code == Code::ChunkCorrupt && fault.says != "all zero" {
            let (offset, _) = asked(&mut peer, fault.what);
            assert_eq!(Some(offset), fault.offset, "{}", fault.what);
        } else {
            let error = peer.hear_error().expect(fault.what);
            assert_eq!(error.code, fault.code, "{}", fault.what);
        }
        drop(peer);
        rig.receiver.close_session(SESSION);
        diskmover::publish::discard(&rig.root(), "disk", "t1").unwrap();
    }
}

#[test]
fn a_chunk_is_asked_for_three_times_and_then_the_copy_fails_with_its_place() {
    let rig = Rig::new();
    let mut peer = sending(&rig, SIZE);
    for _ in 0..TRIES {
        flipped(&mut peer, 1, SIZE);
        assert_eq!(asked(&mut peer, "flipped"), (CHUNK, CHUNK));
    }
    peer.data(0, 2, SIZE, &[1; CHUNK as usize]);
    peer.hear_kind(Kind::Ack);
    flipped(&mut peer, 1, SIZE);
    let error = rig.failure(SESSION);
    assert_eq!(
        (error.code, error.offset),
        (Code::ChunkCorrupt, Some(CHUNK))
    );
    assert_eq!(error.volume.as_deref(), Some("disk"));
    for part in [&peer.address(), "authenticator", "3 times", "memory"] {
        assert!(error.message.contains(part), "{error}");
    }
    rig.receiver.close_session(SESSION);
    let part = std::fs::read(rig.root().join(".disk.dm-t1.part")).unwrap();
    let chunk = &part[CHUNK as usize..2 * CHUNK as usize];
    assert!(chunk.iter().all(|byte| *byte == 0), "it was written");
}

#[test]
fn what_comes_right_in_the_end_is_placed() {
    let rig = Rig::new();
    let mut peer = sending(&rig, SIZE);
    for _ in 0..TRIES {
        flipped(&mut peer, 1, SIZE);
        asked(&mut peer, "flipped");
        // What is about a run of zeros, or what the base is asked for.
        let mut zeros = frame::ranged(Kind::Zero, 0, 2..4, SIZE);
        peer.send(zeros.clone(), &[]);
        assert_eq!(asked(&mut peer, "zeros").0, 2 * CHUNK);
        zeros.kind = Kind::Hashes;
        (zeros.offset, zeros.logical_len) = (0, CHUNK);
        peer.send(zeros, &[5; 32 + 32 * 16]);
        assert_eq!(asked(&mut peer, "hashes").0, 0);
    }
    peer.data(0, 1, SIZE, &[1; CHUNK as usize]);
    peer.zeros(0, 2..4, SIZE);
    peer.data(0, 0, SIZE, &[1; CHUNK as usize]);
    for _ in 0..3 {
        peer.hear_kind(Kind::Ack);
    }
}

#[test]
fn a_sender_that_spoils_one_chunk_after_the_other_is_given_up() {
    let rig = Rig::new();
    let size = 2 * MOST_CHUNKS as u64 * CHUNK;
    let mut peer = sending(&rig, size);
    for chunk in 0..MOST_CHUNKS as u64 {
        flipped(&mut peer, chunk, size);
        asked(&mut peer, "flipped");
        // That it came right afterwards gives it no more of them.
        peer.data(0, chunk, size, &[1; CHUNK as usize]);
        peer.hear_kind(Kind::Ack);
    }
    flipped(&mut peer, 100, size);
    let error = rig.failure(SESSION);
    assert_eq!(error.code, Code::ChunkCorrupt);
    assert!(error.message.contains("64 other chunks"), "{error}");
}

/// How a copy of a source ends whose receiver does `act` with every connection, and
/// the address of that.
fn copy_to(size: u64, act: impl Fn(&mut Peer, &Path) + Sync) -> (MoverError, String) {
    let pki = Pki::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, noise(1, size as usize)).unwrap();
    let (listener, address) = listener();
    let (credentials, over) = (pki.host("b"), AtomicBool::new(false));
    let credentials = &credentials;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            loop {
                let mut peer = Peer::accept(&listener, credentials);
                if over.load(Ordering::SeqCst) {
                    return;
                }
                act(&mut peer, &path);
            }
        });
        let push = Push::start(Job {
            volumes: vec![("disk".into(), path.clone().into(), None)],
            connections: 1,
            most_connections: 1,
            reconnect: Duration::from_secs(5), // longer than it ever pauses
            ..job_to(&address, &pki)
        });
        let ended = push.unwrap().wait(PATIENCE);
        over.store(true, Ordering::SeqCst);
        drop(std::net::TcpStream::connect(&address));
        (ended.expect("it goes on for ever").unwrap_err(), address)
    })
}

/// Says that a frame came corrupt.
fn want(peer: &mut Peer, sent: &Header) {
    let header = about(Kind::Want, sent);
    peer.send(header, &[0xFF; 2]);
}

#[test]
fn a_receiver_that_is_never_content_is_given_up() {
    // With the same chunk again and again, and with one after the other.
    for (size, sent) in [
        (CHUNK, u64::from(TRIES) + 1),
        (100 * CHUNK, MOST_CHUNKS as u64 + 1),
    ] {
        let count = AtomicU64::new(0);
        let (error, _) = copy_to(size, |peer, _| {
            opened(peer);
            let mut seen = HashSet::new();
            while let Heard::Frame(header, _) = peer.hear() {
                if header.kind == Kind::Data && (size == CHUNK || seen.insert(header.offset)) {
                    count.fetch_add(1, Ordering::SeqCst);
                    want(peer, &header);
                }
            }
        });
        assert_eq!(error.code, Code::Protocol, "{error}");
        assert!(error.offset.is_some() && error.message.contains("wants a chunk again"));
        let count = count.into_inner();
        assert!(count >= sent && count <= sent + 40, "{count} were sent");
    }
}

#[test]
fn a_receiver_that_asks_and_hangs_up_does_not_count_as_one_that_takes_something() {
    let began = Instant::now();
    let (error, _) = copy_to(100 * CHUNK, |peer, _| {
        peer.hear_kind(Kind::Hello);
        peer.send(Header::new(Kind::Welcome, 1), &VERSION.to_le_bytes());
        let Heard::Frame(mut header, _) = peer.hear() else {
            return;
        };
        if header.kind == Kind::Open {
            let mut opened = Header::new(Kind::Opened, 0);
            opened.logical_len = 100 * CHUNK; // older content: hashes come first
            peer.send(opened, &[]);
            header = peer.hear_kind(Kind::Hashes).0;
        }
        want(peer, &header);
        std::thread::sleep(Duration::from_millis(100)); // it has heard
        peer.break_off();
    });
    assert_eq!(error.code, Code::LinkLost, "{error}");
    assert!(began.elapsed() < PATIENCE / 2);
}

#[test]
fn what_is_asked_for_again_is_read_again() {
    let identities = Mutex::new(Vec::new());
    copy_to(CHUNK, |peer, source| {
        peer.hear_kind(Kind::Hello);
        peer.send(Header::new(Kind::Welcome, 1), &VERSION.to_le_bytes());
        let payload = peer.hear_kind(Kind::Open).1;
        let open = Open::decode(&payload).unwrap();
        identities.lock().unwrap().push(open.identity);
        if identities.lock().unwrap().len() > 1 {
            return peer.break_off();
        }
        peer.send(Header::new(Kind::Opened, 0), &[]);
        let (header, _) = peer.hear_kind(Kind::Data);
        let file = File::options().write(true).open(source).unwrap();
        file.write_all_at(b"something else", 5).unwrap();
        want(peer, &header);
        while !matches!(peer.hear(), Heard::End) {}
    });
    // Memory would have given the same once more.
    let identities = identities.into_inner().unwrap();
    assert!(identities.len() > 1 && identities[0] != identities[1]);
}

#[test]
fn both_ends_tell_of_memory_that_is_to_be_suspected() {
    let rig = Rig::new();
    let mut peer = sending(&rig, SIZE);
    flipped(&mut peer, 1, SIZE);
    asked(&mut peer, "flipped");
    let (_, receiver) = copy_to(CHUNK, |peer, _| {
        opened(peer);
        while let Heard::Frame(header, _) = peer.hear() {
            if header.kind == Kind::Data {
                want(peer, &header);
            }
        }
    });
    let notes = diskmover::note::take();
    for (whose, says) in [
        (peer.address(), "was asked for again"),
        (receiver, "gets it again"),
    ] {
        let mine = |note: &&String| note.contains(&whose) && note.contains(says);
        assert_eq!(notes.iter().filter(mine).count(), 1, "{notes:?}");
    }
}
