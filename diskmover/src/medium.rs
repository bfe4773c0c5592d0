//! Where the bytes of a target lie: a part under construction, or a block device.
//!
//! O_DIRECT where the range is aligned as the kernel tells (alignment.rs), the page
//! cache for odd tails and where the file system refuses it; it is let go again. Making
//! a range read as zero, from the cheapest that is certain to the last resort:
//!
//! ```text
//! fresh file         nothing: what was never written reads as zero; where blocks
//!                    were laid ahead of data (runway.rs), PUNCH_HOLE
//! sparse file        PUNCH_HOLE
//! reserved file      ZERO_RANGE, which keeps the space
//! block device       PUNCH_HOLE: the kernel zeroes with its own command or refuses
//! refused            read, and write zeros only where something else stands
//! ```
//! Discarding promises nothing about what is read afterwards; it is never used.
//! Neither is BLKZEROOUT: where the device has no command of its own it writes
//! zeros everywhere, which fills thin volumes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, FileType};

use crate::alignment;
use crate::digest;
use crate::locked::Locked;
use crate::note;
use crate::pool::lock;
use crate::runway::{Lay, Runway};
use crate::store::Store;
use crate::sys::ALIGN;
use crate::trust;

/// Blocks are laid ahead only while the file system keeps so much free: they may
/// turn out not to be needed.
const ROOM: u64 = 1 << 30;
/// What ext4 calls itself.
const EXT4: i64 = 0xEF53;
/// Zeros in a laid stretch that are not worth giving back.
const CRUMB: u64 = 64 << 10;

/// What a file can do about zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Zeroing {
    /// Nothing stands there: there is nothing to do.
    Fresh,
    /// Give the space back.
    Punch,
    /// Keep the space.
    Keep,
}

/// An open medium.
pub struct Medium {
    cached: Store,
    direct: Option<Store>,
    /// What direct I/O reads and writes whole.
    block: usize,
    direct_works: AtomicBool,
    zeroing: Zeroing,
    zeroing_works: AtomicBool,
    told_cached: AtomicBool,
    told_zeroing: AtomicBool,
    /// Where blocks are laid ahead; None where that does not help.
    runway: Option<Mutex<Runway>>,
    has_laid: AtomicBool,
    /// Where in the file the volume begins.
    start: u64,
    /// What the file system says of holes is believed.
    has_sound_holes: bool,
    /// Let go of when nothing writes here any more.
    _lock: Option<Locked>,
}

impl Medium {
    /// A medium of an open file, and the same file opened with O_DIRECT.
    ///
    /// `fresh` says that all of it reads as zero now.
    pub fn new(file: File, direct: Option<File>, fresh: bool) -> io::Result<Medium> {
        let stat = rustix::fs::fstat(&file)?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let allocated = stat.st_blocks as u64 * 512;
        let is_reserved = is_file && stat.st_size > 0 && allocated >= stat.st_size as u64;
        let zeroing = if fresh {
            Zeroing::Fresh
        } else if is_reserved {
            Zeroing::Keep
        } else {
            Zeroing::Punch
        };
        let block = direct.as_ref().and_then(alignment::of);
        let direct = direct.filter(|_| block.is_some());
        let is_ext4 = rustix::fs::fstatfs(&file)?.f_type as i64 == EXT4;
        // What is there already is not sent again: its holes would never give blocks back.
        // Where all blocks were reserved none is missing, and none may be given back.
        let lays = fresh && is_file && !is_reserved && is_ext4 && direct.is_some();
        let has_sound_holes = trust::doubt(&file).is_none();
        Ok(Medium {
            runway: lays.then(Mutex::default),
            has_laid: AtomicBool::new(false),
            cached: Store::new(file),
            direct: direct.map(Store::new),
            block: block.unwrap_or(ALIGN),
            direct_works: AtomicBool::new(true),
            zeroing,
            zeroing_works: AtomicBool::new(true),
            told_cached: AtomicBool::new(false),
            told_zeroing: AtomicBool::new(false),
            start: 0,
            has_sound_holes,
            _lock: None,
        })
    }

    /// The same, with the volume behind the first `start` bytes, which are whole
    /// blocks.
    pub fn behind(self, start: u64) -> Medium {
        Medium { start, ..self }
    }

    /// The same, with what keeps others away from the file.
    pub fn held_by(self, lock: Option<Locked>) -> Medium {
        Medium {
            _lock: lock,
            ..self
        }
    }

    /// Where in the file the volume begins.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The file, for what changes nothing in it.
    pub fn file(&self) -> &File {
        self.cached.file()
    }

    /// Cuts or extends it.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.cached.set_len(len)
    }

    /// Writes all of `data`; it comes in one go when memory and offset are aligned.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let offset = self.start + offset;
        let mut at = 0;
        if let Some(direct) = self.direct_for(data.as_ptr() as usize, offset) {
            let whole = data.len() & !(self.block - 1);
            self.lay_ahead(offset, data.len() as u64);
            match direct.write_at(&data[..whole], offset) {
                Ok(()) => at = whole,
                Err(e) if refuses(&e) => self.go_cached(&e),
                Err(e) => return Err(e),
            }
        } else if self.direct.is_none() {
            self.tell_cached("the file system has none for it");
        }
        if at == data.len() {
            return Ok(());
        }
        self.cached.write_at(&data[at..], offset + at as u64)
    }

    /// Notes that data has arrived that will be written here in one piece.
    pub fn expect(&self, offset: u64, len: u64) {
        if let Some(runway) = &self.runway {
            let start = self.start + offset;
            lock(runway).expect(start..start + len);
        }
    }

    /// Makes a range read as zero.
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let offset = self.start + offset;
        if let Some(runway) = &self.runway {
            lock(runway).note_zeros(len);
        }
        let flag = match self.zeroing {
            _ if len == 0 => return Ok(()),
            Zeroing::Fresh if len < CRUMB || !self.has_laid.load(Ordering::Acquire) => {
                return Ok(());
            }
            Zeroing::Fresh | Zeroing::Punch => FallocateFlags::PUNCH_HOLE,
            Zeroing::Keep => FallocateFlags::ZERO_RANGE,
        };
        if self.zeroing_works.load(Ordering::Relaxed) {
            let flags = flag | FallocateFlags::KEEP_SIZE;
            match self.cached.fallocate(flags, offset, len) {
                Ok(()) => return Ok(()),
                // An odd tail of a block device, which alone is refused.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                Err(e) if refuses(&e) => self.zero_by_writing(&e),
                Err(e) => return Err(e),
            }
        }
        self.zero_what_is_not(offset, len)
    }

    /// Fills `buffer`, which has room for `len` rounded up, from the medium.
    ///
    /// What is read comes from the device, not from memory, as far as the system
    /// lets us choose: it proves what a reboot would find.
    pub fn read(&self, offset: u64, len: usize, buffer: &mut [u8]) -> io::Result<()> {
        let offset = self.start + offset;
        let mut at = 0;
        if let Some(direct) = self.direct_for(buffer.as_ptr() as usize, offset) {
            let whole = len & !(self.block - 1);
            match direct.read_at(&mut buffer[..whole], offset) {
                Ok(()) => at = whole,
                Err(e) if refuses(&e) => self.go_cached(&e),
                Err(e) => return Err(e),
            }
        }
        if at == len {
            return Ok(());
        }
        self.cached.uncache(offset + at as u64, (len - at) as u64);
        self.cached
            .read_passing(&mut buffer[at..len], offset + at as u64)
    }

    /// Whether a range is a hole for certain, so that it need not be read.
    pub fn is_hole(&self, offset: u64, len: u64) -> bool {
        let start = self.start + offset;
        let data = || self.cached.next_data(start);
        self.has_sound_holes && data().is_ok_and(|data| data.is_none_or(|data| data >= start + len))
    }

    /// Makes durable what was written. What had to go through the page cache leaves
    /// it again: guests need the memory, nobody reads a copy twice.
    pub fn sync(&self) -> io::Result<()> {
        self.cached.sync()?;
        let all_direct = self.direct.is_some() && self.block == ALIGN;
        let works = |what: &AtomicBool| what.load(Ordering::Relaxed);
        if !all_direct || !works(&self.direct_works) || !works(&self.zeroing_works) {
            self.cached.uncache(0, 0);
        }
        // The same file, so the same pages: this one only notes it.
        #[cfg(test)]
        if let Some(direct) = &self.direct {
            direct.sync()?;
        }
        Ok(())
    }

    /// Allocates what is written next, if that pays. It is a help and nothing more:
    /// the write itself tells what is wrong.
    fn lay_ahead(&self, offset: u64, len: u64) {
        let Some(runway) = &self.runway else {
            return;
        };
        // Held meanwhile: who writes what is laid now waits for it.
        let mut runway = lock(runway);
        match runway.before_data(offset..offset + len) {
            Lay::Nothing => {}
            Lay::Stretch(stretch) => self.lay_stretch(&stretch),
            Lay::Arrived(pieces) => {
                for piece in pieces {
                    let _ = self.cached.lay(piece.start, piece.end - piece.start);
                }
            }
        }
    }

    fn lay_stretch(&self, stretch: &Range<u64>) {
        let file = self.cached.file();
        let (Ok(stat), Ok(room)) = (rustix::fs::fstat(file), rustix::fs::fstatvfs(file)) else {
            return;
        };
        let end = stretch.end.min(stat.st_size as u64);
        if stretch.start < end && room.f_bavail * room.f_frsize >= ROOM {
            self.has_laid.store(true, Ordering::Release);
            let _ = self.cached.lay(stretch.start, end - stretch.start);
        }
    }

    fn direct_for(&self, memory: usize, offset: u64) -> Option<&Store> {
        let aligned = memory.is_multiple_of(ALIGN) && offset.is_multiple_of(self.block as u64);
        let usable = aligned && self.direct_works.load(Ordering::Relaxed);
        self.direct.as_ref().filter(|_| usable)
    }

    fn go_cached(&self, why: &io::Error) {
        self.direct_works.store(false, Ordering::Relaxed);
        self.tell_cached(&why.to_string());
    }

    fn tell_cached(&self, why: &str) {
        note::once(&self.told_cached, || {
            format!(
                "{} takes no direct I/O ({why}); it is written through the page cache",
                self.cached.shown()
            )
        });
    }

    fn zero_by_writing(&self, why: &io::Error) {
        self.zeroing_works.store(false, Ordering::Relaxed);
        note::once(&self.told_zeroing, || {
            format!(
                "{} cannot be zeroed by the system ({why}); it is read, and zeros are written where something else stands",
                self.cached.shown()
            )
        });
    }

    /// Writes zeros only where something else stands, so that thin volumes stay thin.
    fn zero_what_is_not(&self, offset: u64, len: u64) -> io::Result<()> {
        const STEP: u64 = 1 << 16;
        let mut found = [0; STEP as usize];
        let zeros = [0; STEP as usize];
        let mut at = offset;
        while at < offset + len {
            let piece = (STEP - at % STEP).min(offset + len - at);
            let found = &mut found[..piece as usize];
            self.cached.read_at(found, at)?;
            if !digest::is_zero(found) {
                self.cached.write_at(&zeros[..piece as usize], at)?;
            }
            at += piece;
        }
        // What was zero already need not wait for a sync.
        self.cached.uncache(offset, len);
        Ok(())
    }
}

/// Whether the file system or device has no such operation.
fn refuses(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    matches!(errno, Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::faults::{self, Fault, Op, Rule};
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    const SIZE: u64 = 1 << 20;
    const EDGE: u64 = 8192;

    /// Bytes that this thread has written by system calls.
    fn written() -> u64 {
        let io = std::fs::read_to_string("/proc/thread-self/io").unwrap();
        let line = io.lines().find(|line| line.starts_with("wchar")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// A file that holds data except in its second quarter.
    fn file(path: &Path, allocate: bool) -> File {
        let file = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        file.set_len(SIZE).unwrap();
        if allocate {
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, SIZE).unwrap();
        }
        fill(&file);
        file.sync_all().unwrap();
        file
    }

    fn fill(file: &File) {
        use std::os::unix::fs::FileExt;
        let data = vec![7; SIZE as usize / 4];
        for quarter in [0, 2, 3] {
            file.write_all_at(&data, quarter * SIZE / 4).unwrap();
        }
    }

    /// Zeroes all but the edges; returns what was written for it.
    fn zero(file: &File) -> u64 {
        let medium = Medium::new(file.try_clone().unwrap(), None, false).unwrap();
        let before = written();
        medium.zero(EDGE, SIZE - 2 * EDGE).unwrap();
        let written = written() - before;
        medium.sync().unwrap();
        let mut found = vec![1; SIZE as usize];
        medium.read(0, SIZE as usize, &mut found).unwrap();
        let (start, end) = (EDGE as usize, (SIZE - EDGE) as usize);
        assert!(digest::is_zero(&found[start..end]), "not zero");
        assert!(found[start - 1] == 7 && found[end] == 7, "more than asked");
        written
    }

    fn allocated(file: &File) -> u64 {
        file.metadata().unwrap().blocks() * 512
    }

    #[test]
    fn what_went_through_the_page_cache_leaves_it_once_it_is_durable() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let medium = Medium::new(File::create_new(&path).unwrap(), None, true).unwrap();
        medium.write(0, &vec![7; SIZE as usize]).unwrap();
        assert!(crate::passing::cached_bytes(&path) > 0);
        medium.sync().unwrap();
        assert_eq!(crate::passing::cached_bytes(&path), 0);
    }

    #[test]
    fn what_is_zeroed_by_hand_leaves_the_page_cache_too() {
        let dir = tempfile::tempdir().unwrap();
        let refusal = Rule {
            file: "by-hand",
            op: Op::Zero,
            at: None,
            after: 0,
            times: u32::MAX,
            fault: Fault::Error(libc::EOPNOTSUPP),
        };
        let refused = faults::inject(dir.path(), refusal);
        let (blank, full) = (dir.path().join("1-by-hand"), dir.path().join("2-by-hand"));
        open(&blank, 0).set_len(SIZE).unwrap();
        drop(file(&full, false));
        for (path, is_durable) in [(blank, true), (full, false)] {
            let direct = open(&path, libc::O_DIRECT);
            let medium = Medium::new(open(&path, 0), Some(direct), false).unwrap();
            medium.zero(0, SIZE).unwrap();
            if !is_durable {
                medium.sync().unwrap();
            }
            assert_eq!(crate::passing::cached_bytes(&path), 0, "{path:?}");
        }
        assert!(refused.has_struck());
    }

    fn open(path: &Path, flags: i32) -> File {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = File::options();
        options.create(true).truncate(false).read(true).write(true);
        options.custom_flags(flags).open(path).unwrap()
    }

    /// A file with a first part of dense data, fresh or taken for one that holds more.
    fn dense(path: &Path, fresh: bool, size: u64, chunks: u64) -> Medium {
        let medium = Medium::new(open(path, 0), Some(open(path, libc::O_DIRECT)), fresh).unwrap();
        medium.set_len(size).unwrap();
        let mut data = crate::sys::AlignedBuf::new(SIZE as usize).unwrap();
        data.fill(7);
        for chunk in 0..chunks {
            medium.write(chunk * SIZE, &data).unwrap();
        }
        medium
    }

    /// A file system of its own, ext4 with more room than laying ahead asks for.
    pub(crate) fn ext4(options: &str) -> (tempfile::TempDir, Undo, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (backing, at) = (dir.path().join("fs"), dir.path().join("mnt"));
        let file = File::create(&backing).unwrap();
        file.set_len(3 * ROOM).unwrap();
        std::fs::create_dir(&at).unwrap();
        run("mkfs.ext4 -q -F", &backing);
        let mount = format!("mount -o loop{options} {}", backing.display());
        run(&mount, &at);
        (dir, Undo("umount", at.clone()), at)
    }

    #[test]
    fn blocks_are_laid_ahead_of_dense_data_and_zeros_give_them_back() {
        let (_dir, _mount, at) = ext4("");
        let medium = dense(&at.join("f"), true, 100 * SIZE, 66);
        assert!(allocated(medium.file()) >= 100 * SIZE, "nothing was laid");
        medium.zero(70 * SIZE, 30 * SIZE).unwrap();
        medium.sync().unwrap();
        assert!(allocated(medium.file()) < 71 * SIZE, "it keeps the space");
        let mut found = vec![1; 34 * SIZE as usize];
        medium.read(66 * SIZE, found.len(), &mut found).unwrap();
        assert!(digest::is_zero(&found), "laid blocks are not zero");
        assert_eq!(medium.file().metadata().unwrap().len(), 100 * SIZE);
    }

    #[test]
    fn a_reserved_file_keeps_its_space_behind_dense_data_too() {
        let (_dir, _mount, at) = ext4("");
        let reserved = open(&at.join("f"), 0);
        rustix::fs::fallocate(&reserved, FallocateFlags::empty(), 0, 100 * SIZE).unwrap();
        let medium = dense(&at.join("f"), true, 100 * SIZE, 66);
        medium.zero(70 * SIZE, 30 * SIZE).unwrap();
        medium.sync().unwrap();
        assert!(
            allocated(&reserved) >= 100 * SIZE,
            "it gives the space back"
        );
    }

    #[test]
    fn what_has_arrived_gets_its_blocks_in_one_step_and_holes_stay_holes() {
        let (_dir, _mount, at) = ext4("");
        let medium = dense(&at.join("f"), true, 100 * SIZE, 0);
        let mut data = crate::sys::AlignedBuf::new(SIZE as usize).unwrap();
        data.fill(7);
        for chunk in [10, 20, 30] {
            medium.expect(chunk * SIZE, SIZE);
        }
        medium.write(20 * SIZE, &data).unwrap();
        let laid = allocated(medium.file());
        assert!(
            (3 * SIZE..4 * SIZE).contains(&laid),
            "{laid} were allocated"
        );
        medium.zero(40 * SIZE, 60 * SIZE).unwrap();
        assert_eq!(allocated(medium.file()), laid);
    }

    #[test]
    fn nothing_is_laid_behind_the_end_of_a_file() {
        let (_dir, _mount, at) = ext4("");
        let medium = dense(&at.join("f"), true, 34 * SIZE, 34);
        medium.sync().unwrap();
        assert!(allocated(medium.file()) < 35 * SIZE);
    }

    #[test]
    fn nothing_is_laid_in_a_file_whose_holes_are_not_sent_again() {
        let (_dir, _mount, at) = ext4("");
        let medium = dense(&at.join("f"), false, 100 * SIZE, 66);
        assert!(allocated(medium.file()) < 67 * SIZE);
    }

    #[test]
    fn nothing_is_laid_where_room_is_short() {
        let (_dir, _mount, at) = ext4("");
        let rest = File::create(at.join("rest")).unwrap();
        let room = rustix::fs::fstatvfs(&rest).unwrap();
        let free = room.f_bavail * room.f_frsize - ROOM;
        rustix::fs::fallocate(&rest, FallocateFlags::empty(), 0, free).unwrap();
        let medium = dense(&at.join("f"), true, 100 * SIZE, 66);
        assert!(allocated(medium.file()) < 67 * SIZE);
    }

    #[test]
    fn a_sparse_file_gives_the_space_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(&dir.path().join("f"), false);
        assert_eq!(zero(&file), 0, "zeros were written");
        assert!(allocated(&file) <= 4 * EDGE);
    }

    #[test]
    fn a_preallocated_file_keeps_its_space() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(&dir.path().join("f"), true);
        zero(&file);
        assert!(allocated(&file) >= SIZE);
    }

    #[test]
    fn a_preallocated_file_keeps_its_space_where_the_file_system_has_no_such_call() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap(); // tmpfs cannot ZERO_RANGE
        let file = file(&dir.path().join("f"), true);
        zero(&file);
        assert!(allocated(&file) >= SIZE);
    }

    /// Something that is undone at the end.
    pub(crate) struct Undo(&'static str, std::path::PathBuf);

    impl Drop for Undo {
        fn drop(&mut self) {
            let mut words = self.0.split(' ');
            let mut command = std::process::Command::new(words.next().unwrap());
            let _ = command.args(words).arg(&self.1).status();
        }
    }

    /// Runs a command on a path; returns what it says.
    fn run(command: &str, path: &Path) -> String {
        let mut words = command.split(' ');
        let mut command = std::process::Command::new(words.next().unwrap());
        let output = command.args(words).arg(path).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    #[test]
    fn a_device_that_cannot_zero_is_written_only_where_it_is_not_zero() {
        // ramfs cannot punch, so the loop device above it cannot either.
        let dir = tempfile::tempdir().unwrap();
        run("mount -t ramfs none", dir.path());
        let _mount = Undo("umount", dir.path().into());
        let backing = dir.path().join("f");
        drop(file(&backing, false));
        let device = run("losetup --find --show", &backing);
        let _loop = Undo("losetup -d", device.clone().into());
        let device = File::options()
            .read(true)
            .write(true)
            .open(&device)
            .unwrap();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let refused = rustix::fs::fallocate(&device, flags, 0, SIZE);
        assert!(refused.is_err(), "this device can zero: nothing is tested");
        let data = SIZE - SIZE / 4 - 2 * EDGE;
        assert_eq!(zero(&device), data, "zeros were written over zeros");
    }
}
