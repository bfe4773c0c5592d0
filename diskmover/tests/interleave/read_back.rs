//! What counts as proven was read back after it was written for the last time.

use std::sync::Arc;

use loom::sync::Mutex;
use loom::thread;

use crate::{EVER, FEW_SWITCHES, SWITCHES, explore, proofs};

/// A volume of one segment, whose content is how often it was written.
struct Volume {
    proofs: proofs::Proofs,
    stored: Mutex<u32>,
    /// The newest content that was read back.
    seen: Mutex<u32>,
    /// Whether something waits for a barrier: the book of a target.
    pending: Mutex<bool>,
}

impl Volume {
    /// Complete, written once, and durable.
    fn new() -> Arc<Volume> {
        let volume = Arc::new(Volume {
            proofs: proofs::Proofs::new(1),
            stored: Mutex::new(0),
            seen: Mutex::new(0),
            pending: Mutex::new(false),
        });
        volume.write();
        volume.barrier();
        volume
    }

    /// A worker: what came is written, then noted.
    fn write(&self) {
        *self.stored.lock().unwrap() += 1;
        let mut pending = self.pending.lock().unwrap();
        *pending = true;
        self.proofs.note_written(0);
    }

    /// The keeper: what is noted becomes durable.
    fn barrier(&self) {
        if !std::mem::take(&mut *self.pending.lock().unwrap()) {
            return;
        }
        let pending = self.pending.lock().unwrap();
        if !*pending {
            self.proofs.note_durable(0);
        }
    }

    /// A reader, once.
    fn read_back(&self) -> bool {
        let Some(look) = self.proofs.take() else {
            return false;
        };
        let found = *self.stored.lock().unwrap();
        let mut seen = self.seen.lock().unwrap();
        *seen = found.max(*seen);
        drop(seen);
        self.proofs.settle(look, true);
        true
    }

    /// The keeper, in the end.
    fn prove(&self) {
        while !self.proofs.are_complete() {
            self.barrier();
            while self.read_back() {}
            assert!(self.proofs.are_settled(EVER));
        }
    }
}

fn reader(volume: &Arc<Volume>) -> thread::JoinHandle<bool> {
    let volume = Arc::clone(volume);
    thread::spawn(move || volume.read_back())
}

#[test]
fn what_is_written_again_is_read_back_again() {
    explore(SWITCHES, || {
        let volume = Volume::new();
        let readers = [reader(&volume), reader(&volume)];
        let writer = {
            let volume = Arc::clone(&volume);
            thread::spawn(move || volume.write())
        };
        volume.prove();
        writer.join().unwrap();
        // No worker is left; readers may be.
        volume.prove();
        assert_eq!(
            *volume.seen.lock().unwrap(),
            *volume.stored.lock().unwrap(),
            "not read back since it was written"
        );
        let _ = readers.map(|thread| thread.join().unwrap());
    });
}

#[test]
fn a_segment_is_looked_at_by_one_reader() {
    explore(FEW_SWITCHES, || {
        let volume = Volume::new();
        let readers = [reader(&volume), reader(&volume)];
        let looks = readers.map(|thread| thread.join().unwrap());
        assert_eq!(looks.iter().filter(|looked| **looked).count(), 1);
        assert!(volume.proofs.are_complete() && volume.proofs.lost().is_empty());
    });
}
