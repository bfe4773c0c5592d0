//! Which connections stand, and for how long none that was of use has.
//!
//! Both under one lock: whoever looks while the last one goes must not see that none is
//! left, and an old time. A connection stands for hours, and the time is noted when it ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::link::Link;

/// The connections of a copy.
pub struct Standing<L = Link> {
    links: Vec<Arc<L>>,
    /// When one that was of use last stood; before that, when the copy began.
    last: Instant,
    ever_opened: bool,
}

impl<L> Standing<L> {
    /// None, from now on.
    pub fn new(now: Instant) -> Self {
        Standing {
            links: Vec::new(),
            last: now,
            ever_opened: false,
        }
    }

    /// Those that stand.
    pub fn links(&self) -> &[Arc<L>] {
        &self.links
    }

    /// A connection stands.
    pub fn add(&mut self, link: &Arc<L>) {
        self.links.push(Arc::clone(link));
    }

    /// A connection is gone. Those that break at once, one after the other, are as good
    /// as none, and of no use.
    pub fn remove(&mut self, link: &Arc<L>, was_useful: bool, now: Instant) {
        self.links.retain(|other| !Arc::ptr_eq(other, link));
        if was_useful {
            self.last = now;
        }
    }

    /// The receiver has opened the volumes over a connection.
    pub fn note_opened(&mut self) {
        self.ever_opened = true;
    }

    /// Whether it ever did.
    pub fn ever_opened(&self) -> bool {
        self.ever_opened
    }

    /// How long no useful connection has stood; zero while any stands.
    pub fn missing_for(&self, now: Instant) -> Duration {
        match self.links.is_empty() {
            true => now.saturating_duration_since(self.last),
            false => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn time_counts_from_the_end_of_the_last_connection_that_was_of_use() {
        let began = Instant::now();
        let mut standing = Standing::<u8>::new(began);
        assert_eq!(standing.missing_for(began + HOUR), HOUR);
        let (one, other) = (Arc::new(1), Arc::new(2));
        standing.add(&one);
        standing.add(&other);
        standing.remove(&one, true, began + HOUR);
        assert_eq!(standing.missing_for(began + 2 * HOUR), Duration::ZERO);
        standing.remove(&other, true, began + 2 * HOUR);
        assert_eq!(standing.missing_for(began + 2 * HOUR), Duration::ZERO);
        assert_eq!(standing.missing_for(began + 3 * HOUR), HOUR);
        standing.add(&one);
        standing.remove(&one, false, began + 3 * HOUR);
        assert_eq!(standing.missing_for(began + 3 * HOUR), HOUR);
        assert!(standing.links().is_empty());
    }
}
