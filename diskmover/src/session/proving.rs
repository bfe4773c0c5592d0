//! Targets are read back while the rest of them still comes.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::{Session, TICK};
use crate::digest::CHUNK;
use crate::guard;
use crate::sys::AlignedBuf;

/// Threads that read back: what they do not manage, the keeper reads in the end.
const READERS: usize = 2;

impl Session {
    /// How many threads read back what was written.
    pub(super) fn readers(&self) -> usize {
        let any = self.specs.iter().any(|spec| spec.care.reads_back());
        if any { READERS } else { 0 }
    }

    /// Reads back what is durable until the session ends, or all that it gets is
    /// there.
    pub(super) fn read_back(&self) {
        let crash = || self.fail(guard::crash("a reader of what was written").at_receiver());
        guard::run(|| self.read_back_all(), crash);
        self.workers.fetch_sub(1, Ordering::Release);
    }

    fn read_back_all(&self) {
        let Some(mut buffer) = AlignedBuf::new(CHUNK as usize) else {
            return; // the keeper needs it as well, and tells
        };
        while !self.stopping() && !self.drained.has_come() {
            // No target is held while nothing is due.
            let targets = self.targets.read();
            let targets = targets.unwrap_or_else(PoisonError::into_inner).clone();
            let mut open = targets.iter().flatten();
            if !open.any(|target| target.read_back(&mut buffer)) {
                drop(targets);
                std::thread::sleep(TICK / 10);
            }
        }
    }
}
