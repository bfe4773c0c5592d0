//! Hands out work to the readers: new work in order, lost work first.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::base::{Mask, Sharing};
use crate::digest;
use crate::error::{Code, MoverError, Result};
use crate::frame::{self, Header, Kind};
use crate::holes;
use crate::ledger::Ledger;
use crate::messages::Receipt;
use crate::plan::{Extents, Plan, Work};
use crate::pool::lock;
use crate::salvage::Salvage;
use crate::session::TICK;
use crate::source::{Identity, Source};
use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use crate::unreadable::Unreadable;

/// A volume on its way out.
pub struct Volume {
    /// Name on the wire.
    pub id: String,
    /// Where it is read.
    pub source: Box<dyn Source>,
    /// What is known and acknowledged.
    pub ledger: Mutex<Ledger>,
    /// The receiver's proof, once published.
    pub receipt: Mutex<Option<Receipt>>,
    /// Bytes of frames sent for it.
    pub wire: AtomicU64,
    /// Whether the receiver has older content to take chunks from.
    pub base: Sharing,
    /// A part of it was read twice and was not the same.
    torn: AtomicBool,
    /// Whether the source's map of its holes is believed.
    trust_holes: AtomicBool,
    plan: Mutex<Plan<Box<dyn Extents + Send>>>,
}

/// A piece of work on a volume.
pub struct Task {
    /// Index of the volume.
    pub volume: usize,
    /// What to read.
    pub work: Work,
    /// The blocks of the chunk that the receiver does not have, once it said so.
    pub wanted: Option<Mask>,
}

impl Volume {
    /// A volume of which nothing is sent yet.
    pub fn new(id: String, source: Box<dyn Source>, trust_holes: bool) -> Result<Volume> {
        let extents = source.extents(trust_holes).map_err(|e| e.in_volume(&id))?;
        let size = source.identity().size;
        Ok(Volume {
            ledger: Mutex::new(Ledger::new(size)),
            receipt: Mutex::new(None),
            wire: AtomicU64::new(0),
            base: Sharing::default(),
            torn: AtomicBool::new(false),
            trust_holes: AtomicBool::new(trust_holes),
            plan: Mutex::new(Plan::new(extents, size)),
            id,
            source,
        })
    }

    /// Bytes of the volume.
    pub fn size(&self) -> u64 {
        self.source.identity().size
    }

    /// What the receiver knows the source by. What was placed while holes were
    /// believed is another thing than what is placed while they are read: neither
    /// goes on from the other. Nor does anything from what an attempt placed that read
    /// around errors: nobody knows any more where. Nor does it where times are all that
    /// tells one content from another, and the machine has been started since: `boot` is
    /// the number of its start (boot.rs).
    pub fn identity(&self, boot: u64) -> Identity {
        let mut identity = self.source.identity();
        if !self.source.is_named() {
            identity.inode ^= boot;
        }
        if let Some(salvage) = self.source.salvage() {
            identity.inode ^= salvage.attempt();
        }
        if !self.trust_holes.load(Ordering::Relaxed) {
            identity.inode ^= 1 << 63;
        }
        identity
    }

    /// What of the source could not be read.
    pub fn unreadable(&self) -> Unreadable {
        self.source.salvage().map(Salvage::lost).unwrap_or_default()
    }

    /// Bytes of it.
    pub fn unreadable_bytes(&self) -> u64 {
        self.source.salvage().map_or(0, Salvage::lost_bytes)
    }

    /// The error when the receiver has published what the source held before.
    pub fn placed_otherwise(&self) -> MoverError {
        let text = format!(
            "this copy has placed {:?} before, and its source has other content now; to copy again move the target out of the way, or remove the .receipt of a device at the receiver",
            self.id
        );
        MoverError::new(Code::TargetExists, text).in_volume(&self.id)
    }

    /// Bytes that the receiver has.
    pub fn done_bytes(&self) -> u64 {
        if lock(&self.receipt).is_some() {
            self.size()
        } else {
            lock(&self.ledger).done_bytes()
        }
    }

    /// Notes an acknowledgement; true when it was all that was missing.
    pub fn acknowledge(&self, header: &Header) -> Result<bool> {
        let broken = |_| MoverError::new(Code::Protocol, "the receiver acknowledged nonsense");
        let range = header.chunks(self.size()).map_err(broken)?;
        let mut ledger = lock(&self.ledger);
        let was_complete = ledger.is_complete();
        for chunk in range.clone() {
            ledger.confirm(chunk);
        }
        for segment in
            range.start / digest::SEGMENT_CHUNKS..range.end.div_ceil(digest::SEGMENT_CHUNKS)
        {
            ledger.close_if_full(segment as usize);
        }
        Ok(!was_complete && ledger.is_complete())
    }

    /// Notes that a zero run is acknowledged; true when it was all that was missing.
    pub fn acknowledge_zeros(&self, header: &Header) -> Result<bool> {
        let broken = |_| MoverError::new(Code::Protocol, "the receiver acknowledged nonsense");
        let range = header.chunks(self.size()).map_err(broken)?;
        let mut ledger = lock(&self.ledger);
        let was_complete = ledger.is_complete();
        ledger
            .confirm_zeros(range.start, range.end)
            .map_err(|_| self.source.changed("a hole was filled").in_volume(&self.id))?;
        for segment in
            range.start / digest::SEGMENT_CHUNKS..range.end.div_ceil(digest::SEGMENT_CHUNKS)
        {
            ledger.close_if_full(segment as usize);
        }
        Ok(!was_complete && ledger.is_complete())
    }

    /// Whether every chunk of it is acknowledged, or was published before.
    pub fn is_complete(&self) -> bool {
        lock(&self.receipt).is_some() || lock(&self.ledger).is_complete()
    }

    /// Notes that a chunk was read twice with different content: another pass has
    /// to compare all of it, so this one need not place it.
    pub fn tear(&self, chunk: u64) {
        self.torn.store(true, Ordering::Relaxed);
        lock(&self.ledger).confirm(chunk);
    }

    /// Whether what was read is not all of one moment.
    pub fn is_torn(&self) -> Result<bool> {
        if self.torn.load(Ordering::Relaxed) {
            return Ok(true);
        }
        match self.source.check_unchanged() {
            Ok(()) => Ok(false),
            Err(error) if error.code == Code::SourceChanged => Ok(true),
            Err(error) => Err(error.in_volume(&self.id)),
        }
    }

    /// Whether data was found where the source's map has holes, or had when its
    /// chunks were read. From then on the map is not believed any more.
    pub fn has_false_holes(&self, seed: u64, stopping: impl Fn() -> bool) -> Result<bool> {
        if !self.trust_holes.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let is_zero = |chunk| lock(&self.ledger).is_zero(chunk);
        let hollow = self.size() - lock(&self.ledger).data_bytes().min(self.size());
        let found = holes::filled(&*self.source, is_zero, hollow, seed, stopping);
        let is_false = found.map_err(|e| e.in_volume(&self.id))?.is_some();
        self.trust_holes.fetch_and(!is_false, Ordering::Relaxed);
        Ok(is_false)
    }

    /// Begins another pass over the source as it is now.
    pub fn begin_again(&self) -> Result<()> {
        let about = |e: MoverError| e.in_volume(&self.id);
        if self.is_torn()? {
            self.source.renew().map_err(about)?;
        }
        let trust_holes = self.trust_holes.load(Ordering::Relaxed);
        let extents = self.source.extents(trust_holes).map_err(about)?;
        *lock(&self.plan) = Plan::new(extents, self.size());
        *lock(&self.ledger) = Ledger::new(self.size());
        self.torn.store(false, Ordering::Relaxed);
        Ok(())
    }
}

struct Queue {
    volume: usize,
    lost: VecDeque<Task>,
    /// Nothing yet.
    paused: bool,
    /// No more, whatever comes.
    closed: bool,
}

/// The work of a copy.
pub struct Feed {
    queue: Mutex<Queue>,
    more: Condvar,
}

impl Default for Feed {
    fn default() -> Self {
        let queue = Queue {
            volume: 0,
            lost: VecDeque::new(),
            paused: true,
            closed: false,
        };
        Feed {
            queue: Mutex::new(queue),
            more: Condvar::new(),
        }
    }
}

impl Feed {
    /// The next piece of work; waits while others may still lose theirs. None
    /// when the feed is closed.
    pub fn next(&self, volumes: &[Volume]) -> Result<Option<Task>> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.closed {
                return Ok(None);
            }
            if queue.paused {
                queue = self.wait(queue);
                continue;
            }
            if let Some(found) = self.again(&mut queue, volumes)? {
                return Ok(Some(found));
            }
            while let Some(volume) = volumes.get(queue.volume) {
                let published = lock(&volume.receipt).is_some();
                let ledger = lock(&volume.ledger);
                let work = if published {
                    None
                } else {
                    lock(&volume.plan)
                        .next(|chunk| ledger.is_done(chunk))
                        .map_err(|e| {
                            MoverError::source_io("cannot map the source", &e).in_volume(&volume.id)
                        })?
                };
                match work {
                    Some(work) => {
                        return Ok(Some(Task {
                            volume: queue.volume,
                            work,
                            wanted: None,
                        }));
                    }
                    None => queue.volume += 1,
                }
            }
            queue = self.wait(queue);
        }
    }

    /// Whether there is nothing to hand out at the moment.
    pub fn is_idle(&self, volumes: &[Volume]) -> bool {
        let queue = lock(&self.queue);
        queue.paused || queue.lost.is_empty() && queue.volume >= volumes.len()
    }

    /// Lets the readers begin, at the first volume.
    pub fn start(&self) {
        let mut queue = lock(&self.queue);
        queue.paused = false;
        queue.volume = 0;
        self.more.notify_all();
    }

    /// Keeps the readers from new work.
    pub fn pause(&self) {
        lock(&self.queue).paused = true;
    }

    /// Takes note of the blocks that the receiver does not have.
    pub fn put_wanted(&self, volume: usize, chunk: u64, mask: Mask) {
        lock(&self.queue).lost.push_back(Task {
            volume,
            work: Work::Chunk(chunk, Vec::new()),
            wanted: Some(mask),
        });
        self.more.notify_all();
    }

    /// Takes back what was sent over a connection that broke.
    pub fn put_back(&self, volumes: &[Volume], sent: &Header) {
        let index = usize::from(sent.volume);
        let Ok(chunks) = sent.chunks(volumes[index].size()) else {
            return;
        };
        let work = match sent.kind {
            Kind::Zero => Work::Zeros(chunks),
            _ => Work::Chunk(chunks.start, Vec::new()),
        };
        lock(&self.queue).lost.push_back(Task {
            volume: index,
            work,
            wanted: None,
        });
        self.more.notify_all();
    }

    /// Ends it.
    pub fn close(&self) {
        lock(&self.queue).closed = true;
        self.more.notify_all();
    }

    fn again(&self, queue: &mut Queue, volumes: &[Volume]) -> Result<Option<Task>> {
        let Some(mut task) = queue.lost.pop_front() else {
            return Ok(None);
        };
        let volume = &volumes[task.volume];
        if let Work::Chunk(chunk, ranges) = &mut task.work {
            *ranges = lock(&volume.plan).ranges(*chunk).map_err(|e| {
                MoverError::source_io("cannot map the source", &e).in_volume(&volume.id)
            })?;
        }
        Ok(Some(task))
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        let waited = self.more.wait_timeout(queue, TICK);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// The unsigned header of chunks of a volume.
pub fn header(kind: Kind, index: usize, chunks: Range<u64>, volume: &Volume) -> Header {
    frame::ranged(kind, index as u16, chunks, volume.size())
}
