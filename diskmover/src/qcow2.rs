//! A qcow2 image around a volume: the container that a target can be given.
//!
//! ```text
//! header | refcount table | refcount blocks | L1 | L2 tables | volume, as in a raw file
//! ```
//! Cluster *n* of the guest always lies *n* clusters behind `Layout::start`, so
//! the volume is written, resumed and read back as it is in a raw file; only a
//! map is put in front of it before the file gets its name. Clusters of zeros are
//! not mapped and stay holes: the file looks as long as the disk and takes as
//! much room as its data. Tables for which there is no data are not written.
//!
//! Format: version 3, clusters of 64 KiB, refcounts of 16 bits, no backing file.
//! <https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.rst>

use std::fs::File;
use std::io;
use std::sync::Mutex;

use rustix::fs::FallocateFlags;

use crate::base::{self, Mask, PIECE, PIECES};
use crate::digest::{self, Bitmap, CHUNK};
use crate::error::{Code, MoverError, Result};
use crate::ledger::Ledger;
use crate::pool::lock;
use crate::store::Store;

/// Bytes of a cluster; what chunks are mapped by.
pub const CLUSTER: u64 = PIECE as u64;
/// Disks are counted in these.
const SECTOR: u64 = 512;
/// Entries of 8 bytes in a cluster: of an L2 table, the refcount table and L1.
const ENTRIES: u64 = CLUSTER / 8;
/// Refcounts of 2 bytes in a cluster.
const COUNTS: u64 = CLUSTER / 2;
/// Refcount of what an entry points to is one.
const COPIED: u64 = 1 << 63;
const MAGIC: [u8; 4] = *b"QFI\xfb";
const HEADER_LEN: u32 = 104;

/// Where everything of an image lies, in clusters; it follows from the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    size: u64,
    /// Refcount blocks that there is room for.
    blocks: u64,
    first_block: u64,
    l1: u64,
    first_l2: u64,
    first_data: u64,
    end: u64,
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

    fn tables(&self) -> u64 {
        self.size.div_ceil(CLUSTER).div_ceil(ENTRIES)
    }
}

/// An image in the making: its layout, and which clusters hold data.
pub struct Image {
    layout: Layout,
    /// By chunk, a bit for each cluster.
    mapped: Mutex<Vec<Mask>>,
}

impl Image {
    /// An image of which nothing is placed.
    pub fn new(layout: Layout) -> Image {
        let chunks = digest::chunk_count(layout.size) as usize;
        Image {
            layout,
            mapped: Mutex::new(vec![0; chunks]),
        }
    }

    /// Where everything lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Maps all clusters of what was placed before: which of them are zero is not
    /// known any more, and a mapped hole reads as zero too.
    pub fn resume(&self, ledger: &Ledger) {
        let mut mapped = lock(&self.mapped);
        for segment in 0..ledger.segments() {
            let closed = ledger.closed(segment).map(|(hash, _)| hash);
            let done = ledger.done_bits(segment);
            for index in (0..digest::SEGMENT_CHUNKS).filter(|i| done & (1 << i) != 0) {
                let open = ledger
                    .open_segment(segment)
                    .map(|open| open.hashes[index as usize]);
                if closed.or(open) != Some(digest::ZERO_HASH) {
                    let chunk = segment as u64 * digest::SEGMENT_CHUNKS + index;
                    let len = digest::chunk_len(self.layout.size, chunk);
                    mapped[chunk as usize] = base::all(len);
                }
            }
        }
    }

    /// Notes the content of a chunk.
    pub fn note(&self, chunk: u64, bitmap: &Bitmap) {
        let per_piece = bitmap.len() / PIECES;
        let pieces = bitmap.chunks(per_piece).enumerate();
        let mask = pieces.fold(0, |mask, (piece, bits)| {
            mask | (Mask::from(bits.iter().any(|byte| *byte != 0)) << piece)
        });
        lock(&self.mapped)[chunk as usize] = mask;
    }

    /// Notes that chunks are zero.
    pub fn note_zeros(&self, chunks: std::ops::Range<u64>) {
        lock(&self.mapped)[chunks.start as usize..chunks.end as usize].fill(0);
    }

    /// Writes everything but the volume. The file becomes an image by it, and is
    /// not durable yet.
    pub fn write(&self, file: &File) -> io::Result<()> {
        // Older content there would only take room.
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let _ = rustix::fs::fallocate(file, flags, 0, self.layout.start());
        let store = Store::new(file.try_clone()?);
        self.each_cluster(|offset, bytes| store.write_at(bytes, offset))
    }

    /// Whether the medium gives back what `write` wrote, once it is durable.
    pub fn is_written(&self, file: &File) -> io::Result<bool> {
        let store = Store::new(file.try_clone()?);
        store.uncache(0, self.layout.start());
        let (mut found, mut same) = (vec![0; PIECE], true);
        self.each_cluster(|offset, bytes| {
            store.read_at(&mut found, offset)?;
            same &= found == bytes;
            Ok(())
        })?;
        Ok(same)
    }

    /// Every cluster in front of the volume that is in use, with its offset.
    fn each_cluster(&self, mut act: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        let layout = &self.layout;
        let mapped = lock(&self.mapped);
        let used = Used::of(layout, &mapped);
        let mut cluster = vec![0; PIECE];
        let mut act = |number: u64, bytes: &mut Vec<u8>| {
            let done = act(number * CLUSTER, bytes);
            bytes.fill(0);
            done
        };
        self.fill_header(&mut cluster);
        act(0, &mut cluster)?;
        for at in 0..layout.first_block - 1 {
            put_entries(&mut cluster, at, layout.blocks, |block| {
                used.block(block)
                    .then_some((layout.first_block + block) * CLUSTER)
            });
            act(1 + at, &mut cluster)?;
        }
        for block in (0..layout.blocks).filter(|block| used.block(*block)) {
            for (index, count) in cluster.chunks_exact_mut(2).enumerate() {
                let number = block * COUNTS + index as u64;
                count[1] = u8::from(number < layout.end && used.cluster(number));
            }
            act(layout.first_block + block, &mut cluster)?;
        }
        for at in 0..layout.first_l2 - layout.l1 {
            put_entries(&mut cluster, at, layout.tables(), |table| {
                used.table(table)
                    .then_some(((layout.first_l2 + table) * CLUSTER) | COPIED)
            });
            act(layout.l1 + at, &mut cluster)?;
        }
        for table in (0..layout.tables()).filter(|table| used.table(*table)) {
            put_entries(
                &mut cluster,
                table,
                layout.end - layout.first_data,
                |data| {
                    used.data(data)
                        .then_some(((layout.first_data + data) * CLUSTER) | COPIED)
                },
            );
            act(layout.first_l2 + table, &mut cluster)?;
        }
        Ok(())
    }

    fn fill_header(&self, cluster: &mut [u8]) {
        let layout = &self.layout;
        let words: [&[u8]; 15] = [
            &MAGIC,
            &3u32.to_be_bytes(),
            &[0; 12], // no backing file
            &CLUSTER.ilog2().to_be_bytes(),
            &layout.size.to_be_bytes(),
            &[0; 4], // not encrypted
            &(layout.tables() as u32).to_be_bytes(),
            &(layout.l1 * CLUSTER).to_be_bytes(),
            &CLUSTER.to_be_bytes(), // the refcount table follows
            &((layout.first_block - 1) as u32).to_be_bytes(),
            &[0; 12], // no snapshots
            &[0; 24], // no features
            &4u32.to_be_bytes(),
            &HEADER_LEN.to_be_bytes(),
            &[0; 8], // no extensions
        ];
        let mut at = 0;
        for word in words {
            cluster[at..at + word.len()].copy_from_slice(word);
            at += word.len();
        }
    }
}

/// Which clusters are in use.
struct Used<'a> {
    layout: &'a Layout,
    mapped: &'a [Mask],
    tables: Vec<bool>,
    blocks: Vec<bool>,
}

impl Used<'_> {
    fn of<'a>(layout: &'a Layout, mapped: &'a [Mask]) -> Used<'a> {
        let mut used = Used {
            layout,
            mapped,
            tables: vec![false; layout.tables() as usize],
            // All that stands in front of the volume is counted.
            blocks: (0..layout.blocks)
                .map(|block| block * COUNTS < layout.first_data)
                .collect(),
        };
        for (chunk, mask) in mapped.iter().enumerate().filter(|(_, mask)| **mask != 0) {
            let first = (chunk * PIECES) as u64;
            used.tables[(first / ENTRIES) as usize] = true;
            for piece in (0..PIECES as u64).filter(|piece| mask & (1 << piece) != 0) {
                used.blocks[((layout.first_data + first + piece) / COUNTS) as usize] = true;
            }
        }
        used
    }

    fn block(&self, block: u64) -> bool {
        self.blocks[block as usize]
    }

    fn table(&self, table: u64) -> bool {
        self.tables[table as usize]
    }

    fn data(&self, cluster: u64) -> bool {
        let (chunk, piece) = (cluster / PIECES as u64, cluster % PIECES as u64);
        self.mapped[chunk as usize] & (1 << piece) != 0
    }

    fn cluster(&self, number: u64) -> bool {
        let layout = self.layout;
        if number < layout.first_block {
            true
        } else if number < layout.l1 {
            self.block(number - layout.first_block)
        } else if number < layout.first_l2 {
            true
        } else if number < layout.first_l2 + layout.tables() {
            self.table(number - layout.first_l2)
        } else if number < layout.first_data {
            false
        } else {
            self.data(number - layout.first_data)
        }
    }
}

/// Fills cluster number `at` of a table that has `count` entries in all.
fn put_entries(cluster: &mut [u8], at: u64, count: u64, entry: impl Fn(u64) -> Option<u64>) {
    for (index, slot) in cluster.chunks_exact_mut(8).enumerate() {
        let number = at * ENTRIES + index as u64;
        if let Some(value) = (number < count).then(|| entry(number)).flatten() {
            slot.copy_from_slice(&value.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn clusters_are_mapped_by_what_is_in_them() {
        let image = Image::new(Layout::of(3 * CHUNK).unwrap());
        let mut bitmap = Bitmap::default();
        digest_set(&mut bitmap, 15);
        digest_set(&mut bitmap, 16);
        digest_set(&mut bitmap, 255);
        image.note(1, &bitmap);
        assert_eq!(*lock(&image.mapped), [0, 0b11 | 1 << 15, 0]);
        image.note_zeros(1..2);
        assert_eq!(*lock(&image.mapped), [0, 0, 0]);
    }

    #[test]
    fn what_was_placed_before_is_mapped_whole() {
        let size = 66 * CHUNK + CLUSTER;
        let image = Image::new(Layout::of(size).unwrap());
        let mut ledger = Ledger::new(size);
        ledger.adopt_closed(0, [1; 32], 9);
        ledger.offer(64, digest::ZERO_HASH, 0).unwrap();
        ledger.confirm(64);
        ledger.offer(65, [2; 32], 5).unwrap();
        ledger.offer(66, [2; 32], 5).unwrap();
        ledger.confirm(66);
        image.resume(&ledger);
        let mapped = lock(&image.mapped).clone();
        assert!(mapped[..64].iter().all(|mask| *mask == 0xFFFF));
        assert_eq!(mapped[64..], [0, 0, 1]);
    }

    #[test]
    fn a_map_that_does_not_come_back_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i");
        let image = Image::new(Layout::of(CHUNK).unwrap());
        let mut bitmap = Bitmap::default();
        digest_set(&mut bitmap, 0);
        image.note(0, &bitmap);
        let mut options = File::options();
        let options = options.read(true).write(true).create_new(true);
        let file = options.open(&path).unwrap();
        file.set_len(image.layout().file_size()).unwrap();
        image.write(&file).unwrap();
        file.sync_all().unwrap();
        assert!(image.is_written(&file).unwrap());
        use std::os::unix::fs::FileExt;
        file.write_all_at(&[1], image.layout().l1 * CLUSTER + 9)
            .unwrap();
        assert!(!image.is_written(&file).unwrap());
    }

    fn digest_set(bitmap: &mut Bitmap, block: usize) {
        bitmap[block / 8] |= 1 << (block % 8);
    }
}
