//! What a session tells of how far it is.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::{Phase, Session};
use crate::messages::Receipt;
use crate::pool::lock;
use crate::progress::{Eta, Progress};

impl Session {
    /// How far it is.
    pub fn progress(&self) -> Progress {
        let targets = self.targets.read().unwrap_or_else(PoisonError::into_inner);
        let open: u64 = targets
            .iter()
            .flatten()
            .map(|target| target.done_bytes())
            .sum();
        let done = open + self.finished.load(Ordering::Relaxed);
        let sizes: u64 = lock(&self.sizes).iter().flatten().sum();
        let total = self
            .specs
            .iter()
            .filter_map(|spec| spec.size)
            .sum::<u64>()
            .max(sizes);
        let receiving = self.phase() == Phase::Receiving;
        let rate = if receiving { self.meter.rate() } else { 0 };
        Progress {
            done,
            total,
            resumed: self.resumed.load(Ordering::Relaxed),
            wire: self.wire.load(Ordering::Relaxed),
            rate,
            eta: match receiving {
                true => self.meter.eta(total.saturating_sub(done)),
                false => Eta::default(),
            },
            limited_by: "",
            connections: lock(&self.state).links.len() as u64,
            unreadable: 0,
        }
    }

    /// Takes a sample for the rate.
    pub fn tick(&self) {
        self.meter.note(self.progress().done);
    }

    /// Notes the size of a volume that was opened.
    pub fn note_open(&self, volume: usize, size: u64, resumed: u64) {
        lock(&self.sizes)[volume] = Some(size);
        self.resumed.fetch_add(resumed, Ordering::Relaxed);
    }

    /// Notes that a volume is published and its target is gone.
    pub fn note_published(&self, volume: usize, receipt: Receipt) {
        self.finished.fetch_add(receipt.size, Ordering::Relaxed);
        lock(&self.sizes)[volume] = Some(receipt.size);
        lock(&self.receipts)[volume] = Some(receipt);
    }
}
