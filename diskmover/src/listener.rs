//! The listener of a process: lets connections in, within its limits, and leads
//! them to their sessions.
//!
//! ```text
//!                       greeting.rs                session.rs
//! accept -> TLS -> HELLO -----------> its session -----------> frames
//!                                      ^
//! open_session, close_session ---------+ sessions.rs
//! ```

mod greeting;
mod sessions;

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::budget::Budget;
use crate::error::{Code, MoverError, Result};
use crate::frame::{Header, Kind};
use crate::guard;
use crate::link::{self, Link};
use crate::messages;
use crate::offer::Offer;
use crate::pool::lock;
use crate::priority::IoPriority;
use crate::progress::Progress;
use crate::session::{LAST_WORDS, Opening, Phase};
use crate::tls::TlsFiles;
use sessions::{Registry, check_opening, unknown};

pub use sessions::Ended;

/// Bounds of a receiver.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Open sessions.
    pub sessions: usize,
    /// Connections over all sessions.
    pub connections: usize,
    /// Memory for chunks of each session.
    pub buffer_bytes: u64,
    /// Memory for what is known of volumes, over all sessions.
    pub volume_memory: u64,
    /// How much its writes count beside others'.
    pub io_priority: IoPriority,
    /// Time for the TLS handshake and HELLO together, and for what an earlier attempt
    /// at the same name left.
    pub hello: Duration,
    /// Silence after which a connection is dropped.
    pub idle: Duration,
    /// Signs of life and nothing else, after which a session ends.
    pub quiet: Duration,
}

struct Shared {
    tls: TlsFiles,
    limits: Limits,
    budget: Arc<Budget>,
    registry: Mutex<Registry>,
    /// What the stand-alone tool offers, which needs no sessions.
    offer: Mutex<Option<Offer>>,
    /// Held from finding a session of the stand-alone tool until the connection
    /// is in it: another connection would take it for an idle one.
    open_turn: Mutex<()>,
    /// Told when a session is closed.
    left: Condvar,
    /// How sessions ended that are forgotten and were not asked about.
    ended: Mutex<VecDeque<Ended>>,
    connections: AtomicUsize,
    stop: AtomicBool,
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
            budget: Budget::new(limits.volume_memory),
            limits,
            registry: Mutex::default(),
            offer: Mutex::new(None),
            open_turn: Mutex::default(),
            left: Condvar::new(),
            ended: Mutex::default(),
            connections: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let thread = {
            let (shared, wake) = (Arc::clone(&shared), Arc::clone(&wake));
            guard::start(move || accept(&shared, &listener, &wake))
                .map_err(MoverError::at_receiver)?
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
        self.shared.register(opening).map(drop)
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

    /// A session, for tests that look into it or hold something of it.
    #[cfg(test)]
    pub fn session(&self, id: &str) -> Option<Arc<crate::session::Session>> {
        lock(&self.shared.registry).sessions.get(id).cloned()
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

    /// Stops listening and closes all sessions, together: what holds up one holds up no
    /// other.
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
        std::thread::scope(|scope| {
            for id in &ids {
                let retire = || self.shared.retire(id);
                if guard::start_in(scope, retire).is_err() {
                    retire();
                }
            }
        });
        self.shared.await_none();
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    /// Serves one connection from handshake to end.
    fn serve(self: &Arc<Self>, socket: TcpStream) {
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
                    link::linger(&socket, LAST_WORDS);
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
                let _ = link.send_by(Instant::now() + LAST_WORDS, &header, &[&payload]);
                link.linger(LAST_WORDS);
            }
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
        let serving = Arc::clone(shared);
        let served = guard::start(move || {
            guard::run(|| serving.serve(socket), || {});
            serving.connections.fetch_sub(1, Ordering::Relaxed);
        });
        if served.is_err() {
            // The socket is gone with its thread: the peer comes back later.
            shared.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn invalid(text: String) -> MoverError {
    MoverError::new(Code::InvalidArgument, text).at_receiver()
}
