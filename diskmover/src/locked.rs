//! A file that is locked against other copies, and against QEMU.
//!
//! The lock belongs to the open file, not to the process: a program that any thread
//! starts has a copy of the descriptor until it is loaded, and the lock would outlive
//! our end of it. So it is let go in words, before the file is closed. A child that goes
//! on with this program must not do that, and does not (py/owned.rs).

use std::fs::File;
use std::io;
use std::ops::Deref;

use crate::sys;

/// An open file and its lock; dropping it lets go of both.
pub struct Locked(File);

impl Locked {
    /// Takes the exclusive lock of a file; None when somebody else holds one.
    pub fn take(file: File) -> io::Result<Option<Locked>> {
        let is_free = sys::try_lock(&file)?;
        Ok(is_free.then(|| Locked(file)))
    }
}

impl Deref for Locked {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // Closing is what is left when that fails.
        let _ = sys::unlock(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn open(dir: &tempfile::TempDir) -> File {
        let how = File::options().write(true).create(true).clone();
        how.open(dir.path().join("part")).unwrap()
    }

    #[test]
    fn the_lock_goes_with_its_owner_whoever_else_has_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let locked = Locked::take(open(&dir)).unwrap().expect("nobody has it");
        let _copy = locked.try_clone().unwrap();
        assert!(Locked::take(open(&dir)).unwrap().is_none());
        drop(locked);
        assert!(Locked::take(open(&dir)).unwrap().is_some());
    }

    #[test]
    fn a_child_that_inherits_the_file_does_not_keep_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let locked = Locked::take(open(&dir)).unwrap().expect("nobody has it");
        let inherited = Stdio::from(locked.try_clone().unwrap());
        let mut child = Command::new("cat");
        let child = child.stdin(Stdio::piped()).stdout(inherited).spawn();
        let mut child = child.unwrap();
        drop(locked);
        assert!(Locked::take(open(&dir)).unwrap().is_some());
        drop(child.stdin.take()); // it has lived until here
        assert!(child.wait().unwrap().success());
    }
}
