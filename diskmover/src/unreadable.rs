//! The ranges of a volume that its source could not give. Zeros stand there, and a
//! copy that has any is DEGRADED: it says so wherever it says anything.

use std::ops::Range;

use crate::entry::take;

/// Most ranges of a volume.
pub const MOST_RANGES: usize = 1024;
/// Most bytes of a volume: a disk that has lost more is not copied, but rescued.
pub const MOST_BYTES: u64 = 64 << 20;
/// Bytes of a range on the wire.
const ENCODED: usize = 16;
/// Most bytes of all of them on the wire.
pub const MAX_ENCODED: u32 = (ENCODED * MOST_RANGES) as u32;

/// Ranges in bytes of the volume: in order, apart, not touching.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unreadable(Vec<Range<u64>>);

impl Unreadable {
    /// Whether all could be read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.0
    }

    /// Bytes of all ranges.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|range| range.end - range.start).sum()
    }

    /// Adds a range, joined with what it meets; false when it is one too many.
    pub fn add(&mut self, new: Range<u64>) -> bool {
        let first = self.0.partition_point(|one| one.end < new.start);
        let end = self.0.partition_point(|one| one.start <= new.end);
        let mut joined = new;
        if let [low, ..] = &self.0[first..end] {
            joined.start = joined.start.min(low.start);
        }
        if let [.., high] = &self.0[first..end] {
            joined.end = joined.end.max(high.end);
        }
        self.0.splice(first..end, [joined]);
        self.0.len() <= MOST_RANGES && self.bytes() <= MOST_BYTES
    }

    /// As bytes: offset u64 and length u64 of each.
    pub fn encode(&self) -> Vec<u8> {
        let words = |range: &Range<u64>| [range.start, range.end - range.start];
        self.0
            .iter()
            .flat_map(words)
            .flat_map(u64::to_le_bytes)
            .collect()
    }

    /// From bytes that are all that is left of a payload, about a volume of `size`.
    pub fn decode(mut bytes: &[u8], size: u64) -> Option<Unreadable> {
        let bytes = &mut bytes;
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let mut word = || take(bytes).map(u64::from_le_bytes);
            let (offset, len) = (word()?, word()?);
            found.push(offset..offset.checked_add(len)?);
        }
        Unreadable::of(found, size)
    }

    /// Takes ranges for what they should be; None when they are not, in a volume of
    /// `size`.
    pub fn of(ranges: Vec<Range<u64>>, size: u64) -> Option<Unreadable> {
        let apart = ranges.windows(2).all(|two| two[0].end < two[1].start);
        let within = ranges.iter().all(|one| !one.is_empty() && one.end <= size);
        (apart && within && ranges.len() <= MOST_RANGES).then_some(Unreadable(ranges))
    }

    /// In words: how much, and where it begins.
    pub fn shown(&self) -> String {
        let bytes = self.bytes();
        let first = self.0.first().map_or(0, |range| range.start);
        match self.0.len() {
            1 => format!("{bytes} bytes from byte {first} on"),
            count => format!("{bytes} bytes in {count} places, the first at byte {first},"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn added(ranges: &[Range<u64>]) -> Unreadable {
        let mut all = Unreadable::default();
        assert!(ranges.iter().all(|range| all.add(range.clone())));
        all
    }

    #[test]
    fn ranges_that_meet_become_one() {
        assert_eq!(added(&[4..6, 0..2]).ranges(), [0..2, 4..6]);
        assert_eq!(added(&[4..6, 0..2, 2..4]).ranges(), [0..6]);
        assert_eq!(added(&[4..6, 5..9, 4..6]).ranges(), [4..9]);
        assert_eq!(added(&[1..2, 3..4, 5..6, 0..9]).ranges(), [0..9]);
        assert_eq!(added(&[0..9, 3..4]).ranges(), [0..9]);
        assert_eq!(added(&[4..6, 9..10]).bytes(), 3);
    }

    #[test]
    fn there_is_an_end_to_them() {
        let mut all = Unreadable::default();
        for number in 0..MOST_RANGES as u64 {
            assert!(all.add(number * 10..number * 10 + 1));
        }
        assert!(!all.clone().add(99_999..100_000));
        assert!(all.add(1..10), "fewer, now that two are one");
        assert!(!added(&[0..MOST_BYTES]).add(MOST_BYTES..MOST_BYTES + 1));
    }

    #[test]
    fn they_survive_the_wire_and_nonsense_does_not() {
        let good = added(&[512..1024, 4096..8192]);
        let bytes = good.encode();
        assert_eq!(Unreadable::decode(&bytes, 8192), Some(good));
        assert_eq!(Unreadable::decode(&bytes, 8191), None, "beyond the end");
        assert_eq!(Unreadable::decode(&[], 0), Some(Unreadable::default()));
        for len in (1..bytes.len()).filter(|len| len % ENCODED != 0) {
            assert_eq!(
                Unreadable::decode(&bytes[..len], 8192),
                None,
                "cut at {len}"
            );
        }
        for (what, words) in [
            ("empty", vec![5, 0]),
            ("wraps around", vec![5, u64::MAX]),
            ("out of order", vec![9, 1, 5, 1]),
            ("touching", vec![5, 1, 6, 1]),
        ] {
            let bytes: Vec<u8> = words
                .iter()
                .flat_map(|word: &u64| word.to_le_bytes())
                .collect();
            assert_eq!(Unreadable::decode(&bytes, 100), None, "{what}");
        }
        let many = (0..=MOST_RANGES as u64).map(|n| n * 2..n * 2 + 1).collect();
        assert_eq!(Unreadable::of(many, 1 << 20), None);
    }
}
