//! Hands out work to the readers: new work in order, lost work first.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::{Condvar, Mutex, PoisonError};

use crate::digest::{self, CHUNK};
use crate::error::{Code, MoverError, Result};
use crate::frame::{self, Header, Kind};
use crate::ledger::Ledger;
use crate::messages::Receipt;
use crate::plan::{Extents, Plan, Work};
use crate::pool::lock;
use crate::session::TICK;
use crate::source::Source;

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
    plan: Mutex<Plan<Box<dyn Extents + Send>>>,
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
            plan: Mutex::new(Plan::new(extents, size)),
            id,
            source,
        })
    }

    /// Bytes of the volume.
    pub fn size(&self) -> u64 {
        self.source.identity().size
    }

    /// Bytes that the receiver has.
    pub fn done_bytes(&self) -> u64 {
        if lock(&self.receipt).is_some() {
            self.size()
        } else {
            lock(&self.ledger).done_bytes()
        }
    }

    /// Notes an acknowledgement.
    pub fn acknowledge(&self, header: &Header) -> Result<()> {
        let broken = |_| MoverError::new(Code::Protocol, "the receiver acknowledged nonsense");
        let range = header.chunks(self.size()).map_err(broken)?;
        let mut ledger = lock(&self.ledger);
        for chunk in range.clone() {
            ledger.confirm(chunk);
        }
        for segment in
            range.start / digest::SEGMENT_CHUNKS..range.end.div_ceil(digest::SEGMENT_CHUNKS)
        {
            ledger.close_if_full(segment as usize);
        }
        Ok(())
    }

    /// Notes that a zero run is acknowledged.
    pub fn acknowledge_zeros(&self, header: &Header) -> Result<()> {
        let broken = |_| MoverError::new(Code::Protocol, "the receiver acknowledged nonsense");
        let range = header.chunks(self.size()).map_err(broken)?;
        let mut ledger = lock(&self.ledger);
        ledger
            .confirm_zeros(range.start, range.end)
            .map_err(|_| self.conflict(range.start))?;
        for segment in
            range.start / digest::SEGMENT_CHUNKS..range.end.div_ceil(digest::SEGMENT_CHUNKS)
        {
            ledger.close_if_full(segment as usize);
        }
        Ok(())
    }

    /// The error for a chunk that was read twice with different content.
    pub fn conflict(&self, chunk: u64) -> MoverError {
        let error = self.source.changed("a part read twice was not the same");
        error.in_volume(&self.id).at(chunk * CHUNK)
    }
}

struct Queue {
    volume: usize,
    lost: VecDeque<(usize, Work)>,
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
    pub fn next(&self, volumes: &[Volume]) -> Result<Option<(usize, Work)>> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.closed {
                return Ok(None);
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
                    Some(work) => return Ok(Some((queue.volume, work))),
                    None => queue.volume += 1,
                }
            }
            queue = self
                .more
                .wait_timeout(queue, TICK)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
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
        lock(&self.queue).lost.push_back((index, work));
        self.more.notify_all();
    }

    /// Ends it.
    pub fn close(&self) {
        lock(&self.queue).closed = true;
        self.more.notify_all();
    }

    fn again(&self, queue: &mut Queue, volumes: &[Volume]) -> Result<Option<(usize, Work)>> {
        let Some((index, work)) = queue.lost.pop_front() else {
            return Ok(None);
        };
        let Work::Chunk(chunk, _) = work else {
            return Ok(Some((index, work)));
        };
        let volume = &volumes[index];
        let ranges = lock(&volume.plan).ranges(chunk).map_err(|e| {
            MoverError::source_io("cannot map the source", &e).in_volume(&volume.id)
        })?;
        Ok(Some((index, Work::Chunk(chunk, ranges))))
    }
}

/// The unsigned header of chunks of a volume.
pub fn header(kind: Kind, index: usize, chunks: Range<u64>, volume: &Volume) -> Header {
    frame::ranged(kind, index as u16, chunks, volume.size())
}
