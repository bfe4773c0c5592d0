//! Tests: each stage is made the slowest in turn, and is named.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use rustix::net::sockopt::set_socket_recv_buffer_size;

use crate::digest::CHUNK;
use crate::effort::Compression;
use crate::faults::{Fault, Op, Rule, inject};
use crate::push::{Job, Push};
use crate::rig::{Rig, eventually, noise};

/// Longer than anything else that a chunk meets on a busy machine.
const SLOW: Duration = Duration::from_millis(400);
const CHUNKS: u64 = 64;

/// All files take so long for each of these.
fn slow(op: Op, delay: Duration) -> Rule {
    Rule {
        file: "",
        op,
        at: None,
        after: 0,
        times: u32::MAX,
        fault: Fault::Slow(delay),
    }
}

/// A source of noise, and a job that sends it as it is over one connection.
fn job(rig: &Rig) -> Job {
    let size = CHUNKS * CHUNK;
    let source = rig.source("disk", size, &[(0, &noise(1, size as usize))]);
    prepared(rig, source)
}

fn prepared(rig: &Rig, source: PathBuf) -> Job {
    rig.open(&[("disk", CHUNKS * CHUNK)]).unwrap();
    Job {
        compression: Compression::Off,
        buffer_bytes: 32 * CHUNK,
        ..rig.job(&[&source])
    }
}

/// The name that stands for most of the copy's middle, seen once for each chunk. It
/// begins when what was seen before anything was answered has faded.
fn named(job: Job) -> &'static str {
    let push = Push::start(job).unwrap();
    let mut names = Vec::new();
    let mut next = CHUNKS / 4;
    while next < CHUNKS / 2 {
        let seen = eventually("the copy goes on", || {
            let progress = push.progress();
            (progress.done >= next * CHUNK).then_some(progress)
        });
        names.push(seen.limited_by);
        next = seen.done / CHUNK + 1;
    }
    push.cancel();
    let times = |name| names.iter().filter(|other| **other == name).count();
    let most = names.iter().copied().max_by_key(|name| times(*name));
    most.unwrap()
}

#[test]
fn a_slow_source_is_named() {
    let rig = Rig::new();
    let job = job(&rig);
    let sources = rig.root().parent().unwrap().join("out");
    let _slow = inject(&sources, slow(Op::Read, SLOW / 2));
    assert_eq!(named(job), "source-read");
}

#[test]
fn work_that_is_too_hard_is_named() {
    let rig = Rig::new();
    let words: Vec<u8> = noise(2, (CHUNKS * CHUNK) as usize)
        .iter()
        .flat_map(|byte| [b"move ", b"disk ", b"host ", b"copy "][*byte as usize % 4])
        .copied()
        .take((CHUNKS * CHUNK) as usize)
        .collect();
    let source = rig.source("disk", CHUNKS * CHUNK, &[(0, &words)]);
    let job = prepared(&rig, source);
    let name = named(Job {
        compression: Compression::Level(12),
        ..job
    });
    assert_eq!(name, "compress");
}

#[test]
fn a_slow_link_is_named() {
    let rig = Rig::new();
    let job = job(&rig);
    let relay = slow_relay(rig.receiver.address());
    let name = named(Job {
        to: relay.to_string(),
        ..job
    });
    assert_eq!(name, "network");
}

#[test]
fn a_slow_target_is_named() {
    let rig = Rig::new();
    let job = job(&rig);
    let _slow = inject(&rig.root(), slow(Op::Write, SLOW));
    assert_eq!(named(job), "target-write");
}

#[test]
fn the_limit_is_named() {
    let rig = Rig::new();
    let job = job(&rig);
    let name = named(Job {
        limit: Some(8 << 20),
        ..job
    });
    assert_eq!(name, "throttle");
}

/// A relay that hands on 64 KiB at a time and takes its time for it.
fn slow_relay(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // Inherited by what is accepted: else all of the copy would fit in there.
    set_socket_recv_buffer_size(&listener, 64 << 10).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(client), Ok(server)) = (client, TcpStream::connect(to)) else {
                return;
            };
            let (back, answers) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || pump(client, server, SLOW / 40));
            std::thread::spawn(move || pump(answers, back, Duration::ZERO));
        }
    });
    address
}

fn pump(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        std::thread::sleep(delay);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
