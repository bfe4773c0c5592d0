//! Going on from an earlier copy: what a sender says has changed is checked, and
//! the rest counts only when the receiver finds that very copy.

use diskmover::digest::{self, CHUNK, Hash};
use diskmover::error::Code;
use diskmover::frame::{Header, Kind};
use diskmover::ledger::Ledger;
use diskmover::local;
use diskmover::mode::CopyMode;
use diskmover::revision::{MAX_SEGMENTS, Revision};
use diskmover::target::Care;
use rustix::fs::{Gid, Mode, Uid, XattrFlags};

use crate::peer::Peer;
use crate::rig::{Rig, SESSION, noise, run};

const SIZE: u64 = 67 * CHUNK + 512;

/// A rig that has received a disk, and may bring it up to date.
fn received() -> (Rig, Hash) {
    let rig = Rig::new();
    let pieces: &[(u64, &[u8])] = &[(0, &noise(1, 3 << 20)), (65 * CHUNK, &noise(2, 1 << 20))];
    let source = rig.source("disk", SIZE, pieces);
    rig.open(&[("disk", SIZE)]).unwrap();
    let receipts = run(rig.job(&[&source])).unwrap();
    *rig.care.borrow_mut() = Care {
        update: true,
        ..Care::default()
    };
    (rig, receipts[0].root)
}

/// A sender that says HELLO, what changed, and OPEN.
fn opened(rig: &Rig, revision: &Revision) -> Peer {
    rig.open(&[("disk", SIZE)]).unwrap();
    let mut peer = Peer::dial(rig, &rig.pki.host("a"));
    peer.hello(|_| {});
    peer.hear_kind(Kind::Welcome);
    for payload in revision.encode() {
        peer.send(Header::new(Kind::Dirty, 0), &payload);
    }
    peer.open(0, "disk", SIZE);
    peer
}

/// The root digest with chunk 1 as `content`.
fn root_with(ledger: &mut Ledger, content: &[u8]) -> Hash {
    let mut bytes = content.to_vec();
    let bitmap = digest::scan(&bytes);
    let data = digest::compact(&mut bytes, &bitmap);
    let hash = digest::chunk_hash(&bitmap, &bytes[..data]);
    ledger.offer(1, hash, data as u32).unwrap();
    ledger.confirm(1);
    (0..ledger.segments()).for_each(|segment| ledger.close_if_full(segment));
    ledger.root().unwrap()
}

#[test]
fn all_but_what_changed_is_there() {
    let (rig, since) = received();
    let mut revision = Revision::new(since);
    revision.mark(CHUNK + 7..CHUNK + 8);
    let mut peer = opened(&rig, &revision);
    let mut ledger = peer.hear_state(SIZE);
    assert_eq!(ledger.done_bytes(), SIZE - CHUNK);
    assert!(!ledger.is_done(1));
    assert!(
        !rig.root().join("disk").exists(),
        "an old copy has the name"
    );
    let content = noise(9, 1 << 20);
    peer.data(0, 1, SIZE, &content);
    peer.hear_kind(Kind::Ack);
    let root = root_with(&mut ledger, &content);
    peer.finish(0, SIZE, &root);
    peer.hear_kind(Kind::Receipt);
    let placed = local::digest(&rig.root().join("disk")).unwrap();
    assert_eq!(placed.2, root);
}

/// Brings the disk up to date as the sender of `revision` would; chunk 1 has changed.
fn update(rig: &Rig, since: Hash) {
    let mut revision = Revision::new(since);
    revision.mark(CHUNK..CHUNK + 1);
    let mut peer = opened(rig, &revision);
    let mut ledger = peer.hear_state(SIZE);
    let content = noise(9, 1 << 20);
    peer.data(0, 1, SIZE, &content);
    peer.hear_kind(Kind::Ack);
    peer.finish(0, SIZE, &root_with(&mut ledger, &content));
    peer.hear_kind(Kind::Receipt);
}

#[test]
fn owner_mode_and_label_are_those_of_the_copy_that_was_there() {
    let (rig, since) = received();
    let path = rig.root().join("disk");
    let (uid, gid) = (Uid::from_raw(1234), Gid::from_raw(4321));
    rustix::fs::chown(&path, Some(uid), Some(gid)).unwrap();
    rustix::fs::chmod(&path, Mode::from_raw_mode(0o664)).unwrap();
    let label = b"system_u:object_r:svirt_image_t:s0:c1,c2\0";
    let (key, flags) = ("security.selinux", XattrFlags::empty());
    // Root may, also where no SELinux is; tmpfs and such may have no labels.
    let is_labelled = rustix::fs::setxattr(&path, key, label, flags).is_ok();
    rig.mode.set(None);
    update(&rig, since);
    let stat = rustix::fs::stat(&path).unwrap();
    assert_eq!((stat.st_uid, stat.st_gid), (1234, 4321));
    assert_eq!(stat.st_mode & 0o7777, 0o664);
    let mut found = [0; 100];
    let length = rustix::fs::getxattr(&path, key, &mut found);
    assert_eq!(length.is_ok(), is_labelled);
    assert_eq!(&found[..length.unwrap_or(0)], &label[..length.unwrap_or(0)]);
}

#[test]
fn a_mode_that_is_asked_for_is_given_to_what_was_there_too() {
    let (rig, since) = received();
    let path = rig.root().join("disk");
    rustix::fs::chmod(&path, Mode::from_raw_mode(0o664)).unwrap();
    rig.mode.set(Some(0o600));
    update(&rig, since);
    assert_eq!(rustix::fs::stat(&path).unwrap().st_mode & 0o7777, 0o600);
}

#[test]
fn another_result_than_the_sender_has_is_not_published() {
    let (rig, since) = received();
    let mut revision = Revision::new(since);
    revision.mark(CHUNK..CHUNK + 1);
    let mut peer = opened(&rig, &revision);
    peer.hear_state(SIZE);
    peer.data(0, 1, SIZE, &noise(9, 1 << 20));
    peer.hear_kind(Kind::Ack);
    peer.finish(0, SIZE, &[7; 32]);
    let error = peer.hear_error().unwrap();
    assert_eq!(error.code, Code::DigestMismatch);
    assert!(!rig.root().join("disk").exists());
}

#[test]
fn nothing_is_there_when_the_copy_is_not_the_promised_one() {
    let (rig, since) = received();
    let path = rig.root().join("disk");
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"!", 2 * CHUNK + 5).unwrap();
    drop(file);
    let mut peer = opened(&rig, &Revision::new(since));
    assert_eq!(peer.hear_state(SIZE).done_bytes(), 0);
}

#[test]
fn without_leave_the_copy_keeps_its_name() {
    let (rig, since) = received();
    *rig.care.borrow_mut() = Care::default();
    let mut peer = opened(&rig, &Revision::new(since));
    let (_, payload) = peer.hear_kind(Kind::Opened);
    assert!(!payload.is_empty(), "the receipt answers");
    assert!(rig.root().join("disk").exists());
}

#[test]
fn nonsense_about_changes_ends_the_session() {
    let beyond = |p: &mut Peer| {
        let mut revision = Revision::new([1; 32]);
        revision.mark(SIZE..SIZE + CHUNK);
        p.send(Header::new(Kind::Dirty, 0), &revision.encode()[0]);
        p.open(0, "disk", SIZE);
    };
    let told = |volume: u16, segments: u64| {
        let mut revision = Revision::new([volume as u8; 32]);
        let step = digest::SEGMENT_CHUNKS * CHUNK;
        (0..segments).for_each(|s| revision.mark(s * step..s * step + 1));
        let header = Header::new(Kind::Dirty, volume);
        let payloads = revision.encode().into_iter();
        payloads.map(move |payload| (header.clone(), payload))
    };
    let frames: Vec<_> = told(0, MAX_SEGMENTS as u64).chain(told(1, 1)).collect();
    let endless = |p: &mut Peer| {
        for (header, payload) in &frames {
            p.send(header.clone(), payload);
        }
    };
    let mode = |p: &mut Peer| {
        let open = diskmover::messages::Open {
            identity: crate::sample::identity(SIZE),
            mode: CopyMode::GuestVisible,
            volume: "disk".to_owned(),
        };
        let mut payload = open.encode();
        payload[32] = 9;
        p.send(Header::new(Kind::Open, 0), &payload);
    };
    type Act<'a> = &'a dyn Fn(&mut Peer);
    let faults: [(&str, Act, Code); 6] = [
        (
            "crumbs",
            &|p| p.send(Header::new(Kind::Dirty, 0), &[1; 33]),
            Code::Protocol,
        ),
        (
            "no digest",
            &|p| p.send(Header::new(Kind::Dirty, 0), &[]),
            Code::Protocol,
        ),
        (
            "no such volume",
            &|p| p.send(Header::new(Kind::Dirty, 9), &[1; 32]),
            Code::Protocol,
        ),
        ("beyond the end", &beyond, Code::Protocol),
        ("more than there can be", &endless, Code::SourceInvalid),
        ("a mode of a later version", &mode, Code::Protocol),
    ];
    for (what, act, code) in faults {
        let rig = Rig::new();
        rig.open(&[("disk", SIZE), ("other", SIZE)]).unwrap();
        let mut peer = Peer::dial(&rig, &rig.pki.host("a"));
        peer.hello(|_| {});
        peer.hear_kind(Kind::Welcome);
        act(&mut peer);
        let error = rig.failure(SESSION);
        assert_eq!(error.code, code, "{what}: {error:?}");
        assert_eq!(rig.arrived(), [""; 0], "{what}");
    }
}
