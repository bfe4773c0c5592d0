//! What a copy does when the wire between its ends breaks.
//!
//! Whatever happens to single connections, the copy ends well: a frame that did
//! not arrive whole counts for nothing and goes over another one. When no
//! connection carries anything, the copy ends in bounded time, can be tried
//! again, and has published nothing.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use diskmover::digest::CHUNK;
use diskmover::error::Code;
use diskmover::listener::Limits;
use diskmover::push::Push;

use crate::relay::{Harm, Plan, Relay, Way};
use crate::rig::{PATIENCE, Rig, limits, noise};

use Harm::{Cut, Flip, Reset, Stall, Trickle};
use Way::{Down, Up};

const SIZE: u64 = 5 * CHUNK + 77;
/// More than sockets take before they make a sender wait.
const LARGE: u64 = 16 * CHUNK + 77;
/// The first connections of a copy, and some that replace them.
const SOME: usize = 3;
const ALL: usize = usize::MAX;
/// In the handshake, HELLO, the first chunk, and a later one.
const ANYWHERE: &[u64] = &[0, 1, 700, 3000, 100_000, 1_500_000];
/// Only where both ends know each other.
const IN_FRAMES: &[u64] = &[100_000, 1_000_000];

struct Row {
    what: &'static str,
    harm: Harm,
    way: Way,
    after: &'static [u64],
    connections: usize,
    /// None: it ends well.
    fails: Option<Code>,
}

const fn row(
    what: &'static str,
    (harm, way): (Harm, Way),
    after: &'static [u64],
    connections: usize,
    fails: Option<Code>,
) -> Row {
    Row {
        what,
        harm,
        way,
        after,
        connections,
        fails,
    }
}

const ROWS: &[Row] = &[
    row(
        "cut: what was under way goes elsewhere",
        (Cut, Up),
        ANYWHERE,
        SOME,
        None,
    ),
    row("cut: an answer is lost", (Cut, Down), ANYWHERE, SOME, None),
    row(
        "reset: the same, with no goodbye",
        (Reset, Up),
        ANYWHERE,
        SOME,
        None,
    ),
    row(
        "reset: an answer is lost",
        (Reset, Down),
        IN_FRAMES,
        SOME,
        None,
    ),
    row(
        "half open: nothing arrives, and nobody says so",
        (Stall, Up),
        IN_FRAMES,
        SOME,
        None,
    ),
    row(
        "a bit flips: TLS notices, and the frame goes again",
        (Flip, Up),
        IN_FRAMES,
        SOME,
        None,
    ),
    row(
        "a bit flips in an answer: the same",
        (Flip, Down),
        IN_FRAMES,
        SOME,
        None,
    ),
    row("slow: not taken for dead", (Trickle, Up), &[0], SOME, None),
    row(
        "slow answers: not taken for dead",
        (Trickle, Down),
        &[0],
        SOME,
        None,
    ),
    row(
        "always cut in the handshake: given up",
        (Cut, Up),
        &[0, 700],
        ALL,
        Some(Code::ConnectFailed),
    ),
    row(
        "always cut in the first chunk: given up",
        (Cut, Up),
        &[100_000],
        ALL,
        Some(Code::LinkLost),
    ),
    row(
        "always reset in the first chunk: given up",
        (Reset, Up),
        &[100_000],
        ALL,
        Some(Code::LinkLost),
    ),
    row(
        "always spoilt in the first chunk: given up",
        (Flip, Up),
        &[100_000],
        ALL,
        Some(Code::LinkLost),
    ),
    row(
        "never an answer: given up",
        (Cut, Down),
        &[100_000],
        ALL,
        Some(Code::LinkLost),
    ),
];

fn check(row: &Row, after: u64) -> Result<(), String> {
    let rig = Rig::with(Limits {
        idle: Duration::from_secs(1),
        ..limits()
    });
    let size = match row.harm {
        Stall => LARGE,
        _ => SIZE,
    };
    let source = rig.source("disk", size, &[(0, &noise(1, size as usize))]);
    rig.open(&[("disk", size)]).unwrap();
    let plan = Plan {
        harm: row.harm,
        way: row.way,
        after,
        connections: row.connections,
    };
    let relay = Relay::to(rig.receiver.address().to_string(), plan);
    let mut job = rig.job(&[&source]);
    job.to = relay.address.clone();
    if row.connections == ALL {
        // Longer than the longest pause between two attempts.
        job.reconnect = Duration::from_secs(4);
    }
    let Some(outcome) = Push::start(job).unwrap().wait(PATIENCE / 2) else {
        return Err("it hangs".to_owned());
    };
    if relay.harmed.load(Ordering::SeqCst) == 0 {
        return Err("nothing was harmed".to_owned());
    }
    let placed = std::fs::read(rig.root().join("disk")).ok();
    match (row.fails, outcome) {
        (None, Ok(_)) if placed == std::fs::read(&source).ok() => Ok(()),
        (None, Ok(_)) => Err("published, and not what the source holds".to_owned()),
        (None, Err(error)) => Err(format!("failed: {error}")),
        (Some(_), Ok(_)) => Err("said that it went well".to_owned()),
        (Some(code), Err(error)) if error.code != code || !error.retryable => {
            Err(format!("another error: {error}"))
        }
        (Some(_), Err(_)) if placed.is_some() => Err("published".to_owned()),
        (Some(_), Err(_)) => Ok(()),
    }
}

#[test]
fn whatever_the_wire_does_to_some_connections_the_copy_ends_well() {
    check_all(|row| row.connections == SOME);
}

#[test]
fn a_wire_that_carries_nothing_is_given_up() {
    check_all(|row| row.connections == ALL);
}

fn check_all(of: fn(&Row) -> bool) {
    let tries: Vec<(&Row, u64)> = ROWS
        .iter()
        .filter(|row| of(row))
        .flat_map(|row| row.after.iter().map(move |after| (row, *after)))
        .collect();
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some((row, after)) = tries.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(why) = check(row, *after) {
                        let told = format!("{} (after {after} bytes): {why}", row.what);
                        wrong.lock().unwrap().push(told);
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
