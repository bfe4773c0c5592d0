//! The coordinator of a copy: starts its threads, watches them, and ends it.

use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::standing::Standing;
use super::{CLOSING, QUEUE, Shared, guarded};
use crate::bottleneck::{self, Stage};
use crate::error::{Code, MoverError, Result};
use crate::feed::Volume;
use crate::guard;
use crate::local;
use crate::messages::Receipt;
use crate::pool::lock;
use crate::stages;
use crate::uplink;

const READERS: usize = 8;
/// How often it looks how it goes, if nothing calls it.
const LOOK: Duration = Duration::from_millis(20);
/// A source that changes in each of so many passes is in use.
const MAX_PASSES: u64 = 3;

pub(super) fn coordinate(shared: &Arc<Shared>) {
    shared.job.io_priority.apply();
    std::thread::scope(|scope| {
        let connect = |index| -> Result<()> {
            shared.uplinks.fetch_add(1, Ordering::Release);
            let started = guard::start_in(scope, move || {
                guarded(shared, "a connection", || uplink::run(shared, index));
                shared.uplinks.fetch_sub(1, Ordering::Release);
                shared.bell.ring();
            });
            if started.is_err() {
                shared.uplinks.fetch_sub(1, Ordering::Release);
            }
            started.map(drop)
        };
        let mut connections = shared.job.connections;
        let start_all = || -> Result<()> {
            (0..connections).try_for_each(connect)?;
            for _ in 0..workers() {
                guard::start_in(scope, || {
                    guarded(shared, "a worker", || stages::pack(shared));
                })?;
            }
            for _ in 0..READERS {
                guard::start_in(scope, || {
                    guarded(shared, "a reader", || stages::read(shared));
                })?;
            }
            Ok(())
        };
        guarded(shared, "the coordinator", || {
            if let Err(error) = shared.learn().and_then(|()| start_all()) {
                shared.fail(error);
            }
        });
        while !shared.stopping() {
            guarded(shared, "the coordinator", || {
                if let Err(error) = shared.watch() {
                    shared.fail(error);
                }
            });
            let wanted = shared.wanted_connections();
            // One more is a help: the copy goes on without.
            let _ = (connections..wanted).try_for_each(connect);
            connections = wanted;
            let _ = shared.bell.heard().recv_timeout(LOOK);
        }
        shared.await_farewell();
        let links = shared.links();
        let end = Instant::now() + CLOSING;
        links.iter().for_each(|link| link.close_by(end));
        while shared.uplinks.load(Ordering::Acquire) > 0 {
            for socket in lock(&shared.sockets).iter().flatten() {
                let _ = socket.shutdown(Shutdown::Both);
            }
            let _ = shared.bell.heard().recv_timeout(LOOK);
        }
    });
    lock(&shared.sockets).fill_with(|| None);
}

fn workers() -> usize {
    let cores = std::thread::available_parallelism();
    cores.map_or(2, |n| n.get()).clamp(2, 8)
}

impl Shared {
    /// Lets the sources find out what they are. The time for connections begins
    /// afterwards.
    fn learn(&self) -> Result<()> {
        for volume in &self.volumes {
            volume.source.learn().map_err(|e| e.in_volume(&volume.id))?;
        }
        *lock(&self.standing) = Standing::new(Instant::now());
        Ok(())
    }

    /// One look at how it goes.
    fn watch(&self) -> Result<()> {
        self.meter.note(self.done());
        let links = self.links();
        self.effort.note(links.iter().map(|link| link.send_times()));
        self.find_bottleneck();
        self.check_links()?;
        self.check_progress()?;
        let receipts: Vec<Receipt> = self
            .volumes
            .iter()
            .filter_map(|volume| lock(&volume.receipt).clone())
            .collect();
        if receipts.len() == self.volumes.len() {
            self.check_claims(&receipts)?;
            self.end(Ok(receipts));
            return Ok(());
        }
        if self.opened.load(Ordering::Acquire)
            && !self.finish.is_allowed()
            && self.volumes.iter().all(Volume::is_complete)
        {
            if self.pass_again()? {
                return Ok(());
            }
            self.finish.allow();
            self.all_sent.come();
        }
        Ok(())
    }

    /// Compares the source with receipts of an earlier copy, of which nothing
    /// was sent this time.
    fn check_claims(&self, receipts: &[Receipt]) -> Result<()> {
        for (volume, receipt) in self.volumes.iter().zip(receipts) {
            if lock(&volume.ledger).root() == Some(receipt.root) {
                continue;
            }
            let digest = local::digest_of(&*volume.source, || self.stopping())
                .map_err(|e| e.in_volume(&volume.id))?;
            if digest.2 != receipt.root {
                return Err(volume.placed_otherwise());
            }
        }
        Ok(())
    }

    /// Begins another pass over the volumes whose source has changed, or has data
    /// where its map had holes; false when there is none. What the receiver has
    /// becomes the base, and only what differs is sent. All is acknowledged now, so
    /// nothing is under way.
    fn pass_again(&self) -> Result<bool> {
        let open = |volume: &&Volume| lock(&volume.receipt).is_none();
        let open: Vec<_> = self.volumes.iter().filter(open).collect();
        let seed = u64::from_le_bytes(*self.nonce.first_chunk().unwrap_or(&[0; 8]));
        let mut is_torn = Vec::new();
        for volume in &open {
            let stopping = || self.stopping();
            is_torn.push(volume.is_torn()? || volume.has_false_holes(seed, stopping)?);
        }
        // The holes were read for a while. The last look is at all volumes: what is
        // written to one and then to another does not arrive of the other alone.
        let mut torn = Vec::new();
        for (volume, was_torn) in open.into_iter().zip(is_torn) {
            if was_torn || volume.is_torn()? {
                torn.push(volume);
            }
        }
        let Some(first) = torn.first() else {
            return Ok(false);
        };
        if self.passes.fetch_add(1, Ordering::Relaxed) + 1 >= MAX_PASSES {
            let how = format!("again in each of {MAX_PASSES} passes");
            return Err(first.source.changed(&how).in_volume(&first.id));
        }
        self.feed.pause();
        for volume in torn {
            volume.begin_again()?;
        }
        self.opened.store(false, Ordering::Release);
        // The connections come back and open the volumes anew.
        self.links().iter().for_each(|link| link.abort());
        Ok(true)
    }

    fn check_links(&self) -> Result<()> {
        let (missing_for, ever_opened) = {
            let standing = lock(&self.standing);
            (standing.missing_for(Instant::now()), standing.ever_opened())
        };
        if missing_for < self.job.reconnect {
            return Ok(());
        }
        let seconds = self.job.reconnect.as_secs_f64();
        let to = &self.job.to;
        Err(if ever_opened {
            let text = format!("the link to {to} broke and did not come back within {seconds} s");
            MoverError::new(Code::LinkLost, text)
        } else {
            let why = lock(&self.trouble);
            let text = format!("{to} could not be reached within {seconds} s: {why}");
            let text = text.trim_end_matches(": ");
            MoverError::new(Code::ConnectFailed, text)
        })
    }

    /// How many connections the distance asks for.
    fn wanted_connections(&self) -> usize {
        let links = self.links();
        let trips = links.iter().map(|link| link.send_times().round_trip);
        let trip = trips.min().unwrap_or_default();
        let full = self.bottleneck.name() == Stage::Network.name();
        let sent = self.wire.load(Ordering::Relaxed);
        lock(&self.growth).look(Instant::now(), sent, full, trip)
    }

    fn find_bottleneck(&self) {
        let piles_up = |waiting| bottleneck::piles_up(waiting, QUEUE, &self.pool);
        self.bottleneck.vote(if self.finish.is_allowed() {
            Stage::TargetWrite
        } else if self.throttle.holds() {
            Stage::Throttle
        } else if piles_up(self.parcels.1.len()) {
            match self.target_slow.mostly() {
                true => Stage::TargetWrite,
                false => Stage::Network,
            }
        } else if piles_up(self.work.1.len()) {
            Stage::Compress
        } else if self.opened.load(Ordering::Acquire) && !self.feed.is_idle(&self.volumes) {
            Stage::SourceRead
        } else {
            return;
        });
    }
}
