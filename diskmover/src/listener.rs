//! The listener of a process, and the sessions that it serves.

use std::collections::{HashMap, VecDeque};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::beneath;
use crate::digest::{ZERO_HASH, hex};
use crate::error::{Code, MoverError, Result};
use crate::frame::{Header, Kind};
use crate::guard;
use crate::link::{self, Link};
use crate::messages::{self, Hello, Keys, VERSION};
use crate::offer::Offer;
use crate::pool::lock;
use crate::priority::IoPriority;
use crate::progress::Progress;
use crate::session::{MAX_VOLUMES, OPEN_TO_ALL, Opening, Phase, Session};
use crate::tls::TlsFiles;

/// Keys that are remembered to name a replay.
/// Ends that are kept for somebody to ask about.
const UNASKED: usize = 1000;
const RETIRED: usize = 1024;

/// Bounds of a receiver.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Open sessions.
    pub sessions: usize,
    /// Connections over all sessions.
    pub connections: usize,
    /// Memory for chunks of each session.
    pub buffer_bytes: u64,
    /// How much its writes count beside others'.
    pub io_priority: IoPriority,
    /// Time for the TLS handshake and HELLO together.
    pub hello: Duration,
    /// Silence after which a connection is dropped.
    pub idle: Duration,
}

struct Retired {
    session: String,
    keys: Keys,
}

#[derive(Default)]
struct Registry {
    sessions: HashMap<String, Arc<Session>>,
    retired: VecDeque<Retired>,
}

struct Shared {
    tls: TlsFiles,
    limits: Limits,
    registry: Mutex<Registry>,
    /// What the stand-alone tool offers, which needs no sessions.
    offer: Mutex<Option<Offer>>,
    /// Held from finding a session of the stand-alone tool until the connection
    /// is in it: another connection would take it for an idle one.
    open_turn: Mutex<()>,
    /// How sessions ended that are forgotten and were not asked about.
    ended: Mutex<VecDeque<Ended>>,
    connections: AtomicUsize,
    stop: AtomicBool,
}

/// How a copy to a listener without sessions ended.
pub struct Ended {
    /// The name that the sender gave.
    pub name: String,
    /// Its URI name.
    pub sender: String,
    /// Its receipts, or why there are none.
    pub outcome: Result<Vec<messages::Receipt>>,
}

/// A listener and its sessions.
pub struct Receiver {
    shared: Arc<Shared>,
    address: SocketAddr,
    wake: Arc<OwnedFd>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Receiver {
    /// Binds and listens.
    pub fn bind(listen: &str, tls: TlsFiles, limits: Limits) -> Result<Receiver> {
        tls.server()?; // credentials that do not work are told at once
        let addresses: Vec<SocketAddr> = listen
            .to_socket_addrs()
            .map_err(|e| invalid(format!("{listen:?} is not HOST:PORT: {e}")))?
            .collect();
        let cannot = |e| {
            MoverError::new(
                Code::ConnectFailed,
                format!("cannot listen on {listen}: {e}"),
            )
        };
        let listener = TcpListener::bind(&addresses[..]).map_err(|e| cannot(e).at_receiver())?;
        listener.set_nonblocking(true).map_err(cannot)?;
        let address = listener.local_addr().map_err(cannot)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| cannot(e.into()))?;
        let wake = Arc::new(wake);
        let shared = Arc::new(Shared {
            tls,
            limits,
            registry: Mutex::default(),
            offer: Mutex::new(None),
            open_turn: Mutex::default(),
            ended: Mutex::default(),
            connections: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let thread = {
            let (shared, wake) = (Arc::clone(&shared), Arc::clone(&wake));
            std::thread::spawn(move || accept(&shared, &listener, &wake))
        };
        Ok(Receiver {
            shared,
            address,
            wake,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// The address that is listened on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Opens a session; one of the same name is closed first.
    pub fn open_session(&self, opening: Opening) -> Result<()> {
        check_opening(&opening)?;
        self.shared.register(opening)
    }

    /// Where a session stands.
    pub fn status(&self, id: &str) -> Result<(Phase, Progress, Vec<messages::Receipt>)> {
        let Some(session) = lock(&self.shared.registry).sessions.get(id).cloned() else {
            return Err(unknown(id));
        };
        let phase = session.phase();
        let done = phase == Phase::Done;
        let receipts = lock(&session.receipts)
            .iter()
            .flatten()
            .filter(|_| done)
            .cloned()
            .collect();
        Ok((phase, session.progress(), receipts))
    }

    /// Forgets a session; its parts stay.
    pub fn close_session(&self, id: &str) {
        self.shared.retire(id);
    }

    /// Accepts any sender of the CA, and places what it names.
    pub fn serve_names(&self, offer: Offer) -> Result<()> {
        offer.check()?;
        *lock(&self.shared.offer) = Some(offer);
        Ok(())
    }

    /// How copies that were accepted by name have ended since this was last asked.
    pub fn take_ended(&self) -> Vec<Ended> {
        let current: Vec<_> = lock(&self.shared.registry)
            .sessions
            .values()
            .cloned()
            .collect();
        for session in current {
            self.shared.note_end(&session);
        }
        lock(&self.shared.ended).drain(..).collect()
    }

    /// Stops listening and closes all sessions.
    pub fn close(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
        let ids: Vec<String> = lock(&self.shared.registry)
            .sessions
            .keys()
            .cloned()
            .collect();
        for id in ids {
            self.shared.retire(&id);
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn register(&self, opening: Opening) -> Result<()> {
        self.retire(&opening.id);
        let id = opening.id.clone();
        let mut registry = lock(&self.registry);
        if registry.sessions.len() >= self.limits.sessions {
            let text = format!(
                "{} sessions are open already; close some",
                self.limits.sessions
            );
            return Err(MoverError::new(Code::LimitExceeded, text).at_receiver());
        }
        registry
            .sessions
            .insert(id, Session::new(opening, self.limits.buffer_bytes));
        Ok(())
    }

    /// Keeps how a session of the stand-alone tool ended, once.
    fn note_end(&self, session: &Session) {
        if !session.id.starts_with(OPEN_TO_ALL) {
            return;
        }
        let Some(outcome) = session.take_outcome() else {
            return;
        };
        let mut ended = lock(&self.ended);
        if ended.len() == UNASKED {
            ended.pop_front();
        }
        ended.push_back(Ended {
            name: session.specs[0].volume.clone(),
            sender: session.sender.clone().unwrap_or_default(),
            outcome,
        });
    }

    fn retire(&self, id: &str) {
        let Some(session) = lock(&self.registry).sessions.remove(id) else {
            return;
        };
        session.close();
        self.note_end(&session);
        let mut registry = lock(&self.registry);
        let keys = session.keys.clone();
        registry.retired.push_back(Retired {
            session: id.to_owned(),
            keys,
        });
        if registry.retired.len() > RETIRED {
            registry.retired.pop_front();
        }
    }

    /// Serves one connection from handshake to end.
    fn serve(&self, socket: TcpStream) {
        let deadline = Instant::now() + self.limits.hello;
        let _ = socket.set_nonblocking(false);
        let keep = socket.try_clone();
        let Ok(config) = self.tls.server() else {
            return;
        };
        let Ok(tls) = rustls::ServerConnection::new(config) else {
            return;
        };
        let link = match Link::establish(tls.into(), socket, self.limits.idle, deadline) {
            Ok(link) => Arc::new(link),
            Err(_) => {
                // The alert is on its way; a reset must not overtake it.
                if let Ok(socket) = keep {
                    link::linger(&socket, Duration::from_secs(1));
                }
                return;
            }
        };
        drop(keep);
        match self.greet(&link, deadline) {
            Ok(session) => session.serve(&link),
            Err(error) => {
                let payload = messages::encode_error(&error);
                let mut header = Header::new(Kind::Error, 0);
                header.payload_len = payload.len() as u32;
                let _ = link.send_soon(&header, &[&payload], Duration::from_secs(1));
                link.linger(Duration::from_secs(1));
            }
        }
    }

    /// Finds the session that a HELLO is for, and lets the connection in.
    fn greet(&self, link: &Arc<Link>, deadline: Instant) -> Result<Arc<Session>> {
        let broken = |what: &str| {
            MoverError::new(Code::Protocol, format!("{}: {what}", link.peer)).at_receiver()
        };
        if !link.speaks_diskmover() {
            return Err(broken("it did not ask for this protocol (ALPN)"));
        }
        let header = link
            .recv_header(Some(deadline))
            .map_err(|e| e.to_mover(&link.peer))?;
        if header.kind != Kind::Hello {
            return Err(broken("the first frame is not HELLO"));
        }
        let payload = link
            .recv_small(&header)
            .map_err(|e| e.to_mover(&link.peer))?;
        let hello = Hello::decode(&payload).ok_or_else(|| broken("unreadable HELLO"))?;
        if hello.version != VERSION || !messages::chunk_matches(hello.chunk) {
            return Err(broken(&format!(
                "version {} with chunks of {} bytes is not spoken here",
                hello.version, hello.chunk
            )));
        }
        let exporter = link
            .exporter(&hello.session)
            .map_err(|e| e.to_mover(&link.peer))?;
        let _turn = hello
            .session
            .starts_with(OPEN_TO_ALL)
            .then(|| lock(&self.open_turn));
        let session = self.find(&hello, &exporter, &link.peer_uris())?;
        let mut welcome = Header::new(Kind::Welcome, session.specs.len() as u16);
        welcome.payload_len = 2;
        // The session may have something to say to all its connections at once.
        let admit = || {
            session.admit(link, hello.nonce)?;
            session.hear_abilities(&header);
            Ok(())
        };
        link.send_first(&welcome, &[&VERSION.to_le_bytes()], admit)?;
        Ok(session)
    }

    fn find(&self, hello: &Hello, exporter: &[u8; 32], uris: &[String]) -> Result<Arc<Session>> {
        let proves = |keys: &Keys| {
            let expected = keys.prove(exporter, &hello.nonce, &hello.session);
            blake3::Hash::from_bytes(expected) == blake3::Hash::from_bytes(hello.proof)
        };
        if let Some(offer) = lock(&self.offer).clone()
            && hello.session.starts_with(OPEN_TO_ALL)
        {
            return self.find_open(hello, uris, &offer);
        }
        let registry = lock(&self.registry);
        let replayed = registry
            .retired
            .iter()
            .any(|old| old.session == hello.session && proves(&old.keys));
        if replayed {
            let text = format!(
                "the key of session {} was used before; open the session anew",
                hello.session
            );
            return Err(MoverError::new(Code::SessionKeyReplayed, text).at_receiver());
        }
        let session = registry
            .sessions
            .get(&hello.session)
            .ok_or_else(|| unknown(&hello.session))?;
        if session
            .sender
            .as_ref()
            .is_some_and(|sender| !uris.contains(sender))
        {
            let text = format!("session {} is not for {}", hello.session, uris.join(", "));
            return Err(MoverError::new(Code::PeerIdentity, text).at_receiver());
        }
        if !proves(&session.keys) {
            let text = format!("the sender has another key for session {}", hello.session);
            return Err(MoverError::new(Code::SessionKeyWrong, text).at_receiver());
        }
        if hello.tag != session.tag {
            let text = format!("session {} is for another tag", hello.session);
            return Err(MoverError::new(Code::InvalidArgument, text).at_receiver());
        }
        Ok(Arc::clone(session))
    }

    /// Makes a session for the stand-alone tool: "open/NAME" from anybody.
    ///
    /// Its tag comes from name and sender, so that the same command goes on
    /// where it stopped. A dead attempt is replaced, a live one is not.
    fn find_open(&self, hello: &Hello, uris: &[String], offer: &Offer) -> Result<Arc<Session>> {
        let name = hello.session.strip_prefix(OPEN_TO_ALL).unwrap_or_default();
        if name.contains('/') || name.starts_with('.') {
            return Err(invalid(format!("{name:?} is not a plain file name")));
        }
        beneath::check_name(name)?;
        let sender = uris.first().cloned();
        let id = format!(
            "{}/{}",
            hello.session,
            sender.as_deref().unwrap_or_default()
        );
        let current = lock(&self.registry).sessions.get(&id).cloned();
        match current {
            Some(session) if session.has_nonce(&hello.nonce) => return Ok(session),
            Some(session) if session.in_use() => {
                let text = format!("{name:?} is being received already");
                return Err(MoverError::new(Code::TargetBusy, text).at_receiver());
            }
            _ => {}
        }
        let tag = hex(&blake3::hash(id.as_bytes()).as_bytes()[..8]);
        self.forget_idle();
        self.register(Opening {
            id: id.clone(),
            key: ZERO_HASH,
            sender,
            volumes: vec![offer.target(name)],
            tag,
        })?;
        lock(&self.registry)
            .sessions
            .get(&id)
            .cloned()
            .ok_or_else(|| unknown(&id))
    }

    /// Closes the stand-alone tool's sessions that nobody uses.
    fn forget_idle(&self) {
        let idle = |(id, session): (&String, &Arc<Session>)| {
            (id.starts_with(OPEN_TO_ALL) && !session.in_use()).then(|| id.clone())
        };
        let ids: Vec<String> = lock(&self.registry)
            .sessions
            .iter()
            .filter_map(idle)
            .collect();
        for id in ids {
            self.retire(&id);
        }
    }
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener, wake: &OwnedFd) {
    // The threads of all sessions descend from this one.
    shared.limits.io_priority.apply();
    while !shared.stop.load(Ordering::Relaxed) {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(wake, PollFlags::IN),
        ];
        let _ = poll(&mut fds, None);
        let Ok((socket, _)) = listener.accept() else {
            // Out of descriptors, or the peer is gone again: do not spin.
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        let limit = shared.limits.connections;
        if shared.connections.fetch_add(1, Ordering::Relaxed) >= limit {
            shared.connections.fetch_sub(1, Ordering::Relaxed);
            continue; // dropping the socket tells the peer to come back later
        }
        let shared = Arc::clone(shared);
        std::thread::spawn(move || {
            guard::run(|| shared.serve(socket), || {});
            shared.connections.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn check_opening(opening: &Opening) -> Result<()> {
    beneath::check_tag(&opening.tag)?;
    if opening.id.is_empty() || opening.id.len() > 128 || opening.id.starts_with(OPEN_TO_ALL) {
        return Err(invalid(format!(
            "{:?} is not a session id of 1 to 128 bytes",
            opening.id
        )));
    }
    if opening.volumes.is_empty() || opening.volumes.len() > MAX_VOLUMES {
        return Err(invalid(format!("a session has 1 to {MAX_VOLUMES} volumes")));
    }
    let mut seen = std::collections::HashSet::new();
    for spec in &opening.volumes {
        beneath::check_name(&spec.name)?;
        if spec.volume.is_empty() || spec.volume.len() > 255 || !seen.insert(&spec.volume) {
            return Err(invalid(format!(
                "volume id {:?} is empty, too long or doubled",
                spec.volume
            )));
        }
        if spec.mode & !0o777 != 0 {
            return Err(invalid(format!(
                "mode {:o} has more than permission bits",
                spec.mode
            )));
        }
    }
    Ok(())
}

fn invalid(text: String) -> MoverError {
    MoverError::new(Code::InvalidArgument, text).at_receiver()
}

fn unknown(id: &str) -> MoverError {
    let text = format!("there is no session {id:?} here; open it (again)");
    MoverError::new(Code::SessionUnknown, text).at_receiver()
}
