//! What the kernel has counted of writes to a block device.
//!
//! A device has no time of its last write. But its sectors that were written and
//! discarded are counted, whoever did it: of disks, loop devices and partitions when
//! a request is done, of device mapper and md when they take or complete it. What
//! lies in the page cache is counted once it is written back; so the cache is flushed
//! before the count is taken.
//!
//! Not counted here is what reaches the same sectors under another name: of the disk
//! that a partition lies on, of the file or disk beneath, by SCSI passthrough, or by
//! another host. That is why nothing is ever gone on from by the count alone.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::fs::{fstat, major, minor};

use crate::alignment;
use crate::sys::{ALIGN, AlignedBuf};

/// How often a device is given time to complete what is under way.
const SETTLE_TRIES: usize = 5;
const SETTLE: Duration = Duration::from_millis(20);

/// Sectors of 512 bytes, since the device appeared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    written: u64,
    discarded: u64,
}

impl Written {
    /// Both as one number, which never becomes less.
    pub fn sum(self) -> u64 {
        self.written.wrapping_add(self.discarded)
    }
}

/// The count, with all that is in the page cache; None when the device has none.
///
/// Some drivers count a write when they take it. So one that is under way is waited
/// for: it could land after the count that has it. A device that is written all the
/// time never comes to rest, and is seen to change anyway.
///
/// Fails when it cannot be flushed, or the count cannot be read: then nobody knows.
pub fn of(device: &File) -> io::Result<Option<Written>> {
    rustix::fs::fsync(device)?;
    for _ in 0..SETTLE_TRIES {
        if under_way(device)? == 0 {
            break;
        }
        std::thread::sleep(SETTLE);
    }
    let Some(fields) = numbers(device, "stat")? else {
        return Ok(None);
    };
    let field = |at: usize| fields.get(at).copied();
    Ok(field(6).map(|written| Written {
        written,
        // Kernels that have no such field count them as written.
        discarded: field(13).unwrap_or(0),
    }))
}

/// Whether this device is counted at all: a read is, as a write would be. `direct`
/// is the device with O_DIRECT. Some drivers never count, and some when told to.
///
/// Fails when what was read was not counted, and not read either.
pub fn is_counted(direct: &File) -> io::Result<bool> {
    let block = alignment::of(direct).unwrap_or(ALIGN);
    let Some(mut block) = AlignedBuf::new(block) else {
        return Err(io::ErrorKind::OutOfMemory.into());
    };
    let reads = || -> io::Result<Option<u64>> {
        Ok(numbers(direct, "stat")?.and_then(|fields| fields.get(2).copied()))
    };
    let Some(before) = reads()? else {
        return Ok(false);
    };
    let read = direct.read_at(&mut block, 0);
    // What fails on its medium is counted too.
    if reads()? != Some(before) {
        return Ok(true);
    }
    read.map(|count| count == 0)
}

/// Writes that the device has not completed.
fn under_way(device: &File) -> io::Result<u64> {
    let numbers = numbers(device, "inflight")?;
    Ok(numbers.and_then(|both| both.get(1).copied()).unwrap_or(0))
}

/// What the kernel tells of a device in one of its files; None when it has no such.
fn numbers(device: &File, file: &str) -> io::Result<Option<Vec<u64>>> {
    let number = fstat(device)?.st_rdev;
    let path = format!("/sys/dev/block/{}:{}/{file}", major(number), minor(number));
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let numbers = text.split_whitespace().map(str::parse);
    let numbers: Result<_, _> = numbers.collect();
    numbers.map(Some).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_device_has_no_count() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(of(&file).unwrap(), None);
        assert!(!is_counted(&file).unwrap());
    }
}
