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
//! another host; and, at some levels, what md is told to discard. That is why nothing
//! is ever gone on from by the count alone.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{fstat, major, minor};

use crate::alignment;
use crate::sys::{ALIGN, AlignedBuf};

/// How often a device is given time to complete what is under way.
const SETTLE_TRIES: usize = 5;
const SETTLE: Duration = Duration::from_millis(20);

/// What one look at a device found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    count: Count,
    /// Nothing was under way, and nothing was counted for a while.
    at_rest: bool,
}

/// Sectors of 512 bytes, since the device appeared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Count {
    written: u64,
    discarded: u64,
}

impl Written {
    /// All sectors as one number, which never becomes less.
    pub fn sum(self) -> u64 {
        self.count.written.wrapping_add(self.count.discarded)
    }

    /// Whether nothing was written between the two looks. A device that was not at
    /// rest is like nothing: what was under way may have landed at any time since.
    pub fn is_like(self, other: Written) -> bool {
        self.at_rest && self == other
    }
}

/// The count, with all that is in the page cache; None when the device has none.
///
/// Some drivers count a write when they take it, others when it is done. So one that
/// is under way is waited for, a while, and then until nothing more is counted.
///
/// Fails when the device cannot be flushed, or the count cannot be read: then nobody
/// knows.
pub fn of(device: &File) -> io::Result<Option<Written>> {
    rustix::fs::fsync(device)?;
    settled(|| {
        // In this order: what is done in between is counted.
        let under_way = under_way(device)?;
        Ok(count(device)?.map(|count| (count, under_way)))
    })
}

/// Looks until two looks in a row find the same count, and nothing under way at the
/// second one; no more than `SETTLE_TRIES` times after the first.
fn settled(look: impl Fn() -> io::Result<Option<(Count, u64)>>) -> io::Result<Option<Written>> {
    let Some((mut count, _)) = look()? else {
        return Ok(None);
    };
    for _ in 0..SETTLE_TRIES {
        std::thread::sleep(SETTLE);
        let Some((now, under_way)) = look()? else {
            return Ok(None);
        };
        if now == count && under_way == 0 {
            let at_rest = true;
            return Ok(Some(Written { count, at_rest }));
        }
        count = now;
    }
    let at_rest = false;
    Ok(Some(Written { count, at_rest }))
}

fn count(device: &File) -> io::Result<Option<Count>> {
    let Some(fields) = numbers(device, "stat")? else {
        return Ok(None);
    };
    let field = |at: usize| fields.get(at).copied();
    Ok(field(6).map(|written| Count {
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

/// Whether some of what is discarded may not be counted: at some of its levels md hands
/// it on before it counts. Also of a partition of such a device.
pub fn misses_discards(device: &File) -> bool {
    is_md(&told(device, "").unwrap_or_default())
}

fn is_md(device: &Path) -> bool {
    ["md", "../md"].iter().any(|md| device.join(md).is_dir())
}

/// Writes that the device has not completed.
fn under_way(device: &File) -> io::Result<u64> {
    let numbers = numbers(device, "inflight")?;
    Ok(numbers.and_then(|both| both.get(1).copied()).unwrap_or(0))
}

/// What the kernel tells of a device in one of its files; None when it has no such.
fn numbers(device: &File, file: &str) -> io::Result<Option<Vec<u64>>> {
    let text = match std::fs::read_to_string(told(device, file)?) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let numbers = text.split_whitespace().map(str::parse);
    let numbers: Result<_, _> = numbers.collect();
    numbers.map(Some).map_err(io::Error::other)
}

/// Where the kernel tells of a device.
fn told(device: &File, file: &str) -> io::Result<PathBuf> {
    let number = fstat(device)?.st_rdev;
    let (major, minor) = (major(number), minor(number));
    Ok(format!("/sys/dev/block/{major}:{minor}/{file}").into())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_is_no_device_has_no_count() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(of(&file).unwrap(), None);
        assert!(!is_counted(&file).unwrap());
    }

    #[test]
    fn md_devices_and_their_partitions_are_known_by_what_sysfs_has() {
        let sys = tempfile::tempdir().unwrap();
        let [raid, disk] = ["md0", "sda"].map(|name| sys.path().join(name));
        std::fs::create_dir_all(raid.join("md")).unwrap();
        let parts = [raid.join("md0p1"), disk.join("sda1")];
        parts
            .iter()
            .for_each(|p| std::fs::create_dir_all(p).unwrap());
        assert!(is_md(&raid) && is_md(&parts[0]));
        assert!(!is_md(&disk) && !is_md(&parts[1]));
    }

    /// What is seen of a device of which this was counted and under way, look by look.
    /// The last one stays.
    fn seen(looks: &[(u64, u64)]) -> Written {
        let number = Cell::new(0);
        let look = || {
            let (written, under_way) = looks[number.get().min(looks.len() - 1)];
            number.set(number.get() + 1);
            let discarded = 0;
            Ok(Some((Count { written, discarded }, under_way)))
        };
        settled(look).unwrap().unwrap()
    }

    #[test]
    fn a_device_is_like_itself_only_if_both_looks_found_it_at_rest() {
        let rest = seen(&[(8, 0)]);
        assert!(rest.is_like(rest));
        // What is under way at first is waited for, in whichever order it is counted.
        for looks in [[(0, 1), (8, 0)], [(8, 1), (8, 0)], [(0, 0), (8, 0)]] {
            assert!(rest.is_like(seen(&looks)), "{looks:?}");
        }
        assert!(!rest.is_like(seen(&[(16, 0)])));
        let slow = seen(&[(8, 1)]);
        assert!(!rest.is_like(slow) && !slow.is_like(rest) && !slow.is_like(slow));
    }

    #[test]
    fn a_device_that_counts_on_all_the_time_is_like_nothing() {
        let looks: Vec<_> = (0..100).map(|written| (written, 0)).collect();
        let busy = seen(&looks);
        assert!(!busy.is_like(busy));
    }
}
