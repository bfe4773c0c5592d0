//! Which stage limits a copy: the one before which pieces pile up.
//!
//! A look at the queues tells of an instant only. Each is a vote, older votes
//! fade, and the stage with the most of them is named: so the name stands still
//! while the copy goes on as it does.

use std::sync::Mutex;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::Relaxed;

use crate::pool::{Pool, lock};

/// What can be the slowest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reading the source.
    SourceRead,
    /// Scanning, hashing and compressing.
    Compress,
    /// The link.
    Network,
    /// All that the receiver does: unpacking, writing, making durable.
    TargetWrite,
    /// The limit that the caller has set.
    Throttle,
}

const STAGES: [Stage; 5] = [
    Stage::SourceRead,
    Stage::Compress,
    Stage::Network,
    Stage::TargetWrite,
    Stage::Throttle,
];
/// What is left of a vote at the next look: of 50 looks a second, the last ones count.
const FADE: f64 = 0.98;

impl Stage {
    /// As progress tells it.
    pub fn name(self) -> &'static str {
        match self {
            Stage::SourceRead => "source-read",
            Stage::Compress => "compress",
            Stage::Network => "network",
            Stage::TargetWrite => "target-write",
            Stage::Throttle => "throttle",
        }
    }
}

/// The votes so far.
#[derive(Default)]
pub struct Bottleneck {
    votes: Mutex<[f64; STAGES.len()]>,
}

impl Bottleneck {
    /// Takes in one look.
    pub fn vote(&self, stage: Stage) {
        let mut votes = lock(&self.votes);
        for (vote, of) in votes.iter_mut().zip(STAGES) {
            *vote = *vote * FADE + f64::from(of == stage);
        }
    }

    /// The name of the stage with the most votes; empty before the first one.
    pub fn name(&self) -> &'static str {
        let votes = lock(&self.votes);
        let most = votes
            .iter()
            .zip(STAGES)
            .max_by(|(one, _), (other, _)| one.total_cmp(other));
        most.filter(|(vote, _)| **vote > 0.0)
            .map_or("", |(_, stage)| stage.name())
    }
}

/// What was said lately, when each answer tells of an instant: the last ones count.
///
/// A receiver whose writers end together answers in bursts, and at the end of each its
/// queue is short, however slow they are.
#[derive(Default)]
pub struct Lately(AtomicU8);

impl Lately {
    /// Takes in what an answer says.
    pub fn note(&self, is_so: bool) {
        let shift = |said| Some(said << 1 | u8::from(is_so));
        let _ = self.0.fetch_update(Relaxed, Relaxed, shift);
    }

    /// Whether half of the last answers said so.
    pub fn mostly(&self) -> bool {
        self.0.load(Relaxed).count_ones() >= u8::BITS / 2
    }
}

/// Whether pieces pile up in a queue, for which the pool may have too little memory
/// to ever fill it.
pub fn piles_up(waiting: usize, room: usize, pool: &Pool) -> bool {
    waiting * 2 >= room.min(pool.chunks() / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::CHUNK;

    #[test]
    fn a_name_stands_still_among_strays_and_follows_a_change() {
        let found = Bottleneck::default();
        assert_eq!(found.name(), "");
        for look in 0..100 {
            found.vote(match look % 4 {
                0 => Stage::SourceRead,
                _ => Stage::Network,
            });
            assert_eq!(found.name() == "network", look > 0, "look {look}");
        }
        (0..100).for_each(|_| found.vote(Stage::Throttle));
        assert_eq!(found.name(), "throttle");
    }

    #[test]
    fn a_burst_of_answers_ends_with_an_empty_queue_and_tells_the_same() {
        let slow = Lately::default();
        assert!(!slow.mostly());
        for waiting in [4, 3, 2, 1].iter().cycle().take(40) {
            slow.note(*waiting > 1);
        }
        assert!(slow.mostly());
        (0..8).for_each(|_| slow.note(false));
        assert!(!slow.mostly());
    }

    #[test]
    fn a_small_pool_fills_no_queue() {
        let (small, large) = (Pool::new(8 * CHUNK), Pool::new(64 * CHUNK));
        assert!(piles_up(2, 16, &small) && !piles_up(1, 16, &small));
        assert!(piles_up(8, 16, &large) && !piles_up(7, 16, &large));
    }
}
