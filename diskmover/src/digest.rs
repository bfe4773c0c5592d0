//! Content: 4 KiB zero blocks, chunk hashes, segment hashes and the root digest.
//!
//! ```text
//! root = BLAKE3("diskmover root 1\n" | size u64 | chunk size u32 | S_0 | S_1 ...)
//! S_j  = 32 zero bytes when all chunks of the segment are zero, else
//!        BLAKE3(H_64j | ... | H_64j+63)          (fewer in the last segment)
//! H_i  = 32 zero bytes when the chunk is all zero, else
//!        BLAKE3(bitmap | the blocks that are not all zero, in order)
//! ```
//! The bitmap has 256 bits, bit b (byte b/8, mask 1 << b%8) for block b of the
//! chunk; it is set where the block has a byte that is not zero. So zeros cost
//! nothing to hash, and the digest still follows from the content alone.

use std::iter::successors;
use std::ops::Range;

/// Bytes of a chunk: the unit of transfer and of hashing.
pub const CHUNK: u64 = 1 << 20;
/// Bytes of a block: the unit of zero detection.
pub const BLOCK: usize = 4096;
/// Chunks of a segment: the unit of the journal.
pub const SEGMENT_CHUNKS: u64 = 64;
/// Most bytes of a volume (64 TiB): bounds what an announced size can cost.
pub const MAX_SIZE: u64 = 1 << 46;

/// A BLAKE3 hash; all zero stands for "all zero content".
pub type Hash = [u8; 32];
/// One bit for each block of a chunk.
pub type Bitmap = [u8; 32];
/// Hash of content that is all zero.
pub const ZERO_HASH: Hash = [0; 32];

/// Bytes that are hashed together: they stay in the cache of a core.
const STRIDE: usize = 64 << 10;

const ROOT_CONTEXT: &[u8] = b"diskmover root 1\n";

/// Number of chunks of a volume.
pub fn chunk_count(size: u64) -> u64 {
    size.div_ceil(CHUNK)
}

/// Number of segments of a volume.
pub fn segment_count(size: u64) -> u64 {
    chunk_count(size).div_ceil(SEGMENT_CHUNKS)
}

/// Bytes of one chunk; the last one can be shorter.
pub fn chunk_len(size: u64, chunk: u64) -> usize {
    size.saturating_sub(chunk * CHUNK).min(CHUNK) as usize
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut wide = bytes.chunks_exact(64);
    wide.by_ref()
        .all(|piece| piece.iter().fold(0, |all, b| all | b) == 0)
        && wide.remainder().iter().all(|b| *b == 0)
}

/// Marks the blocks that are not all zero.
pub fn scan(chunk: &[u8]) -> Bitmap {
    scan_marked(chunk, &[0xFF; 32])
}

/// Marks the blocks that are not all zero among those of `marked`; the others
/// are not looked at.
pub fn scan_marked(chunk: &[u8], marked: &Bitmap) -> Bitmap {
    let mut bitmap = [0; 32];
    for (index, block) in chunk.chunks(BLOCK).enumerate() {
        if is_set(marked, index) && !is_zero(block) {
            mark(&mut bitmap, index..index + 1);
        }
    }
    bitmap
}

/// Makes all blocks zero but those of `marked`.
pub fn blank(chunk: &mut [u8], marked: &Bitmap) {
    for (index, block) in chunk.chunks_mut(BLOCK).enumerate() {
        if !is_set(marked, index) {
            block.fill(0);
        }
    }
}

/// Marks a range of blocks.
pub fn mark(bitmap: &mut Bitmap, blocks: Range<usize>) {
    for index in blocks {
        bitmap[index / 8] |= 1 << (index % 8);
    }
}

/// Whether block `index` is marked.
pub fn is_set(bitmap: &Bitmap, index: usize) -> bool {
    bitmap[index / 8] & (1 << (index % 8)) != 0
}

/// Runs of marked blocks as byte ranges (start, length) within the chunk.
pub fn runs(bitmap: &Bitmap, chunk_len: usize) -> Vec<(usize, usize)> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    for index in (0..chunk_len.div_ceil(BLOCK)).filter(|i| is_set(bitmap, *i)) {
        let start = index * BLOCK;
        let len = BLOCK.min(chunk_len - start);
        match found.last_mut() {
            Some((run, run_len)) if *run + *run_len == start => *run_len += len,
            _ => found.push((start, len)),
        }
    }
    found
}

/// Bytes in marked blocks; None when a block outside the chunk is marked.
pub fn data_len(bitmap: &Bitmap, chunk_len: usize) -> Option<usize> {
    let blocks = chunk_len.div_ceil(BLOCK);
    if (blocks..256).any(|index| is_set(bitmap, index)) {
        return None;
    }
    Some(runs(bitmap, chunk_len).iter().map(|(_, len)| len).sum())
}

/// Moves the marked blocks to the front; returns how many bytes they are.
pub fn compact(chunk: &mut [u8], bitmap: &Bitmap) -> usize {
    let mut to = 0;
    for (start, len) in runs(bitmap, chunk.len()) {
        chunk.copy_within(start..start + len, to);
        to += len;
    }
    to
}

/// Hash of a chunk from its bitmap and its marked blocks.
pub fn chunk_hash(bitmap: &Bitmap, data: &[u8]) -> Hash {
    if data.is_empty() {
        return ZERO_HASH;
    }
    let mut hasher = ChunkHasher::new(bitmap);
    hasher.update(data);
    hasher.finish()
}

/// Hashes a chunk that is not all zero while its marked blocks come.
pub struct ChunkHasher(blake3::Hasher);

impl ChunkHasher {
    /// Begins with the bitmap.
    pub fn new(bitmap: &Bitmap) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(bitmap);
        ChunkHasher(hasher)
    }

    /// Takes the next bytes of the marked blocks.
    pub fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    /// The hash of the chunk.
    pub fn finish(self) -> Hash {
        *self.0.finalize().as_bytes()
    }
}

/// The pieces in which `len` bytes of marked blocks are hashed fastest, as they come: with
/// the bitmap before them each but the last ends where a subtree of BLAKE3 does, which keeps
/// all lanes of the processor busy.
pub fn strides(len: usize) -> impl Iterator<Item = Range<usize>> {
    let first = 0..len.min(STRIDE - size_of::<Bitmap>());
    successors(Some(first), move |last| {
        (last.end < len).then(|| last.end..len.min(last.end + STRIDE))
    })
}

/// Hash of a segment from the hashes of its chunks.
pub fn segment_hash(chunks: &[Hash]) -> Hash {
    if chunks.iter().all(|hash| *hash == ZERO_HASH) {
        return ZERO_HASH;
    }
    *blake3::hash(chunks.as_flattened()).as_bytes()
}

/// Root digest of a volume from the hashes of its segments.
pub fn root<'a>(size: u64, segments: impl Iterator<Item = &'a Hash>) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(ROOT_CONTEXT);
    hasher.update(&size.to_le_bytes());
    hasher.update(&(CHUNK as u32).to_le_bytes());
    for segment in segments {
        hasher.update(segment);
    }
    *hasher.finalize().as_bytes()
}

/// A hash from 64 hexadecimal digits.
pub fn parse_hex(text: &str) -> Option<Hash> {
    let mut hash = [0; 32];
    if text.len() != 64 || !text.bytes().all(|c| c.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(hash)
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_scan_sees_every_single_byte() {
        let mut block = vec![0u8; BLOCK + 77];
        assert!(is_zero(&block));
        for at in (0..block.len())
            .step_by(13)
            .chain([0, 63, 64, BLOCK, BLOCK + 76])
        {
            block[at] = 1;
            assert!(!is_zero(&block), "byte {at}");
            block[at] = 0;
        }
    }

    #[test]
    fn scan_and_compact_keep_the_marked_blocks_in_order() {
        let mut chunk = vec![0u8; BLOCK * 5 + 100];
        chunk[BLOCK] = 1;
        chunk[BLOCK * 2 + 5] = 2;
        chunk[BLOCK * 5 + 99] = 3;
        let bitmap = scan(&chunk);
        assert_eq!(bitmap[0], 0b10_0110);
        assert_eq!(
            runs(&bitmap, chunk.len()),
            [(BLOCK, BLOCK * 2), (BLOCK * 5, 100)]
        );
        assert_eq!(data_len(&bitmap, chunk.len()), Some(BLOCK * 2 + 100));
        let mut some = [0; 32];
        mark(&mut some, 0..2);
        assert_eq!(scan_marked(&chunk, &some)[0], 0b00_0010);
        let mut only = chunk.clone();
        blank(&mut only, &some);
        assert_eq!(scan(&only), scan_marked(&chunk, &some));
        assert_eq!(compact(&mut chunk, &bitmap), BLOCK * 2 + 100);
        assert_eq!(
            (chunk[0], chunk[BLOCK + 5], chunk[BLOCK * 2 + 99]),
            (1, 2, 3)
        );
    }

    #[test]
    fn a_chunk_has_the_same_hash_as_it_comes_and_when_it_is_there() {
        let chunk: Vec<u8> = (0..CHUNK).map(|at| ((at * at) >> 7) as u8).collect();
        for len in [1, 4096, STRIDE - 32, STRIDE - 31, STRIDE, CHUNK as usize] {
            let data = &chunk[..len];
            let mut hasher = ChunkHasher::new(&[7; 32]);
            let mut end = 0;
            for stride in strides(len) {
                assert_eq!(stride.start, end, "each byte once, in order");
                assert!(stride.end == len || (stride.end + 32).is_multiple_of(STRIDE));
                end = stride.end;
                hasher.update(&data[stride]);
            }
            assert_eq!(end, len);
            assert_eq!(hasher.finish(), chunk_hash(&[7; 32], data));
        }
    }

    #[test]
    fn blocks_beyond_the_chunk_are_refused() {
        let mut bitmap = [0; 32];
        bitmap[31] = 0x80;
        assert_eq!(data_len(&bitmap, CHUNK as usize), Some(BLOCK));
        assert_eq!(data_len(&bitmap, CHUNK as usize - BLOCK), None);
    }

    #[test]
    fn sizes_at_the_edges() {
        assert_eq!((chunk_count(0), segment_count(0)), (0, 0));
        assert_eq!((chunk_count(1), chunk_len(1, 0)), (1, 1));
        assert_eq!(chunk_count(CHUNK + 1), 2);
        assert_eq!(chunk_len(CHUNK + 1, 1), 1);
        assert_eq!(segment_count(MAX_SIZE), 1 << 20);
    }
}
