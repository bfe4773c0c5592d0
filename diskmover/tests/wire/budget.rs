//! Copies for which there is no memory left: what is kept in mind of all volumes of a
//! receiver has one bound (src/budget.rs).

use diskmover::budget::{Budget, GRAIN};
use diskmover::digest::{CHUNK, SEGMENT_CHUNKS};
use diskmover::error::{Code, Result, Side};
use diskmover::frame::Kind;
use diskmover::listener::Limits;
use diskmover::messages::Receipt;

use crate::peer::Peer;
use crate::rig::{Rig, SESSION, TAG, limits, run};

/// More than what a first grain covers.
const SIZE: u64 = (GRAIN as u64 + 16 * SEGMENT_CHUNKS) * CHUNK;

/// A receiver with room for so many volumes of that size, and hardly more.
fn rig(volumes: u64) -> Rig {
    let budget = Budget::new(u64::MAX);
    let mut share = budget.share();
    share.take_volume(SIZE, false).unwrap();
    Rig::with(Limits {
        volume_memory: volumes * budget.taken() + 1000,
        ..limits()
    })
}

/// Copies a volume in a session beside the one of the peer.
fn copy(rig: &Rig) -> Result<Vec<Receipt>> {
    let source = rig.source("other", SIZE, &[(5 * CHUNK, b"content")]);
    rig.open_as("s2", "t2", &[("other", SIZE)]).unwrap();
    let mut job = rig.job(&[&source]);
    (job.session, job.tag) = ("s2".into(), "t2".into());
    run(job)
}

#[test]
fn a_volume_that_has_no_room_is_welcome_when_another_copy_has_ended() {
    let rig = rig(1);
    rig.open(&[("disk", SIZE)]).unwrap();
    let peer = Peer::sending(&rig, "disk", SIZE);
    let error = copy(&rig).unwrap_err();
    assert_eq!(
        (error.code, error.side, error.retryable),
        (Code::LimitExceeded, Side::Receiver, true)
    );
    assert_eq!(error.volume.as_deref(), Some("other"));
    assert!(error.message.contains("has ended"), "{error}");
    assert_eq!(rig.arrived(), [".disk.dm-t1.journal", ".disk.dm-t1.part"]);
    peer.hang_up();
    rig.receiver.close_session(SESSION);
    copy(&rig).unwrap();
}

#[test]
fn a_sender_that_touches_everything_takes_nothing_from_others() {
    let rig = rig(2);
    rig.open(&[("disk", SIZE)]).unwrap();
    let mut peer = Peer::sending(&rig, "disk", SIZE);
    // Content in each segment, none of which it ever completes.
    let open_ended = |chunk: &u64| !chunk.is_multiple_of(SEGMENT_CHUNKS);
    let chunks: Vec<u64> = (0..SIZE / CHUNK).filter(open_ended).collect();
    let (covered, beyond) = chunks.split_at(GRAIN);
    for some in covered.chunks(512) {
        let at = std::cell::Cell::new(0);
        peer.gathered(some.len(), |peer| {
            peer.data(0, some[at.replace(at.get() + 1)], SIZE, &[7; 4096]);
        });
        some.iter().for_each(|_| drop(peer.hear_kind(Kind::Ack)));
    }
    copy(&rig).unwrap();
    rig.receiver.close_session("s2");
    // More than its own share: it ends, and may go on from what is durable.
    let other = another(&rig);
    peer.data(0, beyond[0], SIZE, &[7; 4096]);
    let error = peer.hear_error().expect("an end without a reason");
    assert_eq!((error.code, error.retryable), (Code::LimitExceeded, true));
    assert_eq!(error.volume.as_deref(), Some("disk"));
    drop(other);
}

/// Another sender, with its volume open.
fn another(rig: &Rig) -> Peer {
    rig.open_as("s3", TAG, &[("third", SIZE)]).unwrap();
    let mut peer = Peer::dial(rig, &rig.pki.host("a"));
    peer.session = "s3".into();
    peer.hello(|_| {});
    peer.hear_kind(Kind::Welcome);
    peer.open(0, "third", SIZE);
    peer.hear_kind(Kind::Opened);
    peer
}
