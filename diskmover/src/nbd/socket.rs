//! Bytes to and from a server, with a deadline over whole answers.
//!
//! A timeout for each read would let a server that gives a byte now and then
//! hold a reader for ever.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::nbd::address::Address;

/// What a client needs of a connection.
pub trait Wire: Read + Write {
    /// What follows has to be over after this time.
    fn arm(&mut self, time: Duration);
}

/// A connected socket.
pub struct Socket {
    stream: Stream,
    deadline: Instant,
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// Breaks a connection from another thread.
pub struct Breaker(Stream);

impl Socket {
    /// Connects within `time`.
    pub fn connect(address: &Address, time: Duration) -> io::Result<Socket> {
        let deadline = Instant::now() + time;
        let stream = match address {
            Address::Unix(path) => {
                // A full backlog blocks; the timeout for sending bounds that.
                let flags = SocketFlags::CLOEXEC;
                let fd =
                    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                let stream = UnixStream::from(fd);
                stream.set_write_timeout(Some(time))?;
                rustix::net::connect(&stream, &SocketAddrUnix::new(path)?)?;
                Stream::Unix(stream)
            }
            Address::Tcp(to) => {
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                let found = to.to_socket_addrs()?.find_map(|one| {
                    if !is_own(one.ip()) {
                        last = foreign(to);
                        return None;
                    }
                    TcpStream::connect_timeout(&one, time)
                        .map_err(|e| last = e)
                        .ok()
                });
                let stream = found.ok_or(last)?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
        };
        Ok(Socket { stream, deadline })
    }

    /// Something to break it with.
    pub fn breaker(&self) -> io::Result<Breaker> {
        Ok(Breaker(match &self.stream {
            Stream::Unix(stream) => Stream::Unix(stream.try_clone()?),
            Stream::Tcp(stream) => Stream::Tcp(stream.try_clone()?),
        }))
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }
}

/// Whether an address is this host's: only such a one can be bound.
fn is_own(address: IpAddr) -> bool {
    let real = !address.is_unspecified() && !address.is_multicast();
    real && (address.is_loopback() || UdpSocket::bind((address, 0)).is_ok())
}

fn foreign(to: &str) -> io::Error {
    let text = format!(
        "{to} is not an address of this host, and NBD is neither encrypted nor authenticated; run diskmover where the export is"
    );
    io::Error::other(text)
}

impl Breaker {
    /// Makes every read and write fail from now on.
    pub fn shut(&self) {
        let _ = match &self.0 {
            Stream::Unix(stream) => stream.shutdown(Shutdown::Both),
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Wire for Socket {
    fn arm(&mut self, time: Duration) {
        self.deadline = Instant::now() + time;
    }
}

impl Read for Socket {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = self.left()?;
        match &mut self.stream {
            Stream::Unix(stream) => stream
                .set_read_timeout(left)
                .and_then(|()| stream.read(out)),
            Stream::Tcp(stream) => stream
                .set_read_timeout(left)
                .and_then(|()| stream.read(out)),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = self.left()?;
        match &mut self.stream {
            Stream::Unix(stream) => stream
                .set_write_timeout(left)
                .and_then(|()| stream.write(bytes)),
            Stream::Tcp(stream) => stream
                .set_write_timeout(left)
                .and_then(|()| stream.write(bytes)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
