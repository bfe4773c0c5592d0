//! How hard to compress: as hard as the wire leaves time for.
//!
//! The queue for the wire tells: an empty one means that the wire waits for us, a
//! full one that there is time. The rung of the ladder follows it in two ways, a
//! controller with a proportional and an integral part:
//!
//! ```text
//! rung = steady + REACH * fill          fill: -1 the queue is empty, 1 it is full
//! steady changes by DRIFT * fill a second
//! ```
//! The steady rung drifts to where chunks are compressed just as fast as the wire
//! takes them, and the queue evens out what differs between chunks. Following the
//! queue over the whole ladder at once mixes its two ends, which costs more than
//! the level between them and gives less.
//!
//! All this counts only while the wire is what is slow: a receiver that does not
//! keep up fills the queue too, and unpacking would slow it more.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::pool::lock;
use crate::sys::SendTimes;

/// What the caller asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Every chunk as it is.
    Off,
    /// Every chunk that it helps, at this zstd level.
    Level(i32),
    /// Each chunk as hard as the wire leaves time for.
    Adaptive,
}

/// zstd levels from no effort to much; None sends the chunk as it is.
const LADDER: [Option<i32>; 9] = [
    None,
    Some(-5),
    Some(-1),
    Some(1),
    Some(2),
    Some(3),
    Some(5),
    Some(7),
    Some(9),
];
/// Where to begin: a fast wire looks slow until TCP has got going.
const FIRST: f64 = 0.0;
/// Rungs that a full queue adds to the steady one, and an empty one takes away.
const REACH: f64 = 2.0;
/// Rungs a second by which the steady one goes up while the queue is full, and down
/// while it is empty.
const DRIFT: f64 = 2.0;
/// The steady rung does not move by more than goes with this time at once.
const LONGEST: Duration = Duration::from_millis(100);
/// How often to look what the connections wait for.
const PERIOD: Duration = Duration::from_millis(100);

/// The rung that the queue leads to.
struct Governor {
    steady: f64,
    last: Instant,
}

impl Governor {
    fn new() -> Self {
        Governor {
            steady: FIRST,
            last: Instant::now(),
        }
    }

    fn level(&mut self, fill: f64) -> Option<i32> {
        let now = Instant::now();
        let passed = now.duration_since(self.last);
        self.last = now;
        LADDER[self.rung(fill, passed.min(LONGEST))]
    }

    /// `fill` is -1 for an empty queue and 1 for a full one.
    fn rung(&mut self, fill: f64, passed: Duration) -> usize {
        let top = (LADDER.len() - 1) as f64;
        self.steady = (self.steady + DRIFT * fill * passed.as_secs_f64()).clamp(0.0, top);
        (self.steady + REACH * fill).round().clamp(0.0, top) as usize
    }
}

/// The policy, and what it knows of the wire.
pub struct Effort {
    compression: Compression,
    governor: Mutex<Governor>,
    /// Whether the connections mostly wait for the wire.
    wire_is_slow: AtomicBool,
    last: Mutex<(Instant, SendTimes)>,
}

impl Effort {
    /// A policy that knows nothing of the wire yet.
    pub fn new(compression: Compression) -> Self {
        Effort {
            compression,
            governor: Mutex::new(Governor::new()),
            wire_is_slow: AtomicBool::new(false),
            last: Mutex::new((Instant::now(), SendTimes::default())),
        }
    }

    /// The level for the next chunk, when `waiting` of `room` chunks stand in
    /// the queue for the wire.
    pub fn level(&self, waiting: usize, room: usize) -> Option<i32> {
        match self.compression {
            Compression::Off => None,
            Compression::Level(level) => Some(level),
            Compression::Adaptive if !self.wire_is_slow.load(Ordering::Relaxed) => None,
            Compression::Adaptive => {
                lock(&self.governor).level(2.0 * waiting as f64 / room as f64 - 1.0)
            }
        }
    }

    /// Takes in how the connections that stand have spent their time.
    pub fn note(&self, links: impl Iterator<Item = SendTimes>) {
        let mut last = lock(&self.last);
        if last.0.elapsed() < PERIOD {
            return;
        }
        let sum = links.fold(SendTimes::default(), |sum, one| SendTimes {
            busy: sum.busy + one.busy,
            peer_slow: sum.peer_slow + one.peer_slow,
            ..sum
        });
        let (_, before) = std::mem::replace(&mut *last, (Instant::now(), sum));
        let busy = sum.busy.saturating_sub(before.busy);
        let peer_slow = sum.peer_slow.saturating_sub(before.peer_slow);
        if busy > 0 {
            self.wire_is_slow
                .store(peer_slow < busy / 4, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adaptive(busy: u64, peer_slow: u64) -> Effort {
        let effort = Effort::new(Compression::Adaptive);
        lock(&effort.last).0 -= PERIOD;
        let times = SendTimes {
            busy,
            peer_slow,
            ..SendTimes::default()
        };
        effort.note([times].into_iter());
        effort
    }

    const STEP: Duration = Duration::from_millis(10);

    /// Where the governor stands when the queue has been like this for some seconds.
    fn after(seconds: f64, fill: f64) -> (Governor, usize) {
        let mut governor = Governor::new();
        let steps = (seconds / STEP.as_secs_f64()) as usize;
        let last = (0..=steps).map(|_| governor.rung(fill, STEP)).last();
        (governor, last.unwrap())
    }

    #[test]
    fn the_fuller_the_queue_for_a_slow_wire_the_higher_the_level() {
        let effort = adaptive(1000, 0);
        let levels: Vec<_> = (0..=16).map(|waiting| effort.level(waiting, 16)).collect();
        assert_eq!(levels[0], None);
        assert_eq!(levels[16], Some(-1));
        assert!(levels.is_sorted());
    }

    #[test]
    fn a_queue_that_stays_full_leads_to_the_highest_level_and_an_empty_one_to_none() {
        assert_eq!(after(5.0, 1.0).1, LADDER.len() - 1);
        assert_eq!(after(5.0, -1.0).1, 0);
    }

    #[test]
    fn a_queue_that_has_been_full_for_long_is_soon_forgotten() {
        let (mut governor, _) = after(3600.0, 1.0);
        let steps = (0..).take_while(|_| governor.rung(-1.0, STEP) > 0);
        assert!(steps.count() < 500);
    }

    /// Each rung below the fourth brings 15 chunks a second more than the wire takes.
    #[test]
    fn it_settles_where_compressing_is_as_fast_as_the_wire() {
        let mut governor = Governor::new();
        let mut waiting = 0.0f64;
        let mut rungs = Vec::new();
        for _ in 0..3000 {
            let rung = governor.rung(waiting / 8.0 - 1.0, STEP);
            rungs.push(rung);
            let per_second = 15.0 * (4.0 - rung as f64);
            waiting = (waiting + per_second * STEP.as_secs_f64()).clamp(0.0, 16.0);
        }
        let settled = &rungs[1000..];
        assert!(
            settled.iter().all(|rung| (3..=5).contains(rung)),
            "{settled:?}"
        );
        assert!((7.0..9.0).contains(&waiting), "{waiting}");
    }

    #[test]
    fn nothing_is_compressed_for_a_receiver_that_is_slow_itself() {
        assert_eq!(adaptive(1000, 900).level(16, 16), None);
        assert_eq!(adaptive(0, 0).level(16, 16), None);
    }

    #[test]
    fn what_the_caller_asked_for_holds() {
        assert_eq!(Effort::new(Compression::Off).level(16, 16), None);
        assert_eq!(Effort::new(Compression::Level(3)).level(0, 16), Some(3));
    }
}
