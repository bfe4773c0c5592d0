//! What a copy makes of an NBD server's word about its content.
//!
//! The server here answers every question about its blocks in the same way.
//! Whatever it says, the map comes to an end, and only zeros are left out. When it is
//! slow to say what has changed, the copy waits, and can be cancelled.

use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::time::Duration;

use diskmover::error::Code;
use diskmover::nbd::address::{Address, Changes, ExportSpec};
use diskmover::nbd::export::NbdSource;
use diskmover::origin::Origin;
use diskmover::push::{Job, Push};
use diskmover::source::Source;

use crate::rig::{PATIENCE, Rig, finish, run};

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
fn greeting(min_block: u32, contexts: &[&str]) -> Vec<u8> {
    let mut export = vec![0; 2];
    export.extend(SIZE.to_be_bytes());
    export.extend(3u16.to_be_bytes()); // read-only
    let mut blocks = 3u16.to_be_bytes().to_vec();
    for size in [min_block, min_block, 1 << 25] {
        blocks.extend(size.to_be_bytes());
    }
    let mut out = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    out.extend(answer(8, 1, &[]));
    for (id, context) in (1u32..).zip(contexts) {
        out.extend(answer(
            10,
            4,
            &[&id.to_be_bytes()[..], context.as_bytes()].concat(),
        ));
    }
    out.extend(answer(10, 1, &[]));
    out.extend(answer(7, 3, &export));
    out.extend(answer(7, 3, &blocks));
    out.extend(answer(7, 1, &[]));
    out
}

/// Shakes hands over a fresh connection.
fn shake(client: &mut UnixStream, min_block: u32, contexts: &[&str]) -> Option<()> {
    client.write_all(&greeting(min_block, contexts)).ok()?;
    // The flags and the three options that it has answered already.
    let names: usize = contexts.iter().map(|context| 4 + context.len()).sum();
    let mut options = vec![0; 4 + 16 + 16 + (4 + 4 + 4 + names) + 16 + (4 + 4 + 2 + 2)];
    client.read_exact(&mut options).ok()
}

/// Answers every BLOCK_STATUS with these extents, until the client goes.
fn serve(mut client: UnixStream, min_block: u32, extents: &[(u32, u32)]) -> Option<()> {
    shake(&mut client, min_block, &["base:allocation"])?;
    let mut request = [0; 28];
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

/// A copy by the bitmap of an export that says nothing of it until `patience` is over,
/// and what hears of it when it is asked.
fn silent(rig: &Rig, dir: &tempfile::TempDir, patience: Duration) -> (Job, mpsc::Receiver<()>) {
    let path = dir.path().join("nbd");
    let listener = UnixListener::bind(&path).unwrap();
    let (asked, heard) = mpsc::channel();
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let contexts = ["base:allocation", "qemu:dirty-bitmap:b0"];
        shake(&mut client, 512, &contexts)?;
        let mut request = [0; 28];
        client.read_exact(&mut request).ok()?;
        asked.send(()).ok()?;
        client.set_read_timeout(Some(patience)).unwrap();
        let _ = client.read_exact(&mut [0]); // nothing more comes, or it goes
        let mut out = 0x668e_33ef_u32.to_be_bytes().to_vec();
        out.extend([0, 1, 0, 0]); // an answer that tells of nothing
        out.extend(&request[8..16]);
        out.extend([0; 4]);
        client.write_all(&out).ok()
    });
    let changes = Changes {
        bitmap: Some("b0".into()),
        since: [7; 32],
    };
    let export = ExportSpec {
        address: Address::Unix(path),
        name: "disk".into(),
        changes: Some(changes),
        content_id: None,
    };
    let mut job = rig.job(&[]);
    job.volumes = vec![("disk".into(), Origin::Nbd(export), None)];
    (job, heard)
}

#[test]
fn a_copy_is_cancelled_while_it_asks_what_has_changed() {
    let (rig, dir) = (Rig::new(), tempfile::tempdir().unwrap());
    let (job, heard) = silent(&rig, &dir, PATIENCE * 2);
    let push = Push::start(job).unwrap();
    heard.recv_timeout(PATIENCE).unwrap();
    push.cancel();
    assert_eq!(finish(&push).unwrap_err().code, Code::Cancelled);
}

#[test]
fn asking_what_has_changed_takes_nothing_of_the_time_to_connect() {
    let (rig, dir) = (Rig::new(), tempfile::tempdir().unwrap());
    let reconnect = Duration::from_secs(5);
    let (job, _heard) = silent(&rig, &dir, reconnect + Duration::from_secs(1));
    let error = run(Job { reconnect, ..job }).unwrap_err();
    // It has reached the receiver, which has no such session.
    assert_eq!(error.code, Code::SessionUnknown, "{error}");
}
