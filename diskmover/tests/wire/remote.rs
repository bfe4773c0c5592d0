//! A file that another host can write, whose attributes the kernel here remembers: a
//! FUSE file system of this one file, which needs root.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use diskmover::digest::CHUNK;
use diskmover::error::Code;
use diskmover::source::{FileSource, Source};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// Operations of <linux/fuse.h>.
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;

/// How long the kernel may believe what it was told, in seconds.
const REMEMBERED: u64 = 3600;

struct Remote {
    path: PathBuf,
    /// Seconds.
    mtime: Arc<AtomicU64>,
}

impl Remote {
    fn new(dir: &Path) -> Remote {
        let path = dir.join("remote");
        File::create(&path).unwrap();
        let kernel = File::options().read(true).write(true).open("/dev/fuse");
        let kernel = kernel.unwrap();
        let options = format!(
            "fd={},rootmode=100644,user_id=0,group_id=0",
            kernel.as_raw_fd()
        );
        let options = std::ffi::CString::new(options).unwrap();
        mount("a test", &path, "fuse", MountFlags::RDONLY, &*options).unwrap();
        let mtime = Arc::new(AtomicU64::new(1));
        let served = Arc::clone(&mtime);
        // Ends with the mount.
        std::thread::spawn(move || while serve(&kernel, &served).is_ok() {});
        Remote { path, mtime }
    }

    /// As if another host wrote.
    fn is_written(&self) {
        self.mtime.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        let _ = unmount(&self.path, UnmountFlags::DETACH);
    }
}

/// Answers one request.
fn serve(mut kernel: &File, mtime: &AtomicU64) -> std::io::Result<()> {
    let mut request = vec![0; 1 << 20];
    let len = kernel.read(&mut request)?;
    request.truncate(len);
    let operation = u32::from_le_bytes(request[4..8].try_into().unwrap());
    let answer = match operation {
        INIT => Ok(version()),
        GETATTR => Ok(attributes(mtime.load(Ordering::Relaxed))),
        OPEN => Ok(vec![0; 16]),
        RELEASE | FSYNC | FLUSH => Ok(Vec::new()),
        FORGET | INTERRUPT => return Ok(()),
        _ => Err(Errno::NOSYS.raw_os_error()),
    };
    let (error, body) = match answer {
        Ok(body) => (0, body),
        Err(error) => (-error, Vec::new()),
    };
    let mut reply = (16 + body.len() as u32).to_le_bytes().to_vec();
    reply.extend(error.to_le_bytes());
    reply.extend(&request[8..16]);
    reply.extend(body);
    kernel.write_all(&reply)
}

fn version() -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(7u32.to_le_bytes());
    body.extend(31u32.to_le_bytes());
    body.resize(64, 0);
    body
}

fn attributes(mtime: u64) -> Vec<u8> {
    let (inode, blocks, mode, links) = (1, CHUNK / 512, 0o100_644u32, 1u32);
    let mut body = Vec::new();
    let words = [REMEMBERED, 0, inode, CHUNK, blocks, 0, mtime, 1];
    words
        .iter()
        .for_each(|word| body.extend(word.to_le_bytes()));
    let halves = [0, 0, 0, mode, links, 0, 0, 0, 4096, 0];
    halves
        .iter()
        .for_each(|half: &u32| body.extend(half.to_le_bytes()));
    body
}

#[test]
fn what_another_host_writes_is_seen_though_the_kernel_remembers_how_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let remote = Remote::new(dir.path());
    let opened = FileSource::open(&remote.path).unwrap();
    opened.check_unchanged().unwrap();
    let file = File::open(&remote.path).unwrap();
    let remembered = file.metadata().unwrap().mtime();
    remote.is_written();
    let now = file.metadata().unwrap().mtime();
    assert_eq!(now, remembered, "nothing is tested: the kernel asks anyway");
    let error = opened.check_unchanged().unwrap_err();
    assert_eq!(error.code, Code::SourceChanged, "{error}");
    opened.renew().unwrap();
    opened.check_unchanged().unwrap();
}
