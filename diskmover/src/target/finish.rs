//! How a part becomes the target: its digest verified, its medium proven, its
//! name given.

use crate::audit::{self, Expected};
use crate::device;
use crate::digest::{self, CHUNK, Hash, SEGMENT_CHUNKS};
use crate::error::{Code, MoverError, Result};
use crate::messages::Receipt;
use crate::pool::lock;
use crate::publish;
use crate::receipt;
use crate::target::{Place, Proof, Target};
use crate::unreadable::Unreadable;

impl Target {
    /// Makes all durable and compares the root digest with the sender's.
    pub fn verify(&self, root: &Hash) -> Result<()> {
        self.barrier()?;
        let book = lock(&self.book);
        let Some(own) = book.ledger.root() else {
            let text = "the sender says that it is done, but chunks are missing";
            return Err(self.about(MoverError::new(Code::Protocol, text)));
        };
        if own != *root {
            // Nobody can tell which chunk is wrong: each has to be compared.
            self.names.remove(&self.names.journal)?;
            let text = format!(
                "the sender's digest is {}, the target's is {}; nothing was published, and the next attempt compares every chunk again",
                digest::hex(root),
                digest::hex(&own)
            );
            return Err(self.about(MoverError::new(Code::DigestMismatch, text)));
        }
        Ok(())
    }

    /// Reads all of it back and compares it with what was placed, if that is wanted.
    ///
    /// What the medium does not give back is missing from then on.
    pub fn prove(&self, go_on: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        if self.spec.care.proof == Proof::Written {
            return Ok(());
        }
        let segments: Vec<usize> = (0..lock(&self.book).ledger.segments()).collect();
        let expected = |segment| Expected::of(&lock(&self.book).ledger, segment);
        let bad = audit::failing(&self.medium, &segments, &expected, go_on);
        let Some(bad) = bad else {
            let text = "the session ended while the target was read back";
            return Err(self.about(MoverError::new(Code::SessionClosed, text)));
        };
        let Some(first) = bad.first() else {
            return Ok(());
        };
        let noted = lock(&self.journal).forget(&bad);
        noted.map_err(|e| self.failed("cannot write the journal of", &e))?;
        let mut book = lock(&self.book);
        bad.iter().for_each(|segment| book.ledger.forget(*segment));
        let text = format!(
            "{} does not give back what was written to it, in {} of its 64 MiB segments; nothing was published. Check the device; the next attempt writes them again",
            self.names.shown,
            bad.len()
        );
        let offset = *first as u64 * SEGMENT_CHUNKS * CHUNK;
        Err(self.about(MoverError::new(Code::TargetIo, text).at(offset)))
    }

    /// Gives the verified part its final name.
    pub fn publish(&self, wire: u64, unreadable: Unreadable) -> Result<Receipt> {
        let mut receipt = {
            let book = lock(&self.book);
            Receipt {
                volume: self.spec.volume.clone(),
                size: book.ledger.size(),
                data: book.ledger.data_bytes(),
                wire,
                root: book.ledger.root().unwrap_or_default(),
                mode: self.mode,
                unreadable,
                allocated: None,
            }
        };
        let file = self.medium.file();
        let length = match &self.image {
            Some(image) => image.layout().file_size(),
            None => receipt.size,
        };
        self.map_image()?;
        let published = match self.spec.care.place {
            Place::File => publish::publish(&self.names, file, &self.spec, &receipt, length),
            Place::Device { .. } => device::publish(&self.names, file, self.id, &receipt),
        };
        published.map_err(|e| e.in_volume(&self.spec.volume))?;
        if self.spec.care.place == Place::File {
            let stat = rustix::fs::fstat(file);
            receipt.allocated = stat.ok().map(|stat| receipt::allocated(&stat));
        }
        Ok(receipt)
    }

    /// Makes the part an image, if it is to become one.
    fn map_image(&self) -> Result<()> {
        let Some(image) = &self.image else {
            return Ok(());
        };
        let file = self.medium.file();
        let written = image.write(file).and_then(|()| self.medium.sync());
        written.map_err(|e| self.failed("cannot write the tables of", &e))?;
        if self.spec.care.proof == Proof::Readback {
            let same = image.is_written(file);
            let same = same.map_err(|e| self.failed("cannot read back the tables of", &e))?;
            if !same {
                let text = format!(
                    "{} does not give back the tables of the image that were written to it; nothing was published. Check the device",
                    self.names.shown
                );
                return Err(self.about(MoverError::new(Code::TargetIo, text)));
            }
        }
        Ok(())
    }
}
