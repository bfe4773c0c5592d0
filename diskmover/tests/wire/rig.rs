//! A receiver in this process, a directory to receive into, and sources.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use diskmover::digest::CHUNK;
use diskmover::effort::Compression;
use diskmover::error::{MoverError, Result};
use diskmover::listener::{Limits, Receiver};
use diskmover::messages::Receipt;
use diskmover::priority::IoPriority;
use diskmover::push::{Job, Push, STALL};
use diskmover::salvage::OnReadError;
use diskmover::session::{Opening, Phase};
use diskmover::target::{Care, TargetSpec};
use diskmover::trust::Holes;
use tempfile::TempDir;

use super::pki::{Pki, uri};

pub const SESSION: &str = "s1";
pub const TAG: &str = "t1";
pub const KEY: [u8; 32] = [0x5A; 32];
/// Longer than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(150);

pub struct Rig {
    pub pki: Pki,
    /// The authority of another fleet.
    pub foreign: Pki,
    pub receiver: Receiver,
    dir: TempDir,
    /// Key of the session that was opened last: none works twice.
    key: Cell<[u8; 32]>,
    /// How targets are placed.
    pub care: RefCell<Care>,
    /// Permission bits of targets.
    pub mode: Cell<Option<u32>>,
    /// Where targets are.
    pub targets: RefCell<PathBuf>,
}

pub fn limits() -> Limits {
    Limits {
        sessions: 16,
        connections: 128,
        buffer_bytes: 8 * CHUNK,
        volume_memory: 512 << 20,
        io_priority: IoPriority::Normal,
        // A peer of a test says nothing while the test does something else.
        hello: PATIENCE,
        idle: PATIENCE,
        quiet: Duration::from_secs(3600),
    }
}

impl Rig {
    pub fn new() -> Rig {
        Rig::with(limits())
    }

    pub fn with(limits: Limits) -> Rig {
        let (pki, dir) = (Pki::new(), tempfile::tempdir().unwrap());
        std::fs::create_dir(dir.path().join("in")).unwrap();
        std::fs::create_dir(dir.path().join("out")).unwrap();
        let receiver = Receiver::bind("127.0.0.1:0", pki.host("b"), limits).unwrap();
        Rig {
            pki,
            foreign: Pki::new(),
            receiver,
            key: Cell::new(KEY),
            care: RefCell::default(),
            mode: Cell::new(Some(0o640)),
            targets: RefCell::new(dir.path().join("in")),
            dir,
        }
    }

    /// Where files arrive.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("in")
    }

    /// Names of all files there, hidden ones too.
    pub fn arrived(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.root()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// A source file with pieces of data in a sparse rest.
    pub fn source(&self, name: &str, size: u64, pieces: &[(u64, &[u8])]) -> PathBuf {
        let path = self.dir.path().join("out").join(name);
        let file = File::create(&path).unwrap();
        file.set_len(size).unwrap();
        for (offset, data) in pieces {
            file.write_all_at(data, *offset).unwrap();
        }
        path
    }

    pub fn open(&self, names_and_sizes: &[(&str, u64)]) -> Result<()> {
        self.open_as(SESSION, TAG, names_and_sizes)
    }

    /// Key of the session that was opened last.
    pub fn key(&self) -> [u8; 32] {
        self.key.get()
    }

    pub fn open_as(&self, id: &str, tag: &str, names_and_sizes: &[(&str, u64)]) -> Result<()> {
        self.key.set(*blake3::hash(&self.key.get()).as_bytes());
        let spec = |(name, size): &(&str, u64)| TargetSpec {
            volume: (*name).to_owned(),
            root: self.targets.borrow().clone(),
            name: (*name).to_owned(),
            size: Some(*size),
            mode: self.mode.get(),
            uid: None,
            gid: None,
            care: self.care.borrow().clone(),
        };
        self.receiver.open_session(Opening {
            id: id.to_owned(),
            key: self.key(),
            sender: Some(uri("a")),
            volumes: names_and_sizes.iter().map(spec).collect(),
            tag: tag.to_owned(),
        })
    }

    /// Closes the receiver and opens another one at its address.
    pub fn restarted(&self) -> Receiver {
        self.receiver.close();
        let address = self.receiver.address().to_string();
        Receiver::bind(&address, self.pki.host("b"), limits()).unwrap()
    }

    /// A job that sends these sources as the opened session expects.
    pub fn job(&self, sources: &[&Path]) -> Job {
        let volume = |path: &&Path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            (name.to_owned(), path.to_path_buf().into(), None)
        };
        Job {
            volumes: sources.iter().map(volume).collect(),
            key: self.key(),
            ..job_to(&self.receiver.address().to_string(), &self.pki)
        }
    }

    /// The error that a session failed with, once it has.
    pub fn failure(&self, id: &str) -> MoverError {
        eventually("the session fails", || {
            match self.receiver.status(id).unwrap().0 {
                Phase::Failed(error) => Some(error),
                _ => None,
            }
        })
    }
}

/// A job without volumes.
pub fn job_to(address: &str, pki: &Pki) -> Job {
    Job {
        to: address.to_owned(),
        receiver: Some(uri("b")),
        tls: pki.host("a"),
        session: SESSION.to_owned(),
        key: KEY,
        tag: TAG.to_owned(),
        volumes: Vec::new(),
        connections: 2,
        most_connections: 64,
        limit: None,
        compression: Compression::Level(1),
        holes: Holes::Trust,
        despite_lock: false,
        on_read_error: OnReadError::Fail,
        buffer_bytes: 8 * CHUNK,
        io_priority: IoPriority::Normal,
        reconnect: Duration::from_secs(5),
        stall: STALL,
    }
}

/// Runs a job to its end.
pub fn run(job: Job) -> Result<Vec<Receipt>> {
    finish(&Push::start(job)?)
}

/// Waits for the end of a copy.
pub fn finish(push: &Push) -> Result<Vec<Receipt>> {
    push.wait(PATIENCE).expect("the copy hangs")
}

/// Waits until `look` finds what it looks for.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = std::time::Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(std::time::Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Bytes that do not compress.
pub fn noise(seed: u8, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new()
        .update(&[seed])
        .finalize_xof()
        .fill(&mut out);
    out
}
