//! Devices as sources: what is written to them during a copy, and who counts it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use diskmover::digest::CHUNK;
use diskmover::error::Code;
use diskmover::local;
use diskmover::origin::Origin;
use diskmover::push::Push;
use diskmover::salvage::OnReadError;
use diskmover::source::{FileSource, Source};

use crate::devices::{Loop, Mount, Uncounted, loops};
use crate::rig::{Rig, eventually, finish, noise};

/// How often a test tries to be in time for something.
const ROUNDS: usize = 10;

/// A copy of a device to a file, of which a part has arrived.
fn half_copied(rig: &Rig, source: &Loop, size: u64) -> Push {
    rig.open(&[("disk", size)]).unwrap();
    let mut job = rig.job(&[&source.path]);
    job.volumes[0].0 = "disk".into();
    job.limit = Some(6 << 20);
    let push = Push::start(job).unwrap();
    eventually("half of it arrives", || {
        (push.progress().done >= size / 2).then_some(())
    });
    // Unless all has arrived meanwhile, it does not end before this is taken away.
    push.set_limit(Some(1)).unwrap();
    push
}

#[test]
fn a_device_that_is_written_meanwhile_is_gone_through_again() {
    let size = 24 * CHUNK;
    // Through the page cache and left there, around it, and by giving sectors back.
    let cached = |path: &Path| {
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(b"changed", 3).unwrap();
        Some(file)
    };
    let durable = |path: &Path| {
        let file = cached(path)?;
        file.sync_all().unwrap();
        None
    };
    let discarded = |path: &Path| {
        let mut discard = Command::new("blkdiscard");
        discard.args(["--offset", "0", "--length", &CHUNK.to_string()]);
        assert!(discard.arg(path).status().unwrap().success());
        None
    };
    type Write<'a> = &'a dyn Fn(&Path) -> Option<File>;
    let writes: [Write<'_>; 3] = [&cached, &durable, &discarded];
    for (number, write) in writes.into_iter().enumerate() {
        let before = noise(9, size as usize);
        let (rig, source, push, _open) = written_halfway(&before, write);
        push.set_limit(None).unwrap();
        let receipts = finish(&push).unwrap();
        let placed = std::fs::read(rig.root().join("disk")).unwrap();
        assert!(placed != before, "write {number} went unnoticed");
        assert!(
            placed == source.read(size),
            "write {number}: a mix was published"
        );
        assert_eq!(receipts[0].root, local::digest(&source.path).unwrap().2);
        // A connection that breaks, on a busy machine, sends some of it again.
        let wire = push.progress().wire;
        assert!(
            wire < size + size / 2,
            "write {number}: sent twice, {wire} bytes"
        );
    }
}

/// A copy of a device, and its source, which is written by `write` while some of it is
/// still to come: the last look comes afterwards.
fn written_halfway<T>(content: &[u8], write: impl Fn(&Path) -> T) -> (Rig, Loop, Push, T) {
    let size = content.len() as u64;
    for _ in 0..ROUNDS {
        let rig = Rig::new();
        let source = loops(&rig, size, 512);
        source.write(content, 0);
        let push = half_copied(&rig, &source, size);
        let written = write(&source.path);
        if push.progress().done < size {
            return (rig, source, push, written);
        }
        // The test was kept from its next line for longer than the rest took.
    }
    panic!("all had arrived before it was written, {ROUNDS} times");
}

#[test]
fn a_device_that_is_never_at_rest_is_refused_in_the_end() {
    let size = 24 * CHUNK;
    let before = noise(10, size as usize);
    let place = |count: u64| count % 20 * CHUNK;
    for _ in 0..ROUNDS {
        let (rig, source, push, ()) = written_halfway(&before, |path| {
            let file = File::options().write(true).open(path).unwrap();
            file.write_all_at(&0u64.to_le_bytes(), place(0)).unwrap();
        });
        push.set_limit(None).unwrap();
        let mut count = 1u64;
        let ended = eventually("the copy ends", || {
            source.write(&count.to_le_bytes(), place(count));
            count += 1;
            push.wait(Duration::ZERO)
        });
        let target = rig.root().join("disk");
        let Err(error) = ended else {
            // The test was kept from writing for as long as a whole pass takes.
            let mut state = before.clone();
            let placed = std::fs::read(target).unwrap();
            let is_whole = (0..count).any(|count| {
                let at = place(count) as usize;
                state[at..at + 8].copy_from_slice(&count.to_le_bytes());
                placed[at..at + 8] == state[at..at + 8] && placed == state
            });
            assert!(is_whole, "a mix was published");
            continue;
        };
        assert_eq!(error.code, Code::SourceChanged, "{error}");
        assert!(!target.exists(), "a mix was published");
        return;
    }
    panic!("it was at rest for a whole pass, {ROUNDS} times");
}

#[test]
fn only_what_is_written_after_the_opening_makes_a_device_another_one() {
    let rig = Rig::new();
    let source = loops(&rig, 4 * CHUNK, 512);
    let file = File::options().write(true).open(&source.path).unwrap();
    // Still in the page cache, and written back when it is read.
    file.write_all_at(&noise(11, 1 << 20), 0).unwrap();
    let opened = FileSource::open(&source.path).unwrap();
    assert!(source.read(4 * CHUNK)[..1 << 20] == noise(11, 1 << 20));
    file.sync_all().unwrap();
    opened.check_unchanged().unwrap();
    file.write_all_at(b"x", CHUNK).unwrap();
    let error = opened.check_unchanged().unwrap_err();
    assert_eq!(error.code, Code::SourceChanged, "{error}");
    opened.renew().unwrap();
    opened.check_unchanged().unwrap();
}

#[test]
fn a_device_that_is_not_counted_any_more_is_no_source_that_did_not_change() {
    let rig = Rig::new();
    let source = loops(&rig, 4 * CHUNK, 512);
    let opened = FileSource::open(&source.path).unwrap();
    let uncounted = Uncounted::new(&source);
    source.write(b"unseen", CHUNK);
    for looked in [opened.check_unchanged(), opened.renew()] {
        let error = looked.unwrap_err();
        assert_eq!(error.code, Code::SourceIo, "{error}");
        assert!(error.message.contains("iostats"), "{error}");
    }
    drop(uncounted);
    source.write(b"seen", CHUNK);
    let error = opened.check_unchanged().unwrap_err();
    assert_eq!(error.code, Code::SourceChanged, "{error}");
}

#[test]
fn a_device_that_was_never_counted_is_copied_with_a_note() {
    let rig = Rig::new();
    let source = loops(&rig, 4 * CHUNK, 512);
    let _uncounted = Uncounted::new(&source);
    let opened = FileSource::open(&source.path).unwrap();
    opened.check_unchanged().unwrap();
    opened.renew().unwrap();
}

#[test]
fn a_device_that_cannot_be_flushed_cannot_be_watched_and_is_refused() {
    let rig = Rig::new();
    // Room for some of it: the rest can be written to the page cache alone.
    let full = Mount::of(
        &["-t", "tmpfs", "-o", "size=1m", "none"],
        rig.root().join("full"),
    );
    let source = Loop::new(full.point.join("backing"), 8 * CHUNK, 512);
    let file = File::options().write(true).open(&source.path).unwrap();
    file.write_all_at(&noise(12, 4 << 20), 0).unwrap();
    let error = FileSource::open(&source.path).err().expect("it is taken");
    assert_eq!(error.code, Code::SourceIo, "{error}");
    // Whoever reads what a dying disk still gives has no other one.
    file.write_all_at(&noise(13, 4 << 20), 0).unwrap();
    let origin = Origin::File(source.path.clone());
    assert!(origin.open(&[1; 16], OnReadError::Zero).is_ok());
}
