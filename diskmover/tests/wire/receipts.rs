//! What a receipt answers for: the file as it was placed.

use std::os::unix::fs::FileExt;

use diskmover::digest::CHUNK;
use diskmover::error::Code;
use diskmover::publish;
use diskmover::push::Push;

use crate::rig::{Rig, SESSION, TAG, finish, noise, run};

const SIZE: u64 = 2 * CHUNK;

#[test]
fn a_receipt_answers_until_what_was_placed_is_used() {
    let rig = Rig::new();
    let source = rig.source("disk", SIZE, &[(0, &noise(1, SIZE as usize))]);
    rig.open(&[("disk", SIZE)]).unwrap();
    run(rig.job(&[&source])).unwrap();
    rig.open(&[("disk", SIZE)]).unwrap();
    let push = Push::start(rig.job(&[&source])).unwrap();
    finish(&push).unwrap();
    assert_eq!(push.progress().wire, 0);
    let target = rig.root().join("disk");
    let file = std::fs::File::options().write(true).open(&target).unwrap();
    file.write_all_at(b"used", 9).unwrap();
    rig.open(&[("disk", SIZE)]).unwrap();
    let error = run(rig.job(&[&source])).unwrap_err();
    assert_eq!(error.code, Code::TargetExists, "{error}");
    assert!(error.message.contains("written to since"), "{error}");
    // It is kept, and still this copy's own to take back.
    assert_eq!(&std::fs::read(&target).unwrap()[9..13], b"used");
    rig.receiver.close_session(SESSION);
    assert!(publish::discard_published(&rig.root(), "disk", TAG).unwrap());
}
