//! Blocks laid ahead of the writers of a new file.
//!
//! ext4 lets one writer at a time into a file while blocks are missing where it
//! writes, and keeps the others out until its data is on the disk. Where blocks are
//! allocated already, all write at once. So they are allocated before, as far as is
//! known what comes:
//!
//! ```text
//! written so far   ######## data   -> the stretch that is written next, in one step
//!                  ##..##.. holes  -> what has arrived and waits for a writer, no more:
//!                                     sparse stays sparse
//! ```
//! Allocating waits for those who write at that moment, so it is done for all that
//! wait together, by the first of them that gets to write.
//!
//! Blocks that were laid and not written read as zero. A run of zeros that comes
//! later gives those of a stretch back (medium.rs); that every one comes is certain
//! only in a file that began blank, so nothing is laid in others. What stays is less
//! than the part that may be zero.

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
/// Most pieces that are noted before they are written: those of all chunks that can
/// wait for a writer, unless their data is in crumbs.
const EXPECTED: usize = 256;

/// What to allocate before a piece of data is written.
#[derive(Debug, PartialEq, Eq)]
pub enum Lay {
    /// Somebody did so already.
    Nothing,
    /// A stretch that may turn out not to be needed, or to end behind the file.
    Stretch(Range<u64>),
    /// Just what has arrived.
    Arrived(Vec<Range<u64>>),
}

/// What has been written lately, and where blocks were laid.
#[derive(Debug, Default)]
pub struct Runway {
    data: u64,
    zeros: u64,
    laid: [Option<u64>; LAID],
    next: usize,
    /// What waits for a writer and may have no blocks yet.
    arrived: Vec<Range<u64>>,
}

impl Runway {
    /// Notes a piece of data that has arrived and will be written.
    pub fn expect(&mut self, piece: Range<u64>) {
        if self.arrived.len() < EXPECTED {
            self.arrived.push(piece);
        }
    }

    /// Notes that a piece of data is about to be written; what to allocate before.
    pub fn before_data(&mut self, piece: Range<u64>) -> Lay {
        let (stretch, is_dense) = (piece.start / STRETCH, self.is_dense());
        self.note(piece.end - piece.start, 0);
        let waiting = self.arrived.len();
        self.arrived.retain(|other| *other != piece);
        if self.is_laid(&piece) {
            return Lay::Nothing;
        }
        if is_dense {
            self.laid[self.next] = Some(stretch);
            self.next = (self.next + 1) % LAID;
            return Lay::Stretch(stretch * STRETCH..(stretch + 1) * STRETCH);
        }
        if self.arrived.len() == waiting {
            return Lay::Nothing;
        }
        let mut together = std::mem::take(&mut self.arrived);
        together.retain(|other| !self.is_laid(other));
        together.push(piece);
        Lay::Arrived(together)
    }

    fn is_laid(&self, piece: &Range<u64>) -> bool {
        self.laid.contains(&Some(piece.start / STRETCH))
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

    /// A piece of a chunk.
    fn piece(chunk: u64, len: u64) -> Range<u64> {
        chunk * CHUNK..chunk * CHUNK + len
    }

    /// The stretches that are laid for whole chunks of data.
    fn write(runway: &mut Runway, chunks: Range<u64>) -> Vec<Range<u64>> {
        chunks
            .filter_map(|chunk| match runway.before_data(piece(chunk, CHUNK)) {
                Lay::Stretch(stretch) => Some(stretch),
                Lay::Nothing => None,
                Lay::Arrived(_) => panic!("nothing has arrived"),
            })
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
            let data = piece(chunk, CHUNK * 9 / 10);
            assert_eq!(runway.before_data(data), Lay::Nothing);
            runway.note_zeros(CHUNK / 10);
        }
    }

    #[test]
    fn what_waits_is_laid_together_and_once() {
        let mut runway = Runway::default();
        let pieces = [2, 5, 9].map(|chunk| piece(chunk, CHUNK / 10));
        pieces.iter().cloned().for_each(|one| runway.expect(one));
        let [first, second, third] = pieces;
        let together = vec![first.clone(), third.clone(), second.clone()];
        assert_eq!(runway.before_data(second), Lay::Arrived(together));
        assert_eq!(runway.before_data(first), Lay::Nothing);
        assert_eq!(runway.before_data(third), Lay::Nothing);
    }

    #[test]
    fn what_lies_in_a_laid_stretch_is_not_laid_again() {
        let mut runway = Runway::default();
        runway.expect(piece(40, CHUNK));
        assert_eq!(write(&mut runway, 0..33), [0..STRETCH]);
        assert_eq!(runway.before_data(piece(40, CHUNK)), Lay::Nothing);
        runway.note_zeros(WINDOW);
        runway.expect(piece(50, CHUNK));
        runway.expect(piece(70, CHUNK));
        let laid = runway.before_data(piece(70, CHUNK));
        assert_eq!(laid, Lay::Arrived(vec![piece(70, CHUNK)]));
    }

    #[test]
    fn what_arrives_and_is_never_written_takes_a_bounded_place() {
        let mut runway = Runway::default();
        (0..1 << 20).for_each(|chunk| runway.expect(piece(chunk, CHUNK)));
        assert_eq!(runway.arrived.len(), EXPECTED);
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
        assert_eq!(runway.before_data(piece(0, CHUNK)), Lay::Nothing);
    }
}
