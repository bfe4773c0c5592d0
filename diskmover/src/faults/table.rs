//! What a copy does when storage fails: operation, fault, what must happen, why.
//!
//! A table in the manner of libnbd's copy tests. Each row is a real copy between
//! two ends over TLS, while the storage of one file fails. After each, whatever
//! happened, the same must hold: a copy that says that it went well has placed
//! what the source holds; one that failed says where and why, and has published
//! nothing; the source is as it was; and once storage works, the same copy goes
//! on and ends well.
//!
//! tests/README.md tells which protection each row is about.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::{Fault, Injected, Op, Rule, inject};
use crate::digest::CHUNK;
use crate::error::{Code, MoverError, Side};
use crate::pool::lock;
use crate::push::{Job, Push};
use crate::rig::{Rig, SESSION, TAG, eventually, finish, noise, run};
use crate::target::Proof;
use crate::trust::Holes;

/// Data, a hole, data, and an odd tail that O_DIRECT cannot take.
const SIZE: u64 = 3 * CHUNK + 5000;
const EVER: u32 = u32::MAX;

const SOURCE: &str = "out/disk";
const PART: &str = ".part";
const JOURNAL: &str = ".journal";
const RECEIPT: &str = ".receipt.new";
const TARGET: &str = "in/disk";

/// What must happen.
#[derive(Clone, Copy)]
enum Must {
    /// The copy ends well all the same.
    EndWell,
    /// It does, and nothing is sent twice.
    EndAtOnce,
    /// It fails like this, and says these words.
    Fail(Code, Side, Option<u64>, &'static str),
    /// It fails after the file got its name, which the next attempt finds.
    FailNamed(Code),
}
use Must::{EndAtOnce, EndWell, Fail, FailNamed};

/// What stands at the target before.
#[derive(Clone, Copy, PartialEq)]
enum Before {
    Nothing,
    /// An older copy of it: most is the same, but nothing reads as zero by itself.
    Stale,
    /// Half of the copy, interrupted.
    Half,
    /// The same, with storage failing already.
    HalfBroken,
}

struct Row {
    what: &'static str,
    before: Before,
    proof: Proof,
    rule: Rule,
    must: Must,
}

/// A rule that holds from the first operation to the last.
const fn on(file: &'static str, op: Op, fault: Fault) -> Rule {
    Rule {
        file,
        op,
        at: None,
        after: 0,
        times: EVER,
        fault,
    }
}

impl Rule {
    const fn at(self, byte: u64) -> Rule {
        Rule {
            at: Some(byte),
            ..self
        }
    }

    const fn times(self, times: u32) -> Rule {
        Rule { times, ..self }
    }
}

const fn row(what: &'static str, rule: Rule, must: Must) -> Row {
    Row {
        what,
        before: Before::Nothing,
        proof: Proof::Written,
        rule,
        must,
    }
}

impl Row {
    const fn over(self, before: Before) -> Row {
        Row { before, ..self }
    }

    /// The same, with all of it read back before it is published.
    const fn proven(self) -> Row {
        Row {
            proof: Proof::Readback,
            ..self
        }
    }
}

const RECEIVER: Side = Side::Receiver;
const SENDER: Side = Side::Sender;
const EINTR: Fault = Fault::Error(libc::EINTR);
const EIO: Fault = Fault::Error(libc::EIO);
const EINVAL: Fault = Fault::Error(libc::EINVAL);
const ENOSPC: Fault = Fault::Error(libc::ENOSPC);
const EDQUOT: Fault = Fault::Error(libc::EDQUOT);
const EOPNOTSUPP: Fault = Fault::Error(libc::EOPNOTSUPP);
const LATE: Fault = Fault::Slow(Duration::from_millis(150));

const ROWS: &[Row] = &[
    // --- the source is read
    row(
        "read: short: the rest is asked for (1)",
        on(SOURCE, Op::Read, Fault::Short(4096)),
        EndWell,
    ),
    row(
        "read: short at an odd place: O_DIRECT cannot go on from there (1)",
        on(SOURCE, Op::Read, Fault::Short(1001)),
        EndWell,
    ),
    row(
        "read: interrupted: asked again (1)",
        on(SOURCE, Op::Read, EINTR).times(3),
        EndWell,
    ),
    row(
        "read: EINVAL with O_DIRECT: the page cache can (34)",
        on(SOURCE, Op::Read, EINVAL).times(1),
        EndWell,
    ),
    row(
        "read: EIO: a disk with a hole in its content is no disk (3)",
        on(SOURCE, Op::Read, EIO).at(2 * CHUNK + 9),
        Fail(Code::SourceIo, SENDER, Some(2 * CHUNK), "cannot read"),
    ),
    row(
        "read: the end comes early: it was cut, and zeros would be invented (1)",
        on(SOURCE, Op::Read, Fault::Short(0)).at(2 * CHUNK),
        Fail(Code::SourceChanged, SENDER, Some(2 * CHUNK), "shorter"),
    ),
    row(
        "read: late: slow is not dead (51)",
        on(SOURCE, Op::Read, LATE),
        EndAtOnce,
    ),
    row(
        "map: a hole over data: a sample is read, then all of it (27)",
        on(SOURCE, Op::Map, Fault::AllHole),
        EndWell,
    ),
    row(
        "map: a hole over data, for a moment: the same (27)",
        on(SOURCE, Op::Map, Fault::AllHole).times(1),
        EndWell,
    ),
    // --- chunks lie in memory on their way
    row(
        "packed: a bit flips at the sender: it is asked for again (15)",
        on(SOURCE, Op::Pack, Fault::Flipped).at(2 * CHUNK).times(1),
        EndWell,
    ),
    row(
        "packed: the same three times: asked for each time (15)",
        on(SOURCE, Op::Pack, Fault::Flipped).at(2 * CHUNK).times(3),
        EndWell,
    ),
    row(
        "packed: in every chunk: each is asked for again (15)",
        on(SOURCE, Op::Pack, Fault::Flipped).times(3),
        EndWell,
    ),
    row(
        "packed: in what the base is asked for (15)",
        on(SOURCE, Op::Pack, Fault::Flipped).at(0).times(1),
        EndWell,
    )
    .over(Before::Stale),
    row(
        "packed: in a patch: all of the chunk comes (15)",
        Rule {
            after: 1,
            ..on(SOURCE, Op::Pack, Fault::Flipped).at(0).times(1)
        },
        EndWell,
    )
    .over(Before::Stale),
    row(
        "packed: always: not asked for without end (15)",
        on(SOURCE, Op::Pack, Fault::Flipped).at(2 * CHUNK),
        Fail(Code::ChunkCorrupt, RECEIVER, Some(2 * CHUNK), "3 times"),
    ),
    row(
        "packed: in the bitmap: the same (15)",
        on(SOURCE, Op::Mark, Fault::Flipped).at(2 * CHUNK).times(3),
        EndWell,
    ),
    row(
        "packed: in the bitmap of a patch: all of the chunk comes (15)",
        on(SOURCE, Op::Mark, Fault::Flipped).at(0).times(1),
        EndWell,
    )
    .over(Before::Stale),
    row(
        "packed: in the bitmap, always: not asked for without end (15)",
        on(SOURCE, Op::Mark, Fault::Flipped).at(2 * CHUNK),
        Fail(Code::ChunkCorrupt, RECEIVER, Some(2 * CHUNK), "3 times"),
    ),
    row(
        "arrived: a bit flips at the receiver: it is asked for again (15)",
        on(TARGET, Op::Arrive, Fault::Flipped)
            .at(2 * CHUNK)
            .times(3),
        EndWell,
    ),
    row(
        "arrived: always: not asked for without end (15)",
        on(TARGET, Op::Arrive, Fault::Flipped).at(2 * CHUNK),
        Fail(Code::ChunkCorrupt, RECEIVER, Some(2 * CHUNK), "3 times"),
    ),
    // --- the part is written
    row(
        "write: short: counted, and the rest written (2)",
        on(PART, Op::Write, Fault::Short(8192)),
        EndWell,
    ),
    row(
        "write: interrupted: done again (2)",
        on(PART, Op::Write, EINTR).times(5),
        EndWell,
    ),
    row(
        "write: EINVAL with O_DIRECT: the page cache can (34)",
        on(PART, Op::Write, EINVAL).times(1),
        EndWell,
    ),
    row(
        "write: takes nothing: not tried for ever (2)",
        on(PART, Op::Write, Fault::Short(0)),
        Fail(Code::TargetIo, RECEIVER, None, "cannot write"),
    ),
    row(
        "write: EIO: nothing that could not be written is acknowledged (4)",
        on(PART, Op::Write, EIO).at(2 * CHUNK),
        Fail(Code::TargetIo, RECEIVER, Some(2 * CHUNK), "cannot write"),
    ),
    row(
        "write: ENOSPC: told apart, with how much is still to come (5)",
        on(PART, Op::Write, ENOSPC).at(2 * CHUNK),
        Fail(Code::NoSpace, RECEIVER, Some(2 * CHUNK), "still to come"),
    ),
    row(
        "write: EDQUOT: somebody else has to act (8)",
        on(PART, Op::Write, EDQUOT).at(0),
        Fail(Code::Quota, RECEIVER, Some(0), "quota"),
    ),
    row(
        "write: torn, and called whole: the medium is asked (7)",
        on(PART, Op::Write, Fault::Torn(4096)).at(CHUNK * 2),
        Fail(Code::TargetIo, RECEIVER, Some(0), "does not give back"),
    )
    .proven(),
    row(
        "write: a bit flips on the way down: the medium is asked (7)",
        on(PART, Op::Write, Fault::Flipped).times(1),
        Fail(Code::TargetIo, RECEIVER, Some(0), "does not give back"),
    )
    .proven(),
    row(
        "read back: EIO: what cannot be read is not there (7)",
        on(PART, Op::Read, EIO).at(2 * CHUNK),
        Fail(Code::TargetIo, RECEIVER, Some(0), "does not give back"),
    )
    .proven(),
    row(
        "write: late: no timeout while it goes on (51)",
        on(PART, Op::Write, LATE),
        EndAtOnce,
    ),
    row(
        "size: EFBIG: the file system cannot hold such a file (18)",
        on(PART, Op::Resize, Fault::Error(libc::EFBIG)),
        Fail(Code::TargetIo, RECEIVER, None, "cannot size"),
    ),
    // --- ranges are zeroed, over something else
    row(
        "zero: not supported: written, where it is not zero (33, 36)",
        on(PART, Op::Zero, EOPNOTSUPP),
        EndWell,
    )
    .over(Before::Stale),
    row(
        "zero: EINVAL: the same (33)",
        on(PART, Op::Zero, EINVAL),
        EndWell,
    )
    .over(Before::Stale),
    row(
        "zero: EIO: old content must not show through (4)",
        on(PART, Op::Zero, EIO),
        Fail(Code::TargetIo, RECEIVER, Some(CHUNK), "cannot zero"),
    )
    .over(Before::Stale),
    row(
        "zero: ENOSPC: a thin pool needs space to zero, too (5)",
        on(PART, Op::Zero, ENOSPC),
        Fail(Code::NoSpace, RECEIVER, Some(CHUNK), "cannot zero"),
    )
    .over(Before::Stale),
    row(
        "zero: nothing happens, and it is called done: the medium is asked (33)",
        on(PART, Op::Zero, Fault::Torn(0)),
        Fail(Code::TargetIo, RECEIVER, Some(0), "does not give back"),
    )
    .over(Before::Stale)
    .proven(),
    row(
        "read of older content: EIO: it is no base, the chunk comes whole (54)",
        on(PART, Op::Read, EIO),
        EndWell,
    )
    .over(Before::Stale),
    row(
        "read of older content: another one when the rest comes: not believed (54)",
        Rule {
            after: 1,
            ..on(PART, Op::Read, Fault::Flipped).at(0).times(1)
        },
        EndWell,
    )
    .over(Before::Stale),
    // --- it is made durable
    row(
        "sync: EIO: never tried again, the pages may be gone (4)",
        on(PART, Op::Sync, EIO).times(1),
        Fail(Code::TargetIo, RECEIVER, None, "cannot make durable"),
    ),
    row(
        "sync: ENOSPC: space that was promised is not there (6)",
        on(PART, Op::Sync, ENOSPC).times(1),
        Fail(Code::NoSpace, RECEIVER, None, "cannot make durable"),
    ),
    row(
        "sync: late: no timeout (51)",
        on(PART, Op::Sync, LATE),
        EndAtOnce,
    ),
    // --- it is noted
    row(
        "journal: ENOSPC: what is not noted is not acknowledged as durable (5)",
        on(JOURNAL, Op::Write, ENOSPC),
        Fail(Code::NoSpace, RECEIVER, None, "cannot write"),
    ),
    row(
        "journal: EIO when a record is made durable (4)",
        Rule {
            after: 1,
            ..on(JOURNAL, Op::Sync, EIO)
        },
        Fail(Code::TargetIo, RECEIVER, None, "the journal of"),
    ),
    row(
        "journal: a record is torn: it and what follows is not believed (11)",
        Rule {
            after: 1,
            ..on(JOURNAL, Op::Write, Fault::Torn(20))
        },
        EndWell,
    )
    .over(Before::HalfBroken),
    row(
        "journal: short writes: the rest follows (2)",
        on(JOURNAL, Op::Write, Fault::Short(10)),
        EndWell,
    ),
    row(
        "journal: EIO when it is read: refused, not taken for an empty one (11)",
        on(JOURNAL, Op::Read, EIO),
        Fail(Code::TargetIo, RECEIVER, None, "cannot read a journal"),
    )
    .over(Before::Half),
    row(
        "read of what was noted last: a bit flips: it comes again (12)",
        on(PART, Op::Read, Fault::Flipped),
        EndWell,
    )
    .over(Before::Half),
    // --- it gets its name
    row(
        "publish: EIO in the last sync (4)",
        on(PART, Op::SyncAll, EIO),
        Fail(Code::TargetIo, RECEIVER, None, "cannot make durable"),
    ),
    row(
        "publish: ENOSPC for the receipt: no name without its proof (6)",
        on(RECEIPT, Op::Write, ENOSPC),
        Fail(Code::NoSpace, RECEIVER, None, "cannot write"),
    ),
    row(
        "publish: EIO when the receipt is made durable (4)",
        on(RECEIPT, Op::SyncAll, EIO),
        Fail(Code::TargetIo, RECEIVER, None, "cannot write"),
    ),
    row(
        "publish: the rename fails",
        on(PART, Op::Rename, EIO),
        Fail(Code::TargetIo, RECEIVER, None, "cannot rename"),
    ),
    row(
        "publish: a name that is taken is never replaced (22)",
        on(PART, Op::Rename, Fault::Error(libc::EEXIST)),
        Fail(Code::TargetExists, RECEIVER, None, "there already"),
    ),
    row(
        "publish: no rename without replacing: a link never replaces either (36)",
        on(PART, Op::Rename, EINVAL),
        EndWell,
    ),
    row(
        "publish: the name is not durable: not called done",
        Rule {
            // The journal's and the receipt's directories come first.
            after: 2,
            ..on(TARGET, Op::SyncDir, EIO).times(1)
        },
        FailNamed(Code::TargetIo),
    ),
];

/// A source, and an open session for it.
struct Scene {
    rig: Rig,
    source: PathBuf,
}

impl Scene {
    fn new(row: &Row) -> Scene {
        let rig = Rig::new();
        rig.care.borrow_mut().proof = row.proof;
        let pieces = [
            (0, noise(1, CHUNK as usize)),
            (2 * CHUNK, noise(2, CHUNK as usize + 5000)),
        ];
        let pieces = pieces.each_ref().map(|(at, data)| (*at, data.as_slice()));
        let source = rig.source("disk", SIZE, &pieces);
        let scene = Scene { rig, source };
        match row.before {
            Before::Nothing | Before::HalfBroken => {}
            Before::Stale => std::fs::write(scene.part(), scene.older()).unwrap(),
            Before::Half => scene.copy_half(),
        }
        scene
    }

    fn part(&self) -> PathBuf {
        self.rig.root().join(format!(".disk.dm-{TAG}.part"))
    }

    fn older(&self) -> Vec<u8> {
        let mut content = std::fs::read(&self.source).unwrap();
        content[CHUNK as usize..2 * CHUNK as usize].fill(9);
        content[..100].fill(9);
        content
    }

    fn job(&self) -> Job {
        let opened = self.rig.open(&[("disk", SIZE)]);
        opened.expect("no session");
        self.rig.job(&[&self.source])
    }

    /// Bytes on the wire.
    fn copy(&self) -> Result<u64, MoverError> {
        let push = Push::start(self.job())?;
        finish(&push).map(|_| push.progress().wire)
    }

    /// Copies a chunk, and waits until it is noted.
    fn copy_half(&self) {
        let push = Push::start(Job {
            limit: Some(CHUNK / 8), // the next one would take seconds
            ..self.job()
        });
        let push = push.unwrap();
        eventually("a chunk is there", || {
            let (_, progress, _) = self.rig.receiver.status(SESSION).unwrap();
            // Zeros go by in no time; so this is data.
            (progress.done > CHUNK).then_some(())
        });
        push.cancel();
        self.rig.receiver.close_session(SESSION);
    }

    fn base(&self) -> &Path {
        self.source.parent().and_then(Path::parent).unwrap()
    }

    fn target(&self) -> PathBuf {
        self.rig.root().join("disk")
    }

    fn is_placed(&self) -> bool {
        self.target().exists()
    }

    fn arrived_whole(&self) -> Result<(), String> {
        let there = std::fs::read(self.target()).map_err(|e| format!("not published: {e}"))?;
        match there == std::fs::read(&self.source).unwrap() {
            true => Ok(()),
            false => Err("published, and not what the source holds".to_owned()),
        }
    }
}

fn check(row: &Row) -> Result<(), String> {
    let scene = Scene::new(row);
    let before = std::fs::read(&scene.source).unwrap();
    let injected: Injected = inject(scene.base(), row.rule);
    if row.before == Before::HalfBroken {
        scene.copy_half();
    }
    let outcome = scene.copy();
    if !injected.has_struck() {
        return Err("the fault never came: nothing is tested".to_owned());
    }
    drop(injected);
    match (row.must, outcome) {
        (EndAtOnce, Ok(wire)) if wire > SIZE => return Err("sent twice".to_owned()),
        (EndWell | EndAtOnce, Ok(_)) => scene.arrived_whole()?,
        (EndWell | EndAtOnce, Err(error)) => return Err(format!("failed: {error}")),
        (_, Ok(_)) => return Err("said that it went well".to_owned()),
        (Fail(code, side, offset, says), Err(error)) => {
            let right = error.code == code && error.side == side && error.message.contains(says);
            if !right || offset.is_some() && error.offset != offset {
                return Err(format!("another error: {error:?}"));
            }
            if scene.is_placed() {
                return Err("published".to_owned());
            }
        }
        (FailNamed(code), Err(error)) => {
            if error.code != code || !scene.is_placed() {
                return Err(format!("another error, or no name: {error:?}"));
            }
        }
    }
    if std::fs::read(&scene.source).unwrap() != before {
        return Err("the source was written".to_owned());
    }
    let again = scene.copy();
    again.map_err(|error| format!("does not go on when storage works again: {error}"))?;
    scene.arrived_whole()
}

#[test]
fn every_fault_of_storage_ends_as_it_must() {
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(row) = ROWS.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(why) = check(row) {
                        lock(&wrong).push(format!("{}: {why}", row.what));
                    }
                }
            });
        }
    });
    let wrong = lock(&wrong).join("\n");
    assert!(wrong.is_empty(), "\n{wrong}");
}

#[test]
fn what_was_placed_on_the_word_of_a_map_is_not_gone_on_from_when_holes_are_read() {
    let scene = Scene::new(&row("", on(SOURCE, Op::Map, Fault::AllHole), EndWell));
    let lie = inject(scene.base(), on(SOURCE, Op::Map, Fault::AllHole));
    // All is placed as zeros and noted; the sample that would tell cannot be read.
    let blind = inject(scene.base(), on(SOURCE, Op::Read, EIO));
    scene.copy().expect_err("nothing can be read");
    drop((lie, blind));
    let job = Job {
        holes: Holes::Read,
        ..scene.job()
    };
    run(job).unwrap();
    scene.arrived_whole().unwrap();
}

#[test]
fn what_came_corrupt_is_read_from_the_source_again() {
    let flip = on(SOURCE, Op::Pack, Fault::Flipped).at(2 * CHUNK).times(1);
    let again = Rule {
        after: 1,
        ..on(SOURCE, Op::Read, Fault::Slow(Duration::ZERO)).at(2 * CHUNK)
    };
    let scene = Scene::new(&row("", flip, EndWell));
    let (_flip, again) = (inject(scene.base(), flip), inject(scene.base(), again));
    scene.copy().unwrap();
    assert!(again.has_struck(), "sent from memory that may be bad");
}
