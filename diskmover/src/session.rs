//! A receiving session: what one sender attempt may write, and how far it is.
//!
//! ```text
//! WAITING --first valid HELLO--> RECEIVING --all published--> DONE
//!    |                               | any error
//!    +---------close---------------->+------------------> FAILED
//! ```
//! Threads of a session: one for each connection (`intake`), which checks frames
//! and fills buffers; workers, which unpack, verify and write; and the keeper
//! (keeper.rs), which alone opens, syncs and publishes targets.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, SendTimeoutError, Sender, bounded};

use crate::base::{self, Mask};
use crate::bottleneck::piles_up;
use crate::codec::Decoder;
use crate::digest::{self, BLOCK, Bitmap, Hash};
use crate::dirt::Dirt;
use crate::error::{Code, MoverError, Result};
use crate::frame::{self, CODEC_ZSTD, Header, Kind};
use crate::guard;
use crate::keeper::{self, Order};
use crate::link::Link;
use crate::messages::{self, Keys, Receipt};
use crate::pool::{Buffer, Pool, lock};
use crate::progress::{Eta, Meter, Progress};
use crate::sys::AlignedBuf;
use crate::target::{Taken, Target, TargetSpec};

/// How the names of the stand-alone tool's sessions begin.
pub const OPEN_TO_ALL: &str = "open/";
/// Most volumes of a session.
pub const MAX_VOLUMES: usize = 1024;
const MAX_LINKS: usize = 64;
const QUEUE: usize = 16;
/// How often blocked threads look whether they should stop.
pub const TICK: Duration = Duration::from_millis(100);
const BUSY_SIGN: Duration = Duration::from_secs(5);

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

/// A frame on its way to the target.
pub struct Job {
    link: Arc<Link>,
    header: Header,
    cargo: Cargo,
}

/// What a frame brings.
enum Cargo {
    /// A run of zero chunks.
    Zeros,
    /// What a chunk holds: its hash, and its blocks'.
    Hashes(Vec<Hash>),
    /// A chunk: its bitmap, its data and the length of that.
    Data(Bitmap, Buffer, usize),
    /// Blocks of a chunk: which ones, then as above.
    Patch(Mask, Bitmap, Buffer, usize),
}

/// What a worker keeps from job to job.
struct Memory {
    unpacked: AlignedBuf,
    composed: AlignedBuf,
    decoder: Decoder,
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
    /// Workers that have not ended.
    pub workers: AtomicUsize,
    /// Frames that were received and not dealt with.
    unplaced: AtomicUsize,
    /// Tells the workers to end.
    pub drained: AtomicBool,
    stop: AtomicBool,
    /// How it ended was told to the caller of a listener without sessions.
    told: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    sizes: Mutex<Vec<Option<u64>>>,
    resumed: AtomicU64,
    finished: AtomicU64,
    wire: AtomicU64,
    meter: Meter,
    pool: Arc<Pool>,
    jobs: (Sender<Job>, Receiver<Job>),
    orders: (Sender<Order>, Receiver<Order>),
}

impl Session {
    /// A session that waits for its sender.
    pub fn new(opening: Opening, buffer_bytes: u64) -> Arc<Session> {
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
            drained: AtomicBool::new(false),
            stop: AtomicBool::new(false),
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
            meter: Meter::default(),
            pool: Pool::new(buffer_bytes),
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
        self.stop.load(Ordering::Relaxed)
    }

    /// Whether a connection stands.
    pub fn in_use(&self) -> bool {
        !lock(&self.state).links.is_empty()
    }

    /// Whether it belongs to this attempt.
    pub fn has_nonce(&self, nonce: &[u8; 16]) -> bool {
        lock(&self.state).nonce.as_ref() == Some(nonce)
    }

    /// Orders for the keeper.
    pub fn orders(&self) -> Receiver<Order> {
        self.orders.1.clone()
    }

    /// Lets in a connection whose HELLO proved the key, under its nonce.
    pub fn admit(self: &Arc<Self>, link: &Arc<Link>, nonce: [u8; 16]) -> Result<()> {
        let mut state = lock(&self.state);
        if *state.nonce.get_or_insert(nonce) != nonce {
            let text = format!(
                "the key of session {} was used before; open the session anew",
                self.id
            );
            return Err(MoverError::new(Code::SessionKeyReplayed, text).at_receiver());
        }
        if state.links.len() >= MAX_LINKS {
            let text = format!("session {} has {MAX_LINKS} connections already", self.id);
            return Err(MoverError::new(Code::LimitExceeded, text).at_receiver());
        }
        match &state.phase {
            Phase::Failed(error) => return Err(error.clone()),
            Phase::Waiting => {
                state.phase = Phase::Receiving;
                let count = std::thread::available_parallelism()
                    .map_or(2, |n| n.get())
                    .clamp(2, 4);
                self.workers.store(count, Ordering::Relaxed);
                for _ in 0..count {
                    let session = Arc::clone(self);
                    state
                        .threads
                        .push(std::thread::spawn(move || session.work()));
                }
                let session = Arc::clone(self);
                state
                    .threads
                    .push(std::thread::spawn(move || keeper::run(&session)));
            }
            Phase::Receiving | Phase::Done => {}
        }
        state.links.push(Arc::clone(link));
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
            let _ = link.send_soon(&header, &[&payload], TICK);
            link.linger(Duration::from_secs(1));
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
        self.stop.store(true, Ordering::Relaxed);
        let payload = messages::encode_error(&error);
        let mut header = Header::new(Kind::Error, 0);
        header.payload_len = payload.len() as u32;
        for link in links {
            let _ = link.send_soon(&header, &[&payload], TICK);
            link.close();
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
        for (index, receipt) in receipts.iter().flatten().enumerate() {
            let payload = receipt.encode();
            let mut header = Header::new(Kind::Receipt, index as u16);
            header.payload_len = payload.len() as u32;
            let _ = link.send(&header, &[&payload]);
        }
    }

    /// Ends it and waits until its threads have let go of everything.
    pub fn close(&self) {
        let text = format!("session {} was closed or replaced at the receiver", self.id);
        self.fail(MoverError::new(Code::SessionClosed, text).at_receiver());
        self.stop.store(true, Ordering::Relaxed);
        let (links, threads) = {
            let mut state = lock(&self.state);
            (state.links.clone(), std::mem::take(&mut state.threads))
        };
        for link in links {
            link.close();
        }
        for thread in threads {
            let _ = thread.join();
        }
        let state = lock(&self.state);
        let wait = Duration::from_secs(2);
        let left = |state: &mut State| !state.links.is_empty();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, wait, left)
            .unwrap_or_else(PoisonError::into_inner);
        for link in &state.links {
            link.abort();
        }
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let targets = self.targets.read().unwrap_or_else(PoisonError::into_inner);
        let open: u64 = targets
            .iter()
            .flatten()
            .map(|target| target.done_bytes())
            .sum();
        let done = open + self.finished.load(Ordering::Relaxed);
        let sizes: u64 = lock(&self.sizes).iter().flatten().sum();
        let total = self
            .specs
            .iter()
            .filter_map(|spec| spec.size)
            .sum::<u64>()
            .max(sizes);
        let receiving = self.phase() == Phase::Receiving;
        let rate = if receiving { self.meter.rate() } else { 0 };
        Progress {
            done,
            total,
            resumed: self.resumed.load(Ordering::Relaxed),
            wire: self.wire.load(Ordering::Relaxed),
            rate,
            eta: match receiving {
                true => self.meter.eta(total.saturating_sub(done)),
                false => Eta::default(),
            },
            limited_by: "",
            connections: lock(&self.state).links.len() as u64,
        }
    }

    /// Takes a sample for the rate.
    pub fn tick(&self) {
        self.meter.note(self.progress().done);
    }

    /// Notes the size of a volume that was opened.
    pub fn note_open(&self, volume: usize, size: u64, resumed: u64) {
        lock(&self.sizes)[volume] = Some(size);
        self.resumed.fetch_add(resumed, Ordering::Relaxed);
    }

    /// Notes that a volume is published and its target is gone.
    pub fn note_published(&self, volume: usize, receipt: Receipt) {
        self.finished.fetch_add(receipt.size, Ordering::Relaxed);
        lock(&self.sizes)[volume] = Some(receipt.size);
        lock(&self.receipts)[volume] = Some(receipt);
    }

    fn intake(&self, link: &Arc<Link>) -> Result<()> {
        loop {
            let header = match link.recv_header(None) {
                Ok(header) => header,
                Err(error) if error.is_network() => return Ok(()),
                Err(error) => return Err(error.to_mover(&link.peer).at_receiver()),
            };
            let size = frame::HEADER as u64 + u64::from(header.payload_len);
            self.wire.fetch_add(size, Ordering::Relaxed);
            let on = match header.kind {
                Kind::Ping => link.send(&Header::new(Kind::Ping, 0), &[]).is_ok(),
                Kind::Data | Kind::Patch => self.take_data(link, header)?,
                Kind::Hashes => self.take_hashes(link, header)?,
                Kind::Zero => {
                    self.chunks(&header, link)?;
                    self.push(link, header, Cargo::Zeros)
                }
                Kind::Open | Kind::Finish => {
                    let Ok(payload) = link.recv_small(&header) else {
                        return Ok(());
                    };
                    let volume = self.volume(&header, link)?;
                    if header.kind == Kind::Finish && lock(&self.sizes)[volume].is_none() {
                        return Err(self.not_open(link));
                    }
                    self.order(Order {
                        link: Arc::clone(link),
                        header,
                        payload,
                    })
                }
                Kind::Error => {
                    let Ok(payload) = link.recv_small(&header) else {
                        return Ok(());
                    };
                    let error = messages::decode_error(&payload);
                    return Err(error.unwrap_or_else(|| self.broken(link, "an unreadable error")));
                }
                _ => return Err(self.broken(link, &format!("{:?} out of phase", header.kind))),
            };
            if !on {
                return Ok(());
            }
        }
    }

    fn take_data(&self, link: &Arc<Link>, header: Header) -> Result<bool> {
        let chunk = self.chunks(&header, link)?;
        let len = header.logical_len as usize;
        debug_assert!(chunk.end - chunk.start == 1);
        let is_patch = header.kind == Kind::Patch;
        let mut mask = [0xFF; 2];
        let mut bitmap: Bitmap = [0; 32];
        let front = bitmap.len() + if is_patch { mask.len() } else { 0 };
        let Some(body) = (header.payload_len as usize).checked_sub(front) else {
            return Err(self.broken(link, "a chunk without a bitmap"));
        };
        if is_patch && link.recv_payload(&mut mask).is_err()
            || link.recv_payload(&mut bitmap).is_err()
        {
            return Ok(false);
        }
        let mask = Mask::from_le_bytes(mask);
        let data = digest::data_len(&bitmap, len)
            .and_then(|_| digest::data_len(&base::select(&bitmap, mask), len))
            .unwrap_or(0);
        let fits = if header.codec == CODEC_ZSTD {
            body < data
        } else {
            body == data
        };
        if (data == 0 && !is_patch) || !fits {
            return Err(self
                .broken(link, "a chunk whose bitmap does not fit")
                .at(header.offset));
        }
        let Some(mut buffer) = self.buffer(link) else {
            return Ok(false);
        };
        if link.recv_payload(&mut buffer[..body]).is_err() {
            return Ok(false);
        }
        let cargo = if is_patch {
            Cargo::Patch(mask, bitmap, buffer, body)
        } else {
            Cargo::Data(bitmap, buffer, body)
        };
        Ok(self.push(link, header, cargo))
    }

    fn take_hashes(&self, link: &Arc<Link>, header: Header) -> Result<bool> {
        self.chunks(&header, link)?;
        let Ok(payload) = link.recv_small(&header) else {
            return Ok(false);
        };
        let (hashes, rest) = payload.as_chunks::<32>();
        let pieces = (header.logical_len as usize).div_ceil(base::PIECE);
        if !rest.is_empty() || hashes.len() != 1 + pieces {
            return Err(self.broken(link, "a HASHES frame of the wrong length"));
        }
        Ok(self.push(link, header, Cargo::Hashes(hashes.to_vec())))
    }

    /// Waits for a buffer; the sender is told meanwhile that we live.
    fn buffer(&self, link: &Link) -> Option<Buffer> {
        let mut sign = Instant::now();
        while !self.stopping() && !self.drained.load(Ordering::Acquire) {
            if let Some(buffer) = self.pool.take(TICK) {
                return Some(buffer);
            }
            self.sign_of_life(link, &mut sign);
        }
        None
    }

    /// Hands a job to the workers; false when there are none any more. Then it
    /// is a late duplicate: nothing is finished while a chunk is missing.
    fn push(&self, link: &Arc<Link>, header: Header, cargo: Cargo) -> bool {
        let mut job = Job {
            link: Arc::clone(link),
            header,
            cargo,
        };
        let mut sign = Instant::now();
        self.unplaced.fetch_add(1, Ordering::Acquire);
        while !self.stopping() && !self.drained.load(Ordering::Acquire) {
            match self.jobs.0.send_timeout(job, TICK) {
                Ok(()) => return true,
                Err(SendTimeoutError::Timeout(back)) => job = back,
                Err(SendTimeoutError::Disconnected(_)) => return false,
            }
            self.sign_of_life(link, &mut sign);
        }
        false
    }

    /// Breaks all connections but one; true when nothing of theirs is left to do.
    pub fn is_alone(&self, link: &Arc<Link>) -> bool {
        let state = lock(&self.state);
        let others = || state.links.iter().filter(|other| !Arc::ptr_eq(other, link));
        others().for_each(|other| other.abort());
        others().next().is_none() && self.unplaced.load(Ordering::Acquire) == 0
    }

    fn order(&self, order: Order) -> bool {
        let mut order = order;
        while !self.stopping() {
            match self.orders.0.send_timeout(order, TICK) {
                Ok(()) => return true,
                Err(SendTimeoutError::Timeout(back)) => order = back,
                Err(SendTimeoutError::Disconnected(_)) => return false,
            }
        }
        false
    }

    /// Tells the sender that we live, now and then.
    pub fn sign_of_life(&self, link: &Link, last: &mut Instant) {
        if last.elapsed() > BUSY_SIGN {
            *last = Instant::now();
            let _ = link.send(&Header::new(Kind::Ping, 0), &[]);
        }
    }

    /// The volume that a frame is about.
    fn volume(&self, header: &Header, link: &Link) -> Result<usize> {
        let volume = usize::from(header.volume);
        if volume >= self.specs.len() {
            return Err(self.broken(link, "a volume that the session does not have"));
        }
        Ok(volume)
    }

    fn chunks(&self, header: &Header, link: &Link) -> Result<std::ops::Range<u64>> {
        let volume = self.volume(header, link)?;
        let Some(size) = lock(&self.sizes)[volume] else {
            return Err(self.not_open(link));
        };
        header
            .chunks(size)
            .map_err(|e| self.broken(link, &e.to_string()).at(header.offset))
    }

    /// The error for content of a volume that is not open.
    fn not_open(&self, link: &Link) -> MoverError {
        if !self.id.starts_with(OPEN_TO_ALL) {
            return self.broken(link, "a frame for a volume before opening it");
        }
        // Such a session is made by its first HELLO: the sender opened its volume
        // in an earlier one.
        let text = "the receiver has restarted meanwhile; copy again to go on";
        MoverError::new(Code::SessionUnknown, text).at_receiver()
    }

    /// The error for a frame that its sender should not have sent.
    pub fn broken(&self, link: &Link, what: &str) -> MoverError {
        let text = format!("{} broke the protocol: it sent {what}", link.peer);
        MoverError::new(Code::Protocol, text).at_receiver()
    }

    /// A worker: unpacks, verifies, writes and acknowledges.
    fn work(&self) {
        let work = || {
            if let Err(error) = self.work_on() {
                self.fail(error);
            }
        };
        guard::run(work, || self.fail(guard::crash("a worker").at_receiver()));
        self.workers.fetch_sub(1, Ordering::Release);
    }

    fn work_on(&self) -> Result<()> {
        let no_memory = || MoverError::new(Code::Internal, "out of memory").at_receiver();
        let chunk = || AlignedBuf::new(digest::CHUNK as usize).ok_or_else(no_memory);
        let mut memory = Memory {
            unpacked: chunk()?,
            composed: chunk()?,
            decoder: Decoder::new().ok_or_else(no_memory)?,
        };
        while !self.stopping() {
            let Ok(job) = self.jobs.1.recv_timeout(TICK) else {
                if self.drained.load(Ordering::Acquire) {
                    return Ok(());
                }
                continue;
            };
            while !self.dirt.has_room(TICK) {
                if self.stopping() {
                    return Ok(());
                }
            }
            let Job {
                link,
                header,
                cargo,
            } = job;
            let placed = self.place(&header, cargo, &mut memory);
            let taken = placed.map_err(|e| from_peer(e, &link))?;
            let mut answer = header;
            self.unplaced.fetch_sub(1, Ordering::Release);
            answer.auth = [0; 32];
            answer.kind = Kind::Ack;
            answer.codec = 0;
            answer.payload_len = 0;
            let mut payload = [0; 2];
            if let Taken::Without(mask) = taken {
                payload = mask.to_le_bytes();
                answer.kind = Kind::Want;
                answer.payload_len = payload.len() as u32;
            } else if piles_up(self.jobs.1.len(), QUEUE, &self.pool) {
                answer.codec = frame::ACK_TARGET_SLOW;
            }
            // Without the acknowledgement the chunk comes again: no harm.
            let _ = link.send(&answer, &[&payload[..answer.payload_len as usize]]);
        }
        Ok(())
    }

    fn place(&self, header: &Header, cargo: Cargo, memory: &mut Memory) -> Result<Taken> {
        match cargo {
            Cargo::Zeros => self.place_zeros(header),
            Cargo::Hashes(hashes) => self.place_from_base(header, &hashes, memory),
            Cargo::Data(bitmap, buffer, body) => {
                self.place_data(header, &bitmap, &buffer[..body], memory)
            }
            Cargo::Patch(mask, bitmap, buffer, body) => {
                self.place_patch(header, mask, &bitmap, &buffer[..body], memory)
            }
        }
    }

    fn place_data(
        &self,
        header: &Header,
        bitmap: &Bitmap,
        body: &[u8],
        memory: &mut Memory,
    ) -> Result<Taken> {
        let Some(target) = self.target(header) else {
            return Ok(Taken::Whole);
        };
        let data = self.unpack(
            header,
            bitmap,
            body,
            &mut memory.unpacked,
            &mut memory.decoder,
        )?;
        let hash = digest::chunk_hash(bitmap, data);
        if !header.is_authentic(&self.keys.frame, &hash) {
            let text = "the chunk does not match its authenticator";
            return Err(self.corrupt(header, text.to_owned()));
        }
        if data.chunks(BLOCK).any(digest::is_zero) {
            let text = "a block that is all zero was sent as data";
            return Err(self.corrupt(header, text.to_owned()));
        }
        target.place(header.offset / digest::CHUNK, bitmap, data, hash)?;
        self.dirt.add(data.len() as u64);
        Ok(Taken::Whole)
    }

    /// Lays blocks over the base. When the result is not what the sender has, the
    /// base has changed since, and all of the chunk is wanted.
    fn place_patch(
        &self,
        header: &Header,
        mask: Mask,
        bitmap: &Bitmap,
        body: &[u8],
        memory: &mut Memory,
    ) -> Result<Taken> {
        let Some(target) = self.target(header) else {
            return Ok(Taken::Whole);
        };
        let sent = base::select(bitmap, mask);
        let data = self.unpack(
            header,
            &sent,
            body,
            &mut memory.unpacked,
            &mut memory.decoder,
        )?;
        let is_right = |hash: &Hash| header.is_authentic(&self.keys.frame, hash);
        let chunk = header.offset / digest::CHUNK;
        let taken = target.patch(chunk, mask, bitmap, data, &mut memory.composed, is_right)?;
        self.dirt.add(header.logical_len);
        Ok(taken)
    }

    fn place_from_base(
        &self,
        header: &Header,
        hashes: &[Hash],
        memory: &mut Memory,
    ) -> Result<Taken> {
        let (Some(target), [hash, pieces @ ..]) = (self.target(header), hashes) else {
            return Ok(Taken::Whole);
        };
        if !header.is_authentic(&self.keys.frame, hash) {
            let text = "hashes do not match their authenticator";
            return Err(self.corrupt(header, text.to_owned()));
        }
        let chunk = header.offset / digest::CHUNK;
        let taken = target.take(chunk, *hash, pieces, &mut memory.composed)?;
        self.dirt.add(1);
        Ok(taken)
    }

    fn unpack<'a>(
        &self,
        header: &Header,
        bitmap: &Bitmap,
        body: &'a [u8],
        scratch: &'a mut [u8],
        decoder: &mut Decoder,
    ) -> Result<&'a [u8]> {
        if header.codec != CODEC_ZSTD {
            return Ok(body);
        }
        let len = digest::data_len(bitmap, header.logical_len as usize).unwrap_or(0);
        let out = &mut scratch[..len];
        let unpacked = decoder.decompress(body, out);
        unpacked.map_err(|e| self.corrupt(header, e.to_string()))?;
        Ok(out)
    }

    fn corrupt(&self, header: &Header, why: String) -> MoverError {
        MoverError::new(Code::ChunkCorrupt, why)
            .at_receiver()
            .in_volume(&self.specs[usize::from(header.volume)].volume)
            .at(header.offset)
    }

    fn place_zeros(&self, header: &Header) -> Result<Taken> {
        let Some(target) = self.target(header) else {
            return Ok(Taken::Whole);
        };
        if !header.is_authentic(&self.keys.frame, &digest::ZERO_HASH) {
            let text = "a zero run does not match its authenticator";
            let volume = &self.specs[usize::from(header.volume)].volume;
            return Err(MoverError::new(Code::ChunkCorrupt, text)
                .at_receiver()
                .in_volume(volume)
                .at(header.offset));
        }
        let end = (header.offset + header.logical_len).div_ceil(digest::CHUNK);
        target.place_zeros(header.offset / digest::CHUNK, end)?;
        self.dirt.add(1);
        Ok(Taken::Whole)
    }

    /// The open target of a frame; None once it is published.
    fn target(&self, header: &Header) -> Option<Arc<Target>> {
        let targets = self.targets.read().unwrap_or_else(PoisonError::into_inner);
        targets[usize::from(header.volume)].clone()
    }
}

/// The same error, naming who sent what is wrong.
fn from_peer(error: MoverError, link: &Link) -> MoverError {
    match error.code {
        Code::ChunkCorrupt | Code::SourceChanged => MoverError {
            message: format!("from {}: {}", link.peer, error.message),
            ..error
        },
        _ => error,
    }
}
