//! What is known of the largest volume.

use std::fs::File;
use std::os::unix::fs::FileExt;

use diskmover::audit;
use diskmover::digest::{self, CHUNK, MAX_SIZE, SEGMENT_CHUNKS, ZERO_HASH};
use diskmover::ledger::{Ledger, MOST_ADOPTED, MOST_HELD, Unfit};
use diskmover::medium::Medium;
use diskmover::qcow2::{Image, Layout};
use diskmover::rebase;
use diskmover::revision::Revision;
use diskmover::sys::AlignedBuf;

use crate::within;

#[test]
fn a_zero_chunk_in_each_segment_costs_nothing_more() {
    within(100, || {
        let mut ledger = Ledger::new(MAX_SIZE);
        for segment in 0..ledger.segments() as u64 {
            let chunk = segment * SEGMENT_CHUNKS + segment % SEGMENT_CHUNKS;
            ledger.confirm_zeros(chunk, chunk + 1).unwrap();
        }
        assert_eq!(ledger.done_bytes(), ledger.segments() as u64 * CHUNK);
    });
}

#[test]
fn the_map_of_an_image_takes_no_memory_for_zeros() {
    within(40, || {
        let image = Image::new(Layout::of(MAX_SIZE).unwrap());
        image.note_zeros(0..digest::chunk_count(MAX_SIZE));
        image.note(77, &[1; 32]);
    });
}

#[test]
fn content_all_over_a_volume_is_refused_before_it_costs_too_much() {
    within(250, || {
        let mut ledger = Ledger::new(MAX_SIZE);
        let all = 0..ledger.segments() as u64;
        let chunks = (0..SEGMENT_CHUNKS)
            .flat_map(|index| all.clone().map(move |s| s * SEGMENT_CHUNKS + index));
        for chunk in chunks.take(MOST_HELD) {
            ledger.offer(chunk, [1; 32], 4096).unwrap();
            ledger.confirm(chunk);
        }
        assert_eq!(ledger.held(), MOST_HELD);
        assert_eq!(ledger.offer(2, [1; 32], 4096), Err(Unfit::Full));
        // What is known is still what it is, and zeros are always welcome.
        assert_eq!(ledger.offer(1, [1; 32], 4096), Ok(()));
        assert_eq!(ledger.offer(1, [2; 32], 4096), Err(Unfit::Conflict));
        ledger.confirm_zeros(2, 63).unwrap();
        ledger.offer(63, ZERO_HASH, 0).unwrap();
        ledger.confirm(63);
        // A segment that is complete makes room.
        ledger.close_if_full(0);
        assert_eq!(ledger.offer(66, [1; 32], 4096), Ok(()));
    });
}

#[test]
fn a_copy_that_was_written_to_everywhere_is_gone_on_from_in_little_memory() {
    let size = 4 << 40;
    let dir = tempfile::tempdir().unwrap();
    let mut options = File::options();
    let options = options.read(true).write(true).create_new(true);
    let file = options.open(dir.path().join("disk")).unwrap();
    file.set_len(size).unwrap();
    file.write_all_at(b"content", 5 * CHUNK).unwrap();
    let medium = Medium::new(file, None, false).unwrap();
    let mut earlier = Ledger::new(size);
    let mut buffer = AlignedBuf::new(CHUNK as usize).unwrap();
    let (hash, _, data) = audit::look_at(&medium, size, 5, &mut buffer).unwrap();
    earlier.offer(5, hash, data as u32).unwrap();
    earlier.confirm(5);
    earlier.confirm_zeros(0, 5).unwrap();
    earlier.confirm_zeros(6, digest::chunk_count(size)).unwrap();
    earlier.close_if_full(0);
    let mut revision = Revision::new(earlier.root().unwrap());
    for segment in 0..earlier.segments() as u64 {
        let start = (segment * SEGMENT_CHUNKS + 3) * CHUNK;
        revision.mark(start..start + 1);
    }
    within(100, || {
        let found = rebase::unchanged(&medium, size, &revision, &|_, _| {}, &|| true);
        let found = found.unwrap().expect("it is that copy");
        assert_eq!(found.done_bytes(), size / 64 * 63);
        assert!(found.held() <= MOST_ADOPTED);
    });
}
