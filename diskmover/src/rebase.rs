//! Goes on from an earlier copy: what stands at the target counts as done, except
//! where the source was written since.
//!
//! That copy is read and hashed first, all of it, and believed only when its
//! digest is the one that the sender promises to build on. It can have been
//! touched by anybody meanwhile.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::audit;
use crate::digest::{self, Bitmap, Hash, SEGMENT_CHUNKS, ZERO_HASH};
use crate::entry::Entry;
use crate::error::{Code, MoverError, Result};
use crate::guard;
use crate::ledger::{Ledger, MOST_ADOPTED};
use crate::medium::Medium;
use crate::pool::lock;
use crate::revision::Revision;
use crate::sys::AlignedBuf;

/// What is told of a chunk that was read: its number and its blocks.
pub type Note<'a> = &'a (dyn Fn(u64, &Bitmap) + Sync);

/// A segment as it stands: its hash, and what of it counts as done.
type Seen = (Hash, Option<Entry>);

/// Most chunks that `unchanged` notes one by one.
pub fn most_chunks(revision: &Revision) -> usize {
    (revision.dirty_segments() * SEGMENT_CHUNKS as usize).min(MOST_ADOPTED)
}

/// A ledger of the chunks that did not change, if the medium holds the copy that
/// the revision builds on; else None. `go_on` is asked now and then.
///
/// Where more segments changed in part than a ledger should hold, the rest of those
/// is left out: it is compared with the source like any older content.
pub fn unchanged(
    medium: &Medium,
    size: u64,
    revision: &Revision,
    note: Note<'_>,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<Option<Ledger>> {
    // What is noted as durable has to be, and is read from the medium itself.
    let unread = |e| MoverError::target_io("cannot read an earlier copy", &e);
    medium.sync().map_err(unread)?;
    let segments = digest::segment_count(size) as usize;
    let seen = Mutex::new((vec![ZERO_HASH; segments], Ledger::new(size)));
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        let no_memory = || MoverError::no_memory(digest::CHUNK as usize).at_receiver();
        let mut buffer = AlignedBuf::new(digest::CHUNK as usize).ok_or_else(no_memory)?;
        loop {
            let segment = next.fetch_add(1, Ordering::Relaxed);
            if segment >= segments {
                return Ok(());
            }
            if !go_on() {
                let text = "the session ended while an earlier copy was read";
                return Err(MoverError::new(Code::SessionClosed, text).at_receiver());
            }
            let found = look(medium, size, segment, revision, note, &mut buffer);
            let (hash, entry) = found.map_err(unread)?;
            let (hashes, ledger) = &mut *lock(&seen);
            hashes[segment] = hash;
            if let Some(entry) = entry.filter(|entry| entry.has_room(ledger, MOST_ADOPTED)) {
                let about_this_volume = entry.apply(ledger);
                debug_assert!(about_this_volume.is_some());
            }
        }
    };
    let ended = guard::together(work);
    ended.into_iter().collect::<Result<()>>()?;
    let (hashes, ledger) = seen.into_inner().unwrap_or_else(PoisonError::into_inner);
    let root = digest::root(size, hashes.iter());
    Ok((root == revision.since).then_some(ledger))
}

fn look(
    medium: &Medium,
    size: u64,
    segment: usize,
    revision: &Revision,
    note: Note<'_>,
    buffer: &mut [u8],
) -> std::io::Result<Seen> {
    let first = segment as u64 * SEGMENT_CHUNKS;
    let count = (digest::chunk_count(size) - first).min(SEGMENT_CHUNKS);
    let dirty = revision.dirty_bits(segment);
    let mut hashes = Vec::with_capacity(count as usize);
    let mut clean = Vec::new();
    let (mut bits, mut data) = (0, 0);
    for index in 0..count {
        let (hash, bitmap, len) = audit::look_at(medium, size, first + index, buffer)?;
        note(first + index, &bitmap);
        hashes.push(hash);
        data += len as u32;
        if dirty & (1 << index) == 0 {
            bits |= 1 << index;
            clean.push((len as u32, hash));
        }
    }
    let hash = digest::segment_hash(&hashes);
    let number = segment as u32;
    let entry = match (dirty, hash) {
        (0, ZERO_HASH) => Some(Entry::ZeroRun(number, 1)),
        (0, hash) => Some(Entry::Closed(number, data, hash)),
        _ if bits == 0 => None,
        _ => Some(Entry::Partial(number, bits, clean)),
    };
    Ok((hash, entry))
}
