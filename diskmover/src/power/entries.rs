//! Names in a directory, which a power cut takes back: each by itself, in any order.
//!
//! A file that loses its last name is kept aside, in a directory "lost", so that a cut
//! can give it back: it is the same inode then, as it would be.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::{Errno, Result};

use super::{Grid, State, current};
use crate::faults;
use crate::naming::Change;
use crate::pool::lock;

/// A name, the inode that had it, and the one that has it now.
type Entry = (String, Option<u64>, Option<u64>);

/// What no sync of the directory has covered, each change with its names.
#[derive(Default)]
pub(super) struct Entries {
    dir: PathBuf,
    changes: Vec<Vec<Entry>>,
    kept_aside: u64,
}

/// Creates or opens a file.
pub fn create(
    dir: &OwnedFd,
    name: &str,
    open: impl FnOnce() -> Result<OwnedFd>,
) -> Result<OwnedFd> {
    with_power(dir, &[name], |_| open(), &format!("create {name}"))
}

/// Makes a change.
pub fn change(dir: &OwnedFd, change: Change<'_>) -> Result<()> {
    let (names, goes) = match &change {
        Change::Replace(from, to) => (vec![*from, *to], Some(*to)),
        Change::Rename(from, to) | Change::Link(from, to) => (vec![*from, *to], None),
        Change::Remove(name) => (vec![*name], Some(*name)),
    };
    let make = |entries: Option<&mut Entries>| {
        let is_kept = match (entries, goes) {
            (Some(entries), Some(goes)) => entries.keep_aside(goes),
            _ => false,
        };
        match change {
            Change::Remove(_) if is_kept => Ok(()),
            other => other.make(dir),
        }
    };
    with_power(dir, &names, make, &change.to_string())
}

/// Makes all changes durable.
pub fn sync(dir: &OwnedFd) -> Result<()> {
    let Some(grid) = current() else {
        return rustix::fs::fsync(dir);
    };
    let mut state = lock(&grid.state);
    state.step().map_err(|_| Errno::IO)?;
    state.entries.changes.clear();
    state.log.push("sync the directory".to_owned());
    Ok(())
}

fn with_power<T>(
    dir: &OwnedFd,
    names: &[&str],
    make: impl FnOnce(Option<&mut Entries>) -> Result<T>,
    what: &str,
) -> Result<T> {
    let Some(grid) = current() else {
        return make(None);
    };
    let State { entries, log, .. } = &mut *stepped(&grid)?;
    entries.dir = faults::path_of(dir.as_fd());
    let before: Vec<_> = names.iter().map(|name| entries.inode(name)).collect();
    let made = make(Some(entries))?;
    let changed = names.iter().zip(before);
    let changed = changed.map(|(name, before)| ((*name).to_owned(), before, entries.inode(name)));
    let changed: Vec<_> = changed.filter(|(_, before, now)| before != now).collect();
    if !changed.is_empty() {
        entries.changes.push(changed);
        log.push(what.to_owned());
    }
    Ok(made)
}

fn stepped(grid: &Grid) -> Result<std::sync::MutexGuard<'_, State>> {
    let mut state = lock(&grid.state);
    state.step().map_err(|_| Errno::IO)?;
    Ok(state)
}

impl Entries {
    /// Takes changes back, those that `goes` names.
    pub(super) fn lose(&mut self, mut goes: impl FnMut() -> bool) {
        let mut names: BTreeMap<String, Option<u64>> = BTreeMap::new();
        for change in std::mem::take(&mut self.changes) {
            let is_lost = goes();
            for (name, before, now) in change {
                let there = names.entry(name).or_insert(before);
                if !is_lost {
                    *there = now;
                }
            }
        }
        if names.is_empty() {
            return;
        }
        for name in names.keys() {
            if self.inode(name).is_some() {
                fs::rename(self.dir.join(name), self.aside()).unwrap();
            }
        }
        for (name, inode) in &names {
            if let Some(inode) = inode {
                let mut kept = files_in(&self.lost())
                    .into_iter()
                    .chain(files_in(&self.dir));
                let file = kept
                    .find(|file| inode_of(file) == Some(*inode))
                    .expect("it is kept");
                fs::hard_link(file, self.dir.join(name)).unwrap();
            }
        }
        // What has a name again is not kept by this one as well.
        for file in files_in(&self.lost()) {
            if fs::symlink_metadata(&file).unwrap().nlink() > 1 {
                fs::remove_file(file).unwrap();
            }
        }
    }

    /// Moves what loses its only name out of the way; false when it has none, or others.
    fn keep_aside(&mut self, name: &str) -> bool {
        let path = self.dir.join(name);
        let is_last = fs::symlink_metadata(&path).is_ok_and(|stat| stat.nlink() == 1);
        if is_last {
            fs::rename(path, self.aside()).unwrap();
        }
        is_last
    }

    fn aside(&mut self) -> PathBuf {
        self.kept_aside += 1;
        let lost = self.lost();
        fs::create_dir_all(&lost).unwrap();
        lost.join(self.kept_aside.to_string())
    }

    fn lost(&self) -> PathBuf {
        self.dir.join("lost")
    }

    fn inode(&self, name: &str) -> Option<u64> {
        inode_of(&self.dir.join(name))
    }
}

fn files_in(dir: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(dir).into_iter().flatten();
    files.map(|file| file.unwrap().path()).collect()
}

fn inode_of(path: &Path) -> Option<u64> {
    fs::symlink_metadata(path).ok().map(|stat| stat.ino())
}
