//! How a source is told from another one, and from itself after a change.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, SeekFrom, StatxFlags, StatxTimestamp};
use rustix::io::Errno;

/// The time of a write that nobody sees.
const UNSEEN: i64 = i64::MIN;
/// Longer than the steps in which the times of files move.
const STEP_NS: i64 = 20_000_000;
/// How often a file is given a step to come to rest.
const SETTLE_TRIES: usize = 5;

/// What changes when a file is written, replaced or cut.
///
/// Writes to a block device leave no trace in it: while it is open they are counted
/// (written.rs). In between another host could write, whom nobody counts here; so it
/// is another one each time that it is opened, and what an earlier attempt placed has
/// to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Bytes.
    pub size: u64,
    /// Time of the last write, in ns; `i64::MIN` for a block device.
    pub mtime_ns: i64,
    /// Time of the last change of the inode, in ns; of the opening for a block
    /// device.
    pub ctime_ns: i64,
    /// Inode number, or the device number of a block device.
    pub inode: u64,
}

impl Identity {
    /// Whether nothing has happened between the two that would be seen in it.
    pub fn is_like(&self, other: &Identity) -> bool {
        let seen = |id: &Identity| Identity {
            ctime_ns: if id.mtime_ns == UNSEEN {
                0
            } else {
                id.ctime_ns
            },
            ..*id
        };
        seen(self) == seen(other)
    }
}

/// The identity, once a write after it would change it: times move in steps, and
/// a write in the step of the last one would go unseen. So would what a program stores
/// in a page that it has mapped and that is dirty already: so all is written back in
/// between two looks that are alike. A file that is written all the time never comes to
/// rest, and is seen to change anyway.
pub fn settled(file: &File, is_block: bool) -> io::Result<Identity> {
    let mut before = of(file, is_block)?;
    if is_block {
        return Ok(before);
    }
    for _ in 0..SETTLE_TRIES {
        rest(file, before.size);
        let now = of(file, is_block)?;
        let step = now.ctime_ns..now.ctime_ns.saturating_add(STEP_NS);
        if now == before && !step.contains(&now_ns()) {
            break;
        }
        before = now;
        std::thread::sleep(Duration::from_nanos(STEP_NS as u64));
    }
    Ok(before)
}

/// Lets a file come to rest, as well as its file system takes part: where that fails,
/// reads tell what is there.
///
/// Of a write the times tell when it begins; the call can last for seconds. File systems
/// that take the same lock for it wait for its end, ext4 and btrfs when they are asked
/// for data, xfs when there is a read, here of nothing.
fn rest(file: &File, size: u64) {
    let _ = rustix::fs::seek(file, SeekFrom::Data(0));
    let _ = file.read_at(&mut [0], size);
    let _ = rustix::fs::fdatasync(file);
}

fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as i64)
}

/// The identity as it is now, also where other hosts write: what is remembered here of a
/// file of NFS, SMB or FUSE is not asked.
pub fn of(file: &File, is_block: bool) -> io::Result<Identity> {
    if is_block {
        return Ok(Identity {
            size: rustix::fs::seek(file, SeekFrom::End(0))?,
            mtime_ns: UNSEEN,
            ctime_ns: now_ns(),
            inode: rustix::fs::fstat(file)?.st_rdev,
        });
    }
    let ns = |seconds: i64, ns: u64| seconds.wrapping_mul(1_000_000_000).wrapping_add(ns as i64);
    let at = |time: StatxTimestamp| ns(time.tv_sec, time.tv_nsec.into());
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
    match rustix::fs::statx(file, "", flags, StatxFlags::BASIC_STATS) {
        Ok(stat) => Ok(Identity {
            size: stat.stx_size,
            mtime_ns: at(stat.stx_mtime),
            ctime_ns: at(stat.stx_ctime),
            inode: stat.stx_ino,
        }),
        // Not there, or kept from this process.
        Err(Errno::NOSYS | Errno::PERM | Errno::INVAL) => {
            let stat = rustix::fs::fstat(file)?;
            Ok(Identity {
                size: stat.st_size as u64,
                mtime_ns: ns(stat.st_mtime, stat.st_mtime_nsec as u64),
                ctime_ns: ns(stat.st_ctime, stat.st_ctime_nsec as u64),
                inode: stat.st_ino,
            })
        }
        Err(error) => Err(error.into()),
    }
}
