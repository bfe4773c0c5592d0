//! Slow disks, for tests: each read of a chunk and each write takes its time.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use crate::pool::lock;

static SLOW: Mutex<Vec<(PathBuf, Duration)>> = Mutex::new(Vec::new());

/// Makes the files beneath a directory slow that are opened from now on.
pub fn make(directory: &Path, delay: Duration) {
    let directory = directory.canonicalize().unwrap();
    lock(&SLOW).push((directory, delay));
}

/// What an operation on a file takes.
pub fn delay(file: &File) -> Duration {
    let known = lock(&SLOW);
    if known.is_empty() {
        return Duration::ZERO;
    }
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let path = std::fs::read_link(link).unwrap_or_default();
    let found = known.iter().find(|(slow, _)| path.starts_with(slow));
    found.map_or(Duration::ZERO, |(_, delay)| *delay)
}
