//! Paths beneath a root, and the names of the files of a copy.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Code, MoverError, Result};
#[cfg(test)]
use crate::faults::{self, Op};
use crate::naming::{self, Change};

/// Longest last part of a target's name; the tag and the endings must fit too.
const MAX_BASE: usize = 160;

/// Opens beneath `root`: no symlink, "..", or magic link is followed.
pub fn open(root: impl AsFd, name: &str, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    loop {
        match rustix::fs::openat2(&root, name, flags | OFlags::CLOEXEC, mode, resolve) {
            // EAGAIN: a rename elsewhere raced with the check of "..".
            Err(Errno::INTR | Errno::AGAIN) => {}
            other => return other,
        }
    }
}

/// Opens a directory that the caller trusts.
pub fn open_root(root: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, root, flags, Mode::empty()).map_err(|e| {
        let text = format!("cannot open the directory {}: {e}", root.display());
        MoverError::new(Code::TargetPath, text).at_receiver()
    })
}

/// The error for a path that is refused.
pub fn refused(name: &str, error: Errno) -> MoverError {
    let why = match error {
        Errno::XDEV => "it leads out of its root".to_owned(),
        Errno::LOOP => "a part of it is a symlink".to_owned(),
        Errno::NOENT => "its directory does not exist".to_owned(),
        Errno::NOTDIR => "a part of it is no directory".to_owned(),
        other => other.to_string(),
    };
    MoverError::new(
        Code::TargetPath,
        format!("the target {name:?} is refused: {why}"),
    )
    .at_receiver()
}

/// Checks a relative name: no empty part, ".", ".." or NUL.
pub fn check_name(name: &str) -> Result<()> {
    let bad = |part: &str| part.is_empty() || part == "." || part == ".." || part.contains('\0');
    let base = name.rsplit('/').next().unwrap_or_default();
    if name.split('/').any(bad) || base.len() > MAX_BASE || name.len() > 1024 {
        let text = format!(
            "{name:?} is not a relative path of plain names (the last one up to {MAX_BASE} bytes)"
        );
        return Err(MoverError::new(Code::InvalidArgument, text).at_receiver());
    }
    Ok(())
}

/// Checks a tag.
pub fn check_tag(tag: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if tag.is_empty() || tag.len() > 64 || tag.starts_with('.') || !tag.chars().all(plain) {
        let text = format!("{tag:?} is not a tag: 1 to 64 of letters, digits, '.', '_', '-'");
        return Err(MoverError::new(Code::InvalidArgument, text).at_receiver());
    }
    Ok(())
}

/// The directory of a target, and the names that a copy uses in it.
pub struct Names {
    /// The directory, open.
    pub dir: OwnedFd,
    /// The name as the caller gave it, for messages.
    pub shown: String,
    /// The final name.
    pub base: String,
    /// What has arrived.
    pub part: String,
    /// What of it is durable.
    pub journal: String,
    /// That it was published.
    pub receipt: String,
}

impl Names {
    /// Opens the directory of `name` beneath `root`.
    pub fn open(root: &Path, name: &str, tag: &str) -> Result<Names> {
        check_name(name)?;
        check_tag(tag)?;
        let root = open_root(root)?;
        let (parent, base) = name.rsplit_once('/').unwrap_or((".", name));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let dir = open(&root, parent, flags, Mode::empty()).map_err(|e| refused(name, e))?;
        Ok(Names {
            dir,
            shown: name.to_owned(),
            base: base.to_owned(),
            part: format!(".{base}.dm-{tag}.part"),
            journal: format!(".{base}.dm-{tag}.journal"),
            receipt: format!(".{base}.dm-{tag}.receipt"),
        })
    }

    /// Removes a file; fine when there is none. True when there was one.
    pub fn remove(&self, file: &str) -> Result<bool> {
        match naming::change(&self.dir, Change::Remove(file)) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(self.failed("cannot remove", file, e)),
        }
    }

    /// Makes what happened in the directory durable.
    pub fn sync_dir(&self) -> Result<()> {
        let synced = naming::sync(&self.dir);
        #[cfg(test)]
        let synced = synced.and_then(|()| faults::in_dir(&self.dir, &self.base, Op::SyncDir));
        synced.map_err(|e| self.failed("cannot sync the directory of", &self.base, e))
    }

    /// The error of an operation on one of the files.
    pub fn failed(&self, what: &str, file: &str, error: Errno) -> MoverError {
        MoverError::target_io(
            &format!("{what} {file} (target {:?})", self.shown),
            &error.into(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn names_that_could_lead_out_are_refused() {
        for bad in [
            "",
            "/etc/passwd",
            "../x",
            "a/../b",
            "a//b",
            "a/",
            "./a",
            "a\0b",
            ".",
        ] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_name(&"x".repeat(MAX_BASE + 1)).is_err());
        for good in ["a", "vm/disk.qcow2", "..a", "x y"] {
            assert!(check_name(good).is_ok(), "{good:?}");
        }
        for bad in ["", ".x", "a/b", "a b", &"x".repeat(65)] {
            assert!(check_tag(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_kernel_refuses_symlinks_and_escapes() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("sub")).unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        symlink("../outside", root.join("link")).unwrap();
        symlink("sub", root.join("inner")).unwrap();
        std::fs::write(root.join("file"), b"x").unwrap();
        for bad in ["link/x", "inner/x", "file/x", "missing/x"] {
            let error = Names::open(&root, bad, "t").err().expect(bad);
            assert_eq!(error.code, Code::TargetPath, "{bad}");
        }
        assert!(Names::open(&root, "sub/x", "t").is_ok());
        let root = open_root(&root).unwrap();
        let escape = open(&root, "../outside", OFlags::RDONLY, Mode::empty());
        assert_eq!(escape.err(), Some(Errno::XDEV));
    }
}
