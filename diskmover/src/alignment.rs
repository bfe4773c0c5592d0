//! What O_DIRECT asks of offsets and lengths.

use std::os::fd::AsFd;

use rustix::fs::{AtFlags, StatxFlags};

use crate::digest::CHUNK;
use crate::sys::ALIGN;

/// The blocks that are read and written whole by O_DIRECT, in bytes; at least
/// `ALIGN`, a power of two, and no more than a chunk. None where it is refused, or
/// goes through the page cache after all: ext4 does so where it journals data, and of
/// files that it verifies.
///
/// The kernel tells since 6.1, where the file system takes part. Elsewhere it is
/// `ALIGN`, which suits every disk that we know, and a call that is refused tells.
pub fn of(file: impl AsFd) -> Option<usize> {
    let told = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    match told {
        Ok(told) if told.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            whole(told.stx_dio_offset_align, told.stx_dio_mem_align)
        }
        _ => Some(ALIGN),
    }
}

fn whole(offset: u32, memory: u32) -> Option<usize> {
    // Our memory is aligned to ALIGN, whatever is asked.
    let usable = offset.is_power_of_two() && u64::from(offset) <= CHUNK;
    (usable && memory as usize <= ALIGN).then(|| ALIGN.max(offset as usize))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{Mode, OFlags};

    use super::*;
    use crate::medium::Medium;
    use crate::medium::tests::ext4;
    use crate::passing::cached_bytes;
    use crate::rig::noise;
    use crate::source::{FileSource, Source};
    use crate::sys::AlignedBuf;

    /// Where O_DIRECT is taken and goes through the page cache in silence.
    #[test]
    fn what_only_seems_to_be_direct_leaves_nothing_in_the_page_cache() {
        let (_dir, _mount, at) = ext4(",data=journal");
        let path = at.join("disk");
        let mut chunk = AlignedBuf::new(CHUNK as usize).unwrap();
        chunk.copy_from_slice(&noise(1, CHUNK as usize));
        let file = File::create_new(&path).unwrap();
        let flags = OFlags::RDWR | OFlags::DIRECT;
        let direct = rustix::fs::open(&path, flags, Mode::empty());
        let direct = File::from(direct.expect("it is refused: nothing is tested"));
        assert_eq!(of(&direct), None);
        let medium = Medium::new(file, Some(direct), true).unwrap();
        medium.write(0, &chunk).unwrap();
        medium.sync().unwrap();
        drop(medium);
        // What is journaled stays until it is written to its place as well.
        rustix::fs::sync();
        let file = File::open(&path).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        assert_eq!(cached_bytes(&path), 0);
        let source = FileSource::open(&path).unwrap();
        let mut found = AlignedBuf::new(CHUNK as usize).unwrap();
        source.read_chunk(0, &[0..CHUNK], &mut found).unwrap();
        assert!(found[..] == chunk[..]);
        assert_eq!(cached_bytes(&path), 0);
    }

    #[test]
    fn what_cannot_be_asked_of_our_memory_and_chunks_is_left_alone() {
        assert_eq!(whole(512, 4), Some(ALIGN));
        assert_eq!(whole(65536, 512), Some(65536));
        assert_eq!(whole(0, 0), None);
        assert_eq!(whole(2 << 20, 512), None);
        assert_eq!(whole(4096, 8192), None);
    }
}
