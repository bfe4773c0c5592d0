//! How many connections a copy has: more over long distances, while it helps.
//!
//! What one TCP connection carries over a distance is bounded by its windows: a
//! window for each round trip. So a copy to far away begins with a few and adds
//! some whenever pieces pile up before the wire, until that brings no more.

use std::time::{Duration, Instant};

/// Connections that are too few only over distances like this.
pub const FAR: Duration = Duration::from_millis(5);
/// How long the effect of a step is watched.
const PERIOD: Duration = Duration::from_secs(2);
/// A step was worth it when this much more, in per cent, goes over the wire.
const WORTH: u64 = 110;

/// The decision, and what it is taken from.
#[derive(Debug)]
pub struct Growth {
    count: usize,
    most: usize,
    began: Instant,
    sent: u64,
    looks: u32,
    waiting: u32,
    /// Bytes in the period before the last step.
    before: Option<u64>,
}

impl Growth {
    /// Begins with `count` connections; adds some up to `most`.
    pub fn new(count: usize, most: usize) -> Growth {
        Growth {
            count,
            most,
            began: Instant::now(),
            sent: 0,
            looks: 0,
            waiting: 0,
            before: None,
        }
    }

    /// One look: the bytes sent so far, whether pieces wait for the wire and
    /// nothing else, and the time of a round trip. The number of connections to
    /// have from now on.
    pub fn look(&mut self, now: Instant, sent: u64, wire_is_full: bool, trip: Duration) -> usize {
        if self.count >= self.most || trip < FAR {
            return self.count;
        }
        self.looks += 1;
        self.waiting += u32::from(wire_is_full);
        if now.saturating_duration_since(self.began) < PERIOD {
            return self.count;
        }
        let carried = sent.saturating_sub(self.sent);
        if self.waiting * 2 > self.looks {
            match self.before {
                Some(before) if carried * 100 < before * WORTH => self.most = self.count,
                _ => self.count = (self.count + self.count.div_ceil(2)).min(self.most),
            }
            self.before = Some(carried);
        } else {
            self.before = None;
        }
        (self.began, self.sent, self.looks, self.waiting) = (now, sent, 0, 0);
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs for a minute over a wire that carries `each` bytes a second for each
    /// connection and `all` at most; the number of connections at the end.
    fn settle(each: u64, all: u64, full: bool, trip: Duration) -> usize {
        let mut growth = Growth::new(4, 32);
        let (start, mut sent, mut count) = (growth.began, 0, 4);
        for tick in 1..=600 {
            sent += (each * count as u64).min(all) / 10;
            let now = start + tick * Duration::from_millis(100);
            count = growth.look(now, sent, full, trip);
        }
        count
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn connections_are_added_as_long_as_they_help() {
        assert_eq!(settle(MIB, 1000 * MIB, true, FAR), 32);
        let enough = settle(MIB, 10 * MIB, true, FAR);
        assert!((10..=21).contains(&enough), "{enough}");
        assert_eq!(settle(100 * MIB, 10 * MIB, true, FAR), 6, "one try");
    }

    #[test]
    fn near_by_or_waiting_for_something_else_there_are_no_more() {
        assert_eq!(settle(MIB, 1000 * MIB, true, FAR / 2), 4);
        assert_eq!(settle(MIB, 1000 * MIB, false, FAR), 4);
    }
}
