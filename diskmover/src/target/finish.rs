//! How a part becomes the target: its digest verified, its name given.

use crate::device;
use crate::digest::{self, Hash};
use crate::error::{Code, MoverError, Result};
use crate::messages::Receipt;
use crate::pool::lock;
use crate::publish;
use crate::receipt;
use crate::target::{Place, Target};
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
        if self.spec.care.reads_back() {
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
