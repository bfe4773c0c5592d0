//! Older content at the target, taken over where it is what the source has now.
//!
//! ```text
//! sender                                receiver
//! HASHES  chunk hash, 64 KiB hashes ->  reads its base, hashes what it read
//!                                   <-  ACK: placed, from the base
//!                                   <-  WANT: these blocks are not there
//! PATCH   only these blocks         ->  lays them over the base, checks the hash
//!                                       of the whole chunk
//!                                   <-  ACK, or WANT all: the base has changed
//! DATA    the whole chunk           ->  ...
//! ```
//! Nothing is ever taken on trust: the chunk hash is that of the bytes in memory
//! that go to the target, wherever they come from. So a base may be anything, and
//! may change at any time; it only costs that more is sent.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::digest::{self, BLOCK, Bitmap, CHUNK, Hash, ZERO_HASH};

/// Bytes of a block of a base.
pub const PIECE: usize = 64 << 10;
/// Blocks of a whole chunk.
pub const PIECES: usize = CHUNK as usize / PIECE;
const BLOCKS: usize = PIECE / BLOCK;

/// One bit for each 64 KiB block of a chunk.
pub type Mask = u16;

/// The mask of all blocks of a chunk of this length.
pub fn all(chunk_len: usize) -> Mask {
    Mask::MAX >> (PIECES - chunk_len.div_ceil(PIECE).clamp(1, PIECES))
}

/// Hashes of the blocks of a chunk, 32 zero bytes for zeros.
pub fn hashes(chunk: &[u8]) -> Vec<Hash> {
    let hash = |piece: &[u8]| match digest::is_zero(piece) {
        true => ZERO_HASH,
        false => *blake3::hash(piece).as_bytes(),
    };
    chunk.chunks(PIECE).map(hash).collect()
}

/// Blocks of `chunk` that do not have these hashes.
pub fn differing(chunk: &[u8], wanted: &[Hash]) -> Mask {
    let found = hashes(chunk);
    let differs = |i: &usize| found.get(*i) != wanted.get(*i);
    (0..PIECES).filter(differs).fold(0, |mask, i| mask | 1 << i)
}

/// Whether a 4 KiB block of the chunk lies in a block of the mask.
pub fn covers(mask: Mask, block: usize) -> bool {
    mask & (1 << (block / BLOCKS)) != 0
}

/// The 4 KiB blocks that are marked and that the mask covers.
pub fn select(bitmap: &Bitmap, mask: Mask) -> Bitmap {
    let mut selected = [0; 32];
    for block in (0..256).filter(|b| digest::is_set(bitmap, *b) && covers(mask, *b)) {
        selected[block / 8] |= 1 << (block % 8);
    }
    selected
}

/// Keeps, of the marked blocks of a chunk one after the other, those that the
/// mask covers; returns how many bytes they are.
pub fn narrow(data: &mut [u8], bitmap: &Bitmap, mask: Mask) -> usize {
    let (mut from, mut to) = (0, 0);
    for block in (0..256).filter(|b| digest::is_set(bitmap, *b)) {
        let end = (from + BLOCK).min(data.len());
        if covers(mask, block) {
            data.copy_within(from..end, to);
            to += end - from;
        }
        from = end;
    }
    to
}

/// Lays blocks over a chunk: those that the mask covers become `data`, which
/// holds the marked 4 KiB blocks of them, and zeros where they are not marked.
pub fn overlay(chunk: &mut [u8], mask: Mask, bitmap: &Bitmap, data: &[u8]) {
    let mut rest = data;
    for (block, bytes) in chunk.chunks_mut(BLOCK).enumerate() {
        if !covers(mask, block) {
            continue;
        }
        if digest::is_set(bitmap, block) {
            let (head, tail) = rest.split_at(bytes.len().min(rest.len()));
            bytes[..head.len()].copy_from_slice(head);
            rest = tail;
        } else {
            bytes.fill(0);
        }
    }
}

/// The sender's side: whether it pays to offer hashes before content.
///
/// Each chunk that the receiver does not have is read twice. So when hardly
/// anything is found there, the rest is sent as if there were nothing.
#[derive(Default)]
pub struct Sharing {
    bytes: AtomicU64,
    found: AtomicU64,
    missing: AtomicU64,
}

impl Sharing {
    /// Answers that are waited for before it can be called useless.
    const TRIAL: u64 = 64;

    /// Takes note of how much older content there is.
    pub fn set(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
        self.found.store(0, Ordering::Relaxed);
        self.missing.store(0, Ordering::Relaxed);
    }

    /// Whether to offer hashes of a chunk first.
    pub fn pays(&self, chunk: u64) -> bool {
        let missing = self.missing.load(Ordering::Relaxed);
        let useless = missing > Self::TRIAL && missing / 8 > self.found.load(Ordering::Relaxed);
        chunk * CHUNK < self.bytes.load(Ordering::Relaxed) && !useless
    }

    /// Takes note of an answer: how much of a chunk is to be sent.
    pub fn learn(&self, wanted: Mask) {
        let counter = if wanted.count_ones() > PIECES as u32 / 2 {
            &self.missing
        } else {
            &self.found
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes[PIECE..2 * PIECE].fill(0);
        bytes
    }

    #[test]
    fn a_patch_turns_the_base_into_the_chunk() {
        for len in [CHUNK as usize, CHUNK as usize - 5000, 2 * PIECE + 1] {
            let source = chunk(len);
            let mut base = source.clone();
            base[3] ^= 1;
            base[PIECE + 9] = 7;
            let last = len - 1;
            base[last] ^= 1;
            let mask = differing(&base, &hashes(&source));
            assert_eq!(mask, 0b11 | 1 << (last / PIECE), "length {len}");
            assert_eq!(mask & !all(len), 0);
            let bitmap = digest::scan(&source);
            let selected = select(&bitmap, mask);
            let mut body = source.clone();
            let data = digest::compact(&mut body, &bitmap);
            let sent = narrow(&mut body[..data], &bitmap, mask);
            assert_eq!(Some(sent), digest::data_len(&selected, len));
            assert!(sent <= 2 * PIECE, "zeros were sent");
            overlay(&mut base, mask, &bitmap, &body[..sent]);
            assert!(base == source, "length {len}");
        }
    }

    #[test]
    fn the_mask_of_all_blocks_ends_with_the_chunk() {
        assert_eq!(all(CHUNK as usize), 0xFFFF);
        assert_eq!(all(1), 1);
        assert_eq!(all(PIECE), 1);
        assert_eq!(all(PIECE + 1), 3);
    }

    #[test]
    fn a_base_of_another_length_differs_where_it_ends() {
        let source = chunk(CHUNK as usize);
        assert_eq!(differing(&source[..15 * PIECE], &hashes(&source)), 1 << 15);
        assert_eq!(differing(&[], &hashes(&source)), 0xFFFF);
    }

    #[test]
    fn a_base_that_has_nothing_is_not_asked_for_long() {
        let sharing = Sharing::default();
        assert!(!sharing.pays(0), "there is none");
        sharing.set(5000 * CHUNK);
        assert!(sharing.pays(0) && !sharing.pays(5000));
        (0..64).for_each(|_| sharing.learn(0xFFFF));
        assert!(sharing.pays(0));
        sharing.learn(0xFFFF);
        assert!(!sharing.pays(0));
        (0..9).for_each(|_| sharing.learn(1));
        assert!(sharing.pays(0), "some of it is there after all");
    }
}
