//! The keeper of a session: the one thread that opens, syncs and publishes.
//!
//! It writes a barrier (data durable, then the journal) when enough has been
//! written (dirt.rs) or a second has passed. When the sender has finished all volumes and
//! all digests agree, it publishes them and lets go of all files before anybody
//! hears of it: whoever opens a published file finds it unlocked.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::select;

use crate::budget::{DIRTY_SEGMENT, Share};
use crate::degraded;
use crate::digest::{self, Hash};
use crate::dirt;
use crate::entry::{Entry, MAX_ENTRY, take};
use crate::error::{Code, MoverError, Result};
use crate::frame::{Header, Kind};
use crate::guard;
use crate::link::Link;
use crate::messages::{Open, Receipt};
use crate::opening::{self, Announced};
use crate::pool::lock;
use crate::revision::{self, Revision};
use crate::session::{Phase, Session, TICK};
use crate::silence::Silence;
use crate::target::{Opened, Target};
use crate::unreadable::Unreadable;

/// A barrier comes after this time at the latest.
const BARRIER_TIME: Duration = Duration::from_secs(1);

/// A frame for the keeper.
pub struct Order {
    /// Where to answer.
    pub link: Arc<Link>,
    /// DIRTY, OPEN or FINISH.
    pub header: Header,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// Runs until the session stops; leaves no target open.
pub fn run(session: &Arc<Session>) {
    let mut keeper = Keeper {
        session,
        verified: vec![None; session.specs.len()],
        revisions: vec![None; session.specs.len()],
        told: session.budget.share(),
        synced: Instant::now(),
        silence: Silence::new(Instant::now()),
    };
    let keep = || {
        if let Err(error) = keeper.keep() {
            session.fail(error);
        }
    };
    guard::run(keep, || {
        session.fail(guard::crash("the keeper").at_receiver())
    });
    keeper.release();
}

/// What a FINISH tells beside the root digest: wire bytes, and what could not be read.
type Told = (u64, Unreadable);

struct Keeper<'a> {
    session: &'a Arc<Session>,
    /// What the sender told of the volumes whose digests agree.
    verified: Vec<Option<Told>>,
    /// What senders know of the changes of volumes that they open next.
    revisions: Vec<Option<Revision>>,
    /// Room for that.
    told: Share,
    synced: Instant,
    /// Of the sender.
    silence: Silence,
}

impl Keeper<'_> {
    fn keep(&mut self) -> Result<()> {
        let orders = self.session.orders();
        while !self.session.stopping() {
            select! {
                recv(orders) -> order => if let Ok(order) = order {
                    match order.header.kind {
                        Kind::Dirty => self.hear_of_changes(&order)?,
                        Kind::Open => self.open(&order)?,
                        _ => self.finish(&order)?,
                    }
                },
                recv(self.session.dirt.alarm()) -> _ => {}
                default(TICK) => {}
            }
            self.session.tick();
            self.session.check_sender(&mut self.silence)?;
            let dirt = self.session.dirt.bytes();
            if dirt >= dirt::BARRIER || (dirt > 0 && self.synced.elapsed() > BARRIER_TIME) {
                self.barrier()?;
            }
            self.check_given_back()?;
        }
        // Stopped: what was written is worth a last barrier, if it works, and what
        // was lost is not worth anything.
        let _ = self.barrier();
        let _ = self.check_given_back();
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        let covered = self.session.dirt.bytes();
        for target in self.targets().iter().flatten() {
            target.barrier()?;
        }
        self.session.dirt.settle(covered);
        self.synced = Instant::now();
        Ok(())
    }

    /// Fails when a medium did not give back what was written.
    fn check_given_back(&self) -> Result<()> {
        let targets = self.targets();
        let mut open = targets.iter().flatten();
        open.try_for_each(|target| target.check_given_back())
    }

    /// Keeps what changed since an earlier copy until the volume is opened.
    fn hear_of_changes(&mut self, order: &Order) -> Result<()> {
        let volume = usize::from(order.header.volume);
        let about = |e: MoverError| {
            e.at_receiver()
                .in_volume(&self.session.specs[volume].volume)
        };
        let Some(revision) = Revision::decode(&order.payload) else {
            let what = "a DIRTY that cannot be read";
            return Err(about(self.session.broken(&order.link, what)));
        };
        match &mut self.revisions[volume] {
            Some(known) => known.join(revision),
            none => *none = Some(revision),
        }
        let known = self.revisions.iter().flatten();
        let segments: usize = known.map(Revision::dirty_segments).sum();
        if segments > revision::MAX_SEGMENTS {
            let text = "the sender tells of changes in more than 64 TiB";
            return Err(about(MoverError::new(Code::SourceInvalid, text)));
        }
        self.told = self.session.budget.share();
        let room = self.told.take(segments as u64 * DIRTY_SEGMENT);
        room.map_err(about)
    }

    fn open(&mut self, order: &Order) -> Result<()> {
        let volume = usize::from(order.header.volume);
        let spec = &self.session.specs[volume];
        let about = |e: MoverError| e.at_receiver().in_volume(&spec.volume);
        let Some(open) = Open::decode(&order.payload).filter(|open| open.volume == spec.volume)
        else {
            let what = format!("an OPEN for volume {volume} that is not {:?}", spec.volume);
            return Err(about(self.session.broken(&order.link, &what)));
        };
        let size = open.identity.size;
        let refusal = match spec.size {
            Some(expected) if expected != size => Some(format!("not {expected}")),
            _ if size > digest::MAX_SIZE => Some("more than 64 TiB".to_owned()),
            _ => None,
        };
        if let Some(why) = refusal {
            let text = format!("the source has {size} bytes, {why}");
            return Err(about(MoverError::new(Code::SourceInvalid, text)));
        }
        let revision = self.revisions[volume].take();
        if revision
            .as_ref()
            .is_some_and(|revision| !revision.fits(size))
        {
            let what = "a DIRTY that reaches beyond its volume";
            return Err(about(self.session.broken(&order.link, what)));
        }
        let is_old = |target: &Arc<Target>| target.identity != open.identity;
        if self.targets()[volume].as_ref().is_some_and(is_old) {
            self.start_over(volume, &order.link)?;
        }
        if lock(&self.session.receipts)[volume].is_none() && self.targets()[volume].is_none() {
            let alive = self.alive(&order.link);
            let announced = Announced {
                identity: open.identity,
                mode: open.mode,
                revision,
            };
            let share = self.session.budget.share();
            let opened = opening::open(spec, &self.session.tag, &announced, share, &alive);
            match opened.map_err(about)? {
                Opened::Published(mut receipt) => {
                    receipt.volume.clone_from(&spec.volume);
                    self.session.note_published(volume, receipt);
                }
                Opened::Receiving(target) => {
                    self.session.note_open(volume, size, target.resumed);
                    self.set_target(volume, Some(Arc::from(target)));
                }
            }
        }
        if self.revisions.iter().all(Option::is_none) {
            self.told = self.session.budget.share();
        }
        self.answer(order, volume);
        self.done_if_all_published();
        Ok(())
    }

    /// Lets go of a target whose source has changed: what was placed becomes the
    /// base of another pass. Frames of the old pass must not reach the new one.
    fn start_over(&mut self, volume: usize, link: &Arc<Link>) -> Result<()> {
        while !self.session.is_alone(link) && !self.session.stopping() {
            self.barrier()?; // workers may be waiting for it
            std::thread::sleep(Duration::from_millis(1));
        }
        self.verified[volume] = None;
        let old = self.targets()[volume].clone();
        self.set_target(volume, None);
        self.wait_for_release(old);
        Ok(())
    }

    /// Waits until others let go of a target that is not to be used any more, so that
    /// its files can be opened, and locked, by somebody else.
    fn wait_for_release(&self, mut target: Option<Arc<Target>>) {
        while let Some(held) = target {
            target = Arc::try_unwrap(held).err();
            if target.is_some() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Tells the sender that we live, whenever it is called; false when the
    /// session ends.
    fn alive(&self, link: &Arc<Link>) -> impl Fn() -> bool + Sync {
        let (session, link) = (Arc::clone(self.session), Arc::clone(link));
        let said = Mutex::new(Instant::now());
        move || {
            session.sign_of_life(&link, &mut lock(&said));
            !session.stopping()
        }
    }

    /// Tells what is there; a connection that breaks meanwhile asks again.
    fn answer(&self, order: &Order, volume: usize) {
        let published = lock(&self.session.receipts)[volume].clone();
        let (mut data, mut base) = (0, 0);
        if let Some(target) = &self.targets()[volume] {
            data = target.data_bytes();
            base = target.base_bytes();
            for payload in pack(target.state()) {
                let mut header = Header::new(Kind::State, volume as u16);
                header.payload_len = payload.len() as u32;
                if order.link.send(&header, &[&payload]).is_err() {
                    return;
                }
            }
        }
        let payload = published.as_ref().map(Receipt::encode).unwrap_or_default();
        let mut header = Header::new(Kind::Opened, volume as u16);
        header.payload_len = payload.len() as u32;
        header.offset = data;
        header.logical_len = published.as_ref().map_or(base, Receipt::allocated_word);
        let _ = order.link.send(&header, &[&payload]);
    }

    fn finish(&mut self, order: &Order) -> Result<()> {
        let volume = usize::from(order.header.volume);
        if self.session.phase() == Phase::Done {
            self.session.send_receipts(&order.link);
            return Ok(());
        }
        let target = self.targets()[volume].clone();
        let size = target.as_ref().map_or(0, |target| target.size());
        let (Some((root, told)), Some(target)) = (parse_finish(&order.payload, size), target)
        else {
            let what = "a FINISH that cannot be read, or for a volume that is published";
            return Err(self.session.broken(&order.link, what));
        };
        if !order.header.is_authentic(&self.session.keys.frame, &root) {
            let what = "a FINISH that does not match its authenticator";
            return Err(self.session.broken(&order.link, what));
        }
        if !target.is_complete() {
            let what = "a FINISH while chunks are missing";
            return Err(self.session.broken(&order.link, what));
        }
        degraded::check_taken(&self.session.specs[volume], &told.1)?;
        target.verify(&root)?;
        target.prove(&self.alive(&order.link))?;
        self.verified[volume] = Some(told);
        drop(target);
        let published = lock(&self.session.receipts).clone();
        if (0..self.verified.len()).all(|v| self.verified[v].is_some() || published[v].is_some()) {
            self.publish(&order.link)?;
        }
        Ok(())
    }

    fn publish(&mut self, link: &Arc<Link>) -> Result<()> {
        // Workers hold targets only while they write; let them end first.
        self.session.drained.come();
        while self.session.workers.load(Ordering::Acquire) > 0 {
            if !self.session.dirt.has_room(Duration::ZERO) {
                self.barrier()?; // one of them may be waiting for it
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if self.session.stopping() {
            return Ok(()); // one of them has failed
        }
        // What they wrote last, when it came twice, was not looked at yet.
        for target in self.targets().iter().flatten() {
            target.prove(&self.alive(link))?;
        }
        for volume in 0..self.verified.len() {
            let target = self.targets()[volume].clone();
            let (Some((wire, unreadable)), Some(target)) = (self.verified[volume].take(), target)
            else {
                continue;
            };
            let receipt = target.publish(wire, unreadable)?;
            self.set_target(volume, None);
            self.wait_for_release(Some(target));
            self.session.note_published(volume, receipt);
        }
        self.done_if_all_published();
        Ok(())
    }

    fn done_if_all_published(&self) {
        if lock(&self.session.receipts).iter().all(Option::is_some) {
            self.session.finish();
        }
    }

    fn release(&mut self) {
        self.session
            .targets
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .fill(None);
    }

    fn targets(&self) -> Vec<Option<Arc<Target>>> {
        self.session
            .targets
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set_target(&self, volume: usize, target: Option<Arc<Target>>) {
        self.session
            .targets
            .write()
            .unwrap_or_else(PoisonError::into_inner)[volume] = target;
    }
}

/// What a FINISH payload says of a volume of `size` bytes.
fn parse_finish(mut payload: &[u8], size: u64) -> Option<(Hash, Told)> {
    let root = take(&mut payload)?;
    let wire = take(&mut payload).map(u64::from_le_bytes)?;
    Some((root, (wire, Unreadable::decode(payload, size)?)))
}

/// Entries as payloads of at most the size of a STATE frame, one at a time.
fn pack(mut entries: impl Iterator<Item = Entry>) -> impl Iterator<Item = Vec<u8>> {
    let room = Kind::State.max_payload() as usize - MAX_ENTRY;
    std::iter::from_fn(move || {
        let mut payload = Vec::new();
        while payload.len() <= room
            && let Some(entry) = entries.next()
        {
            entry.encode(&mut payload);
        }
        (!payload.is_empty()).then_some(payload)
    })
}
