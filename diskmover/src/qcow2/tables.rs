//! What stands in front of the volume: header, refcounts, and the map.

use std::io;

use crate::base::{Mask, PIECE, PIECES};
use crate::qcow2::layout::{CLUSTER, COUNTS, ENTRIES, Layout};

/// Refcount of what an entry points to is one.
const COPIED: u64 = 1 << 63;
const MAGIC: [u8; 4] = *b"QFI\xfb";
const HEADER_LEN: u32 = 104;

/// Every cluster in front of the volume that is in use, with its offset.
pub(super) fn each_cluster(
    layout: &Layout,
    mapped: &[Mask],
    mut act: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let used = Used::of(layout, mapped);
    let mut cluster = vec![0; PIECE];
    let mut act = |number: u64, bytes: &mut Vec<u8>| {
        let done = act(number * CLUSTER, bytes);
        bytes.fill(0);
        done
    };
    fill_header(layout, &mut cluster);
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

fn fill_header(layout: &Layout, cluster: &mut [u8]) {
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
