//! What a context tells of a whole export, a window at a time.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::nbd::error::NbdError;
use crate::nbd::pool::Pool;
use crate::nbd::proto::{allocation, bitmap};
use crate::nbd::status::Known;
use crate::plan::Extents;

/// Bytes that one BLOCK_STATUS asks about.
const WINDOW: u64 = 1 << 30;
/// Most answers for a window of a dirty bitmap. QEMU, whose bitmaps these are, tells of
/// 128 Ki extents at a time and of no less than 512 bytes: it takes 16 at most.
const MOST_ANSWERS: u64 = 64;
/// Time for a window of a dirty bitmap, on average: QEMU has it in memory.
const TELLING: Duration = Duration::from_secs(1);

/// The contexts in the order in which they are asked for.
#[derive(Clone, Copy, PartialEq)]
pub enum Context {
    /// What reads as zero.
    Allocation = 0,
    /// What was written.
    Bitmap = 1,
}

/// What a context tells of an export.
pub struct Map {
    shown: String,
    pool: Arc<Pool>,
    context: Context,
    known: Known,
    began: Instant,
    answers: u64,
}

impl Map {
    /// What is to be asked about an export, which messages call `shown`, beside what is
    /// `known`.
    pub fn new(shown: &str, pool: &Arc<Pool>, context: Context, known: Known) -> Map {
        Map {
            shown: shown.to_owned(),
            pool: Arc::clone(pool),
            context,
            known,
            began: Instant::now(),
            answers: 0,
        }
    }

    fn ask(&mut self, from: u64, size: u64) -> io::Result<Known> {
        self.check_cost(from, size)?;
        let start = from - from % u64::from(self.pool.export().min_block);
        let asked = start..size.min(start + WINDOW);
        let len = (asked.end - asked.start) as u32;
        let in_sync = |error: &NbdError| matches!(error, NbdError::Server { .. });
        let answer = self
            .pool
            .with(in_sync, |client| client.block_status(start, len));
        let counts = match self.context {
            Context::Allocation => |flags| flags & allocation::ZERO == 0,
            Context::Bitmap => |flags| flags & bitmap::DIRTY != 0,
        };
        match answer {
            Ok(mut found) => {
                let extents = std::mem::take(&mut found[self.context as usize]);
                let known = Known::of(asked.clone(), &extents, counts);
                // One that stops before what we need would be given again for ever.
                Ok(match known.range.end <= from {
                    true => Known::all(asked),
                    false => known,
                })
            }
            // What the server cannot tell has to be read.
            Err(error) if in_sync(&error) => Ok(Known::all(asked)),
            Err(error) => Err(io::Error::other(format!(
                "cannot ask the {} what stands at byte {start}: {error}",
                self.shown
            ))),
        }
    }

    /// Fails when a bitmap, all of which is asked for before anything is copied, would
    /// never be told. The other context is asked as the copy goes on.
    fn check_cost(&mut self, from: u64, size: u64) -> io::Result<()> {
        let windows = size.div_ceil(WINDOW);
        let time = self.pool.patience().reply + TELLING * windows as u32;
        let is_fine = self.answers < MOST_ANSWERS * windows && self.began.elapsed() < time;
        if is_fine || self.context == Context::Allocation {
            self.answers += 1;
            return Ok(());
        }
        Err(io::Error::other(format!(
            "the {} told in {} answers and {} s what has changed in {from} of its {size} bytes, which may never end; look at its server, or leave its bitmap out to compare all of it",
            self.shown,
            self.answers,
            self.began.elapsed().as_secs_f64().round()
        )))
    }
}

impl Extents for Map {
    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        let size = self.pool.export().size;
        let mut at = from;
        while at < size {
            if !self.known.range.contains(&at) {
                self.known = self.ask(at, size)?;
            }
            if let Some(range) = self.known.next(at) {
                return Ok(Some(range));
            }
            at = self.known.range.end;
        }
        Ok(None)
    }
}
