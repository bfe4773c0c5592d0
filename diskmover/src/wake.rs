//! What wakes a thread, beside the queue that it waits for.
//!
//! Threads also look by themselves now and then. Where only that made them go on, a
//! copy of nothing took a fifth of a second: each step of its end waited for the next
//! look of somebody.

use std::convert::Infallible;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::pool::lock;

/// Rings for one thread. However often it rings until that looks, it is heard once.
#[derive(Debug)]
pub struct Bell(Sender<()>, Receiver<()>);

impl Default for Bell {
    fn default() -> Self {
        let (ring, heard) = bounded(1);
        Bell(ring, heard)
    }
}

impl Bell {
    /// Wakes who waits, or who waits next.
    pub fn ring(&self) {
        let _ = self.0.try_send(()); // full: it rings already
    }

    /// Where to wait for it.
    pub fn heard(&self) -> &Receiver<()> {
        &self.1
    }
}

/// Comes once, and for all threads.
#[derive(Debug)]
pub struct Moment {
    has_come: AtomicBool,
    /// Dropping it wakes everybody.
    before: Mutex<Option<Sender<Infallible>>>,
    awaited: Receiver<Infallible>,
}

impl Default for Moment {
    fn default() -> Self {
        let (before, awaited) = bounded(0);
        Moment {
            has_come: AtomicBool::new(false),
            before: Mutex::new(Some(before)),
            awaited,
        }
    }
}

impl Moment {
    /// Wakes all who wait for it. They find that it has come: that is noted before.
    pub fn come(&self) {
        self.has_come.store(true, Ordering::Release);
        lock(&self.before).take();
    }

    /// Whether it was.
    pub fn has_come(&self) -> bool {
        self.has_come.load(Ordering::Acquire)
    }

    /// Where to wait for it. It is ready for ever afterwards: a loop that waits there has
    /// to leave then, or to stop waiting for it.
    pub fn awaited(&self) -> &Receiver<Infallible> {
        &self.awaited
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crossbeam_channel::{never, select};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(150);

    #[test]
    fn a_moment_wakes_all_who_wait_beside_a_queue_and_who_comes_late() {
        let moment = Moment::default();
        let woken = || {
            let queue = never::<u8>();
            select! {
                recv(queue) -> _ => false,
                recv(moment.awaited()) -> _ => moment.has_come(),
                default(PATIENCE) => false,
            }
        };
        assert!(!moment.has_come());
        std::thread::scope(|scope| {
            let waiting = [scope.spawn(woken), scope.spawn(woken)];
            moment.come();
            assert!(waiting.map(|one| one.join().unwrap()).iter().all(|&w| w));
        });
        moment.come();
        assert!(woken());
    }

    #[test]
    fn a_bell_that_rang_before_is_heard_once() {
        let bell = Bell::default();
        bell.ring();
        bell.ring();
        assert!(bell.heard().recv_timeout(PATIENCE).is_ok());
        assert!(bell.heard().try_recv().is_err());
    }
}
