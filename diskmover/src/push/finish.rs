//! Whose turn it is to say that all is there.
//!
//! ```text
//!          every chunk is                a connection
//!          acknowledged                  takes the turn
//! not yet ----------------> anybody's <------------------> taken --> the receipts
//!                                        it breaks
//! ```
//! A turn that is dropped is anybody's again, so it cannot be lost with the
//! connection that had it.

use crate::pool::lock;
use crate::sync::Mutex;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    NotYet,
    Anybodys,
    Taken,
}

/// Which connection sends the root digests.
#[derive(Default)]
pub struct Finish {
    stage: Mutex<Stage>,
}

/// The right to send them, until it is dropped.
pub struct Turn<'a>(&'a Finish);

impl Finish {
    /// Notes that every chunk is acknowledged.
    pub fn allow(&self) {
        *lock(&self.stage) = Stage::Anybodys;
    }

    /// Whether every chunk is acknowledged.
    pub fn is_allowed(&self) -> bool {
        *lock(&self.stage) != Stage::NotYet
    }

    /// The turn, when it is anybody's.
    pub fn take(&self) -> Option<Turn<'_>> {
        let mut stage = lock(&self.stage);
        (*stage == Stage::Anybodys).then(|| {
            *stage = Stage::Taken;
            Turn(self)
        })
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *lock(&self.0.stage) = Stage::Anybodys;
    }
}
