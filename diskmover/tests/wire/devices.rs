//! Block devices as sources and targets: real loop devices, which need root.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use diskmover::base::PIECE;
use diskmover::digest::CHUNK;
use diskmover::error::Code;
use diskmover::push::Push;
use diskmover::salvage::OnReadError;
use diskmover::target::{Care, Place, TargetSpec};
use diskmover::{device, local};
use rustix::fs::{FlockOperation, OFlags};

use crate::rig::{Rig, SESSION, TAG, eventually, finish, noise, run};
use crate::sample;

/// Sizes of sectors that a device can have here: those beyond a page need Linux 6.15.
fn sectors() -> Vec<u32> {
    let dir = tempfile::tempdir().unwrap();
    let sizes = [512, 4096, 16384].into_iter();
    let is_known = |sector: &u32| {
        *sector <= 4096 || Loop::make(dir.path().join("backing"), CHUNK, *sector).is_some()
    };
    sizes.filter(is_known).collect()
}

/// A loop device over a sparse file.
pub struct Loop {
    pub path: PathBuf,
    pub backing: PathBuf,
}

impl Loop {
    pub fn new(backing: PathBuf, size: u64, sector: u32) -> Loop {
        Loop::make(backing, size, sector).expect("no loop device")
    }

    /// The same; None when the kernel has none.
    fn make(backing: PathBuf, size: u64, sector: u32) -> Option<Loop> {
        File::create(&backing).unwrap().set_len(size).unwrap();
        // One at a time: who finds the same number free, and is too late, has it open for
        // a moment, in which a sector of another size seems not to be noticed (EIO).
        let control = File::open("/dev/loop-control").unwrap();
        rustix::fs::flock(&control, FlockOperation::LockExclusive).unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(&backing)
            .output()
            .unwrap();
        let path = String::from_utf8(output.stdout).unwrap().trim().into();
        output.status.success().then_some(Loop { path, backing })
    }

    pub fn name(&self) -> &str {
        self.path.file_name().unwrap().to_str().unwrap()
    }

    pub fn write(&self, data: &[u8], offset: u64) {
        let file = File::options().write(true).open(&self.path).unwrap();
        file.write_all_at(data, offset).unwrap();
        file.sync_all().unwrap();
    }

    pub fn read(&self, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        let file = File::open(&self.path).unwrap();
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
    }
}

/// A mounted file system.
pub struct Mount {
    pub point: PathBuf,
}

impl Mount {
    fn new(device: &Path, point: PathBuf) -> Mount {
        Mount::of(&[device.to_str().unwrap()], point)
    }

    /// Of what these arguments of `mount` say.
    pub fn of(what: &[&str], point: PathBuf) -> Mount {
        std::fs::create_dir(&point).unwrap();
        let mounted = Command::new("mount").args(what).arg(&point).status();
        assert!(mounted.unwrap().success());
        Mount { point }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.point).status();
    }
}

/// Keeps the kernel from counting what a device does.
pub struct Uncounted(String);

impl Uncounted {
    pub fn new(device: &Loop) -> Uncounted {
        let switch = format!("/sys/block/{}/queue/iostats", device.name());
        std::fs::write(&switch, "0").unwrap();
        Uncounted(switch)
    }
}

impl Drop for Uncounted {
    fn drop(&mut self) {
        let _ = std::fs::write(&self.0, "1");
    }
}

/// A rig whose targets are devices.
fn rig() -> Rig {
    let rig = Rig::new();
    let state = rig.root().join("state");
    std::fs::create_dir(&state).unwrap();
    *rig.care.borrow_mut() = Care {
        place: Place::Device { state },
        ..Care::default()
    };
    *rig.targets.borrow_mut() = "/dev".into();
    rig
}

/// Copies a source to a device of another name.
fn copy(rig: &Rig, source: &Path, target: &Loop, size: u64) -> Push {
    rig.open(&[(target.name(), size)]).unwrap();
    let mut job = rig.job(&[source]);
    job.volumes[0].0 = target.name().to_owned();
    Push::start(job).unwrap()
}

pub fn loops(rig: &Rig, size: u64, sector: u32) -> Loop {
    Loop::new(rig.root().join(format!("backing-{sector}")), size, sector)
}

#[test]
fn a_device_full_of_other_data_becomes_the_image_whatever_its_sectors() {
    for sector in sectors() {
        let rig = rig();
        // Odd at its end, with a run of zeros, a zero chunk and scattered blocks.
        let size = 70 * CHUNK + 3 * 4096 + 777;
        let pieces: &[(u64, &[u8])] = &[
            (0, &noise(1, 2 << 20)),
            (5 * CHUNK + 4096, b"block"),
            (69 * CHUNK, &noise(2, 1 << 20)),
            (size - 777, &noise(3, 777)),
        ];
        let source = rig.source("image", size, pieces);
        let target = loops(&rig, 72 * CHUNK, sector);
        target.write(&noise(4, 72 << 20), 0);
        let push = copy(&rig, &source, &target, size);
        let receipts = finish(&push).unwrap();
        let placed = target.read(72 * CHUNK);
        assert!(
            placed[..size as usize] == std::fs::read(&source).unwrap(),
            "sectors of {sector}: other content"
        );
        assert!(
            placed[size as usize..] == noise(4, 72 << 20)[size as usize..],
            "sectors of {sector}: what lies behind the image was touched"
        );
        assert_eq!(receipts[0].root, local::digest(&source).unwrap().2);
        // Zeroed by giving space back, so that thin volumes stay thin.
        let allocated = std::fs::metadata(&target.backing).unwrap().blocks() * 512;
        assert!(
            allocated < 8 << 20,
            "sectors of {sector}: {allocated} bytes"
        );
        // The same copy again is answered by the receipt.
        let push = copy(&rig, &source, &target, size);
        finish(&push).unwrap();
        assert_eq!(push.progress().wire, 0);
        // Until somebody uses what was placed.
        target.write(b"used", 9);
        let error = finish(&copy(&rig, &source, &target, size)).unwrap_err();
        assert_eq!(error.code, Code::TargetExists, "{error}");
    }
}

#[test]
fn devices_are_sources_too() {
    for sector in sectors() {
        let rig = Rig::new();
        let size = 9 * CHUNK + 4 * 4096;
        let source = loops(&rig, size, sector);
        source.write(&noise(5, 3 << 20), 4 * CHUNK + 4096);
        rig.open(&[("disk", size)]).unwrap();
        let mut job = rig.job(&[&source.path]);
        job.volumes[0].0 = "disk".into();
        run(job).unwrap();
        let target = rig.root().join("disk");
        assert!(std::fs::read(&target).unwrap() == source.read(size));
        let allocated = std::fs::metadata(&target).unwrap().blocks() * 512;
        assert!(allocated < 4 << 20, "zeros took {allocated} bytes");
    }
}

#[test]
fn a_device_goes_on_where_it_stopped_and_is_a_base_the_next_time() {
    let rig = rig();
    let size = 24 * CHUNK;
    let image = noise(6, size as usize);
    let source = rig.source("image", size, &[(0, &image)]);
    let target = loops(&rig, size, 512);
    rig.open(&[(target.name(), size)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.volumes[0].0 = target.name().to_owned();
    job.limit = Some(20 << 20);
    let push = Push::start(job).unwrap();
    eventually("half of it arrives", || {
        (push.progress().done >= size / 2).then_some(())
    });
    push.cancel();
    let push = copy(&rig, &source, &target, size);
    finish(&push).unwrap();
    let progress = push.progress();
    assert!(progress.resumed >= size / 2 && progress.wire <= size / 2 + CHUNK);
    // Another copy, of a source that has changed a little.
    let state = rig.root().join("state");
    device::discard(&state, target.name(), TAG).unwrap();
    let file = File::options().write(true).open(&source).unwrap();
    file.write_all_at(b"changed", 7 * CHUNK + 9).unwrap();
    let push = copy(&rig, &source, &target, size);
    finish(&push).unwrap();
    let wire = push.progress().wire;
    assert!(wire < 2 * PIECE as u64, "{wire} bytes for one change");
    assert!(target.read(size) == std::fs::read(&source).unwrap());
}

#[test]
fn a_device_that_cannot_be_written_is_refused_before_anything_is() {
    let rig = rig();
    let source = rig.source("image", 9 * CHUNK, &[(0, &noise(7, 9 << 20))]);
    let refused = |target: &Loop, size| {
        let push = copy(&rig, &source, target, size);
        finish(&push).unwrap_err()
    };
    let small = loops(&rig, 8 * CHUNK, 512);
    let error = refused(&small, 9 * CHUNK);
    assert_eq!(error.code, Code::NoSpace, "{error}");
    assert!(small.read(8 * CHUNK).iter().all(|byte| *byte == 0));

    let mounted = loops(&rig, 64 * CHUNK, 4096);
    let mkfs = Command::new("mkfs.ext4")
        .arg("-q")
        .arg(&mounted.path)
        .output();
    assert!(mkfs.unwrap().status.success());
    let mount = Mount::new(&mounted.path, rig.root().join("mount"));
    let error = refused(&mounted, 9 * CHUNK);
    assert_eq!(error.code, Code::TargetBusy, "{error}");
    drop(mount);

    let file = rig.root().join("a file");
    std::fs::write(&file, b"x").unwrap();
    *rig.targets.borrow_mut() = rig.root();
    rig.open(&[("a file", 9 * CHUNK)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.volumes[0].0 = "a file".into();
    let error = run(job).unwrap_err();
    assert_eq!(error.code, Code::TargetPath, "{error}");
}

/// What a restart of the host makes of a device: its number is given out anew, and
/// nobody knows any more what was written to it.
fn restarted(target: Loop) -> Loop {
    let (path, backing) = (target.path.clone(), target.backing.clone());
    drop(target);
    eventually("nobody else has the number", || {
        let mut losetup = Command::new("losetup");
        let again = losetup.arg(&path).arg(&backing).status();
        again.unwrap().success().then_some(())
    });
    Loop { path, backing }
}

#[test]
fn a_device_answers_after_a_restart_of_its_host_as_long_as_it_holds_the_copy() {
    let rig = rig();
    let size = 70 * CHUNK + 777;
    let source = rig.source(
        "image",
        size,
        &[(0, &noise(8, 3 << 20)), (size - 9, b"the end")],
    );
    let target = loops(&rig, 72 * CHUNK, 512);
    let receipts = finish(&copy(&rig, &source, &target, size)).unwrap();
    let target = restarted(target);
    let push = copy(&rig, &source, &target, size);
    assert_eq!(finish(&push).unwrap(), receipts);
    assert_eq!(push.progress().wire, 0, "it was sent again");
    // Behind the volume, or with what was there: it holds the copy all the same.
    target.write(b"behind", 71 * CHUNK);
    target.write(&noise(8, 1 << 20), 0);
    assert_eq!(
        finish(&copy(&rig, &source, &target, size)).unwrap(),
        receipts
    );
    // And not any more once somebody used it.
    let target = restarted(target);
    target.write(b"used", size - 4);
    let error = finish(&copy(&rig, &source, &target, size)).unwrap_err();
    assert_eq!(error.code, Code::TargetExists, "{error}");
    assert!(
        target.read(size)[size as usize - 4..] == *b"used",
        "it was written to"
    );
}

#[test]
fn a_device_replaced_after_its_copy_is_not_taken_for_the_copy() {
    let rig = rig();
    let source = rig.source("image", CHUNK, &[(0, &noise(8, 1 << 20))]);
    let mut target = loops(&rig, CHUNK, 512);
    finish(&copy(&rig, &source, &target, CHUNK)).unwrap();
    // The same name for another disk: of other content, or too small for any.
    for content in [noise(9, 1 << 20), noise(8, 1 << 19)] {
        std::fs::write(&target.backing, &content).unwrap();
        target = restarted(target);
        let error = finish(&copy(&rig, &source, &target, CHUNK)).unwrap_err();
        assert_eq!(error.code, Code::TargetExists, "{error}");
        assert!(std::fs::read(&target.backing).unwrap() == content);
    }
}

#[test]
fn a_device_whose_writes_were_not_counted_is_read_before_it_is_taken_for_the_copy() {
    let rig = rig();
    let source = rig.source("image", CHUNK, &[(0, &noise(8, 1 << 20))]);
    let target = loops(&rig, CHUNK, 512);
    let _uncounted = Uncounted::new(&target);
    let receipts = finish(&copy(&rig, &source, &target, CHUNK)).unwrap();
    let again = finish(&copy(&rig, &source, &target, CHUNK)).unwrap();
    assert_eq!(again[0].root, receipts[0].root);
    target.write(b"unseen", 9);
    let error = finish(&copy(&rig, &source, &target, CHUNK)).unwrap_err();
    assert_eq!(error.code, Code::TargetExists, "{error}");
}

#[test]
fn what_a_device_has_lost_is_told_by_its_sectors_and_no_bitmap_builds_on_it() {
    for sector in sectors() {
        let rig = rig();
        rig.care.borrow_mut().degraded = true;
        let size = 4 * CHUNK;
        let good = 2 * CHUNK + 3 * 512;
        let source = Loop::new(rig.root().join("source"), size, sector);
        // What lies behind the end of the file gives EIO.
        let backing = File::options().write(true).open(&source.backing).unwrap();
        backing.write_all_at(&noise(1, size as usize), 0).unwrap();
        backing.set_len(good).unwrap();
        let target = loops(&rig, size, sector);
        rig.open(&[(target.name(), size)]).unwrap();
        let mut job = rig.job(&[&source.path]);
        job.volumes[0].0 = target.name().to_owned();
        job.on_read_error = OnReadError::Zero;
        let receipt = run(job).unwrap().remove(0);
        let first = good / u64::from(sector) * u64::from(sector);
        assert_eq!(receipt.unreadable.ranges(), [first..size], "{sector}");
        let mut expected = noise(1, size as usize);
        expected[first as usize..].fill(0);
        assert!(target.read(size) == expected, "{sector}");

        rig.receiver.close_session(SESSION);
        rig.care.borrow_mut().update = true;
        let spec = TargetSpec {
            volume: target.name().to_owned(),
            name: target.name().to_owned(),
            ..sample::spec(Path::new("/dev"), rig.care.borrow().clone())
        };
        let found = sample::unchanged(&spec, TAG, size, receipt.root);
        assert_eq!(found.unreadable, receipt.unreadable);
    }
}

#[test]
fn a_device_that_is_used_for_a_moment_is_waited_for() {
    let rig = rig();
    let target = loops(&rig, CHUNK, 512);
    let excl = OFlags::EXCL.bits() as i32;
    let holder = File::options()
        .read(true)
        .custom_flags(excl)
        .open(&target.path)
        .unwrap();
    let spec = TargetSpec {
        volume: "disk".into(),
        root: "/dev".into(),
        name: target.name().to_owned(),
        size: None,
        mode: None,
        uid: None,
        gid: None,
        care: Care::default(),
    };
    let find = |go_on: &(dyn Fn() -> bool + Sync)| {
        device::find(&spec, &rig.root(), TAG, CHUNK, None, go_on).map(drop)
    };
    assert_eq!(find(&|| false).unwrap_err().code, Code::TargetBusy);
    let holder = Mutex::new(Some(holder));
    let lets_go = || {
        holder.lock().unwrap().take();
        true
    };
    find(&lets_go).unwrap();
}
