//! Which chunks of a part are durable: appended strictly after the data is.
//!
//! ```text
//! header   "DMJRNL1\n" | source identity [32] | BLAKE3(tag) [32]
//!          | part: inode u64, birth time in ns i64 | CRC-32C
//! record   length u32 | entry (entry.rs), or 3 and a segment u32 | CRC-32C of both
//! ```
//! A record 3 takes back what earlier ones say of a segment: it did not hold what
//! it should. The first record that does not check ends the journal: a torn tail,
//! or a damaged one, only means that more is sent again. A chunk is noted once,
//! in at most 57 bytes, so the journal needs no compaction: 57 MiB for 1 TiB.

mod records;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::beneath::{self, Names};
use crate::budget::Share;
use crate::entry::Entry;
use crate::error::Result;
use crate::ledger::Ledger;
use crate::naming;
use crate::receipt::FileId;
use crate::source::Identity;
use crate::store::Store;
use records::{put_record, unread};

pub use records::each_record;

/// What a record begins with that takes back what is known of a segment.
pub const FORGET: u8 = 3;
/// Bytes of records that are written in one go.
const WRITTEN_AT_ONCE: usize = 1 << 20;
/// How many segments are looked at before a journal is trusted after a crash.
pub const RECENT: usize = 2;
const MAGIC: &[u8; 8] = b"DMJRNL1\n";
/// Bytes of the header.
pub const HEADER: usize = 8 + 32 + 32 + 16 + 4;

/// What a journal is about; one of another copy, source or part is worth nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The source, as it was when its first byte was read.
    pub identity: Identity,
    /// Hash of the tag.
    pub tag: [u8; 32],
    /// The part.
    pub part: FileId,
}

/// An open journal.
pub struct Journal {
    file: Store,
    len: u64,
}

/// What a journal says.
pub struct Found {
    /// The journal, to go on with.
    pub journal: Journal,
    /// What is durable.
    pub ledger: Ledger,
    /// The segments that it noted last: a crash would have hit these.
    pub recent: Vec<usize>,
}

impl Subject {
    /// The header of a journal about it.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(self.identity.encode());
        out.extend(self.tag);
        out.extend(self.part.inode.to_le_bytes());
        out.extend(self.part.born_ns.to_le_bytes());
        out.extend(crc32c::crc32c(&out).to_le_bytes());
        out
    }
}

impl Journal {
    /// Opens the journal of a part; None when there is none, or one about
    /// something else. `share` has room for what it tells afterwards.
    pub fn load(names: &Names, subject: &Subject, share: &mut Share) -> Result<Option<Found>> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW;
        let fd: OwnedFd = match beneath::open(&names.dir, &names.journal, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(beneath::refused(&names.journal, e)),
        };
        let file = Store::new(File::from(fd));
        let mut bytes = vec![0; HEADER];
        match file.read_at(&mut bytes, 0) {
            Ok(()) if bytes == subject.encode() => {}
            Ok(()) => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(e) => return Err(unread(&e)),
        }
        let mut replay = Replay {
            ledger: Ledger::new(subject.identity.size),
            recent: Vec::new(),
        };
        let len = each_record(&file, &mut |_, body| {
            let fits = replay.apply(body).is_some();
            share.hold(replay.ledger.held())?;
            Ok(fits)
        })?;
        // What lies beyond is torn; cut it, or records after it would be lost.
        file.set_len(len).map_err(|e| unread(&e))?;
        Ok(Some(Found {
            journal: Journal { file, len },
            ledger: replay.ledger,
            recent: replay.recent,
        }))
    }

    /// Begins a new journal, durably, in place of an old one.
    pub fn create(names: &Names, subject: &Subject) -> Result<Journal> {
        names.remove(&names.journal)?;
        let flags = OFlags::RDWR | OFlags::EXCL;
        let failed = |what: &str, e: Errno| names.failed(what, &names.journal, e);
        let mode = Mode::from_raw_mode(0o600);
        let fd = naming::create(&names.dir, &names.journal, flags, mode)
            .map_err(|e| failed("cannot create", e))?;
        let mut journal = Journal {
            file: Store::new(File::from(fd)),
            len: 0,
        };
        journal
            .write(&subject.encode())
            .map_err(|e| failed("cannot write", errno(&e)))?;
        names.sync_dir()?;
        Ok(journal)
    }

    /// Appends entries and makes them durable.
    pub fn append(&mut self, entries: impl IntoIterator<Item = Entry>) -> io::Result<()> {
        let (mut bytes, mut len) = (Vec::new(), self.len);
        for entry in entries {
            put_record(&mut bytes, |out| entry.encode(out));
            if bytes.len() >= WRITTEN_AT_ONCE {
                self.file.write_at(&bytes, len)?;
                len += bytes.len() as u64;
                bytes.clear();
            }
        }
        self.file.write_at(&bytes, len)?;
        self.file.sync()?;
        self.len = len + bytes.len() as u64;
        Ok(())
    }

    /// Takes back, durably, what was noted of these segments.
    pub fn forget(&mut self, segments: &[usize]) -> io::Result<()> {
        let mut bytes = Vec::new();
        for segment in segments {
            put_record(&mut bytes, |out| {
                out.push(FORGET);
                out.extend((*segment as u32).to_le_bytes());
            });
        }
        self.write(&bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(bytes, self.len)?;
        self.file.sync()?;
        self.len += bytes.len() as u64;
        Ok(())
    }
}

struct Replay {
    ledger: Ledger,
    recent: Vec<usize>,
}

impl Replay {
    fn apply(&mut self, mut body: &[u8]) -> Option<()> {
        if let [FORGET, segment @ ..] = body {
            let segment = u32::from_le_bytes(segment.try_into().ok()?) as usize;
            (segment < self.ledger.segments()).then(|| self.ledger.forget(segment))?;
            self.recent.retain(|other| *other != segment);
            return Some(());
        }
        let entry = Entry::decode(&mut body).filter(|_| body.is_empty())?;
        entry.apply(&mut self.ledger)?; // what has no room ends it too
        if let Entry::Partial(segment, ..) = entry {
            self.recent.retain(|other| *other != segment as usize);
            self.recent.push(segment as usize);
            if self.recent.len() > RECENT {
                self.recent.remove(0);
            }
        }
        Some(())
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use crate::digest::CHUNK;
    use crate::error::Code;
    use crate::sample;

    const SIZE: u64 = 200 * CHUNK;

    fn subject() -> Subject {
        sample::subject(sample::identity(SIZE))
    }

    fn reopen(names: &Names, subject: &Subject) -> Option<Found> {
        let mut share = Budget::new(u64::MAX).share();
        Journal::load(names, subject, &mut share).unwrap()
    }

    fn load(names: &Names, subject: &Subject) -> Option<u64> {
        let found = reopen(names, subject);
        found.map(|found| found.ledger.done_bytes() / CHUNK)
    }

    fn written() -> (tempfile::TempDir, Names) {
        let dir = tempfile::tempdir().unwrap();
        let names = Names::open(dir.path(), "disk", "t").unwrap();
        let mut journal = Journal::create(&names, &subject()).unwrap();
        journal
            .append([Entry::Partial(0, 0b11, vec![(9, [1; 32]), (8, [2; 32])])])
            .unwrap();
        journal.append([Entry::ZeroRun(1, 2)]).unwrap();
        journal
            .append([Entry::Partial(3, 1, vec![(9, [3; 32])])])
            .unwrap();
        (dir, names)
    }

    #[test]
    fn records_are_found_again() {
        let (_dir, names) = written();
        assert_eq!(load(&names, &subject()), Some(2 + 128 + 1));
        assert_eq!(
            load(&names, &subject()),
            Some(2 + 128 + 1),
            "loading changed it"
        );
    }

    #[test]
    fn a_journal_for_which_there_is_no_room_stays_as_it_is() {
        let (_dir, names) = written();
        let mut share = Budget::new(1000).share();
        let refused = Journal::load(&names, &subject(), &mut share).map(|_| ());
        assert_eq!(refused.unwrap_err().code, Code::LimitExceeded);
        assert_eq!(load(&names, &subject()), Some(131));
    }

    #[test]
    fn a_journal_about_something_else_is_worth_nothing() {
        let (_dir, names) = written();
        let good = subject();
        let newer = Identity {
            mtime_ns: 99,
            ..good.identity
        };
        assert_eq!(
            load(
                &names,
                &Subject {
                    identity: newer,
                    ..good.clone()
                }
            ),
            None
        );
        assert_eq!(
            load(
                &names,
                &Subject {
                    tag: [9; 32],
                    ..good.clone()
                }
            ),
            None
        );
        for (inode, born_ns) in [(9, 6), (5, 9)] {
            let part = FileId { inode, born_ns };
            assert_eq!(
                load(
                    &names,
                    &Subject {
                        part,
                        ..good.clone()
                    }
                ),
                None
            );
        }
    }

    #[test]
    fn every_torn_tail_keeps_the_records_before_it() {
        let (dir, names) = written();
        let path = dir.path().join(&names.journal);
        let whole = std::fs::read(&path).unwrap();
        let mut last = 0;
        for len in 0..whole.len() {
            std::fs::write(&path, &whole[..len]).unwrap();
            let found = load(&names, &subject());
            assert_eq!(found.is_some(), len >= HEADER, "cut at {len}");
            assert!(
                found.unwrap_or(0) >= last && found.unwrap_or(0) < 131,
                "cut at {len}"
            );
            last = found.unwrap_or(0);
        }
        assert_eq!(last, 130);
    }

    #[test]
    fn every_flipped_bit_only_drops_records() {
        let (dir, names) = written();
        let path = dir.path().join(&names.journal);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 1 << (at % 8);
            std::fs::write(&path, &bad).unwrap();
            let found = load(&names, &subject());
            assert!(
                matches!(found, None | Some(0 | 2 | 130)),
                "byte {at}: {found:?}"
            );
        }
    }

    #[test]
    fn appending_after_a_torn_tail_is_read_back() {
        let (dir, names) = written();
        let path = dir.path().join(&names.journal);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        let mut found = reopen(&names, &subject()).unwrap();
        found
            .journal
            .append([Entry::Partial(3, 2, vec![(9, [3; 32])])])
            .unwrap();
        assert_eq!(load(&names, &subject()), Some(131));
    }

    #[test]
    fn a_segment_that_is_taken_back_is_missing_until_it_is_noted_again() {
        let (_dir, names) = written();
        let mut found = reopen(&names, &subject()).unwrap();
        assert_eq!(found.recent, [0, 3]);
        found.journal.forget(&[0, 1]).unwrap();
        let mut found = reopen(&names, &subject()).unwrap();
        assert_eq!(found.ledger.done_bytes(), 65 * CHUNK);
        assert_eq!(found.recent, [3]);
        let again = Entry::Partial(0, 1, vec![(7, [9; 32])]);
        found.journal.append([again]).unwrap();
        assert_eq!(load(&names, &subject()), Some(66));
    }
}
