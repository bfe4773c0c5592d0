//! Sources that change: another pass over what was placed, never a mix.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use diskmover::digest::CHUNK;
use diskmover::error::Code;
use diskmover::local;
use diskmover::push::Push;
use diskmover::source::{FileSource, Source};

use crate::rig::{Rig, SESSION, TAG, eventually, finish, noise, run};

const SIZE: u64 = 24 * CHUNK + 77;
/// How often a test tries to be in time for something.
const ROUNDS: usize = 10;

fn write(path: &Path, data: &[u8], offset: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(data, offset).unwrap();
}

fn assert_same(rig: &Rig, source: &Path) {
    let target = rig.root().join("disk");
    assert!(std::fs::read(source).unwrap() == std::fs::read(&target).unwrap());
}

/// A copy that has come half way, and its source, to which `then` happens while some of
/// it is still to come.
fn half(content: &[u8], then: impl Fn(&Path, &Push)) -> (Rig, PathBuf, Push) {
    for _ in 0..ROUNDS {
        let rig = Rig::new();
        let source = rig.source("disk", SIZE, &[(0, content)]);
        rig.open(&[("disk", SIZE)]).unwrap();
        let mut job = rig.job(&[&source]);
        job.limit = Some(20 << 20);
        let push = Push::start(job).unwrap();
        eventually("half of it arrives", || {
            (push.progress().done >= SIZE / 2).then_some(())
        });
        // Unless all has arrived meanwhile, it does not end before this is taken away.
        push.set_limit(Some(1)).unwrap();
        then(&source, &push);
        if push.progress().done < SIZE {
            return (rig, source, push);
        }
    }
    panic!("all had arrived before, {ROUNDS} times");
}

#[test]
fn what_changes_meanwhile_is_sent_in_another_pass() {
    let content = noise(1, SIZE as usize);
    let (rig, source, push) = half(&content, |source, _| {
        write(source, b"changed", 3);
        write(source, &[0; 2 * CHUNK as usize], 2 * CHUNK);
        write(source, b"end", SIZE - 3);
    });
    push.set_limit(None).unwrap();
    let receipts = finish(&push).unwrap();
    let placed = std::fs::read(rig.root().join("disk")).unwrap();
    assert!(placed != content, "a change went unnoticed");
    assert_same(&rig, &source);
    assert_eq!(receipts[0].root, local::digest(&source).unwrap().2);
    // A connection that breaks, on a busy machine, sends some of it again.
    let wire = push.progress().wire;
    assert!(wire < SIZE + SIZE / 2, "sent twice: {wire} bytes");
}

#[test]
fn a_source_that_changes_between_attempts_is_compared_with_what_is_there() {
    let content = noise(2, SIZE as usize);
    let (rig, source, _) = half(&content, |_, push| push.cancel());
    // The farewell may be lost on a busy machine: then the receiver keeps the part
    // for a sender that comes back, until whoever opened the session closes it.
    rig.receiver.close_session(SESSION);
    write(&source, b"changed", 3);
    write(&source, b"changed", 5 * CHUNK);
    rig.open_as("s2", TAG, &[("disk", SIZE)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.session = "s2".into();
    let push = Push::start(job).unwrap();
    finish(&push).unwrap();
    assert_same(&rig, &source);
    let wire = push.progress().wire;
    assert!(wire < SIZE, "all was sent again: {wire} bytes");
}

/// Ends the writer, also when the copy panics.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_source_that_is_written_all_the_time_is_refused_in_the_end() {
    let rig = Rig::new();
    let source = rig.source("disk", SIZE, &[(0, &noise(3, SIZE as usize))]);
    rig.open(&[("disk", SIZE)]).unwrap();
    let over = AtomicBool::new(false);
    let ended = std::thread::scope(|scope| {
        let _over = SetAtEnd(&over);
        scope.spawn(|| {
            let mut count = 0u64;
            while !over.load(Ordering::Relaxed) {
                write(&source, &count.to_le_bytes(), count % 20 * CHUNK);
                count += 1;
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        run(rig.job(&[&source]))
    });
    let error = ended.unwrap_err();
    assert_eq!(error.code, Code::SourceChanged, "{error}");
    assert!(!rig.root().join("disk").exists(), "a mix was published");
}

/// A program that has a file mapped and stores to it.
struct Mapped {
    path: PathBuf,
    program: Child,
}

impl Mapped {
    fn new(path: &Path) -> Mapped {
        let mut program = Command::new("xfs_io");
        program
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        let mut program = program.spawn().unwrap();
        let commands = program.stdin.as_mut().unwrap();
        commands.write_all(b"mmap -rw 0 4096\n").unwrap();
        Mapped {
            path: path.to_owned(),
            program,
        }
    }

    fn store(&mut self, byte: u8) {
        let commands = self.program.stdin.as_mut().unwrap();
        writeln!(commands, "mwrite -S {byte} 0 4096").unwrap();
        let file = File::open(&self.path).unwrap();
        eventually("it is stored", || {
            let mut first = [0];
            file.read_exact_at(&mut first, 0).unwrap();
            (first == [byte]).then_some(())
        });
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // It ends with its input.
        drop(self.program.stdin.take());
        let _ = self.program.wait();
    }
}

#[test]
fn what_is_stored_in_memory_that_was_dirty_before_is_noticed() {
    let rig = Rig::new();
    let source = rig.source("disk", CHUNK, &[(0, &noise(4, CHUNK as usize))]);
    let mut mapped = Mapped::new(&source);
    mapped.store(1);
    let opened = FileSource::open(&source).unwrap();
    opened.check_unchanged().unwrap();
    for byte in [2, 3] {
        mapped.store(byte);
        let error = opened.check_unchanged().unwrap_err();
        assert_eq!(error.code, Code::SourceChanged, "{error}");
        opened.renew().unwrap();
        opened.check_unchanged().unwrap();
    }
}

#[test]
fn a_write_that_has_begun_is_waited_for_at_the_opening() {
    let rig = Rig::new();
    // One call, which takes longer than an opening; of all that it writes the times tell
    // when it begins.
    let size = 256 * CHUNK;
    let source = rig.source("disk", size, &[]);
    let file = File::options()
        .read(true)
        .write(true)
        .open(&source)
        .unwrap();
    let byte = |at| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        byte[0]
    };
    let data = vec![1; size as usize];
    std::thread::scope(|scope| {
        scope.spawn(|| file.write_all_at(&data, 0).unwrap());
        while byte(0) == 0 {
            std::thread::yield_now();
        }
        FileSource::open(&source).unwrap();
        assert_eq!(byte(size - 1), 1, "its end is written afterwards");
    });
}
