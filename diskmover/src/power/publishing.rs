//! A power cut at each step of publishing, and of going on from what was published:
//! whatever part of it the medium has, in any order, the next one finds a part to go on
//! from, or all of the file with its receipt.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;

use super::{Grid, connect};
use crate::beneath::Names;
use crate::error::Result;
use crate::faults::{Fault, Injected, Op, Rule, inject};
use crate::journal::Journal;
use crate::messages::Receipt;
use crate::mode::CopyMode;
use crate::receipt::{self, FileId};
use crate::store::Store;
use crate::target::Care;
use crate::unreadable::Unreadable;
use crate::{device, opening, publish, sample};

const CONTENT: &[u8] = b"what the source holds";
const DEVICE: FileId = FileId {
    inode: 7,
    born_ns: 8,
};

/// What the power goes in the middle of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// A part gets its name.
    File,
    /// The same where a rename could replace something.
    FileByLink,
    /// What a device holds gets its receipt.
    Device,
    /// A device with a receipt is written again.
    ReopenDevice,
    /// A file becomes a part again.
    Reopen,
    /// By a link, too.
    ReopenByLink,
}

struct Scene {
    dir: tempfile::TempDir,
    grid: Arc<Grid>,
    names: Names,
    way: Way,
    _no_rename: Option<Injected>,
}

fn proof() -> Receipt {
    Receipt {
        volume: "disk".to_owned(),
        size: CONTENT.len() as u64,
        data: CONTENT.len() as u64,
        wire: 0,
        root: [5; 32],
        mode: CopyMode::Verbatim,
        unreadable: Unreadable::default(),
        allocated: None,
    }
}

impl Scene {
    /// Just before it, all so far durable but for content.
    fn new(way: Way) -> Scene {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let refused = match way {
            Way::FileByLink => Some(".part"),
            Way::ReopenByLink => Some("/disk"),
            _ => None,
        };
        let refusal = |file| Rule {
            file,
            op: Op::Rename,
            at: None,
            after: 0,
            times: u32::MAX,
            fault: Fault::Error(libc::EINVAL),
        };
        let scene = Scene {
            names: Names::open(dir.path(), "disk", sample::TAG).unwrap(),
            grid: Arc::default(),
            way,
            _no_rename: refused.map(|file| inject(dir.path(), refusal(file))),
            dir,
        };
        connect(Some(Arc::clone(&scene.grid)));
        scene.arrive().unwrap();
        if scene.reopens() {
            scene.publish().unwrap();
        }
        if way == Way::ReopenDevice {
            scene.publish_device().unwrap();
        }
        scene.grid.take_log();
        scene
    }

    /// The content comes, and is noted nowhere.
    fn arrive(&self) -> Result<()> {
        let part = opening::open_part(&self.names)?;
        Journal::create(&self.names, &sample::subject(sample::identity(1)))?;
        let held = match self.way {
            Way::Device | Way::ReopenDevice => File::create(self.device()).unwrap(),
            _ => part.try_clone().unwrap(),
        };
        Store::new(held).write_at(CONTENT, 0).unwrap();
        Ok(())
    }

    fn publish(&self) -> Result<()> {
        let part = opening::open_part(&self.names)?;
        let spec = sample::spec(self.dir.path(), Care::default());
        let length = CONTENT.len() as u64;
        publish::publish(&self.names, &part, &spec, &proof(), length)
    }

    fn publish_device(&self) -> Result<()> {
        let device = File::open(self.device()).unwrap();
        device::publish(&self.names, &device, DEVICE, &proof())
    }

    fn go(&self) -> Result<()> {
        match self.way {
            Way::File | Way::FileByLink => self.publish(),
            Way::Device => self.publish_device(),
            Way::ReopenDevice => {
                device::reopen(&self.names)?;
                // Whoever goes on writes to it at once.
                fs::write(self.device(), b"half of something else").unwrap();
                Ok(())
            }
            Way::Reopen | Way::ReopenByLink => publish::reopen(&self.names),
        }
    }

    fn reopens(&self) -> bool {
        matches!(self.way, Way::Reopen | Way::ReopenByLink)
    }

    fn is_device(&self) -> bool {
        matches!(self.way, Way::Device | Way::ReopenDevice)
    }

    fn device(&self) -> PathBuf {
        self.dir.path().join("device")
    }

    fn has(&self, name: &str) -> bool {
        self.dir.path().join(name).exists()
    }

    /// Fails unless what stands here is what was before, or all that was to be.
    fn look(&self, when: &str) {
        if self.is_device() {
            if receipt::read(&self.names).unwrap().is_none() {
                let can_go_on = self.way == Way::ReopenDevice || self.has(&self.names.journal);
                assert!(can_go_on, "no journal, {when}");
                return;
            }
            let held = fs::read(self.device()).unwrap();
            assert_eq!(held, CONTENT, "a receipt for something else, {when}");
            return;
        }
        let found = receipt::published(&self.names).unwrap();
        let Ok(named) = fs::read(self.dir.path().join("disk")) else {
            assert!(self.has(&self.names.part), "neither file nor part, {when}");
            let can_go_on = self.reopens() || self.has(&self.names.journal);
            assert!(can_go_on, "no journal, {when}");
            return;
        };
        assert_eq!(named, CONTENT, "something else is published, {when}");
        let found = found.unwrap_or_else(|| panic!("a file without its receipt, {when}"));
        let stamp = receipt::file_stamp(&self.names, "disk").unwrap();
        found.check_untouched(&self.names, stamp).expect(when);
    }

    /// The copy is made again, as far as it has to be.
    fn go_on(&self, when: &str) {
        let is_there = match self.is_device() {
            true => receipt::read(&self.names).unwrap().is_some(),
            false => receipt::published(&self.names).unwrap().is_some(),
        };
        if !is_there {
            self.arrive().expect(when);
            let again = match self.is_device() {
                true => self.publish_device(),
                false => self.publish(),
            };
            again.expect(when);
        }
        self.look(when);
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        connect(None);
    }
}

/// Loses what the bits of `lost` say, one after the other; how many could be.
fn lose(grid: &Grid, lost: u64) -> u32 {
    let mut asked = 0;
    grid.lose_those(|| {
        asked += 1;
        lost >> (asked - 1) & 1 != 0
    });
    asked
}

/// The power goes at every operation, and any part of what was not durable with it.
fn survives_every_cut(way: Way) {
    let whole = Scene::new(way);
    let before = whole.grid.operations();
    whole.go().unwrap();
    let operations = whole.grid.operations() - before;
    drop(whole);
    for cut in 1..=operations + 1 {
        let (mut lost, mut can_be_lost) = (0, 0);
        while lost >> can_be_lost == 0 {
            let when = format!("{way:?}, power cut at {cut}, lost {lost:b}");
            let scene = Scene::new(way);
            scene.grid.cut_after(cut);
            assert_eq!(scene.go().is_ok(), cut > operations, "{when}");
            can_be_lost = lose(&scene.grid, lost);
            scene.look(&when);
            scene.go_on(&when);
            lost += 1;
        }
    }
}

#[test]
fn a_file_is_published_with_its_receipt_or_still_a_part() {
    survives_every_cut(Way::File);
}

#[test]
fn so_it_is_where_a_link_takes_the_place_of_the_rename() {
    survives_every_cut(Way::FileByLink);
}

#[test]
fn a_device_has_a_receipt_when_it_holds_the_volume() {
    survives_every_cut(Way::Device);
    survives_every_cut(Way::ReopenDevice);
}

#[test]
fn what_is_to_be_gone_on_from_is_published_or_a_part() {
    survives_every_cut(Way::Reopen);
    survives_every_cut(Way::ReopenByLink);
}

const SYNC: &str = "sync the directory";

fn steps(way: Way) -> Vec<String> {
    let scene = Scene::new(way);
    scene.go().unwrap();
    let log = scene.grid.take_log().into_iter();
    log.map(|step| step.replace(".disk.dm-t.", "")).collect()
}

/// A cut shows most of these; of the others a later attempt makes the loss good.
#[test]
fn every_step_is_made_durable_before_the_next_one_builds_on_it() {
    let proven = [
        "create receipt.new",
        "sync receipt.new",
        "replace receipt by receipt.new",
        SYNC,
    ];
    let tidied = ["remove journal", SYNC];
    let named = ["rename part to disk", SYNC];
    let linked = ["link part to disk", SYNC, "remove part", SYNC];
    let file = |named: &[&'static str]| [&["sync part"], &proven[..], named, &tidied].concat();
    assert_eq!(steps(Way::File), file(&named));
    assert_eq!(steps(Way::FileByLink), file(&linked));
    let device = [&["sync device"], &proven[..], &tidied].concat();
    assert_eq!(steps(Way::Device), device);
    assert_eq!(steps(Way::ReopenDevice), ["remove receipt", SYNC]);
    let reopened = ["rename disk to part", SYNC, "remove receipt", SYNC];
    assert_eq!(steps(Way::Reopen), reopened);
    let linked = [
        "link disk to part",
        SYNC,
        "remove disk",
        SYNC,
        "remove receipt",
        SYNC,
    ];
    assert_eq!(steps(Way::ReopenByLink), linked);
}
