//! Reads that leave nothing in the page cache, of files that take no direct I/O.
//!
//! Linux 6.14 has RWF_DONTCACHE, which file systems have to take part in: pages that
//! a read needs are dropped behind it, and pages that others had there before stay.
//! Where it is refused, reads go through the cache, and whoever made them drops what
//! they left.
//!
//! Writes are not made so: each would be written back by itself, which takes more than
//! twice as long as what a barrier writes back in one go (docs/performance.md).

use std::fs::File;
use std::io::{self, ErrorKind, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::Advice;
use rustix::io::ReadWriteFlags;

use crate::store::{self, Disk};

/// RWF_DONTCACHE of <linux/fs.h>.
const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

/// Zero is: not tried yet.
const WORKS: u8 = 1;
const REFUSED: u8 = 2;

/// How such reads fare on one file.
#[derive(Default)]
pub struct Passing(AtomicU8);

impl Passing {
    /// Whether it is known that they leave nothing.
    pub fn works(&self) -> bool {
        self.0.load(Ordering::Relaxed) == WORKS
    }

    /// Reads some of what stands at `offset`, as `read_at` does.
    pub fn read_at(&self, file: &Disk, out: &mut [u8], offset: u64) -> io::Result<usize> {
        if self.0.load(Ordering::Relaxed) != REFUSED {
            match store::read_by(file, out, offset, read) {
                Err(e) if is_refusal(&e) => self.give_up(file),
                Ok(count) => {
                    self.0.store(WORKS, Ordering::Relaxed);
                    return Ok(count);
                }
                Err(e) => return Err(e),
            }
        }
        file.read_at(out, offset)
    }

    /// Reads until `out` is full.
    pub fn read_exact_at(&self, file: &Disk, out: &mut [u8], offset: u64) -> io::Result<()> {
        let mut at = 0;
        while at < out.len() {
            match self.read_at(file, &mut out[at..], offset + at as u64) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => at += count,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Reads go through the page cache from now on.
    pub fn give_up(&self, file: &Disk) {
        self.0.store(REFUSED, Ordering::Relaxed);
        // What is read ahead would look like what others have there.
        let _ = rustix::fs::fadvise(file, 0, None, Advice::Random);
    }
}

/// Whether kernel or file system know no such call. If it was about something else,
/// the call without it tells.
fn is_refusal(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    matches!(errno, Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS))
}

fn read(file: &File, out: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut parts = [IoSliceMut::new(out)];
    Ok(rustix::io::preadv2(file, &mut parts, offset, DONTCACHE)?)
}
