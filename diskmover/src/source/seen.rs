//! What is seen of a source, so that no write to it goes unnoticed.

use std::fs::File;

use crate::error::{Code, MoverError, Result};
use crate::identity::{self, Identity};
use crate::note;
use crate::written::{self, Written};

/// All that a write to a source changes.
#[derive(Clone, Copy)]
pub struct Seen {
    pub identity: Identity,
    /// Of a device, if it is counted.
    written: Option<Written>,
}

/// A source to look at.
#[derive(Clone, Copy)]
pub struct Look<'a> {
    pub file: &'a File,
    /// The same with O_DIRECT, where it is taken.
    pub direct: Option<&'a File>,
    pub is_block: bool,
    /// What messages call it.
    pub shown: &'a str,
}

impl Seen {
    /// Whether nothing has happened between the two that would be seen in them.
    pub fn is_like(&self, other: &Seen) -> bool {
        let is_unwritten = match (self.written, other.written) {
            (Some(written), Some(other)) => written.is_like(other),
            (before, after) => before == after,
        };
        is_unwritten && self.identity.is_like(&other.identity)
    }
}

impl Look<'_> {
    /// The first look, of which the identity is known. Leaves a note about a device
    /// that is not counted, or not in all; and, `despite_errors`, about one that does not
    /// let itself be asked: a dying disk is read for what it still gives.
    pub fn first(self, identity: Identity, despite_errors: bool) -> Result<Seen> {
        let written = match self.is_block.then(|| self.count()) {
            None => None,
            Some(Err(error)) if despite_errors => {
                note::leave(format!(
                    "{}; make sure that nobody writes to it",
                    error.message
                ));
                return Ok(Seen {
                    identity,
                    written: None,
                });
            }
            Some(written) => written?,
        };
        if written.is_some() && written::misses_discards(self.file) {
            note::leave(format!(
                "{} is an md device, of which the kernel does not count all discards, so one during the copy can go unnoticed; make sure that nobody trims it",
                self.shown
            ));
        }
        if self.is_block && written.is_none() {
            note::leave(format!(
                "the kernel does not count what is written to {}, so a write during the copy goes unnoticed; make sure that nobody writes to it",
                self.shown
            ));
        }
        Ok(Seen { identity, written })
    }

    /// Another look. Fails when the device was counted before, and is not any more:
    /// nobody can tell what was written to it.
    pub fn again(self, before: &Seen) -> Result<Seen> {
        let identity = identity::settled(self.file, self.is_block)
            .map_err(|e| MoverError::source_io(&format!("cannot stat {}", self.shown), &e))?;
        let written = match before.written {
            Some(_) => Some(self.count()?.ok_or_else(|| self.uncounted())?),
            None => None,
        };
        Ok(Seen { identity, written })
    }

    /// What was written to a device; None when it is not counted.
    fn count(self) -> Result<Option<Written>> {
        let unknown = |e| {
            let what = format!(
                "cannot find out what is written to {}, so a change could go unnoticed",
                self.shown
            );
            MoverError::source_io(&what, &e)
        };
        let is_counted = self.direct.map_or(Ok(true), written::is_counted);
        if !is_counted.map_err(unknown)? {
            return Ok(None);
        }
        written::of(self.file).map_err(unknown)
    }

    fn uncounted(self) -> MoverError {
        let text = format!(
            "the kernel has ceased to count what is written to {}, so nobody knows whether it changed; write 1 to queue/iostats of the disk in /sys/block and copy again",
            self.shown
        );
        MoverError::new(Code::SourceIo, text)
    }
}
