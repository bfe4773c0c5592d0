//! Files at the target whose content may be reused: older copies, base images.
//!
//! Each is cut into 64 KiB blocks, and their hashes are kept in a list beside it,
//! so that it is read once and not for every copy. A block that a source has is
//! looked up by its hash, wherever in a seed it lies, copied (or shared, where the
//! file system can), and hashed again as it arrives: a list can be old, a file can
//! change at any time, and neither is ever believed.
//!
//! In memory are the first bytes of the hashes of `MAX_BLOCKS` different blocks, the
//! first of the first seed first, and of those only seeds for which a volume gets room
//! (budget.rs). What seeds hold beyond that is sent as if it were not there.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::base::{self, Mask, PIECE};
use crate::budget::{SEED_BLOCK, Share};
use crate::digest::{self, CHUNK, Hash, ZERO_HASH};
use crate::error::{Code, MoverError, Result};
use crate::guard;
use crate::medium::Medium;
use crate::note;
use crate::plan::{Plan, Work};
use crate::pool::lock;
use crate::seedlist::{self, List};
use crate::source::{FileSource, Source};
use crate::sys::{self, ALIGN, AlignedBuf};

/// Most blocks that are looked up (128 GiB of seeds): bounds the memory.
const MAX_BLOCKS: usize = 2 << 20;

/// A note said that there is no memory for a seed.
static LEFT_OUT: AtomicBool = AtomicBool::new(false);

/// Smaller seeds are read again sooner than a list of theirs is missed.
const LISTED_FROM: u64 = 64 << 20;

/// A file whose content may be reused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeedSpec {
    /// Directory to stay beneath.
    pub root: PathBuf,
    /// The file, relative to it.
    pub name: String,
}

/// Seeds, open and indexed.
pub struct Seeds {
    files: Vec<Seed>,
    /// From the first bytes of a hash to where such a block may be.
    blocks: HashMap<u64, (u32, u32)>,
    shares: AtomicBool,
    /// Bytes that were taken from seeds.
    pub reused: AtomicU64,
}

struct Seed {
    source: FileSource,
    file: File,
}

impl Seeds {
    /// Opens and indexes seeds; those that are missing or unreadable, or whose blocks
    /// have no room in `share`, are left out.
    pub fn open(
        specs: &[SeedSpec],
        share: &mut Share,
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Seeds> {
        let mut seeds = Seeds {
            files: Vec::new(),
            blocks: HashMap::new(),
            shares: AtomicBool::new(true),
            reused: AtomicU64::new(0),
        };
        for spec in specs {
            let Some(list) = seedlist::List::open(spec) else {
                continue;
            };
            let before = seeds.blocks.len();
            let blocks = list.source().identity().size.div_ceil(PIECE as u64);
            let most = blocks.min((MAX_BLOCKS - before) as u64);
            if share.take(most * SEED_BLOCK).is_err() {
                note::once(&LEFT_OUT, || {
                    format!(
                        "no memory is left to look up what {:?} holds: what a copy has in common with it is sent again",
                        spec.name
                    )
                });
                continue;
            }
            let is_indexed = seeds.take_in(&list, go_on)?;
            let found = (seeds.blocks.len() - before) as u64;
            share.give_back((most - found) * SEED_BLOCK);
            if is_indexed {
                let (source, file) = list.into_parts();
                seeds.files.push(Seed { source, file });
            }
        }
        Ok(seeds)
    }

    /// Indexes a seed, by its list or by reading it; false when it cannot be read.
    fn take_in(&mut self, list: &List, go_on: &(dyn Fn() -> bool + Sync)) -> Result<bool> {
        if list.load(&mut |first, hashes| self.index(first, hashes), go_on) {
            return Ok(true);
        }
        self.forget_last();
        let whole = self.read(list, go_on)?;
        if !whole {
            self.forget_last();
        }
        Ok(whole)
    }

    /// Hashes all of a seed, and lists it if that pays; false when it cannot be read.
    fn read(&mut self, list: &List, go_on: &(dyn Fn() -> bool + Sync)) -> Result<bool> {
        let is_large = list.source().identity().size >= LISTED_FROM;
        let mut draft = if is_large { list.draft() } else { None };
        let mut sink = |first: u64, hashes: &[Hash]| {
            self.index(first, hashes);
            if let Some(draft) = &mut draft {
                draft.put(first, hashes);
            }
        };
        let whole = hash_all(list.source(), &mut sink, go_on)?;
        if let Some(draft) = draft.filter(|_| whole) {
            draft.keep(go_on);
        }
        Ok(whole)
    }

    /// Whether there is nothing to reuse.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Puts blocks of a chunk that are wanted and found into the target, and into
    /// `chunk`, which is what the target holds there; returns those still missing.
    pub fn fill(
        &self,
        target: &Medium,
        offset: u64,
        chunk: &mut [u8],
        wanted: &[Hash],
        missing: Mask,
    ) -> std::io::Result<Mask> {
        let (mut missing, mut read) = (missing, 0);
        let mut buffer = match AlignedBuf::new(PIECE) {
            Some(buffer) => buffer,
            None => return Ok(missing),
        };
        for (number, hash) in wanted.iter().enumerate() {
            let bit = 1 << number;
            let start = number * PIECE;
            let len = PIECE.min(chunk.len().saturating_sub(start));
            if missing & bit == 0 || len == 0 {
                continue;
            }
            let piece = &mut buffer[..len];
            if *hash == ZERO_HASH {
                target.zero(offset + start as u64, len as u64)?;
                piece.fill(0);
            } else {
                match self.find(target, offset + start as u64, piece, hash)? {
                    Found::Nowhere => continue,
                    Found::Shared => {}
                    Found::Read => read |= bit,
                }
            }
            chunk[start..start + len].copy_from_slice(&buffer[..len]);
            missing &= !bit;
        }
        self.write_runs(target, offset, chunk, read)?;
        Ok(missing)
    }

    /// Writes the blocks of a chunk that `mask` covers, neighbours in one go: a write
    /// where blocks are missing keeps all other writers of the file waiting.
    fn write_runs(
        &self,
        target: &Medium,
        offset: u64,
        chunk: &[u8],
        mask: Mask,
    ) -> std::io::Result<()> {
        let mut rest = mask;
        while rest != 0 {
            let first = rest.trailing_zeros();
            let count = (rest >> first).trailing_ones();
            let start = first as usize * PIECE;
            let end = chunk.len().min(start + count as usize * PIECE);
            target.write(offset + start as u64, &chunk[start..end])?;
            self.reused
                .fetch_add((end - start) as u64, Ordering::Relaxed);
            rest &= !(((1u32 << count) - 1) << first) as Mask;
        }
        Ok(())
    }

    /// Finds one block in the seeds: `piece` is filled with it, and where the file system
    /// can share it the target has it, too.
    fn find(
        &self,
        target: &Medium,
        offset: u64,
        piece: &mut [u8],
        hash: &Hash,
    ) -> std::io::Result<Found> {
        let Some((seed, block)) = self.blocks.get(&prefix(hash)) else {
            return Ok(Found::Nowhere);
        };
        let seed = &self.files[*seed as usize];
        let from = u64::from(*block) * PIECE as u64;
        let is_right = |piece: &[u8]| *blake3::hash(piece).as_bytes() == *hash;
        if piece.len() == PIECE && self.shares.load(Ordering::Relaxed) {
            match sys::share(
                &seed.file,
                from,
                target.file(),
                target.start() + offset,
                PIECE as u64,
            ) {
                Ok(()) => {
                    // What counts is what the target reads as now.
                    target.read(offset, PIECE, piece)?;
                    if is_right(piece) {
                        self.reused.fetch_add(PIECE as u64, Ordering::Relaxed);
                        return Ok(Found::Shared);
                    }
                    return Ok(Found::Nowhere);
                }
                Err(_) => self.shares.store(false, Ordering::Relaxed),
            }
        }
        if !seed.read(from, piece) || !is_right(piece) {
            return Ok(Found::Nowhere);
        }
        Ok(Found::Read)
    }

    /// Takes hashes of the seed that is being opened, from this block on.
    fn index(&mut self, first: u64, hashes: &[Hash]) {
        let seed = self.files.len() as u32;
        for (block, hash) in (first..).zip(hashes) {
            if *hash != ZERO_HASH && self.blocks.len() < MAX_BLOCKS {
                let place = (seed, block as u32);
                self.blocks.entry(prefix(hash)).or_insert(place);
            }
        }
    }

    /// Takes back what was indexed of the seed that is being opened.
    fn forget_last(&mut self) {
        let last = self.files.len() as u32;
        self.blocks.retain(|_, (seed, _)| *seed != last);
        self.blocks.shrink_to_fit();
    }
}

/// Where a block was found.
enum Found {
    Nowhere,
    /// In a seed, and the target shares it by now.
    Shared,
    /// In a seed; it has to be written.
    Read,
}

impl Seed {
    /// Reads a piece that may end before the file does; false when it cannot.
    fn read(&self, offset: u64, piece: &mut [u8]) -> bool {
        self.source.read_piece(offset, piece).is_ok()
    }
}

fn prefix(hash: &Hash) -> u64 {
    hash[..8]
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Gives the hashes of all blocks of a file but those in holes to `sink`, in
/// parallel and about in order; false when it cannot be read.
fn hash_all(
    source: &FileSource,
    sink: &mut (dyn FnMut(u64, &[Hash]) + Send),
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<bool> {
    let size = source.identity().size;
    let Ok(extents) = source.extents(true) else {
        return Ok(false);
    };
    let plan = Mutex::new(Plan::new(extents, size));
    let sink = Mutex::new(sink);
    let (stopped, unread) = (AtomicBool::new(false), AtomicBool::new(false));
    let work = || {
        let Some(mut buffer) = AlignedBuf::new(CHUNK as usize) else {
            return unread.store(true, Ordering::Relaxed);
        };
        while !unread.load(Ordering::Relaxed) {
            let step = lock(&plan).next(|_| false);
            match step {
                Ok(Some(Work::Zeros(_))) => {}
                Ok(Some(Work::Chunk(chunk, ranges))) => {
                    if !go_on() {
                        return stopped.store(true, Ordering::Relaxed);
                    }
                    let len = digest::chunk_len(size, chunk);
                    let room = &mut buffer[..len.next_multiple_of(ALIGN)];
                    let Ok(read) = source.read_chunk(chunk, &ranges, room) else {
                        return unread.store(true, Ordering::Relaxed);
                    };
                    digest::blank(&mut buffer[..len], &read);
                    let found = base::hashes(&buffer[..len]);
                    lock(&sink)(chunk * base::PIECES as u64, &found);
                }
                Ok(None) => return,
                Err(_) => return unread.store(true, Ordering::Relaxed),
            }
        }
    };
    guard::together(work);
    if stopped.load(Ordering::Relaxed) {
        let text = "the session ended while files to reuse were read";
        return Err(MoverError::new(Code::SessionClosed, text).at_receiver());
    }
    Ok(!unread.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use rustix::fs::Advice;

    use super::*;
    use crate::passing::cached_bytes;
    use crate::rig::{Rig, noise, run};

    #[test]
    fn what_is_reused_does_not_stay_in_the_page_cache() {
        let rig = Rig::new();
        let data = noise(1, 3 * PIECE + 700);
        let seed = rig.root().join("seed");
        std::fs::write(&seed, &data).unwrap();
        let file = File::open(&seed).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        let source = rig.source("disk", data.len() as u64, &[(0, &data)]);
        rig.care.borrow_mut().seeds = vec![SeedSpec {
            root: rig.root(),
            name: "seed".to_owned(),
        }];
        rig.open(&[("disk", data.len() as u64)]).unwrap();
        let receipts = run(rig.job(&[&source])).unwrap();
        assert!(receipts[0].wire < 2 * PIECE as u64, "it was not reused");
        assert_eq!(cached_bytes(&seed), 0);
    }
}
