//! The digest of a file or an export, without a copy.

use std::path::Path;
use std::sync::Mutex;

use crate::digest::{self, CHUNK, Hash};
use crate::error::{Code, MoverError, Result};
use crate::guard;
use crate::ledger::Ledger;
use crate::origin::Origin;
use crate::plan::{Plan, Work};
use crate::pool::lock;
use crate::salvage::OnReadError;
use crate::source::Source;
use crate::sys::{ALIGN, AlignedBuf};

/// Size, bytes in blocks that are not zero, and root digest.
pub fn digest(path: &Path) -> Result<(u64, u64, Hash)> {
    digest_at(&Origin::File(path.to_owned()), || false)
}

/// The same of a file or an export; gives up when `stopping` says so.
pub fn digest_at(origin: &Origin, stopping: impl Fn() -> bool + Sync) -> Result<(u64, u64, Hash)> {
    // The nonce is for identities, and none is needed here.
    digest_of(&*origin.open(&[0; 16], OnReadError::Fail)?, stopping)
}

/// The same of an open source; gives up when `stopping` says so.
pub fn digest_of(
    source: &dyn Source,
    stopping: impl Fn() -> bool + Sync,
) -> Result<(u64, u64, Hash)> {
    let size = source.identity().size;
    let unmapped = |e| MoverError::source_io("cannot map the source", &e);
    let extents = source.extents(source.has_sound_holes())?;
    let plan = Mutex::new(Plan::new(extents, size));
    let ledger = Mutex::new(Ledger::new(size));
    let step = || lock(&plan).next(|_| false).map_err(unmapped);
    let hash_all = || -> Result<()> {
        let no_memory = || MoverError::no_memory(CHUNK as usize);
        let mut buffer = AlignedBuf::new(CHUNK as usize).ok_or_else(no_memory)?;
        while let Some(work) = step()? {
            if stopping() {
                return Err(MoverError::new(Code::Cancelled, "hashing was cancelled"));
            }
            let (first, hash, data) = match work {
                Work::Zeros(chunks) => {
                    let marked = lock(&ledger).confirm_zeros(chunks.start, chunks.end);
                    marked.map_err(|_| source.changed("a hole was filled"))?;
                    continue;
                }
                Work::Chunk(chunk, ranges) => {
                    let len = digest::chunk_len(size, chunk);
                    let read = source.read_chunk(
                        chunk,
                        &ranges,
                        &mut buffer[..len.next_multiple_of(ALIGN)],
                    )?;
                    let bitmap = digest::scan_marked(&buffer[..len], &read);
                    let data = digest::compact(&mut buffer[..len], &bitmap);
                    (chunk, digest::chunk_hash(&bitmap, &buffer[..data]), data)
                }
            };
            let mut ledger = lock(&ledger);
            let offered = ledger.offer(first, hash, data as u32);
            offered.map_err(|_| source.changed("it was read twice"))?;
            ledger.confirm(first);
            ledger.close_if_full((first / digest::SEGMENT_CHUNKS) as usize);
        }
        Ok(())
    };
    let ended = guard::together(hash_all);
    ended.into_iter().collect::<Result<()>>()?;
    source.check_unchanged()?;
    let mut ledger = lock(&ledger);
    for segment in 0..ledger.segments() {
        ledger.close_if_full(segment);
    }
    let root = ledger.root();
    let missing = || MoverError::new(Code::Internal, "a chunk was not hashed");
    Ok((size, ledger.data_bytes(), root.ok_or_else(missing)?))
}
