//! The greeting: from HELLO to the session that it is for.
//!
//! ```text
//! ALPN, HELLO, version and chunks    else PROTOCOL
//! "open/NAME", and names are offered:
//!     a plain name                   else INVALID_ARGUMENT
//!     nobody else is at it           else TARGET_BUSY
//!     an earlier attempt is closed   waited for, else TARGET_BUSY
//!                                    -> a session for name and sender
//! any other name:
//!     not of a closed session        else SESSION_CLOSED, or SESSION_KEY_REPLAYED
//!                                    for another attempt than had its key
//!     an open session                else SESSION_UNKNOWN
//!     for this sender                else PEER_IDENTITY
//!     the proof of its key           else SESSION_KEY_WRONG
//!     its tag                        else INVALID_ARGUMENT
//! then the session lets the connection in, or not, and WELCOME goes out
//! ```

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use crate::beneath;
use crate::digest::{ZERO_HASH, hex};
use crate::error::{Code, MoverError, Result};
use crate::frame::{Header, Kind};
use crate::link::Link;
use crate::listener::sessions::unknown;
use crate::listener::{Shared, invalid};
use crate::messages::{self, Hello, Keys, VERSION};
use crate::offer::Offer;
use crate::pool::lock;
use crate::session::{OPEN_TO_ALL, Opening, Session};

/// A session of the stand-alone tool, or why there is none yet.
type Found = std::result::Result<Arc<Session>, MoverError>;

impl Shared {
    /// Finds the session that a HELLO is for, and lets the connection in.
    pub(super) fn greet(
        self: &Arc<Self>,
        link: &Arc<Link>,
        deadline: Instant,
    ) -> Result<Arc<Session>> {
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
        let uris = link.peer_uris();
        let offer = lock(&self.offer).clone();
        let offer = offer.filter(|_| hello.session.starts_with(OPEN_TO_ALL));
        let (session, _turn) = match offer {
            Some(offer) => {
                let (session, turn) = self.await_open(&hello, &uris, &offer, deadline)?;
                (session, Some(turn))
            }
            None => (self.find(&hello, &exporter, &uris)?, None),
        };
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
        let registry = lock(&self.registry);
        let mut retired = registry.retired.iter();
        if let Some(old) = retired.find(|old| old.session == hello.session && proves(&old.keys)) {
            return Err(old.refusal(&hello.nonce));
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

    /// Finds or makes a session for the stand-alone tool, and the turn to enter it. What
    /// an earlier attempt left is waited for; meanwhile it is the turn of others.
    fn await_open(
        self: &Arc<Self>,
        hello: &Hello,
        uris: &[String],
        offer: &Offer,
        deadline: Instant,
    ) -> Result<(Arc<Session>, MutexGuard<'_, ()>)> {
        loop {
            let turn = lock(&self.open_turn);
            let ends = self.stop.load(Ordering::Relaxed) || Instant::now() >= deadline;
            match self.find_open(hello, uris, offer)? {
                Ok(session) => return Ok((session, turn)),
                Err(why) if ends => return Err(why),
                Err(_) => {}
            }
            drop(turn);
            self.await_one_less();
        }
    }

    /// Makes a session for the stand-alone tool: "open/NAME" from anybody.
    ///
    /// Its tag comes from name and sender, so that the same command goes on
    /// where it stopped. A dead attempt is replaced, a live one is not.
    fn find_open(self: &Arc<Self>, hello: &Hello, uris: &[String], offer: &Offer) -> Result<Found> {
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
            Some(session) if session.nonce() == Some(hello.nonce) => return Ok(Ok(session)),
            Some(session) if session.in_use() => {
                let text = format!("{name:?} is being received already");
                return Err(MoverError::new(Code::TargetBusy, text).at_receiver());
            }
            _ => {}
        }
        let tag = hex(&blake3::hash(id.as_bytes()).as_bytes()[..8]);
        self.forget_idle();
        if let Some(why) = lock(&self.registry).awaits(&id, self.limits.sessions) {
            return Ok(Err(why));
        }
        let opening = Opening {
            id,
            key: ZERO_HASH,
            sender,
            volumes: vec![offer.target(name)],
            tag,
        };
        self.register(opening).map(Ok)
    }
}
