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
//! `layout.rs` says where things lie, `tables.rs` what stands there.
//!
//! Format: version 3, clusters of 64 KiB, refcounts of 16 bits, no backing file.
//! <https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.rst>

mod layout;
mod tables;

use std::fs::File;
use std::io;
use std::sync::Mutex;

use rustix::fs::FallocateFlags;

use crate::base::{self, Mask, PIECE, PIECES};
use crate::digest::{self, Bitmap};
use crate::ledger::Ledger;
use crate::pool::lock;
use crate::store::Store;

pub use layout::{CLUSTER, Layout};

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
                let open = ledger.chunk(segment, index as usize).map(|(hash, _)| hash);
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
        let mapped = &mut lock(&self.mapped)[chunks.start as usize..chunks.end as usize];
        // Memory that was never written to is not there yet, and need not be.
        let filled = mapped.iter_mut().filter(|mask| **mask != 0);
        filled.for_each(|mask| *mask = 0);
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

    fn each_cluster(&self, act: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        tables::each_cluster(&self.layout, &lock(&self.mapped), act)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::CHUNK;

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
