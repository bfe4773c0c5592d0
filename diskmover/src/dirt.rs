//! What is written and not yet durable: what a crash costs, and its bound.
//!
//! A worker asks for room before it writes and notes afterwards what it wrote.
//! The keeper makes all durable when half of the room is used, so that workers
//! need not wait unless the disk does not keep up.

use std::time::Duration;

use crossbeam_channel::Receiver;

use crate::pool::lock;
use crate::sync::{Condvar, Mutex, PoisonError};
use crate::wake::Bell;

/// Most bytes that a crash of the receiver can cost, beside what is in flight.
pub const MOST: u64 = 64 << 20;
/// A barrier begins when so many bytes are not durable.
pub const BARRIER: u64 = MOST / 2;
/// What workers can be writing at the same time.
const UNDER_WAY: u64 = 8 << 20;

/// Bytes that are written and not durable.
pub struct Dirt {
    bytes: Mutex<u64>,
    settled: Condvar,
    alarm: Bell,
}

impl Default for Dirt {
    fn default() -> Self {
        Dirt {
            bytes: Mutex::default(),
            settled: Condvar::new(),
            alarm: Bell::default(),
        }
    }
}

impl Dirt {
    /// Waits for room, at most `timeout`; true when there is some.
    pub fn has_room(&self, timeout: Duration) -> bool {
        let full = |bytes: &mut u64| *bytes > MOST - UNDER_WAY;
        let (bytes, _) = self
            .settled
            .wait_timeout_while(lock(&self.bytes), timeout, full)
            .unwrap_or_else(PoisonError::into_inner);
        *bytes <= MOST - UNDER_WAY
    }

    /// Notes bytes that were written.
    pub fn add(&self, bytes: u64) {
        let mut sum = lock(&self.bytes);
        *sum += bytes;
        if *sum >= BARRIER {
            self.alarm.ring();
        }
    }

    /// Rings when it is time for a barrier.
    pub fn alarm(&self) -> &Receiver<()> {
        self.alarm.heard()
    }

    /// Bytes that are not durable.
    pub fn bytes(&self) -> u64 {
        *lock(&self.bytes)
    }

    /// Notes that so many bytes have become durable.
    pub fn settle(&self, bytes: u64) {
        *lock(&self.bytes) -= bytes;
        self.settled.notify_all();
    }
}
