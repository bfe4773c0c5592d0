//! Reads back what a ledger says stands on a medium.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::digest::{self, Bitmap, CHUNK, Hash, SEGMENT_CHUNKS, ZERO_HASH};
use crate::guard;
use crate::ledger::Ledger;
use crate::medium::Medium;
use crate::pool::lock;
use crate::sys::AlignedBuf;

/// What the chunks of a segment should be.
pub struct Expected {
    segment: usize,
    chunks: u64,
    bits: u64,
    content: Content,
    size: u64,
}

enum Content {
    /// Hash of the whole segment.
    Segment(Hash),
    /// Hashes of the chunks that are done.
    Chunks(Box<[Hash; 64]>),
}

impl Expected {
    /// What the ledger says of a segment; None when nothing of it is done.
    pub fn of(ledger: &Ledger, segment: usize) -> Option<Expected> {
        let bits = ledger.done_bits(segment);
        let content = match ledger.closed(segment) {
            Some((hash, _)) => Content::Segment(hash),
            None => Content::Chunks(Box::new(std::array::from_fn(|index| {
                let known = ledger.chunk(segment, index);
                known.map_or(ZERO_HASH, |(hash, _)| hash)
            }))),
        };
        (bits != 0).then_some(Expected {
            segment,
            chunks: ledger.full_mask(segment).count_ones().into(),
            bits,
            content,
            size: ledger.size(),
        })
    }

    /// Whether the medium holds it. `buffer` has room for a chunk.
    pub fn holds(&self, medium: &Medium, buffer: &mut [u8]) -> io::Result<bool> {
        let start = self.segment as u64 * SEGMENT_CHUNKS * CHUNK;
        let len = (self.chunks * CHUNK).min(self.size - start);
        if matches!(self.content, Content::Segment(ZERO_HASH)) && medium.is_hole(start, len) {
            return Ok(true);
        }
        let mut found = [ZERO_HASH; 64];
        for index in (0..self.chunks).filter(|i| self.bits & (1 << i) != 0) {
            let chunk = self.segment as u64 * SEGMENT_CHUNKS + index;
            found[index as usize] = look_at(medium, self.size, chunk, buffer)?.0;
        }
        Ok(match &self.content {
            Content::Segment(hash) => digest::segment_hash(&found[..self.chunks as usize]) == *hash,
            Content::Chunks(hashes) => {
                (0..64).all(|i| self.bits & (1 << i) == 0 || found[i] == hashes[i])
            }
        })
    }
}

/// Those of these segments that do not hold what they should, or cannot be read; in
/// parallel. What one should hold is asked when it is its turn. `go_on` is asked now
/// and then; None when it denied.
pub fn failing(
    medium: &Medium,
    segments: &[usize],
    expected: &(dyn Fn(usize) -> Option<Expected> + Sync),
    go_on: &(dyn Fn() -> bool + Sync),
) -> Option<Vec<usize>> {
    let bad = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let stopped = Mutex::new(false);
    let work = || {
        let Some(mut buffer) = AlignedBuf::new(CHUNK as usize) else {
            *lock(&stopped) = true;
            return;
        };
        while let Some(segment) = segments.get(next.fetch_add(1, Ordering::Relaxed)) {
            let Some(one) = expected(*segment) else {
                continue;
            };
            if !go_on() {
                *lock(&stopped) = true;
                return;
            }
            if !one.holds(medium, &mut buffer).unwrap_or(false) {
                lock(&bad).push(one.segment);
            }
        }
    };
    guard::together(work);
    let stopped = *lock(&stopped);
    let mut bad = std::mem::take(&mut *lock(&bad));
    bad.sort_unstable();
    (!stopped).then_some(bad)
}

/// Hash, marked blocks and data bytes of a chunk as it stands on the medium.
pub fn look_at(
    medium: &Medium,
    size: u64,
    chunk: u64,
    buffer: &mut [u8],
) -> io::Result<(Hash, Bitmap, usize)> {
    let len = digest::chunk_len(size, chunk);
    if medium.is_hole(chunk * CHUNK, len as u64) {
        return Ok((ZERO_HASH, Bitmap::default(), 0));
    }
    medium.read(chunk * CHUNK, len, buffer)?;
    let bitmap = digest::scan(&buffer[..len]);
    let data = digest::compact(&mut buffer[..len], &bitmap);
    Ok((digest::chunk_hash(&bitmap, &buffer[..data]), bitmap, data))
}
