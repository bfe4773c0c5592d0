//! The only unsafe code: aligned memory, the allocator (lines.rs), the page cache,
//! open-file-description locks, TCP_INFO, shared blocks and I/O priorities.
#![allow(unsafe_code)]

mod lines;

use std::ffi::c_void;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::time::Duration;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// What O_DIRECT asks for on nearly every disk (alignment.rs).
pub const ALIGN: usize = 4096;

/// Memory of the system, in huge pages where it has them.
///
/// Pinning pages for O_DIRECT costs by the page: a chunk in small ones takes 256.
struct Slab {
    start: NonNull<c_void>,
    len: usize,
}

impl Slab {
    fn new(len: usize) -> Option<Slab> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new private mapping that nothing else knows of.
        let start = unsafe { mmap_anonymous(null_mut(), len, protection, MapFlags::PRIVATE) };
        let start = NonNull::new(start.ok()?)?;
        // SAFETY: the very range that was mapped; the advice changes no content.
        let _ = unsafe { madvise(start.as_ptr(), len, Advice::LinuxHugepage) };
        Some(Slab { start, len })
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this very length, unmapped once; buffers in
        // it hold the slab.
        let _ = unsafe { munmap(self.start.as_ptr(), self.len) };
    }
}

// SAFETY: the memory is owned and has no thread affinity.
unsafe impl Send for Slab {}
// SAFETY: a slab gives no access to its memory.
unsafe impl Sync for Slab {}

/// Zeroed memory aligned for O_DIRECT. Untouched pages cost nothing.
pub struct AlignedBuf {
    start: NonNull<u8>,
    len: usize,
    /// What the memory lies in.
    _slab: Arc<Slab>,
}

impl AlignedBuf {
    /// `len` bytes, more than 0; None when there is no memory.
    pub fn new(len: usize) -> Option<Self> {
        Self::several(1, len)?.pop()
    }

    /// `count` buffers of `len` bytes, a multiple of 4096 if there are several.
    pub fn several(count: usize, len: usize) -> Option<Vec<Self>> {
        if len == 0 || (count > 1 && !len.is_multiple_of(ALIGN)) {
            return None;
        }
        let slab = Arc::new(Slab::new(count.checked_mul(len)?)?);
        let buffer = |index: usize| AlignedBuf {
            // SAFETY: index * len is less than the length of the slab.
            start: unsafe { slab.start.cast().add(index * len) },
            len,
            _slab: Arc::clone(&slab),
        };
        Some((0..count).map(buffer).collect())
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` is valid for `len` initialised bytes, which are only this
        // buffer's, and borrowed as long as the slice lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

// SAFETY: the memory is owned and has no thread affinity.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuf {}

/// Number of cachestat(2), which libc does not have everywhere.
const SYS_CACHESTAT: libc::c_long = 451;

/// Pages of a range of an open file that are in the page cache; needs Linux 6.5.
pub fn cached_pages(file: impl AsFd, offset: u64, len: u64) -> io::Result<u64> {
    // struct cachestat_range and struct cachestat of <linux/mman.h>.
    let range = [offset, len];
    let mut counts = [0u64; 5];
    // SAFETY: the descriptor is open while borrowed; the kernel reads two numbers and
    // writes five, in arrays of that size that outlive the call.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_fd().as_raw_fd(),
            range.as_ptr(),
            counts.as_mut_ptr(),
            0,
        )
    };
    match result {
        0 => Ok(counts[0]),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes the exclusive lock of an open file; false when another one holds it.
pub fn try_lock(file: impl AsFd) -> io::Result<bool> {
    match set_lock(file, &lock_of(libc::F_WRLCK, 0, 0)) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Lets go of what locks an open file has, for all who have the same opening of it.
pub fn unlock(file: impl AsFd) -> io::Result<()> {
    set_lock(file, &lock_of(libc::F_UNLCK, 0, 0))
}

/// Whether somebody else holds a lock on a byte of an open file, shared or not. None
/// is taken.
pub fn is_locked(file: impl AsFd, byte: u64) -> io::Result<bool> {
    let mut lock = lock_of(libc::F_WRLCK, byte, 1);
    // SAFETY: the descriptor is open while borrowed; the struct outlives the call,
    // which writes no more than that.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &mut lock) };
    match result {
        0 => Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes the shared lock of a byte of an open file, as QEMU does.
#[cfg(test)]
pub fn lock_shared(file: impl AsFd, byte: u64) -> io::Result<()> {
    set_lock(file, &lock_of(libc::F_RDLCK, byte, 1))
}

fn set_lock(file: impl AsFd, lock: &libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open while borrowed; the struct outlives the call.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, lock) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A lock of `len` bytes of a file; 0 stands for all that follow.
fn lock_of(kind: libc::c_int, from: u64, len: u64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: from as libc::off_t,
        l_len: len as libc::off_t,
        l_pid: 0,
    }
}

/// How a connection has spent its time with data to send, and its distance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendTimes {
    /// With data to send, in microseconds.
    pub busy: u64,
    /// Of that, waiting for the peer to read what it has.
    pub peer_slow: u64,
    /// The shortest round trip of late.
    pub round_trip: Duration,
}

/// Asks the kernel (since 4.9) what a TCP socket waited for.
pub fn send_times(socket: impl AsFd) -> io::Result<SendTimes> {
    // struct tcp_info of <linux/tcp.h>; libc's is older than these fields.
    const MIN_RTT: usize = 148;
    const BUSY: usize = 168;
    const RWND_LIMITED: usize = 176;
    let mut info = [0u8; 192];
    let mut len = info.len() as libc::socklen_t;
    // SAFETY: the descriptor is open while borrowed; the kernel writes at most
    // `len` bytes into `info`, which outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if (len as usize) < info.len() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let field = |at: usize| {
        let bytes: [u8; 8] = std::array::from_fn(|i| info[at + i]);
        u64::from_ne_bytes(bytes)
    };
    let trip: [u8; 4] = std::array::from_fn(|i| info[MIN_RTT + i]);
    let trip = match u32::from_ne_bytes(trip) {
        u32::MAX => 0, // not measured yet
        trip => trip.into(),
    };
    Ok(SendTimes {
        busy: field(BUSY),
        peer_slow: field(RWND_LIMITED),
        round_trip: Duration::from_micros(trip),
    })
}

/// Lets a range of `to` share the blocks of a range of `from`, if both lie on one
/// file system that can; what `to` held there is gone.
pub fn share(
    from: impl AsFd,
    from_offset: u64,
    to: impl AsFd,
    to_offset: u64,
    len: u64,
) -> io::Result<()> {
    let range = libc::file_clone_range {
        src_fd: i64::from(from.as_fd().as_raw_fd()),
        src_offset: from_offset,
        src_length: len,
        dest_offset: to_offset,
    };
    // SAFETY: both descriptors are open while borrowed; the kernel only reads the
    // struct, which outlives the call.
    let result = unsafe { libc::ioctl(to.as_fd().as_raw_fd(), libc::FICLONERANGE, &range) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Class of I/O priority: best effort, with levels 0 to 7.
pub const IO_BEST_EFFORT: u16 = 2;
/// Class of I/O priority: only when nobody else wants the disk.
pub const IO_IDLE: u16 = 3;
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
const IOPRIO_CLASS_SHIFT: u16 = 13;

/// Sets class and level of the I/O priority of this thread.
pub fn set_io_priority(class: u16, level: u16) -> io::Result<()> {
    let value = libc::c_long::from(class << IOPRIO_CLASS_SHIFT | level);
    // SAFETY: the call takes three numbers; thread 0 is the calling one.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Class and level of the I/O priority of this thread.
#[cfg(test)]
pub fn io_priority() -> io::Result<(u16, u16)> {
    // SAFETY: the call takes two numbers; thread 0 is the calling one.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0) };
    match u16::try_from(result) {
        Ok(value) => Ok((
            value >> IOPRIO_CLASS_SHIFT,
            value & ((1 << IOPRIO_CLASS_SHIFT) - 1),
        )),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zeroed_and_writable() {
        let mut buf = AlignedBuf::new(8192).unwrap();
        assert_eq!(buf.as_ptr() as usize % ALIGN, 0);
        assert!(buf.iter().all(|b| *b == 0));
        buf[8191] = 7;
        assert_eq!(buf[8191], 7);
        assert!(AlignedBuf::new(0).is_none());
    }

    #[test]
    fn buffers_of_one_slab_are_apart_and_outlive_each_other() {
        let mut some = AlignedBuf::several(3, ALIGN).unwrap();
        for (mark, buffer) in (1..).zip(&mut some) {
            buffer.fill(mark);
        }
        let last = some.pop().unwrap();
        drop(some.pop());
        assert!(some[0].iter().all(|b| *b == 1) && last.iter().all(|b| *b == 3));
        drop(some);
        assert_eq!((last.len(), last[ALIGN - 1]), (ALIGN, 3));
        assert!(AlignedBuf::several(2, ALIGN - 1).is_none());
    }

    #[test]
    fn the_lock_is_exclusive_within_a_process_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let one = std::fs::File::create(&path).unwrap();
        let two = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        assert!(try_lock(&one).unwrap());
        assert!(!try_lock(&two).unwrap());
        unlock(&two).unwrap();
        assert!(!try_lock(&two).unwrap());
        unlock(&one).unwrap();
        assert!(try_lock(&two).unwrap());
    }

    #[test]
    fn a_peer_that_does_not_read_is_what_a_sender_waits_for() {
        use std::io::Write;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _peer = listener.accept().unwrap();
        assert_eq!(send_times(&socket).unwrap().busy, 0);
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 65536]).is_ok() {}
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let waits = |times: SendTimes| times.peer_slow > 0 && times.busy >= times.peer_slow;
        while !waits(send_times(&socket).unwrap()) {
            assert!(std::time::Instant::now() < end, "{:?}", send_times(&socket));
            std::thread::yield_now();
        }
    }
}
