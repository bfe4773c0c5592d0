//! What the journal of an earlier source says of a part, to compare the changed source
//! with: a chunk whose hash it has need not be read here.
//!
//! A source that was written to, a block device or an export is another source the next
//! time, and goes through all of what was placed. Its hashes are believed as far as a
//! journal is (opening.rs): but for the segments that were noted last, and never with
//! `paranoid` or of a device. They hold until a chunk is written, so each counts once:
//! the first comparison, whatever it gives, is the last one that needs no reading.
//!
//! The hashes stay in the journal's file, which has lost its name by then; in memory is
//! where they lie.

use std::fs::File;
use std::sync::Mutex;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::beneath::{self, Names};
use crate::budget::Share;
use crate::digest::{Hash, SEGMENT_CHUNKS};
use crate::entry::{Entry, take};
use crate::error::Result;
use crate::journal::{self, FORGET, HEADER, RECENT, Subject};
use crate::pool::lock;
use crate::source::Identity;
use crate::store::Store;

/// Memory of a record, while the list of them grows.
const RECORD: u64 = 64;
/// Records for which room is taken in one go.
const AT_ONCE: usize = 4096;
/// Where the chunks lie in a record of some chunks: behind its length, the kind, the
/// segment and the bits.
const CHUNKS_AT: u64 = 4 + 1 + 4 + 8;
/// Data bytes and hash.
const CHUNK_BYTES: u64 = 4 + 32;

/// Chunks of a segment that were noted together.
struct Record {
    segment: u32,
    noted: u64,
    /// Those that were not asked about yet.
    left: u64,
    at: u64,
}

/// The hashes of an earlier journal.
pub struct Earlier {
    file: Store,
    records: Mutex<Vec<Record>>,
}

impl Earlier {
    /// Opens the journal that an earlier source of this size has left for the same
    /// part and tag; None when there is none, or no room for it.
    pub fn load(names: &Names, subject: &Subject, share: &mut Share) -> Result<Option<Earlier>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW;
        let fd = match beneath::open(&names.dir, &names.journal, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(beneath::refused(&names.journal, e)),
        };
        let file = Store::new(File::from(fd));
        let mut head = [0; HEADER];
        let is_read = file.read_at(&mut head, 0).is_ok();
        let Some(identity) = head[8..].first_chunk().filter(|_| is_read) else {
            return Ok(None);
        };
        let earlier = Subject {
            identity: Identity::decode(*identity),
            ..subject.clone()
        };
        if earlier.identity.size != subject.identity.size || earlier.encode() != head {
            return Ok(None);
        }
        let (mut records, mut recent) = (Vec::new(), Vec::new());
        let (mut has_room, mut room) = (true, 0);
        journal::each_record(&file, &mut |at, body| {
            if records.len() == room {
                has_room = share.take(AT_ONCE as u64 * RECORD).is_ok();
                room += AT_ONCE;
            }
            Ok(has_room && see(&mut records, &mut recent, at, body).is_some())
        })?;
        records.retain(|record| !recent.contains(&record.segment));
        records.sort_by_key(|record| record.segment);
        Ok(has_room.then(|| Earlier {
            file,
            records: Mutex::new(records),
        }))
    }

    /// Hash and data bytes of a chunk as it was noted, the first time that it is asked
    /// about.
    pub fn take(&self, chunk: u64) -> Option<(Hash, u32)> {
        let segment = (chunk / SEGMENT_CHUNKS) as u32;
        let bit = 1 << (chunk % SEGMENT_CHUNKS);
        let mut at = None;
        {
            let mut records = lock(&self.records);
            let first = records.partition_point(|record| record.segment < segment);
            let of_segment = records[first..].iter_mut();
            for record in of_segment.take_while(|record| record.segment == segment) {
                if record.left & bit != 0 {
                    record.left &= !bit;
                    let before = u64::from((record.noted & (bit - 1)).count_ones());
                    at = Some(record.at + before * CHUNK_BYTES);
                }
            }
        }
        let mut bytes = [0; CHUNK_BYTES as usize];
        self.file.read_at(&mut bytes, at?).ok()?;
        let mut rest = &bytes[..];
        let data = u32::from_le_bytes(take(&mut rest)?);
        Some((take(&mut rest)?, data))
    }
}

/// Takes note of a record; None when it is none.
fn see(records: &mut Vec<Record>, recent: &mut Vec<u32>, at: u64, mut body: &[u8]) -> Option<()> {
    if let [FORGET, segment @ ..] = body {
        let segment = u32::from_le_bytes(segment.try_into().ok()?);
        records.retain(|record| record.segment != segment);
        return Some(());
    }
    if let Entry::Partial(segment, bits, _) = Entry::decode(&mut body)? {
        records.push(Record {
            segment,
            noted: bits,
            left: bits,
            at: at + CHUNKS_AT,
        });
        recent.retain(|other| *other != segment);
        recent.push(segment);
        if recent.len() > RECENT {
            recent.remove(0);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::base::{self, PIECE};
    use crate::budget::Budget;
    use crate::digest::{self, CHUNK};
    use crate::journal::Journal;
    use crate::rig::noise;
    use crate::sample;
    use crate::sys::AlignedBuf;
    use crate::target::{Care, Taken, Target, Trust};

    const SEGMENT: u64 = SEGMENT_CHUNKS * CHUNK;
    const SIZE: u64 = 4 * SEGMENT;

    /// The source, written at this time.
    fn at(mtime_ns: i64) -> Identity {
        Identity {
            mtime_ns,
            ..sample::identity(SIZE)
        }
    }

    struct Scene {
        dir: tempfile::TempDir,
        content: Vec<u8>,
    }

    impl Scene {
        fn new() -> Scene {
            let dir = tempfile::tempdir().unwrap();
            let content = noise(1, CHUNK as usize);
            Scene { dir, content }
        }

        /// The target of a source that was written at this time.
        fn open(&self, mtime_ns: i64, trust: Trust) -> Box<Target> {
            let care = Care {
                trust,
                ..Care::default()
            };
            sample::open(self.dir.path(), care, at(mtime_ns)).unwrap()
        }

        /// Each segment begins with the content, and is noted; then the first byte of
        /// each on the disk becomes another one, which nobody should do.
        fn placed_and_spoilt(&self) {
            let target = self.open(1, Trust::Normal);
            let mut data = AlignedBuf::new(CHUNK as usize).unwrap();
            data.copy_from_slice(&self.content);
            let bitmap = digest::scan(&data);
            for segment in 0..4 {
                let chunk = segment * SEGMENT_CHUNKS;
                target.place(chunk, &bitmap, &data, self.hash()).unwrap();
                target.barrier().unwrap();
            }
            drop(target);
            for segment in 0..4 {
                self.spoil(segment);
            }
        }

        fn spoil(&self, segment: u64) {
            let part = self.dir.path().join(sample::PART);
            let part = File::options().read(true).write(true).open(part).unwrap();
            let mut byte = [0];
            part.read_exact_at(&mut byte, segment * SEGMENT).unwrap();
            part.write_all_at(&[!byte[0]], segment * SEGMENT).unwrap();
            part.sync_all().unwrap();
        }

        fn hash(&self) -> Hash {
            digest::chunk_hash(&digest::scan(&self.content), &self.content)
        }

        /// What becomes of an offer of this content for the first chunk of a segment.
        fn take(&self, target: &Target, segment: u64, content: &[u8]) -> Taken {
            let hash = digest::chunk_hash(&digest::scan(content), content);
            let mut buffer = AlignedBuf::new(CHUNK as usize).unwrap();
            let chunk = segment * SEGMENT_CHUNKS;
            let pieces = base::hashes(content);
            target.take(chunk, hash, &pieces, &mut buffer).unwrap().0
        }
    }

    #[test]
    fn a_changed_source_is_compared_with_what_was_noted_and_only_once() {
        let scene = Scene::new();
        scene.placed_and_spoilt();
        let target = scene.open(9, Trust::Normal);
        let same = &scene.content;
        let mut changed = same.clone();
        changed[5 * PIECE] ^= 1;
        assert_eq!(scene.take(&target, 0, same), Taken::Whole, "it was read");
        // What is not the same is read, and after that nothing but reading tells.
        let read = Taken::Without(1 | 1 << 5);
        assert_eq!(scene.take(&target, 1, &changed), read);
        assert_eq!(scene.take(&target, 1, same), Taken::Without(1));
        scene.spoil(1); // back to what it was
        assert_eq!(scene.take(&target, 1, same), Taken::Whole);
        // A crash would have hit what was noted last.
        for segment in [2, 3] {
            let taken = scene.take(&target, segment, same);
            assert_eq!(taken, Taken::Without(1), "segment {segment} is believed");
        }
    }

    #[test]
    fn a_careful_receiver_and_a_third_source_read_what_is_there() {
        let scene = Scene::new();
        scene.placed_and_spoilt();
        let target = scene.open(9, Trust::Paranoid);
        assert_eq!(scene.take(&target, 0, &scene.content), Taken::Without(1));
        drop(target);
        // Of the second source nothing was noted.
        let target = scene.open(10, Trust::Normal);
        assert_eq!(scene.take(&target, 0, &scene.content), Taken::Without(1));
    }

    #[test]
    fn what_was_taken_back_and_what_has_no_room_is_not_known() {
        let dir = tempfile::tempdir().unwrap();
        let names = Names::open(dir.path(), "disk", "t").unwrap();
        let mut journal = Journal::create(&names, &sample::subject(at(1))).unwrap();
        let some = |segment, number| Entry::Partial(segment, 0b101, vec![(7, [number; 32]); 2]);
        let zeros = [Entry::ZeroRun(3, 1), Entry::ZeroRun(2, 1)];
        journal.append(zeros).unwrap(); // they need no room
        journal.append([some(0, 1), some(1, 2)]).unwrap();
        journal.forget(&[1]).unwrap();
        let again = Entry::Partial(1, 0b110, vec![(8, [3; 32]), (9, [4; 32])]);
        journal.append([again, some(2, 5), some(3, 6)]).unwrap();
        let budget = Budget::new(AT_ONCE as u64 * RECORD);
        let load = |subject: &Subject| {
            let mut share = budget.share();
            Earlier::load(&names, subject, &mut share).unwrap()
        };
        let later = sample::subject(at(2));
        let found = load(&later).unwrap();
        let known = |chunk| found.take(chunk);
        assert_eq!([known(0), known(1)], [Some(([1; 32], 7)), None]);
        assert_eq!([known(64), known(65)], [None, Some(([3; 32], 8))]);
        assert_eq!([known(66), known(66)], [Some(([4; 32], 9)), None]);
        assert_eq!([known(128), known(192)], [None, None], "noted last");
        let shorter = Identity {
            size: SIZE - 1,
            ..at(2)
        };
        assert!(load(&sample::subject(shorter)).is_none(), "of another size");
        let mut none = Budget::new(0).share();
        let found = Earlier::load(&names, &later, &mut none).unwrap();
        assert!(found.is_none());
    }
}
