//! What a copy costs in memory at sizes that no test can fill, and with peers that
//! make the most of them. An end of a copy is to live in 300 MiB, its buffers
//! included; here both are in one process.

#![allow(missing_docs)]

mod ledger;
mod peers;
mod seeds;
mod sessions;

#[allow(dead_code)]
#[path = "../wire/peer.rs"]
mod peer;
#[allow(dead_code)]
#[path = "../wire/pki.rs"]
mod pki;
#[allow(dead_code)]
#[path = "../wire/rig.rs"]
mod rig;
#[allow(dead_code)]
#[path = "../wire/sample.rs"]
mod sample;

use std::sync::{Mutex, PoisonError};

const MIB: u64 = 1 << 20;

/// Most memory, in bytes, that this process has while `act` runs, alone, beyond what
/// it had before: what others have freed may still be there.
fn peak(act: impl FnOnce()) -> u64 {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // The kernel forgets the peak so far.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    act();
    status("VmHWM").saturating_sub(before)
}

/// A number of bytes that the kernel tells of this process.
fn status(what: &str) -> u64 {
    let all = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = all.lines().find(|line| line.starts_with(what));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() * 1024
}

/// Fails when `act` needs more than so many MiB.
fn within(most: u64, act: impl FnOnce()) {
    let peak = peak(act) / MIB;
    assert!(peak <= most, "{peak} MiB, not {most}");
}
