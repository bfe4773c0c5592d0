//! A part under construction: chunks in any order, durable step by step.

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;

use crate::audit;
use crate::base::{self, Mask};
use crate::beneath::Names;
use crate::device;
use crate::digest::{self, BLOCK, Bitmap, CHUNK, Hash, SEGMENT_CHUNKS};
use crate::entry::{self, Entry};
use crate::error::{Code, MoverError, Result};
use crate::journal::Journal;
use crate::ledger::Ledger;
use crate::medium::Medium;
use crate::messages::Receipt;
use crate::mode::CopyMode;
use crate::opening::{Announced, Known};
use crate::pool::lock;
use crate::publish;
use crate::qcow2::Image;
use crate::receipt::FileId;
use crate::seeds::Seeds;
use crate::source::Identity;
pub use crate::spec::{Care, Container, Place, Proof, TargetSpec, Trust};
use crate::sys::ALIGN;
use crate::unreadable::Unreadable;

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
}

/// What became of an offer to take a chunk from the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The chunk is placed.
    Whole,
    /// These 64 KiB blocks are not in the base.
    Without(Mask),
}

/// An open part.
pub struct Target {
    spec: TargetSpec,
    names: Names,
    id: FileId,
    medium: Medium,
    /// Whether the part held something that no journal tells of.
    has_base: bool,
    seeds: Seeds,
    /// The source that it is a copy of.
    pub identity: Identity,
    mode: CopyMode,
    image: Option<Image>,
    /// Bytes that were durable when it was opened.
    pub resumed: u64,
    book: Mutex<Book>,
    journal: Mutex<Journal>,
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
            seeds: known.seeds,
            identity: announced.identity,
            mode: announced.mode,
            image: known.image,
            resumed: known.ledger.done_bytes(),
            book: Mutex::new(Book {
                ledger: known.ledger,
                pending: BTreeMap::new(),
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
    pub fn state(&self) -> Vec<Entry> {
        let book = lock(&self.book);
        entry::collect(
            &book.ledger,
            (0..book.ledger.segments()).map(|s| (s, u64::MAX)),
        )
    }

    /// Places a verified chunk: `data` holds the blocks that `bitmap` marks.
    ///
    /// `data` is aligned. Placing the same content again does nothing.
    pub fn place(&self, chunk: u64, bitmap: &Bitmap, data: &[u8], hash: Hash) -> Result<()> {
        let size = {
            let mut book = lock(&self.book);
            if book.ledger.offer(chunk, hash, data.len() as u32).is_err() {
                return self.conflict(chunk);
            }
            if book.ledger.is_done(chunk) {
                return Ok(());
            }
            book.ledger.size()
        };
        let len = digest::chunk_len(size, chunk);
        self.write_blocks(chunk, base::all(len), bitmap, data)?;
        self.confirm(chunk);
        Ok(())
    }

    /// Bytes of the volume for which there may be older content.
    pub fn base_bytes(&self) -> u64 {
        let any = self.has_base || !self.seeds.is_empty();
        if any { self.size() } else { 0 }
    }

    /// Places a chunk from what is there, if it is. `buffer` has room for it.
    ///
    /// Blocks that seeds have are put into the part even when others are missing:
    /// the patch that brings those is laid over them.
    pub fn take(
        &self,
        chunk: u64,
        hash: Hash,
        pieces: &[Hash],
        buffer: &mut [u8],
    ) -> Result<Taken> {
        if lock(&self.book).ledger.is_done(chunk) {
            return Ok(Taken::Whole);
        }
        let buffer = &mut buffer[..digest::chunk_len(self.size(), chunk)];
        if !self.read_part(chunk, buffer) {
            return Ok(Taken::Without(base::all(buffer.len())));
        }
        let missing = base::differing(buffer, pieces) & base::all(buffer.len());
        let (seeds, offset) = (&self.seeds, chunk * CHUNK);
        let filled = seeds.fill(&self.medium, offset, buffer, pieces, missing);
        match filled.map_err(|e| self.failed("cannot write", &e).at(offset))? {
            0 => self.adopt(chunk, 0, buffer, |found, _| *found == hash),
            mask => Ok(Taken::Without(mask)),
        }
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
        if lock(&self.book).ledger.is_done(chunk) {
            return Ok(Taken::Whole);
        }
        let buffer = &mut buffer[..digest::chunk_len(self.size(), chunk)];
        if !self.read_part(chunk, buffer) {
            return Ok(Taken::Without(base::all(buffer.len())));
        }
        base::overlay(buffer, mask, bitmap, data);
        self.adopt(chunk, mask, buffer, |found, blocks| {
            blocks == bitmap && is_right(found)
        })
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
        let offered = lock(&self.book).ledger.offer(chunk, hash, data as u32);
        if offered.is_err() {
            self.conflict(chunk)?;
        }
        self.write_blocks(chunk, mask, &bitmap, &buffer[..data])?;
        self.confirm(chunk);
        Ok(Taken::Whole)
    }

    /// Reads what the part holds of a chunk; false when it cannot be read.
    fn read_part(&self, chunk: u64, buffer: &mut [u8]) -> bool {
        let read = self.medium.read(chunk * CHUNK, buffer.len(), buffer);
        read.is_ok()
    }

    /// Writes the 64 KiB blocks of a chunk that `mask` covers; `data` holds the
    /// blocks of the whole chunk that `bitmap` marks.
    fn write_blocks(&self, chunk: u64, mask: Mask, bitmap: &Bitmap, data: &[u8]) -> Result<()> {
        if let Some(image) = &self.image {
            image.note(chunk, bitmap);
        }
        let len = digest::chunk_len(self.size(), chunk);
        let mut taken = 0;
        let mut block = 0;
        let end = len.div_ceil(BLOCK);
        // Runs of blocks that are alike in both respects: one call for each.
        let kind = |b: usize| (base::covers(mask, b), digest::is_set(bitmap, b));
        while block < end {
            let (wanted, marked) = kind(block);
            let first = block;
            while block < end && kind(block) == (wanted, marked) {
                block += 1;
            }
            let start = first * BLOCK;
            let bytes = (block * BLOCK).min(len) - start;
            let offset = chunk * CHUNK + start as u64;
            match (wanted, marked) {
                (true, true) => self.write(offset, &data[taken..taken + bytes])?,
                (true, false) => self.zero(offset, bytes as u64)?,
                (false, _) => {}
            }
            taken += if marked { bytes } else { 0 };
        }
        Ok(())
    }

    /// Notes that a chunk is written.
    fn confirm(&self, chunk: u64) {
        let mut book = lock(&self.book);
        if book.ledger.confirm(chunk) {
            let segment = (chunk / SEGMENT_CHUNKS) as u32;
            *book.pending.entry(segment).or_default() |= 1 << (chunk % SEGMENT_CHUNKS);
        }
    }

    /// Places zero chunks `first..end`.
    pub fn place_zeros(&self, first: u64, end: u64) -> Result<()> {
        // Only what is not durable is punched: a done chunk must stay what it is.
        let (missing, size) = {
            let ledger = &lock(&self.book).ledger;
            (ledger.missing_zeros(first, end), ledger.size())
        };
        let Ok(missing) = missing else {
            return self.conflict(first);
        };
        for run in missing {
            if let Some(image) = &self.image {
                image.note_zeros(run.clone());
            }
            let start = run.start * CHUNK;
            self.zero(start, (run.end * CHUNK).min(size) - start)?;
        }
        let mut book = lock(&self.book);
        if book.ledger.confirm_zeros(first, end).is_err() {
            return self.conflict(first);
        }
        for segment in first / SEGMENT_CHUNKS..end.div_ceil(SEGMENT_CHUNKS) {
            let from = first
                .saturating_sub(segment * SEGMENT_CHUNKS)
                .min(SEGMENT_CHUNKS);
            let to = (end - segment * SEGMENT_CHUNKS).min(SEGMENT_CHUNKS);
            let bits = (u64::MAX >> (64 - to)) & u64::MAX.checked_shl(from as u32).unwrap_or(0);
            *book.pending.entry(segment as u32).or_default() |= bits;
        }
        Ok(())
    }

    /// Makes durable what is placed, then notes that it is.
    ///
    /// An error here is final for the part's open file: the kernel reports it
    /// once and may have dropped the pages. Only what was noted before counts.
    pub fn barrier(&self) -> Result<()> {
        let mut journal = lock(&self.journal);
        let (pending, entries) = {
            let mut book = lock(&self.book);
            let pending = std::mem::take(&mut book.pending);
            let segments = pending
                .iter()
                .map(|(segment, bits)| (*segment as usize, *bits));
            let entries = entry::collect(&book.ledger, segments);
            (pending, entries)
        };
        if pending.is_empty() {
            return Ok(());
        }
        let durable = self.medium.sync();
        durable.map_err(|e| self.failed("cannot make durable", &e))?;
        let noted = journal.append(&entries);
        noted.map_err(|e| self.failed("cannot write the journal of", &e))?;
        let mut book = lock(&self.book);
        for segment in pending.into_keys() {
            if !book.pending.contains_key(&segment) {
                book.ledger.close_if_full(segment as usize);
            }
        }
        Ok(())
    }

    /// Makes all durable and compares the root digest with the sender's.
    pub fn verify(&self, root: &Hash) -> Result<()> {
        self.barrier()?;
        let book = lock(&self.book);
        let Some(own) = book.ledger.root() else {
            let text = "the sender says that it is done, but chunks are missing";
            return Err(self.about(MoverError::new(Code::Protocol, text)));
        };
        if own != *root {
            // Nobody can tell which chunk is wrong: each has to be compared.
            self.names.remove(&self.names.journal)?;
            let text = format!(
                "the sender's digest is {}, the target's is {}; nothing was published, and the next attempt compares every chunk again",
                digest::hex(root),
                digest::hex(&own)
            );
            return Err(self.about(MoverError::new(Code::DigestMismatch, text)));
        }
        Ok(())
    }

    /// Reads all of it back and compares it with what was placed, if that is wanted.
    ///
    /// What the medium does not give back is missing from then on.
    pub fn prove(&self, go_on: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        if self.spec.care.proof == Proof::Written {
            return Ok(());
        }
        let bad = {
            let expected = audit::all(&lock(&self.book).ledger);
            audit::failing(&self.medium, &expected, go_on)
        };
        let Some(bad) = bad else {
            let text = "the session ended while the target was read back";
            return Err(self.about(MoverError::new(Code::SessionClosed, text)));
        };
        let Some(first) = bad.first() else {
            return Ok(());
        };
        let noted = lock(&self.journal).forget(&bad);
        noted.map_err(|e| self.failed("cannot write the journal of", &e))?;
        let mut book = lock(&self.book);
        bad.iter().for_each(|segment| book.ledger.forget(*segment));
        let text = format!(
            "{} does not give back what was written to it, in {} of its 64 MiB segments; nothing was published. Check the device; the next attempt writes them again",
            self.names.shown,
            bad.len()
        );
        let offset = *first as u64 * SEGMENT_CHUNKS * CHUNK;
        Err(self.about(MoverError::new(Code::TargetIo, text).at(offset)))
    }

    /// Gives the verified part its final name.
    pub fn publish(&self, wire: u64, unreadable: Unreadable) -> Result<Receipt> {
        let receipt = {
            let book = lock(&self.book);
            Receipt {
                volume: self.spec.volume.clone(),
                size: book.ledger.size(),
                data: book.ledger.data_bytes(),
                wire,
                root: book.ledger.root().unwrap_or_default(),
                mode: self.mode,
                unreadable,
            }
        };
        let file = self.medium.file();
        let length = match &self.image {
            Some(image) => image.layout().file_size(),
            None => receipt.size,
        };
        self.map_image()?;
        let published = match self.spec.care.place {
            Place::File => publish::publish(&self.names, file, &self.spec, &receipt, length),
            Place::Device { .. } => device::publish(&self.names, file, self.id, &receipt),
        };
        published.map_err(|e| e.in_volume(&self.spec.volume))?;
        Ok(receipt)
    }

    /// Makes the part an image, if it is to become one.
    fn map_image(&self) -> Result<()> {
        let Some(image) = &self.image else {
            return Ok(());
        };
        let file = self.medium.file();
        let written = image.write(file).and_then(|()| self.medium.sync());
        written.map_err(|e| self.failed("cannot write the tables of", &e))?;
        if self.spec.care.proof == Proof::Readback {
            let same = image.is_written(file);
            let same = same.map_err(|e| self.failed("cannot read back the tables of", &e))?;
            if !same {
                let text = format!(
                    "{} does not give back the tables of the image that were written to it; nothing was published. Check the device",
                    self.names.shown
                );
                return Err(self.about(MoverError::new(Code::TargetIo, text)));
            }
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

    /// Refuses a chunk that came twice with different content.
    fn conflict(&self, chunk: u64) -> Result<()> {
        // The two may have been written over each other: nothing is worth keeping.
        self.names.remove(&self.names.journal)?;
        let text = "a chunk came twice with different content: the source changed";
        Err(self.about(MoverError::new(Code::SourceChanged, text).at(chunk * CHUNK)))
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

// A chunk's blocks and O_DIRECT's alignment have to be the same.
const _: () = assert!(BLOCK == ALIGN);
