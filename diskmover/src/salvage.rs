//! Reads around what a medium does not give any more, where the caller asked for it.
//!
//! A read that fails with EIO is made smaller: the block, then its sectors, where
//! the device has such. What fails then is really gone: it becomes zeros, and is
//! noted. Any other error, and too much of this one, ends the copy as always.
//!
//! What a copy placed so must never be gone on from as if it were good, and the
//! next attempt cannot know what this one could not read. So the receiver knows the
//! source by another identity in each such attempt, and compares all of it.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::note;
use crate::pool::lock;
use crate::store::Disk;
use crate::sys::{ALIGN, AlignedBuf};
use crate::unreadable::{MOST_BYTES, MOST_RANGES, Unreadable};

/// The smallest sector that there is.
const SECTOR: usize = 512;

/// What a copy does where its source gives EIO.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnReadError {
    /// It fails.
    #[default]
    Fail,
    /// It goes on with zeros, and is DEGRADED.
    Zero,
}

impl OnReadError {
    /// The one of this name.
    pub fn named(name: &str) -> Option<OnReadError> {
        match name {
            "fail" => Some(OnReadError::Fail),
            "zero" => Some(OnReadError::Zero),
            _ => None,
        }
    }
}

/// What a source could not give, in one attempt to copy it.
pub struct Salvage {
    attempt: u64,
    lost: Mutex<Unreadable>,
    bytes: AtomicU64,
    told: AtomicBool,
    given_up: AtomicBool,
}

impl Salvage {
    /// Nothing lost yet; `nonce` is of this attempt alone.
    pub fn new(nonce: &[u8; 16]) -> Salvage {
        let [a, b, c, d, e, f, g, h, ..] = *nonce;
        Salvage {
            // Never zero, and the highest bit is not its own.
            attempt: u64::from_le_bytes([a, b, c, d, e, f, g, h]) >> 1 | 1,
            lost: Mutex::default(),
            bytes: AtomicU64::new(0),
            told: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
        }
    }

    /// What makes the identity of the source that of this attempt.
    pub fn attempt(&self) -> u64 {
        self.attempt
    }

    /// What was lost so far.
    pub fn lost(&self) -> Unreadable {
        lock(&self.lost).clone()
    }

    /// Bytes of it.
    pub fn lost_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Lets reads that go on fail soon.
    pub fn abort(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// Reads a block, or what there is of the last one, of a range that gave EIO;
    /// zeros take the place of what cannot be read.
    pub fn read_block(
        &self,
        file: &Disk,
        direct: Option<&Disk>,
        offset: u64,
        out: &mut [u8],
    ) -> io::Result<()> {
        if self.given_up.load(Ordering::Relaxed) {
            return Err(io::Error::other("the copy has ended"));
        }
        let mut memory = AlignedBuf::new(ALIGN).ok_or(io::ErrorKind::OutOfMemory)?;
        let read = match direct {
            Some(direct) => whole(direct, offset, out, &mut memory),
            None => file.read_exact_at(out, offset),
        };
        match read {
            Ok(()) => return Ok(()),
            Err(e) if is_lost(&e) => {}
            Err(e) if direct.is_some() && e.raw_os_error() == Some(libc::EINVAL) => {
                return match file.read_exact_at(out, offset) {
                    Err(e) if is_lost(&e) => self.lose(offset, out),
                    other => other,
                };
            }
            Err(e) => return Err(e),
        }
        let Some(direct) = direct else {
            return self.lose(offset, out);
        };
        let mut at = offset;
        for piece in out.chunks_mut(SECTOR) {
            match whole(direct, at, piece, &mut memory) {
                Ok(()) => {}
                // EINVAL: the device has no sectors of this size.
                Err(e) if is_lost(&e) || e.raw_os_error() == Some(libc::EINVAL) => {
                    self.lose(at, piece)?;
                }
                Err(e) => return Err(e),
            }
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn lose(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        out.fill(0);
        let mut lost = lock(&self.lost);
        let bearable = lost.add(offset..offset + out.len() as u64);
        self.bytes.store(lost.bytes(), Ordering::Relaxed);
        if bearable {
            return Ok(());
        }
        let text = format!(
            "more than {MOST_RANGES} places or {MOST_BYTES} bytes of it; a disk in this state is read with a tool for dying disks, and its image copied"
        );
        Err(io::Error::other(text))
    }

    /// Leaves a note, once, if something was lost.
    pub fn tell(&self, shown: &str) {
        if self.lost_bytes() > 0 {
            note::once(&self.told, || {
                let lost = self.lost();
                let first = lost.ranges().first().map_or(0, |range| range.start);
                format!(
                    "{shown} cannot be read at byte {first}: zeros take the place of what is lost, and the copy is DEGRADED"
                )
            });
        }
    }
}

/// Whether a read failed because the medium does not give what it holds.
pub fn is_lost(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EIO)
}

/// Reads by O_DIRECT, through memory that is aligned; the end of a file may cut it.
fn whole(direct: &Disk, offset: u64, out: &mut [u8], memory: &mut [u8]) -> io::Result<()> {
    let room = out.len().next_multiple_of(SECTOR);
    let mut at = 0;
    while at < out.len() {
        match direct.read_at(&mut memory[at..room], offset + at as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => at += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let len = out.len();
    out.copy_from_slice(&memory[..len]);
    Ok(())
}
