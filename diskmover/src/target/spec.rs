//! What is asked of a target: where it goes, and how carefully.

use std::path::PathBuf;

use crate::seeds::SeedSpec;

/// A volume that may be received, and where to.
#[derive(Clone, Debug)]
pub struct TargetSpec {
    /// Name on the wire.
    pub volume: String,
    /// Directory to stay beneath.
    pub root: PathBuf,
    /// Target relative to it.
    pub name: String,
    /// Exact size; None takes what the sender announces.
    pub size: Option<u64>,
    /// Permission bits when published. None leaves what the file has: of a new one
    /// 0600, of one that is brought up to date its own. Owner and group likewise.
    pub mode: Option<u32>,
    /// Owner when published.
    pub uid: Option<u32>,
    /// Group when published.
    pub gid: Option<u32>,
    /// Where and how carefully it is placed.
    pub care: Care,
}

/// Where and how carefully a volume is placed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Care {
    /// What the name stands for.
    pub place: Place,
    /// What is believed of an earlier attempt.
    pub trust: Trust,
    /// What is proven before it is published.
    pub proof: Proof,
    /// Files whose content may be reused.
    pub seeds: Vec<SeedSpec>,
    /// What is made of it.
    pub container: Container,
    /// What this copy has published may be brought up to date in place, by a
    /// sender that knows what changed since.
    pub update: bool,
    /// A copy of a source that could not be read everywhere is published, and marked.
    pub degraded: bool,
}

impl Care {
    /// Whether the medium has to give back what was written before it is published.
    pub fn reads_back(&self) -> bool {
        match self.proof {
            Proof::Usual => self.place != Place::File,
            Proof::Written => false,
            Proof::Readback => true,
        }
    }
}

/// What a target is made into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Container {
    /// Nothing: it gets the bytes that are sent.
    #[default]
    AsSent,
    /// A qcow2 image, of what a guest sees.
    Qcow2,
}

/// What the name of a target stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// A file that is not there yet.
    #[default]
    File,
    /// A block device, which is overwritten. Nothing can be kept beside it, so
    /// journal and receipt go to the directory `state`.
    Device {
        /// Where journal and receipt are kept.
        state: PathBuf,
    },
}

/// How far a journal is believed when a copy goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// What it noted last is read back and hashed, the rest is believed.
    #[default]
    Normal,
    /// All is read back and hashed.
    Paranoid,
}

/// What is proven before a target is published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Proof {
    /// Of a device `Readback`, of a file `Written`.
    #[default]
    Usual,
    /// That what was handed to the system is what the sender read.
    Written,
    /// That the medium gives it back, too.
    Readback,
}
