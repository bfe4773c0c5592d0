//! What a sender does with receivers that break the protocol.
//!
//! The receiver here has the right certificate. Whatever it says, the sender
//! must neither report success without proof, nor crash, nor wait for ever.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use diskmover::digest::{self, CHUNK};
use diskmover::entry::Entry;
use diskmover::error::Code;
use diskmover::frame::{Header, Kind};
use diskmover::messages::{Receipt, VERSION};
use diskmover::unreadable::Unreadable;
use tempfile::TempDir;

use crate::peer::{Heard, Peer, about, receipt, received_by};
use crate::rig::noise;

const SIZE: u64 = 2 * CHUNK + 9;

/// Accepts HELLO for one volume.
fn welcome(peer: &mut Peer) {
    peer.hear_kind(Kind::Hello);
    peer.send(Header::new(Kind::Welcome, 1), &VERSION.to_le_bytes());
    peer.hear_kind(Kind::Open);
}

/// Says that nothing is there yet.
pub fn opened(peer: &mut Peer) {
    welcome(peer);
    peer.send(Header::new(Kind::Opened, 0), &[]);
}

/// Acknowledges everything until FINISH, and returns the sender's digest.
fn take_all(peer: &mut Peer) -> digest::Hash {
    opened(peer);
    loop {
        match peer.hear() {
            Heard::Frame(header, payload) if header.kind == Kind::Finish => {
                return payload[..32].try_into().unwrap();
            }
            Heard::Frame(header, _) if matches!(header.kind, Kind::Data | Kind::Zero) => {
                peer.send(ack(&header), &[]);
            }
            Heard::Frame(..) => {}
            Heard::End => panic!("the sender hung up"),
        }
    }
}

fn ack(header: &Header) -> Header {
    about(Kind::Ack, header)
}

fn first_chunk(peer: &mut Peer) -> Header {
    opened(peer);
    loop {
        let (header, _) = peer.hear_kind(Kind::Data);
        if header.offset == 0 {
            return header;
        }
    }
}

fn state(peer: &mut Peer, entry: &Entry) {
    welcome(peer);
    let mut payload = Vec::new();
    entry.encode(&mut payload);
    peer.send(Header::new(Kind::State, 0), &payload);
    peer.send(Header::new(Kind::Opened, 0), &[]);
}

/// Volume and offset that an error names.
type Place = (Option<&'static str>, Option<u64>);

const NOWHERE: Place = (None, None);
const DISK: Place = (Some("disk"), None);

struct Fault {
    what: &'static str,
    act: fn(&mut Peer),
    code: Code,
    says: &'static str,
    place: Place,
}

macro_rules! faults {
    ($($what:literal, $act:expr => $code:ident $says:literal, $place:expr;)*) => {
        &[$(Fault {
            what: $what,
            act: $act,
            code: Code::$code,
            says: $says,
            place: $place,
        }),*]
    };
}

const fn at(offset: u64) -> Place {
    (DISK.0, Some(offset))
}

/// What the receiver does, and why | what the sender ends with, what that says, and of
/// which place.
const FAULTS: &[Fault] = faults! {
    "garbage instead of WELCOME",
        |p| p.send_bytes(&noise(1, 64))
        => Protocol "not a diskmover frame", NOWHERE;
    "another version: what follows would be read wrongly",
        |p| {
            p.hear_kind(Kind::Hello);
            p.send(Header::new(Kind::Welcome, 1), &9u16.to_le_bytes());
        }
        => Protocol "speaks another version of diskmover's protocol", NOWHERE;
    "an ACK instead of WELCOME",
        |p| p.send(Header::new(Kind::Ack, 0), &[])
        => Protocol "sent an unexpected Ack frame", NOWHERE;
    "an error that cannot be read",
        |p| p.send(Header::new(Kind::Error, 0), &[1])
        => Protocol "sent an unreadable error", NOWHERE;
    "STATE beyond the end of the volume",
        |p| state(p, &Entry::Closed(1, 1, [1; 32]))
        => Protocol "has what this volume cannot have", DISK;
    "STATE of more segments than can be counted",
        |p| state(p, &Entry::ZeroRun(u32::MAX, u32::MAX))
        => Protocol "has what this volume cannot have", DISK;
    "STATE with chunks beyond the end",
        |p| state(p, &Entry::Partial(0, 1 << 63, vec![(1, [1; 32])]))
        => Protocol "has what this volume cannot have", DISK;
    "STATE with more data in a chunk than a chunk has",
        |p| state(p, &Entry::Partial(0, 1, vec![(u32::MAX, [1; 32])]))
        => Protocol "has what this volume cannot have", DISK;
    "STATE that ends in the middle",
        |p| {
            welcome(p);
            p.send(Header::new(Kind::State, 0), &[0, 1]);
        }
        => Protocol "has what this volume cannot have", DISK;
    "OPENED with more data than the volume has: sums would overflow",
        |p| {
            welcome(p);
            let mut header = Header::new(Kind::Opened, 0);
            header.offset = u64::MAX;
            p.send(header, &[]);
        }
        => Protocol "has more data than there is", DISK;
    "OPENED for another volume",
        |p| {
            welcome(p);
            p.send(Header::new(Kind::Opened, 7), &[]);
        }
        => Protocol "sent an unexpected Opened frame", NOWHERE;
    "OPENED with a receipt of another size: the source has been resized since",
        |p| {
            welcome(p);
            let payload = receipt(SIZE - 1, [1; 32]).encode();
            p.send(Header::new(Kind::Opened, 0), &payload);
        }
        => TargetExists "its source has other content now", DISK;
    "OPENED with a receipt for other content: nothing of ours is there",
        |p| {
            welcome(p);
            let payload = receipt(SIZE, [1; 32]).encode();
            p.send(Header::new(Kind::Opened, 0), &payload);
            p.hears_the_end();
        }
        => TargetExists "its source has other content now", DISK;
    "an ACK for what was never sent",
        |p| {
            opened(p);
            let mut header = Header::new(Kind::Ack, 0);
            header.offset = 77 * CHUNK;
            p.send(header, &[]);
        }
        => Protocol "sent an unexpected Ack frame", at(77 * CHUNK);
    "an ACK for a part of a chunk",
        |p| {
            let mut header = ack(&first_chunk(p));
            header.logical_len -= 1;
            p.send(header, &[]);
        }
        => Protocol "sent an unexpected Ack frame", at(0);
    "the same ACK twice",
        |p| {
            let header = ack(&first_chunk(p));
            p.send(header.clone(), &[]);
            p.send(header, &[]);
        }
        => Protocol "sent an unexpected Ack frame", at(0);
    "an ACK for a volume that there is not",
        |p| {
            let mut header = ack(&first_chunk(p));
            header.volume = 500;
            p.send(header, &[]);
        }
        => Protocol "sent an unexpected Ack frame", NOWHERE;
    "DATA is the sender's to send",
        |p| {
            let (header, payload) = p.data_frame(0, 0, SIZE, &[1; CHUNK as usize]);
            opened(p);
            p.send(header, &payload);
        }
        => Protocol "sent an unexpected Data frame", NOWHERE;
    "a RECEIPT before all is there: a success without proof",
        |p| {
            opened(p);
            p.send(
                Header::new(Kind::Receipt, 0),
                &receipt(SIZE, [1; 32]).encode(),
            );
        }
        => Protocol "has another digest than this copy", DISK;
    "a RECEIPT with another digest",
        |p| {
            take_all(p);
            p.send(
                Header::new(Kind::Receipt, 0),
                &receipt(SIZE, [1; 32]).encode(),
            );
        }
        => Protocol "has another digest than this copy", DISK;
    "a RECEIPT that tells of something unreadable, where nothing was",
        |p| {
            let root = take_all(p);
            let lie = Receipt {
                unreadable: Unreadable::of(vec![5..9], SIZE).unwrap(),
                ..receipt(SIZE, root)
            };
            p.send(Header::new(Kind::Receipt, 0), &lie.encode());
        }
        => Protocol "other ranges than those that could not be read", DISK;
    "OPENED with the receipt of a degraded copy: this one is to be whole",
        |p| {
            welcome(p);
            let old = Receipt {
                unreadable: Unreadable::of(vec![5..9], SIZE).unwrap(),
                ..receipt(SIZE, [1; 32])
            };
            p.send(Header::new(Kind::Opened, 0), &old.encode());
        }
        => TargetExists "DEGRADED: 4 bytes", DISK;
    "a RECEIPT with another size",
        |p| {
            let root = take_all(p);
            p.send(
                Header::new(Kind::Receipt, 0),
                &receipt(SIZE + 1, root).encode(),
            );
        }
        => Protocol "is not for this volume", DISK;
    "a RECEIPT with more data than size",
        |p| {
            let root = take_all(p);
            let lie = Receipt {
                data: u64::MAX,
                ..receipt(SIZE, root)
            };
            p.send(Header::new(Kind::Receipt, 0), &lie.encode());
        }
        => Protocol "is not for this volume", DISK;
    "a RECEIPT for another volume",
        |p| {
            let root = take_all(p);
            let lie = Receipt {
                volume: "other".into(),
                ..receipt(SIZE, root)
            };
            p.send(Header::new(Kind::Receipt, 0), &lie.encode());
        }
        => Protocol "is not for this volume", DISK;
    "silence after the handshake: there is a deadline",
        |p| {
            p.hear_kind(Kind::Hello);
            p.hears_the_end();
        }
        => ConnectFailed "could not be reached within 2 s", NOWHERE;
};

/// A source of noise.
fn source() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, noise(1, SIZE as usize)).unwrap();
    (dir, path)
}

#[test]
fn every_fault_ends_the_copy_with_who_where_and_why() {
    let (_dir, path) = source();
    for fault in FAULTS {
        let what = fault.what;
        let address = Mutex::new(String::new());
        let act = |mut peer: Peer, listener: TcpListener| {
            *address.lock().unwrap() = listener.local_addr().unwrap().to_string();
            (fault.act)(&mut peer);
            peer.hears_the_end();
        };
        let outcome = received_by(act, &path, Duration::from_secs(2));
        let error = outcome.expect_err(what);
        assert_eq!(error.code, fault.code, "{what}: {error}");
        assert!(error.message.contains(fault.says), "{what}: {error}");
        let found = (error.volume.as_deref(), error.offset);
        assert_eq!(found, fault.place, "{what}: {error}");
        // Of what it has placed itself it is told what to do with that.
        if error.code != Code::TargetExists {
            let named = error.message.contains(address.lock().unwrap().as_str());
            assert!(named, "{what}: who? {error}");
        }
    }
}

#[test]
fn an_honest_receiver_in_the_same_words_is_believed() {
    let (_dir, path) = source();
    let honest = |mut peer: Peer, _: TcpListener| {
        let root = take_all(&mut peer);
        let payload = receipt(SIZE, root).encode();
        peer.send(Header::new(Kind::Receipt, 0), &payload);
        peer.hears_the_end();
    };
    let receipts = received_by(honest, &path, Duration::from_secs(2)).unwrap();
    let root = diskmover::local::digest(&path).unwrap().2;
    assert_eq!(receipts, [receipt(SIZE, root)]);
}

#[test]
fn a_receiver_that_takes_and_forgets_is_given_up() {
    let (_dir, path) = source();
    let forgetful = |mut peer: Peer, _: TcpListener| {
        first_chunk(&mut peer);
        peer.hang_up();
    };
    let error = received_by(forgetful, &path, Duration::from_secs(1)).unwrap_err();
    assert_eq!(error.code, Code::LinkLost, "{error}");
    assert!(error.retryable);
}
