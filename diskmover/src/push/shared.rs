//! What all threads of a copy share.

use std::convert::Infallible;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use rustls::ClientConfig;

use super::standing::Standing;
use super::{Finish, Job};
use crate::base::Mask;
use crate::boot;
use crate::bottleneck::{Bottleneck, Lately};
use crate::digest::Bitmap;
use crate::effort::Effort;
use crate::error::{MoverError, Result};
use crate::feed::{Feed, Volume};
use crate::frame::{Header, Kind};
use crate::growth::Growth;
use crate::link::Link;
use crate::messages::{self, Keys, Receipt};
use crate::pool::{Buffer, Pool, lock};
use crate::progress::{Eta, Meter, Progress};
use crate::repeats::Repeats;
use crate::session::TICK;
use crate::silence::Silence;
use crate::throttle::Throttle;
use crate::wake::{Bell, Moment};

/// How long telling the receiver why the copy ends may take, over all connections, and
/// over one of them.
const FAREWELL: Duration = Duration::from_secs(1);
const FAREWELL_OF_ONE: Duration = Duration::from_millis(500);
/// How long closing all connections may take after that. Then they are broken.
pub const CLOSING: Duration = Duration::from_millis(500);
// Cancelling takes less than 2 seconds: threads that are not woken look every `TICK`.
const _: () = assert!(FAREWELL.as_millis() + CLOSING.as_millis() + 4 * TICK.as_millis() < 2000);
/// Chunks in each queue between stages.
pub const QUEUE: usize = 16;

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
    /// Which start of this machine it is.
    pub boot: u64,
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
    pub standing: Mutex<Standing>,
    /// Connection threads that have not ended.
    pub(super) uplinks: AtomicUsize,
    /// Answers of the receiver that brought the copy on.
    pub answers: AtomicU64,
    /// Frames that were sent over connections that stand, and have no answer.
    pub owed: AtomicUsize,
    /// How long the receiver has given none of those that were due.
    pub(super) silence: Mutex<Silence>,
    /// Bytes of frames sent.
    pub wire: AtomicU64,
    /// Whether the receiver says that it does not keep up.
    pub target_slow: Lately,
    /// What the receiver asked for again because it came corrupt.
    pub repeats: Repeats,
    /// A note said that something did.
    pub told_corrupt: AtomicBool,
    /// How hard to compress now.
    pub effort: Effort,
    pub(super) growth: Mutex<Growth>,
    /// Why no connection came to stand, last.
    pub(super) trouble: Mutex<String>,
    pub(super) passes: AtomicU64,
    pub(super) resumed: AtomicU64,
    pub(super) meter: Meter,
    pub(super) bottleneck: Bottleneck,
    /// When all threads should end; `end` alone says so.
    over: Moment,
    /// When nothing is left but to say that all is there.
    pub(super) all_sent: Moment,
    /// Wakes the coordinator, on what it would find at its next look: that a volume is
    /// complete or published, or a thread has ended.
    pub bell: Bell,
    pub(super) outcome: Mutex<Option<Result<Vec<Receipt>>>>,
    pub(super) ended: Condvar,
    /// Held while the receiver is told why the copy ends.
    telling: Mutex<()>,
}

impl Shared {
    /// A copy that has not begun.
    pub(super) fn new(
        job: Job,
        config: Arc<ClientConfig>,
        nonce: [u8; 16],
        volumes: Vec<Volume>,
    ) -> Shared {
        Shared {
            keys: Keys::derive(&job.key),
            config,
            boot: boot::mark(&nonce),
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
            standing: Mutex::new(Standing::new(Instant::now())),
            uplinks: AtomicUsize::new(0),
            answers: AtomicU64::new(0),
            owed: AtomicUsize::new(0),
            silence: Mutex::new(Silence::new(Instant::now())),
            wire: AtomicU64::new(0),
            target_slow: Lately::default(),
            repeats: Repeats::default(),
            told_corrupt: AtomicBool::new(false),
            effort: Effort::new(job.compression),
            growth: Mutex::new(Growth::new(job.connections, job.most_connections)),
            trouble: Mutex::default(),
            passes: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
            meter: Meter::default(),
            bottleneck: Bottleneck::default(),
            over: Moment::default(),
            all_sent: Moment::default(),
            bell: Bell::default(),
            outcome: Mutex::new(None),
            ended: Condvar::new(),
            telling: Mutex::new(()),
            job,
        }
    }

    /// Whether all threads should end.
    pub fn stopping(&self) -> bool {
        self.over.has_come()
    }

    /// Where to wait for that beside a queue.
    pub fn over(&self) -> &Receiver<Infallible> {
        self.over.awaited()
    }

    /// Where to wait until nothing is left but to say that all is there.
    pub fn all_sent(&self) -> &Receiver<Infallible> {
        self.all_sent.awaited()
    }

    /// The connections that stand.
    pub fn links(&self) -> Vec<Arc<Link>> {
        lock(&self.standing).links().to_vec()
    }

    /// Ends the copy with an error, and tells the receiver; the first one counts.
    pub fn fail(&self, error: MoverError) {
        // Whoever sees that the copy ends closes connections: not before this is over.
        let _telling = lock(&self.telling);
        if !self.end(Err(error.clone())) {
            return;
        }
        let payload = messages::encode_error(&error);
        let mut header = Header::new(Kind::Error, 0);
        header.payload_len = payload.len() as u32;
        let links = self.links();
        let end = Instant::now() + FAREWELL;
        for link in &links {
            let end = end.min(Instant::now() + FAREWELL_OF_ONE);
            let _ = link.send_by(end, &header, &[&payload]);
            link.close_by(end);
        }
    }

    /// Waits until the receiver was told why the copy ends, if somebody is at it.
    pub fn await_farewell(&self) {
        drop(lock(&self.telling));
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

    pub(super) fn end(&self, outcome: Result<Vec<Receipt>>) -> bool {
        let mut slot = lock(&self.outcome);
        if slot.is_some() {
            return false;
        }
        *slot = Some(outcome);
        drop(slot);
        self.over.come();
        self.bell.ring();
        self.feed.close();
        self.volumes.iter().for_each(|volume| volume.source.abort());
        self.ended.notify_all();
        true
    }

    /// The zstd level for the next chunk; None to send it as it is.
    pub fn level(&self) -> Option<i32> {
        self.effort.level(self.parcels.1.len(), QUEUE)
    }

    pub(super) fn done(&self) -> u64 {
        self.volumes.iter().map(Volume::done_bytes).sum()
    }

    pub(super) fn progress(&self) -> Progress {
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
            connections: lock(&self.standing).links().len() as u64,
            unreadable: self.volumes.iter().map(Volume::unreadable_bytes).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::CHUNK;
    use crate::error::Code;
    use crate::push::Push;
    use crate::rig::{Rig, SESSION, eventually, noise};

    #[test]
    fn connections_stand_until_the_receiver_was_told_why() {
        let rig = Rig::new();
        let size = 4 * CHUNK;
        let source = rig.source("disk", size, &[(0, &noise(9, size as usize))]);
        rig.open(&[("disk", size)]).unwrap();
        let mut job = rig.job(&[&source]);
        job.limit = Some(1);
        let push = Push::start(job).unwrap();
        eventually("it is under way", || {
            (push.progress().connections == 2).then_some(())
        });
        // What `fail` does, by a thread that does not get a core for a while.
        let shared = &push.shared;
        let telling = lock(&shared.telling);
        let error = MoverError::new(Code::Cancelled, "on purpose");
        shared.end(Err(error.clone()));
        std::thread::sleep(TICK * 5);
        let payload = messages::encode_error(&error);
        let mut header = Header::new(Kind::Error, 0);
        header.payload_len = payload.len() as u32;
        let links = shared.links();
        let link = links.first().expect("all connections are gone");
        link.send(&header, &[&payload]).unwrap();
        drop(telling);
        assert_eq!(rig.failure(SESSION).code, Code::Cancelled);
    }
}
