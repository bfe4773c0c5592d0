//! The durable receipt: proof that a tag published a file, and which inode it is.
//!
//! It is written before the part gets its final name, and counts only when the
//! file of that name is the inode that it gives: so it is right whenever the
//! process is killed. It answers for that file only as long as nobody has written to
//! it: what was placed and used since is no copy any more.

use std::fs::File;
use std::io::Read;
use std::ops::Range;

use rustix::fs::{AtFlags, Mode, OFlags, Stat, StatxFlags};
use rustix::io::Errno;

use crate::beneath::{self, Names};
use crate::digest::{Hash, hex};
use crate::error::{Code, MoverError, Result};
use crate::messages::Receipt;
use crate::mode::CopyMode;
use crate::naming::{self, Change};
use crate::store::{self, Store};
use crate::unreadable::{MOST_RANGES, Unreadable};

const TITLE: &str = "diskmover receipt 1";
/// Of a degraded copy: whoever does not know of such must not take it for a good one.
const DEGRADED_TITLE: &str = "diskmover receipt 2";
/// Longer than any receipt.
const LONGEST: u64 = 4096 + 64 * MOST_RANGES as u64;

/// Names an inode for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    /// Inode number; a new file can get that of a removed one.
    pub inode: u64,
    /// Time of its creation in ns; 0 when the file system does not tell.
    pub born_ns: i64,
}

/// Changes when the file or device is written: the time of the last write to a file
/// in ns, or what was written to a device.
pub type Stamp = u64;

/// What was published, and how it was found afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The proof.
    pub receipt: Receipt,
    /// Which file or device it is about.
    pub id: FileId,
    /// As it was then; None when nobody knew.
    pub stamp: Option<Stamp>,
}

impl Published {
    /// Whether the place has not been written to since, as far as is known; `now` is
    /// its stamp.
    pub fn is_untouched(&self, now: Option<Stamp>) -> bool {
        self.stamp.is_none() || self.stamp == now
    }

    /// Fails when the place has been written to since; `now` is its stamp.
    pub fn check_untouched(&self, names: &Names, now: Option<Stamp>) -> Result<()> {
        if self.is_untouched(now) {
            return Ok(());
        }
        let text = format!(
            "this copy has placed {:?} before, and it has been written to since; move it out of the way to copy again",
            names.shown
        );
        Err(MoverError::new(Code::TargetExists, text).at_receiver())
    }
}

/// The stamp of the file under `file`.
pub fn file_stamp(names: &Names, file: &str) -> Result<Option<Stamp>> {
    match rustix::fs::statat(&names.dir, file, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stamp_of(&stat))),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(names.failed("cannot stat", file, e)),
    }
}

/// The stamp of a file that is like this.
pub fn stamp_of(stat: &Stat) -> Stamp {
    let ns = stat.st_mtime.wrapping_mul(1_000_000_000);
    (ns as u64).wrapping_add(stat.st_mtime_nsec)
}

/// What stands under `file`, if anything does.
pub fn file_id(names: &Names, file: &str) -> Result<Option<FileId>> {
    let wanted = StatxFlags::INO | StatxFlags::BTIME;
    match rustix::fs::statx(&names.dir, file, AtFlags::SYMLINK_NOFOLLOW, wanted) {
        Ok(stat) => {
            // Without birth times (old file systems) the inode number must do.
            let known = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
            let born = stat.stx_btime.tv_sec * 1_000_000_000 + i64::from(stat.stx_btime.tv_nsec);
            Ok(Some(FileId {
                inode: stat.stx_ino,
                born_ns: if known { born } else { 0 },
            }))
        }
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(names.failed("cannot stat", file, e)),
    }
}

/// Writes the receipt for the file that now stands under `names.part`, durably.
pub fn write(names: &Names, receipt: &Receipt, id: FileId, stamp: Option<Stamp>) -> Result<()> {
    let title = match receipt.unreadable.is_empty() {
        true => TITLE,
        false => DEGRADED_TITLE,
    };
    let mut text = format!(
        "{title}\nvolume {}\nsize_bytes {}\ndata_bytes {}\nwire_bytes {}\ndigest {}\nmode {}\ninode {}\nborn_ns {}\n",
        hex(receipt.volume.as_bytes()),
        receipt.size,
        receipt.data,
        receipt.wire,
        hex(&receipt.root),
        receipt.mode.name(),
        id.inode,
        id.born_ns,
    );
    if let Some(stamp) = stamp {
        text.push_str(&format!("stamp {stamp}\n"));
    }
    for range in receipt.unreadable.ranges() {
        let len = range.end - range.start;
        text.push_str(&format!("unreadable {} {len}\n", range.start));
    }
    text.push_str(&format!(
        "check {}\n",
        blake3::hash(text.as_bytes()).to_hex()
    ));
    let temporary = format!("{}.new", names.receipt);
    names.remove(&temporary)?;
    let flags = OFlags::WRONLY | OFlags::EXCL;
    let failed = |e| names.failed("cannot write", &names.receipt, e);
    let mode = Mode::from_raw_mode(0o600);
    let fd = naming::create(&names.dir, &temporary, flags, mode).map_err(failed)?;
    let file = Store::new(File::from(fd));
    let io = |e: std::io::Error| failed(Errno::from_io_error(&e).unwrap_or(Errno::IO));
    file.write_at(text.as_bytes(), 0).map_err(io)?;
    store::sync_all(file.file()).map_err(failed)?;
    let named = Change::Replace(&temporary, &names.receipt);
    naming::change(&names.dir, named).map_err(failed)?;
    names.sync_dir()
}

/// Reads the receipt; None when there is none or it is damaged.
pub fn read(names: &Names) -> Result<Option<Published>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW;
    let fd = match beneath::open(&names.dir, &names.receipt, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(beneath::refused(&names.receipt, e)),
    };
    let mut text = String::new();
    // Longer than any receipt is damaged; so is what is not text.
    let read = File::from(fd).take(LONGEST).read_to_string(&mut text);
    Ok(read.ok().and_then(|_| parse(&text)))
}

/// The receipt, if the file under the final name is the one that it is about.
pub fn published(names: &Names) -> Result<Option<Published>> {
    let Some(mut published) = read(names)? else {
        return Ok(None);
    };
    if file_id(names, &names.base)? != Some(published.id) {
        return Ok(None);
    }
    let stat = rustix::fs::statat(&names.dir, &names.base, AtFlags::SYMLINK_NOFOLLOW);
    published.receipt.allocated = stat.ok().map(|stat| allocated(&stat));
    Ok(Some(published))
}

/// Bytes that the file system has allocated for a file that is like this.
pub fn allocated(stat: &Stat) -> u64 {
    (stat.st_blocks as u64).saturating_mul(512)
}

fn parse(text: &str) -> Option<Published> {
    let (body, check) = text.rsplit_once("check ")?;
    if check.strip_suffix('\n')? != blake3::hash(body.as_bytes()).to_hex().as_str() {
        return None;
    }
    let mut lines = body.lines().peekable();
    let is_degraded = match lines.next()? {
        TITLE => false,
        DEGRADED_TITLE => true,
        _ => return None,
    };
    let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
    let volume = String::from_utf8(unhex(field("volume")?)?).ok()?;
    let size = field("size_bytes")?.parse().ok()?;
    let data = field("data_bytes")?.parse().ok()?;
    let wire = field("wire_bytes")?.parse().ok()?;
    let root: Hash = unhex(field("digest")?)?.try_into().ok()?;
    let mode = CopyMode::from_name(field("mode")?)?;
    let inode = field("inode")?.parse().ok()?;
    let born_ns = field("born_ns")?.parse().ok()?;
    let stamp = match lines.next_if(|line| line.starts_with("stamp ")) {
        Some(line) => Some(line.strip_prefix("stamp ")?.parse().ok()?),
        None => None,
    };
    let ranges: Option<Vec<_>> = lines.map(parse_range).collect();
    let unreadable = Unreadable::of(ranges?, size)?;
    if unreadable.is_empty() == is_degraded {
        return None;
    }
    Some(Published {
        receipt: Receipt {
            volume,
            size,
            data,
            wire,
            root,
            mode,
            unreadable,
            allocated: None,
        },
        id: FileId { inode, born_ns },
        stamp,
    })
}

fn parse_range(line: &str) -> Option<Range<u64>> {
    let (offset, len) = line.strip_prefix("unreadable ")?.split_once(' ')?;
    let offset: u64 = offset.parse().ok()?;
    Some(offset..offset.checked_add(len.parse().ok()?)?)
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |c: u8| (c as char).to_digit(16).map(|d| d as u8);
    text.as_bytes()
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipt_of(volume: &str) -> Receipt {
        Receipt {
            volume: volume.into(),
            size: 1,
            data: 1,
            wire: 9,
            root: [7; 32],
            mode: CopyMode::GuestVisible,
            unreadable: Unreadable::default(),
            allocated: None,
        }
    }

    #[test]
    fn a_receipt_counts_for_its_own_inode_only() {
        let dir = tempfile::tempdir().unwrap();
        let names = Names::open(dir.path(), "disk", "t").unwrap();
        let path = dir.path().join("disk");
        std::fs::write(dir.path().join(&names.part), b"x").unwrap();
        let receipt = receipt_of("v\n");
        let id = file_id(&names, &names.part).unwrap().unwrap();
        let stamp = file_stamp(&names, &names.part).unwrap();
        write(&names, &receipt, id, stamp).unwrap();
        assert_eq!(published(&names).unwrap(), None, "nothing stands there yet");
        std::fs::rename(dir.path().join(&names.part), &path).unwrap();
        let found = published(&names).unwrap().unwrap();
        assert!(found.receipt.allocated.is_some(), "a file has blocks");
        let receipt = Receipt {
            allocated: found.receipt.allocated,
            ..receipt
        };
        let expected = Published { receipt, id, stamp };
        assert_eq!(found, expected);
        let now = || file_stamp(&names, "disk").unwrap();
        found.check_untouched(&names, now()).unwrap();
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(1);
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(later)
            .unwrap();
        let error = found.check_untouched(&names, now()).unwrap_err();
        assert_eq!(error.code, Code::TargetExists);
        // Older receipts do not know how it was.
        let older = Published {
            stamp: None,
            ..found
        };
        older.check_untouched(&names, now()).unwrap();
        std::fs::rename(&path, dir.path().join("kept")).unwrap();
        std::fs::write(&path, b"x").unwrap();
        assert_eq!(
            published(&names).unwrap(),
            None,
            "another file stands there"
        );
    }

    #[test]
    fn a_damaged_receipt_is_no_receipt() {
        let dir = tempfile::tempdir().unwrap();
        let names = Names::open(dir.path(), "disk", "t").unwrap();
        std::fs::write(dir.path().join("disk"), b"x").unwrap();
        let id = file_id(&names, "disk").unwrap().unwrap();
        let receipt = receipt_of("v");
        write(&names, &receipt, id, Some(5)).unwrap();
        let path = dir.path().join(&names.receipt);
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            assert_eq!(published(&names).unwrap(), None, "byte {at}");
        }
    }

    #[test]
    fn a_degraded_receipt_tells_what_is_missing_and_has_another_title() {
        let dir = tempfile::tempdir().unwrap();
        let names = Names::open(dir.path(), "disk", "t").unwrap();
        std::fs::write(dir.path().join("disk"), b"x").unwrap();
        let id = file_id(&names, "disk").unwrap().unwrap();
        let size = 4 * MOST_RANGES as u64;
        let many = (0..MOST_RANGES as u64).map(|n| n * 4..n * 4 + 3).collect();
        let receipt = Receipt {
            volume: "v".repeat(255),
            size,
            data: 1,
            wire: 9,
            root: [7; 32],
            mode: CopyMode::Verbatim,
            unreadable: Unreadable::of(many, size).unwrap(),
            allocated: None,
        };
        write(&names, &receipt, id, None).unwrap();
        let found = read(&names).unwrap().unwrap();
        assert_eq!(found.receipt, receipt);
        let text = std::fs::read_to_string(dir.path().join(&names.receipt)).unwrap();
        assert!(
            text.starts_with("diskmover receipt 2\n"),
            "taken for a good one"
        );
        // One that says that it is good, and is not, counts for nothing.
        let (body, _) = text.split_once("check ").unwrap();
        let body = body.replacen(DEGRADED_TITLE, TITLE, 1);
        let check = blake3::hash(body.as_bytes()).to_hex();
        assert_eq!(parse(&format!("{body}check {check}\n")), None);
    }
}
