//! What both ends do when the system gives no memory for chunks.
//!
//! The limit on memory is a process's, so each test has a process of its own.

use std::time::Duration;

use diskmover::digest::CHUNK;
use diskmover::error::{Code, Side};
use diskmover::pool::Pool;
use diskmover::push::Push;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::alone::alone;
use crate::peer::Peer;
use crate::rig::{Rig, SESSION, eventually, finish, noise};

/// Less than a pool asks for, and more than all the rest may.
const LEFT: u64 = CHUNK + CHUNK / 2;

/// Memory that this process has mapped.
fn mapped() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mut lines = status.lines();
    let size = lines.find_map(|line| line.strip_prefix("VmSize:"));
    let kib: u64 = size.unwrap().trim_end_matches("kB").trim().parse().unwrap();
    kib * 1024
}

/// From here on this process gets hardly any more memory, until it is dropped.
struct Scarce(Rlimit);

impl Scarce {
    fn begin() -> Scarce {
        let before = getrlimit(Resource::As);
        let scarce = Rlimit {
            current: Some(mapped() + LEFT),
            ..before
        };
        setrlimit(Resource::As, scarce).unwrap();
        Scarce(before)
    }
}

impl Drop for Scarce {
    fn drop(&mut self) {
        setrlimit(Resource::As, self.0).unwrap();
    }
}

/// Waits until every thread has what it begins with.
fn settle() {
    let mut last = (0, 0);
    eventually("nobody takes more", || {
        std::thread::sleep(Duration::from_millis(20));
        let now = mapped();
        last = (now, if now == last.0 { last.1 + 1 } else { 0 });
        (last.1 > 25).then_some(())
    });
}

#[test]
fn a_pool_without_memory_says_so_unless_it_has_something_to_wait_for() {
    alone(
        "memory::a_pool_without_memory_says_so_unless_it_has_something_to_wait_for",
        || {
            let soon = Duration::from_millis(50);
            let pool = Pool::new(8 * CHUNK);
            let scarce = Scarce::begin();
            let error = pool.take(soon).err().expect("there was memory");
            assert_eq!(error.code, Code::LimitExceeded);
            let asked = format!("{}", 2 * CHUNK);
            assert!(error.message.contains(&asked) && error.retryable, "{error}");
            drop(scarce);
            let out = [pool.take(soon), pool.take(soon)].map(|taken| taken.unwrap().unwrap());
            let scarce = Scarce::begin();
            assert!(pool.take(soon).unwrap().is_none(), "two are out");
            drop(out);
            assert!(pool.take(soon).unwrap().is_some(), "they came back");
            drop(scarce);
        },
    );
}

#[test]
fn a_receiver_without_memory_ends_the_session() {
    alone("memory::a_receiver_without_memory_ends_the_session", || {
        let rig = Rig::new();
        rig.open(&[("disk", 4 * CHUNK)]).unwrap();
        let mut peer = Peer::sending(&rig, "disk", 4 * CHUNK);
        let (header, payload) = peer.data_frame(0, 0, 4 * CHUNK, &[1; CHUNK as usize]);
        settle();
        let scarce = Scarce::begin();
        peer.send(header, &payload);
        let error = peer.hear_error().expect("an end without a reason");
        assert_eq!(
            (error.code, error.side),
            (Code::LimitExceeded, Side::Receiver)
        );
        assert!(error.message.contains("memory"), "{error}");
        drop(scarce);
        assert_eq!(rig.failure(SESSION), error);
    });
}

#[test]
fn a_sender_without_memory_ends_the_copy() {
    alone("memory::a_sender_without_memory_ends_the_copy", || {
        let rig = Rig::new();
        // Volumes of zeros need no buffers: with a limit, they hold the readers up
        // in front of the data until both ends have all their threads.
        let empty: Vec<_> = (0..40).map(|n| format!("empty{n}")).collect();
        let mut sources: Vec<_> = empty
            .iter()
            .map(|name| rig.source(name, CHUNK, &[]))
            .collect();
        sources.push(rig.source("disk", CHUNK, &[(0, &noise(1, 5000))]));
        let mut volumes: Vec<_> = empty.iter().map(|name| (name.as_str(), CHUNK)).collect();
        volumes.push(("disk", CHUNK));
        rig.open(&volumes).unwrap();
        let mut job = rig.job(&sources.iter().map(AsRef::as_ref).collect::<Vec<_>>());
        (job.connections, job.most_connections) = (1, 1);
        job.limit = Some(1);
        let push = Push::start(job).unwrap();
        eventually("a frame is acknowledged", || {
            (push.progress().done > 0).then_some(())
        });
        settle();
        let scarce = Scarce::begin();
        push.set_limit(None).unwrap();
        let error = finish(&push).unwrap_err();
        drop(scarce);
        assert_eq!(
            (error.code, error.side),
            (Code::LimitExceeded, Side::Sender)
        );
        assert!(error.message.contains("memory"), "{error}");
    });
}
