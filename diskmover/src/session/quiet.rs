//! A sender that is there and sends nothing.
//!
//! Its PING keeps the connection, and with it the session, the lock of its parts
//! and a place among the sessions. It may wait for a slow source or a low limit,
//! but not for ever.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Phase, Session};
use crate::error::{Code, MoverError, Result};
use crate::pool::lock;
use crate::silence::Silence;

impl Session {
    /// Fails when a sender has been connected for too long without a frame that is
    /// more than a sign of life, and without waiting for us. After the end of the
    /// copy there is nothing to fail: then its connections are let go.
    pub fn check_sender(&self, silence: &mut Silence) -> Result<()> {
        let is_idle = self.unplaced.load(Ordering::Acquire) == 0;
        // Behind the end nothing is placed any more, whatever came.
        let is_due = self.in_use() && (is_idle || self.phase() == Phase::Done);
        let steps = self.steps.load(Ordering::Relaxed);
        let lasted = silence.look(Instant::now(), steps, is_due);
        if lasted < self.quiet {
            return Ok(());
        }
        let links = lock(&self.state).links.clone();
        if self.phase() == Phase::Done {
            links.iter().for_each(|link| link.abort());
            return Ok(());
        }
        let peers: Vec<&str> = links.iter().map(|link| link.peer.as_str()).collect();
        let text = format!(
            "the sender at {} has said for {} s only that it lives; look at its source and its limit, then copy again to go on",
            peers.join(", "),
            lasted.as_secs_f64().round()
        );
        Err(MoverError::new(Code::LinkLost, text).at_receiver())
    }
}
