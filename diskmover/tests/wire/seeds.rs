//! Older copies and base images at the target, reused block by block.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use diskmover::base::PIECE;
use diskmover::digest::CHUNK;
use diskmover::push::Push;
use diskmover::seeds::SeedSpec;

use crate::rig::{Rig, eventually, finish, noise};

const SIZE: u64 = 70 * CHUNK + 5 * 4096;

/// An image with data at both ends and in the middle; sparse between.
fn image(rig: &Rig, name: &str) -> PathBuf {
    rig.source(
        name,
        SIZE,
        &[
            (0, &noise(1, 8 << 20)),
            (40 * CHUNK, &noise(2, 4 << 20)),
            (SIZE - 77, &noise(3, 77)),
        ],
    )
}

fn write(path: &Path, data: &[u8], offset: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(data, offset).unwrap();
}

/// Lets the next copies reuse these files of the receiver's directory.
fn sow(rig: &Rig, names: &[&str]) {
    let seed = |name: &&str| SeedSpec {
        root: rig.targets.borrow().clone(),
        name: (*name).to_owned(),
    };
    rig.care.borrow_mut().seeds = names.iter().map(seed).collect();
}

/// Starts a copy of a source to a name.
fn begin(rig: &Rig, source: &Path, name: &str, limit: Option<u64>) -> Push {
    rig.open(&[(name, SIZE)]).unwrap();
    let mut job = rig.job(&[source]);
    job.volumes[0].0 = name.to_owned();
    job.limit = limit;
    Push::start(job).unwrap()
}

/// Copies; returns the bytes that were sent.
fn copy(rig: &Rig, source: &Path, name: &str) -> u64 {
    let push = begin(rig, source, name, None);
    finish(&push).unwrap();
    let target = rig.targets.borrow().join(name);
    assert!(
        std::fs::read(source).unwrap() == std::fs::read(target).unwrap(),
        "{name} differs"
    );
    push.progress().wire
}

#[test]
fn a_second_move_sends_what_has_changed_since_the_first() {
    let rig = Rig::new();
    let source = image(&rig, "source");
    assert!(copy(&rig, &source, "old") > 12 << 20);
    sow(&rig, &["old"]);
    let hashes = 13 * 700; // of 13 chunks with data, with their headers
    let wire = copy(&rig, &source, "same");
    assert!(wire < hashes + 2000, "{wire} bytes for no change");
    write(&source, b"changed", 5 * CHUNK + 9);
    write(&source, b"filled", 20 * CHUNK);
    write(&source, &[0; 3 << 20], CHUNK / 2);
    let wire = copy(&rig, &source, "new");
    let patches = 2 * PIECE as u64;
    assert!(
        wire < patches + hashes + 4000,
        "{wire} bytes for two blocks"
    );
    // The seed is as it was.
    assert!(rig.root().join("old").exists());
}

#[test]
fn base_images_are_reused_wherever_a_block_lies() {
    let rig = Rig::new();
    let seed = noise(9, 6 << 20);
    std::fs::write(rig.root().join("base"), &seed).unwrap();
    std::fs::write(rig.root().join("other"), noise(8, 1 << 20)).unwrap();
    let shifted = [&seed[3 * PIECE..5 << 20], &noise(7, 2 * PIECE)].concat();
    let source = rig.source("source", SIZE, &[(50 * CHUNK, &shifted)]);
    sow(&rig, &["missing", "other", "base"]);
    let wire = copy(&rig, &source, "disk");
    assert!(wire < 3 * PIECE as u64, "{wire} bytes were sent");
}

#[test]
fn the_list_of_hashes_spares_the_reading_but_is_never_believed() {
    let rig = Rig::new();
    let source = image(&rig, "source");
    copy(&rig, &source, "old");
    sow(&rig, &["old"]);
    copy(&rig, &source, "first");
    assert!(rig.root().join(".old.dm-hashes").exists());
    // The seed changes after its list was read: the block is sent instead.
    let push = begin(&rig, &source, "second", Some(1));
    eventually("the seeds are open", || {
        (push.progress().connections > 0 && push.progress().wire > 0).then_some(())
    });
    for chunk in 1..8 {
        write(&rig.root().join("old"), b"rot", chunk * CHUNK);
    }
    push.set_limit(None).unwrap();
    finish(&push).unwrap();
    let target = rig.root().join("second");
    assert!(std::fs::read(&source).unwrap() == std::fs::read(target).unwrap());
    let wire = push.progress().wire;
    assert!(wire > PIECE as u64 && wire < 2 << 20, "{wire} bytes");
}

#[test]
fn a_seed_that_leads_out_of_its_root_is_not_read() {
    let rig = Rig::new();
    let source = image(&rig, "source");
    std::os::unix::fs::symlink(&source, rig.root().join("link")).unwrap();
    sow(&rig, &["link", "../out/source"]);
    assert!(copy(&rig, &source, "disk") > 12 << 20, "it was read");
}

/// A mounted btrfs.
struct Btrfs(PathBuf);

impl Btrfs {
    fn new(rig: &Rig) -> Btrfs {
        let (image, point) = (rig.root().join("image"), rig.root().join("mount"));
        File::create(&image).unwrap().set_len(256 << 20).unwrap();
        std::fs::create_dir(&point).unwrap();
        let run = |command: &mut Command| {
            let output = command.output().unwrap();
            assert!(output.status.success(), "{output:?}");
        };
        run(Command::new("mkfs.btrfs").arg("-q").arg(&image));
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&point));
        Btrfs(point)
    }

    /// Bytes in use.
    fn used(&self) -> u64 {
        let synced = Command::new("sync").arg("-f").arg(&self.0).status();
        assert!(synced.unwrap().success());
        let space = rustix::fs::statvfs(&self.0).unwrap();
        (space.f_blocks - space.f_bfree) * space.f_frsize
    }
}

impl Drop for Btrfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn blocks_are_shared_where_the_file_system_can() {
    let rig = Rig::new();
    let btrfs = Btrfs::new(&rig);
    *rig.targets.borrow_mut() = btrfs.0.clone();
    let source = image(&rig, "source");
    copy(&rig, &source, "old");
    let before = btrfs.used();
    sow(&rig, &["old"]);
    copy(&rig, &source, "new");
    let taken = btrfs.used() - before;
    assert!(taken < 4 << 20, "{taken} bytes for a copy of what is there");
    assert!(btrfs.0.join("new").metadata().unwrap().blocks() * 512 > 8 << 20);
}
