//! How long a receiver that only says that it lives is waited for.
//!
//! ```text
//! one connection   sent and unanswered for `stall`    it breaks, its frames go again
//! all of them      the same for 2 * `stall`           the copy ends, LINK_LOST
//! OPEN, FINISH     no answer, whoever asks, for       the copy ends, LINK_LOST
//!                  6 * `stall` and all that is copied at 10 MiB/s
//! ```
//! What a limit, a slow source or a slow wire holds up is not sent, and nothing is
//! due for it. In OPEN and FINISH the receiver may read all that it has of the
//! volumes, and seeds of which we know nothing.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Shared;
use crate::error::{Code, MoverError, Result};
use crate::feed::Volume;
use crate::pool::lock;

/// What a copy gives a receiver: longer than a hung disk or a busy one takes for a
/// chunk, and than the slowest frame that is not taken for dead.
pub const STALL: Duration = Duration::from_secs(600);
/// Bytes a second that a receiver reads at least, when it reads what it has.
const SLOWEST_READ: u64 = 10 << 20;

impl Shared {
    /// Fails when the receiver has said for too long only that it lives.
    pub(super) fn check_progress(&self) -> Result<()> {
        let opened = self.opened.load(Ordering::Acquire);
        let is_copying = opened && !self.finish.is_allowed();
        let is_due = !is_copying || self.owed.load(Ordering::Relaxed) > 0;
        let stands = !lock(&self.standing).links().is_empty();
        let steps = self.answers.load(Ordering::Relaxed);
        let mut silence = lock(&self.silence);
        let lasted = silence.look(Instant::now(), steps, stands && is_due);
        let (patience, what) = match is_copying {
            true => (self.job.stall * 2, "acknowledges nothing of what it gets"),
            false if opened => (self.patience_for_reading(), "does not publish"),
            false => (self.patience_for_reading(), "does not open the volumes"),
        };
        if lasted < patience {
            return Ok(());
        }
        let text = format!(
            "{} says that it lives and {what}, for {} s; look at its disk and its log, then copy again to go on",
            self.job.to,
            lasted.as_secs_f64().round()
        );
        Err(MoverError::new(Code::LinkLost, text))
    }

    fn patience_for_reading(&self) -> Duration {
        let bytes: u64 = self.volumes.iter().map(Volume::size).sum();
        self.job.stall * 6 + Duration::from_secs(bytes / SLOWEST_READ)
    }
}
