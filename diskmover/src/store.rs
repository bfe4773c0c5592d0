//! A file that a copy writes: a part, a block device, or a journal.
//!
//! All writes, zeroing and syncing of a receiver's own files go through here; what
//! happens to their names goes through naming.rs. These are the seams where tests cut
//! the power (power.rs) and break storage or slow it down (faults.rs); neither exists in
//! other builds.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{Advice, FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::passing::Passing;

/// A file of content. In unit tests its storage can fail.
#[cfg(not(test))]
pub type Disk = File;
#[cfg(test)]
pub use crate::faults::Disk;

/// Takes a file for what it is.
#[cfg(not(test))]
pub fn disk(file: File) -> Disk {
    file
}

/// Takes a file for one whose storage can fail.
#[cfg(test)]
pub fn disk(file: File) -> Disk {
    Disk::new(file)
}

/// Makes a file durable, with its length, mode and owner.
pub fn sync_all(file: &File) -> rustix::io::Result<()> {
    #[cfg(test)]
    return crate::faults::sync_all(file);
    #[cfg(not(test))]
    rustix::fs::fsync(file)
}

/// Reads by a call that is not the usual one.
pub fn read_by(
    file: &Disk,
    out: &mut [u8],
    offset: u64,
    call: fn(&File, &mut [u8], u64) -> io::Result<usize>,
) -> io::Result<usize> {
    #[cfg(test)]
    return file.read_by(out, offset, call);
    #[cfg(not(test))]
    call(file, out, offset)
}

/// An open file.
pub struct Store {
    file: Disk,
    passing: Passing,
    #[cfg(test)]
    power: Option<crate::power::Supply>,
}

impl Store {
    /// Takes over an open file.
    pub fn new(file: File) -> Store {
        Store {
            #[cfg(test)]
            power: crate::power::supply(&file),
            file: disk(file),
            passing: Passing::default(),
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
        self.file.write_all_at(data, offset)
    }

    /// Deallocates or zeroes, as `flags` say.
    pub fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        #[cfg(test)]
        if let Some(power) = &self.power {
            power.before_zero(&self.file, offset, len)?;
        }
        #[cfg(test)]
        if self.file.zeroes_nothing(offset, len)? {
            return Ok(());
        }
        Ok(rustix::fs::fallocate(&self.file, flags, offset, len)?)
    }

    /// Allocates blocks that read as zero until they are written, and changes no
    /// content.
    pub fn lay(&self, offset: u64, len: u64) -> io::Result<()> {
        #[cfg(test)]
        self.file.lays(offset, len)?;
        let flags = FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, offset, len)?)
    }

    /// Reads until `buffer` is full.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    /// The same, leaving nothing more of it in the page cache if the system can do
    /// that.
    pub fn read_passing(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.passing.read_exact_at(&self.file, buffer, offset)
    }

    /// Where the first data at or behind `from` begins, as the file system says; None
    /// when it says that there is none.
    pub fn next_data(&self, from: u64) -> io::Result<Option<u64>> {
        #[cfg(test)]
        if self.file.hides_data() {
            return Ok(None);
        }
        match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) => Ok(Some(start)),
            Err(Errno::NXIO) => Ok(None),
            Err(e) => Err(e.into()),
        }
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

    /// What messages call it.
    pub fn shown(&self) -> String {
        let link = format!("/proc/self/fd/{}", self.file().as_raw_fd());
        let path = std::fs::read_link(link);
        path.map_or_else(|_| "a target".to_owned(), |path| path.display().to_string())
    }

    /// Drops clean pages from the cache, so that the next read asks the medium; a
    /// length of 0 stands for all that follows.
    pub fn uncache(&self, offset: u64, len: u64) {
        let len = std::num::NonZeroU64::new(len);
        let _ = rustix::fs::fadvise(&self.file, offset, len, Advice::DontNeed);
    }
}
