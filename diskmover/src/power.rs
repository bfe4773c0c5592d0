//! A power cut, for tests: what was not made durable may be lost, any of it.
//!
//! Between two syncs of a file, every write to it first saves what stood there; so
//! does, between two syncs of a directory, every change of its names (entries.rs).
//! A cut at the n-th operation fails everything from then on; `Grid::lose` then
//! takes back a random part of what no sync had covered, in any order of writes,
//! as a disk with a volatile cache would.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Mutex};

use rustix::fs::SeekFrom;

use crate::faults;
use crate::pool::lock;

mod any_order;
pub mod entries;
mod publishing;

thread_local! {
    static CURRENT: RefCell<Option<Arc<Grid>>> = const { RefCell::new(None) };
}

/// What stood where before it was overwritten: offset, bytes, length of the file.
type Before = (u64, Vec<u8>, u64);

/// The power of one test.
#[derive(Default)]
pub struct Grid {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    operations: u64,
    cut_at: Option<u64>,
    fail_sync: bool,
    unsynced: BTreeMap<u64, (Option<File>, Vec<Before>)>,
    entries: entries::Entries,
    /// What was made durable, and named, in order.
    log: Vec<String>,
}

/// The power of one open file.
pub struct Supply(Arc<Grid>);

/// Files that this thread opens from now on depend on `grid`.
pub fn connect(grid: Option<Arc<Grid>>) {
    CURRENT.with(|current| *current.borrow_mut() = grid);
}

/// The supply of a file that this thread has opened.
pub fn supply(_file: &File) -> Option<Supply> {
    current().map(Supply)
}

fn current() -> Option<Arc<Grid>> {
    CURRENT.with(|current| current.borrow().clone())
}

impl Grid {
    /// Cuts the power at the n-th operation from now.
    pub fn cut_after(&self, operations: u64) {
        let mut state = lock(&self.state);
        state.cut_at = Some(state.operations + operations);
    }

    /// Makes the next sync fail, as a disk that lost its pages does.
    pub fn fail_next_sync(&self) {
        lock(&self.state).fail_sync = true;
    }

    /// What was made durable and named since this was asked last, in order.
    pub fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.state).log)
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        lock(&self.state).operations
    }

    /// Takes back about half of what was not durable, and gives power again.
    pub fn lose(&self, mut seed: u64) {
        self.lose_those(|| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed >> 63 != 0
        });
    }

    /// The same for what `goes` says, which is asked about each, always in one order.
    pub fn lose_those(&self, mut goes: impl FnMut() -> bool) {
        let mut state = lock(&self.state);
        state.cut_at = None;
        state.entries.lose(&mut goes);
        for (_, (file, writes)) in std::mem::take(&mut state.unsynced) {
            let file = file.expect("a file that was written");
            for (offset, bytes, len) in writes.into_iter().rev() {
                if !goes() {
                    continue;
                }
                file.write_all_at(&bytes, offset).unwrap();
                let now = file.metadata().unwrap().len();
                if len < now && offset + bytes.len() as u64 >= len {
                    file.set_len(len).unwrap();
                }
            }
        }
    }
}

impl Supply {
    /// Saves what stands in a range that is about to change.
    pub fn before_write(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let mut state = lock(&self.0.state);
        state.step()?;
        let stat = file.metadata()?;
        let there = stat.len().saturating_sub(offset).min(len);
        // Memory for O_DIRECT has to be aligned; a second opening needs none.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
        let plain = File::options().read(true).write(true).open(path)?;
        let mut bytes = vec![0; there as usize];
        plain.read_exact_at(&mut bytes, offset)?;
        let saved = state.unsynced.entry(stat.ino()).or_default();
        saved.0.get_or_insert(plain);
        saved.1.push((offset, bytes, stat.len()));
        Ok(())
    }

    /// The same for a range that is about to read as zero: holes stay what they are.
    pub fn before_zero(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        match rustix::fs::seek(file, SeekFrom::Data(offset)) {
            Ok(data) if data < offset + len => self.before_write(file, data, offset + len - data),
            _ => lock(&self.0.state).step(),
        }
    }

    /// Fails when the power is off or the test wants it.
    pub fn before_sync(&self) -> io::Result<()> {
        let mut state = lock(&self.0.state);
        state.step()?;
        if std::mem::take(&mut state.fail_sync) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    /// What was written to the file so far stays.
    pub fn synced(&self, file: &File) {
        let inode = file.metadata().map(|stat| stat.ino()).unwrap_or(0);
        let path = faults::path_of(file.as_fd());
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut state = lock(&self.0.state);
        state.unsynced.remove(&inode);
        state.log.push(format!("sync {name}"));
    }
}

impl State {
    fn step(&mut self) -> io::Result<()> {
        self.operations += 1;
        match self.cut_at {
            Some(cut) if self.operations >= cut => Err(io::Error::other("the power is off")),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::{self, BLOCK, CHUNK, Hash};
    use crate::error::Code;
    use crate::sample;
    use crate::sys::AlignedBuf;
    use crate::target::{Care, Target, Trust};

    const SEGMENT: u64 = digest::SEGMENT_CHUNKS * CHUNK;
    const SEGMENTS: u64 = 8;
    const SIZE: u64 = (SEGMENTS - 1) * SEGMENT + 5 * BLOCK as u64 + 1234;

    struct Rig {
        dir: tempfile::TempDir,
        grid: Arc<Grid>,
        trust: Trust,
        size: u64,
    }

    impl Rig {
        fn new() -> Rig {
            Rig {
                dir: tempfile::tempdir().unwrap(),
                grid: Arc::default(),
                trust: Trust::Normal,
                size: SIZE,
            }
        }

        fn open(&self) -> crate::error::Result<Box<Target>> {
            let care = Care {
                trust: self.trust,
                ..Care::default()
            };
            connect(Some(Arc::clone(&self.grid)));
            let opened = sample::open(self.dir.path(), care, sample::identity(self.size));
            connect(None);
            opened
        }

        fn part(&self) -> std::path::PathBuf {
            self.dir.path().join(sample::PART)
        }
    }

    /// The first chunk of a segment, with data; the others are zero. The last
    /// segment has one chunk only, and a short one.
    fn content(segment: u64) -> (AlignedBuf, digest::Bitmap, usize, Hash) {
        let len = digest::chunk_len(SIZE, segment * 64);
        let mut buffer = AlignedBuf::new(CHUNK as usize).unwrap();
        buffer[..len].fill(segment as u8 + 1);
        buffer[8192..16384].fill(0);
        let bitmap = digest::scan(&buffer[..len]);
        let data = digest::compact(&mut buffer[..len], &bitmap);
        let hash = digest::chunk_hash(&bitmap, &buffer[..data]);
        (buffer, bitmap, data, hash)
    }

    /// Places what is missing, with a barrier after every second segment.
    fn copy(target: &Target) -> crate::error::Result<()> {
        for segment in missing(target) {
            let (buffer, bitmap, data, hash) = content(segment);
            target.place(segment * 64, &bitmap, &buffer[..data], hash)?;
            let end = digest::chunk_count(SIZE).min(segment * 64 + 64);
            if segment * 64 + 1 < end {
                target.place_zeros(segment * 64 + 1, end, &|| true)?;
            }
            if segment % 2 == 1 {
                target.barrier()?;
            }
        }
        target.barrier()
    }

    /// Segments whose first chunk is missing; zeros come with it.
    fn missing(target: &Target) -> Vec<u64> {
        let mut ledger = crate::ledger::Ledger::new(target.size());
        for entry in target.state() {
            entry.apply(&mut ledger).unwrap();
        }
        let segments = 0..ledger.segments();
        let whole = |s: &usize| ledger.done_bits(*s) == ledger.full_mask(*s);
        segments.filter(|s| !whole(s)).map(|s| s as u64).collect()
    }

    fn root() -> Hash {
        let hashes = (0..SEGMENTS).map(|segment| {
            let mut chunks = [digest::ZERO_HASH; 64];
            chunks[0] = content(segment).3;
            let last = segment == SEGMENTS - 1;
            digest::segment_hash(&chunks[..if last { 1 } else { 64 }])
        });
        digest::root(SIZE, hashes.collect::<Vec<_>>().iter())
    }

    /// What the target says that it has is what a reboot finds.
    fn assert_true(target: &Target, rig: &Rig, when: &str) {
        let part = File::open(rig.part()).unwrap();
        let missing = missing(target);
        for segment in (0..SEGMENTS).filter(|s| !missing.contains(s)) {
            let len = digest::chunk_len(SIZE, segment * 64);
            let mut bytes = vec![0; len];
            part.read_exact_at(&mut bytes, segment * SEGMENT).unwrap();
            let bitmap = digest::scan(&bytes);
            let data = digest::compact(&mut bytes, &bitmap);
            let found = digest::chunk_hash(&bitmap, &bytes[..data]);
            assert_eq!(found, content(segment).3, "segment {segment}, {when}");
        }
    }

    #[test]
    fn a_power_cut_at_any_operation_costs_at_most_what_no_barrier_covered() {
        let whole = Rig::new();
        copy(&whole.open().unwrap()).unwrap();
        let operations = whole.grid.operations();
        assert!(operations > 20, "{operations}");
        for cut in 1..operations {
            let rig = Rig::new();
            rig.grid.cut_after(cut);
            let placed = rig.open().and_then(|target| copy(&target));
            assert!(placed.is_err(), "the cut at {cut} never came");
            for seed in 0..3 {
                rig.grid.lose(cut * 7 + seed);
                let target = rig.open().unwrap();
                let when = format!("power cut at {cut}, seed {seed}");
                assert_true(&target, &rig, &when);
                // A second cut while it goes on where it stopped.
                rig.grid.cut_after(seed + 1);
                let _ = copy(&target);
            }
            rig.grid.lose(cut);
            let target = rig.open().unwrap();
            copy(&target).unwrap();
            target.verify(&root()).unwrap();
        }
    }

    #[test]
    fn a_failed_sync_is_never_made_good_by_another_one() {
        let rig = Rig::new();
        let target = rig.open().unwrap();
        let (buffer, bitmap, data, hash) = content(0);
        target.place(0, &bitmap, &buffer[..data], hash).unwrap();
        rig.grid.fail_next_sync();
        assert_eq!(target.barrier().unwrap_err().code, Code::TargetIo);
        // The kernel has dropped the pages; a second sync has nothing to say.
        rig.grid.lose(u64::MAX);
        target.barrier().unwrap();
        drop(target);
        let target = rig.open().unwrap();
        assert_eq!(target.resumed, 0);
        copy(&target).unwrap();
        target.verify(&root()).unwrap();
    }

    #[test]
    fn rot_in_what_was_noted_last_is_found_and_sent_again() {
        for trust in [Trust::Normal, Trust::Paranoid] {
            let mut rig = Rig::new();
            copy(&rig.open().unwrap()).unwrap();
            rig.trust = trust;
            rot(&rig, (SEGMENTS - 2) * SEGMENT + 5);
            let target = rig.open().unwrap();
            assert_true(&target, &rig, "after rot");
            assert!(target.resumed < SIZE);
            copy(&target).unwrap();
            target.verify(&root()).unwrap();
            drop(target);
            // The journal says so too, the next time.
            rig.trust = Trust::Normal;
            assert_eq!(rig.open().unwrap().resumed, SIZE);
        }
    }

    fn rot(rig: &Rig, offset: u64) {
        let part = File::options().write(true).open(rig.part()).unwrap();
        part.write_all_at(b"rot", offset).unwrap();
    }

    #[test]
    fn only_paranoia_reads_back_what_was_noted_long_ago() {
        let mut rig = Rig::new();
        rig.size = 4 * SEGMENT;
        let target = rig.open().unwrap();
        for segment in 0..4 {
            let (buffer, bitmap, data, hash) = content(0);
            target
                .place(segment * 64, &bitmap, &buffer[..data], hash)
                .unwrap();
            target.barrier().unwrap();
        }
        drop(target);
        rot(&rig, 0);
        assert_eq!(rig.open().unwrap().resumed, 4 * CHUNK, "not looked at");
        rig.trust = Trust::Paranoid;
        assert_eq!(rig.open().unwrap().resumed, 3 * CHUNK);
    }
}
