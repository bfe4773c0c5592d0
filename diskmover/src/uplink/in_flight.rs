//! What one connection has taken over and the receiver has not answered.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::frame::Header;
use crate::pool::lock;

/// Volume and offset: what an answer is about.
type Place = (u16, u64);

/// The frames of one connection that have no answer yet.
pub(super) struct InFlight<'a> {
    /// Frames of all connections that were sent and have none.
    owed: &'a AtomicUsize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// With the time at which all of it was sent, once it was.
    frames: HashMap<Place, (Header, Option<Instant>)>,
    answered: Option<Instant>,
}

impl<'a> InFlight<'a> {
    /// None yet; `owed` counts those of all connections.
    pub(super) fn new(owed: &'a AtomicUsize) -> Self {
        InFlight {
            owed,
            state: Mutex::default(),
        }
    }

    /// Takes a frame over: it goes back if the connection breaks.
    pub(super) fn take(&self, header: &Header) {
        let place = (header.volume, header.offset);
        let frame = (header.clone(), None);
        let before = lock(&self.state).frames.insert(place, frame);
        self.settle(before.and_then(|(_, sent)| sent).is_some().into());
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        lock(&self.state).frames.len()
    }

    /// Notes that all of it is sent. Its answer may have been faster.
    pub(super) fn note_sent(&self, header: &Header) {
        let mut state = lock(&self.state);
        let known = state.frames.get_mut(&(header.volume, header.offset));
        if let Some((_, sent @ None)) = known {
            *sent = Some(Instant::now());
            self.owed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The frame that an answer is about, if there is one.
    pub(super) fn answer(&self, answer: &Header) -> Option<Header> {
        let mut state = lock(&self.state);
        let (header, sent) = state.frames.remove(&(answer.volume, answer.offset))?;
        state.answered = Some(Instant::now());
        self.settle(sent.is_some().into());
        Some(header)
    }

    /// Whether something that was sent so long ago has no answer, nor has anything
    /// else got one since. What is not sent yet, because of a limit or of a slow
    /// wire, is not the receiver's to answer.
    pub(super) fn is_stalled(&self, patience: Duration) -> bool {
        let state = lock(&self.state);
        let oldest = state.frames.values().filter_map(|(_, sent)| *sent).min();
        oldest.is_some_and(|oldest| {
            let last = state.answered.map_or(oldest, |at| at.max(oldest));
            last.elapsed() > patience
        })
    }

    /// What goes back, since the connection is gone.
    pub(super) fn give_back(&self) -> Vec<Header> {
        let frames = std::mem::take(&mut lock(&self.state).frames);
        let sent = frames.values().filter(|(_, sent)| sent.is_some());
        self.settle(sent.count());
        frames.into_values().map(|(header, _)| header).collect()
    }

    fn settle(&self, count: usize) {
        self.owed.fetch_sub(count, Ordering::Relaxed);
    }
}
