//! How long the other end has given nothing but signs of life.
//!
//! PING says that it lives, not that it gets anywhere. Whoever waits for it
//! counts the time in which something was due and no step came. Time in which
//! nobody looked (a long piece of own work, a suspended host) says nothing of
//! the other end and does not count.

use std::time::{Duration, Instant};

/// The most that one look adds.
const LOOK: Duration = Duration::from_secs(1);

/// Time without a step of the other end, while one was due.
pub struct Silence {
    steps: u64,
    looked: Instant,
    lasted: Duration,
}

impl Silence {
    /// None so far.
    pub fn new(now: Instant) -> Silence {
        Silence {
            steps: 0,
            looked: now,
            lasted: Duration::ZERO,
        }
    }

    /// How long it has lasted at `now`, when `steps` were made in all and `is_due`
    /// says whether it is the other end's turn.
    pub fn look(&mut self, now: Instant, steps: u64, is_due: bool) -> Duration {
        let passed = now.saturating_duration_since(self.looked).min(LOOK);
        self.looked = now;
        if steps != self.steps {
            (self.steps, self.lasted) = (steps, Duration::ZERO);
        } else if is_due {
            self.lasted += passed;
        }
        self.lasted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF: Duration = Duration::from_millis(500);

    /// What is seen in looks half a second apart.
    fn lasted(looks: &[(u64, bool)]) -> Duration {
        let start = Instant::now();
        let mut silence = Silence::new(start);
        let look = |(at, (steps, is_due)): (u32, &(u64, bool))| {
            silence.look(start + HALF * at, *steps, *is_due)
        };
        (1..).zip(looks).map(look).last().unwrap()
    }

    #[test]
    fn only_time_in_which_something_was_due_counts() {
        assert_eq!(lasted(&[(0, true), (0, false), (0, true)]), HALF * 2);
        assert_eq!(lasted(&[(0, false); 9]), Duration::ZERO);
    }

    #[test]
    fn a_step_ends_it() {
        assert_eq!(lasted(&[(0, true), (0, true), (1, true)]), Duration::ZERO);
        assert_eq!(lasted(&[(0, true), (1, true), (1, true)]), HALF);
    }

    #[test]
    fn time_in_which_nobody_looked_does_not_count() {
        let start = Instant::now();
        let mut silence = Silence::new(start);
        let hours = Duration::from_secs(7200);
        assert_eq!(silence.look(start + hours, 0, true), LOOK);
        assert_eq!(silence.look(start, 0, true), LOOK, "a clock that goes back");
    }
}
