//! From an address to a connection that the receiver has let in.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::{End, Ended, told, unexpected};
use crate::digest::CHUNK;
use crate::error::{Code, MoverError};
use crate::frame::{HELLO_SENDS_AGAIN, Header, Kind};
use crate::guard;
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
    let handle = socket.try_clone().map_err(|e| {
        shared.note_trouble(e.to_string());
        End::Broken
    })?;
    lock(&shared.sockets)[index] = Some(handle);
    let sort = |error: LinkError, peer: &str| match error.is_network() {
        true => {
            shared.note_trouble(error.to_string());
            End::Broken
        }
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
            let error = told(to, &payload);
            let others = !lock(&shared.standing).links().is_empty();
            let wait = error.code == Code::LimitExceeded && others;
            Err(if wait { End::Broken } else { End::Fatal(error) })
        }
        _ => Err(End::Fatal(unexpected(to, &answer))),
    }
}

/// Connects a socket; gives up quickly when the copy ends.
fn dial(shared: &Shared) -> Ended<TcpStream> {
    let to = &shared.job.to;
    let stopping = || shared.stopping();
    let name = to.clone();
    let look = move || Ok(name.to_socket_addrs()?.collect());
    let found: Vec<SocketAddr> = match resolve(look, &stopping) {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
            let text = format!("{to:?} is not HOST:PORT");
            return Err(End::Fatal(MoverError::new(Code::InvalidArgument, text)));
        }
        Err(e) => {
            shared.note_trouble(e.to_string());
            return Err(End::Broken);
        }
    };
    let each = shared.job.reconnect / found.len().max(1) as u32;
    let note = |why| shared.note_trouble(why);
    reach_any(&found, each.min(CONNECT_TIMEOUT), &stopping, &note).ok_or(End::Broken)
}

/// Looks up addresses; gives up quickly when the copy ends. The system's resolver cannot
/// be interrupted: its thread is left behind then, with nothing of the copy.
fn resolve(
    look: impl FnOnce() -> io::Result<Vec<SocketAddr>> + Send + 'static,
    stopping: &dyn Fn() -> bool,
) -> io::Result<Vec<SocketAddr>> {
    let (tell, told) = bounded(1);
    let look = move || {
        let _ = tell.send(look()); // nobody listens once the copy has ended
    };
    guard::start(look).map_err(io::Error::other)?;
    loop {
        match told.recv_timeout(TICK) {
            Ok(found) => return found,
            Err(RecvTimeoutError::Timeout) if !stopping() => {}
            Err(_) => return Err(io::Error::other("its name is not resolved")),
        }
    }
}

/// Connects to the first address that answers. Each has the same time of its own:
/// one that swallows everything must not use up that of the next.
fn reach_any(
    addresses: &[SocketAddr],
    patience: Duration,
    stopping: &dyn Fn() -> bool,
    note: &dyn Fn(String),
) -> Option<TcpStream> {
    addresses
        .iter()
        .find_map(|address| reach(address, patience, stopping).map_err(note).ok())
}

fn reach(
    address: &SocketAddr,
    patience: Duration,
    stopping: &dyn Fn() -> bool,
) -> Result<TcpStream, String> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)
        .map_err(|e| e.to_string())?;
    let _ = rustix::net::connect(&fd, address);
    let end = Instant::now() + patience;
    while Instant::now() < end && !stopping() {
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
        Ok(Some(error)) => return Err(error.to_string()),
        _ if socket.peer_addr().is_err() => return Err("it does not answer".to_owned()),
        _ => {}
    }
    socket.set_nonblocking(false).map_err(|e| e.to_string())?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// The kernel asks again after one second and after three, and each address has half
    /// of this.
    const PATIENCE: Duration = Duration::from_secs(8);

    /// A listener whose kernel drops whoever comes next, and those who came before.
    fn black_hole() -> (TcpListener, Vec<TcpStream>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let address = listener.local_addr().unwrap();
        let soon = Duration::from_millis(900);
        let inside = std::iter::from_fn(|| reach(&address, soon, &|| false).ok());
        let inside = inside.collect();
        (listener, inside)
    }

    #[test]
    fn a_resolver_that_never_answers_is_not_waited_for_when_the_copy_ends() {
        let (answer, question) = std::sync::mpsc::channel::<()>();
        let look = move || {
            let _ = question.recv();
            Ok(Vec::new())
        };
        let asked = AtomicUsize::new(0);
        let stopping = || asked.fetch_add(1, Ordering::Relaxed) > 2;
        assert!(resolve(look, &stopping).is_err());
        drop(answer);
        let address = "192.0.2.1:7".parse().unwrap();
        assert_eq!(
            resolve(move || Ok(vec![address]), &|| false).unwrap(),
            [address]
        );
    }

    #[test]
    fn an_address_that_swallows_everything_leaves_the_next_its_time() {
        let (hole, _inside) = black_hole();
        let (busy, _waiting) = black_hole();
        let addresses = [&hole, &busy].map(|listener| listener.local_addr().unwrap());
        let told = Mutex::new(Vec::new());
        let socket = std::thread::scope(|scope| {
            let note = |why| {
                let mut told = lock(&told);
                told.push(why);
                if told.len() > 1 {
                    return;
                }
                // The second has room when it has been asked, and not at once.
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(300));
                    busy.accept().unwrap();
                });
            };
            reach_any(&addresses, PATIENCE, &|| false, &note)
        });
        assert_eq!(*lock(&told), ["it does not answer"]);
        assert_eq!(socket.unwrap().peer_addr().unwrap(), addresses[1]);
    }
}
