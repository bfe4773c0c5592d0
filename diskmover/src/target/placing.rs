//! How chunks get into the part: sent whole, as zeros, or from what is there.
//!
//! ```text
//! place        all of its data was sent
//! place_zeros  a run of chunks of zeros
//! take         its hashes were sent, and its content is at hand  -> Whole
//!                                         ... but for some pieces -> Without
//! patch        these pieces were sent
//! ```
//! The book is asked before a chunk is written, and refuses what came before with
//! other content; that it is done is noted afterwards.

use std::ops::Range;

use crate::base::{self, Mask};
use crate::digest::{self, BLOCK, Bitmap, CHUNK, Hash, SEGMENT_CHUNKS};
use crate::error::{Code, MoverError, Result};
use crate::ledger::{self, MOST_HELD, Unfit};
use crate::pool::lock;
use crate::sys::ALIGN;
use crate::target::{Book, Target};

/// What became of an offer to take a chunk from the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The chunk is placed.
    Whole,
    /// These 64 KiB blocks are not in the base.
    Without(Mask),
}

impl Target {
    /// Places a verified chunk: `data` holds the blocks that `bitmap` marks.
    ///
    /// `data` is aligned. Placing the same content again does nothing.
    pub fn place(&self, chunk: u64, bitmap: &Bitmap, data: &[u8], hash: Hash) -> Result<()> {
        if self.offer(chunk, hash, data.len())? {
            return Ok(());
        }
        let len = digest::chunk_len(self.size(), chunk);
        self.write_blocks(chunk, base::all(len), bitmap, data)?;
        self.confirm(chunk);
        Ok(())
    }

    /// Places a chunk from what is there, if it is; tells how many bytes of it were
    /// written. `buffer` has room for it.
    ///
    /// Blocks that seeds have are put into the part even when others are missing:
    /// the patch that brings those is laid over them.
    pub fn take(
        &self,
        chunk: u64,
        hash: Hash,
        pieces: &[Hash],
        buffer: &mut [u8],
    ) -> Result<(Taken, u64)> {
        if self.recognise(chunk, hash)? {
            return Ok((Taken::Whole, 0));
        }
        let buffer = match self.at_hand(chunk, buffer) {
            Ok(held) => held,
            Err(taken) => return Ok((taken, 0)),
        };
        let missing = base::differing(buffer, pieces) & base::all(buffer.len());
        let (seeds, offset) = (&self.seeds, chunk * CHUNK);
        let filled = seeds.fill(&self.medium, offset, buffer, pieces, missing);
        let left = filled.map_err(|e| self.failed("cannot write", &e).at(offset))?;
        if left != missing {
            self.note_written(&mut lock(&self.book), chunk);
        }
        let taken = match left {
            0 => self.adopt(chunk, 0, buffer, |found, _| *found == hash)?,
            mask => Taken::Without(mask),
        };
        let written = u64::from((missing & !left).count_ones()) * base::PIECE as u64;
        Ok((taken, written))
    }

    /// Lays blocks over what the part holds and places the result, if it is what
    /// `is_right` expects. `data` holds the blocks that `bitmap` marks in `mask`.
    pub fn patch(
        &self,
        chunk: u64,
        mask: Mask,
        bitmap: &Bitmap,
        data: &[u8],
        buffer: &mut [u8],
        is_right: impl Fn(&Hash) -> bool,
    ) -> Result<Taken> {
        let buffer = match self.at_hand(chunk, buffer) {
            Ok(held) => held,
            Err(taken) => return Ok(taken),
        };
        base::overlay(buffer, mask, bitmap, data);
        self.adopt(chunk, mask, buffer, |found, blocks| {
            blocks == bitmap && is_right(found)
        })
    }

    /// Notes what a chunk holds that is about to be written; true when it is placed
    /// already.
    fn offer(&self, chunk: u64, hash: Hash, data: usize) -> Result<bool> {
        let mut book = lock(&self.book);
        if let Err(unfit) = book.ledger.offer(chunk, hash, data as u32) {
            self.refuse(unfit, chunk)?;
        }
        book.take_room().map_err(|e| self.about(e))?;
        Ok(book.ledger.is_done(chunk))
    }

    /// Places a chunk that stands here, as an earlier journal says, without a look.
    fn recognise(&self, chunk: u64, hash: Hash) -> Result<bool> {
        if lock(&self.book).ledger.is_done(chunk) {
            return Ok(false);
        }
        let noted = self.earlier.as_ref();
        let noted = noted.and_then(|earlier| earlier.take(chunk));
        let Some((_, data)) = noted.filter(|(found, _)| *found == hash) else {
            return Ok(false);
        };
        self.offer(chunk, hash, data as usize)?;
        self.confirm(chunk);
        Ok(true)
    }

    /// Places a chunk of which all blocks outside `mask` are in the part already.
    fn adopt(
        &self,
        chunk: u64,
        mask: Mask,
        buffer: &mut [u8],
        is_right: impl Fn(&Hash, &Bitmap) -> bool,
    ) -> Result<Taken> {
        let len = buffer.len();
        let bitmap = digest::scan(buffer);
        let data = digest::compact(buffer, &bitmap);
        let hash = digest::chunk_hash(&bitmap, &buffer[..data]);
        if !is_right(&hash, &bitmap) {
            return Ok(Taken::Without(base::all(len)));
        }
        self.offer(chunk, hash, data)?;
        self.write_blocks(chunk, mask, &bitmap, &buffer[..data])?;
        self.confirm(chunk);
        Ok(Taken::Whole)
    }

    /// What the part holds of a chunk that is not placed yet; else what becomes of it.
    fn at_hand<'a>(
        &self,
        chunk: u64,
        buffer: &'a mut [u8],
    ) -> std::result::Result<&'a mut [u8], Taken> {
        if lock(&self.book).ledger.is_done(chunk) {
            return Err(Taken::Whole);
        }
        let len = digest::chunk_len(self.size(), chunk);
        let held = &mut buffer[..len];
        match self.medium.read(chunk * CHUNK, len, held) {
            Ok(()) => Ok(held),
            Err(_) => Err(Taken::Without(base::all(len))),
        }
    }

    /// Notes that a chunk has arrived, so that its blocks can be allocated together
    /// with those of others. It is not verified yet, and need not be right.
    pub fn expect(&self, chunk: u64, bitmap: &Bitmap) {
        let len = digest::chunk_len(self.size(), chunk);
        let marked = runs(len, |block| digest::is_set(bitmap, block));
        for (bytes, _) in marked.filter(|(_, is_marked)| *is_marked) {
            let offset = chunk * CHUNK + bytes.start as u64;
            self.medium.expect(offset, bytes.len() as u64);
        }
    }

    /// Writes the 64 KiB blocks of a chunk that `mask` covers; `data` holds the
    /// blocks of the whole chunk that `bitmap` marks.
    pub(super) fn write_blocks(
        &self,
        chunk: u64,
        mask: Mask,
        bitmap: &Bitmap,
        data: &[u8],
    ) -> Result<()> {
        if let Some(image) = &self.image {
            image.note(chunk, bitmap);
        }
        let len = digest::chunk_len(self.size(), chunk);
        let mut taken = 0;
        let kind = |block| (base::covers(mask, block), digest::is_set(bitmap, block));
        for (bytes, (wanted, marked)) in runs(len, kind) {
            let offset = chunk * CHUNK + bytes.start as u64;
            let len = bytes.len();
            match (wanted, marked) {
                (true, true) => self.write(offset, &data[taken..taken + len])?,
                (true, false) => self.zero(offset, len as u64)?,
                (false, _) => {}
            }
            taken += if marked { len } else { 0 };
        }
        Ok(())
    }

    /// Notes that a chunk is written.
    pub(super) fn confirm(&self, chunk: u64) {
        let mut book = lock(&self.book);
        book.ledger.confirm(chunk);
        // Also when it was done before: it may have come twice at the same time.
        self.note_written(&mut book, chunk);
    }

    /// Notes that something was written to a chunk, and has to become durable.
    fn note_written(&self, book: &mut Book, chunk: u64) {
        let (segment, bit) = (chunk / SEGMENT_CHUNKS, 1 << (chunk % SEGMENT_CHUNKS));
        book.note_written(segment as usize, bit, self.proofs.as_ref());
    }

    /// Places zero chunks `first..end`, a segment at a time: where the medium cannot
    /// zero, all of it is read. `go_on` is asked before each, and ends it.
    pub fn place_zeros(&self, first: u64, end: u64, go_on: &dyn Fn() -> bool) -> Result<()> {
        let mut from = first;
        while from < end {
            if !go_on() {
                let text = "the session ended while zeros were placed";
                return Err(self.about(MoverError::new(Code::SessionClosed, text)));
            }
            let to = end.min((from / SEGMENT_CHUNKS + 1) * SEGMENT_CHUNKS);
            self.place_some_zeros(from, to)?;
            from = to;
        }
        Ok(())
    }

    fn place_some_zeros(&self, first: u64, end: u64) -> Result<()> {
        // Only what is not durable is punched: a done chunk must stay what it is.
        let size = {
            let ledger = &lock(&self.book).ledger;
            if let Err(unfit) = ledger.check_zeros(first, end) {
                return self.refuse(unfit, first);
            }
            ledger.size()
        };
        let mut from = first;
        let mut any = false;
        // One by one: there may be as many as chunks.
        while let Some(run) = { lock(&self.book).ledger.next_missing(from, end) } {
            from = run.end;
            any = true;
            if let Some(image) = &self.image {
                image.note_zeros(run.clone());
            }
            let start = run.start * CHUNK;
            self.zero(start, (run.end * CHUNK).min(size) - start)?;
        }
        if !any {
            return Ok(());
        }
        let mut book = lock(&self.book);
        if let Err(unfit) = book.ledger.confirm_zeros(first, end) {
            return self.refuse(unfit, first);
        }
        for (segment, bits) in ledger::pieces(first..end) {
            book.note_written(segment, bits, self.proofs.as_ref());
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let written = self.medium.write(offset, data);
        written.map_err(|e| self.failed("cannot write", &e).at(offset))
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        let zeroed = self.medium.zero(offset, len);
        zeroed.map_err(|e| self.failed("cannot zero", &e).at(offset))
    }

    /// Refuses a chunk that came twice with different content, or that is one of
    /// too many all over the volume.
    fn refuse(&self, unfit: Unfit, chunk: u64) -> Result<()> {
        if unfit == Unfit::Full {
            let text = format!(
                "{MOST_HELD} chunks of {:?} are there, none of them with the 64 MiB around it, and more of the kind came; no sender of ours does that: look at what runs there",
                self.spec.volume
            );
            let error = MoverError::new(Code::Protocol, text);
            return Err(self.about(error.at(chunk * CHUNK)));
        }
        // The two may have been written over each other: nothing is worth keeping.
        self.names.remove(&self.names.journal)?;
        let text = "a chunk came twice with different content: the source changed";
        Err(self.about(MoverError::new(Code::SourceChanged, text).at(chunk * CHUNK)))
    }
}

/// Runs of 4 KiB blocks of a chunk of `len` bytes that are alike: their bytes, and
/// in what.
fn runs<K: PartialEq>(
    len: usize,
    kind: impl Fn(usize) -> K,
) -> impl Iterator<Item = (Range<usize>, K)> {
    let end = len.div_ceil(BLOCK);
    let mut block = 0;
    std::iter::from_fn(move || {
        if block == end {
            return None;
        }
        let (first, alike) = (block, kind(block));
        while block < end && kind(block) == alike {
            block += 1;
        }
        Some((first * BLOCK..(block * BLOCK).min(len), alike))
    })
}

// A chunk's blocks and O_DIRECT's alignment have to be the same.
const _: () = assert!(BLOCK == ALIGN);

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::faults::{self, Op};
    use crate::rig::noise;
    use crate::sample;
    use crate::seeds::SeedSpec;
    use crate::sys::AlignedBuf;
    use crate::target::Care;

    /// A target beside a file "seed" that it may take from.
    fn seeded(dir: &Path, size: u64) -> Box<Target> {
        let care = Care {
            seeds: vec![SeedSpec {
                root: dir.to_owned(),
                name: "seed".into(),
            }],
            ..Care::default()
        };
        sample::open(dir, care, sample::identity(size)).unwrap()
    }

    #[test]
    fn what_seeds_give_is_told_as_written_and_what_stands_there_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut chunk = noise(1, CHUNK as usize);
        std::fs::write(dir.path().join("seed"), &chunk).unwrap();
        let target = seeded(dir.path(), 2 * CHUNK);
        let mut buffer = AlignedBuf::new(CHUNK as usize).unwrap();
        let mut take = |number, chunk: &[u8]| {
            let hash = digest::chunk_hash(&digest::scan(chunk), chunk);
            target
                .take(number, hash, &base::hashes(chunk), &mut buffer)
                .unwrap()
        };
        assert_eq!(take(0, &chunk), (Taken::Whole, CHUNK));
        assert_eq!(take(0, &chunk), (Taken::Whole, 0), "it is done");
        chunk[5 * base::PIECE] ^= 1;
        let written = CHUNK - base::PIECE as u64;
        assert_eq!(take(1, &chunk), (Taken::Without(1 << 5), written));
        assert_eq!(
            take(1, &chunk),
            (Taken::Without(1 << 5), 0),
            "they stand there"
        );
    }

    #[test]
    fn neighbouring_blocks_out_of_a_seed_are_written_in_one_go() {
        // Memory: a file system that shares blocks would have nothing to write.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut chunk = noise(1, CHUNK as usize);
        std::fs::write(dir.path().join("seed"), &chunk).unwrap();
        let target = seeded(dir.path(), CHUNK);
        // Two blocks that no seed has, and so three stretches between them.
        for strange in [3, 9] {
            chunk[strange * base::PIECE] ^= 1;
        }
        let mut buffer = AlignedBuf::new(CHUNK as usize).unwrap();
        let (hash, pieces) = (
            digest::chunk_hash(&digest::scan(&chunk), &chunk),
            base::hashes(&chunk),
        );
        let writes = faults::count(dir.path(), sample::PART, Op::Write);
        let (taken, written) = target.take(0, hash, &pieces, &mut buffer).unwrap();
        assert_eq!(taken, Taken::Without(1 << 3 | 1 << 9));
        assert_eq!(written, CHUNK - 2 * base::PIECE as u64);
        assert_eq!(writes.met(), 3);
    }
}
