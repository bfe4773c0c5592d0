//! Where a volume is read: what a caller of `Push` says.

use std::path::PathBuf;

use crate::error::Result;
use crate::nbd::address::ExportSpec;
use crate::nbd::export::NbdSource;
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
    pub fn open(&self, nonce: &[u8; 16]) -> Result<Box<dyn Source>> {
        Ok(match self {
            Origin::File(path) => Box::new(FileSource::open(path)?),
            Origin::Nbd(spec) => Box::new(NbdSource::open(spec, nonce)?),
        })
    }
}

impl From<PathBuf> for Origin {
    fn from(path: PathBuf) -> Self {
        Origin::File(path)
    }
}
