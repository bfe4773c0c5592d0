//! How far a copy has come, and how fast.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::pool::lock;

/// A snapshot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// Bytes placed.
    pub done: u64,
    /// Bytes of all volumes.
    pub total: u64,
    /// Bytes that were there before.
    pub resumed: u64,
    /// Bytes of frames.
    pub wire: u64,
    /// Bytes of volume a second.
    pub rate: u64,
    /// Seconds to the end.
    pub eta: Option<f64>,
    /// The stage that limits the rate.
    pub limited_by: &'static str,
    /// Connections that stand.
    pub connections: u64,
}

const WINDOW: Duration = Duration::from_secs(5);
const STEP: Duration = Duration::from_millis(200);

/// Measures a rate over the last seconds.
#[derive(Default)]
pub struct Meter {
    samples: Mutex<VecDeque<(Instant, u64)>>,
}

impl Meter {
    /// Notes how much is done now.
    pub fn note(&self, done: u64) {
        self.note_at(Instant::now(), done);
    }

    /// Bytes a second; 0 while unknown.
    pub fn rate(&self) -> u64 {
        let samples = lock(&self.samples);
        let (Some((from, first)), Some((to, last))) = (samples.front(), samples.back()) else {
            return 0;
        };
        let seconds = (*to - *from).as_secs_f64();
        if seconds < STEP.as_secs_f64() {
            0
        } else {
            ((last - first) as f64 / seconds) as u64
        }
    }

    fn note_at(&self, now: Instant, done: u64) {
        let mut samples = lock(&self.samples);
        match samples.back() {
            Some((last, _)) if now - *last < STEP => return,
            Some((_, before)) if done < *before => samples.clear(),
            _ => {}
        }
        samples.push_back((now, done));
        while samples
            .front()
            .is_some_and(|(first, _)| now - *first > WINDOW)
        {
            samples.pop_front();
        }
    }
}

/// Seconds to the end at this rate.
pub fn eta(done: u64, total: u64, rate: u64) -> Option<f64> {
    match (total - done.min(total), rate) {
        (0, _) => Some(0.0),
        (_, 0) => None,
        (left, rate) => Some(left as f64 / rate as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_forgets_what_is_long_ago() {
        let meter = Meter::default();
        let start = Instant::now();
        assert_eq!(meter.rate(), 0);
        for second in 0..20u64 {
            let done = if second < 10 {
                second * 1000
            } else {
                10_000 + (second - 10) * 10
            };
            meter.note_at(start + Duration::from_secs(second), done);
        }
        assert_eq!(meter.rate(), 10);
    }

    #[test]
    fn eta_is_unknown_without_a_rate() {
        assert_eq!(eta(5, 10, 0), None);
        assert_eq!(eta(10, 10, 0), Some(0.0));
        assert_eq!(eta(5, 10, 2), Some(2.5));
    }
}
