//! A volume to read, and how it is told from itself after a change.

mod file;
mod seen;

use std::ops::Range;

use crate::digest::Bitmap;
use crate::error::{Code, MoverError, Result};
pub use crate::identity::Identity;
use crate::mode::CopyMode;
use crate::plan::Extents;
use crate::revision::Revision;
use crate::salvage::Salvage;

pub use file::FileSource;

/// An open volume that can be read.
pub trait Source: Send + Sync {
    /// As it was when it was opened.
    fn identity(&self) -> Identity;

    /// Learns what is told of it, which can last: until then its identity is good for
    /// nothing but its size, and its revision is not known. `abort` ends it.
    fn learn(&self) -> Result<()> {
        Ok(())
    }

    /// Whether its identity is what somebody calls its content, and holds no time.
    fn is_named(&self) -> bool {
        false
    }

    /// What its bytes are.
    fn mode(&self) -> CopyMode {
        CopyMode::Verbatim
    }

    /// What has changed since an earlier copy, if that is known.
    fn revision(&self) -> Option<&Revision> {
        None
    }

    /// Where its data is; without trust in reported holes, everywhere.
    fn extents(&self, trust_holes: bool) -> Result<Box<dyn Extents + Send>>;

    /// Reads `ranges` of chunk `chunk` to their places in `buffer`; returns the
    /// blocks that were read. The others are holes, and hold anything.
    ///
    /// `buffer` has the length of the chunk rounded up to 4 KiB, and is aligned.
    fn read_chunk(&self, chunk: u64, ranges: &[Range<u64>], buffer: &mut [u8]) -> Result<Bitmap>;

    /// Fails when the source is not what it was when it was opened.
    fn check_unchanged(&self) -> Result<()>;

    /// Fails when somebody can write to it while it is copied.
    fn check_unused(&self) -> Result<()> {
        Ok(())
    }

    /// Whether the holes that it reports are believed unless somebody says otherwise.
    fn has_sound_holes(&self) -> bool {
        true
    }

    /// Takes the source as it is now for what is copied; fails when it cannot be
    /// copied from the start again.
    fn renew(&self) -> Result<()> {
        self.check_unchanged()
    }

    /// What messages call it.
    fn shown(&self) -> String;

    /// The error that says that the source changed.
    fn changed(&self, how: &str) -> MoverError {
        let shown = self.shown();
        let text = format!("{shown} changed while it was copied ({how}); nothing was published");
        MoverError::new(Code::SourceChanged, text)
    }

    /// Makes reads that could last long fail soon, from another thread.
    fn abort(&self) {}

    /// What could not be read, if the source is read around that.
    fn salvage(&self) -> Option<&Salvage> {
        None
    }
}
