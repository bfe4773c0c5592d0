//! The list of hashes beside a seed.
//!
//! ```text
//! .NAME.dm-hashes:  "DMHASH1\n" | identity of the file [32] | BLAKE3 of the rest [32]
//!                   | for each 64 KiB block: BLAKE3 [32], zeros for zeros
//! ```
//! It is a cache: when it is missing, damaged or about what the file was earlier,
//! the file is read again.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Mode, OFlags};

use crate::base::PIECE;
use crate::beneath;
use crate::digest::Hash;
use crate::seeds::SeedSpec;
use crate::source::{FileSource, Identity, Source};

const MAGIC: &[u8; 8] = b"DMHASH1\n";

/// A seed, open, and its list.
pub struct List {
    dir: OwnedFd,
    name: String,
    source: FileSource,
    file: File,
}

impl List {
    /// Opens a seed; None when it is not there, or no file beneath its root.
    pub fn open(spec: &SeedSpec) -> Option<List> {
        beneath::check_name(&spec.name).ok()?;
        let root = beneath::open_root(&spec.root).ok()?;
        let (parent, base) = spec.name.rsplit_once('/').unwrap_or((".", &spec.name));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let dir = beneath::open(&root, parent, flags, Mode::empty()).ok()?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = File::from(beneath::open(&dir, base, flags, Mode::empty()).ok()?);
        let source = FileSource::of(&file).ok()?;
        Some(List {
            dir,
            name: format!(".{base}.dm-hashes"),
            source,
            file,
        })
    }

    /// The seed as something to read.
    pub fn source(&self) -> &FileSource {
        &self.source
    }

    /// The seed alone.
    pub fn into_parts(self) -> (FileSource, File) {
        (self.source, self.file)
    }

    /// The hashes, if the list is about the file as it is now.
    pub fn load(&self) -> Option<Vec<Hash>> {
        let identity = self.source.identity();
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW;
        let fd = beneath::open(&self.dir, &self.name, flags, Mode::empty()).ok()?;
        let len = identity.size.div_ceil(PIECE as u64) * 32;
        let mut bytes = Vec::new();
        File::from(fd).take(len + 73).read_to_end(&mut bytes).ok()?;
        let body = bytes.strip_prefix(MAGIC)?;
        let (about, body) = body.split_first_chunk::<32>()?;
        let (check, body) = body.split_first_chunk::<32>()?;
        let current = *about == identity.encode() && body.len() as u64 == len;
        let whole = blake3::hash(body).as_bytes() == check;
        (current && whole).then(|| body.as_chunks::<32>().0.to_vec())
    }

    /// Keeps the hashes of the file as it was when it was opened. Without a list
    /// it is read again the next time: a failure is none of the copy.
    pub fn keep(&self, hashes: &[Hash]) {
        if self.source.check_unchanged().is_ok() {
            let _ = self.write(&encode(self.source.identity(), hashes));
        }
    }

    fn write(&self, bytes: &[u8]) -> Option<()> {
        let temporary = format!("{}.new", self.name);
        let _ = rustix::fs::unlinkat(&self.dir, &temporary, AtFlags::empty());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let mode = Mode::from_raw_mode(0o600);
        let fd = beneath::open(&self.dir, &temporary, flags, mode).ok()?;
        let mut file = File::from(fd);
        file.write_all(bytes).ok()?;
        rustix::fs::renameat(&self.dir, &temporary, &self.dir, &self.name).ok()
    }
}

fn encode(identity: Identity, hashes: &[Hash]) -> Vec<u8> {
    let body = hashes.as_flattened();
    let check = blake3::hash(body);
    [MAGIC, identity.encode().as_slice(), check.as_bytes(), body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_worth_something_only_for_the_file_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![1; PIECE + 5]).unwrap();
        let spec = SeedSpec {
            root: dir.path().into(),
            name: "disk".into(),
        };
        let hashes = [[7; 32], [8; 32]];
        let list = List::open(&spec).unwrap();
        assert_eq!(list.load(), None);
        list.keep(&hashes);
        assert_eq!(list.load().as_deref(), Some(hashes.as_slice()));
        let stored = dir.path().join(".disk.dm-hashes");
        let good = std::fs::read(&stored).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&stored, &bad).unwrap();
            assert_eq!(list.load(), None, "byte {at}");
        }
        std::fs::write(&stored, &good[..good.len() - 32]).unwrap();
        assert_eq!(list.load(), None, "cut");
        std::fs::write(&stored, &good).unwrap();
        std::fs::write(&path, vec![2; PIECE + 5]).unwrap();
        assert_eq!(List::open(&spec).unwrap().load(), None, "it was written");
        // Hashes of what it was before it was written are not kept either.
        list.keep(&hashes);
        assert_eq!(List::open(&spec).unwrap().load(), None);
    }
}
