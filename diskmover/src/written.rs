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

/// The count, with all that is in the page cache; None when there is none.
///
/// Some drivers count a write when they take it. So one that is under way is waited
/// for: it could land after the count that has it. A device that is written all the
/// time never comes to rest, and is seen to change anyway.
pub fn of(device: &File) -> Option<Written> {
    rustix::fs::fsync(device).ok()?;
    for _ in 0..SETTLE_TRIES {
        if under_way(device).is_none_or(|writes| writes == 0) {
            break;
        }
        std::thread::sleep(SETTLE);
    }
    let fields = numbers(device, "stat")?;
    Some(Written {
        written: *fields.get(6)?,
        // Kernels that have no such field count them as written.
        discarded: fields.get(13).copied().unwrap_or(0),
    })
}

/// Whether this device is counted at all: a read is, as a write would be. `direct`
/// is the device with O_DIRECT. Some drivers never count, and some when told to.
pub fn is_counted(direct: &File) -> bool {
    let block = alignment::of(direct).unwrap_or(ALIGN);
    let Some(mut block) = AlignedBuf::new(block) else {
        return true;
    };
    let reads = || numbers(direct, "stat").and_then(|fields| fields.get(2).copied());
    let before = reads();
    match direct.read_at(&mut block, 0) {
        Ok(0) => true,
        _ => before.is_some() && reads() != before,
    }
}

/// Writes that the device has not completed.
fn under_way(device: &File) -> Option<u64> {
    numbers(device, "inflight")?.get(1).copied()
}

fn numbers(device: &File, file: &str) -> Option<Vec<u64>> {
    let number = fstat(device).ok()?.st_rdev;
    let path = format!("/sys/dev/block/{}:{}/{file}", major(number), minor(number));
    let text = std::fs::read_to_string(path).ok()?;
    text.split_whitespace().map(|n| n.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_device_has_no_count() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(of(&file), None);
    }
}
