//! Which sessions there are, and what is remembered of those that were.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use crate::beneath;
use crate::error::{Code, MoverError, Result};
use crate::listener::{Shared, invalid};
use crate::messages::{Keys, Receipt};
use crate::pool::lock;
use crate::session::{MAX_VOLUMES, OPEN_TO_ALL, Opening, Session, closed, replayed};

/// Ends that are kept for somebody to ask about.
const UNASKED: usize = 1000;
/// Closed sessions that are remembered to tell their senders, and to name a replay.
const RETIRED: usize = 1024;

/// A session that was closed.
pub(super) struct Retired {
    pub(super) session: String,
    pub(super) keys: Keys,
    /// Of the attempt that used the key, if any did.
    nonce: Option<[u8; 16]>,
}

impl Retired {
    /// What a sender hears that proves the key of this session.
    pub(super) fn refusal(&self, nonce: &[u8; 16]) -> MoverError {
        let is_the_attempt = self.nonce.is_none_or(|known| known == *nonce);
        match is_the_attempt {
            true => closed(&self.session),
            false => replayed(&self.session),
        }
    }
}

#[derive(Default)]
pub(super) struct Registry {
    pub(super) sessions: HashMap<String, Arc<Session>>,
    pub(super) retired: VecDeque<Retired>,
}

impl Registry {
    /// Takes a session out. Closing it may last: a connection that comes meanwhile
    /// must not hear that there never was one.
    fn retire(&mut self, id: &str) -> Option<Arc<Session>> {
        let session = self.sessions.remove(id)?;
        self.retired.push_back(Retired {
            session: id.to_owned(),
            keys: session.keys.clone(),
            nonce: session.nonce(),
        });
        if self.retired.len() > RETIRED {
            self.retired.pop_front();
        }
        Some(session)
    }
}

/// How a copy to a listener without sessions ended.
pub struct Ended {
    /// The name that the sender gave.
    pub name: String,
    /// Its URI name.
    pub sender: String,
    /// Its receipts, or why there are none.
    pub outcome: Result<Vec<Receipt>>,
}

impl Shared {
    pub(super) fn register(&self, opening: Opening) -> Result<()> {
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
        let budget = Arc::clone(&self.budget);
        let limits = &self.limits;
        let session = Session::new(opening, limits.buffer_bytes, limits.quiet, budget);
        registry.sessions.insert(id, session);
        Ok(())
    }

    /// Keeps how a session of the stand-alone tool ended, once.
    pub(super) fn note_end(&self, session: &Session) {
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

    pub(super) fn retire(&self, id: &str) {
        let Some(session) = lock(&self.registry).retire(id) else {
            return;
        };
        session.close();
        self.note_end(&session);
    }

    /// Closes the stand-alone tool's sessions that nobody uses.
    pub(super) fn forget_idle(&self) {
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

pub(super) fn check_opening(opening: &Opening) -> Result<()> {
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
    let mut seen = HashSet::new();
    for spec in &opening.volumes {
        beneath::check_name(&spec.name)?;
        if spec.volume.is_empty() || spec.volume.len() > 255 || !seen.insert(&spec.volume) {
            return Err(invalid(format!(
                "volume id {:?} is empty, too long or doubled",
                spec.volume
            )));
        }
        if let Some(mode) = spec.mode.filter(|mode| mode & !0o777 != 0) {
            return Err(invalid(format!(
                "mode {mode:o} has more than permission bits"
            )));
        }
    }
    Ok(())
}

pub(super) fn unknown(id: &str) -> MoverError {
    let text = format!("there is no session {id:?} here; open it (again)");
    MoverError::new(Code::SessionUnknown, text).at_receiver()
}
