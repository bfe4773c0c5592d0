//! A receiving session: what one sender attempt may write, and how far it is.
//!
//! ```text
//! WAITING --first valid HELLO--> RECEIVING --all published--> DONE
//!    |                               | any error
//!    +---------close---------------->+------------------> FAILED
//! ```
//! Threads of a session: one for each connection (intake.rs), which checks frames, fills
//! buffers and hashes what is not packed; workers (worker.rs), which unpack, verify and write;
//! readers (proving.rs), which read back what is durable, where that is wanted; and the keeper
//! (keeper.rs), which alone opens, syncs and publishes targets.

mod account;
mod intake;
mod mending;
mod proving;
mod quiet;
mod worker;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::budget::Budget;
use crate::dirt::Dirt;
use crate::error::{Code, MoverError, Result};
use crate::frame::{Header, Kind};
use crate::guard;
use crate::keeper::{self, Order};
use crate::link::Link;
use crate::messages::{self, Keys, Receipt};
use crate::pool::{Pool, lock};
use crate::progress::Meter;
use crate::target::{Target, TargetSpec};
use crate::wake::Moment;
use mending::Mending;
use worker::Job;

/// How the names of the stand-alone tool's sessions begin.
pub const OPEN_TO_ALL: &str = "open/";
/// Most volumes of a session.
pub const MAX_VOLUMES: usize = 1024;
const MAX_LINKS: usize = 64;
const QUEUE: usize = 16;
/// Most threads that verify and write: more than cores, since they wait for the disk.
const WORKERS: usize = 8;
/// How often blocked threads look whether they should stop.
pub const TICK: Duration = Duration::from_millis(100);
const BUSY_SIGN: Duration = Duration::from_secs(5);
/// How long telling the sender why a session ends may take, over all connections.
const FAREWELL: Duration = Duration::from_millis(500);
/// How long a connection is kept for its sender to read the last words.
pub const LAST_WORDS: Duration = Duration::from_secs(1);
// Closing a session takes less than 2 seconds, unless the disk does not let go: its
// connections are closed once, if not with the last words then after them.
const _: () = assert!(FAREWELL.as_millis() + LAST_WORDS.as_millis() + 4 * TICK.as_millis() < 2000);

/// What `open_session` is given.
pub struct Opening {
    /// Name of the session.
    pub id: String,
    /// The secret shared with the sender.
    pub key: [u8; 32],
    /// The URI name that the sender must have; None for any of the CA.
    pub sender: Option<String>,
    /// What it may write.
    pub volumes: Vec<TargetSpec>,
    /// The copy, across sessions.
    pub tag: String,
}

/// Where a session stands.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// No valid HELLO yet.
    Waiting,
    /// In use.
    Receiving,
    /// All volumes are published.
    Done,
    /// Over.
    Failed(MoverError),
}

struct State {
    phase: Phase,
    nonce: Option<[u8; 16]>,
    links: Vec<Arc<Link>>,
    threads: Vec<JoinHandle<()>>,
}

/// A session.
pub struct Session {
    /// As it was opened.
    pub id: String,
    /// The copy, across sessions.
    pub tag: String,
    /// The URI name that the sender must have.
    pub sender: Option<String>,
    /// Keys of this opening.
    pub keys: Keys,
    /// What it may write.
    pub specs: Vec<TargetSpec>,
    /// The open targets; only the keeper changes them.
    pub targets: RwLock<Vec<Option<Arc<Target>>>>,
    /// Receipts of the published volumes.
    pub receipts: Mutex<Vec<Option<Receipt>>>,
    /// Bytes written and not durable.
    pub dirt: Dirt,
    /// Workers and readers that have not ended.
    pub workers: AtomicUsize,
    /// Frames that were received and not dealt with.
    unplaced: AtomicUsize,
    /// When these end, since all is there.
    pub drained: Moment,
    over: Moment,
    /// How it ended was told to the caller of a listener without sessions.
    told: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    sizes: Mutex<Vec<Option<u64>>>,
    resumed: AtomicU64,
    finished: AtomicU64,
    wire: AtomicU64,
    /// Frames that were more than a sign of life.
    steps: AtomicU64,
    /// How long there may be none, while a sender is connected.
    quiet: Duration,
    meter: Meter,
    mending: Mending,
    pool: Arc<Pool>,
    /// Memory for what is known of volumes, of all sessions.
    pub budget: Arc<Budget>,
    jobs: (Sender<Job>, Receiver<Job>),
    orders: (Sender<Order>, Receiver<Order>),
}

impl Session {
    /// A session that waits for its sender.
    pub fn new(
        opening: Opening,
        buffer_bytes: u64,
        quiet: Duration,
        budget: Arc<Budget>,
    ) -> Arc<Session> {
        let count = opening.volumes.len();
        Arc::new(Session {
            keys: Keys::derive(&opening.key),
            id: opening.id,
            tag: opening.tag,
            sender: opening.sender,
            specs: opening.volumes,
            targets: RwLock::new(vec![None; count]),
            receipts: Mutex::new(vec![None; count]),
            dirt: Dirt::default(),
            workers: AtomicUsize::new(0),
            unplaced: AtomicUsize::new(0),
            drained: Moment::default(),
            over: Moment::default(),
            told: AtomicBool::new(false),
            state: Mutex::new(State {
                phase: Phase::Waiting,
                nonce: None,
                links: Vec::new(),
                threads: Vec::new(),
            }),
            changed: Condvar::new(),
            sizes: Mutex::new(vec![None; count]),
            resumed: AtomicU64::new(0),
            finished: AtomicU64::new(0),
            wire: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            quiet,
            meter: Meter::default(),
            mending: Mending::default(),
            pool: Pool::new(buffer_bytes),
            budget,
            jobs: bounded(QUEUE),
            orders: bounded(QUEUE),
        })
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        lock(&self.state).phase.clone()
    }

    /// How it ended, the first time that it is asked after that; None otherwise.
    pub fn take_outcome(&self) -> Option<Result<Vec<Receipt>>> {
        let outcome = match self.phase() {
            Phase::Done => Ok(lock(&self.receipts).iter().flatten().cloned().collect()),
            Phase::Failed(error) => Err(error),
            Phase::Waiting | Phase::Receiving => return None,
        };
        (!self.told.swap(true, Ordering::Relaxed)).then_some(outcome)
    }

    /// Whether its threads should end.
    pub fn stopping(&self) -> bool {
        self.over.has_come()
    }

    /// Whether a connection stands.
    pub fn in_use(&self) -> bool {
        !lock(&self.state).links.is_empty()
    }

    /// The attempt that it belongs to, once there was one.
    pub fn nonce(&self) -> Option<[u8; 16]> {
        lock(&self.state).nonce
    }

    /// Orders for the keeper.
    pub fn orders(&self) -> Receiver<Order> {
        self.orders.1.clone()
    }

    /// Lets in a connection whose HELLO proved the key, under its nonce.
    pub fn admit(self: &Arc<Self>, link: &Arc<Link>, nonce: [u8; 16]) -> Result<()> {
        let mut state = lock(&self.state);
        if *state.nonce.get_or_insert(nonce) != nonce {
            return Err(replayed(&self.id));
        }
        if state.links.len() >= MAX_LINKS {
            let text = format!("session {} has {MAX_LINKS} connections already", self.id);
            return Err(MoverError::new(Code::LimitExceeded, text).at_receiver());
        }
        match &state.phase {
            Phase::Failed(error) => return Err(error.clone()),
            Phase::Waiting => {
                if let Err(error) = self.start(&mut state.threads) {
                    // Those that did start end by themselves.
                    self.over.come();
                    state.phase = Phase::Failed(error.clone());
                    return Err(error);
                }
                state.phase = Phase::Receiving;
            }
            Phase::Receiving | Phase::Done => {}
        }
        state.links.push(Arc::clone(link));
        Ok(())
    }

    /// Starts its threads.
    fn start(self: &Arc<Self>, threads: &mut Vec<JoinHandle<()>>) -> Result<()> {
        let readers = self.readers();
        // As many chunks as they hold can wait for them.
        let workers = (self.pool.chunks() / 2).min(WORKERS);
        self.workers.store(workers + readers, Ordering::Relaxed);
        for _ in 0..workers {
            self.start_one(threads, |session| session.work())?;
        }
        for _ in 0..readers {
            self.start_one(threads, |session| session.read_back())?;
        }
        self.start_one(threads, keeper::run)
    }

    fn start_one(
        self: &Arc<Self>,
        threads: &mut Vec<JoinHandle<()>>,
        run: fn(&Arc<Session>),
    ) -> Result<()> {
        let session = Arc::clone(self);
        let started = guard::start(move || run(&session));
        threads.push(started.map_err(MoverError::at_receiver)?);
        Ok(())
    }

    /// Reads frames of an admitted connection until it ends.
    pub fn serve(&self, link: &Arc<Link>) {
        let ended = self.intake(link);
        if let Err(error) = ended {
            self.fail(error);
        }
        if let Phase::Failed(error) = self.phase() {
            // `fail` has told the links that stood then; tell a late one too.
            let payload = messages::encode_error(&error);
            let mut header = Header::new(Kind::Error, 0);
            header.payload_len = payload.len() as u32;
            let _ = link.send_by(Instant::now() + TICK, &header, &[&payload]);
            link.linger(LAST_WORDS);
        }
        link.abort();
        lock(&self.state)
            .links
            .retain(|other| !Arc::ptr_eq(other, link));
        self.changed.notify_all();
    }

    /// Ends the session with an error; the first one counts.
    pub fn fail(&self, error: MoverError) {
        let links = {
            let mut state = lock(&self.state);
            if matches!(state.phase, Phase::Done | Phase::Failed(_)) {
                return;
            }
            state.phase = Phase::Failed(error.clone());
            state.links.clone()
        };
        self.over.come();
        let payload = messages::encode_error(&error);
        let mut header = Header::new(Kind::Error, 0);
        header.payload_len = payload.len() as u32;
        let end = Instant::now() + FAREWELL;
        for link in links {
            let end = end.min(Instant::now() + TICK);
            let _ = link.send_by(end, &header, &[&payload]);
            link.close_by(end);
        }
    }

    /// Notes that all is published, and tells the sender.
    pub fn finish(&self) {
        let links = {
            let mut state = lock(&self.state);
            if state.phase != Phase::Receiving {
                return;
            }
            state.phase = Phase::Done;
            state.links.clone()
        };
        self.pool.trim();
        for link in links {
            self.send_receipts(&link);
        }
    }

    /// Sends all receipts.
    pub fn send_receipts(&self, link: &Link) {
        let receipts = lock(&self.receipts).clone();
        for (index, receipt) in receipts.iter().enumerate() {
            let Some(receipt) = receipt else { continue };
            let payload = receipt.encode();
            let mut header = Header::new(Kind::Receipt, index as u16);
            header.payload_len = payload.len() as u32;
            header.logical_len = receipt.allocated_word();
            let _ = link.send(&header, &[&payload]);
        }
    }

    /// Ends it and waits until its threads have let go of everything.
    pub fn close(&self) {
        self.fail(closed(&self.id));
        self.over.come();
        let (links, threads) = {
            let mut state = lock(&self.state);
            (state.links.clone(), std::mem::take(&mut state.threads))
        };
        let end = Instant::now() + FAREWELL;
        for link in links {
            link.close_by(end);
        }
        for thread in threads {
            let _ = thread.join();
        }
        let state = lock(&self.state);
        let left = |state: &mut State| !state.links.is_empty();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, LAST_WORDS, left)
            .unwrap_or_else(PoisonError::into_inner);
        for link in &state.links {
            link.abort();
        }
    }

    /// Breaks all connections but one; true when nothing of theirs is left to do.
    pub fn is_alone(&self, link: &Arc<Link>) -> bool {
        let state = lock(&self.state);
        let others = || state.links.iter().filter(|other| !Arc::ptr_eq(other, link));
        others().for_each(|other| other.abort());
        others().next().is_none() && self.unplaced.load(Ordering::Acquire) == 0
    }

    /// Tells the sender that we live, now and then.
    pub fn sign_of_life(&self, link: &Link, last: &mut Instant) {
        if last.elapsed() > BUSY_SIGN {
            *last = Instant::now();
            let _ = link.send(&Header::new(Kind::Ping, 0), &[]);
        }
    }

    /// The error for a frame that its sender should not have sent.
    pub fn broken(&self, link: &Link, what: &str) -> MoverError {
        let text = format!("{} broke the protocol: it sent {what}", link.peer);
        MoverError::new(Code::Protocol, text).at_receiver()
    }
}

/// What the sender of a closed session hears.
pub fn closed(id: &str) -> MoverError {
    let text = format!("session {id} was closed or replaced at the receiver");
    MoverError::new(Code::SessionClosed, text).at_receiver()
}

/// What another attempt with the same key hears.
pub fn replayed(id: &str) -> MoverError {
    let text = format!("the key of session {id} was used before; open the session anew");
    MoverError::new(Code::SessionKeyReplayed, text).at_receiver()
}
