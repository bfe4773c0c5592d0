//! Answers of a worker on their way: several go over a connection at once.
//!
//! While there is more to place, an answer waits for the next few: a record and
//! two wake-ups for each chunk would cost more than they tell. A worker that has
//! nothing to do keeps nothing back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::frame::Header;
use crate::link::Link;

/// Most answers that wait for each other.
const TOGETHER: usize = 8;
/// Longest time that an answer waits.
const WAIT: Duration = Duration::from_millis(20);

/// What one worker has to tell.
#[derive(Default)]
pub struct Answers {
    frames: Vec<(Arc<Link>, Vec<u8>)>,
    count: usize,
    oldest: Option<Instant>,
}

impl Answers {
    /// Adds a frame for the peer of `link`; sends all when enough wait.
    pub fn add(&mut self, link: &Arc<Link>, header: &Header, payload: &[u8]) {
        let is_same = |(other, _): &(Arc<Link>, Vec<u8>)| Arc::ptr_eq(other, link);
        let known = self.frames.iter().position(is_same);
        let at = known.unwrap_or_else(|| {
            self.frames.push((Arc::clone(link), Vec::new()));
            self.frames.len() - 1
        });
        let frames = &mut self.frames[at].1;
        frames.extend(header.encode());
        frames.extend(payload);
        self.count += 1;
        let since = self.oldest.get_or_insert_with(Instant::now);
        if self.count >= TOGETHER || since.elapsed() >= WAIT {
            self.send();
        }
    }

    /// Sends all that wait. Without its acknowledgement a chunk comes again over
    /// another connection: no harm.
    pub fn send(&mut self) {
        for (link, frames) in self.frames.drain(..) {
            let _ = link.send_frames(&frames);
        }
        (self.count, self.oldest) = (0, None);
    }
}
