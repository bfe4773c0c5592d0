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
    /// Time to the end.
    pub eta: Eta,
    /// The stage that limits the rate; empty while unknown.
    pub limited_by: &'static str,
    /// Connections that stand.
    pub connections: u64,
    /// Bytes that the sender could not read, where it goes on with zeros.
    pub unreadable: u64,
}

/// Seconds to the end; None for what cannot be told.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Eta {
    /// At the rate of the last seconds.
    pub expected: Option<f64>,
    /// If all goes on as in the fastest of these seconds.
    pub low: Option<f64>,
    /// If all goes on as in the slowest; None when nothing moved in it.
    pub high: Option<f64>,
}

const WINDOW: Duration = Duration::from_secs(8);
const STEP: Duration = Duration::from_millis(200);
/// What is compared for the fastest and the slowest: less says little of what comes.
const SLICE: Duration = Duration::from_secs(1);

type Sample = (Instant, u64);

/// Measures a rate over the last seconds.
#[derive(Default)]
pub struct Meter {
    samples: Mutex<VecDeque<Sample>>,
}

impl Meter {
    /// Notes how much is done now.
    pub fn note(&self, done: u64) {
        self.note_at(Instant::now(), done);
    }

    /// Bytes a second; 0 while unknown.
    pub fn rate(&self) -> u64 {
        let samples = lock(&self.samples);
        let ends = samples.front().zip(samples.back());
        let known = ends.filter(|(from, to)| to.0 - from.0 >= STEP);
        known.map_or(0, |(from, to)| rate_between(from, to) as u64)
    }

    /// How long `left` bytes will take.
    pub fn eta(&self, left: u64) -> Eta {
        if left == 0 {
            let now = Some(0.0);
            return Eta {
                expected: now,
                low: now,
                high: now,
            };
        }
        let rate = self.rate() as f64;
        let slices = self.slices();
        let fastest = slices.iter().copied().reduce(f64::max);
        let slowest = slices.iter().copied().reduce(f64::min);
        let time = |rate: f64| (rate >= 1.0).then(|| left as f64 / rate);
        Eta {
            expected: time(rate),
            low: fastest.and_then(|fastest| time(fastest.max(rate))),
            high: slowest.and_then(|slowest| time(slowest.min(rate))),
        }
    }

    /// The rates of all slices of the window.
    fn slices(&self) -> Vec<f64> {
        let samples = lock(&self.samples);
        let rate_from = |from: &Sample| {
            let to = samples.iter().find(|to| to.0 >= from.0 + SLICE)?;
            Some(rate_between(from, to))
        };
        samples.iter().filter_map(rate_from).collect()
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

fn rate_between(from: &Sample, to: &Sample) -> f64 {
    (to.1 - from.1) as f64 / (to.0 - from.0).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A meter that was told, each second, what was done in it.
    fn told(seconds: &[u64]) -> Meter {
        let (meter, start) = (Meter::default(), Instant::now());
        meter.note_at(start, 0);
        let mut done = 0;
        for (second, bytes) in (1..).zip(seconds) {
            done += bytes;
            meter.note_at(start + Duration::from_secs(second), done);
        }
        meter
    }

    #[test]
    fn the_rate_forgets_what_is_long_ago() {
        assert_eq!(Meter::default().rate(), 0);
        let mut seconds = vec![1000; 10];
        seconds.extend([10; 10]);
        assert_eq!(told(&seconds).rate(), 10);
    }

    #[test]
    fn the_end_is_expected_between_the_fastest_and_the_slowest() {
        let eta = told(&[10, 20, 30]).eta(600);
        assert_eq!(
            (eta.expected, eta.low, eta.high),
            (Some(30.0), Some(20.0), Some(60.0))
        );
        let steady = told(&[10; 8]).eta(50);
        assert_eq!((steady.low, steady.high), (Some(5.0), Some(5.0)));
    }

    #[test]
    fn what_cannot_be_told_is_not() {
        assert_eq!(Meter::default().eta(5), Eta::default());
        let stalled = told(&[10, 0]).eta(50);
        assert_eq!(
            (stalled.expected, stalled.low, stalled.high),
            (Some(10.0), Some(5.0), None)
        );
        let ended = Meter::default().eta(0);
        assert_eq!((ended.expected, ended.high), (Some(0.0), Some(0.0)));
    }
}
