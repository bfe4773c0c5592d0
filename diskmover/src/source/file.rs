//! A regular file or a block device as a source.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::seen::{Look, Seen};
use super::{Identity, Source};
use crate::alignment;
use crate::digest::{self, Bitmap};
use crate::error::{Code, MoverError, Result};
use crate::identity;
use crate::in_use;
use crate::note;
use crate::passing::Passing;
use crate::plan::Extents;
use crate::pool::lock;
use crate::salvage::{self, Salvage};
use crate::store::{Disk, disk};
use crate::sys::ALIGN;
use crate::trust;

/// An open regular file or block device.
pub struct FileSource {
    path: PathBuf,
    file: Disk,
    direct: Option<Disk>,
    /// What direct I/O reads whole.
    block: usize,
    passing: Passing,
    is_block: bool,
    size: u64,
    seen: Mutex<Seen>,
    told_cached: AtomicBool,
    salvage: Option<Salvage>,
}

/// How to look for holes.
struct Map {
    file: Disk,
    size: u64,
    trust: bool,
}

impl FileSource {
    /// Opens for reading; a symlink as the last part is refused.
    pub fn open(path: &Path) -> Result<FileSource> {
        FileSource::open_with(path, None)
    }

    /// The same, read around what its medium does not give any more.
    pub fn salvaged(path: &Path, salvage: Salvage) -> Result<FileSource> {
        FileSource::open_with(path, Some(salvage))
    }

    fn open_with(path: &Path, salvage: Option<Salvage>) -> Result<FileSource> {
        let shown = path.display();
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd: OwnedFd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| match e {
            Errno::NOENT => MoverError::new(Code::SourceMissing, format!("{shown} does not exist")),
            Errno::LOOP => MoverError::new(
                Code::SourceInvalid,
                format!("{shown} is a symlink; name the file that it leads to"),
            ),
            e => MoverError::source_io(&format!("cannot open {shown}"), &e.into()),
        })?;
        let direct = rustix::fs::open(path, flags | OFlags::DIRECT, Mode::empty()).ok();
        let is_dying = salvage.is_some();
        let source =
            FileSource::from_files(File::from(fd), direct.map(File::from), path, is_dying)?;
        Ok(FileSource { salvage, ..source })
    }

    /// A source of an open file; for messages it has no name.
    pub fn of(file: &File) -> Result<FileSource> {
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let again = file.try_clone();
        let again = again.map_err(|e| MoverError::source_io("cannot open a file again", &e))?;
        let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let direct = rustix::fs::open(&path, flags, Mode::empty()).ok();
        FileSource::from_files(again, direct.map(File::from), &path, false)
    }

    fn from_files(
        file: File,
        direct: Option<File>,
        path: &Path,
        is_dying: bool,
    ) -> Result<FileSource> {
        let shown = path.display();
        let stat = rustix::fs::fstat(&file)
            .map_err(|e| MoverError::source_io(&format!("cannot stat {shown}"), &e.into()))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
            return Err(MoverError::new(
                Code::SourceInvalid,
                format!("{shown} is neither a regular file nor a block device"),
            ));
        }
        let is_block = kind == FileType::BlockDevice;
        let identity = identity::settled(&file, is_block)
            .map_err(|e| MoverError::source_io(&format!("cannot measure {shown}"), &e))?;
        if identity.size > digest::MAX_SIZE {
            return Err(MoverError::new(
                Code::SourceInvalid,
                format!("{shown} has {} bytes, more than 64 TiB", identity.size),
            ));
        }
        let direct = direct.filter(|direct| {
            let other = identity::of(direct, is_block);
            other.is_ok_and(|other| other.is_like(&identity))
        });
        let seen = Look {
            file: &file,
            direct: direct.as_ref(),
            is_block,
            shown: &shown.to_string(),
        };
        let seen = seen.first(identity, is_dying)?;
        let block = direct.as_ref().and_then(alignment::of);
        let direct = direct.filter(|_| block.is_some());
        Ok(FileSource {
            path: path.to_owned(),
            file: disk(file),
            direct: direct.map(disk),
            block: block.unwrap_or(ALIGN),
            passing: Passing::default(),
            is_block,
            size: identity.size,
            seen: Mutex::new(seen),
            told_cached: AtomicBool::new(false),
            salvage: None,
        })
    }

    fn seen(&self) -> Seen {
        *lock(&self.seen)
    }

    fn now(&self) -> Result<Seen> {
        let look = Look {
            file: &self.file,
            direct: self.direct.as_ref().map(|direct| -> &File { direct }),
            is_block: self.is_block,
            shown: &self.shown(),
        };
        look.again(&self.seen())
    }

    fn read_range(&self, base: u64, start: usize, end: usize, buffer: &mut [u8]) -> Result<()> {
        let mut at = start;
        let mut is_broken = false;
        if let Some(direct) = &self.direct {
            let block = self.block;
            let aligned_end = end.next_multiple_of(block).min(buffer.len());
            while at < end && at.is_multiple_of(block) && aligned_end.is_multiple_of(block) {
                match direct.read_at(&mut buffer[at..aligned_end], base + at as u64) {
                    Ok(0) => break,
                    Ok(count) => at += count,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    // The buffered read below tells what is wrong.
                    Err(e) => {
                        is_broken = salvage::is_lost(&e);
                        break;
                    }
                }
            }
        }
        let cached = at..end;
        let range = base + at as u64..base + end as u64;
        let ours = self.passing.not_cached(&self.file, range);
        while at < end {
            let (rest, offset) = (&mut buffer[at..end], base + at as u64);
            match self.passing.read_at(&self.file, rest, offset) {
                Ok(0) => {
                    let end = io::ErrorKind::UnexpectedEof.into();
                    return Err(self.unread(&end, base + at as u64));
                }
                Ok(count) => at += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if self.salvage.is_some() && salvage::is_lost(&e) => {
                    at = self.read_around(base, start..end, at, buffer)?;
                }
                Err(e) => return Err(self.unread(&e, base + at as u64)),
            }
        }
        self.passing.let_go(&self.file, ours);
        if cached.len() >= ALIGN && !is_broken {
            self.tell_cached();
        }
        Ok(())
    }

    /// Fills `out` with what stands at `offset`. Neighbours are read ahead, which small
    /// pieces need, and nothing more of it stays in the page cache. Fails when the file
    /// ends before that.
    pub fn read_piece(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let range = offset..offset + out.len() as u64;
        let ours = self.passing.not_cached(&self.file, range);
        let read = self.passing.read_exact_at(&self.file, out, offset);
        self.passing.let_go(&self.file, ours);
        read
    }

    /// Reads what can be read of the block at `at`, where EIO was given; returns where
    /// the next one begins.
    fn read_around(
        &self,
        base: u64,
        range: Range<usize>,
        at: usize,
        buffer: &mut [u8],
    ) -> Result<usize> {
        let from = (at & !(ALIGN - 1)).max(range.start);
        let to = (from + ALIGN).min(range.end);
        let offset = base + from as u64;
        if let Some(salvage) = &self.salvage {
            let (file, direct) = (&self.file, self.direct.as_ref());
            let read = salvage.read_block(file, direct, offset, &mut buffer[from..to]);
            read.map_err(|e| self.unread(&e, offset))?;
            salvage.tell(&self.shown());
        }
        Ok(to)
    }

    fn unread(&self, error: &io::Error, offset: u64) -> MoverError {
        let failed = match error.kind() {
            io::ErrorKind::UnexpectedEof => self.changed("it is shorter than at the start"),
            _ => MoverError::source_io(&format!("cannot read {}", self.shown()), error),
        };
        failed.at(offset)
    }

    fn tell_cached(&self) {
        note::once(&self.told_cached, || {
            let shown = self.path.display();
            format!("{shown} takes no direct I/O; it is read through the page cache")
        });
    }
}

impl Source for FileSource {
    fn identity(&self) -> Identity {
        self.seen().identity
    }

    fn extents(&self, trust_holes: bool) -> Result<Box<dyn Extents + Send>> {
        let file = self.file.try_clone();
        Ok(Box::new(Map {
            file: file.map_err(|e| MoverError::source_io("cannot map the source", &e))?,
            size: self.size,
            // Block devices have no map: all is read.
            trust: trust_holes && !self.is_block,
        }))
    }

    fn read_chunk(&self, chunk: u64, ranges: &[Range<u64>], buffer: &mut [u8]) -> Result<Bitmap> {
        let base = chunk * digest::CHUNK;
        let len = digest::chunk_len(self.size, chunk);
        let mut read = [0; 32];
        let mut filled = 0;
        for range in ranges {
            // O_DIRECT reads whole blocks; so does everything else then.
            let start = ((range.start - base) as usize & !(self.block - 1)).max(filled);
            let end = ((range.end - base) as usize)
                .next_multiple_of(self.block)
                .min(len);
            if start < end {
                self.read_range(base, start, end, buffer)?;
                digest::mark(&mut read, start / ALIGN..end.div_ceil(ALIGN));
                filled = end;
            }
        }
        Ok(read)
    }

    fn check_unchanged(&self) -> Result<()> {
        if self.now()?.is_like(&self.seen()) {
            return Ok(());
        }
        Err(self.changed("it was written to or replaced"))
    }

    fn check_unused(&self) -> Result<()> {
        in_use::check(&self.file, &self.shown())
    }

    fn has_sound_holes(&self) -> bool {
        if self.is_block {
            return true; // it reports none
        }
        let Some(doubt) = trust::doubt(&self.file) else {
            return true;
        };
        if trust::is_sparse(&self.file) {
            let shown = self.shown();
            note::leave(format!(
                "{shown} lies on {doubt}, whose word about holes is not taken: all of it is read"
            ));
        }
        false
    }

    fn renew(&self) -> Result<()> {
        let now = self.now()?;
        if now.identity.size != self.size {
            return Err(self.changed("it has another size now"));
        }
        let there = rustix::fs::stat(&self.path);
        if !self.is_block && !there.is_ok_and(|stat| stat.st_ino == now.identity.inode) {
            return Err(self.changed("another file has its name now"));
        }
        *lock(&self.seen) = now;
        Ok(())
    }

    fn shown(&self) -> String {
        self.path.display().to_string()
    }

    fn abort(&self) {
        self.salvage.iter().for_each(Salvage::abort);
    }

    fn salvage(&self) -> Option<&Salvage> {
        self.salvage.as_ref()
    }
}

impl Extents for Map {
    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        if !self.trust {
            return Ok((from < self.size).then_some(from..self.size));
        }
        #[cfg(test)]
        if self.file.hides_data() {
            return Ok(None);
        }
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            // No support: everything is data.
            Err(_) => return Ok(Some(from..self.size)),
        };
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(start)).unwrap_or(self.size);
        Ok(Some(start..end))
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::Advice;

    use super::*;
    use crate::digest::CHUNK;
    use crate::passing::{SPARED, cached_bytes};
    use crate::sys::AlignedBuf;

    #[test]
    fn a_source_beyond_the_largest_volume_is_never_worth_another_try() {
        // tmpfs takes such a file; ext4 does not.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("huge");
        let file = File::create(&path).unwrap();
        file.set_len(digest::MAX_SIZE).unwrap();
        assert!(FileSource::open(&path).is_ok());
        file.set_len(digest::MAX_SIZE + 1).unwrap();
        let error = FileSource::open(&path).err().expect("it is taken");
        assert_eq!((error.code, error.retryable), (Code::SourceInvalid, false));
        assert!(error.message.contains("more than 64 TiB"), "{error}");
    }

    #[test]
    fn a_source_without_direct_io_leaves_nothing_in_the_page_cache_and_a_note() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("without-direct-io");
        std::fs::write(&path, vec![7; CHUNK as usize]).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        let source = FileSource::from_files(file, None, &path, false).unwrap();
        let mut buffer = AlignedBuf::new(CHUNK as usize).unwrap();
        source.read_chunk(0, &[0..CHUNK], &mut buffer).unwrap();
        assert!(buffer.iter().all(|byte| *byte == 7));
        assert_eq!(cached_bytes(&path), 0);
        assert!(
            source
                .told_cached
                .load(std::sync::atomic::Ordering::Relaxed)
        );
    }

    #[test]
    fn what_others_have_in_the_page_cache_stays_there() {
        for passes in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk");
            std::fs::write(&path, vec![7; 2 * CHUNK as usize]).unwrap();
            let file = File::open(&path).unwrap();
            file.sync_all().unwrap();
            let drop_all = || rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
            drop_all();
            // Whoever else reads it: some of the second chunk, and nothing ahead.
            rustix::fs::fadvise(&file, 0, None, Advice::Random).unwrap();
            let mut read = vec![0; 3 * SPARED as usize];
            file.read_exact_at(&mut read, CHUNK + SPARED).unwrap();
            let theirs = cached_bytes(&path);
            assert!((3 * SPARED..CHUNK).contains(&theirs), "{theirs}");
            let again = File::open(&path).unwrap();
            let source = FileSource::from_files(again, None, &path, false).unwrap();
            if !passes {
                source.passing.give_up(&source.file);
            }
            let mut buffer = AlignedBuf::new(CHUNK as usize).unwrap();
            for chunk in [0, 1] {
                let whole = chunk * CHUNK..(chunk + 1) * CHUNK;
                source.read_chunk(chunk, &[whole], &mut buffer).unwrap();
                assert!(buffer.iter().all(|byte| *byte == 7));
            }
            assert_eq!(cached_bytes(&path), theirs);
        }
    }
}
