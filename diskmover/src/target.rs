//! A part under construction: chunks in any order, durable step by step.
//!
//! ```text
//!         placing.rs                 barrier                    finish.rs
//! offered ----------> written ---------------------> durable -------------> published
//!          the bytes           synced, then noted       |     all of them:
//!                              in the journal           |     verify, publish
//!                                                       +---> read back (proving.rs)
//! ```

mod finish;
mod placing;
mod proving;
mod spec;

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;

use crate::beneath::Names;
use crate::budget::Share;
use crate::earlier::Earlier;
use crate::entry::{self, AT_ONCE, Entry};
use crate::error::{Code, MoverError, Result};
use crate::journal::Journal;
use crate::ledger::Ledger;
use crate::medium::Medium;
use crate::messages::Receipt;
use crate::mode::CopyMode;
use crate::opening::{Announced, Known};
use crate::pool::lock;
use crate::proofs::Proofs;
use crate::qcow2::Image;
use crate::receipt::FileId;
use crate::seeds::Seeds;
use crate::source::Identity;

pub use placing::Taken;
pub use spec::{Care, Container, Place, Proof, TargetSpec, Trust};

/// What opening a target found.
pub enum Opened {
    /// This tag has published it before.
    Published(Receipt),
    /// Ready to write; some of it can be there already.
    Receiving(Box<Target>),
}

struct Book {
    ledger: Ledger,
    /// Chunks written since the last barrier, by segment.
    pending: BTreeMap<u32, u64>,
    /// Room for what the ledger holds.
    share: Share,
}

impl Book {
    /// Takes room for what the ledger holds, or gives back what is too much.
    fn take_room(&mut self) -> Result<()> {
        self.share.hold(self.ledger.held())
    }
}

/// An open part.
pub struct Target {
    spec: TargetSpec,
    names: Names,
    id: FileId,
    medium: Medium,
    /// Whether the part held something that no journal tells of.
    has_base: bool,
    earlier: Option<Earlier>,
    seeds: Seeds,
    /// The source that it is a copy of.
    pub identity: Identity,
    mode: CopyMode,
    image: Option<Image>,
    /// Bytes that were durable when it was opened.
    pub resumed: u64,
    book: Mutex<Book>,
    journal: Mutex<Journal>,
    /// What the medium has given back; None when it is not asked.
    proofs: Option<Proofs>,
}

impl Book {
    /// Notes that some chunks of a segment were written, durable or not.
    fn note_written(&mut self, segment: usize, bits: u64, proofs: Option<&Proofs>) {
        *self.pending.entry(segment as u32).or_default() |= bits;
        if let Some(proofs) = proofs {
            proofs.note_written(segment);
        }
    }
}

impl Target {
    /// A target of a site that was opened, and what is known of it.
    pub fn new(
        spec: &TargetSpec,
        names: Names,
        id: FileId,
        announced: &Announced,
        known: Known,
    ) -> Target {
        Target {
            spec: spec.clone(),
            names,
            id,
            medium: known.medium,
            has_base: known.has_base,
            earlier: known.earlier,
            seeds: known.seeds,
            identity: announced.identity,
            mode: announced.mode,
            image: known.image,
            resumed: known.ledger.done_bytes(),
            proofs: (spec.care.reads_back()).then(|| proving::proofs_of(&known.ledger)),
            book: Mutex::new(Book {
                ledger: known.ledger,
                pending: BTreeMap::new(),
                share: known.share,
            }),
            journal: Mutex::new(known.journal),
        }
    }

    /// Bytes placed so far.
    pub fn done_bytes(&self) -> u64 {
        lock(&self.book).ledger.done_bytes()
    }

    /// Bytes of the volume.
    pub fn size(&self) -> u64 {
        lock(&self.book).ledger.size()
    }

    /// Bytes in blocks that are not zero, of what is placed.
    pub fn data_bytes(&self) -> u64 {
        lock(&self.book).ledger.data_bytes()
    }

    /// Whether all of it is placed.
    pub fn is_complete(&self) -> bool {
        lock(&self.book).ledger.is_complete()
    }

    /// What is placed, for the sender.
    pub fn state(&self) -> impl Iterator<Item = Entry> {
        let segments = lock(&self.book).ledger.segments();
        (0..segments).step_by(AT_ONCE).flat_map(move |first| {
            let some = first..(first + AT_ONCE).min(segments);
            entry::collect(&lock(&self.book).ledger, some.map(|s| (s, u64::MAX)))
        })
    }

    /// Bytes of the volume for which there may be older content.
    pub fn base_bytes(&self) -> u64 {
        let any = self.has_base || !self.seeds.is_empty();
        if any { self.size() } else { 0 }
    }

    /// Makes durable what is placed, then notes that it is.
    ///
    /// An error here is final for the part's open file: the kernel reports it
    /// once and may have dropped the pages. Only what was noted before counts.
    pub fn barrier(&self) -> Result<()> {
        let mut journal = lock(&self.journal);
        let pending = std::mem::take(&mut lock(&self.book).pending);
        if pending.is_empty() {
            return Ok(());
        }
        let durable = self.medium.sync();
        durable.map_err(|e| self.failed("cannot make durable", &e))?;
        // What is done stays as it is, so these can be looked up afterwards, some at
        // a time; what came since is pending again.
        let pending: Vec<(usize, u64)> = pending
            .into_iter()
            .map(|(segment, bits)| (segment as usize, bits))
            .collect();
        let entries = pending
            .chunks(AT_ONCE)
            .flat_map(|some| entry::collect(&lock(&self.book).ledger, some.iter().copied()));
        let noted = journal.append(entries);
        noted.map_err(|e| self.failed("cannot write the journal of", &e))?;
        let mut book = lock(&self.book);
        for (segment, _) in pending {
            if book.pending.contains_key(&(segment as u32)) {
                continue; // written meanwhile
            }
            book.ledger.close_if_full(segment);
            if let Some(proofs) = &self.proofs
                && book.ledger.closed(segment).is_some()
            {
                proofs.note_durable(segment);
            }
        }
        book.take_room().map_err(|e| self.about(e))
    }

    fn failed(&self, what: &str, error: &io::Error) -> MoverError {
        let what = format!("{what} {}", self.names.shown);
        let mut failed = MoverError::target_io(&what, error).in_volume(&self.spec.volume);
        if matches!(failed.code, Code::NoSpace | Code::Quota) {
            let left = self.size() - self.done_bytes();
            failed.message += &format!(" (up to {left} bytes are still to come)");
        }
        failed
    }

    fn about(&self, error: MoverError) -> MoverError {
        error.at_receiver().in_volume(&self.spec.volume)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::{Care, Target};
    use crate::digest::CHUNK;
    use crate::pool::lock;
    use crate::sample;

    fn open(dir: &std::path::Path) -> Target {
        *sample::open(dir, Care::default(), sample::identity(CHUNK)).unwrap()
    }

    #[test]
    fn a_part_can_be_opened_once_it_is_let_go_of_whoever_has_a_copy_of_the_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let target = open(dir.path());
        let _forked = target.medium.file().try_clone().unwrap();
        drop(target);
        open(dir.path());
    }

    #[test]
    fn who_has_no_room_is_told_how_much_is_needed() {
        let dir = tempfile::tempdir().unwrap();
        let identity = sample::identity(5 * CHUNK + 7);
        let target = sample::open(dir.path(), Care::default(), identity).unwrap();
        let told = |code| {
            let error = io::Error::from_raw_os_error(code);
            target.failed("cannot write", &error).message
        };
        for code in [libc::ENOSPC, libc::EDQUOT] {
            let words = format!("(up to {} bytes are still to come)", 5 * CHUNK + 7);
            assert!(told(code).ends_with(&words), "{}", told(code));
        }
        let placed = lock(&target.book).ledger.confirm_zeros(0, 2);
        placed.unwrap();
        let words = format!("(up to {} bytes are still to come)", 3 * CHUNK + 7);
        assert!(told(libc::ENOSPC).ends_with(&words));
        assert!(!told(libc::EIO).contains("still to come"));
    }
}
