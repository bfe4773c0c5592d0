//! Storage that fails, for tests: it exists in no other build.
//!
//! Whatever reads or writes content does it through `Disk`, which is a plain
//! `File` outside of unit tests. Here it asks, before each operation, whether a
//! test wants that to go wrong on the file of that name, and how. Calls fail as
//! the kernel lets them fail: short, with an error, late, or with a lie.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;

use crate::digest;
use crate::pool::lock;
use crate::power;

mod looked;
mod lost;
mod proven;
mod sampled;
mod stuck;
mod table;
mod zeroed;

static RULES: Mutex<Vec<Arc<Active>>> = Mutex::new(Vec::new());

/// What is done to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Content is read.
    Read,
    /// It is asked where data is.
    Map,
    /// Content is written.
    Write,
    /// A range is made to read as zero.
    Zero,
    /// Blocks are allocated for what is written next.
    Lay,
    /// Its length is set.
    Resize,
    /// What was written is made durable.
    Sync,
    /// All of it is, before it is published.
    SyncAll,
    /// It gets its final name.
    Rename,
    /// Its directory is made durable.
    SyncDir,
    /// A chunk of it lies in memory, hashed and packed, on its way out.
    Pack,
    /// The bitmap of that.
    Mark,
    /// A chunk for it lies in memory, as it arrived.
    Arrive,
}

/// How it goes wrong.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// It fails with this error number.
    Error(i32),
    /// It does so many bytes, and says so.
    Short(usize),
    /// It does so many bytes, and says that it did all.
    Torn(usize),
    /// One bit is another one.
    Flipped,
    /// A map without data, whatever there is.
    AllHole,
    /// It takes this long.
    Slow(Duration),
    /// It does not come back while the rule is in force.
    Stuck,
}

/// What goes wrong where.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// How the path of the file ends.
    pub file: &'static str,
    /// In which operation.
    pub op: Op,
    /// Only when it is about this byte.
    pub at: Option<u64>,
    /// How many of these go well before.
    pub after: u32,
    /// How many go wrong then.
    pub times: u32,
    /// How.
    pub fault: Fault,
}

struct Active {
    dir: PathBuf,
    rule: Rule,
    seen: AtomicU32,
}

/// A rule in force, until this is dropped.
pub struct Injected(Arc<Active>);

/// A file whose storage can fail.
pub struct Disk {
    file: File,
    path: PathBuf,
}

/// Counts such operations on a file, all of which go well.
pub fn count(dir: &Path, file: &'static str, op: Op) -> Injected {
    let rule = Rule {
        file,
        op,
        at: None,
        after: u32::MAX,
        times: 0,
        fault: Fault::Slow(Duration::ZERO),
    };
    inject(dir, rule)
}

/// Breaks the storage of files beneath `dir`.
pub fn inject(dir: &Path, rule: Rule) -> Injected {
    let active = Arc::new(Active {
        dir: dir.canonicalize().unwrap(),
        rule,
        seen: AtomicU32::new(0),
    });
    lock(&RULES).push(Arc::clone(&active));
    Injected(active)
}

/// What a test wants of an operation on a file named in an open directory.
pub fn in_dir(dir: impl AsFd, name: &str, op: Op) -> Result<(), Errno> {
    match wanted(&path_of(dir.as_fd()).join(name), op, None) {
        Some(Fault::Error(number)) => Err(Errno::from_raw_os_error(number)),
        _ => Ok(()),
    }
}

/// Makes a file durable, unless a test wants something else or has cut the power.
pub fn sync_all(file: &File) -> Result<(), Errno> {
    if let Some(Fault::Error(number)) = wanted(&path_of(file.as_fd()), Op::SyncAll, None) {
        return Err(Errno::from_raw_os_error(number));
    }
    let power = power::supply(file);
    if let Some(power) = &power {
        power.before_sync().map_err(|_| Errno::IO)?;
    }
    rustix::fs::fsync(file)?;
    power.iter().for_each(|power| power.synced(file));
    Ok(())
}

/// Spoils what lies in memory of a chunk of a file, if a test wants it.
pub fn in_memory(path: &Path, op: Op, offset: u64, bytes: &mut [u8]) {
    if let Some(Fault::Flipped) = wanted(path, op, Some((offset, digest::CHUNK)))
        && let Some(byte) = bytes.first_mut()
    {
        *byte ^= 1;
    }
}

impl Injected {
    /// Whether anything went wrong because of it.
    pub fn has_struck(&self) -> bool {
        self.met() > self.0.rule.after
    }

    /// How many operations there were for it.
    pub fn met(&self) -> u32 {
        self.0.seen.load(Ordering::Relaxed)
    }
}

impl Drop for Injected {
    fn drop(&mut self) {
        lock(&RULES).retain(|other| !Arc::ptr_eq(other, &self.0));
    }
}

impl Disk {
    /// Takes over an open file.
    pub fn new(file: File) -> Disk {
        let path = path_of(file.as_fd());
        Disk { file, path }
    }

    /// The same file once more.
    pub fn try_clone(&self) -> io::Result<Disk> {
        self.file.try_clone().map(Disk::new)
    }

    /// Makes durable.
    pub fn sync_data(&self) -> io::Result<()> {
        self.strike(Op::Sync, None)?;
        self.file.sync_data()
    }

    /// Cuts or extends.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.strike(Op::Resize, None)?;
        self.file.set_len(len)
    }

    /// Whether zeroing a range is to do nothing, or an error.
    pub fn zeroes_nothing(&self, offset: u64, len: u64) -> io::Result<bool> {
        match self.strike(Op::Zero, Some((offset, len)))? {
            Some(Fault::Torn(_)) => Ok(true),
            _ => Ok(false),
        }
    }

    /// Notes that blocks are laid.
    pub fn lays(&self, offset: u64, len: u64) -> io::Result<()> {
        self.strike(Op::Lay, Some((offset, len))).map(drop)
    }

    /// Whether it is to say that there is no data.
    pub fn hides_data(&self) -> bool {
        matches!(self.strike(Op::Map, None), Ok(Some(Fault::AllHole)))
    }

    fn strike(&self, op: Op, range: Option<(u64, u64)>) -> io::Result<Option<Fault>> {
        let Some(active) = struck(&self.path, op, range) else {
            return Ok(None);
        };
        match active.rule.fault {
            Fault::Error(number) => Err(io::Error::from_raw_os_error(number)),
            Fault::Slow(time) => {
                std::thread::sleep(time);
                Ok(None)
            }
            Fault::Stuck => {
                while lock(&RULES).iter().any(|rule| Arc::ptr_eq(rule, &active)) {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(None)
            }
            other => Ok(Some(other)),
        }
    }
}

impl Disk {
    /// Reads by `call`, or as a test wants it.
    pub fn read_by(
        &self,
        out: &mut [u8],
        offset: u64,
        call: impl FnOnce(&File, &mut [u8], u64) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let fault = self.strike(Op::Read, Some((offset, out.len() as u64)))?;
        let read = call(&self.file, out, offset)?;
        match fault {
            Some(Fault::Short(count)) => {
                let count = count.min(read);
                out[count..read].fill(0xEE); // what is not counted is not there
                Ok(count)
            }
            Some(Fault::Flipped) => {
                out[..read]
                    .last_mut()
                    .into_iter()
                    .for_each(|byte| *byte ^= 1);
                Ok(read)
            }
            _ => Ok(read),
        }
    }
}

impl FileExt for Disk {
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read_by(out, offset, |file, out, offset| file.read_at(out, offset))
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        match self.strike(Op::Write, Some((offset, data.len() as u64)))? {
            Some(Fault::Short(count)) => self.file.write_at(&data[..count.min(data.len())], offset),
            Some(Fault::Torn(count)) => {
                let part = &data[..count.min(data.len())];
                self.file.write_all_at(part, offset)?;
                Ok(data.len())
            }
            Some(Fault::Flipped) => {
                // Memory for O_DIRECT has to be aligned.
                let mut other = crate::sys::AlignedBuf::new(data.len()).unwrap();
                other[..data.len()].copy_from_slice(data);
                other[0] ^= 1;
                self.file.write_at(&other[..data.len()], offset)
            }
            _ => self.file.write_at(data, offset),
        }
    }
}

impl Deref for Disk {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl AsFd for Disk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn wanted(path: &Path, op: Op, range: Option<(u64, u64)>) -> Option<Fault> {
    struck(path, op, range).map(|active| active.rule.fault)
}

fn struck(path: &Path, op: Op, range: Option<(u64, u64)>) -> Option<Arc<Active>> {
    let rules = lock(&RULES).clone();
    let text = path.to_string_lossy();
    let is_hit = |active: &&Arc<Active>| {
        let rule = &active.rule;
        let inside = |at: u64| range.is_some_and(|(from, len)| (from..from + len).contains(&at));
        rule.op == op
            && path.starts_with(&active.dir)
            && text.ends_with(rule.file)
            && rule.at.is_none_or(inside)
    };
    let strikes = |active: &&Arc<Active>| {
        let before = active.seen.fetch_add(1, Ordering::Relaxed);
        before >= active.rule.after && before - active.rule.after < active.rule.times
    };
    rules.iter().filter(is_hit).find(strikes).cloned()
}

/// Where an open file lies.
pub fn path_of(fd: BorrowedFd<'_>) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default()
}
