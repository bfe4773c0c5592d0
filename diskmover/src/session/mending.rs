//! What a session does with a frame that came corrupt: it asks for it again.

use std::sync::atomic::{AtomicBool, Ordering};

use super::Session;
use crate::base;
use crate::error::{Code, MoverError, Result};
use crate::frame::{HELLO_SENDS_AGAIN, Header};
use crate::link::Link;
use crate::note;
use crate::repeats::Repeats;
use crate::target::Taken;

/// Why the content of a frame is not placed.
pub(super) enum Refused {
    /// It is not what its sender hashed: it can come again.
    Corrupt(String),
    /// The session cannot go on.
    Failed(MoverError),
}

impl From<MoverError> for Refused {
    fn from(error: MoverError) -> Self {
        Refused::Failed(error)
    }
}

/// What came corrupt in a session.
#[derive(Default)]
pub(super) struct Mending {
    /// The sender said in HELLO that it sends a chunk again.
    understood: AtomicBool,
    repeats: Repeats,
    told: AtomicBool,
}

impl Session {
    /// Notes what the sender can do, as its HELLO says.
    pub fn hear_abilities(&self, hello: &Header) {
        let again = hello.logical_len & HELLO_SENDS_AGAIN != 0;
        self.mending.understood.store(again, Ordering::Relaxed);
    }

    /// The answer to a frame that came corrupt: all of it is wanted once more.
    /// Fails when that was said often enough, or the sender knows no such answer.
    pub(super) fn ask_again(&self, header: &Header, why: &str, link: &Link) -> Result<Taken> {
        let corrupt = |text: String| {
            let text = format!("from {}: {text}", link.peer);
            Err(self.corrupt(header, text))
        };
        if !self.mending.understood.load(Ordering::Relaxed) {
            return corrupt(why.to_owned());
        }
        if let Err(enough) = self.mending.repeats.count(header.volume, header.offset) {
            return corrupt(format!(
                "{why}; {enough}: check the memory of both hosts, and what was copied lately"
            ));
        }
        note::once(&self.mending.told, || {
            format!(
                "a chunk of {:?} at byte {} came corrupt from {} ({why}) and was asked for again; TLS lets nothing of the kind through, so suspect the memory of one of the two hosts",
                self.specs[usize::from(header.volume)].volume,
                header.offset,
                link.peer
            )
        });
        Ok(Taken::Without(base::all(header.logical_len as usize)))
    }

    /// The error for content that is not what its sender hashed.
    pub(super) fn corrupt(&self, header: &Header, why: String) -> MoverError {
        MoverError::new(Code::ChunkCorrupt, why)
            .at_receiver()
            .in_volume(&self.specs[usize::from(header.volume)].volume)
            .at(header.offset)
    }
}
