//! Whether a QEMU has an image open for writing.
//!
//! QEMU locks a byte of each image for every permission that it uses: 100 + n, where
//! n is 1 for writing and 3 for resizing. Who only reads (a base image, `qemu-img
//! info`, `qemu-nbd --read-only`) has neither. The locks are seen from other hosts too
//! when the file system carries them. What QEMU has not written back yet, such as
//! tables of a qcow2, is not in the file: also of an idle guest its copy can be none.

use std::fs::File;

use crate::error::{Code, MoverError, Result};
use crate::sys;

const OF_WRITERS: [u64; 2] = [101, 103];

/// Fails when a QEMU can write to the image; `shown` is what messages call it.
pub fn check(image: &File, shown: &str) -> Result<()> {
    // Where there are no such locks nobody holds one.
    let is_locked = |byte: &u64| sys::is_locked(image, *byte).unwrap_or(false);
    if !OF_WRITERS.iter().any(is_locked) {
        return Ok(());
    }
    let text = format!(
        "{shown} is open for writing in a QEMU, so what is copied may be no disk at all; stop the guest first, or let libvirt export its disk while it runs (virsh backup-begin, pull mode) and copy that with --nbd"
    );
    Err(MoverError {
        retryable: true,
        ..MoverError::new(Code::SourceChanged, text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lock as QEMU sets it, held by the file.
    fn locked(path: &std::path::Path, byte: u64) -> File {
        let file = File::open(path).unwrap();
        sys::lock_shared(&file, byte).unwrap();
        file
    }

    #[test]
    fn who_writes_is_seen_and_who_reads_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let image = File::create_new(&path).unwrap();
        for (byte, is_writer) in [(100, false), (101, true), (103, true), (201, false)] {
            let holder = locked(&path, byte);
            let found = check(&image, "image");
            assert_eq!(found.is_err(), is_writer, "byte {byte}");
            drop(holder);
        }
        check(&image, "image").unwrap();
    }
}
