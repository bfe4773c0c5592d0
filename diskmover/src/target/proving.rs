//! The medium is asked for what was written to it, segment by segment.
//!
//! Whoever has time reads back what is due (session/proving.rs), while the rest of
//! the volume still comes; the keeper reads what is left in the end, and alone
//! draws the consequences.

use std::sync::Mutex;

use crate::audit::Expected;
use crate::digest::{CHUNK, SEGMENT_CHUNKS};
use crate::error::{Code, MoverError, Result};
use crate::guard;
use crate::ledger::Ledger;
use crate::pool::lock;
use crate::proofs::Proofs;
use crate::session::TICK;
use crate::sys::AlignedBuf;
use crate::target::Target;

/// The proofs of a volume of which this is placed and durable: whatever an earlier
/// attempt has read back, this one has not.
pub(super) fn proofs_of(ledger: &Ledger) -> Proofs {
    let proofs = Proofs::new(ledger.segments());
    let closed = (0..ledger.segments()).filter(|segment| ledger.closed(*segment).is_some());
    closed.for_each(|segment| proofs.note_durable(segment));
    proofs
}

impl Target {
    /// Reads back a segment, if one is due; false when none is.
    pub fn read_back(&self, buffer: &mut [u8]) -> bool {
        let Some(proofs) = &self.proofs else {
            return false;
        };
        let Some(look) = proofs.take() else {
            return false;
        };
        let expected = Expected::of(&lock(&self.book).ledger, look.segment);
        let holds = |expected: Expected| expected.holds(&self.medium, buffer).unwrap_or(false);
        proofs.settle(look, expected.is_some_and(holds));
        true
    }

    /// Reads back what is not proven yet, if that is wanted; what was written after
    /// this has begun, too.
    pub fn prove(&self, go_on: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        let Some(proofs) = &self.proofs else {
            return Ok(());
        };
        loop {
            self.barrier()?;
            self.read_back_all(go_on)?;
            while !proofs.are_settled(TICK) {
                self.check_going_on(go_on)?;
            }
            self.check_given_back()?;
            if proofs.are_complete() {
                return Ok(());
            }
            self.check_going_on(go_on)?;
        }
    }

    /// Fails when the medium did not give back what was written to it. That is
    /// missing from then on.
    pub fn check_given_back(&self) -> Result<()> {
        let lost = self.proofs.as_ref().map(Proofs::lost).unwrap_or_default();
        let Some(first) = lost.first() else {
            return Ok(());
        };
        let noted = lock(&self.journal).forget(&lost);
        noted.map_err(|e| self.failed("cannot write the journal of", &e))?;
        let mut book = lock(&self.book);
        lost.iter().for_each(|segment| book.ledger.forget(*segment));
        let text = format!(
            "{} does not give back what was written to it, in {} of its 64 MiB segments; nothing was published. Check the device; the next attempt writes them again",
            self.names.shown,
            lost.len()
        );
        let offset = *first as u64 * SEGMENT_CHUNKS * CHUNK;
        Err(self.about(MoverError::new(Code::TargetIo, text).at(offset)))
    }

    /// Reads back all that is due, in parallel.
    fn read_back_all(&self, go_on: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        let failed = Mutex::new(None);
        let work = || {
            let Some(mut buffer) = AlignedBuf::new(CHUNK as usize) else {
                *lock(&failed) = Some(MoverError::no_memory(CHUNK as usize));
                return;
            };
            while self.read_back(&mut buffer) {
                if let Err(error) = self.check_going_on(go_on) {
                    *lock(&failed) = Some(error);
                    return;
                }
            }
        };
        guard::together(work);
        let failed = lock(&failed).take();
        failed.map_or(Ok(()), |error| Err(self.about(error)))
    }

    fn check_going_on(&self, go_on: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        if go_on() {
            return Ok(());
        }
        let text = "the session ended while the target was read back";
        Err(self.about(MoverError::new(Code::SessionClosed, text)))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use super::*;
    use crate::digest::{self, Hash};
    use crate::rig::noise;
    use crate::sample;
    use crate::target::{Care, Proof};

    const SEGMENT: u64 = SEGMENT_CHUNKS * CHUNK;

    /// A target in a directory, of so many bytes.
    fn open(dir: &Path, size: u64) -> Target {
        let care = Care {
            proof: Proof::Readback,
            ..Care::default()
        };
        *sample::open(dir, care, sample::identity(size)).unwrap()
    }

    fn chunk() -> (AlignedBuf, Hash) {
        let mut chunk = AlignedBuf::new(CHUNK as usize).unwrap();
        chunk.copy_from_slice(&noise(1, CHUNK as usize));
        let hash = digest::chunk_hash(&digest::scan(&chunk), &chunk);
        (chunk, hash)
    }

    fn place(target: &Target, number: u64) {
        let (chunk, hash) = chunk();
        let bitmap = digest::scan(&chunk);
        target.place(number, &bitmap, &chunk, hash).unwrap();
    }

    fn rot(dir: &Path, offset: u64) {
        let part = File::options()
            .write(true)
            .open(dir.join(sample::PART))
            .unwrap();
        part.write_all_at(b"rot", offset).unwrap();
    }

    fn looks(target: &Target) -> usize {
        let mut buffer = AlignedBuf::new(CHUNK as usize).unwrap();
        std::iter::from_fn(|| target.read_back(&mut buffer).then_some(())).count()
    }

    #[test]
    fn a_segment_is_read_back_once_it_is_complete_and_durable() {
        let dir = tempfile::tempdir().unwrap();
        let target = open(dir.path(), 2 * SEGMENT);
        place(&target, 0);
        target.barrier().unwrap();
        assert_eq!(looks(&target), 0, "incomplete");
        target.place_zeros(1, 65, &|| true).unwrap();
        assert_eq!(looks(&target), 0, "not durable");
        target.barrier().unwrap();
        assert_eq!((looks(&target), looks(&target)), (1, 0));
        target.place_zeros(65, 128, &|| true).unwrap();
        // The rest of it, and no more: what was proven may rot unseen by then.
        rot(dir.path(), 5);
        target.prove(&|| true).unwrap();
    }

    #[test]
    fn what_is_written_again_is_not_proven_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let target = open(dir.path(), 2 * CHUNK);
        place(&target, 0);
        target.place_zeros(1, 2, &|| true).unwrap();
        target.prove(&|| true).unwrap();
        // Two connections brought the chunk, and one was slow.
        let (chunk, _) = chunk();
        let bitmap = digest::scan(&chunk);
        target.write_blocks(0, u16::MAX, &bitmap, &chunk).unwrap();
        rot(dir.path(), 5);
        target.confirm(0);
        let error = target.prove(&|| true).unwrap_err();
        assert_eq!((error.code, error.offset), (Code::TargetIo, Some(0)));
        assert!(!target.is_complete(), "it still counts");
    }

    #[test]
    fn what_is_sent_again_and_not_written_stays_proven() {
        let dir = tempfile::tempdir().unwrap();
        let target = open(dir.path(), SEGMENT);
        place(&target, 0);
        target.place_zeros(1, 64, &|| true).unwrap();
        target.prove(&|| true).unwrap();
        place(&target, 0);
        target.place_zeros(1, 64, &|| true).unwrap();
        target.barrier().unwrap();
        assert_eq!(looks(&target), 0);
    }

    #[test]
    fn what_an_earlier_attempt_has_read_back_is_read_back_again() {
        let dir = tempfile::tempdir().unwrap();
        let size = 4 * SEGMENT;
        let target = open(dir.path(), size);
        for first in [0, 64, 128] {
            place(&target, first);
            target.place_zeros(first + 1, first + 64, &|| true).unwrap();
            target.barrier().unwrap();
        }
        assert_eq!(looks(&target), 3);
        drop(target);
        rot(dir.path(), 5);
        let target = open(dir.path(), size);
        assert_eq!(target.resumed, 3 * SEGMENT, "found out before");
        target.place_zeros(192, 256, &|| true).unwrap();
        let error = target.prove(&|| true).unwrap_err();
        assert_eq!((error.code, error.offset), (Code::TargetIo, Some(0)));
        drop(target);
        // The journal knows: the next one brings it again.
        assert_eq!(open(dir.path(), size).resumed, 3 * SEGMENT);
    }

    #[test]
    fn a_session_that_ends_does_not_wait_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let target = open(dir.path(), SEGMENT);
        target.place_zeros(0, 64, &|| true).unwrap();
        let error = target.prove(&|| false).unwrap_err();
        assert_eq!(error.code, Code::SessionClosed);
    }
}
