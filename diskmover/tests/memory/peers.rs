//! Peers with the right certificates that touch a large volume everywhere.

use std::fs::File;
use std::net::TcpListener;
use std::time::Duration;

use diskmover::digest::{CHUNK, SEGMENT_CHUNKS, ZERO_HASH};
use diskmover::entry::Entry;
use diskmover::error::Code;
use diskmover::frame::{Header, Kind};
use diskmover::messages::VERSION;

use crate::peer::{Heard, Peer, received_by};
use crate::rig::Rig;
use crate::within;

const SIZE: u64 = 8 << 40;
const SEGMENTS: u64 = SIZE / CHUNK / SEGMENT_CHUNKS;

/// Sends a ZERO frame of one chunk for each segment, and hears the answers.
fn touch_all(peer: &mut Peer, index: u64) {
    let segments: Vec<u64> = (0..SEGMENTS).collect();
    for some in segments.chunks(1024) {
        let at = std::cell::Cell::new(0);
        peer.gathered(some.len(), |peer| {
            let chunk = some[at.replace(at.get() + 1)] * SEGMENT_CHUNKS + index;
            peer.zeros(0, chunk..chunk + 1, SIZE);
        });
        some.iter().for_each(|_| drop(peer.hear_kind(Kind::Ack)));
    }
}

#[test]
fn a_sender_of_one_zero_chunk_in_each_segment_costs_the_receiver_little() {
    within(150, || {
        let rig = Rig::new();
        rig.open(&[("disk", SIZE)]).unwrap();
        let mut peer = Peer::sending(&rig, "disk", SIZE);
        touch_all(&mut peer, 7);
        // What is there is told again, and gone on from.
        peer.open(0, "disk", SIZE);
        let (mut told, mut payload_bytes) = (0, 0);
        loop {
            let Heard::Frame(header, payload) = peer.hear() else {
                panic!("the connection ended")
            };
            match header.kind {
                Kind::Opened => break,
                Kind::State => payload_bytes += payload.len(),
                _ => continue,
            }
            let mut rest = payload.as_slice();
            while let Some(entry) = Entry::decode(&mut rest) {
                assert!(matches!(entry, Entry::Partial(_, 128, _)), "{entry:?}");
                told += 1;
            }
        }
        assert_eq!(told, SEGMENTS, "in {payload_bytes} bytes");
        // All zeros at once: as many runs are missing as there are segments.
        peer.zeros(0, 0..SEGMENTS * SEGMENT_CHUNKS, SIZE);
        peer.hear_kind(Kind::Ack);
    });
}

/// A receiver of a sparse volume says what `state` tells of each segment; then `act`
/// goes on. How the copy ends.
fn received(state: fn(u32) -> Entry, act: impl FnOnce(&mut Peer) + Send) -> Code {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    let has_some = |mut peer: Peer, listener: TcpListener| {
        drop(listener); // nobody comes back
        peer.hear_kind(Kind::Hello);
        peer.send(Header::new(Kind::Welcome, 1), &VERSION.to_le_bytes());
        peer.hear_kind(Kind::Open);
        let mut payload = Vec::new();
        for segment in 0..SEGMENTS as u32 {
            state(segment).encode(&mut payload);
            if payload.len() > 1_000_000 || segment + 1 == SEGMENTS as u32 {
                peer.send(Header::new(Kind::State, 0), &payload);
                payload.clear();
            }
        }
        peer.send(Header::new(Kind::Opened, 0), &[]);
        act(&mut peer);
        peer.hang_up();
    };
    let outcome = received_by(has_some, &path, Duration::from_secs(1));
    outcome.expect_err("nothing is there").code
}

#[test]
fn a_receiver_that_has_a_chunk_of_each_segment_costs_the_sender_little() {
    within(150, || {
        let zero = |segment| Entry::Partial(segment, 1, vec![(0, ZERO_HASH)]);
        let code = received(zero, |peer| drop(peer.hear_kind(Kind::Zero)));
        assert_eq!(code, Code::LinkLost);
    });
    within(150, || {
        // More than is taken over: it is sent again.
        let content = |segment| Entry::Partial(segment, 0xFF_FFFF, vec![(9, [7; 32]); 24]);
        let code = received(content, |peer| drop(peer.hear_kind(Kind::Zero)));
        assert_eq!(code, Code::LinkLost);
    });
}

#[test]
fn a_receiver_that_never_answers_is_not_sent_without_end() {
    within(150, || {
        let zero = |segment| Entry::Partial(segment, 1, vec![(0, ZERO_HASH)]);
        let count = |peer: &mut Peer| {
            let (mut frames, mut silences) = (0, 0);
            // It goes on to give signs of life, and says nothing else.
            while silences < 2 {
                let Heard::Frame(header, _) = peer.hear() else {
                    panic!("the sender hung up")
                };
                match header.kind {
                    Kind::Ping => silences += 1,
                    _ => (frames, silences) = (frames + 1, 0),
                }
            }
            assert_eq!(frames, 8192);
        };
        assert_eq!(received(zero, count), Code::LinkLost);
    });
}
