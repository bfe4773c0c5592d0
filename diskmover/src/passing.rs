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
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::Advice;
use rustix::io::ReadWriteFlags;

use crate::store::{self, Disk};
use crate::sys::{self, ALIGN};

/// RWF_DONTCACHE of <linux/fs.h>.
const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

/// A range of which others have anything in the page cache is left there when it is
/// no longer than this.
pub const SPARED: u64 = 64 << 10;

/// Zero is: not tried yet.
const WORKS: u8 = 1;
const REFUSED: u8 = 2;

/// How such reads fare on one file.
#[derive(Default)]
pub struct Passing(AtomicU8);

impl Passing {
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

    /// What of a range will be in the page cache only because it is read now; all of
    /// it where nobody tells.
    pub fn not_cached(&self, file: &File, range: Range<u64>) -> Vec<Range<u64>> {
        if range.is_empty() || self.works() {
            return Vec::new(); // nothing of it will
        }
        let len = range.end - range.start;
        let cached = sys::cached_pages(file, range.start, len).unwrap_or(0);
        if cached == 0 {
            return vec![range];
        }
        if cached >= len / ALIGN as u64 || len <= SPARED {
            return Vec::new();
        }
        let middle = (range.start + len / 2).next_multiple_of(ALIGN as u64);
        let mut all = self.not_cached(file, range.start..middle);
        all.extend(self.not_cached(file, middle..range.end));
        all
    }

    /// Drops from the page cache what reading these ranges has left there.
    pub fn let_go(&self, file: &File, ranges: Vec<Range<u64>>) {
        for range in ranges.into_iter().filter(|_| !self.works()) {
            let len = NonZeroU64::new(range.end - range.start);
            let _ = rustix::fs::fadvise(file, range.start, len, Advice::DontNeed);
        }
    }

    fn works(&self) -> bool {
        self.0.load(Ordering::Relaxed) == WORKS
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

/// Bytes of a file in the page cache.
#[cfg(test)]
pub fn cached_bytes(path: &std::path::Path) -> u64 {
    let mut command = std::process::Command::new("fincore");
    command.args(["--bytes", "--noheadings", "--output", "RES"]);
    let told = command.arg(path).output().unwrap();
    String::from_utf8(told.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}
