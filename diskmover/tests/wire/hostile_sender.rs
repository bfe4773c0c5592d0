//! What a receiver does with senders that break the protocol.
//!
//! A table of faults in the style of libnbd's copy tests. Every sender here has
//! good certificates and the right key: that it may talk does not mean that it
//! may be believed. After each fault the same things must hold: the session has
//! failed with an error that names the peer, the place and the reason; nothing
//! is published; nothing but the part was written, and that within its size;
//! and the receiver serves the next sender.

use diskmover::digest::{BLOCK, CHUNK, MAX_SIZE};
use diskmover::error::{self, Code, MoverError};
use diskmover::frame::{CODEC_ZSTD, HEADER, Header, Kind, MAX_DATA_PAYLOAD};
use diskmover::messages::{Hello, encode_error};
use diskmover::offer::Offer;
use diskmover::session::Phase;

use crate::alone::alone;
use crate::costly_sender::memory_peak;
use crate::peer::{Heard, Peer, zstd};
use crate::rig::{Rig, SESSION, noise, run};

/// Three chunks and a short one.
pub const SIZE: u64 = 3 * CHUNK + 100;

pub struct Fault {
    pub what: &'static str,
    pub act: fn(&mut Peer),
    pub code: Code,
    pub says: &'static str,
    pub offset: Option<u64>,
}

macro_rules! offset {
    () => {
        None
    };
    ($offset:expr) => {
        Some($offset)
    };
}

macro_rules! faults {
    ($($what:literal, $act:expr => $code:ident $says:literal $(at $offset:expr)?;)*) => {
        &[$(Fault {
            what: $what,
            act: $act,
            code: Code::$code,
            says: $says,
            offset: offset!($($offset)?),
        }),*]
    };
}

/// A data frame for chunk 1 whose zstd payload is `body`, signed for `content`.
fn packed(peer: &Peer, content: &[u8], body: &[u8]) -> (Header, Vec<u8>) {
    let (mut header, payload) = peer.data_frame(0, 1, SIZE, content);
    header.codec = CODEC_ZSTD;
    let payload = [&payload[..32], body].concat();
    header.payload_len = payload.len() as u32;
    let hash = diskmover::digest::chunk_hash(&payload[..32].try_into().unwrap(), content);
    header.sign(&peer.keys.frame, &hash);
    (header, payload)
}

/// The bytes of a header with one of them changed and the checksum right.
fn forged(at: usize, value: u8) -> [u8; HEADER] {
    let mut bytes = Header::new(Kind::Ping, 0).encode();
    bytes[at] = value;
    let sum = crc32c::crc32c(&bytes[..60]);
    bytes[60..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Sends the frame of an honest chunk 0 after `spoil` has changed its header.
fn spoiled(peer: &mut Peer, spoil: impl FnOnce(&mut Header)) {
    let (mut header, payload) = peer.data_frame(0, 0, SIZE, &[1; CHUNK as usize]);
    spoil(&mut header);
    peer.send(header, &payload);
}

/// Sends the frame of an honest chunk after `spoil` has changed its payload.
fn filled(peer: &mut Peer, chunk: u64, spoil: impl FnOnce(&mut Vec<u8>)) {
    let len = if chunk == 3 { 100 } else { CHUNK as usize };
    let mut content = vec![0; len];
    content[0] = 1;
    let (mut header, mut payload) = peer.data_frame(0, chunk, SIZE, &content);
    spoil(&mut payload);
    header.payload_len = payload.len() as u32;
    peer.send(header, &payload);
}

pub const FAULTS: &[Fault] = faults! {
    // --- what is no frame
    "garbage: it cannot be told where the next frame begins",
        |p| p.send_bytes(&noise(1, HEADER))
        => Protocol "not a diskmover frame";
    "a flipped bit in a header: it must not be acted on",
        |p| {
            let mut bytes = Header::new(Kind::Ping, 0).encode();
            bytes[20] ^= 1;
            p.send_bytes(&bytes);
        }
        => Protocol "checksum";
    "a frame type of a later version: skipping it could lose content",
        |p| p.send_bytes(&forged(2, 99)) => Protocol "unknown frame type 99";
    "an unknown codec: it cannot be unpacked",
        |p| spoiled(p, |h| h.codec = 2) => Protocol "codec 2";
    "reserved bytes: a later version may give them a meaning that we would miss",
        |p| p.send_bytes(&forged(6, 1)) => Protocol "reserved";
    "a payload of 4 GiB: memory is not the peer's to spend",
        |p| spoiled(p, |h| h.payload_len = u32::MAX) => Protocol "longer than its type allows";
    "a payload one byte longer than a chunk",
        |p| spoiled(p, |h| h.payload_len = MAX_DATA_PAYLOAD + 1)
        => Protocol "longer than its type allows";

    // --- frames at the wrong time
    "a second HELLO: the session has begun",
        |p| p.hello(|_| {}) => Protocol "out of phase";
    "WELCOME is the receiver's to send",
        |p| p.send(Header::new(Kind::Welcome, 0), &[1, 0]) => Protocol "out of phase";
    "STATE is the receiver's to send",
        |p| p.send(Header::new(Kind::State, 0), &[]) => Protocol "out of phase";
    "ACK is the receiver's to send",
        |p| p.send(Header::new(Kind::Ack, 0), &[]) => Protocol "out of phase";
    "RECEIPT is the receiver's to send",
        |p| p.send(Header::new(Kind::Receipt, 0), &[]) => Protocol "out of phase";
    "FINISH while chunks are missing: a partial disk must not be published",
        |p| p.finish(0, SIZE, &[1; 32]) => Protocol "chunks are missing";
    "FINISH without a digest",
        |p| p.send(Header::new(Kind::Finish, 0), &[1; 7]) => Protocol "FINISH";
    "FINISH that tells of what could not be read beyond the end",
        |p| {
            let range = [&(3 * CHUNK).to_le_bytes()[..], &101u64.to_le_bytes()].concat();
            let payload = [&[1; 40][..], &range].concat();
            let mut header = Header::new(Kind::Finish, 0);
            header.sign(&p.keys.frame, &[1; 32]);
            p.send(header, &payload);
        }
        => Protocol "FINISH that cannot be read";
    "FINISH signed with another key",
        |p| {
            p.keys = diskmover::messages::Keys::derive(&[9; 32]);
            p.finish(0, SIZE, &[1; 32]);
        }
        => Protocol "authenticator";
    "OPEN that cannot be read",
        |p| p.send(Header::new(Kind::Open, 0), &[1, 2, 3]) => Protocol "volume 0";
    "OPEN of another volume: ids must agree, or disks could be swapped",
        |p| p.open(0, "other", SIZE) => Protocol "is not \"disk\"";
    "OPEN with another size than the control plane announced",
        |p| p.open(0, "disk", SIZE + 1) => SourceInvalid "not 3145828";
    "OPEN with 2^63 bytes",
        |p| p.open(0, "disk", 1 << 63) => SourceInvalid "9223372036854775808";

    // --- content in the wrong place
    "a volume that the session does not have",
        |p| spoiled(p, |h| h.volume = 1) => Protocol "a volume that the session does not have";
    "an offset off the grid: chunks would overlap",
        |p| spoiled(p, |h| h.offset = 1) => Protocol "does not fit" at 1;
    "an offset beyond the end: not a byte may land there",
        |p| spoiled(p, |h| h.offset = 4 * CHUNK) => Protocol "does not fit" at 4 * CHUNK;
    "an offset that wraps around",
        |p| spoiled(p, |h| h.offset = !(CHUNK - 1)) => Protocol "does not fit" at !(CHUNK - 1);
    "a whole chunk where the volume ends after 100 bytes",
        |p| spoiled(p, |h| h.offset = 3 * CHUNK) => Protocol "does not fit" at 3 * CHUNK;
    "a length of two chunks",
        |p| spoiled(p, |h| h.logical_len = 2 * CHUNK) => Protocol "does not fit" at 0;
    "a length of nothing",
        |p| spoiled(p, |h| h.logical_len = 0) => Protocol "does not fit" at 0;
    "zeros beyond the end: the file must not grow",
        |p| {
            let mut header = Header::new(Kind::Zero, 0);
            (header.offset, header.logical_len) = (CHUNK, 3 * CHUNK);
            header.sign(&p.keys.frame, &[0; 32]);
            p.send(header, &[]);
        }
        => Protocol "does not fit" at CHUNK;
    "a chunk moved elsewhere: the authenticator is bound to the place",
        |p| spoiled(p, |h| h.offset = CHUNK) => ChunkCorrupt "authenticator" at CHUNK;

    // --- content that is not what it says
    "a flipped bit in the data",
        |p| filled(p, 1, |payload| payload[40] ^= 1) => ChunkCorrupt "authenticator" at CHUNK;
    "a flipped bit in the bitmap: blocks would land elsewhere",
        |p| filled(p, 1, |payload| payload[0] = 2) => ChunkCorrupt "authenticator" at CHUNK;
    "a bitmap that marks nothing",
        |p| filled(p, 1, |payload| payload[0] = 0) => ChunkCorrupt "bitmap" at CHUNK;
    "a bitmap that marks blocks beyond the end",
        |p| filled(p, 3, |payload| payload[31] = 0x80) => ChunkCorrupt "bitmap" at 3 * CHUNK;
    "less data than the bitmap says",
        |p| filled(p, 1, |payload| payload.truncate(1000)) => ChunkCorrupt "bitmap" at CHUNK;
    "more data than the bitmap says",
        |p| filled(p, 1, |payload| payload.push(0)) => ChunkCorrupt "bitmap" at CHUNK;
    "no bitmap at all",
        |p| filled(p, 1, |payload| payload.truncate(31)) => Protocol "bitmap";
    "a zero block sent as data: one content would have two digests",
        |p| {
            let (mut header, mut payload) = p.data_frame(0, 1, SIZE, &[1; 2 * BLOCK]);
            payload[32..32 + BLOCK].fill(0);
            header.logical_len = CHUNK;
            let bitmap = payload[..32].try_into().unwrap();
            let hash = diskmover::digest::chunk_hash(&bitmap, &payload[32..]);
            header.sign(&p.keys.frame, &hash);
            p.send(header, &payload);
        }
        => ChunkCorrupt "all zero" at CHUNK;
    "zeros that are not signed",
        |p| {
            let mut header = Header::new(Kind::Zero, 0);
            header.logical_len = CHUNK;
            p.send(header, &[]);
        }
        => ChunkCorrupt "authenticator" at 0;
    "a chunk sent twice with different content",
        |p| {
            p.data(0, 0, SIZE, &[1; CHUNK as usize]);
            p.hear_kind(Kind::Ack);
            p.data(0, 0, SIZE, &[2; CHUNK as usize]);
        }
        => SourceChanged "twice" at 0;
    "zeros over a chunk that has content",
        |p| {
            p.data(0, 0, SIZE, &[1; CHUNK as usize]);
            p.hear_kind(Kind::Ack);
            p.zeros(0, 0..1, SIZE);
        }
        => SourceChanged "twice" at 0;
    "a digest that the chunks do not have",
        |p| {
            p.zeros(0, 0..4, SIZE);
            p.hear_kind(Kind::Ack);
            p.finish(0, SIZE, &[1; 32]);
        }
        => DigestMismatch "nothing was published";

    // --- zstd
    "a zstd bomb: 64 MiB in a few kB",
        |p| {
            let (header, payload) = packed(p, &[1; CHUNK as usize], &zstd(&vec![1; 64 << 20]));
            p.send(header, &payload);
        }
        => ChunkCorrupt "does not hold exactly" at CHUNK;
    "a zstd frame that says the right size and holds more",
        |p| {
            let mut body = zstd(&vec![1; 2 << 20]);
            // Descriptor, window, then the content size in 4 bytes.
            assert_eq!(body[4], 0x80);
            body[6..10].copy_from_slice(&(CHUNK as u32).to_le_bytes());
            let (header, payload) = packed(p, &[1; CHUNK as usize], &body);
            p.send(header, &payload);
        }
        => ChunkCorrupt "damaged" at CHUNK;
    "two zstd frames, together as long as they should be",
        |p| {
            let half = zstd(&[1; CHUNK as usize / 2]);
            let (header, payload) = packed(p, &[1; CHUNK as usize], &[&half[..], &half].concat());
            p.send(header, &payload);
        }
        => ChunkCorrupt "exactly" at CHUNK;
    "garbage behind a zstd frame",
        |p| {
            let body = [&zstd(&[1; CHUNK as usize])[..], b"x"].concat();
            let (header, payload) = packed(p, &[1; CHUNK as usize], &body);
            p.send(header, &payload);
        }
        => ChunkCorrupt "exactly one plain zstd frame" at CHUNK;
    "a skippable frame before the zstd frame",
        |p| {
            let skipped = [0x50, 0x2A, 0x4D, 0x18, 1, 0, 0, 0, 9];
            let body = [&skipped[..], &zstd(&[1; CHUNK as usize])].concat();
            let (header, payload) = packed(p, &[1; CHUNK as usize], &body);
            p.send(header, &payload);
        }
        => ChunkCorrupt "compressed data" at CHUNK;
    "a zstd frame that needs a dictionary, which nobody has",
        |p| {
            let mut body = zstd(&[1; CHUNK as usize]);
            body[4] |= 1; // a byte of its number follows
            body.insert(5, 7);
            let (header, payload) = packed(p, &[1; CHUNK as usize], &body);
            p.send(header, &payload);
        }
        => ChunkCorrupt "exactly one plain zstd frame" at CHUNK;
    "zstd that makes the chunk longer: it has no reason to",
        |p| {
            let (header, payload) = packed(p, &[1; CHUNK as usize], &noise(1, CHUNK as usize));
            p.send(header, &payload);
        }
        => ChunkCorrupt "bitmap" at CHUNK;

    // --- errors of the peer
    "an error with terminal escapes in it",
        |p| {
            let payload = encode_error(&MoverError::new(Code::SourceIo, "bad\x1b[2J\n").at(5));
            p.send(Header::new(Kind::Error, 0), &payload);
        }
        => SourceIo "bad?[2J?" at 5;
    "an error that cannot be read",
        |p| p.send(Header::new(Kind::Error, 0), &[0; 3]) => Protocol "unreadable error";
};

#[test]
fn every_fault_ends_the_session_and_nothing_else() {
    alone(
        "hostile_sender::every_fault_ends_the_session_and_nothing_else",
        || {
            let rig = Rig::new();
            let victim = rig.root().join("victim");
            std::fs::write(&victim, b"precious").unwrap();
            for fault in FAULTS {
                rig.open(&[("disk", SIZE)]).unwrap();
                let mut peer = Peer::sending(&rig, "disk", SIZE);
                (fault.act)(&mut peer);
                let what = fault.what;
                let error = rig.failure(SESSION);
                assert_eq!(error.code, fault.code, "{what}: {error}");
                assert!(error.message.contains(fault.says), "{what}: {error}");
                assert_eq!(error.offset, fault.offset, "{what}: {error}");
                if matches!(error.code, Code::Protocol | Code::ChunkCorrupt) {
                    let named = error.message.contains(&peer.address());
                    assert!(named, "{what}: who? {error}");
                }
                let told = peer.hear_error().expect(what);
                assert_eq!(told, error, "{what}: the peer heard something else");
                assert!(peer.hears_the_end(), "{what}");
                drop(peer);
                rig.receiver.close_session(SESSION);
                let mine = |name: &String| name == "victim" || name.starts_with(".disk.dm-t1.");
                assert!(
                    rig.arrived().iter().all(mine),
                    "{what}: {:?}",
                    rig.arrived()
                );
                assert_eq!(std::fs::read(&victim).unwrap(), b"precious", "{what}");
                let part = rig.root().join(".disk.dm-t1.part");
                assert_eq!(std::fs::metadata(&part).unwrap().len(), SIZE, "{what}");
                diskmover::publish::discard(&rig.root(), "disk", "t1").unwrap();
            }
            // And the receiver still does its work.
            let source = rig.source("disk", SIZE, &[(5, b"content")]);
            rig.open_as("good", "t1", &[("disk", SIZE)]).unwrap();
            let mut job = rig.job(&[&source]);
            job.session = "good".into();
            run(job).unwrap();
            assert!(memory_peak() < 150 << 20, "{} bytes", memory_peak());
        },
    );
}

#[test]
fn what_is_refused_leaves_no_byte_in_the_part() {
    let rig = Rig::new();
    rig.open(&[("disk", SIZE)]).unwrap();
    let mut peer = Peer::sending(&rig, "disk", SIZE);
    filled(&mut peer, 1, |payload| payload[40] ^= 1);
    rig.failure(SESSION);
    rig.receiver.close_session(SESSION);
    let part = std::fs::read(rig.root().join(".disk.dm-t1.part")).unwrap();
    assert!(part.iter().all(|byte| *byte == 0));
}

#[test]
fn a_conflict_makes_the_part_worthless() {
    // Resumed, so that zeros punch holes: what the journal says would be wrong.
    let rig = Rig::new();
    rig.open(&[("disk", SIZE)]).unwrap();
    let mut peer = Peer::sending(&rig, "disk", SIZE);
    peer.data(0, 0, SIZE, &[1; CHUNK as usize]);
    peer.hear_kind(Kind::Ack);
    peer.hang_up();
    rig.open_as("s1", "t1", &[("disk", SIZE)]).unwrap();
    let again = |rig: &Rig| {
        let mut peer = Peer::dial(rig, &rig.pki.host("a"));
        peer.hello(|_| {});
        peer.open(0, "disk", SIZE);
        peer
    };
    let mut peer = again(&rig);
    peer.hear_kind(Kind::State);
    peer.hear_kind(Kind::Opened);
    peer.zeros(0, 0..4, SIZE);
    assert_eq!(rig.failure(SESSION).code, Code::SourceChanged);
    rig.receiver.close_session(SESSION);
    let part = std::fs::read(rig.root().join(".disk.dm-t1.part")).unwrap();
    assert!(
        part[..CHUNK as usize] == [1; CHUNK as usize],
        "a durable chunk was punched"
    );
    rig.open_as("s1", "t1", &[("disk", SIZE)]).unwrap();
    let mut peer = again(&rig);
    loop {
        match peer.hear() {
            Heard::Frame(header, _) if header.kind == Kind::Opened => break,
            Heard::Frame(header, _) => assert_ne!(header.kind, Kind::State, "it is still trusted"),
            Heard::End => panic!("refused"),
        }
    }
}

#[test]
fn some_volumes_of_a_session_are_not_published_alone() {
    let rig = Rig::new();
    rig.open(&[("one", CHUNK), ("two", CHUNK)]).unwrap();
    let mut peer = Peer::sending(&rig, "one", CHUNK);
    peer.zeros(0, 0..1, CHUNK);
    peer.hear_kind(Kind::Ack);
    let root = diskmover::digest::root(CHUNK, [[0; 32]].iter());
    peer.finish(0, CHUNK, &root);
    peer.open(1, "two", CHUNK);
    peer.hear_kind(Kind::Opened); // FINISH was worked off before
    assert!(
        !rig.root().join("one").exists(),
        "published without its twin"
    );
    peer.zeros(1, 0..1, CHUNK);
    peer.hear_kind(Kind::Ack);
    peer.finish(1, CHUNK, &root);
    peer.hear_kind(Kind::Receipt);
    assert!(rig.root().join("one").exists() && rig.root().join("two").exists());
}

#[test]
fn content_before_open_is_refused() {
    let rig = Rig::new();
    let acts: &[fn(&mut Peer)] = &[
        |p| p.zeros(0, 0..1, SIZE),
        |p| p.data(0, 0, SIZE, &[1; CHUNK as usize]),
        |p| p.finish(0, SIZE, &[1; 32]),
    ];
    for act in acts {
        rig.open(&[("disk", SIZE)]).unwrap();
        let mut peer = Peer::dial(&rig, &rig.pki.host("a"));
        peer.hello(|_| {});
        act(&mut peer);
        assert_eq!(rig.failure(SESSION).code, Code::Protocol);
        assert_eq!(rig.arrived(), [""; 0]);
    }
}

#[test]
fn late_duplicates_of_a_published_volume_do_no_harm() {
    let rig = Rig::new();
    rig.open(&[("disk", SIZE)]).unwrap();
    let mut peer = Peer::sending(&rig, "disk", SIZE);
    peer.publish_zeros(0..4, SIZE);
    for _ in 0..100 {
        peer.data(0, 0, SIZE, &[1; CHUNK as usize]);
    }
    assert!(peer.hears_the_end(), "it waits for ever");
    assert_eq!(rig.receiver.status(SESSION).unwrap().0, Phase::Done);
    let file = std::fs::read(rig.root().join("disk")).unwrap();
    assert!(
        file.iter().all(|byte| *byte == 0),
        "written after it was published"
    );
}

#[test]
fn a_hello_that_makes_no_sense_is_refused_before_any_session_hears_of_it() {
    let rig = Rig::new();
    rig.open(&[("disk", SIZE)]).unwrap();
    type Change = fn(&mut Hello);
    let table: &[(&str, Change, Code)] = &[
        ("version", |h| h.version = 2, Code::Protocol),
        ("chunk", |h| h.chunk = 0, Code::Protocol),
        (
            "session",
            |h| h.session = "x".repeat(255),
            Code::SessionUnknown,
        ),
        ("empty", |h| h.session.clear(), Code::SessionUnknown),
        ("proof", |h| h.proof = [0; 32], Code::SessionKeyWrong),
    ];
    for (what, change, code) in table {
        let mut peer = Peer::dial(&rig, &rig.pki.host("a"));
        peer.hello(*change);
        assert_eq!(peer.hear_error().expect(what).code, *code, "{what}");
    }
    let acts: &[fn(&mut Peer)] = &[
        |p| p.send_bytes(&noise(3, 200)),
        |p| p.send(Header::new(Kind::Hello, 0), b"short"),
        |p| p.open(0, "disk", SIZE),
        |p| p.send(Header::new(Kind::Ping, 0), &[]),
        |p| p.send(Header::new(Kind::State, 0), &vec![0; 1 << 20]),
    ];
    for act in acts {
        let mut peer = Peer::dial(&rig, &rig.pki.host("a"));
        act(&mut peer);
        assert_eq!(peer.hear_error().unwrap().code, Code::Protocol);
    }
    assert_eq!(rig.receiver.status(SESSION).unwrap().0, Phase::Waiting);
}

#[test]
fn without_sessions_names_and_sizes_are_checked() {
    let rig = Rig::new();
    rig.receiver.serve_names(Offer::files(rig.root())).unwrap();
    let attempt = |session: &str, size: u64| -> error::Result<()> {
        let mut peer = Peer::dial(&rig, &rig.pki.host("a"));
        let name = session.strip_prefix("open/").unwrap_or_default().to_owned();
        peer.hello(|hello| hello.session = session.to_owned());
        if let Heard::Frame(header, payload) = peer.hear() {
            if header.kind == Kind::Error {
                return Err(diskmover::messages::decode_error(&payload).unwrap());
            }
            peer.open(0, &name, size);
            return peer.hear_error().map_or(Ok(()), Err);
        }
        panic!("no answer")
    };
    for name in [
        "",
        ".",
        "..",
        "../x",
        "/etc/x",
        "a/b",
        ".hidden",
        "a\0b",
        &"x".repeat(161),
    ] {
        let error = attempt(&format!("open/{name}"), 1).expect_err(name);
        assert_eq!(error.code, Code::InvalidArgument, "{name:?}");
    }
    for size in [1 << 63, u64::MAX, MAX_SIZE + 1] {
        let error = attempt("open/disk", size).unwrap_err();
        assert_eq!(error.code, Code::SourceInvalid, "{size}");
        assert!(error.message.contains("64 TiB"), "{error}");
    }
    assert_eq!(rig.arrived(), [""; 0]);
}

#[test]
fn a_stranger_cannot_reach_the_frames() {
    let rig = Rig::new();
    rig.open(&[("disk", SIZE)]).unwrap();
    let mut peer = Peer::dial(&rig, &rig.foreign.trusting("a", &rig.pki));
    peer.hello(|_| {});
    assert!(peer.hears_the_end());
    assert_eq!(rig.receiver.status(SESSION).unwrap().0, Phase::Waiting);
}
