//! A file that a copy writes: a part, a block device, or a journal.
//!
//! All writes, zeroing and syncing of a receiver's own files go through here.
//! That is the one seam where tests cut the power (power.rs) or slow a disk down
//! (slow.rs); it does not exist in other builds.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{Advice, FallocateFlags};

/// An open file.
pub struct Store {
    file: File,
    #[cfg(test)]
    power: Option<crate::power::Supply>,
    #[cfg(test)]
    slow: std::time::Duration,
}

impl Store {
    /// Takes over an open file.
    pub fn new(file: File) -> Store {
        Store {
            #[cfg(test)]
            power: crate::power::supply(&file),
            #[cfg(test)]
            slow: crate::slow::delay(&file),
            file,
        }
    }

    /// The file, for what changes nothing in it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Writes all of `data`.
    pub fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        if let Some(power) = &self.power {
            power.before_write(&self.file, offset, data.len() as u64)?;
        }
        #[cfg(test)]
        std::thread::sleep(self.slow);
        self.file.write_all_at(data, offset)
    }

    /// Deallocates or zeroes, as `flags` say.
    pub fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        #[cfg(test)]
        if let Some(power) = &self.power {
            power.before_zero(&self.file, offset, len)?;
        }
        Ok(rustix::fs::fallocate(&self.file, flags, offset, len)?)
    }

    /// Reads until `buffer` is full.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    /// Cuts or extends.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    /// Makes durable what was written. An error is final for what was written
    /// since the last success: the kernel tells it once and may drop the pages.
    pub fn sync(&self) -> io::Result<()> {
        #[cfg(test)]
        if let Some(power) = &self.power {
            power.before_sync()?;
        }
        self.file.sync_data()?;
        #[cfg(test)]
        if let Some(power) = &self.power {
            power.synced(&self.file);
        }
        Ok(())
    }

    /// Drops clean pages from the cache, so that the next read asks the medium.
    pub fn uncache(&self, offset: u64, len: u64) {
        let len = std::num::NonZeroU64::new(len);
        let _ = rustix::fs::fadvise(&self.file, offset, len, Advice::DontNeed);
    }
}
