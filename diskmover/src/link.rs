//! One TLS connection, used in both directions at once by blocking threads.
//!
//! The TLS state is locked only while records are made or opened, never while
//! the socket blocks: a thread that waits for frames does not hold up another
//! one that sends.

mod error;
mod intake;
mod outgoing;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_tcp_congestion;
use rustls::Connection;

use crate::error::MoverError;
use crate::frame::{HEADER, Header};
use crate::growth::FAR;
use crate::messages::{ALPN, EXPORTER_LABEL};
use crate::pool::lock;
use crate::sys::{self, SendTimes};
use crate::tls;

pub use error::{LinkError, Result};
use intake::Intake;
use outgoing::Outgoing;

/// Longest time for one frame, however slowly it trickles.
const FRAME_TIMEOUT: Duration = Duration::from_secs(600);

/// None at all is no timeout.
const LEAST_TIMEOUT: Duration = Duration::from_millis(1);

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
            intake: Mutex::default(),
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

    /// Sends one frame, unless it or another one is stuck on its way until `end`.
    pub fn send_by(&self, end: Instant, header: &Header, payload: &[&[u8]]) -> Result<()> {
        loop {
            if let Ok(mut out) = self.outgoing.try_lock() {
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

    /// Fills `out` with payload, and shows each of `pieces` of it as soon as it is there.
    pub fn recv_pieces(
        &self,
        out: &mut [u8],
        pieces: impl Iterator<Item = Range<usize>>,
        mut seen: impl FnMut(&mut [u8]),
    ) -> Result<()> {
        let deadline = Instant::now() + FRAME_TIMEOUT;
        for piece in pieces {
            self.recv(&mut out[piece.clone()], deadline)?;
            seen(&mut out[piece]);
        }
        Ok(())
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

    /// Says goodbye, and waits for that until `end` at most; the peer sees a clean end.
    /// From then on nobody can be stuck in sending.
    pub fn close_by(&self, end: Instant) {
        if let Ok(mut out) = self.outgoing.try_lock() {
            lock(&self.tls).send_close_notify();
            let _ = self.push_out(&mut out, Some(end));
        }
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// Breaks it at once; threads that wait in it return.
    pub fn abort(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Says goodbye and drops what still comes, so that the peer gets to read our last
    /// words before the kernel resets the connection.
    pub fn linger(&self, patience: Duration) {
        let end = Instant::now() + patience;
        self.close_by(end);
        linger(&self.socket, end.saturating_duration_since(Instant::now()));
    }
}

/// Drops what a socket still brings, for a bounded time.
pub fn linger(socket: &TcpStream, patience: Duration) {
    let end = Instant::now() + patience;
    let _ = socket.shutdown(Shutdown::Write);
    let _ = socket.set_read_timeout(Some(patience.max(LEAST_TIMEOUT)));
    let mut sink = [0; 65536];
    let mut reader = socket;
    while Instant::now() < end && matches!(reader.read(&mut sink), Ok(count) if count > 0) {}
}
