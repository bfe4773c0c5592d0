//! Blocks laid ahead of the writers of a dense file.
//!
//! ext4 lets one writer at a time into a file while blocks are missing where it
//! writes, and keeps the others out until its data is on the disk. Where blocks are
//! allocated already, all write at once. So while a volume turns out to have no holes
//! the next stretch of it is allocated in one step:
//!
//! ```text
//! written so far   ######## data   -> allocate the stretch that is written next
//!                  ##..##.. holes  -> nothing: sparse stays sparse
//! ```
//! Blocks that were laid and not written read as zero. A run of zeros that comes
//! later gives its blocks back (medium.rs); that every one comes is certain only in a
//! file that began blank, so nothing is laid in others. What stays is less than the
//! part that may be zero.

use std::ops::Range;

/// What is allocated in one step.
const STRETCH: u64 = 64 << 20;
/// Of what came last, so much is looked at.
const WINDOW: u64 = 32 << 20;
/// Of the window, at most one part in so many may be zero.
const ZERO_PART: u64 = 32;
/// Stretches that may be written at the same time: chunks come in any order, but not
/// from further apart.
const LAID: usize = 4;

/// What has been written lately, and where blocks were laid.
#[derive(Debug, Default)]
pub struct Runway {
    data: u64,
    zeros: u64,
    laid: [Option<u64>; LAID],
    next: usize,
}

impl Runway {
    /// Notes that data is about to be written; what to allocate before.
    pub fn before_data(&mut self, offset: u64, len: u64) -> Option<Range<u64>> {
        let stretch = offset / STRETCH;
        let wanted = self.is_dense() && !self.laid.contains(&Some(stretch));
        self.note(len, 0);
        if !wanted {
            return None;
        }
        self.laid[self.next] = Some(stretch);
        self.next = (self.next + 1) % LAID;
        Some(stretch * STRETCH..(stretch + 1) * STRETCH)
    }

    /// Notes a run of zeros.
    pub fn note_zeros(&mut self, len: u64) {
        self.note(0, len);
    }

    fn note(&mut self, data: u64, zeros: u64) {
        self.data += data.min(WINDOW);
        self.zeros += zeros.min(WINDOW);
        if self.data + self.zeros > 2 * WINDOW {
            self.data /= 2;
            self.zeros /= 2;
        }
    }

    fn is_dense(&self) -> bool {
        self.data >= WINDOW && self.zeros * ZERO_PART <= self.data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 1 << 20;

    fn write(runway: &mut Runway, chunks: Range<u64>) -> Vec<Range<u64>> {
        chunks
            .filter_map(|chunk| runway.before_data(chunk * CHUNK, CHUNK))
            .collect()
    }

    #[test]
    fn each_stretch_of_a_dense_volume_is_laid_once() {
        let laid = write(&mut Runway::default(), 0..192);
        let stretches = [0, 1, 2].map(|n| n * STRETCH..(n + 1) * STRETCH);
        assert_eq!(laid, stretches);
    }

    #[test]
    fn nothing_is_laid_where_a_part_is_zero() {
        let mut runway = Runway::default();
        for chunk in 0..256 {
            assert_eq!(runway.before_data(chunk * CHUNK, CHUNK * 9 / 10), None);
            runway.note_zeros(CHUNK / 10);
        }
    }

    #[test]
    fn a_long_hole_is_forgotten_after_a_while_of_data() {
        let mut runway = Runway::default();
        runway.note_zeros(1 << 40);
        assert_eq!(write(&mut runway, 0..64), []);
        assert_ne!(write(&mut runway, 64..640), []);
    }

    #[test]
    fn a_volume_of_nothing_lays_nothing() {
        let mut runway = Runway::default();
        runway.note_zeros(u64::MAX);
        runway.note_zeros(u64::MAX);
        assert_eq!(runway.before_data(0, CHUNK), None);
    }
}
