//! Holes over data in a volume of which the sample reads only a part.

use super::{Fault, Op, Rule, inject};
use crate::digest::CHUNK;
use crate::rig::{Rig, run};

/// More than are looked at in any case.
const CHUNKS: u64 = 384;

#[test]
fn a_sample_finds_holes_over_data_that_lies_all_over_a_volume() {
    let rig = Rig::new();
    let places = (0..CHUNKS / 4).map(|n| (n * 4 * CHUNK + 5000, b"data".as_slice()));
    let places: Vec<_> = places.collect();
    let source = rig.source("disk", CHUNKS * CHUNK, &places);
    let lie = Rule {
        file: "out/disk",
        op: Op::Map,
        at: None,
        after: 0,
        times: u32::MAX,
        fault: Fault::AllHole,
    };
    let lie = inject(source.parent().unwrap(), lie);
    rig.open(&[("disk", CHUNKS * CHUNK)]).unwrap();
    run(rig.job(&[&source])).unwrap();
    assert!(lie.has_struck(), "nothing is tested");
    let placed = std::fs::read(rig.root().join("disk")).unwrap();
    assert!(
        placed == std::fs::read(&source).unwrap(),
        "zeros were published"
    );
}
