//! Whole copies in one process: content, resume, cancelling, trouble at the ends.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use diskmover::digest::CHUNK;
use diskmover::error::{Code, Side};
use diskmover::offer::Offer;
use diskmover::push::{Job, Push};
use diskmover::session::Phase;
use diskmover::{local, publish};

use crate::pki::uri;
use crate::rig::{Rig, SESSION, TAG, eventually, finish, noise, run};

#[test]
fn several_volumes_arrive_together_and_give_receipts_in_order() {
    let rig = Rig::new();
    let data = noise(1, 3 << 20);
    let sources = [
        rig.source("empty", 0, &[]),
        rig.source("one", 1, &[(0, b"x")]),
        rig.source("holes", 300 * CHUNK + 17, &[(70 * CHUNK + 5, &data)]),
        rig.source("void", 200 * CHUNK, &[]),
        rig.source("zeros", 3 * CHUNK, &[(0, &[0; 3 << 20])]),
    ];
    let size = |path: &PathBuf| std::fs::metadata(path).unwrap().len();
    let names = ["empty", "one", "holes", "void", "zeros"];
    let opened: Vec<_> = names
        .iter()
        .copied()
        .zip(sources.iter().map(size))
        .collect();
    rig.open(&opened).unwrap();
    let paths: Vec<_> = sources.iter().map(|path| path.as_path()).collect();
    let receipts = run(rig.job(&paths)).unwrap();
    for ((name, source), receipt) in names.iter().zip(&sources).zip(&receipts) {
        let target = rig.root().join(name);
        assert_eq!(receipt.volume, **name);
        assert!(same(source, &target), "{name} differs");
        let digest = local::digest(&target).unwrap();
        assert_eq!((receipt.size, receipt.data, receipt.root), digest, "{name}");
        let stat = std::fs::metadata(&target).unwrap();
        assert!(
            stat.blocks() * 512 <= receipt.data + (64 << 10),
            "{name} is not sparse"
        );
        assert_eq!(stat.permissions().mode() & 0o7777, 0o640);
    }
    let status = rig.receiver.status(SESSION).unwrap();
    assert_eq!((status.0, status.2), (Phase::Done, receipts));
    let left: Vec<_> = rig
        .arrived()
        .into_iter()
        .filter(|n| n.contains(".dm-"))
        .collect();
    assert!(
        left.iter().all(|name| name.ends_with(".receipt")),
        "{left:?}"
    );
}

#[test]
fn volumes_of_a_session_are_published_all_or_none() {
    let rig = Rig::new();
    let (one, two) = (
        rig.source("one", 5000, &[(0, b"1")]),
        rig.source("two", 5000, &[(0, b"2")]),
    );
    rig.open(&[("one", 5000), ("two", 5000)]).unwrap();
    let mut job = rig.job(&[&one, &two]);
    job.limit = Some(1); // the first frame passes, all others wait
    let push = Push::start(job).unwrap();
    eventually("something arrives", || {
        (rig.receiver.status(SESSION).unwrap().1.done > 0).then_some(())
    });
    push.cancel();
    assert!(!rig.arrived().iter().any(|name| !name.starts_with('.')));
}

#[test]
fn a_new_session_goes_on_where_the_last_one_was_cancelled() {
    let rig = Rig::new();
    let size = 24 * CHUNK;
    let source = rig.source("disk", size, &[(0, &noise(2, size as usize))]);
    rig.open(&[("disk", size)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.limit = Some(6 << 20); // two seconds to see it
    let push = Push::start(job).unwrap();
    eventually("half of it arrives", || {
        (rig.receiver.status(SESSION).unwrap().1.done >= size / 2).then_some(())
    });
    push.cancel();
    assert_eq!(finish(&push).unwrap_err().code, Code::Cancelled);
    let told = rig.failure(SESSION);
    assert_eq!((told.code, told.side), (Code::Cancelled, Side::Sender));
    rig.receiver.close_session(SESSION); // it may be about to let go of its part
    rig.open_as("s2", TAG, &[("disk", size)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.session = "s2".into();
    let push = Push::start(job).unwrap();
    let receipts = finish(&push).unwrap();
    let progress = push.progress();
    assert!(progress.resumed >= size / 2, "{progress:?}");
    assert!(progress.wire <= size / 2 + CHUNK, "{progress:?}");
    assert_eq!(receipts[0].root, local::digest(&source).unwrap().2);
    assert!(std::fs::read(&source).unwrap() == std::fs::read(rig.root().join("disk")).unwrap());
}

#[test]
fn connections_that_all_fail_at_once_end_the_copy() {
    let rig = Rig::new();
    let source = rig.source("disk", 5000, &[(0, b"x")]);
    for _ in 0..30 {
        rig.open(&[("disk", 5000)]).unwrap();
        let mut job = rig.job(&[&source]);
        job.connections = 16;
        job.receiver = Some(uri("somebody else"));
        let push = Push::start(job).unwrap();
        assert_eq!(finish(&push).unwrap_err().code, Code::PeerIdentity);
        drop(push); // joins all threads
    }
}

#[test]
fn a_source_that_changes_its_size_meanwhile_is_never_published() {
    let rig = Rig::new();
    let size = 8 * CHUNK;
    type Change = fn(&std::fs::File);
    let table: &[(&str, Change)] = &[
        ("grown", |file| file.set_len(9 * CHUNK).unwrap()),
        ("cut", |file| file.set_len(CHUNK).unwrap()),
    ];
    for (how, change) in table {
        let source = rig.source("disk", size, &[(0, &noise(4, size as usize))]);
        rig.open(&[("disk", size)]).unwrap();
        let mut job = rig.job(&[&source]);
        job.limit = Some(1);
        let push = Push::start(job).unwrap();
        eventually("it is under way", || {
            (push.progress().connections > 0).then_some(())
        });
        change(
            &std::fs::OpenOptions::new()
                .write(true)
                .open(&source)
                .unwrap(),
        );
        push.set_limit(None).unwrap();
        let error = finish(&push).unwrap_err();
        assert_eq!(error.code, Code::SourceChanged, "{how}: {error}");
        assert!(!rig.root().join("disk").exists(), "{how}: published");
        drop(push);
    }
}

#[test]
fn a_repeated_copy_is_answered_from_the_receipt_only_if_the_source_is_still_the_same() {
    let rig = Rig::new();
    let source = rig.source("disk", 5000, &[(0, b"first")]);
    let copy = |id: &str| {
        rig.open_as(id, TAG, &[("disk", 5000)]).unwrap();
        let mut job = rig.job(&[&source]);
        job.session = id.to_owned();
        run(job)
    };
    let first = copy("s1").unwrap();
    assert_eq!(copy("s2").unwrap(), first);
    rig.source("disk", 5000, &[(0, b"second")]);
    let error = copy("s3").unwrap_err();
    assert_eq!(error.code, Code::TargetExists, "{error}");
    assert_eq!(
        &std::fs::read(rig.root().join("disk")).unwrap()[..5],
        b"first"
    );
}

#[test]
fn a_connection_hears_its_welcome_before_anything_else() {
    let rig = Rig::new();
    let source = rig.source("disk", CHUNK, &[(0, b"x")]);
    let copy = |connections: usize| {
        rig.open(&[("disk", CHUNK)]).unwrap();
        let mut job = rig.job(&[&source]);
        job.connections = connections;
        run(job)
    };
    let receipts = copy(1).unwrap();
    // The receipt goes to all connections, while others are being let in.
    for attempt in 0..10 {
        assert_eq!(copy(4).unwrap(), receipts, "attempt {attempt}");
    }
}

#[test]
fn what_stands_at_the_target_is_never_touched() {
    let rig = Rig::new();
    let source = rig.source("disk", 5000, &[(0, b"x")]);
    let root = rig.root();
    let victim = root.join("victim");
    std::fs::write(&victim, b"precious").unwrap();
    type Obstacle = fn(&Path);
    let table: &[(&str, &str, Obstacle, Code)] = &[
        (
            "a file",
            "disk",
            |p| std::fs::write(p, b"precious").unwrap(),
            Code::TargetExists,
        ),
        (
            "a symlink",
            "disk",
            |p| symlink("victim", p).unwrap(),
            Code::TargetExists,
        ),
        (
            "a dangling symlink",
            "disk",
            |p| symlink("nowhere", p).unwrap(),
            Code::TargetExists,
        ),
        (
            "a directory",
            "disk",
            |p| std::fs::create_dir(p).unwrap(),
            Code::TargetExists,
        ),
        (
            "a symlink as part",
            ".disk.dm-t1.part",
            |p| symlink("victim", p).unwrap(),
            Code::TargetPath,
        ),
        (
            "a hard link as part",
            ".disk.dm-t1.part",
            |p| std::fs::hard_link(p.with_file_name("victim"), p).unwrap(),
            Code::TargetPath,
        ),
        (
            "a symlink as journal",
            ".disk.dm-t1.journal",
            |p| {
                std::fs::File::create(p.with_file_name(".disk.dm-t1.part"))
                    .and_then(|part| part.set_len(5000))
                    .unwrap();
                symlink("victim", p).unwrap();
            },
            Code::TargetPath,
        ),
        (
            "a symlink as receipt",
            ".disk.dm-t1.receipt",
            |p| symlink("victim", p).unwrap(),
            Code::TargetPath,
        ),
    ];
    for (what, name, obstacle, code) in table {
        obstacle(&root.join(name));
        rig.open(&[("disk", 5000)]).unwrap();
        let error = run(rig.job(&[&source])).expect_err(what);
        assert_eq!(
            (error.code, error.side),
            (*code, Side::Receiver),
            "{what}: {error}"
        );
        assert_eq!(error.volume.as_deref(), Some("disk"), "{what}");
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious", "{what}");
        rig.receiver.close_session(SESSION);
        for left in rig.arrived().iter().filter(|name| *name != "victim") {
            let path = root.join(left);
            let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir(&path));
        }
    }
}

#[test]
fn a_file_that_appears_meanwhile_is_not_replaced() {
    let rig = Rig::new();
    let size = 4 * CHUNK;
    let source = rig.source("disk", size, &[(0, &noise(5, size as usize))]);
    rig.open(&[("disk", size)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.limit = Some(1);
    let push = Push::start(job).unwrap();
    eventually("it is under way", || {
        (rig.receiver.status(SESSION).unwrap().1.done > 0).then_some(())
    });
    std::fs::write(rig.root().join("disk"), b"precious").unwrap();
    push.set_limit(None).unwrap();
    assert_eq!(finish(&push).unwrap_err().code, Code::TargetExists);
    assert_eq!(std::fs::read(rig.root().join("disk")).unwrap(), b"precious");
}

#[test]
fn symlinks_in_the_parents_are_not_followed() {
    let rig = Rig::new();
    let outside = tempfile::tempdir().unwrap();
    symlink(outside.path(), rig.root().join("link")).unwrap();
    let source = rig.source("disk", 5000, &[(0, b"x")]);
    rig.open(&[("link/disk", 5000)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.volumes[0].0 = "link/disk".into();
    let error = run(job).unwrap_err();
    assert_eq!(error.code, Code::TargetPath, "{error}");
    assert_eq!(outside.path().read_dir().unwrap().count(), 0);
}

#[test]
fn two_sessions_cannot_write_one_target() {
    let rig = Rig::new();
    let size = 4 * CHUNK;
    let source = rig.source("disk", size, &[(0, &noise(6, size as usize))]);
    rig.open(&[("disk", size)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.limit = Some(1);
    let first = Push::start(job).unwrap();
    eventually("it is under way", || {
        (rig.receiver.status(SESSION).unwrap().1.done > 0).then_some(())
    });
    rig.open_as("s2", TAG, &[("disk", size)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.session = "s2".into();
    let error = run(job).unwrap_err();
    assert_eq!(error.code, Code::TargetBusy, "{error}");
    let busy = publish::discard(&rig.root(), "disk", TAG).unwrap_err();
    assert_eq!(busy.code, Code::TargetBusy);
    first.set_limit(None).unwrap();
    finish(&first).unwrap();
}

#[test]
fn a_part_or_journal_of_another_disk_is_not_gone_on_from() {
    let rig = Rig::new();
    let size = 8 * CHUNK;
    let content = noise(7, size as usize);
    let source = rig.source("disk", size, &[(0, &content)]);
    let interrupted = || {
        rig.open(&[("disk", size)]).unwrap();
        let mut job = rig.job(&[&source]);
        job.limit = Some(1);
        let push = Push::start(job).unwrap();
        eventually("a chunk arrives", || {
            (rig.receiver.status(SESSION).unwrap().1.done > 0).then_some(())
        });
        push.cancel();
        rig.receiver.close_session(SESSION);
    };
    let part = rig.root().join(".disk.dm-t1.part");
    let journal = rig.root().join(".disk.dm-t1.journal");
    type Spoil<'a> = &'a dyn Fn();
    let table: &[(&str, Spoil)] = &[
        ("another part", &|| {
            std::fs::remove_file(&part).unwrap();
            std::fs::File::create(&part).unwrap().set_len(size).unwrap();
        }),
        ("a part that was cut", &|| {
            std::fs::OpenOptions::new()
                .write(true)
                .open(&part)
                .unwrap()
                .set_len(5)
                .unwrap();
        }),
        ("a journal of another source", &|| {
            let mut bytes = std::fs::read(&journal).unwrap();
            bytes[20] ^= 1;
            std::fs::write(&journal, bytes).unwrap();
        }),
        ("a torn header", &|| {
            let bytes = std::fs::read(&journal).unwrap();
            std::fs::write(&journal, &bytes[..40]).unwrap();
        }),
        ("a flipped bit in the first record", &|| {
            let mut bytes = std::fs::read(&journal).unwrap();
            bytes[100] ^= 8;
            std::fs::write(&journal, bytes).unwrap();
        }),
        ("no journal", &|| std::fs::remove_file(&journal).unwrap()),
    ];
    for (number, (what, spoil)) in table.iter().enumerate() {
        interrupted();
        spoil();
        let id = format!("again-{number}");
        rig.open_as(&id, TAG, &[("disk", size)]).unwrap();
        let mut job = rig.job(&[&source]);
        job.session = id;
        let push = Push::start(job).unwrap();
        finish(&push).expect(what);
        assert_eq!(push.progress().resumed, 0, "{what}: trusted");
        assert!(
            std::fs::read(rig.root().join("disk")).unwrap() == content,
            "{what}"
        );
        assert!(publish::discard_published(&rig.root(), "disk", TAG).unwrap());
    }
}

#[test]
fn closing_a_session_ends_its_sender() {
    let rig = Rig::new();
    let size = 4 * CHUNK;
    let source = rig.source("disk", size, &[(0, &noise(8, size as usize))]);
    rig.open(&[("disk", size)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.limit = Some(1);
    let push = Push::start(job).unwrap();
    eventually("it is under way", || {
        (rig.receiver.status(SESSION).unwrap().1.connections > 0).then_some(())
    });
    rig.receiver.close_session(SESSION);
    assert_eq!(finish(&push).unwrap_err().code, Code::SessionClosed);
    assert_eq!(
        rig.receiver.status(SESSION).unwrap_err().code,
        Code::SessionUnknown
    );
    // Nothing holds the part any more.
    publish::discard(&rig.root(), "disk", TAG).unwrap();
    assert_eq!(rig.arrived(), [""; 0]);
}

#[test]
fn a_receiver_that_never_answers_is_given_up() {
    let rig = Rig::new();
    let source = rig.source("disk", 5000, &[(0, b"x")]);
    let mut job = rig.job(&[&source]);
    job.to = "127.0.0.1:1".into();
    job.reconnect = Duration::from_millis(200);
    let error = run(job).unwrap_err();
    assert_eq!(error.code, Code::ConnectFailed);
    assert!(error.retryable);
}

/// What cmp does.
fn same(one: &Path, two: &Path) -> bool {
    let run = std::process::Command::new("cmp").args([one, two]).output();
    run.unwrap().status.success()
}

#[test]
fn many_connections_without_sessions_share_one_session() {
    let rig = Rig::new();
    rig.receiver.serve_names(Offer::files(rig.root())).unwrap();
    for number in 0..20 {
        let name = format!("disk{number}");
        let source = rig.source(&name, 5000, &[(0, b"x")]);
        let mut job = rig.job(&[&source]);
        job.session = format!("open/{name}");
        job.key = [0; 32];
        job.connections = 8;
        let push = Push::start(job).unwrap();
        finish(&push).unwrap();
    }
}

#[test]
fn a_receiver_that_ends_tells_its_senders_to_come_again() {
    let rig = Rig::new();
    rig.receiver.serve_names(Offer::files(rig.root())).unwrap();
    let size = 4 * CHUNK;
    let source = rig.source("disk", size, &[(0, &noise(9, size as usize))]);
    let job = || {
        let mut job = rig.job(&[&source]);
        job.session = "open/disk".into();
        job.key = [0; 32];
        job
    };
    let push = Push::start(Job {
        limit: Some(1),
        ..job()
    })
    .unwrap();
    eventually("a chunk arrives", || {
        (push.progress().done > 0).then_some(())
    });
    let again = rig.restarted();
    again.serve_names(Offer::files(rig.root())).unwrap();
    push.set_limit(None).unwrap();
    let error = finish(&push).unwrap_err();
    assert_eq!(error.code, Code::SessionClosed, "{error}");
    assert!(error.retryable);
    drop(push);
    let push = Push::start(job()).unwrap();
    finish(&push).unwrap();
    assert!(push.progress().resumed > 0);
}
