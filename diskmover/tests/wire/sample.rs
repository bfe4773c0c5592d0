//! A volume called "disk", as tests describe it to what lies behind the wire: what its
//! source announces, where it goes, what its journal is about.

use std::path::Path;

use diskmover::budget::Budget;
use diskmover::digest::Hash;
use diskmover::error::Result;
use diskmover::journal::Subject;
use diskmover::messages::Receipt;
use diskmover::mode::CopyMode;
use diskmover::opening::{self, Announced};
use diskmover::receipt::FileId;
use diskmover::revision::Revision;
use diskmover::source::Identity;
use diskmover::target::{Care, Opened, Target, TargetSpec};

/// Tag of the copies of `open`.
pub const TAG: &str = "t";
/// Their part.
pub const PART: &str = ".disk.dm-t.part";

/// A source of this size.
pub fn identity(size: u64) -> Identity {
    Identity {
        size,
        mtime_ns: 1,
        ctime_ns: 2,
        inode: 3,
    }
}

/// Its place in a directory.
pub fn spec(dir: &Path, care: Care) -> TargetSpec {
    TargetSpec {
        volume: "disk".to_owned(),
        root: dir.to_owned(),
        name: "disk".to_owned(),
        size: None,
        mode: None,
        uid: None,
        gid: None,
        care,
    }
}

/// What the journal of a copy of this source is about.
pub fn subject(identity: Identity) -> Subject {
    Subject {
        identity,
        tag: [4; 32],
        part: FileId {
            inode: 5,
            born_ns: 6,
        },
    }
}

/// Opens the target of a copy that has published nothing yet.
pub fn open(dir: &Path, care: Care, identity: Identity) -> Result<Box<Target>> {
    match announce(&spec(dir, care), TAG, identity, None)? {
        Opened::Receiving(target) => Ok(target),
        Opened::Published(_) => panic!("published before its time"),
    }
}

/// What a copy has published already, for a sender that knows what changed since:
/// nothing.
pub fn unchanged(spec: &TargetSpec, tag: &str, size: u64, since: Hash) -> Receipt {
    let revision = Revision::new(since);
    match announce(spec, tag, identity(size), Some(revision)).unwrap() {
        Opened::Published(receipt) => receipt,
        Opened::Receiving(_) => panic!("it is to be written"),
    }
}

fn announce(
    spec: &TargetSpec,
    tag: &str,
    identity: Identity,
    revision: Option<Revision>,
) -> Result<Opened> {
    let announced = Announced {
        identity,
        mode: CopyMode::Verbatim,
        revision,
    };
    let share = Budget::new(u64::MAX).share();
    opening::open(spec, tag, &announced, share, &|| true)
}
