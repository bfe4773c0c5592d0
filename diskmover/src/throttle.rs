//! A rate limit that can change while it is waited for.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::pool::lock;

struct Bucket {
    rate: Option<u64>,
    /// Bytes that may be sent now; below zero after a large frame.
    tokens: f64,
    filled: Instant,
}

/// Bytes a second over all connections of a copy.
///
/// A frame may go when the bucket is not in debt and then puts it into debt: so
/// a limit below the frame size works too.
pub struct Throttle {
    bucket: Mutex<Bucket>,
    changed: Condvar,
    held: AtomicUsize,
}

impl Throttle {
    /// A limit; None for none.
    pub fn new(rate: Option<u64>) -> Self {
        let bucket = Bucket {
            rate,
            tokens: 0.0,
            filled: Instant::now(),
        };
        Throttle {
            bucket: Mutex::new(bucket),
            changed: Condvar::new(),
            held: AtomicUsize::new(0),
        }
    }

    /// Changes the limit; debts under the old one are forgiven.
    pub fn set(&self, rate: Option<u64>) {
        *lock(&self.bucket) = Bucket {
            rate,
            tokens: 0.0,
            filled: Instant::now(),
        };
        self.changed.notify_all();
    }

    /// Whether it holds somebody up just now.
    pub fn holds(&self) -> bool {
        self.held.load(Ordering::Relaxed) > 0
    }

    /// Waits up to `patience` to send so many bytes; true when they may go.
    pub fn admit(&self, bytes: u64, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut bucket = lock(&self.bucket);
        loop {
            let Some(rate) = bucket.rate else { return true };
            let now = Instant::now();
            let earned = (now - bucket.filled).as_secs_f64() * rate as f64;
            // A tenth of a second may be saved up.
            bucket.tokens = (bucket.tokens + earned).min(rate as f64 / 10.0);
            bucket.filled = now;
            if bucket.tokens >= 0.0 {
                bucket.tokens -= bytes as f64;
                return true;
            }
            let needed = -bucket.tokens / rate.max(1) as f64;
            let left = end.saturating_duration_since(now).as_secs_f64();
            if left <= 0.0 {
                return false;
            }
            let wait = Duration::from_secs_f64(needed.min(left).max(0.001));
            self.held.fetch_add(1, Ordering::Relaxed);
            bucket = self
                .changed
                .wait_timeout(bucket, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            self.held.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debt_makes_the_next_frame_wait() {
        let throttle = Throttle::new(Some(10));
        assert!(throttle.admit(1 << 20, Duration::ZERO));
        assert!(!throttle.admit(1, Duration::from_millis(5)));
        throttle.set(None);
        assert!(throttle.admit(1, Duration::ZERO));
    }

    #[test]
    fn a_change_wakes_the_waiting() {
        let throttle = Throttle::new(Some(1));
        assert!(throttle.admit(1 << 40, Duration::ZERO));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| throttle.admit(1, Duration::from_secs(60)));
            while !throttle.holds() {
                std::thread::yield_now();
            }
            throttle.set(Some(1 << 30));
            assert!(waiter.join().unwrap());
            assert!(!throttle.holds());
        });
    }
}
