//! A rate limit that can change while it is waited for.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::pool::lock;

/// The shortest wait: less only wakes the processor.
const SHORTEST: Duration = Duration::from_millis(1);

struct Bucket {
    rate: Option<u64>,
    /// Bytes that may be sent now; below zero after a large frame.
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    /// A bucket without savings or debts.
    fn new(rate: Option<u64>, now: Instant) -> Bucket {
        Bucket {
            rate,
            tokens: 0.0,
            filled: now,
        }
    }

    /// Takes out so many bytes, or says how long to wait first.
    fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let Some(rate) = self.rate else { return Ok(()) };
        self.fill(now);
        if self.tokens < 0.0 {
            return Err(Duration::from_secs_f64(-self.tokens / rate.max(1) as f64));
        }
        self.tokens -= bytes as f64;
        Ok(())
    }

    /// Another rate from now on. Bytes that are owed stay owed, or who sets a limit again
    /// and again would lift it; without a limit nothing is.
    fn change(&mut self, rate: Option<u64>, now: Instant) {
        self.fill(now);
        if rate.is_none() {
            self.tokens = 0.0;
        }
        self.rate = rate;
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        if let Some(rate) = self.rate {
            // A tenth of a second may be saved up.
            self.tokens = (self.tokens + passed * rate as f64).min(rate as f64 / 10.0);
        }
    }
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
        Throttle {
            bucket: Mutex::new(Bucket::new(rate, Instant::now())),
            changed: Condvar::new(),
            held: AtomicUsize::new(0),
        }
    }

    /// Changes the limit; what is owed under the old one is paid at the new one.
    pub fn set(&self, rate: Option<u64>) {
        lock(&self.bucket).change(rate, Instant::now());
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
            let now = Instant::now();
            let Err(needed) = bucket.take(bytes, now) else {
                return true;
            };
            let left = end.saturating_duration_since(now);
            if left.is_zero() {
                return false;
            }
            let wait = needed.min(left).max(SHORTEST);
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

    const TICK: Duration = Duration::from_millis(1);
    const RATE: u64 = 1_000_000;

    /// A sender that always has frames of `frame` bytes to send, over an invented time.
    struct Sender {
        bucket: Bucket,
        now: Instant,
        frame: u64,
    }

    impl Sender {
        fn new(rate: u64, frame: u64) -> Sender {
            let now = Instant::now();
            let bucket = Bucket::new(Some(rate), now);
            Sender { bucket, now, frame }
        }

        /// The bytes that it can send in so many milliseconds.
        fn sends(&mut self, millis: u32) -> u64 {
            let mut sent = 0;
            for _ in 0..millis {
                self.now += TICK;
                while self.bucket.take(self.frame, self.now).is_ok() {
                    sent += self.frame;
                }
            }
            sent
        }

        fn rests(&mut self, time: Duration) {
            self.now += time;
        }

        fn is_set_to(&mut self, rate: Option<u64>) {
            self.bucket.change(rate, self.now);
        }
    }

    #[test]
    fn what_is_let_through_is_the_rate_and_one_frame() {
        // Frames that take less than a tick, a few ticks, and ten seconds.
        for frame in [500, 10_000, 10_000_000] {
            let mut sender = Sender::new(RATE, frame);
            let mut sent = 0;
            for second in 1..=60 {
                sent += sender.sends(1000);
                let ahead = sent as i64 - (second * RATE) as i64;
                assert!((0..=frame as i64).contains(&ahead), "{frame}: {ahead}");
            }
        }
    }

    #[test]
    fn a_tenth_of_a_second_is_saved_up_and_no_more() {
        let mut sender = Sender::new(RATE, 1000);
        sender.rests(Duration::from_secs(3600));
        let saved = RATE / 10;
        assert_eq!(sender.sends(1000), saved + RATE);
    }

    #[test]
    fn the_wait_is_as_long_as_the_debt() {
        let mut bucket = Bucket::new(Some(1000), Instant::now());
        let now = bucket.filled;
        assert_eq!(bucket.take(4000, now), Ok(()));
        assert_eq!(bucket.take(1, now), Err(Duration::from_secs(4)));
        let later = now + Duration::from_secs(3);
        assert_eq!(bucket.take(1, later), Err(Duration::from_secs(1)));
        assert_eq!(bucket.take(1, now + Duration::from_secs(4)), Ok(()));
    }

    #[test]
    fn a_limit_that_is_set_again_and_again_holds() {
        let frame = 1 << 20;
        let mut sender = Sender::new(RATE, frame);
        let mut sent = 0;
        for _ in 0..6000 {
            sender.is_set_to(Some(RATE));
            sent += sender.sends(10);
        }
        assert!((60 * RATE..=60 * RATE + frame).contains(&sent), "{sent}");
    }

    #[test]
    fn what_is_owed_is_paid_at_the_new_rate() {
        let mut bucket = Bucket::new(Some(1000), Instant::now());
        let now = bucket.filled;
        assert_eq!(bucket.take(5000, now), Ok(()));
        let later = now + Duration::from_secs(1);
        bucket.change(Some(2000), later);
        assert_eq!(bucket.take(1, later), Err(Duration::from_secs(2)));
        bucket.change(Some(100), later);
        assert_eq!(bucket.take(1, later), Err(Duration::from_secs(40)));
        bucket.change(None, later);
        assert_eq!(bucket.take(1 << 40, later), Ok(()));
        bucket.change(Some(100), later);
        assert_eq!(bucket.take(1, later), Ok(()), "there was no limit");
    }

    #[test]
    fn what_was_saved_up_at_a_high_rate_does_not_outlast_it() {
        let mut sender = Sender::new(1000 * RATE, 1000);
        sender.rests(Duration::from_secs(1));
        sender.is_set_to(Some(RATE));
        assert_eq!(sender.sends(1000), RATE / 10 + RATE);
    }

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
            throttle.set(Some(1 << 50));
            assert!(waiter.join().unwrap());
            assert!(!throttle.holds());
        });
    }
}
