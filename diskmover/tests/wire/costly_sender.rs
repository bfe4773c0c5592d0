//! Senders that ask for too much: time, connections, memory.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use diskmover::digest::CHUNK;
use diskmover::error::Code;
use diskmover::frame::{Header, Kind};
use diskmover::listener::Limits;
use diskmover::session::Phase;

use crate::alone::alone;
use crate::hostile_sender::SIZE;
use crate::peer::{Heard, Peer};
use crate::rig::{PATIENCE, Rig, SESSION, eventually, limits};

/// A connection that has said nothing yet.
fn dial(rig: &Rig) -> TcpStream {
    let socket = TcpStream::connect(rig.receiver.address()).unwrap();
    socket.set_read_timeout(Some(PATIENCE * 2)).unwrap();
    socket
}

/// Hears the end of it.
fn ended(socket: &mut TcpStream) {
    let mut sink = [0; 100];
    while matches!(socket.read(&mut sink), Ok(count) if count > 0) {}
}

#[test]
fn handshakes_have_a_deadline() {
    let rig = Rig::with(Limits {
        // Longer than a busy machine takes to shake hands.
        hello: Duration::from_secs(2),
        ..limits()
    });
    // Silent, trickling, and silent after the handshake.
    let mut silent = dial(&rig);
    let mut slow = dial(&rig);
    std::thread::scope(|scope| {
        let mut writer = slow.try_clone().unwrap();
        scope.spawn(move || {
            let began = Instant::now();
            while began.elapsed() < PATIENCE && writer.write_all(&[0x16]).is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
            assert!(began.elapsed() < PATIENCE, "it may trickle for ever");
        });
        ended(&mut slow);
        ended(&mut silent);
    });
    let mut mute = Peer::dial(&rig, &rig.pki.host("a"));
    assert!(mute.hears_the_end());
}

#[test]
fn connections_have_a_number() {
    let rig = Rig::with(Limits {
        connections: 4,
        ..limits()
    });
    let four: Vec<_> = (0..4).map(|_| dial(&rig)).collect();
    ended(&mut dial(&rig));
    // It was turned away: the deadline of the others, which came before, is not over.
    for socket in four {
        socket.set_nonblocking(true).unwrap();
        let heard = (&socket).read(&mut [0]).unwrap_err();
        assert_eq!(heard.kind(), ErrorKind::WouldBlock);
    }
}

#[test]
fn a_session_has_64_connections_and_no_more() {
    let rig = Rig::new();
    rig.open(&[("disk", SIZE)]).unwrap();
    let credentials = rig.pki.host("a");
    let dial = || {
        let mut peer = Peer::dial(&rig, &credentials);
        peer.hello(|_| {});
        peer
    };
    let mut all: Vec<Peer> = (0..64).map(|_| dial()).collect();
    for peer in &mut all {
        peer.hear_kind(Kind::Welcome);
    }
    let told = dial().hear_error().expect("it was let in");
    assert_eq!((told.code, told.retryable), (Code::LimitExceeded, true));
    assert!(told.message.contains("64 connections"), "{told}");
    // It costs the others nothing, and there is room again when one has gone.
    assert_eq!(rig.receiver.status(SESSION).unwrap().0, Phase::Receiving);
    all.pop().unwrap().hang_up();
    eventually("another one is let in", || {
        let mut peer = dial();
        matches!(peer.hear(), Heard::Frame(h, _) if h.kind == Kind::Welcome).then_some(())
    });
    let mut first = all.swap_remove(0);
    first.open(0, "disk", SIZE);
    first.hear_kind(Kind::Opened);
}

#[test]
fn a_silent_sender_is_let_go() {
    let rig = Rig::with(Limits {
        // Longer than a busy machine makes the peer wait before it begins.
        idle: Duration::from_secs(3),
        ..limits()
    });
    rig.open(&[("disk", SIZE)]).unwrap();
    let mut half_open = Peer::sending(&rig, "disk", SIZE);
    let mut in_a_frame = Peer::dial(&rig, &rig.pki.host("a"));
    in_a_frame.hello(|_| {});
    let (header, payload) = in_a_frame.data_frame(0, 0, SIZE, &[1; CHUNK as usize]);
    in_a_frame.send_bytes(&header.encode());
    in_a_frame.send_bytes(&payload[..1000]);
    assert!(half_open.hears_the_end() && in_a_frame.hears_the_end());
    eventually("both are gone", || {
        (rig.receiver.status(SESSION).unwrap().1.connections == 0).then_some(())
    });
    assert_eq!(rig.receiver.status(SESSION).unwrap().0, Phase::Receiving);
}

#[test]
fn floods_from_a_sender_that_never_listens_end_and_cost_little() {
    alone(
        "costly_sender::floods_from_a_sender_that_never_listens_end_and_cost_little",
        || {
            let rig = Rig::with(Limits {
                // Longer than a busy machine makes the peer wait before it begins.
                idle: Duration::from_secs(3),
                ..limits()
            });
            type Flood = fn(&mut Peer);
            let floods: &[(&str, Flood)] = &[
                ("PING", |p| p.send(Header::new(Kind::Ping, 0), &[])),
                ("ZERO", |p| p.zeros(0, 0..4, SIZE)),
                ("OPEN", |p| p.open(0, "disk", SIZE)),
            ];
            for (what, flood) in floods {
                rig.open(&[("disk", SIZE)]).unwrap();
                let mut peer = Peer::sending(&rig, "disk", SIZE);
                // The peer's own kernel may never hear of the end: its buffers are full.
                peer.set_write_timeout(Duration::from_secs(2));
                let began = Instant::now();
                while !peer.is_broken() {
                    // Many frames in one record: it is not our own work that is tested.
                    peer.gathered(200, flood);
                    assert!(began.elapsed() < PATIENCE, "{what} goes on for ever");
                }
                eventually(&format!("{what}: the connection is let go of"), || {
                    let (_, progress, _) = rig.receiver.status(SESSION).unwrap();
                    (progress.connections == 0).then_some(())
                });
                rig.receiver.close_session(SESSION);
                diskmover::publish::discard(&rig.root(), "disk", "t1").unwrap();
            }
            assert!(memory_peak() < 150 << 20, "{} bytes", memory_peak());
        },
    );
}

/// Most memory that this process ever had, in bytes.
pub fn memory_peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}
