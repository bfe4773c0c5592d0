//! The durable receipt: proof that a tag published a file, and which inode it is.
//!
//! It is written before the part gets its final name, and counts only when the
//! file of that name is the inode that it gives: so it is right whenever the
//! process is killed.

use std::fs::File;
use std::io::{Read, Write};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use crate::beneath::{self, Names};
use crate::digest::{Hash, hex};
use crate::error::Result;
#[cfg(test)]
use crate::faults::{self, Op};
use crate::messages::Receipt;
use crate::mode::CopyMode;

const TITLE: &str = "diskmover receipt 1";

/// Names an inode for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    /// Inode number; a new file can get that of a removed one.
    pub inode: u64,
    /// Time of its creation in ns; 0 when the file system does not tell.
    pub born_ns: i64,
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
pub fn write(names: &Names, receipt: &Receipt, id: FileId) -> Result<()> {
    let mut text = format!(
        "{TITLE}\nvolume {}\nsize_bytes {}\ndata_bytes {}\nwire_bytes {}\ndigest {}\nmode {}\ninode {}\nborn_ns {}\n",
        hex(receipt.volume.as_bytes()),
        receipt.size,
        receipt.data,
        receipt.wire,
        hex(&receipt.root),
        receipt.mode.name(),
        id.inode,
        id.born_ns,
    );
    text.push_str(&format!(
        "check {}\n",
        blake3::hash(text.as_bytes()).to_hex()
    ));
    let temporary = format!("{}.new", names.receipt);
    names.remove(&temporary)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    let failed = |e| names.failed("cannot write", &names.receipt, e);
    let fd =
        beneath::open(&names.dir, &temporary, flags, Mode::from_raw_mode(0o600)).map_err(failed)?;
    let mut file = File::from(fd);
    let io = |e: std::io::Error| failed(Errno::from_io_error(&e).unwrap_or(Errno::IO));
    let written = file.write_all(text.as_bytes());
    #[cfg(test)]
    let written = written.and_then(|()| Ok(faults::in_dir(&names.dir, &names.receipt, Op::Write)?));
    written.map_err(io)?;
    file.sync_all().map_err(io)?;
    rustix::fs::renameat(&names.dir, &temporary, &names.dir, &names.receipt).map_err(failed)?;
    names.sync_dir()
}

/// Reads the receipt; None when there is none or it is damaged.
pub fn read(names: &Names) -> Result<Option<(Receipt, FileId)>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW;
    let fd = match beneath::open(&names.dir, &names.receipt, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(beneath::refused(&names.receipt, e)),
    };
    let mut text = String::new();
    // Longer than any receipt is damaged; so is what is not text.
    let read = File::from(fd).take(4096).read_to_string(&mut text);
    Ok(read.ok().and_then(|_| parse(&text)))
}

/// The receipt, if the file under the final name is the one that it is about.
pub fn published(names: &Names) -> Result<Option<Receipt>> {
    let Some((receipt, id)) = read(names)? else {
        return Ok(None);
    };
    Ok((file_id(names, &names.base)? == Some(id)).then_some(receipt))
}

fn parse(text: &str) -> Option<(Receipt, FileId)> {
    let (body, check) = text.rsplit_once("check ")?;
    if check.strip_suffix('\n')? != blake3::hash(body.as_bytes()).to_hex().as_str() {
        return None;
    }
    let mut lines = body.lines();
    if lines.next()? != TITLE {
        return None;
    }
    let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
    let volume = String::from_utf8(unhex(field("volume")?)?).ok()?;
    let size = field("size_bytes")?.parse().ok()?;
    let data = field("data_bytes")?.parse().ok()?;
    let wire = field("wire_bytes")?.parse().ok()?;
    let root: Hash = unhex(field("digest")?)?.try_into().ok()?;
    let mode = CopyMode::from_name(field("mode")?)?;
    let inode = field("inode")?.parse().ok()?;
    let born_ns = field("born_ns")?.parse().ok()?;
    Some((
        Receipt {
            volume,
            size,
            data,
            wire,
            root,
            mode,
        },
        FileId { inode, born_ns },
    ))
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

    #[test]
    fn a_receipt_counts_for_its_own_inode_only() {
        let dir = tempfile::tempdir().unwrap();
        let names = Names::open(dir.path(), "disk", "t").unwrap();
        let path = dir.path().join("disk");
        std::fs::write(dir.path().join(&names.part), b"x").unwrap();
        let receipt = Receipt {
            volume: "v\n".into(),
            size: 1,
            data: 1,
            wire: 9,
            root: [7; 32],
            mode: CopyMode::GuestVisible,
        };
        let id = file_id(&names, &names.part).unwrap().unwrap();
        write(&names, &receipt, id).unwrap();
        assert_eq!(published(&names).unwrap(), None, "nothing stands there yet");
        std::fs::rename(dir.path().join(&names.part), &path).unwrap();
        assert_eq!(published(&names).unwrap(), Some(receipt));
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
        let receipt = Receipt {
            volume: "v".into(),
            size: 1,
            data: 1,
            wire: 9,
            root: [7; 32],
            mode: CopyMode::GuestVisible,
        };
        write(&names, &receipt, id).unwrap();
        let path = dir.path().join(&names.receipt);
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            assert_eq!(published(&names).unwrap(), None, "byte {at}");
        }
    }
}
