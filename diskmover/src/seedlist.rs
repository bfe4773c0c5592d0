//! The list of hashes beside a seed.
//!
//! ```text
//! .NAME.dm-hashes:  "DMHASH1\n" | identity of the file [32] | BLAKE3 of the rest [32]
//!                   | for each 64 KiB block: BLAKE3 [32], zeros for zeros
//! ```
//! It is a cache: when it is missing, damaged or about what the file was earlier,
//! the file is read again. It is read and written piece by piece, 512 MiB for each
//! TiB of the seed as it may be.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::base::PIECE;
use crate::beneath;
use crate::digest::Hash;
use crate::locked::Locked;
use crate::seeds::SeedSpec;
use crate::source::{FileSource, Source};

const MAGIC: &[u8; 8] = b"DMHASH1\n";
const HEADER: usize = 8 + 32 + 32;
/// Bytes of hashes in memory at a time.
const AT_ONCE: usize = 1 << 20;

/// What takes hashes of a seed's blocks, from this block on.
pub type Sink<'a> = &'a mut dyn FnMut(u64, &[Hash]);

/// A seed, open, and its list.
pub struct List {
    dir: OwnedFd,
    name: String,
    source: FileSource,
    file: File,
}

/// A list in the making. Dropped before it is kept, it leaves nothing.
pub struct Draft<'a> {
    list: &'a List,
    file: Locked,
    name: String,
    failed: bool,
    kept: bool,
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

    /// Gives the hashes to `sink`. Whether the list is whole, and about the file as
    /// it is now, is known at the end: unless it is true, they are worth nothing.
    /// `go_on` is asked now and then, and ends it.
    pub fn load(&self, sink: Sink<'_>, go_on: &dyn Fn() -> bool) -> bool {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW;
        let opened = beneath::open(&self.dir, &self.name, flags, Mode::empty());
        let Ok(mut file) = opened.map(File::from) else {
            return false;
        };
        let mut head = [0; HEADER];
        if file.read_exact(&mut head).is_err() || head[..40] != self.about() {
            return false;
        }
        each_piece(&file, self.body_len(), sink, go_on).is_some_and(|check| head[40..] == check)
            && file
                .metadata()
                .is_ok_and(|it| it.len() == HEADER as u64 + self.body_len())
    }

    /// Begins a new list; None when nothing can be written there, or somebody else
    /// is at it: without a list the seed is read again the next time.
    pub fn draft(&self) -> Option<Draft<'_>> {
        let name = format!("{}.new", self.name);
        let created = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let create = || beneath::open(&self.dir, &name, created, Mode::from_raw_mode(0o600));
        let fd = match create() {
            Err(Errno::EXIST) => {
                // Whoever makes one holds its lock; one without was left by a crash.
                let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK;
                let old = beneath::open(&self.dir, &name, flags, Mode::empty()).ok()?;
                let _old = Locked::take(File::from(old)).ok()??;
                rustix::fs::unlinkat(&self.dir, &name, AtFlags::empty()).ok()?;
                create().ok()?
            }
            other => other.ok()?,
        };
        let draft = Draft {
            list: self,
            file: Locked::take(File::from(fd)).ok()??,
            name,
            failed: false,
            kept: false,
        };
        // What is never written reads as zeros, and is for zeros.
        let sized = draft.file.set_len(HEADER as u64 + self.body_len());
        sized.is_ok().then_some(draft)
    }

    fn about(&self) -> [u8; 40] {
        let mut bytes = [0; 40];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..].copy_from_slice(&self.source.identity().encode());
        bytes
    }

    fn body_len(&self) -> u64 {
        self.source.identity().size.div_ceil(PIECE as u64) * 32
    }
}

impl Draft<'_> {
    /// Takes hashes, from this block on; in any order.
    pub fn put(&mut self, first: u64, hashes: &[Hash]) {
        let at = HEADER as u64 + first * 32;
        let written = self.file.write_all_at(hashes.as_flattened(), at);
        self.failed |= written.is_err();
    }

    /// Makes it the list of the file as it was when it was opened. A failure is none
    /// of the copy.
    pub fn keep(mut self, go_on: &dyn Fn() -> bool) {
        if !self.failed && self.list.source.check_unchanged().is_ok() {
            self.kept = self.give_name(go_on).is_some();
        }
    }

    fn give_name(&self, go_on: &dyn Fn() -> bool) -> Option<()> {
        let list = self.list;
        let check = each_piece(&self.file, list.body_len(), &mut |_, _| {}, go_on)?;
        self.file.write_all_at(&list.about(), 0).ok()?;
        self.file.write_all_at(&check, 40).ok()?;
        rustix::fs::renameat(&list.dir, &self.name, &list.dir, &list.name).ok()
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let _ = rustix::fs::unlinkat(&self.list.dir, &self.name, AtFlags::empty());
        }
    }
}

/// Goes through the hashes of a list once; BLAKE3 of them, or None when they end
/// early or `go_on` denies.
fn each_piece(file: &File, len: u64, sink: Sink<'_>, go_on: &dyn Fn() -> bool) -> Option<Hash> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; AT_ONCE];
    let mut at = 0;
    while at < len {
        let piece = &mut buffer[..(len - at).min(AT_ONCE as u64) as usize];
        file.read_exact_at(piece, HEADER as u64 + at).ok()?;
        hasher.update(piece);
        sink(at / 32, piece.as_chunks::<32>().0);
        at += piece.len() as u64;
        go_on().then_some(())?;
    }
    Some(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the list says; None when it is worth nothing.
    fn load(list: &List) -> Option<Vec<Hash>> {
        let mut found = Vec::new();
        let mut sink = |first: u64, hashes: &[Hash]| {
            assert_eq!(first, found.len() as u64);
            found.extend_from_slice(hashes);
        };
        list.load(&mut sink, &|| true).then_some(found)
    }

    fn keep(list: &List, hashes: &[Hash]) {
        let mut draft = list.draft().unwrap();
        for (block, hash) in hashes.iter().enumerate().rev() {
            draft.put(block as u64, std::slice::from_ref(hash));
        }
        draft.keep(&|| true);
    }

    fn seed(dir: &tempfile::TempDir) -> SeedSpec {
        std::fs::write(dir.path().join("disk"), vec![1; PIECE + 5]).unwrap();
        SeedSpec {
            root: dir.path().into(),
            name: "disk".into(),
        }
    }

    #[test]
    fn a_list_is_worth_something_only_for_the_file_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let spec = seed(&dir);
        let hashes = [[7; 32], [8; 32]];
        let list = List::open(&spec).unwrap();
        assert_eq!(load(&list), None);
        keep(&list, &hashes);
        assert_eq!(load(&list).as_deref(), Some(hashes.as_slice()));
        let stored = dir.path().join(".disk.dm-hashes");
        let good = std::fs::read(&stored).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&stored, &bad).unwrap();
            assert_eq!(load(&list), None, "byte {at}");
        }
        std::fs::write(&stored, &good[..good.len() - 32]).unwrap();
        assert_eq!(load(&list), None, "cut");
        std::fs::write(&stored, [&good[..], b"x"].concat()).unwrap();
        assert_eq!(load(&list), None, "more of it");
        std::fs::write(&stored, &good).unwrap();
        std::fs::write(dir.path().join("disk"), vec![2; PIECE + 5]).unwrap();
        assert_eq!(load(&List::open(&spec).unwrap()), None, "it was written");
        // Hashes of what it was before it was written are not kept either.
        keep(&list, &hashes);
        assert_eq!(load(&List::open(&spec).unwrap()), None);
    }

    #[test]
    fn one_makes_a_list_at_a_time_and_leaves_nothing_half_done() {
        let dir = tempfile::tempdir().unwrap();
        let list = List::open(&seed(&dir)).unwrap();
        let draft = dir.path().join(".disk.dm-hashes.new");
        std::fs::write(&draft, b"of a crash").unwrap();
        let mine = list.draft().expect("a leftover is in the way");
        assert!(list.draft().is_none(), "two at it");
        assert!(draft.exists());
        drop(mine);
        assert!(!draft.exists());
        keep(&list, &[[7; 32], [0; 32]]);
        assert_eq!(load(&list), Some(vec![[7; 32], [0; 32]]));
        assert!(!draft.exists());
    }
}
