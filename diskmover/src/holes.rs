//! Whether holes are holes: a sample of what a map let a copy skip is read.
//!
//! File systems have reported holes over data that was not flushed yet, and over
//! data that was being cloned. A copy that believes them publishes zeros, with a
//! digest that agrees. So before it ends, chunks all over the volume are read in
//! full, and what the map let it skip has to be zero: 1 % of it, at most 1 GiB.

use std::ops::Range;

use crate::digest::{self, CHUNK};
use crate::error::{MoverError, Result};
use crate::plan::Plan;
use crate::source::Source;
use crate::sys::{ALIGN, AlignedBuf};

/// Chunks that are looked at in any case. Up to this size all of a volume is.
const LEAST: u64 = 256;
/// Chunks without data that are looked at, at most: 1 GiB.
const MOST: u64 = 1024;

/// The first byte found not to be zero in a place that was taken for zeros: by the
/// map as it is now, or by the copy, as `is_zero` tells of each chunk; it took
/// `hollow` bytes for that. `seed` chooses the chunks of large volumes. None when
/// there is none, or `stopping`.
pub fn filled(
    source: &dyn Source,
    is_zero: impl Fn(u64) -> bool,
    hollow: u64,
    seed: u64,
    stopping: impl Fn() -> bool,
) -> Result<Option<u64>> {
    let size = source.identity().size;
    let no_memory = || MoverError::no_memory(CHUNK as usize);
    let mut buffer = AlignedBuf::new(CHUNK as usize).ok_or_else(no_memory)?;
    let mut plan = Plan::new(source.extents(true)?, size);
    let count = digest::chunk_count(size);
    for chunk in spread(count, samples(count, hollow / CHUNK), seed) {
        if stopping() {
            return Ok(None);
        }
        let base = chunk * CHUNK;
        let len = digest::chunk_len(size, chunk);
        let whole = base..base + len as u64;
        let unmapped = |e| MoverError::source_io("cannot map the source", &e);
        let read = match is_zero(chunk) {
            true => Vec::new(),
            false => plan.ranges(chunk).map_err(unmapped)?,
        };
        if read == [whole.clone()] {
            continue;
        }
        let room = &mut buffer[..len.next_multiple_of(ALIGN)];
        source.read_chunk(chunk, &[whole], room)?;
        if let Some(at) = outside(&read, base, &buffer[..len]) {
            return Ok(Some(base + at as u64));
        }
    }
    Ok(None)
}

/// The first byte outside of `read` that is not zero.
fn outside(read: &[Range<u64>], base: u64, content: &[u8]) -> Option<usize> {
    let mut from = 0;
    let ends = read
        .iter()
        .map(|range| (range.start - base) as usize..(range.end - base) as usize)
        .chain([content.len()..content.len()]);
    for range in ends {
        let skipped = &content[from..range.start.max(from)];
        if !digest::is_zero(skipped) {
            return skipped.iter().position(|b| *b != 0).map(|at| from + at);
        }
        from = range.end;
    }
    None
}

/// How many of `count` chunks to look at, of which `hollow` have no data.
fn samples(count: u64, hollow: u64) -> u64 {
    let most = count * MOST / hollow.max(1);
    (count / 100).min(most).max(LEAST).min(count)
}

/// `parts` of `count` chunks, in order, one in each of as many equal parts.
fn spread(count: u64, parts: u64, seed: u64) -> impl Iterator<Item = u64> {
    (0..parts).map(move |part| {
        let start = part * count / parts;
        let len = (part + 1) * count / parts - start;
        let mixed = (seed ^ part).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        start + mixed % len
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_a_small_volume_is_looked_at() {
        for count in [0, 1, 5, LEAST] {
            assert!(spread(count, samples(count, count), 7).eq(0..count));
        }
    }

    #[test]
    fn no_part_of_a_large_volume_is_left_out() {
        let count = 10 * LEAST + 3;
        let chosen: Vec<_> = spread(count, LEAST, 7).collect();
        assert_eq!(chosen.len() as u64, LEAST);
        for (part, chunk) in chosen.iter().enumerate() {
            assert!((part as u64 * 10..=part as u64 * 10 + 13).contains(chunk));
        }
        assert!(!spread(count, LEAST, 8).eq(chosen), "always the same ones");
    }

    #[test]
    fn a_hundredth_of_the_holes_is_looked_at_or_a_gibibyte() {
        let tib = 1 << 20;
        assert_eq!(samples(1000, 1000), LEAST);
        assert_eq!(samples(50_000, 50_000), 500);
        assert_eq!(samples(tib, tib), MOST);
        // Half of those that are looked at have no data.
        assert_eq!(samples(2 * tib, tib), 2 * MOST);
        // Little of it is hollow: a hundredth of all has a hundredth of that.
        assert_eq!(samples(64 * tib, tib / 64), 64 * tib / 100);
        assert_eq!(samples(64 * tib, 0), 64 * tib / 100);
    }

    #[test]
    fn every_byte_that_was_skipped_counts() {
        let base = 5 * CHUNK;
        let read = [base + 3..base + 5, base + 7..base + 8];
        for at in 0..10 {
            let mut content = [0; 10];
            content[at] = 1;
            let is_read = [3, 4, 7].contains(&at);
            let found = outside(&read, base, &content);
            assert_eq!(found, (!is_read).then_some(at));
        }
    }
}
