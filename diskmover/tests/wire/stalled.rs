//! Ends that say that they live and do nothing else.
//!
//! PING keeps a connection, and is all that a peer sends whose disk hangs, whose
//! source never answers, or that means harm. It must not hold the other end for
//! ever. How long is too long is short here; docs/wire-protocol.md says what it is.

use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use diskmover::digest::CHUNK;
use diskmover::error::{Code, Result};
use diskmover::frame::{Header, Kind};
use diskmover::listener::Limits;
use diskmover::messages::{Receipt, VERSION};
use diskmover::push::Job;
use diskmover::session::Phase;

use crate::peer::{Heard, Peer, about, listener, receipt, received_by};
use crate::pki::Pki;
use crate::rig::{PATIENCE, Rig, SESSION, eventually, job_to, limits, noise, run};

const SIZE: u64 = 3 * CHUNK + 9;
/// Longer than a busy machine makes honest ends wait.
const STALL: Duration = Duration::from_secs(2);

/// How far a receiver goes before it only says that it lives.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Until {
    /// It opens nothing.
    Open,
    /// It takes everything and acknowledges nothing.
    Data,
    /// It publishes nothing.
    Finish,
    /// It is an honest one.
    TheEnd,
}

/// A sender's end of the scene: a source of noise, and the address of a receiver.
struct Scene {
    pki: Pki,
    dir: tempfile::TempDir,
    listener: TcpListener,
    address: String,
    over: AtomicBool,
    accepted: AtomicUsize,
    /// A chunk came that nobody acknowledges.
    swallowed: AtomicBool,
    /// How long each connection lasts.
    lasts: Duration,
}

impl Scene {
    fn new() -> Scene {
        let (listener, address) = listener();
        let scene = Scene {
            pki: Pki::new(),
            dir: tempfile::tempdir().unwrap(),
            listener,
            address,
            over: AtomicBool::new(false),
            accepted: AtomicUsize::new(0),
            swallowed: AtomicBool::new(false),
            lasts: PATIENCE,
        };
        std::fs::write(scene.source(), noise(1, SIZE as usize)).unwrap();
        scene
    }

    fn source(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn job(&self) -> Job {
        Job {
            volumes: vec![("disk".into(), self.source().into(), None)],
            stall: STALL,
            reconnect: Duration::from_secs(2),
            ..job_to(&self.address, &self.pki)
        }
    }

    /// Pushes to a receiver each of whose connections goes as far as `until` says
    /// for its number.
    fn push(&self, job: Job, until: impl Fn(usize) -> Until + Sync) -> Result<Vec<Receipt>> {
        let credentials = self.pki.host("b");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !self.over.load(Ordering::Relaxed) {
                    let mut peer = Peer::accept(&self.listener, &credentials);
                    let until = until(self.accepted.fetch_add(1, Ordering::Relaxed));
                    scope.spawn(move || self.answer(&mut peer, until));
                }
            });
            let outcome = run(job);
            self.over.store(true, Ordering::Relaxed);
            let _ = TcpStream::connect(&self.address); // wakes who accepts
            outcome
        })
    }

    /// One connection of a receiver.
    fn answer(&self, peer: &mut Peer, until: Until) {
        let began = Instant::now();
        while began.elapsed() < self.lasts
            && let Heard::Frame(header, payload) = peer.hear()
        {
            match header.kind {
                Kind::Hello => peer.send(Header::new(Kind::Welcome, 1), &VERSION.to_le_bytes()),
                Kind::Open if until == Until::Open => self.live_on(peer),
                Kind::Open => peer.send(Header::new(Kind::Opened, 0), &[]),
                Kind::Ping => peer.send(Header::new(Kind::Ping, 0), &[]),
                Kind::Data if until == Until::Data => {
                    self.swallowed.store(true, Ordering::Relaxed);
                }
                Kind::Data => peer.send(about(Kind::Ack, &header), &[]),
                Kind::Finish if until == Until::Finish => self.live_on(peer),
                Kind::Finish => {
                    let receipt = receipt(SIZE, payload[..32].try_into().unwrap());
                    peer.send(Header::new(Kind::Receipt, 0), &receipt.encode());
                }
                _ => {}
            }
        }
        peer.break_off();
    }

    /// Says that it lives until the other end has had enough, or the connection its time.
    fn live_on(&self, peer: &mut Peer) {
        let began = Instant::now();
        while began.elapsed() < self.lasts
            && !peer.is_broken()
            && !self.over.load(Ordering::Relaxed)
        {
            peer.send(Header::new(Kind::Ping, 0), &[]);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn a_receiver_that_only_lives_is_given_up_wherever_it_stops() {
    for (until, says) in [
        (Until::Open, "does not open"),
        (Until::Data, "acknowledges nothing"),
        (Until::Finish, "does not publish"),
    ] {
        let scene = Scene::new();
        let error = scene.push(scene.job(), |_| until).unwrap_err();
        assert_eq!(error.code, Code::LinkLost, "{until:?}: {error}");
        assert!(error.retryable && error.message.contains(says), "{error}");
    }
}

#[test]
fn it_is_given_up_as_well_when_it_breaks_each_connection_in_time() {
    // What it takes to be given up is longer than a connection lasts.
    for (until, stall) in [(Until::Open, 1000), (Until::Data, 2500)] {
        let mut scene = Scene::new();
        scene.lasts = Duration::from_millis(2300);
        let mut job = scene.job();
        job.stall = Duration::from_millis(stall);
        // Each of them outlives that: it counts as one that was of use.
        job.reconnect = Duration::from_secs(2);
        (job.connections, job.most_connections) = (1, 1);
        let error = scene.push(job, |_| until).unwrap_err();
        assert_eq!(error.code, Code::LinkLost, "{until:?}: {error}");
        assert!(error.message.contains("lives"), "{error}");
    }
}

#[test]
fn what_one_connection_never_acknowledges_goes_over_another() {
    let scene = Scene::new();
    let mut job = scene.job();
    // The other has twice that to bring an answer, on a busy machine too.
    job.stall = Duration::from_secs(3);
    let placed = scene.push(job, |number| {
        if number == 0 {
            return Until::Data;
        }
        eventually("the first has something", || {
            scene
                .swallowed
                .load(Ordering::Relaxed)
                .then_some(Until::TheEnd)
        })
    });
    let root = diskmover::local::digest(&scene.source()).unwrap().2;
    assert_eq!(placed.unwrap(), [receipt(SIZE, root)]);
}

#[test]
fn an_honest_receiver_in_the_same_words_is_waited_for() {
    let scene = Scene::new();
    let mut job = scene.job();
    // Longer than anything is waited for between two chunks: it is not its turn.
    job.limit = Some(CHUNK / 5);
    job.connections = 1;
    assert!(scene.push(job, |_| Until::TheEnd).is_ok());
}

#[test]
fn a_sender_that_waits_for_open_says_that_it_lives() {
    let scene = Scene::new();
    let mut heard = false;
    let listens = |mut peer: Peer, _: TcpListener| {
        peer.hear_kind(Kind::Hello);
        peer.send(Header::new(Kind::Welcome, 1), &VERSION.to_le_bytes());
        peer.hear_kind(Kind::Open);
        // As one does that reads all it has: every few seconds.
        for _ in 0..20 {
            peer.send(Header::new(Kind::Ping, 0), &[]);
            std::thread::sleep(Duration::from_millis(300));
        }
        heard = matches!(peer.hear(), Heard::Frame(header, _) if header.kind == Kind::Ping);
        peer.hang_up();
    };
    received_by(listens, &scene.source(), Duration::from_secs(1)).unwrap_err();
    assert!(heard, "a receiver drops who says nothing");
}

fn impatient() -> Rig {
    Rig::with(Limits {
        quiet: STALL,
        ..limits()
    })
}

#[test]
fn a_sender_that_only_lives_loses_its_session_and_its_part() {
    let rig = impatient();
    rig.open(&[("disk", SIZE)]).unwrap();
    let mut peer = Peer::sending(&rig, "disk", SIZE);
    let began = Instant::now();
    let error = loop {
        assert!(began.elapsed() < PATIENCE / 4, "it may live on for ever");
        peer.send(Header::new(Kind::Ping, 0), &[]);
        match peer.hear() {
            Heard::Frame(header, payload) if header.kind == Kind::Error => {
                break diskmover::messages::decode_error(&payload).unwrap();
            }
            Heard::Frame(..) => {}
            Heard::End => panic!("an end without a reason"),
        }
    };
    assert!(error.retryable && error.message.contains(&peer.address()));
    assert_eq!(error.code, Code::LinkLost);
    assert_eq!(rig.failure(SESSION), error);
    // The part is free, and a new session goes on with it.
    let source = rig.source("disk", SIZE, &[(0, &noise(1, SIZE as usize))]);
    rig.open_as("s2", crate::rig::TAG, &[("disk", SIZE)])
        .unwrap();
    let mut job = rig.job(&[&source]);
    job.session = "s2".into();
    run(job).unwrap();
}

#[test]
fn a_sender_that_only_lives_after_the_end_is_let_go() {
    let rig = impatient();
    rig.open(&[("disk", SIZE)]).unwrap();
    let mut peer = Peer::sending(&rig, "disk", SIZE);
    peer.publish_zeros(0..4, SIZE);
    let began = Instant::now();
    loop {
        assert!(began.elapsed() < PATIENCE / 4, "it may live on for ever");
        peer.send(Header::new(Kind::Ping, 0), &[]);
        if matches!(peer.hear(), Heard::End) {
            break;
        }
    }
    eventually("the connection is let go of", || {
        let (phase, progress, _) = rig.receiver.status(SESSION).unwrap();
        assert_eq!(phase, Phase::Done);
        (progress.connections == 0).then_some(())
    });
}
