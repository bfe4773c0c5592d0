//! One TLS connection, used in both directions at once by blocking threads.
//!
//! The TLS state is locked only while records are made or opened, never while
//! the socket blocks: a thread that waits for frames does not hold up another
//! one that sends.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::set_tcp_congestion;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use rustls::{AlertDescription, Connection, Error as TlsError};

use crate::error::{Code, MoverError};
use crate::frame::{FrameError, HEADER, Header};
use crate::growth::FAR;
use crate::messages::{ALPN, EXPORTER_LABEL};
use crate::pool::lock;
use crate::sys::{self, SendTimes};
use crate::tls;

/// Plaintext that is encrypted in one go.
const SLICE: usize = 256 << 10;
/// Ciphertext that is read in one go.
const INTAKE: usize = 256 << 10;
/// A peer has to take this much in the time after which it counts as gone; else
/// one that reads a byte now and then could hold a thread for as long as it likes.
const LEAST_PROGRESS: usize = 64 << 10;
/// How long a goodbye may take.
const FAREWELL: Duration = Duration::from_secs(1);
/// Longest time for one frame, however slowly it trickles.
const FRAME_TIMEOUT: Duration = Duration::from_secs(600);

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer closed it.
    #[error("the peer closed the connection")]
    Closed,
    /// Nothing arrived for too long.
    #[error("the peer gave no sign of life in time")]
    Timeout,
    /// The network failed.
    #[error("{0}")]
    Io(io::Error),
    /// TLS failed.
    #[error("{0}")]
    Tls(rustls::Error),
    /// What arrived is not what the peer had sent.
    #[error("it was spoilt on its way: {0}")]
    Spoilt(rustls::Error),
    /// The peer sent what is no frame.
    #[error("{0}")]
    Frame(#[from] FrameError),
}

/// Result of an operation on a connection.
pub type Result<T> = std::result::Result<T, LinkError>;

#[derive(Default)]
struct Outgoing {
    /// Bytes written, and time spent on it, since the peer last took enough.
    written: usize,
    spent: Duration,
}

struct Intake {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

/// A connection.
pub struct Link {
    tls: Mutex<Connection>,
    socket: TcpStream,
    /// Held for a whole frame: frames of several threads do not mix.
    outgoing: Mutex<Outgoing>,
    intake: Mutex<Intake>,
    idle: Duration,
    /// Address of the peer, for messages.
    pub peer: String,
}

impl LinkError {
    /// As a failure of the copy; the network's are retryable.
    pub fn to_mover(&self, peer: &str) -> MoverError {
        match self {
            LinkError::Tls(error) => tls::classify(error, peer),
            LinkError::Frame(error) => MoverError::new(
                Code::Protocol,
                format!("{peer} broke the protocol: {error}"),
            ),
            other => MoverError::new(Code::LinkLost, format!("connection to {peer}: {other}")),
        }
    }

    /// Whether another connection may do better.
    pub fn is_network(&self) -> bool {
        matches!(
            self,
            LinkError::Closed | LinkError::Timeout | LinkError::Io(_) | LinkError::Spoilt(_)
        )
    }
}

impl Link {
    /// Shakes hands until `deadline`.
    pub fn establish(
        mut tls: Connection,
        socket: TcpStream,
        idle: Duration,
        deadline: Instant,
    ) -> Result<Link> {
        tls.set_buffer_limit(None);
        let peer = socket
            .peer_addr()
            .map_or_else(|_| "peer".to_owned(), |a| a.to_string());
        let _ = socket.set_nodelay(true);
        let link = Link {
            tls: Mutex::new(tls),
            socket,
            outgoing: Mutex::default(),
            intake: Mutex::new(Intake {
                bytes: vec![0; INTAKE].into(),
                start: 0,
                end: 0,
            }),
            idle,
            peer,
        };
        link.flush()?;
        while lock(&link.tls).is_handshaking() {
            let step = link.pump(deadline);
            let flushed = link.flush(); // an alert too, when the step failed
            step?;
            flushed?;
        }
        Ok(link)
    }

    /// The URI names of the peer's certificate.
    pub fn peer_uris(&self) -> Vec<String> {
        tls::uri_names(lock(&self.tls).peer_certificates())
    }

    /// Whether both ends agreed on this protocol in the handshake.
    pub fn speaks_diskmover(&self) -> bool {
        lock(&self.tls).alpn_protocol() == Some(ALPN)
    }

    /// A secret that only the two ends of this very connection know.
    pub fn exporter(&self, session: &str) -> Result<[u8; 32]> {
        lock(&self.tls)
            .export_keying_material([0; 32], EXPORTER_LABEL, Some(session.as_bytes()))
            .map_err(LinkError::Tls)
    }

    /// Sends one frame.
    pub fn send(&self, header: &Header, payload: &[&[u8]]) -> Result<()> {
        let mut out = lock(&self.outgoing);
        self.send_locked(&mut out, header, payload, None)
    }

    /// Sends small frames that are encoded already.
    pub fn send_frames(&self, frames: &[u8]) -> Result<()> {
        let mut out = lock(&self.outgoing);
        let queued = lock(&self.tls).writer().write_all(frames);
        queued.map_err(LinkError::Io)?;
        self.push_out(&mut out, None)
    }

    /// Sends one frame if `permit` lets us, ahead of whatever others have to send
    /// from then on.
    pub fn send_first(
        &self,
        header: &Header,
        payload: &[&[u8]],
        permit: impl FnOnce() -> std::result::Result<(), MoverError>,
    ) -> std::result::Result<(), MoverError> {
        let mut out = lock(&self.outgoing);
        permit()?;
        let sent = self.send_locked(&mut out, header, payload, None);
        sent.map_err(|e| e.to_mover(&self.peer))
    }

    /// Sends one frame unless another one is stuck on its way for `patience`.
    pub fn send_soon(&self, header: &Header, payload: &[&[u8]], patience: Duration) -> Result<()> {
        let end = Instant::now() + patience;
        loop {
            if let Ok(mut out) = self.outgoing.try_lock() {
                let end = Instant::now() + patience;
                return self.send_locked(&mut out, header, payload, Some(end));
            }
            if Instant::now() > end {
                return Err(LinkError::Timeout);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the next frame's header.
    pub fn recv_header(&self, deadline: Option<Instant>) -> Result<Header> {
        let mut bytes = [0; HEADER];
        let deadline = deadline.unwrap_or_else(|| Instant::now() + FRAME_TIMEOUT);
        self.recv(&mut bytes, deadline)?;
        Ok(Header::decode(&bytes)?)
    }

    /// Fills `out` with payload.
    pub fn recv_payload(&self, out: &mut [u8]) -> Result<()> {
        self.recv(out, Instant::now() + FRAME_TIMEOUT)
    }

    /// The payload of a header of a small frame.
    pub fn recv_small(&self, header: &Header) -> Result<Vec<u8>> {
        let mut bytes = vec![0; header.payload_len as usize];
        self.recv_payload(&mut bytes)?;
        Ok(bytes)
    }

    /// Lets TCP measure what the path carries instead of taking each loss for a
    /// full queue, which far away costs most of the rate. Where the kernel has no
    /// BBR, all stays as it is.
    pub fn suit_distance(&self) {
        if self.send_times().round_trip >= FAR {
            let _ = set_tcp_congestion(&self.socket, "bbr");
        }
    }

    /// How its time to send was spent; nothing when the kernel does not tell.
    pub fn send_times(&self) -> SendTimes {
        sys::send_times(&self.socket).unwrap_or_default()
    }

    /// Says goodbye; the peer sees a clean end.
    pub fn close(&self) {
        if let Ok(mut out) = self.outgoing.try_lock() {
            lock(&self.tls).send_close_notify();
            let _ = self.push_out(&mut out, Some(Instant::now() + FAREWELL));
        }
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// Breaks it at once; threads that wait in it return.
    pub fn abort(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Reads and drops what still comes, so that the peer gets to read our last
    /// words before the kernel resets the connection.
    pub fn linger(&self, patience: Duration) {
        self.close();
        linger(&self.socket, patience);
    }

    fn send_locked(
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

    fn flush(&self) -> Result<()> {
        self.push_out(&mut lock(&self.outgoing), None)
    }

    /// Writes what is encrypted; the caller holds `outgoing`.
    ///
    /// Records go from TLS to the socket without a copy in between. The socket is
    /// never waited for with TLS locked, and not beyond `end`.
    fn push_out(&self, out: &mut Outgoing, end: Option<Instant>) -> Result<()> {
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

    fn recv(&self, out: &mut [u8], deadline: Instant) -> Result<()> {
        let mut filled = 0;
        while filled < out.len() {
            let read = lock(&self.tls).reader().read(&mut out[filled..]);
            match read {
                Ok(0) => return Err(LinkError::Closed),
                Ok(count) => filled += count,
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.pump(deadline)?,
                Err(e) => return Err(io_error(e)),
            }
        }
        Ok(())
    }

    /// Takes in some ciphertext, waiting for it if there is none.
    fn pump(&self, deadline: Instant) -> Result<()> {
        let mut intake = lock(&self.intake);
        if intake.start == intake.end {
            let left = deadline
                .saturating_duration_since(Instant::now())
                .min(self.idle);
            if left.is_zero() {
                return Err(LinkError::Timeout);
            }
            self.socket
                .set_read_timeout(Some(left))
                .map_err(LinkError::Io)?;
            let count = loop {
                match (&self.socket).read(&mut intake.bytes) {
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    other => break other.map_err(io_error)?,
                }
            };
            if count == 0 {
                return Err(LinkError::Closed);
            }
            (intake.start, intake.end) = (0, count);
        }
        let mut tls = lock(&self.tls);
        let mut rest = &intake.bytes[intake.start..intake.end];
        let before = rest.len();
        tls.read_tls(&mut rest).map_err(LinkError::Io)?;
        let taken = before - rest.len();
        intake.start += taken;
        let is_new = tls.is_handshaking();
        match tls.process_new_packets() {
            Err(error) if !is_new && is_spoilt(&error) => Err(LinkError::Spoilt(error)),
            other => other.map(|_| ()).map_err(LinkError::Tls),
        }
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

/// Drops what a socket still brings, for a bounded time.
pub fn linger(socket: &TcpStream, patience: Duration) {
    let end = Instant::now() + patience;
    let _ = socket.shutdown(Shutdown::Write);
    let _ = socket.set_read_timeout(Some(patience));
    let mut sink = [0; 65536];
    let mut reader = socket;
    while Instant::now() < end && matches!(reader.read(&mut sink), Ok(count) if count > 0) {}
}

/// Whether a record was changed on its way. Peers that know each other do not send
/// such ones, and another connection may do better.
fn is_spoilt(error: &TlsError) -> bool {
    use AlertDescription::{BadRecordMac, DecodeError, RecordOverflow};
    match error {
        TlsError::DecryptError
        | TlsError::InvalidMessage(_)
        | TlsError::PeerSentOversizedRecord => true,
        TlsError::AlertReceived(alert) => {
            matches!(alert, BadRecordMac | DecodeError | RecordOverflow)
        }
        _ => false,
    }
}

fn io_error(error: io::Error) -> LinkError {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => LinkError::Timeout,
        ErrorKind::UnexpectedEof => LinkError::Closed,
        _ => LinkError::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};

    use super::*;
    use crate::frame::Kind;
    use crate::pki::Pki;

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
