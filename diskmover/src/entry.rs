//! Segments as bytes: what STATE frames and journal records are made of.
//!
//! ```text
//! 0 CLOSED    segment u32 | data u32 | segment hash [32]
//! 1 PARTIAL   segment u32 | chunks u64 (a bit each) | for each: data u32, hash [32]
//! 2 ZERO RUN  segment u32 | count u32: all chunks of these segments are zero
//! ```

use crate::digest::{self, CHUNK, Hash, SEGMENT_CHUNKS, ZERO_HASH};
use crate::ledger::Ledger;

/// Most bytes of one entry.
pub const MAX_ENTRY: usize = 1 + 4 + 8 + 64 * 36;

/// Segments whose entries are made in one go.
pub const AT_ONCE: usize = 4096;

/// What is known of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// All chunks are done; their data bytes and hash.
    Closed(u32, u32, Hash),
    /// These chunks are done; data bytes and hash of each.
    Partial(u32, u64, Vec<(u32, Hash)>),
    /// All chunks of so many segments are zero.
    ZeroRun(u32, u32),
}

impl Entry {
    /// What the ledger knows of these done chunks of a segment.
    pub fn of(ledger: &Ledger, segment: usize, bits: u64) -> Option<Entry> {
        let number = segment as u32;
        if let Some((hash, data)) = ledger.closed(segment) {
            let zero = hash == ZERO_HASH;
            return Some(if zero {
                Entry::ZeroRun(number, 1)
            } else {
                Entry::Closed(number, data, hash)
            });
        }
        let bits = bits & ledger.done_bits(segment);
        let chunks = (0..64)
            .filter(|i| bits & (1 << i) != 0)
            .filter_map(|i| ledger.chunk(segment, i))
            .map(|(hash, data)| (data, hash))
            .collect();
        (bits != 0).then_some(Entry::Partial(number, bits, chunks))
    }

    /// Appends the bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Entry::Closed(segment, data, hash) => {
                out.push(0);
                out.extend(segment.to_le_bytes());
                out.extend(data.to_le_bytes());
                out.extend(hash);
            }
            Entry::Partial(segment, bits, chunks) => {
                out.push(1);
                out.extend(segment.to_le_bytes());
                out.extend(bits.to_le_bytes());
                for (data, hash) in chunks {
                    out.extend(data.to_le_bytes());
                    out.extend(hash);
                }
            }
            Entry::ZeroRun(segment, count) => {
                out.push(2);
                out.extend(segment.to_le_bytes());
                out.extend(count.to_le_bytes());
            }
        }
    }

    /// Takes one entry off the front; None when the bytes are not one.
    pub fn decode(bytes: &mut &[u8]) -> Option<Entry> {
        let [kind] = take(bytes)?;
        let segment = u32::from_le_bytes(take(bytes)?);
        match kind {
            0 => {
                let data = u32::from_le_bytes(take(bytes)?);
                Some(Entry::Closed(segment, data, take(bytes)?))
            }
            1 => {
                let bits = u64::from_le_bytes(take(bytes)?);
                let mut chunks = Vec::with_capacity(bits.count_ones() as usize);
                for _ in 0..bits.count_ones() {
                    chunks.push((u32::from_le_bytes(take(bytes)?), take(bytes)?));
                }
                Some(Entry::Partial(segment, bits, chunks))
            }
            2 => Some(Entry::ZeroRun(segment, u32::from_le_bytes(take(bytes)?))),
            _ => None,
        }
    }

    /// Whether a ledger that is to hold at most so many chunks has room for it.
    pub fn has_room(&self, ledger: &Ledger, most: usize) -> bool {
        let Entry::Partial(segment, bits, chunks) = self else {
            return true;
        };
        let known = match *segment as usize {
            segment if segment < ledger.segments() => ledger.known_bits(segment),
            _ => return true, // not of this volume: it will not apply
        };
        let set = (0..64u64).filter(|i| bits & (1 << i) != 0);
        let is_new =
            |(i, (_, hash)): &(u64, &(u32, Hash))| known & (1 << i) == 0 && *hash != ZERO_HASH;
        let more = set.zip(chunks).filter(is_new).count();
        more == 0 || ledger.held() + more <= most
    }

    /// Applies it to a ledger; None when it cannot be true of this volume, or has no
    /// room there.
    pub fn apply(&self, ledger: &mut Ledger) -> Option<()> {
        match self {
            Entry::Closed(segment, data, hash) => {
                let segment = *segment as usize;
                if segment >= ledger.segments() {
                    return None;
                }
                let start = segment as u64 * SEGMENT_CHUNKS * CHUNK;
                if u64::from(*data) > (ledger.size() - start).min(SEGMENT_CHUNKS * CHUNK) {
                    return None;
                }
                ledger.adopt_closed(segment, *hash, *data);
                Some(())
            }
            Entry::Partial(segment, bits, chunks) => {
                let segment = *segment as usize;
                if segment >= ledger.segments() || bits & !ledger.full_mask(segment) != 0 {
                    return None;
                }
                let first = segment as u64 * digest::SEGMENT_CHUNKS;
                let set = (0..64u64).filter(|i| bits & (1 << i) != 0);
                let set: Vec<u64> = set.map(|index| first + index).collect();
                for (chunk, (data, hash)) in set.iter().copied().zip(chunks) {
                    if *data as usize > digest::chunk_len(ledger.size(), chunk) {
                        return None;
                    }
                    ledger.offer(chunk, *hash, *data).ok()?;
                }
                // Only now: an entry is true as a whole or not at all.
                set.into_iter().for_each(|chunk| {
                    ledger.confirm(chunk);
                });
                ledger.close_if_full(segment);
                Some(())
            }
            Entry::ZeroRun(segment, count) => {
                let end = (*segment as usize).checked_add(*count as usize)?;
                if end > ledger.segments() {
                    return None;
                }
                let first = u64::from(*segment) * digest::SEGMENT_CHUNKS;
                let last =
                    (end as u64 * digest::SEGMENT_CHUNKS).min(digest::chunk_count(ledger.size()));
                ledger.confirm_zeros(first, last).ok()?;
                (*segment as usize..end).for_each(|segment| ledger.close_if_full(segment));
                Some(())
            }
        }
    }
}

/// Entries of the done chunks among `segments`, zero runs merged.
pub fn collect(ledger: &Ledger, segments: impl Iterator<Item = (usize, u64)>) -> Vec<Entry> {
    let mut all: Vec<Entry> = Vec::new();
    for (segment, bits) in segments {
        match (all.last_mut(), Entry::of(ledger, segment, bits)) {
            (Some(Entry::ZeroRun(first, count)), Some(Entry::ZeroRun(next, 1)))
                if *first + *count == next =>
            {
                *count += 1;
            }
            (_, Some(entry)) => all.push(entry),
            (_, None) => {}
        }
    }
    all
}

/// Entries of all done chunks, made as they are asked for.
pub fn all(ledger: &Ledger) -> impl Iterator<Item = Entry> {
    let segments = ledger.segments();
    (0..segments).step_by(AT_ONCE).flat_map(move |first| {
        let some = first..(first + AT_ONCE).min(segments);
        collect(ledger, some.map(|segment| (segment, u64::MAX)))
    })
}

/// Takes an array off the front of a slice.
pub fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::CHUNK;

    fn ledger() -> Ledger {
        let mut ledger = Ledger::new(300 * CHUNK);
        ledger.confirm_zeros(64, 192).unwrap();
        for chunk in [0, 5, 63, 200] {
            ledger.offer(chunk, [chunk as u8 + 1; 32], 4096).unwrap();
            ledger.confirm(chunk);
        }
        ledger
    }

    fn entries(ledger: &Ledger) -> Vec<Entry> {
        collect(ledger, (0..ledger.segments()).map(|s| (s, u64::MAX)))
    }

    #[test]
    fn entries_carry_a_ledger() {
        let entries = entries(&ledger());
        assert_eq!(
            entries.len(),
            3,
            "zero segments were not merged: {entries:?}"
        );
        let mut bytes = Vec::new();
        entries.iter().for_each(|entry| entry.encode(&mut bytes));
        let mut copy = Ledger::new(300 * CHUNK);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            Entry::decode(&mut rest).unwrap().apply(&mut copy).unwrap();
        }
        assert_eq!(copy.done_bytes(), ledger().done_bytes());
        assert_eq!(self::entries(&copy), entries);
    }

    #[test]
    fn truncated_entries_are_refused() {
        for entry in entries(&ledger()) {
            let mut bytes = Vec::new();
            entry.encode(&mut bytes);
            assert!(bytes.len() <= MAX_ENTRY);
            for len in 0..bytes.len() {
                assert_eq!(Entry::decode(&mut &bytes[..len]), None);
            }
        }
    }

    #[test]
    fn entries_outside_the_volume_are_refused() {
        let mut ledger = ledger();
        for bad in [
            Entry::Closed(5, 1, [1; 32]),
            Entry::Closed(0, (64 << 20) + 1, [1; 32]),
            Entry::Closed(4, 64 << 20, [1; 32]), // the last one is shorter
            Entry::ZeroRun(4, 2),
            Entry::ZeroRun(u32::MAX, u32::MAX),
            Entry::Partial(4, 1 << 44, vec![(1, [1; 32])]),
            Entry::Partial(0, 2, vec![(CHUNK as u32 + 1, [1; 32])]),
        ] {
            assert_eq!(bad.apply(&mut ledger), None, "{bad:?}");
        }
    }
}
