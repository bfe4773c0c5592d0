//! Ends that vanish: from some moment on they swallow all that they are sent, and say
//! nothing. A copy is cancelled all the same, and a session closed, and nothing is left.
//!
//! How long that may take at most is the sum of a few constants (src/push/shared.rs,
//! src/session.rs), which is checked where they are. Here it has to end at all.

use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use diskmover::digest::CHUNK;
use diskmover::frame::{Header, Kind};
use diskmover::listener::Limits;
use diskmover::messages::VERSION;
use diskmover::push::{Job, Push};
use diskmover::tls::TlsFiles;
use rustix::net::sockopt::set_socket_recv_buffer_size;

use crate::alone::alone;
use crate::peer::{Heard, Peer, listener};
use crate::pki::Pki;
use crate::rig::{PATIENCE, Rig, SESSION, eventually, job_to, limits, noise};

/// More than fits into the buffers of all connections.
const SIZE: u64 = 48 * CHUNK;
const CONNECTIONS: usize = 4;
/// What two seconds become on a machine that has no time.
const AT_ALL: Duration = Duration::from_secs(10);

/// The last thing that a receiver does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Last {
    /// Its kernel answers, and it never does.
    Connected,
    /// It has let nobody in.
    Greeted,
    /// It has opened nothing.
    LetIn,
    /// It reads nothing any more.
    Opened,
}

/// Threads and sockets of this process.
fn held() -> (usize, usize) {
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    let targets = links.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    let sockets = targets.filter(|target| target.to_string_lossy().starts_with("socket:"));
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    (threads.count(), sockets.count())
}

fn job(dir: &tempfile::TempDir, address: &str, pki: &Pki) -> Job {
    let path = dir.path().join("disk");
    std::fs::write(&path, noise(1, SIZE as usize)).unwrap();
    let mut job = job_to(address, pki);
    job.volumes = vec![("disk".into(), path.into(), None)];
    job.connections = CONNECTIONS;
    job.reconnect = Duration::from_secs(600);
    job
}

/// Cancels, and looks whether all that it had is gone.
fn cancel(push: Push, what: &str, before: (usize, usize)) {
    let began = Instant::now();
    push.cancel();
    assert!(began.elapsed() < AT_ALL, "{what}: {:?}", began.elapsed());
    eventually(&format!("{what}: no thread and no socket is left"), || {
        (held() == before).then_some(())
    });
}

/// One connection of a receiver, up to `last`.
fn answer(
    listener: &TcpListener,
    credentials: &TlsFiles,
    last: Last,
    reached: &AtomicUsize,
) -> Option<Peer> {
    if last == Last::Connected {
        reached.fetch_add(1, Ordering::Relaxed);
        return None;
    }
    let mut peer = Peer::accept(listener, credentials);
    peer.hear_kind(Kind::Hello);
    if last != Last::Greeted {
        peer.send(Header::new(Kind::Welcome, 1), &VERSION.to_le_bytes());
    }
    reached.fetch_add(1, Ordering::Relaxed);
    if last == Last::Opened
        && let Heard::Frame(header, _) = peer.hear()
        && header.kind == Kind::Open
    {
        peer.send(Header::new(Kind::Opened, 0), &[]);
    }
    Some(peer)
}

#[test]
fn a_copy_to_a_receiver_that_vanishes_is_cancelled() {
    alone(
        "black_holes::a_copy_to_a_receiver_that_vanishes_is_cancelled",
        || {
            let (pki, dir) = (Pki::new(), tempfile::tempdir().unwrap());
            let credentials = pki.host("b");
            for last in [Last::Connected, Last::Greeted, Last::LetIn, Last::Opened] {
                let (listener, address) = listener();
                set_socket_recv_buffer_size(&listener, 64 << 10).unwrap();
                let job = job(&dir, &address, &pki);
                let before = held();
                let reached = AtomicUsize::new(0);
                let (push, peers) = std::thread::scope(|scope| {
                    let answer = || answer(&listener, &credentials, last, &reached);
                    let peers: Vec<_> = (0..CONNECTIONS).map(|_| scope.spawn(answer)).collect();
                    let push = Push::start(job).unwrap();
                    eventually("all connections are as far", || {
                        (reached.load(Ordering::Relaxed) == CONNECTIONS).then_some(())
                    });
                    let peers: Vec<_> = peers.into_iter().map(|peer| peer.join()).collect();
                    (push, peers)
                });
                let mut sent = (0, 0);
                eventually("nothing moves any more", || {
                    std::thread::sleep(Duration::from_millis(20));
                    let wire = push.progress().wire;
                    let still = if wire == sent.0 { sent.1 + 1 } else { 0 };
                    sent = (wire, still);
                    (still > 25).then_some(())
                });
                assert_eq!(sent.0 > 0, last == Last::Opened, "{last:?}");
                let own = peers.iter().flatten().flatten().count();
                cancel(push, &format!("{last:?}"), (before.0, before.1 + own));
            }
        },
    );
}

#[test]
fn a_copy_to_an_address_that_swallows_everything_is_cancelled() {
    alone(
        "black_holes::a_copy_to_an_address_that_swallows_everything_is_cancelled",
        || {
            let (pki, dir) = (Pki::new(), tempfile::tempdir().unwrap());
            let (hole, address) = listener();
            rustix::net::listen(&hole, 0).unwrap();
            // When those have come that it has room for, its kernel drops the others.
            let soon = Duration::from_millis(900);
            let dial = || TcpStream::connect_timeout(&hole.local_addr().unwrap(), soon).ok();
            let _inside: Vec<_> = std::iter::from_fn(dial).collect();
            let before = held();
            let push = Push::start(job(&dir, &address, &pki)).unwrap();
            eventually("all connections are tried", || {
                (held().1 == before.1 + CONNECTIONS).then_some(())
            });
            cancel(push, "no answer", before);
        },
    );
}

#[test]
fn a_session_whose_sender_vanishes_is_closed() {
    alone(
        "black_holes::a_session_whose_sender_vanishes_is_closed",
        || {
            let rig = Rig::with(Limits {
                idle: PATIENCE * 2,
                ..limits()
            });
            rig.open(&[("disk", SIZE)]).unwrap();
            let before = held();
            let mut peers = vec![Peer::sending(&rig, "disk", SIZE)];
            for _ in 1..CONNECTIONS {
                let mut peer = Peer::dial(&rig, &rig.pki.host("a"));
                peer.hello(|_| {});
                peer.hear_kind(Kind::Welcome);
                peers.push(peer);
            }
            // It asks until the answers that it does not read are stuck.
            std::thread::scope(|scope| {
                for peer in &mut peers {
                    scope.spawn(|| {
                        peer.set_write_timeout(Duration::from_millis(500));
                        while !peer.is_broken() {
                            peer.gathered(200, |p| p.send(Header::new(Kind::Ping, 0), &[]));
                        }
                    });
                }
            });
            let began = Instant::now();
            rig.receiver.close_session(SESSION);
            assert!(began.elapsed() < AT_ALL, "{:?}", began.elapsed());
            let left = (before.0, before.1 + CONNECTIONS);
            eventually("all connections are let go of", || {
                (held() == left).then_some(())
            });
        },
    );
}
