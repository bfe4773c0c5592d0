//! A block device as a target: held exclusively, and written in place.
//!
//! There is nothing to rename and no room for notes, so journal and receipt lie in
//! a directory of the caller's. What stands on the device serves as a base: a
//! second copy to the same device sends what has changed.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::beneath::{self, Names};
use crate::digest::Hash;
use crate::error::{Code, MoverError, Result};
use crate::medium::Medium;
use crate::messages::Receipt;
use crate::opening::{Found, Site};
use crate::rebase;
use crate::receipt::{self, FileId, Stamp};
use crate::revision::Revision;
use crate::store;
use crate::target::TargetSpec;
use crate::written;

/// How long a program may be on its way from fork to exec.
const STARTING: Duration = Duration::from_millis(500);

/// Opens a device for this copy alone; refuses one that is in use or too small.
///
/// With `since`, a copy of that digest that this tag has placed is gone on from.
/// Reading back can take long: `go_on` is called meanwhile, and ends it.
pub fn find(
    spec: &TargetSpec,
    state: &Path,
    tag: &str,
    size: u64,
    since: Option<Hash>,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<Found> {
    beneath::check_name(&spec.name)?;
    let mut names = Names::open(state, &flat(&spec.name), tag)?;
    names.shown.clone_from(&spec.name);
    let root = beneath::open_root(&spec.root)?;
    let open_as = |flags| {
        let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        beneath::open(&root, &spec.name, flags, Mode::empty()).map(File::from)
    };
    let open = |more| open_as(OFlags::RDWR | more);
    let look = beneath::open(&root, &spec.name, OFlags::PATH, Mode::empty());
    let look = look.map_err(|e| beneath::refused(&spec.name, e))?;
    let stat = rustix::fs::fstat(&look).map_err(|e| cannot(spec, "stat", e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice {
        let text = format!("the target {:?} is not a block device", spec.name);
        return Err(MoverError::new(Code::TargetPath, text).at_receiver());
    }
    let id = device_id(stat.st_rdev);
    if let Some(published) = receipt::read(&names)? {
        let placed = &published.receipt;
        let is_built_on = since == Some(placed.root) && placed.unreadable.is_empty();
        let device = open_as(OFlags::RDONLY).map_err(|e| cannot(spec, "open", e))?;
        // What is built on is read and hashed anyway, and so is what was not counted.
        let is_untouched = || published.stamp.is_some() && published.is_untouched(stamp(&device));
        let is_known = || is_built_on || is_untouched();
        if published.id != id || !is_known() {
            let direct = open_as(OFlags::RDONLY | OFlags::DIRECT).ok();
            prove(&names, device, direct, id, placed, go_on)?;
        }
        names.remove(&names.journal)?;
        if !is_built_on {
            return Ok(Found::Published(published.receipt));
        }
        reopen(&names)?;
    }
    let file = once_free(|| open(OFlags::EXCL), go_on).map_err(|e| match e {
        Errno::BUSY => {
            let text = format!(
                "the device {:?} is in use: mounted, part of an LVM or md device, or written by another copy",
                spec.name
            );
            MoverError::new(Code::TargetBusy, text).at_receiver()
        }
        e => cannot(spec, "open", e),
    })?;
    let opened = rustix::fs::fstat(&file).map_err(|e| cannot(spec, "stat", e))?;
    if opened.st_rdev != stat.st_rdev {
        let text = format!("the device {:?} was replaced meanwhile", spec.name);
        return Err(MoverError::new(Code::TargetPath, text).at_receiver());
    }
    let room = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| cannot(spec, "measure", e))?;
    if room < size {
        let text = format!(
            "the device {:?} has {room} bytes, and the volume {size}; make it larger",
            spec.name
        );
        return Err(MoverError::new(Code::NoSpace, text).at_receiver());
    }
    Ok(Found::Open(Site {
        names,
        id,
        direct: open(OFlags::DIRECT).ok(),
        file,
        lock: None,
        blank: false,
        sized: true,
        is_device: true,
    }))
}

/// Opens what may look used for a moment: a child that is just being started has a
/// copy of every descriptor, also of one that was closed here meanwhile, and there is
/// no letting go of a device but to close it.
fn once_free(
    open: impl Fn() -> rustix::io::Result<File>,
    go_on: &dyn Fn() -> bool,
) -> rustix::io::Result<File> {
    let end = Instant::now() + STARTING;
    loop {
        match open() {
            Err(Errno::BUSY) if Instant::now() < end && go_on() => {
                std::thread::sleep(STARTING / 50);
            }
            done => return done,
        }
    }
}

/// Proves by reading all of it that a device still holds what this copy has placed,
/// and notes which device that is now; fails when it does not.
///
/// The kernel counts writes to a device as long as the machine runs, and which disk
/// has which number is found out anew at each start. After one, nothing but the
/// content tells.
fn prove(
    names: &Names,
    device: File,
    direct: Option<File>,
    id: FileId,
    placed: &Receipt,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<()> {
    let before = stamp(&device);
    let unread = |e| MoverError::target_io("cannot read a device", &e);
    let room = rustix::fs::seek(&device, SeekFrom::End(0)).map_err(|e| unread(e.into()))?;
    let medium = Medium::new(device, direct, false).map_err(unread)?;
    let all = Revision::new(placed.root);
    let holds = room >= placed.size
        && rebase::unchanged(&medium, placed.size, &all, &|_, _| {}, go_on)?.is_some();
    if !holds || stamp(medium.file()) != before {
        let text = format!(
            "this copy has placed {:?} before, and it holds something else now: it was written to since, or is another device; choose another one, or discard the copy to write over it",
            names.shown
        );
        return Err(MoverError::new(Code::TargetExists, text).at_receiver());
    }
    receipt::write(names, placed, id, before)
}

/// Notes, durably, that the device holds the volume.
pub fn publish(names: &Names, device: &File, id: FileId, proof: &Receipt) -> Result<()> {
    store::sync_all(device).map_err(|e| names.failed("cannot make durable", &names.base, e))?;
    receipt::write(names, proof, id, stamp(device))?;
    names.remove(&names.journal)?;
    names.sync_dir()
}

/// Takes the receipt of a device that is to be written: from now on nothing vouches for
/// it, until it is complete again.
pub fn reopen(names: &Names) -> Result<()> {
    names.remove(&names.receipt)?;
    names.sync_dir()
}

/// Makes sure that a copy has left no journal and no receipt in `state`. What it
/// wrote to the device stays.
pub fn discard(state: &Path, name: &str, tag: &str) -> Result<()> {
    crate::publish::discard(state, &flat(name), tag)
}

/// A name for files about a device.
fn flat(name: &str) -> String {
    name.replace('/', "!")
}

/// What changes when it is written to; None when that is not counted.
fn stamp(device: &File) -> Option<Stamp> {
    let same = format!("/proc/self/fd/{}", device.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let direct = rustix::fs::open(same, flags, Mode::empty()).map(File::from);
    let is_counted = direct.map_or(Ok(true), |direct| written::is_counted(&direct));
    let count = is_counted.ok()?.then(|| written::of(device).ok().flatten());
    count.flatten().map(|count| count.sum())
}

/// Which device this is, for as long as the machine runs.
fn device_id(number: u64) -> FileId {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let sequence = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/diskseq"));
    FileId {
        inode: number,
        // Counts every disk that appears, and so tells two of one name apart.
        born_ns: sequence
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0),
    }
}

fn cannot(spec: &TargetSpec, what: &str, error: Errno) -> MoverError {
    MoverError::target_io(
        &format!("cannot {what} the device {:?}", spec.name),
        &error.into(),
    )
}
