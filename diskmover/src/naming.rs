//! How the files of a copy get, change and lose their names, and when that is durable.
//!
//! All of it goes through here, as all writes of content go through store.rs: it is
//! where tests cut the power (power.rs) between two of these, and lose what no sync of
//! the directory had covered.

use std::fmt::{self, Display, Formatter};
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};

use crate::beneath;
#[cfg(test)]
use crate::power::entries as power;

/// What happens to names of one directory at once.
#[derive(Clone, Copy, Debug)]
pub enum Change<'a> {
    /// A file gets another name, in place of what has it.
    Replace(&'a str, &'a str),
    /// A file gets another name, which nothing has.
    Rename(&'a str, &'a str),
    /// A file gets a second name, which nothing has.
    Link(&'a str, &'a str),
    /// A name goes.
    Remove(&'a str),
}

impl Change<'_> {
    /// Makes it.
    pub fn make(self, dir: &OwnedFd) -> rustix::io::Result<()> {
        match self {
            Change::Replace(from, to) => rustix::fs::renameat(dir, from, dir, to),
            Change::Rename(from, to) => {
                rustix::fs::renameat_with(dir, from, dir, to, RenameFlags::NOREPLACE)
            }
            Change::Link(from, to) => rustix::fs::linkat(dir, from, dir, to, AtFlags::empty()),
            Change::Remove(name) => rustix::fs::unlinkat(dir, name, AtFlags::empty()),
        }
    }
}

impl Display for Change<'_> {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Change::Replace(from, to) => write!(out, "replace {to} by {from}"),
            Change::Rename(from, to) => write!(out, "rename {from} to {to}"),
            Change::Link(from, to) => write!(out, "link {from} to {to}"),
            Change::Remove(name) => write!(out, "remove {name}"),
        }
    }
}

/// Opens a file that may be new; `flags` say what to do when it is there.
pub fn create(dir: &OwnedFd, name: &str, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
    let open = || beneath::open(dir, name, flags | OFlags::CREATE | OFlags::NOFOLLOW, mode);
    #[cfg(test)]
    return power::create(dir, name, open);
    #[cfg(not(test))]
    open()
}

/// Changes names; durable once the directory is.
pub fn change(dir: &OwnedFd, change: Change<'_>) -> rustix::io::Result<()> {
    #[cfg(test)]
    return power::change(dir, change);
    #[cfg(not(test))]
    change.make(dir)
}

/// Makes all names of a directory durable.
pub fn sync(dir: &OwnedFd) -> rustix::io::Result<()> {
    #[cfg(test)]
    return power::sync(dir);
    #[cfg(not(test))]
    rustix::fs::fsync(dir)
}
