//! Which sessions there are, and what is remembered of those that were.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use crate::beneath;
use crate::error::{Code, MoverError, Result};
use crate::guard;
use crate::listener::{Shared, invalid};
use crate::messages::{Keys, Receipt};
use crate::pool::lock;
use crate::session::{MAX_VOLUMES, OPEN_TO_ALL, Opening, Session, TICK, closed, replayed};

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
    /// Sessions that are being closed, and have something open until they are.
    leaving: Vec<Arc<Session>>,
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
        self.leaving.push(Arc::clone(&session));
        Some(session)
    }

    /// Fails when there are `most` sessions, with those that are being closed.
    fn check_room(&self, most: usize) -> Result<()> {
        if self.sessions.len() + self.leaving.len() < most {
            return Ok(());
        }
        let text = format!("{most} sessions are open already; close some");
        Err(MoverError::new(Code::LimitExceeded, text).at_receiver())
    }

    /// Why a session of this name has to wait for one that is being closed, if it has.
    pub(super) fn awaits(&self, id: &str, most: usize) -> Option<MoverError> {
        if let Some(earlier) = self.leaving.iter().find(|session| session.id == id) {
            let text = format!(
                "an earlier attempt has not let go of {:?} yet; copy again, and look at the receiver's disk if that lasts",
                earlier.specs[0].volume
            );
            return Some(MoverError::new(Code::TargetBusy, text).at_receiver());
        }
        let full = self.check_room(most).err();
        full.filter(|_| !self.leaving.is_empty())
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
    pub(super) fn register(&self, opening: Opening) -> Result<Arc<Session>> {
        self.retire(&opening.id);
        let id = opening.id.clone();
        let mut registry = lock(&self.registry);
        if self.stop.load(Ordering::Relaxed) {
            return Err(closed(&id)); // nobody would close it any more
        }
        registry.check_room(self.limits.sessions)?;
        let budget = Arc::clone(&self.budget);
        let limits = &self.limits;
        let session = Session::new(opening, limits.buffer_bytes, limits.quiet, budget);
        registry.sessions.insert(id, Arc::clone(&session));
        Ok(session)
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
        let session = lock(&self.registry).retire(id);
        if let Some(session) = session {
            self.see_off(&session);
        }
    }

    /// Closes a session that was taken out.
    fn see_off(&self, session: &Arc<Session>) {
        let close = || {
            session.close();
            self.note_end(session);
        };
        guard::run(close, || {}); // whatever happens, others wait for what follows
        let mut registry = lock(&self.registry);
        registry
            .leaving
            .retain(|other| !Arc::ptr_eq(other, session));
        self.left.notify_all();
    }

    /// Waits until a session is closed that was being closed; a moment at most.
    pub(super) fn await_one_less(&self) {
        let _ = self.left.wait_timeout(lock(&self.registry), TICK);
    }

    /// Waits until all are closed that were being closed.
    pub(super) fn await_none(&self) {
        let any = |registry: &mut Registry| !registry.leaving.is_empty();
        let none = self.left.wait_while(lock(&self.registry), any);
        drop(none.unwrap_or_else(PoisonError::into_inner));
    }

    /// Takes out the stand-alone tool's sessions that nobody uses. They are closed
    /// elsewhere: a disk that hangs holds up nobody who does not need it.
    pub(super) fn forget_idle(self: &Arc<Self>) {
        let idle = |(id, session): (&String, &Arc<Session>)| {
            (id.starts_with(OPEN_TO_ALL) && !session.in_use()).then(|| id.clone())
        };
        let sessions: Vec<Arc<Session>> = {
            let mut registry = lock(&self.registry);
            let ids: Vec<String> = registry.sessions.iter().filter_map(idle).collect();
            ids.iter().filter_map(|id| registry.retire(id)).collect()
        };
        for session in sessions {
            let (shared, leaving) = (Arc::clone(self), Arc::clone(&session));
            if guard::start(move || shared.see_off(&leaving)).is_err() {
                self.see_off(&session);
            }
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

#[cfg(test)]
mod tests {
    use crate::digest::CHUNK;
    use crate::push::{Job, Push};
    use crate::rig::{Rig, SESSION, eventually, finish, noise};
    use crate::session::TICK;

    #[test]
    fn a_receipt_is_told_once_nobody_holds_the_file_any_more() {
        let rig = Rig::new();
        let size = 4 * CHUNK;
        let source = rig.source("disk", size, &[(0, &noise(3, size as usize))]);
        rig.open(&[("disk", size)]).unwrap();
        let limit = Some(1);
        let push = Push::start(Job {
            limit,
            ..rig.job(&[&source])
        })
        .unwrap();
        let session = rig.receiver.session(SESSION).unwrap();
        let held = eventually("the target is open", || {
            session.targets.read().unwrap()[0].clone()
        });
        push.set_limit(None).unwrap();
        let published = rig.root().join("disk");
        eventually("it is published", || published.exists().then_some(()));
        assert!(push.wait(TICK * 10).is_none(), "told while it was locked");
        drop(held);
        assert_eq!(finish(&push).unwrap()[0].size, size);
    }
}
