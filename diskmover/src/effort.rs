//! How hard to compress: as hard as the wire leaves time for.
//!
//! An empty queue for the wire means that the wire waits for us: chunks go as
//! they are. A full one means that there is time. In between the queue settles
//! where chunks are compressed just as fast as the wire takes them, which mixes
//! two levels. All this counts only while the wire is what is slow: a receiver
//! that does not keep up fills the queue too, and unpacking would slow it more.

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
const LADDER: [Option<i32>; 8] = [
    None,
    Some(-5),
    Some(-1),
    Some(1),
    Some(3),
    Some(5),
    Some(7),
    Some(9),
];
/// How often to look what the connections wait for.
const PERIOD: Duration = Duration::from_millis(100);

/// The policy, and what it knows of the wire.
pub struct Effort {
    compression: Compression,
    /// Whether the connections mostly wait for the wire.
    wire_is_slow: AtomicBool,
    last: Mutex<(Instant, SendTimes)>,
}

impl Effort {
    /// A policy that knows nothing of the wire yet.
    pub fn new(compression: Compression) -> Self {
        Effort {
            compression,
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
                let rung = waiting * LADDER.len() / room;
                LADDER[rung.min(LADDER.len() - 1)]
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

    #[test]
    fn the_fuller_the_queue_for_a_slow_wire_the_higher_the_level() {
        let effort = adaptive(1000, 0);
        let levels: Vec<_> = (0..=16).map(|waiting| effort.level(waiting, 16)).collect();
        assert_eq!(levels[0], None);
        assert_eq!(levels[16], Some(9));
        assert!(levels.is_sorted());
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
