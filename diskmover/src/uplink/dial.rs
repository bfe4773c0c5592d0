//! From an address to a connection that the receiver has let in.

use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::{End, Ended, told, unexpected};
use crate::digest::CHUNK;
use crate::error::{Code, MoverError};
use crate::frame::{HELLO_SENDS_AGAIN, Header, Kind};
use crate::link::{Link, LinkError};
use crate::messages::{Hello, VERSION};
use crate::pool::lock;
use crate::push::Shared;
use crate::session::TICK;
use crate::tls;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const HELLO_TIMEOUT: Duration = Duration::from_secs(15);
const IDLE: Duration = Duration::from_secs(60);

/// Connects, shakes hands and proves the session key.
pub(super) fn connect(shared: &Shared, index: usize) -> Ended<Arc<Link>> {
    let socket = dial(shared)?;
    // Cancelling must be able to break the handshake too.
    lock(&shared.sockets)[index] = socket.try_clone().ok();
    let sort = |error: LinkError, peer: &str| match error.is_network() {
        true => End::Broken,
        false => End::Fatal(error.to_mover(peer)),
    };
    let to = &shared.job.to;
    let deadline = Instant::now() + HELLO_TIMEOUT;
    let tls = rustls::ClientConnection::new(Arc::clone(&shared.config), tls::no_name())
        .map_err(|e| End::Fatal(tls::classify(&e, to)))?;
    let link = Link::establish(tls.into(), socket, IDLE, deadline).map_err(|e| sort(e, to))?;
    let link = Arc::new(link);
    if !link.speaks_diskmover() {
        let text = format!("{to} does not speak diskmover's protocol (ALPN)");
        return Err(End::Fatal(MoverError::new(Code::Protocol, text)));
    }
    let uris = link.peer_uris();
    if let Some(expected) = &shared.job.receiver
        && !uris.contains(expected)
    {
        let text = format!(
            "{to} is {}, not {expected}; nothing was sent",
            uris.join(", ")
        );
        return Err(End::Fatal(MoverError::new(Code::PeerIdentity, text)));
    }
    let session = &shared.job.session;
    let exporter = link.exporter(session).map_err(|e| sort(e, to))?;
    let hello = Hello {
        version: VERSION,
        chunk: CHUNK as u32,
        nonce: shared.nonce,
        proof: shared.keys.prove(&exporter, &shared.nonce, session),
        session: session.clone(),
        tag: shared.job.tag.clone(),
    };
    let payload = hello.encode();
    let mut header = Header::new(Kind::Hello, 0);
    header.logical_len = HELLO_SENDS_AGAIN;
    header.payload_len = payload.len() as u32;
    // When the receiver has hung up already, it has left an error to read.
    let sent = link.send(&header, &[&payload]);
    let answer = link.recv_header(Some(deadline)).map_err(|e| sort(e, to))?;
    sent.map_err(|e| sort(e, to))?;
    let payload = link.recv_small(&answer).map_err(|e| sort(e, to))?;
    match answer.kind {
        Kind::Welcome if payload != VERSION.to_le_bytes() => {
            let text = format!("{to} speaks another version of diskmover's protocol");
            Err(End::Fatal(MoverError::new(Code::Protocol, text)))
        }
        Kind::Welcome if usize::from(answer.volume) == shared.volumes.len() => {
            link.suit_distance();
            Ok(link)
        }
        Kind::Welcome => {
            let text = format!(
                "the session has {} volumes, this copy {}",
                answer.volume,
                shared.volumes.len()
            );
            Err(End::Fatal(MoverError::new(Code::InvalidArgument, text)))
        }
        Kind::Error => {
            let error = told(&payload);
            let others = !lock(&shared.links).is_empty();
            let wait = error.code == Code::LimitExceeded && others;
            Err(if wait { End::Broken } else { End::Fatal(error) })
        }
        _ => Err(End::Fatal(unexpected(to, &answer))),
    }
}

/// Connects a socket; gives up quickly when the copy ends.
fn dial(shared: &Shared) -> Ended<TcpStream> {
    let to = &shared.job.to;
    let found: Vec<SocketAddr> = match to.to_socket_addrs() {
        Ok(found) => found.collect(),
        Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => {
            let text = format!("{to:?} is not HOST:PORT");
            return Err(End::Fatal(MoverError::new(Code::InvalidArgument, text)));
        }
        Err(e) => {
            shared.note_trouble(e.to_string());
            return Err(End::Broken);
        }
    };
    let end = Instant::now() + CONNECT_TIMEOUT;
    for address in found {
        let family = if address.is_ipv4() {
            AddressFamily::INET
        } else {
            AddressFamily::INET6
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(fd) = rustix::net::socket_with(family, SocketType::STREAM, flags, None) else {
            continue;
        };
        let _ = rustix::net::connect(&fd, &address);
        while Instant::now() < end && !shared.stopping() {
            let tick = Timespec {
                tv_sec: 0,
                tv_nsec: TICK.as_nanos() as i64,
            };
            let mut fds = [PollFd::new(&fd, PollFlags::OUT)];
            if matches!(poll(&mut fds, Some(&tick)), Ok(count) if count > 0) {
                break;
            }
        }
        let socket = TcpStream::from(fd);
        match socket.take_error() {
            Ok(Some(error)) => shared.note_trouble(error.to_string()),
            _ if socket.peer_addr().is_err() => shared.note_trouble("it does not answer".into()),
            _ if socket.set_nonblocking(false).is_ok() => return Ok(socket),
            _ => {}
        }
    }
    Err(End::Broken)
}
