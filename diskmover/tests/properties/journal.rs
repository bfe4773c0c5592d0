//! A journal gives back what was noted, or a beginning of it; never anything else.

use diskmover::beneath::Names;
use diskmover::budget::Budget;
use diskmover::digest::{CHUNK, SEGMENT_CHUNKS};
use diskmover::entry::Entry;
use diskmover::journal::{Found, Journal, Subject};
use diskmover::ledger::Ledger;
use proptest::prelude::*;

use crate::sample;

const SEGMENTS: u32 = 5;
const SIZE: u64 = SEGMENTS as u64 * SEGMENT_CHUNKS * CHUNK;

#[derive(Clone, Debug)]
enum Note {
    Chunks(u32, u64),
    Zeros(u32, u32),
    Forget(u32),
}

fn notes() -> impl Strategy<Value = Vec<Note>> {
    let note = prop_oneof![
        4 => (0..SEGMENTS, any::<u64>()).prop_map(|(segment, bits)| Note::Chunks(segment, bits)),
        2 => (0..SEGMENTS, 1..3u32).prop_map(|(first, count)| {
            Note::Zeros(first, count.min(SEGMENTS - first))
        }),
        1 => (0..SEGMENTS).prop_map(Note::Forget),
    ];
    prop::collection::vec(note, 1..10)
}

fn subject() -> Subject {
    sample::subject(sample::identity(SIZE))
}

/// What a target would note: what its ledger accepts.
fn entry(note: &Note) -> Option<Entry> {
    let hash = |segment: u32, chunk: u32| [(1 + segment * 64 + chunk) as u8 | 1; 32];
    match note {
        Note::Chunks(segment, bits) => {
            let set = (0..64).filter(|chunk| bits & (1 << chunk) != 0);
            let chunks = set.map(|chunk| (7, hash(*segment, chunk))).collect();
            Some(Entry::Partial(*segment, *bits, chunks))
        }
        Note::Zeros(first, count) => Some(Entry::ZeroRun(*first, *count)),
        Note::Forget(_) => None,
    }
}

/// What a journal says.
fn load(names: &Names) -> Option<Found> {
    let mut share = Budget::new(u64::MAX).share();
    Journal::load(names, &subject(), &mut share).unwrap()
}

/// Which chunks are done.
fn done(ledger: &Ledger) -> Vec<u64> {
    (0..ledger.segments())
        .map(|segment| ledger.done_bits(segment))
        .collect()
}

/// Writes a journal; returns what stood in it after each note, the file's length
/// then, and its bytes.
fn write(names: &Names, notes: &[Note]) -> Vec<(Vec<u64>, u64)> {
    let mut journal = Journal::create(names, &subject()).unwrap();
    let mut ledger = Ledger::new(SIZE);
    let len = || std::fs::metadata(path(names)).unwrap().len();
    let mut after = vec![(done(&ledger), len())];
    for note in notes {
        match entry(note) {
            Some(entry) => {
                // A chunk has one content: what disagrees is never noted.
                let mut tried = replay(&after, notes, after.len() - 1);
                if entry.apply(&mut tried).is_none() {
                    after.push(after.last().unwrap().clone());
                    continue;
                }
                entry.apply(&mut ledger).unwrap();
                journal.append([entry]).unwrap();
            }
            None => {
                let Note::Forget(segment) = note else {
                    unreachable!()
                };
                ledger.forget(*segment as usize);
                journal.forget(&[*segment as usize]).unwrap();
            }
        }
        after.push((done(&ledger), len()));
    }
    after
}

/// The ledger after so many notes.
fn replay(after: &[(Vec<u64>, u64)], notes: &[Note], count: usize) -> Ledger {
    let mut ledger = Ledger::new(SIZE);
    for (number, note) in notes[..count].iter().enumerate() {
        let was_noted = after[number].1 != after[number + 1].1;
        match (was_noted, entry(note), note) {
            (true, Some(entry), _) => entry.apply(&mut ledger).unwrap(),
            (true, None, Note::Forget(segment)) => ledger.forget(*segment as usize),
            _ => {}
        }
    }
    ledger
}

fn path(names: &Names) -> std::path::PathBuf {
    use std::os::fd::AsRawFd;
    let dir = std::fs::read_link(format!("/proc/self/fd/{}", names.dir.as_raw_fd()));
    dir.unwrap().join(&names.journal)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(96) })]

    #[test]
    fn what_was_noted_is_found_up_to_the_first_damage(
        notes in notes(),
        cut in any::<prop::sample::Index>(),
        flip in prop::option::of((any::<prop::sample::Index>(), 0..8u8)),
    ) {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let names = Names::open(dir.path(), "disk", "t").unwrap();
        let after = write(&names, &notes);
        let mut bytes = std::fs::read(path(&names)).unwrap();
        bytes.truncate(cut.index(bytes.len() + 1));
        let mut good = bytes.len() as u64;
        if let Some((at, bit)) = flip && !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            good = good.min(at as u64);
        }
        std::fs::write(path(&names), &bytes).unwrap();
        let found = load(&names);
        if good < after[0].1 {
            prop_assert!(found.is_none(), "believed without its beginning");
        } else {
            let expected = after.iter().rfind(|(_, len)| *len <= good).unwrap();
            let mut found = found.unwrap();
            prop_assert_eq!(done(&found.ledger), expected.0.clone());
            // And it goes on from there.
            found.journal.forget(&[0]).unwrap();
            let again = load(&names).unwrap();
            prop_assert_eq!(again.ledger.done_bits(0), 0);
            prop_assert_eq!(&done(&again.ledger)[1..], &expected.0[1..]);
        }
    }
}
