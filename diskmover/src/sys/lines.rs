//! Memory of the size of a TLS record begins where a cache line does.
//!
//! rustls takes each record from one such block to another, 5 bytes (the record's header)
//! off its beginning. glibc copies them with `rep movsb`, which on AMD's Zen 3 and 4 falls
//! from 50 GB/s to 3 where the target begins 1 to 15 bytes after the source, modulo 4096:
//! stores are taken for what is loaded next. Blocks of malloc are often just 16 bytes apart in
//! that sense, and some connections then took twice the time of others to receive. From 5
//! bytes after the beginning of a line to the beginning of one it never happens.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ops::RangeInclusive;
use std::ptr::null_mut;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Blocks that records are copied from and to.
const RECORDS: RangeInclusive<usize> = 4 << 10..=64 << 10;

/// The system's allocator, with other places for blocks of `RECORDS` bytes.
struct Lines;

#[global_allocator]
static LINES: Lines = Lines;

/// What the system is asked for.
fn asked(layout: Layout) -> Layout {
    if RECORDS.contains(&layout.size()) {
        layout.align_to(LINE).unwrap_or(layout)
    } else {
        layout
    }
}

// SAFETY: all comes from the system's allocator, and goes back to it with the layout that it
// came with, as that follows from the caller's; it is as large as asked for, and aligned at
// least so.
unsafe impl GlobalAlloc for Lines {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's layout has a size, and so has ours.
        unsafe { System.alloc(asked(layout)) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(asked(layout)) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !RECORDS.contains(&layout.size()) && !RECORDS.contains(&size) {
            // SAFETY: the caller's block came from the system with this very layout, and
            // goes on as one.
            return unsafe { System.realloc(block, layout, size) };
        }
        let Ok(grown) = Layout::from_size_align(size, layout.align()) else {
            return null_mut();
        };
        // SAFETY: the caller asks for more than no bytes; both blocks are as large as what is
        // copied, and the old one goes only when there is a new one.
        unsafe {
            let new = self.alloc(grown);
            if !new.is_null() {
                new.copy_from_nonoverlapping(block, size.min(layout.size()));
                self.dealloc(block, layout);
            }
            new
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's block came from here with this layout.
        unsafe { System.dealloc(block, asked(layout)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_begin_with_a_line_and_keep_their_content_as_they_grow() {
        let mut bytes = Vec::new();
        for grown in [100, 4 << 10, 18 << 10, 64 << 10, 1 << 20, 4 << 20] {
            bytes.resize(grown, (grown >> 8) as u8);
            bytes.shrink_to_fit();
            let offset = bytes.as_ptr().addr() % LINE;
            assert!(
                offset == 0 || !RECORDS.contains(&grown),
                "{grown}: {offset}"
            );
        }
        let marks = [0, 100, 4 << 10, 18 << 10, 64 << 10].map(|at| bytes[at]);
        assert_eq!(marks, [0, 16, 72, 0, 0]);
        bytes.truncate(18 << 10);
        bytes.shrink_to_fit();
        assert_eq!(bytes.as_ptr().addr() % LINE, 0);
        assert_eq!((bytes[99], bytes[100], bytes[17 << 10]), (0, 16, 72));
        assert!(vec![0_u8; 16 << 10].iter().all(|byte| *byte == 0));
    }
}
