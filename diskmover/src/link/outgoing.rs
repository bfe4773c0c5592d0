//! What a connection sends: frames into TLS, records to the socket.
//!
//! The socket is never waited for with TLS locked.

use std::io::{self, ErrorKind, IoSlice, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

use super::error::io_error;
use super::{Link, LinkError, Result};
use crate::frame::Header;
use crate::pool::lock;

/// Plaintext that is encrypted in one go.
const SLICE: usize = 64 << 10;
/// A peer has to take this much in the time after which it counts as gone; else
/// one that reads a byte now and then could hold a thread for as long as it likes.
const LEAST_PROGRESS: usize = 64 << 10;

/// How well the peer takes what is sent.
#[derive(Default)]
pub(super) struct Outgoing {
    /// Bytes written, and time spent on it, since the peer last took enough.
    written: usize,
    spent: Duration,
}

impl Link {
    pub(super) fn send_locked(
        &self,
        out: &mut Outgoing,
        header: &Header,
        payload: &[&[u8]],
        end: Option<Instant>,
    ) -> Result<()> {
        let head = header.encode();
        let mut first = Some(&head[..]);
        for part in payload
            .iter()
            .copied()
            .chain(payload.is_empty().then_some(&[][..]))
        {
            let mut pieces = part.chunks(SLICE);
            loop {
                let piece = pieces.next();
                if piece.is_none() && first.is_none() {
                    break;
                }
                let mut tls = lock(&self.tls);
                for bytes in [first.take(), piece].into_iter().flatten() {
                    tls.writer().write_all(bytes).map_err(LinkError::Io)?;
                }
                drop(tls);
                self.push_out(out, end)?;
            }
        }
        Ok(())
    }

    pub(super) fn flush(&self) -> Result<()> {
        self.push_out(&mut lock(&self.outgoing), None)
    }

    /// Writes what is encrypted; the caller holds `outgoing`.
    ///
    /// Records go from TLS to the socket without a copy in between. The socket is
    /// never waited for with TLS locked, and not beyond `end`.
    pub(super) fn push_out(&self, out: &mut Outgoing, end: Option<Instant>) -> Result<()> {
        loop {
            let mut tls = lock(&self.tls);
            if !tls.wants_write() {
                return Ok(());
            }
            let written = tls.write_tls(&mut Ready(&self.socket));
            drop(tls);
            match written {
                Ok(count) => out.note(count),
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.wait_writable(out, end)?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(io_error(e)),
            }
        }
    }

    /// Waits until the peer takes more, at most until `end`; breaks the connection
    /// then, and when the peer took too little for too long. A peer that is slow
    /// and takes something is waited for.
    fn wait_writable(&self, out: &mut Outgoing, end: Option<Instant>) -> Result<()> {
        let began = Instant::now();
        let idle = self.idle.saturating_sub(out.spent);
        let left = end.map_or(idle, |end| idle.min(end.saturating_duration_since(began)));
        let timeout = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut fds = [PollFd::new(&self.socket, PollFlags::OUT)];
        let ready = !left.is_zero() && !matches!(poll(&mut fds, Some(&timeout)), Ok(0));
        out.spent += began.elapsed();
        if ready {
            return Ok(());
        }
        // A frame may have gone out in part: nothing can follow it, and whoever
        // waits for frames of this peer need not wait any longer.
        self.abort();
        Err(LinkError::Timeout)
    }
}

impl Outgoing {
    /// Notes what the peer's kernel took.
    fn note(&mut self, count: usize) {
        self.written += count;
        if self.written >= LEAST_PROGRESS {
            (self.written, self.spent) = (0, Duration::ZERO);
        }
    }
}

/// A socket that is written to only as far as it takes it at once.
struct Ready<'a>(&'a TcpStream);

impl Write for Ready<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(sendmsg(
            self.0,
            parts,
            &mut SendAncillaryBuffer::default(),
            flags,
        )?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};

    use super::*;
    use crate::frame::Kind;
    use crate::pki::Pki;
    use crate::tls;

    const IDLE: Duration = Duration::from_secs(3);

    /// Two ends of a connection in which hardly anything is on its way.
    fn pair() -> (Link, Link) {
        let pki = Pki::new();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        set_socket_recv_buffer_size(&listener, 16 << 10).unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        set_socket_send_buffer_size(&near, 16 << 10).unwrap();
        let far = listener.accept().unwrap().0;
        let server = rustls::ServerConnection::new(pki.host("b").server().unwrap()).unwrap();
        let client = pki.host("a").client().unwrap();
        let client = rustls::ClientConnection::new(client, tls::no_name()).unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        let far = std::thread::spawn(move || Link::establish(server.into(), far, IDLE, end));
        let near = Link::establish(client.into(), near, IDLE, end).unwrap();
        (near, far.join().unwrap().unwrap())
    }

    #[test]
    fn a_slow_peer_is_waited_for_as_long_as_it_takes_something() {
        let (near, far) = pair();
        let payload = vec![7; SLICE];
        let mut header = Header::new(Kind::Data, 0);
        header.payload_len = payload.len() as u32;
        std::thread::scope(|scope| {
            // All of it takes longer than a peer may take nothing, no part of it does.
            scope.spawn(|| {
                let mut part = vec![0; LEAST_PROGRESS];
                far.recv_header(None).unwrap();
                for _ in 0..SLICE / LEAST_PROGRESS {
                    std::thread::sleep(IDLE * 2 / 5);
                    far.recv_payload(&mut part).unwrap();
                }
            });
            near.send(&header, &[&payload]).unwrap();
        });
    }
}
