//! What a copy makes of an NBD server's word about its content.
//!
//! The server here answers every question about its blocks in the same way.
//! Whatever it says, the map comes to an end, and only zeros are left out.

use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};

use diskmover::nbd::address::{Address, ExportSpec};
use diskmover::nbd::export::NbdSource;
use diskmover::source::Source;

const SIZE: u64 = 200_000;
/// Most steps that a map of this size may take.
const STEPS: usize = 1000;
const ZERO: u32 = 2;

/// What a server answers, the smallest block, the extents | what is read.
type Answer = (
    &'static str,
    u32,
    &'static [(u32, u32)],
    &'static [Range<u64>],
);

/// An answer to an option.
fn answer(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    for number in [option, kind, payload.len() as u32] {
        out.extend(number.to_be_bytes());
    }
    out.extend(payload);
    out
}

/// All that a server says before the first request.
fn greeting(min_block: u32) -> Vec<u8> {
    let mut export = vec![0; 2];
    export.extend(SIZE.to_be_bytes());
    export.extend(3u16.to_be_bytes()); // read-only
    let mut blocks = 3u16.to_be_bytes().to_vec();
    for size in [min_block, min_block, 1 << 25] {
        blocks.extend(size.to_be_bytes());
    }
    let context = [&1u32.to_be_bytes()[..], b"base:allocation"].concat();
    let mut out = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    out.extend(answer(8, 1, &[]));
    out.extend(answer(10, 4, &context));
    out.extend(answer(10, 1, &[]));
    out.extend(answer(7, 3, &export));
    out.extend(answer(7, 3, &blocks));
    out.extend(answer(7, 1, &[]));
    out
}

/// Answers every BLOCK_STATUS with these extents, until the client goes.
fn serve(mut client: UnixStream, min_block: u32, extents: &[(u32, u32)]) -> Option<()> {
    client.write_all(&greeting(min_block)).ok()?;
    let mut request = [0; 28];
    // The flags and the three options that it has answered already.
    let mut options = vec![0; 4 + 16 + 16 + (4 + 4 + 4 + 4 + 15) + 16 + (4 + 4 + 2 + 2)];
    client.read_exact(&mut options).ok()?;
    loop {
        client.read_exact(&mut request).ok()?;
        let mut out = 0x668e_33ef_u32.to_be_bytes().to_vec();
        out.extend([0, 1, 0, 5]);
        out.extend(&request[8..16]);
        out.extend((4 + 8 * extents.len() as u32).to_be_bytes());
        out.extend(1u32.to_be_bytes());
        for (len, flags) in extents {
            out.extend(len.to_be_bytes());
            out.extend(flags.to_be_bytes());
        }
        client.write_all(&out).ok()?;
    }
}

/// What is read of an export whose server answers like this.
fn map(min_block: u32, extents: &'static [(u32, u32)]) -> Vec<Range<u64>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let (client, _) = listener.accept().unwrap();
        serve(client, min_block, extents)
    });
    let spec = ExportSpec {
        address: Address::Unix(path),
        name: "disk".into(),
        changes: None,
        content_id: None,
    };
    let source = NbdSource::open(&spec, &[0; 16]).unwrap();
    let mut map = source.extents(true).unwrap();
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some(data) = map.next_data(at).unwrap() {
        assert!(
            at <= data.start && data.start < data.end,
            "{data:?} after {at}"
        );
        at = data.end;
        found.push(data);
        assert!(found.len() < STEPS, "it does not come to an end");
    }
    found
}

#[test]
fn zeros_are_left_out_and_nothing_else() {
    let answers: &[Answer] = &[
        ("all zero", 512, &[(u32::MAX, ZERO)], &[]),
        (
            "a hole that is not called zero",
            512,
            &[(u32::MAX, 1)],
            &[0..SIZE],
        ),
        ("nothing", 512, &[(0, ZERO)], &[0..SIZE]),
        (
            "beyond the end",
            512,
            &[(4096, ZERO), (u32::MAX, 0)],
            &[4096..SIZE],
        ),
    ];
    for (what, min_block, extents, expected) in answers {
        assert_eq!(map(*min_block, extents), *expected, "{what}");
    }
}

#[test]
fn an_answer_that_stops_short_of_the_question_ends_nothing_and_goes_on_for_ever_neither() {
    // Ten bytes, then some data; asked from the middle of a block, the server
    // answers from its start, and so never tells of what was asked.
    let found = map(1 << 16, &[(10, ZERO), (10, 0)]);
    assert_eq!(found.first().map(|data| data.start), Some(10));
    assert_eq!(found.last().map(|data| data.end), Some(SIZE));
}
