//! The life of a target's files: reserve, publish, discard.
//!
//! ```text
//! part verified -> mode, owner, fsync(part) -> receipt, durable
//!   -> rename to the final name, never over a file -> fsync(directory)
//!      (link -> fsync(directory) -> unlink, where a rename could replace something)
//!   -> remove the journal -> fsync(directory)
//! ```
//! Killed anywhere, the next opening either finds the file published (the
//! receipt names its inode) or a complete part to publish again.
//!
//! A part is made in the directory where it is published, so it has the label
//! (SELinux) and the ACL that files there get. One that was published before is the
//! same file as ever: its owner, mode and label stay, unless others are asked for.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use crate::beneath::{self, Names};
use crate::digest;
use crate::error::{Code, MoverError, Result};
#[cfg(test)]
use crate::faults::{self, Op};
use crate::locked::Locked;
use crate::messages::Receipt;
use crate::mode::CopyMode;
use crate::naming::{self, Change};
use crate::opening;
use crate::receipt;
use crate::store;
use crate::target::{Container, Place, TargetSpec};
use crate::trust;

/// Fails when something stands under the final name.
pub fn refuse_existing(names: &Names) -> Result<()> {
    match receipt::file_id(names, &names.base)? {
        None => Ok(()),
        Some(_) => Err(exists(names)),
    }
}

/// Publishes a verified part, which has `length` bytes.
pub fn publish(
    names: &Names,
    part: &File,
    spec: &TargetSpec,
    proof: &Receipt,
    length: u64,
) -> Result<()> {
    let failed = |what: &str, e: Errno| names.failed(what, &names.part, e);
    if let Some(mode) = spec.mode {
        rustix::fs::fchmod(part, Mode::from_raw_mode(mode))
            .map_err(|e| failed("cannot chmod", e))?;
    }
    if spec.uid.is_some() || spec.gid.is_some() {
        let (uid, gid) = (spec.uid.map(Uid::from_raw), spec.gid.map(Gid::from_raw));
        rustix::fs::fchown(part, uid, gid).map_err(|e| failed("cannot chown", e))?;
    }
    store::sync_all(part).map_err(|e| failed("cannot make durable", e))?;
    let stat = rustix::fs::fstat(part).map_err(|e| failed("cannot stat", e))?;
    let id = receipt::file_id(names, &names.part)?;
    let (Some(id), 1, true) = (id, stat.st_nlink, stat.st_size as u64 == length) else {
        let text = format!(
            "{} was replaced, linked or cut by somebody else",
            names.part
        );
        return Err(MoverError::new(Code::TargetPath, text).at_receiver());
    };
    receipt::write(names, proof, id, Some(receipt::stamp_of(&stat)))?;
    match rename_new(&names.dir, &names.part, &names.base) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            names.remove(&names.receipt)?;
            return Err(exists(names));
        }
        Err(e) => return Err(failed("cannot rename", e)),
    }
    names.sync_dir()?;
    names.remove(&names.journal)?;
    names.sync_dir()
}

/// Makes a part again of what this tag has published, to go on from it.
///
/// Killed anywhere, the part holds the copy, and only its content vouches for it.
pub fn reopen(names: &Names) -> Result<()> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let failed = |e: Errno| names.failed("cannot go on from", &names.base, e);
    let file = beneath::open(&names.dir, &names.base, flags, Mode::empty()).map_err(failed)?;
    // QEMU locks what it uses, too.
    let locked = Locked::take(File::from(file))
        .map_err(|e| MoverError::target_io("cannot lock an earlier copy", &e))?;
    let Some(_locked) = locked else {
        let text = format!(
            "{:?} is in use, so it cannot be brought up to date; stop its user first",
            names.shown
        );
        return Err(MoverError::new(Code::TargetBusy, text).at_receiver());
    };
    rename_new(&names.dir, &names.base, &names.part).map_err(failed)?;
    names.sync_dir()?;
    names.remove(&names.receipt)?;
    names.sync_dir()
}

/// Fails when what this tag has published is something else than is sent now: a
/// receipt must not answer for it.
pub fn check_kind(spec: &TargetSpec, tag: &str, found: &Receipt, mode: CopyMode) -> Result<()> {
    let is_image = match spec.care.place {
        Place::Device { .. } => false,
        Place::File => {
            let names = Names::open(&spec.root, &spec.name, tag)?;
            let stat = rustix::fs::statat(&names.dir, &names.base, AtFlags::SYMLINK_NOFOLLOW);
            let stat = stat.map_err(|e| names.failed("cannot stat", &names.base, e))?;
            stat.st_size as u64 != found.size
        }
    };
    let becomes_image = spec.care.container == Container::Qcow2;
    if (found.mode, is_image) == (mode, becomes_image) {
        return Ok(());
    }
    let kind = |mode: CopyMode, is_image| match is_image {
        true => "a qcow2 image of what the guest sees".to_owned(),
        false => format!("a {} copy", mode.name()),
    };
    let text = format!(
        "this copy has placed {:?} before as {}, and now it would be {}; move it out of the way",
        spec.name,
        kind(found.mode, is_image),
        kind(mode, becomes_image),
    );
    Err(MoverError::new(Code::TargetExists, text).at_receiver())
}

/// Creates the part of a copy before the copy begins.
pub fn reserve(root: &Path, name: &str, tag: &str, size: u64, allocate: bool) -> Result<()> {
    let names = Names::open(root, name, tag)?;
    if size > digest::MAX_SIZE {
        let text = format!("{size} bytes are more than 64 TiB");
        return Err(MoverError::new(Code::InvalidArgument, text).at_receiver());
    }
    if receipt::published(&names)?.is_some() {
        return Ok(());
    }
    refuse_existing(&names)?;
    let existed = receipt::file_id(&names, &names.part)?.is_some();
    let part = opening::open_part(&names)?;
    let result = fill_reservation(&part, size, allocate)
        .map_err(|e| names.failed("cannot reserve space for", &names.part, e));
    if result.is_err() && !existed {
        names.remove(&names.part)?;
    }
    result?;
    names.sync_dir()
}

/// Makes sure that a copy has left nothing but what it published.
pub fn discard(root: &Path, name: &str, tag: &str) -> Result<()> {
    let Some(names) = existing_names(root, name, tag)? else {
        return Ok(());
    };
    let _lock = lock_part(&names)?;
    // The journal first: one without its part could be taken for the next one's.
    names.remove(&names.journal)?;
    names.sync_dir()?;
    names.remove(&names.part)?;
    names.remove(&names.receipt)?;
    names.remove(&format!("{}.new", names.receipt))?;
    names.sync_dir()
}

/// Removes the published file if this tag published it; true when it did.
pub fn discard_published(root: &Path, name: &str, tag: &str) -> Result<bool> {
    let Some(names) = existing_names(root, name, tag)? else {
        return Ok(false);
    };
    let removed = receipt::published(&names)?.is_some() && names.remove(&names.base)?;
    names.sync_dir()?;
    names.remove(&names.receipt)?;
    names.sync_dir()?;
    Ok(removed)
}

fn fill_reservation(part: &File, size: u64, allocate: bool) -> rustix::io::Result<()> {
    if allocate && size > 0 {
        rustix::fs::fallocate(part, FallocateFlags::empty(), 0, size)?;
    }
    let stat = rustix::fs::fstat(part)?;
    // Whose word about holes is not taken could not say later that all of it is one.
    let is_better_empty = !allocate && stat.st_size == 0 && trust::doubt(part).is_some();
    if stat.st_size as u64 != size && !is_better_empty {
        rustix::fs::ftruncate(part, size)?;
    }
    rustix::fs::fsync(part)
}

/// The names, or None when the directory is gone and nothing can be there.
fn existing_names(root: &Path, name: &str, tag: &str) -> Result<Option<Names>> {
    beneath::check_name(name)?;
    let parent = name.rsplit_once('/').map_or(".", |(parent, _)| parent);
    match rustix::fs::open(root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        Err(_) => {}
        Ok(root) => {
            let found = beneath::open(&root, parent, OFlags::PATH, Mode::empty());
            if found.err() == Some(Errno::NOENT) {
                return Ok(None);
            }
        }
    }
    Names::open(root, name, tag).map(Some)
}

/// Locks the part, if there is one, so that no session writes it.
fn lock_part(names: &Names) -> Result<Option<Locked>> {
    match rustix::fs::statat(&names.dir, &names.part, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {}
        _ => return Ok(None),
    }
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let Ok(fd) = beneath::open(&names.dir, &names.part, flags, Mode::empty()) else {
        return Ok(None);
    };
    match Locked::take(File::from(fd)) {
        Ok(Some(part)) => Ok(Some(part)),
        Ok(None) => {
            let text = format!(
                "a session writes the target {:?}; close it first",
                names.shown
            );
            Err(MoverError::new(Code::TargetBusy, text).at_receiver())
        }
        Err(e) => Err(MoverError::target_io("cannot lock a part", &e)),
    }
}

/// Gives a file another name, which nothing has.
fn rename_new(dir: &OwnedFd, from: &str, to: &str) -> rustix::io::Result<()> {
    #[cfg(test)]
    let renamed = faults::in_dir(dir, from, Op::Rename);
    #[cfg(not(test))]
    let renamed = Ok(());
    match renamed.and_then(|()| naming::change(dir, Change::Rename(from, to))) {
        // A file system without the flag: a hard link never replaces either. Both names
        // are durable before one goes, or a power cut could leave none.
        Err(Errno::INVAL | Errno::NOSYS) => {
            naming::change(dir, Change::Link(from, to))?;
            naming::sync(dir)?;
            naming::change(dir, Change::Remove(from))
        }
        other => other,
    }
}

fn exists(names: &Names) -> MoverError {
    let text = format!(
        "a file named {:?} is there already, and this copy did not place it; move it out of the way",
        names.shown
    );
    MoverError::new(Code::TargetExists, text).at_receiver()
}
