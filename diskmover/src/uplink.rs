//! One connection of the sender, made again when it breaks.
//!
//! Each has a thread that sends and one that hears. What is sent and not
//! acknowledged when the connection breaks goes back to the feed: frames are
//! complete in themselves, so any other connection can carry them.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::degraded;
use crate::digest::CHUNK;
use crate::entry::Entry;
use crate::error::{Code, MoverError, Result};
use crate::feed::Volume;
use crate::frame::{ACK_TARGET_SLOW, HEADER, HELLO_SENDS_AGAIN, Header, Kind};
use crate::link::{Link, LinkError};
use crate::messages::{self, Hello, Open, Receipt, VERSION};
use crate::pool::lock;
use crate::push::{Parcel, Shared, Turn};
use crate::revision::Revision;
use crate::session::TICK;
use crate::stages::count;
use crate::tls;
use crate::wants;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const HELLO_TIMEOUT: Duration = Duration::from_secs(15);
const IDLE: Duration = Duration::from_secs(60);
const PING: Duration = Duration::from_secs(5);
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

/// Why a connection ended.
enum End {
    /// Another one may do better.
    Broken,
    /// The copy cannot go on.
    Fatal(MoverError),
}

impl From<MoverError> for End {
    fn from(error: MoverError) -> Self {
        End::Fatal(error)
    }
}

/// What is sent and not acknowledged: offset and volume to its header.
type InFlight = Mutex<HashMap<(u16, u64), Header>>;

/// Keeps a connection up until the copy ends.
pub fn run(shared: &Shared, index: usize) {
    let mut wait = BACKOFF.0;
    while !shared.stopping() {
        let began = Instant::now();
        match connect(shared, index).and_then(|link| carry(shared, link)) {
            Err(End::Fatal(error)) => return shared.fail(error),
            Err(End::Broken) | Ok(()) => {}
        }
        if began.elapsed() > BACKOFF.1 {
            wait = BACKOFF.0;
        }
        let end = Instant::now() + wait;
        while Instant::now() < end && !shared.stopping() {
            std::thread::sleep(TICK / 5);
        }
        wait = (wait * 2).min(BACKOFF.1);
    }
}

/// Connects, shakes hands and proves the session key.
fn connect(shared: &Shared, index: usize) -> std::result::Result<Arc<Link>, End> {
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
fn dial(shared: &Shared) -> std::result::Result<TcpStream, End> {
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

/// Sends and hears until the connection or the copy ends.
fn carry(shared: &Shared, link: Arc<Link>) -> std::result::Result<(), End> {
    lock(&shared.links).push(Arc::clone(&link));
    let (began, before) = (Instant::now(), shared.answers.load(Ordering::Relaxed));
    let result = open_and_run(shared, &link);
    lock(&shared.links).retain(|other| !Arc::ptr_eq(other, &link));
    // Connections that break at once, one after the other, are as good as none.
    let was_useful = shared.answers.load(Ordering::Relaxed) > before;
    if was_useful || began.elapsed() > shared.job.reconnect {
        lock(&shared.last_link).0 = Instant::now();
    }
    result
}

fn open_and_run(shared: &Shared, link: &Link) -> std::result::Result<(), End> {
    {
        // One connection opens the volumes; the others wait for it here.
        let _turn = lock(&shared.opening);
        if !shared.opened.load(Ordering::Acquire) {
            open_volumes(shared, link)?;
            shared.note_resumed();
            shared.opened.store(true, Ordering::Release);
            shared.feed.start();
        }
    }
    lock(&shared.last_link).1 = true;
    let in_flight: InFlight = Mutex::default();
    let mut turn = None;
    let dead = AtomicBool::new(false);
    let ends = std::thread::scope(|scope| {
        let heard = scope.spawn(|| {
            let end = hear(shared, link, &in_flight);
            dead.store(true, Ordering::Relaxed);
            if matches!(end, Err(End::Broken)) {
                link.abort(); // `send` may be stuck in it
            }
            end
        });
        let sent = send(shared, link, &in_flight, &dead, &mut turn);
        if matches!(sent, Ok(()) | Err(End::Fatal(_))) {
            link.close();
        }
        if !shared.stopping() {
            // An error of the receiver may still be on its way to `hear`.
            let end = Instant::now() + TICK * 5;
            while !dead.load(Ordering::Relaxed) && Instant::now() < end {
                std::thread::sleep(TICK / 20);
            }
        }
        link.abort();
        [sent, heard.join().unwrap_or(Err(End::Broken))]
    });
    drop(turn);
    for sent in lock(&in_flight).values() {
        shared.feed.put_back(&shared.volumes, sent);
    }
    let mut result = Ok(());
    for end in ends {
        match end {
            Err(End::Fatal(error)) => return Err(End::Fatal(error)),
            Err(End::Broken) => result = Err(End::Broken),
            Ok(()) => {}
        }
    }
    result
}

/// Announces the volumes and takes over what the receiver has.
fn open_volumes(shared: &Shared, link: &Link) -> std::result::Result<(), End> {
    let broken = |e: LinkError| match e.is_network() {
        true => End::Broken,
        false => End::Fatal(e.to_mover(&link.peer)),
    };
    for (index, volume) in shared.volumes.iter().enumerate() {
        let open = Open {
            identity: volume.identity(),
            mode: volume.source.mode(),
            volume: volume.id.clone(),
        };
        let changes = volume.source.revision().map(Revision::encode);
        let frames = changes.into_iter().flatten().map(|p| (Kind::Dirty, p));
        for (kind, payload) in frames.chain([(Kind::Open, open.encode())]) {
            let mut header = Header::new(kind, index as u16);
            header.payload_len = payload.len() as u32;
            link.send(&header, &[&payload]).map_err(broken)?;
        }
        loop {
            let answer = link.recv_header(None).map_err(broken)?;
            let payload = link.recv_small(&answer).map_err(broken)?;
            if shared.stopping() {
                return Err(End::Broken);
            }
            let ours = usize::from(answer.volume) == index;
            match answer.kind {
                Kind::Ping | Kind::Receipt => {}
                Kind::Error => return Err(End::Fatal(told(&payload))),
                Kind::State if ours => adopt(shared, index, &payload)?,
                Kind::Opened if ours => {
                    if !payload.is_empty() {
                        claim_receipt(shared, index, &payload)?;
                    } else if answer.offset <= volume.size() {
                        lock(&volume.ledger).set_data_bytes(answer.offset);
                        volume.base.set(answer.logical_len);
                    } else {
                        let text = "the receiver says that it has more data than there is";
                        let error = MoverError::new(Code::Protocol, text);
                        return Err(End::Fatal(error.in_volume(&volume.id)));
                    }
                    break;
                }
                _ => return Err(End::Fatal(unexpected(&link.peer, &answer))),
            }
        }
    }
    Ok(())
}

fn adopt(shared: &Shared, index: usize, payload: &[u8]) -> Result<()> {
    let mut ledger = lock(&shared.volumes[index].ledger);
    let mut rest = payload;
    while !rest.is_empty() {
        let applied = Entry::decode(&mut rest).and_then(|entry| entry.apply(&mut ledger));
        if applied.is_none() {
            let text = "the receiver says that it has what this volume cannot have";
            return Err(MoverError::new(Code::Protocol, text).in_volume(&shared.volumes[index].id));
        }
    }
    Ok(())
}

fn send<'a>(
    shared: &'a Shared,
    link: &Link,
    in_flight: &InFlight,
    dead: &AtomicBool,
    turn: &mut Option<Turn<'a>>,
) -> std::result::Result<(), End> {
    let mut sign = Instant::now();
    while !shared.stopping() {
        if dead.load(Ordering::Relaxed) {
            return Err(End::Broken);
        }
        if sign.elapsed() > PING {
            sign = Instant::now();
            link.send(&Header::new(Kind::Ping, 0), &[])
                .map_err(|_| End::Broken)?;
        }
        if turn.is_none() {
            *turn = shared.finish.take();
            if turn.is_some() {
                send_roots(shared, link)?;
            }
        }
        let Ok(parcel) = shared.parcels.1.recv_timeout(TICK / 2) else {
            continue;
        };
        let header = match &parcel {
            Parcel::Data(header, ..) | Parcel::Hashes(header, _) | Parcel::Zeros(header) => {
                header.clone()
            }
        };
        // From here on it is this connection's: it goes back if it breaks.
        lock(in_flight).insert((header.volume, header.offset), header.clone());
        let bytes = HEADER + header.payload_len as usize;
        while !shared.throttle.admit(bytes as u64, TICK) {
            if shared.stopping() || dead.load(Ordering::Relaxed) {
                return Err(End::Broken);
            }
            if sign.elapsed() > PING {
                sign = Instant::now();
                link.send(&Header::new(Kind::Ping, 0), &[])
                    .map_err(|_| End::Broken)?;
            }
        }
        let sent = match &parcel {
            Parcel::Data(_, front, buffer, body) => link.send(&header, &[front, &buffer[..*body]]),
            Parcel::Hashes(_, hashes) => link.send(&header, &[hashes]),
            Parcel::Zeros(_) => link.send(&header, &[]),
        };
        sent.map_err(|_| End::Broken)?;
        count(shared, usize::from(header.volume), bytes);
    }
    Ok(())
}

/// Sends the root digest of every volume that is not published yet.
fn send_roots(shared: &Shared, link: &Link) -> std::result::Result<(), End> {
    for (index, volume) in shared.volumes.iter().enumerate() {
        if lock(&volume.receipt).is_some() {
            continue;
        }
        let Some(root) = lock(&volume.ledger).root() else {
            let text = "a complete volume without a digest";
            return Err(End::Fatal(
                MoverError::new(Code::Internal, text).in_volume(&volume.id),
            ));
        };
        let mut payload = root.to_vec();
        payload.extend(volume.wire.load(Ordering::Relaxed).to_le_bytes());
        payload.extend(volume.unreadable().encode());
        let mut header = Header::new(Kind::Finish, index as u16);
        header.payload_len = payload.len() as u32;
        header.logical_len = volume.size();
        header.sign(&shared.keys.frame, &root);
        link.send(&header, &[&payload]).map_err(|_| End::Broken)?;
    }
    Ok(())
}

/// Hears acknowledgements, receipts and errors.
fn hear(shared: &Shared, link: &Link, in_flight: &InFlight) -> std::result::Result<(), End> {
    loop {
        let header = match link.recv_header(None) {
            Ok(header) => header,
            Err(error) if error.is_network() => return Err(End::Broken),
            Err(error) => return Err(End::Fatal(error.to_mover(&link.peer))),
        };
        let Ok(payload) = link.recv_small(&header) else {
            return Err(End::Broken);
        };
        let index = usize::from(header.volume);
        if matches!(header.kind, Kind::Ack | Kind::Receipt) {
            shared.answers.fetch_add(1, Ordering::Relaxed);
        }
        match header.kind {
            Kind::Ping => {}
            Kind::Ack => {
                let known = lock(in_flight).remove(&(header.volume, header.offset));
                let Some(sent) = known.filter(|sent| sent.logical_len == header.logical_len) else {
                    return Err(End::Fatal(unexpected(&link.peer, &header)));
                };
                let slow = header.codec & ACK_TARGET_SLOW != 0;
                shared.target_slow.store(slow, Ordering::Relaxed);
                let volume = &shared.volumes[index];
                match sent.kind {
                    Kind::Zero => volume.acknowledge_zeros(&sent)?,
                    _ => volume.acknowledge(&sent)?,
                }
                if sent.kind == Kind::Hashes {
                    volume.base.learn(0);
                }
            }
            Kind::Want => {
                let known = lock(in_flight).remove(&(header.volume, header.offset));
                let taken = known.and_then(|sent| wants::take(shared, &sent, &payload));
                taken.unwrap_or_else(|| Err(unexpected(&link.peer, &header)))?;
            }
            Kind::Receipt if index < shared.volumes.len() => keep_receipt(shared, index, &payload)?,
            Kind::Error => return Err(End::Fatal(told(&payload))),
            _ => return Err(End::Fatal(unexpected(&link.peer, &header))),
        }
    }
}

/// Keeps the receipt of a volume that was published before; whether it is for
/// what the source holds now is checked before the copy ends.
fn claim_receipt(shared: &Shared, index: usize, payload: &[u8]) -> Result<()> {
    let receipt = read_receipt(&shared.volumes[index], payload)?;
    degraded::check_claim(&shared.volumes[index], &receipt)?;
    *lock(&shared.volumes[index].receipt) = Some(receipt);
    Ok(())
}

/// Checks a receipt against what was sent, and keeps it.
fn keep_receipt(shared: &Shared, index: usize, payload: &[u8]) -> Result<()> {
    let volume = &shared.volumes[index];
    let receipt = read_receipt(volume, payload)?;
    if lock(&volume.receipt).as_ref() == Some(&receipt) {
        return Ok(()); // told again
    }
    let own = lock(&volume.ledger).root();
    if own != Some(receipt.root) {
        let text = "the receiver's receipt has another digest than this copy";
        return Err(MoverError::new(Code::Protocol, text).in_volume(&volume.id));
    }
    degraded::check_told(volume, &receipt)?;
    *lock(&volume.receipt) = Some(receipt);
    Ok(())
}

fn read_receipt(volume: &Volume, payload: &[u8]) -> Result<Receipt> {
    let about = |receipt: &Receipt| {
        (&receipt.volume, receipt.size) == (&volume.id, volume.size())
            && receipt.mode == volume.source.mode()
            && receipt.data <= receipt.size
    };
    Receipt::decode(payload).filter(about).ok_or_else(|| {
        let text = "the receiver's receipt is not for this volume";
        MoverError::new(Code::Protocol, text).in_volume(&volume.id)
    })
}

/// The receiver's error.
fn told(payload: &[u8]) -> MoverError {
    let unreadable = || MoverError::new(Code::Protocol, "the receiver sent an unreadable error");
    messages::decode_error(payload).unwrap_or_else(unreadable)
}

fn unexpected(peer: &str, header: &Header) -> MoverError {
    let text = format!("{peer} sent an unexpected {:?} frame", header.kind);
    MoverError::new(Code::Protocol, text)
}
