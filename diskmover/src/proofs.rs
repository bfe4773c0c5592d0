//! Which segments the medium has given back since they were last written.
//!
//! ```text
//!          durable        take              settle
//! written --------> due ------> looked at ---------> proven, or lost
//!    ^               |              |                   |
//!    +---------------+--------------+-------------------+  written again
//! ```
//! Readers take segments while the rest of the volume still comes. What is written
//! again, because it was sent twice, is read back again: a look that began before
//! counts for nothing, however it ends.

use std::collections::VecDeque;
use std::time::Duration;

use crate::pool::lock;
use crate::sync::{Condvar, Mutex, PoisonError};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Written,
    Due,
    LookedAt,
    Proven,
    Lost,
}

/// A look at a segment that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// The segment.
    pub segment: usize,
    /// Tells it from other looks at the same segment.
    number: u64,
}

struct State {
    standings: Vec<Standing>,
    /// Those that are due, in order; more than those, once one was written again.
    due: VecDeque<u32>,
    /// What is looked at, as far as it counts.
    looks: Vec<Look>,
    begun: u64,
    unproven: usize,
    lost: Vec<usize>,
}

/// How far the segments of a volume are proven.
pub struct Proofs {
    state: Mutex<State>,
    looked: Condvar,
}

impl Proofs {
    /// Nothing proven, of so many segments.
    pub fn new(segments: usize) -> Proofs {
        Proofs {
            state: Mutex::new(State {
                standings: vec![Standing::Written; segments],
                due: VecDeque::new(),
                looks: Vec::new(),
                begun: 0,
                unproven: segments,
                lost: Vec::new(),
            }),
            looked: Condvar::new(),
        }
    }

    /// Notes that something was written to a segment.
    pub fn note_written(&self, segment: usize) {
        let mut state = lock(&self.state);
        match std::mem::replace(&mut state.standings[segment], Standing::Written) {
            Standing::Proven => state.unproven += 1,
            Standing::LookedAt => {
                state.looks.retain(|look| look.segment != segment);
                self.looked.notify_all();
            }
            Standing::Lost => state.lost.retain(|other| *other != segment),
            Standing::Written | Standing::Due => {}
        }
    }

    /// Notes that a segment is complete, and all that was written to it durable.
    pub fn note_durable(&self, segment: usize) {
        let mut state = lock(&self.state);
        if state.standings[segment] == Standing::Written {
            state.standings[segment] = Standing::Due;
            state.due.push_back(segment as u32);
        }
    }

    /// A segment to read back; None when none is due.
    pub fn take(&self) -> Option<Look> {
        let mut state = lock(&self.state);
        loop {
            let segment = state.due.pop_front()? as usize;
            if state.standings[segment] == Standing::Due {
                state.standings[segment] = Standing::LookedAt;
                state.begun += 1;
                let number = state.begun;
                let look = Look { segment, number };
                state.looks.push(look);
                return Some(look);
            }
        }
    }

    /// Ends a look: the medium gave the segment back as it should be, or not.
    pub fn settle(&self, look: Look, is_right: bool) {
        let mut state = lock(&self.state);
        let Some(at) = state.looks.iter().position(|other| *other == look) else {
            return;
        };
        state.looks.swap_remove(at);
        if is_right {
            state.standings[look.segment] = Standing::Proven;
            state.unproven -= 1;
        } else {
            state.standings[look.segment] = Standing::Lost;
            state.lost.push(look.segment);
        }
        self.looked.notify_all();
    }

    /// Waits until nothing is looked at, at most `timeout`; true when that is so.
    pub fn are_settled(&self, timeout: Duration) -> bool {
        let under_way = |state: &mut State| !state.looks.is_empty();
        let (state, _) = self
            .looked
            .wait_timeout_while(lock(&self.state), timeout, under_way)
            .unwrap_or_else(PoisonError::into_inner);
        state.looks.is_empty()
    }

    /// The segments that the medium did not give back.
    pub fn lost(&self) -> Vec<usize> {
        let mut lost = lock(&self.state).lost.clone();
        lost.sort_unstable();
        lost
    }

    /// Whether all segments are proven.
    pub fn are_complete(&self) -> bool {
        lock(&self.state).unproven == 0
    }
}
