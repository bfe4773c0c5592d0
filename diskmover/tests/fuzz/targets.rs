//! What is fuzzed: everything that reads bytes of others.
//!
//! Each target takes any bytes and must neither panic nor run for long, and what
//! it makes of them must hold together. `main.rs` runs them in cargo test,
//! `fuzz/` (`make fuzz`) under libFuzzer.

use std::io::{self, Read, Write};
use std::time::Duration;

use diskmover::beneath::Names;
use diskmover::budget::Budget;
use diskmover::codec::Decoder;
use diskmover::digest::{self, CHUNK, MAX_SIZE, SEGMENT_CHUNKS};
use diskmover::entry::{self, Entry};
use diskmover::frame::{HEADER, Header};
use diskmover::journal::{Found, Journal, Subject};
use diskmover::ledger::Ledger;
use diskmover::messages::{self, Hello, Open, Receipt};
use diskmover::nbd::client::{Client, Patience};
use diskmover::nbd::socket::Wire;
use diskmover::nbd::status::Known;
use diskmover::revision::{MAX_PAYLOAD, Revision};

#[allow(dead_code)]
#[path = "../wire/sample.rs"]
mod sample;

/// A function that must survive any bytes.
pub type Target = fn(&[u8]);

/// All of them, by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("frame", frame),
    ("message", message),
    ("state", state),
    ("dirty", dirty),
    ("journal", journal),
    ("zstd", zstd),
    ("nbd", nbd),
];

/// A header, and the size of the volume that it speaks of.
pub fn frame(data: &[u8]) {
    let Some((head, rest)) = data.split_first_chunk::<HEADER>() else {
        return;
    };
    let _ = Header::decode(head);
    // Nothing gets behind the checksum by chance.
    let mut head = *head;
    let sum = crc32c::crc32c(&head[..60]);
    head[60..].copy_from_slice(&sum.to_le_bytes());
    let Ok(header) = Header::decode(&head) else {
        return;
    };
    assert_eq!(header.encode(), head, "read, but not what was written");
    assert!(header.payload_len <= header.kind.max_payload());
    let size = number(rest).min(MAX_SIZE);
    if let Ok(chunks) = header.chunks(size) {
        assert!(chunks.start < chunks.end && chunks.end <= digest::chunk_count(size));
        assert!(header.offset + header.logical_len <= size);
    }
}

/// The payload of a small frame, as any of them.
pub fn message(data: &[u8]) {
    if let Some(hello) = Hello::decode(data) {
        assert_eq!(hello.encode(), data);
    }
    if let Some(open) = Open::decode(data) {
        assert_eq!(open.encode(), data);
    }
    if let Some(receipt) = Receipt::decode(data) {
        assert_eq!(receipt.encode(), data);
    }
    if let Some(error) = messages::decode_error(data) {
        assert!(
            !error
                .message
                .contains(|c: char| c.is_control() && c != '\n')
        );
        // Long texts are cut.
        let again = messages::decode_error(&messages::encode_error(&error)).unwrap();
        assert!(error.message.starts_with(&again.message));
        assert_eq!((again.code, again.offset), (error.code, error.offset));
    }
}

/// The size of a volume, and the payload of a STATE frame about it.
pub fn state(data: &[u8]) {
    let Some((size, mut rest)) = data.split_first_chunk::<4>() else {
        return;
    };
    // Small volumes have all the edges.
    let size = u64::from(u32::from_le_bytes(*size)) % (400 * CHUNK);
    let mut ledger = Ledger::new(size);
    while let Some(entry) = Entry::decode(&mut rest) {
        if entry.apply(&mut ledger).is_none() {
            break;
        }
    }
    holds_together(&ledger);
}

/// The size of a volume, and the payload of a DIRTY frame about it.
pub fn dirty(data: &[u8]) {
    let Some((size, payload)) = data.split_first_chunk::<8>() else {
        return;
    };
    // Small volumes have all the edges.
    let size = u64::from_le_bytes(*size) % (400 * CHUNK);
    let Some(revision) = Revision::decode(payload) else {
        return;
    };
    assert!(revision.dirty_segments() <= payload.len() / 12);
    let told = revision.encode();
    assert!(told.iter().all(|payload| payload.len() <= MAX_PAYLOAD));
    let mut heard = told
        .iter()
        .map(|payload| Revision::decode(payload).unwrap());
    let mut again = heard.next().expect("one frame at least");
    heard.for_each(|more| again.join(more));
    assert_eq!(again, revision, "told, but not what was heard");
    again.join(revision.clone());
    assert_eq!(again, revision, "told twice, it is another");
    let all = revision.is_all(size);
    if revision.fits(size) {
        let mut dirty = 0;
        for segment in 0..digest::segment_count(size) as usize {
            let bits = revision.dirty_bits(segment);
            let first = segment as u64 * SEGMENT_CHUNKS;
            let there = (digest::chunk_count(size) - first).min(SEGMENT_CHUNKS);
            assert!(
                bits.checked_shr(there as u32).unwrap_or(0) == 0,
                "beyond the end"
            );
            dirty += u64::from(bits.count_ones());
        }
        assert_eq!(all, dirty == digest::chunk_count(size));
    }
}

/// What a journal says.
fn load(names: &Names) -> Option<Found> {
    let mut share = Budget::new(u64::MAX).share();
    Journal::load(names, &subject(), &mut share).unwrap()
}

/// Records of a journal: first as they are, then as bodies with right checksums.
pub fn journal(data: &[u8]) {
    // Memory: nothing here has to survive a power cut.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let names = Names::open(dir.path(), "disk", "t").unwrap();
    let mut framed = Vec::new();
    let mut rest = data;
    while let Some((len, body)) = rest.split_first() {
        let (body, next) = body.split_at(usize::from(*len).min(body.len()));
        let start = framed.len();
        framed.extend((body.len() as u32).to_le_bytes());
        framed.extend(body);
        let sum = crc32c::crc32c(&framed[start..]);
        framed.extend(sum.to_le_bytes());
        rest = next;
    }
    for records in [data, &framed] {
        drop(Journal::create(&names, &subject()).unwrap());
        let path = dir.path().join(&names.journal);
        let mut file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(records).unwrap();
        let mut found = load(&names).unwrap();
        holds_together(&found.ledger);
        // What is left goes on to be a journal.
        found.journal.append([Entry::ZeroRun(1, 1)]).unwrap();
        let again = load(&names).unwrap();
        assert!(again.ledger.done_bytes() >= found.ledger.done_bytes());
    }
}

/// What a block decodes to, and a zstd frame.
pub fn zstd(data: &[u8]) {
    let Some((len, body)) = data.split_first_chunk::<2>() else {
        return;
    };
    let mut out = vec![0; usize::from(u16::from_le_bytes(*len))];
    let mut decoder = Decoder::new().unwrap();
    let _ = decoder.decompress(body, &mut out);
}

/// All that an NBD server says in a connection.
pub fn nbd(data: &[u8]) {
    const LEN: u64 = 96 << 10;
    let contexts = ["base:allocation".to_owned()];
    let Ok(mut client) = Client::new(Said(data), "disk", &contexts, Patience::default()) else {
        return;
    };
    let size = client.export().size;
    let block = u64::from(client.export().min_block);
    if let Ok(found) = client.block_status(0, LEN as u32) {
        for extents in found {
            let known = Known::of(0..LEN, &extents, |flags| flags & 2 == 0);
            assert!(known.range.start == 0 && !known.range.is_empty());
            assert!(known.range.end <= LEN, "known beyond what was asked");
            let mut at = 0;
            for range in &known.counts {
                assert!(at <= range.start && range.start < range.end);
                at = range.end;
            }
            assert!(at <= known.range.end);
        }
    }
    if size >= LEN && LEN.is_multiple_of(block) {
        let mut buffer = vec![0; LEN as usize];
        let _ = client.read(&[0..LEN], 0, &mut buffer);
    }
}

/// A server that has said all already, and does not listen.
struct Said<'a>(&'a [u8]);

impl Read for Said<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.0.read(out)
    }
}

impl Write for Said<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Wire for Said<'_> {
    fn arm(&mut self, _time: Duration) {}
}

/// A ledger counts no more than there is, and can be told to the other end.
fn holds_together(ledger: &Ledger) {
    let size = ledger.size();
    assert!(ledger.done_bytes() <= size && ledger.data_bytes() <= size);
    assert_eq!(ledger.is_complete(), ledger.done_bytes() == size);
    let entries = entry::collect(ledger, (0..ledger.segments()).map(|s| (s, u64::MAX)));
    let mut copy = Ledger::new(size);
    for entry in &entries {
        let mut bytes = Vec::new();
        entry.encode(&mut bytes);
        assert!(bytes.len() <= entry::MAX_ENTRY);
        let mut rest = bytes.as_slice();
        assert_eq!(Entry::decode(&mut rest).as_ref(), Some(entry));
        assert!(rest.is_empty());
        entry
            .apply(&mut copy)
            .expect("what a ledger tells is possible");
    }
    assert_eq!(copy.done_bytes(), ledger.done_bytes());
    assert_eq!(copy.root(), ledger.root());
}

fn subject() -> Subject {
    sample::subject(sample::identity(200 * CHUNK + 7))
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .take(8)
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}
