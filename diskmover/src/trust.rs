//! Whose word about holes is taken.
//!
//! A hole that is none becomes zeros in the copy. Local file systems have a good
//! record of telling; what forwards the question to a server, a program or another
//! host answers as that likes: with too much, with what it knew a while ago, or wrong.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

/// What is done about the holes that a source reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// Believed where the file system has a good record.
    Auto,
    /// Believed.
    Trust,
    /// Read like everything else.
    Read,
}

impl Holes {
    /// By its public name.
    pub fn named(name: &str) -> Option<Holes> {
        match name {
            "auto" => Some(Holes::Auto),
            "trust" => Some(Holes::Trust),
            "read" => Some(Holes::Read),
            _ => None,
        }
    }
}

/// The types, as statfs gives them, of file systems that are believed. ZFS is not one:
/// up to 2.2.1 it has reported holes where data was still on its way.
const SOUND: [u32; 6] = [
    0xEF53,      // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x9123_683E, // btrfs
    0x0102_1994, // tmpfs
    0xCA45_1A4E, // bcachefs
    0x794C_7630, // overlay: the file system beneath answers
];

/// Those that people will ask about.
const NAMES: [(u32, &str); 8] = [
    (0x6969, "NFS"),
    (0x6573_5546, "FUSE"),
    (0x0102_1997, "9p"),
    (0xFE53_4D42, "SMB"),
    (0xFF53_4D42, "SMB"),
    (0x00C3_6400, "Ceph"),
    (0x0116_1970, "GFS2"),
    (0x2FC1_2FC1, "ZFS"),
];

/// Why holes of this file are not believed; None when they are.
pub fn doubt(file: &File) -> Option<String> {
    match rustix::fs::fstatfs(file) {
        Ok(found) => doubt_in(found.f_type as u32),
        Err(error) => Some(format!(
            "a file system that does not tell its type ({error})"
        )),
    }
}

/// Whether a file has less on disk than its size.
pub fn is_sparse(file: &File) -> bool {
    let stat = file.metadata();
    stat.is_ok_and(|stat| stat.blocks() * 512 < stat.size())
}

fn doubt_in(kind: u32) -> Option<String> {
    if SOUND.contains(&kind) {
        return None;
    }
    let name = NAMES.iter().find(|(known, _)| *known == kind);
    Some(match name {
        Some((_, name)) => (*name).to_owned(),
        None => format!("a file system of type {kind:#x}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_good_record_is_believed() {
        for kind in SOUND {
            assert_eq!(doubt_in(kind), None, "{kind:#x}");
        }
        for (kind, name) in NAMES {
            assert_eq!(doubt_in(kind).as_deref(), Some(name));
        }
        let unknown = doubt_in(0xBAD_F00D).unwrap();
        assert!(unknown.contains("0xbadf00d"), "{unknown}");
    }

    #[test]
    fn a_real_file_system_that_is_known_to_be_odd_is_doubted() {
        // procfs: every system has it.
        let file = File::open("/proc/self/stat").unwrap();
        assert!(doubt(&file).is_some());
    }
}
