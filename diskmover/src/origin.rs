//! Where a volume is read: what a caller of `Push` says.

use std::path::PathBuf;

use crate::error::{Code, MoverError, Result};
use crate::nbd::address::ExportSpec;
use crate::nbd::export::NbdSource;
use crate::salvage::{OnReadError, Salvage};
use crate::source::{FileSource, Source};

/// A file, or a disk as its guest sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A regular file or a block device.
    File(PathBuf),
    /// An NBD export.
    Nbd(ExportSpec),
}

impl Origin {
    /// Opens it; `nonce` is of this attempt alone.
    pub fn open(&self, nonce: &[u8; 16], on_read_error: OnReadError) -> Result<Box<dyn Source>> {
        Ok(match (self, on_read_error) {
            (Origin::File(path), OnReadError::Fail) => Box::new(FileSource::open(path)?),
            (Origin::File(path), OnReadError::Zero) => {
                Box::new(FileSource::salvaged(path, Salvage::new(nonce))?)
            }
            (Origin::Nbd(spec), OnReadError::Fail) => Box::new(NbdSource::open(spec, nonce)?),
            (Origin::Nbd(_), OnReadError::Zero) => {
                // Its server says EIO of whatever goes wrong behind it.
                let text = "what an NBD export does not give cannot be told from what its medium has lost; copy the file or device itself to go on with zeros";
                return Err(MoverError::new(Code::InvalidArgument, text));
            }
        })
    }
}

impl From<PathBuf> for Origin {
    fn from(path: PathBuf) -> Self {
        Origin::File(path)
    }
}
