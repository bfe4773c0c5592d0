//! A copy under way: the threads of the sending end, and their common state.
//!
//! ```text
//! feed -> readers (4) -> work queue -> workers -> send queue -> uplinks (N)
//!   ^                                                              |
//!   +------------------ what a broken connection had --------------+
//! ```
//! The coordinator (push/coordinator.rs) watches: when all is acknowledged it
//! checks that the source did not change (else another pass begins, over what was
//! placed), lets one uplink send the root digests, and ends the copy when all
//! receipts are there.

mod check;
mod coordinator;
mod finish;

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use rustls::ClientConfig;

use crate::base::Mask;
use crate::bottleneck::Bottleneck;
use crate::digest::{Bitmap, Hash};
use crate::effort::{Compression, Effort};
use crate::error::{Code, MoverError, Result};
use crate::feed::{Feed, Volume};
use crate::frame::{Header, Kind};
use crate::growth::Growth;
use crate::guard;
use crate::link::Link;
use crate::messages::{self, Keys, Receipt};
use crate::origin::Origin;
use crate::pool::{Buffer, Pool, lock};
use crate::priority::IoPriority;
use crate::progress::{Eta, Meter, Progress};
use crate::repeats::Repeats;
use crate::salvage::OnReadError;
use crate::session::TICK;
use crate::throttle::Throttle;
use crate::tls::TlsFiles;

pub use finish::{Finish, Turn};

/// Chunks in each queue between stages.
pub const QUEUE: usize = 16;

/// What to copy, and how.
pub struct Job {
    /// HOST:PORT.
    pub to: String,
    /// The URI name that the receiver must have; None for any of the CA.
    pub receiver: Option<String>,
    /// Own credentials.
    pub tls: TlsFiles,
    /// Name of the session.
    pub session: String,
    /// The secret shared with the receiver.
    pub key: Hash,
    /// The copy, across sessions.
    pub tag: String,
    /// Id, origin and expected size of each volume.
    pub volumes: Vec<(String, Origin, Option<u64>)>,
    /// Number of connections to begin with.
    pub connections: usize,
    /// Most connections, which long distances lead to.
    pub most_connections: usize,
    /// Bytes a second.
    pub limit: Option<u64>,
    /// How hard to compress.
    pub compression: Compression,
    /// Whether holes are believed.
    pub trust_holes: bool,
    /// What to do where a source gives EIO.
    pub on_read_error: OnReadError,
    /// Memory for chunks.
    pub buffer_bytes: u64,
    /// How much its reads count beside others'.
    pub io_priority: IoPriority,
    /// How long to try when no connection stands.
    pub reconnect: Duration,
}

/// A piece that is ready for the wire.
pub enum Parcel {
    /// A chunk, or blocks of it: header, what precedes the data, the data and its
    /// length.
    Data(Header, Vec<u8>, Buffer, usize),
    /// What a chunk holds: header and hashes.
    Hashes(Header, Vec<u8>),
    /// A run of zero chunks.
    Zeros(Header),
}

/// A chunk as it was read.
pub struct Raw {
    /// Index of the volume.
    pub volume: usize,
    /// Number of the chunk.
    pub chunk: u64,
    /// Its bytes.
    pub buffer: Buffer,
    /// The blocks that were read; the others are holes.
    pub read: Bitmap,
    /// The blocks that the receiver does not have, once it said so.
    pub wanted: Option<Mask>,
}

/// What all threads share.
pub struct Shared {
    /// What to copy.
    pub job: Job,
    /// TLS of all connections.
    pub config: Arc<ClientConfig>,
    /// Keys of the session.
    pub keys: Keys,
    /// Same in all connections of this attempt.
    pub nonce: [u8; 16],
    /// The volumes.
    pub volumes: Vec<Volume>,
    /// What is to do.
    pub feed: Feed,
    /// Memory.
    pub pool: Arc<Pool>,
    /// The limit.
    pub throttle: Throttle,
    /// Chunks that were read.
    pub work: (Sender<Raw>, Receiver<Raw>),
    /// Pieces that are ready.
    pub parcels: (Sender<Parcel>, Receiver<Parcel>),
    /// Whether the receiver has opened all volumes.
    pub opened: AtomicBool,
    /// Held by the connection that lets them open.
    pub opening: Mutex<()>,
    /// The sockets of all connections, to break them.
    pub sockets: Mutex<Vec<Option<TcpStream>>>,
    /// Who sends the root digests.
    pub finish: Finish,
    /// Connections that stand.
    pub links: Mutex<Vec<Arc<Link>>>,
    /// Connection threads that have not ended.
    uplinks: AtomicUsize,
    /// Answers of the receiver that brought the copy on.
    pub answers: AtomicU64,
    /// When a connection that was of use last stood, and whether any ever did.
    pub last_link: Mutex<(Instant, bool)>,
    /// Bytes of frames sent.
    pub wire: AtomicU64,
    /// The receiver said last that it does not keep up.
    pub target_slow: AtomicBool,
    /// What the receiver asked for again because it came corrupt.
    pub repeats: Repeats,
    /// A note said that something did.
    pub told_corrupt: AtomicBool,
    /// How hard to compress now.
    pub effort: Effort,
    growth: Mutex<Growth>,
    /// Why no connection came to stand, last.
    trouble: Mutex<String>,
    passes: AtomicU64,
    resumed: AtomicU64,
    meter: Meter,
    bottleneck: Bottleneck,
    stop: AtomicBool,
    outcome: Mutex<Option<Result<Vec<Receipt>>>>,
    ended: Condvar,
}

/// A running copy.
pub struct Push {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Push {
    /// Checks the job, opens the sources and starts.
    pub fn start(job: Job) -> Result<Push> {
        check::job(&job)?;
        let config = job.tls.client()?;
        let mut volumes = Vec::with_capacity(job.volumes.len());
        let mut nonce = [0; 16];
        random_bytes(&mut nonce)?;
        for (id, origin, expected) in &job.volumes {
            let source = origin.open(&nonce, job.on_read_error);
            let source = source.map_err(|e| e.in_volume(id))?;
            let size = source.identity().size;
            if expected.is_some_and(|expected| expected != size) {
                let text = format!(
                    "{} has {size} bytes, not {}",
                    source.shown(),
                    expected.unwrap_or(0)
                );
                return Err(MoverError::new(Code::SourceInvalid, text).in_volume(id));
            }
            volumes.push(Volume::new(id.clone(), source, job.trust_holes)?);
        }
        let shared = Arc::new(Shared {
            keys: Keys::derive(&job.key),
            config,
            nonce,
            volumes,
            feed: Feed::default(),
            pool: Pool::new(job.buffer_bytes),
            throttle: Throttle::new(job.limit),
            work: bounded(QUEUE),
            parcels: bounded(QUEUE),
            opened: AtomicBool::new(false),
            opening: Mutex::new(()),
            sockets: Mutex::new((0..job.most_connections).map(|_| None).collect()),
            finish: Finish::default(),
            links: Mutex::default(),
            uplinks: AtomicUsize::new(0),
            answers: AtomicU64::new(0),
            last_link: Mutex::new((Instant::now(), false)),
            wire: AtomicU64::new(0),
            target_slow: AtomicBool::new(false),
            repeats: Repeats::default(),
            told_corrupt: AtomicBool::new(false),
            effort: Effort::new(job.compression),
            growth: Mutex::new(Growth::new(job.connections, job.most_connections)),
            trouble: Mutex::default(),
            passes: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
            meter: Meter::default(),
            bottleneck: Bottleneck::default(),
            stop: AtomicBool::new(false),
            outcome: Mutex::new(None),
            ended: Condvar::new(),
            job,
        });
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || coordinator::coordinate(&shared))
        };
        Ok(Push {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.shared.progress()
    }

    /// Changes the limit.
    pub fn set_limit(&self, limit: Option<u64>) -> Result<()> {
        check::limit(limit)?;
        self.shared.throttle.set(limit);
        Ok(())
    }

    /// Stops it and waits for its threads.
    pub fn cancel(&self) {
        self.shared
            .fail(MoverError::new(Code::Cancelled, "the copy was cancelled"));
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }

    /// Waits for the end; None when it still runs after `timeout`.
    pub fn wait(&self, timeout: Duration) -> Option<Result<Vec<Receipt>>> {
        let running = |outcome: &mut Option<_>| outcome.is_none();
        let (slot, _) = self
            .shared
            .ended
            .wait_timeout_while(lock(&self.shared.outcome), timeout, running)
            .unwrap_or_else(PoisonError::into_inner);
        let outcome = slot.clone();
        // Threads that fail after the first one lock it too, before they end.
        drop(slot);
        if outcome.is_some()
            && let Some(thread) = lock(&self.thread).take()
        {
            let _ = thread.join();
        }
        outcome
    }
}

impl Drop for Push {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl Shared {
    /// Whether all threads should end.
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Ends the copy with an error, and tells the receiver; the first one counts.
    pub fn fail(&self, error: MoverError) {
        if !self.end(Err(error.clone())) {
            return;
        }
        let payload = messages::encode_error(&error);
        let mut header = Header::new(Kind::Error, 0);
        header.payload_len = payload.len() as u32;
        let links = lock(&self.links).clone();
        for link in &links {
            let _ = link.send_soon(&header, &[&payload], TICK);
            link.close();
        }
    }

    /// Notes how much was there before.
    pub fn note_resumed(&self) {
        let there = self.volumes.iter().map(Volume::done_bytes).sum();
        self.resumed.store(there, Ordering::Relaxed);
    }

    /// Notes why a connection could not be made.
    pub fn note_trouble(&self, why: String) {
        *lock(&self.trouble) = why;
    }

    fn end(&self, outcome: Result<Vec<Receipt>>) -> bool {
        let mut slot = lock(&self.outcome);
        if slot.is_some() {
            return false;
        }
        *slot = Some(outcome);
        drop(slot);
        self.stop.store(true, Ordering::Relaxed);
        self.feed.close();
        self.volumes.iter().for_each(|volume| volume.source.abort());
        self.ended.notify_all();
        true
    }

    /// The zstd level for the next chunk; None to send it as it is.
    pub fn level(&self) -> Option<i32> {
        self.effort.level(self.parcels.1.len(), QUEUE)
    }

    fn done(&self) -> u64 {
        self.volumes.iter().map(Volume::done_bytes).sum()
    }

    fn progress(&self) -> Progress {
        let (done, total) = (self.done(), self.volumes.iter().map(Volume::size).sum());
        let (rate, eta) = match self.stopping() {
            true => (0, Eta::default()),
            false => (self.meter.rate(), self.meter.eta(total - done.min(total))),
        };
        Progress {
            done,
            total,
            resumed: self.resumed.load(Ordering::Relaxed),
            wire: self.wire.load(Ordering::Relaxed),
            rate,
            eta,
            limited_by: self.bottleneck.name(),
            connections: lock(&self.links).len() as u64,
            unreadable: self.volumes.iter().map(Volume::unreadable_bytes).sum(),
        }
    }
}

/// Runs a thread of the copy; the copy fails when it crashes.
fn guarded(shared: &Shared, what: &str, work: impl FnOnce()) {
    guard::run(work, || shared.fail(guard::crash(what)));
}

fn random_bytes(out: &mut [u8]) -> Result<()> {
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let error = |_| MoverError::new(Code::Internal, "the system gives no random numbers");
    provider.secure_random.fill(out).map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crashed_thread_ends_the_copy() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let own = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
        let cert = file("cert", &own.cert.pem());
        let push = Push::start(Job {
            to: "127.0.0.1:1".into(),
            receiver: None,
            tls: TlsFiles {
                key: file("key", &own.signing_key.serialize_pem()),
                ca: cert.clone(),
                cert,
            },
            session: "s".into(),
            key: [0; 32],
            tag: "t".into(),
            volumes: vec![("disk".into(), file("disk", "x").into(), None)],
            connections: 1,
            most_connections: 1,
            limit: None,
            compression: Compression::Off,
            trust_holes: true,
            on_read_error: OnReadError::Fail,
            buffer_bytes: 0,
            io_priority: IoPriority::Normal,
            reconnect: Duration::from_secs(600),
        })
        .unwrap();
        guarded(&push.shared, "a reader", || panic!("on purpose"));
        let outcome = push.wait(Duration::from_secs(60)).expect("it hangs");
        assert_eq!(outcome.unwrap_err().code, Code::Internal);
    }
}
