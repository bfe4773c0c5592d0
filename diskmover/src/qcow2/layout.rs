//! Where everything of an image lies: it follows from the size of the disk.

use crate::base::PIECE;
use crate::digest::CHUNK;
use crate::error::{Code, MoverError, Result};

/// Bytes of a cluster; what chunks are mapped by.
pub const CLUSTER: u64 = PIECE as u64;
/// Disks are counted in these.
const SECTOR: u64 = 512;
/// Entries of 8 bytes in a cluster: of an L2 table, the refcount table and L1.
pub(super) const ENTRIES: u64 = CLUSTER / 8;
/// Refcounts of 2 bytes in a cluster.
pub(super) const COUNTS: u64 = CLUSTER / 2;

/// Where everything of an image lies, in clusters; it follows from the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub(super) size: u64,
    /// Refcount blocks that there is room for.
    pub(super) blocks: u64,
    pub(super) first_block: u64,
    pub(super) l1: u64,
    pub(super) first_l2: u64,
    pub(super) first_data: u64,
    pub(super) end: u64,
}

impl Layout {
    /// The layout for a disk of `size` bytes.
    pub fn of(size: u64) -> Result<Layout> {
        if !size.is_multiple_of(SECTOR) {
            let text = format!(
                "the source has {size} bytes, and a disk in a qcow2 image whole sectors of {SECTOR}; receive it as raw"
            );
            return Err(MoverError::new(Code::SourceInvalid, text).at_receiver());
        }
        let mut blocks = 1;
        loop {
            let layout = Layout::with(size, blocks);
            let needed = layout.end.div_ceil(COUNTS);
            if needed <= blocks {
                return Ok(layout);
            }
            blocks = needed;
        }
    }

    fn with(size: u64, blocks: u64) -> Layout {
        let clusters = size.div_ceil(CLUSTER);
        let tables = clusters.div_ceil(ENTRIES);
        let first_block = 1 + blocks.div_ceil(ENTRIES);
        let l1 = first_block + blocks;
        let first_l2 = l1 + tables.div_ceil(ENTRIES);
        // Chunks stay aligned as they are in a raw file.
        let first_data = (first_l2 + tables).next_multiple_of(CHUNK / CLUSTER);
        Layout {
            size,
            blocks,
            first_block,
            l1,
            first_l2,
            first_data,
            end: first_data + clusters,
        }
    }

    /// Where the volume begins, in bytes.
    pub fn start(&self) -> u64 {
        self.first_data * CLUSTER
    }

    /// Bytes of the file.
    pub fn file_size(&self) -> u64 {
        self.end * CLUSTER
    }

    pub(super) fn tables(&self) -> u64 {
        self.size.div_ceil(CLUSTER).div_ceil(ENTRIES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest;

    const TIB: u64 = 1 << 40;

    #[test]
    fn there_is_room_for_everything_at_any_size() {
        for size in [
            0,
            512,
            CLUSTER,
            CHUNK + 512,
            1 << 31,
            8 * TIB,
            digest::MAX_SIZE,
        ] {
            let layout = Layout::of(size).unwrap();
            assert!(layout.blocks * COUNTS >= layout.end, "{size}: refcounts");
            assert!(
                (layout.first_block - 1) * ENTRIES >= layout.blocks,
                "{size}"
            );
            assert!((layout.first_l2 - layout.l1) * ENTRIES >= layout.tables());
            assert!(layout.start().is_multiple_of(CHUNK));
            assert!(layout.file_size() - layout.start() >= size);
            assert!(layout.file_size() > size, "{size}: taken for a raw file");
        }
    }

    #[test]
    fn odd_bytes_are_refused() {
        let error = Layout::of(513).unwrap_err();
        assert_eq!(error.code, Code::SourceInvalid);
    }
}
