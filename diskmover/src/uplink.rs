//! One connection of the sender, made again when it breaks.
//!
//! Each has a thread that sends and one that hears. What is sent and not
//! acknowledged when the connection breaks goes back to the feed: frames are
//! complete in themselves, so any other connection can carry them.

mod announce;
mod dial;
mod hearing;
mod in_flight;
mod sending;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Code, MoverError};
use crate::feed::Volume;
use crate::frame::Header;
use crate::guard;
use crate::link::Link;
use crate::messages::{self, Receipt};
use crate::pool::lock;
use crate::push::{CLOSING, Shared};
use crate::session::TICK;
use in_flight::InFlight;

/// How often the receiver hears that we live.
const PING: Duration = Duration::from_secs(5);
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

/// Why a connection ended.
enum End {
    /// Another one may do better.
    Broken,
    /// The copy cannot go on.
    Fatal(MoverError),
}

/// How what a connection does has ended.
type Ended<T = ()> = Result<T, End>;

impl From<MoverError> for End {
    fn from(error: MoverError) -> Self {
        End::Fatal(error)
    }
}

/// Keeps a connection up until the copy ends.
pub fn run(shared: &Shared, index: usize) {
    let mut wait = BACKOFF.0;
    while !shared.stopping() {
        let began = Instant::now();
        match dial::connect(shared, index).and_then(|link| carry(shared, link)) {
            Err(End::Fatal(error)) => return shared.fail(error),
            Err(End::Broken) | Ok(()) => {}
        }
        if began.elapsed() > BACKOFF.1 {
            wait = BACKOFF.0;
        }
        let end = Instant::now() + wait;
        while Instant::now() < end && !shared.stopping() {
            std::thread::sleep(TICK / 5);
        }
        wait = (wait * 2).min(BACKOFF.1);
    }
}

/// Sends and hears until the connection or the copy ends.
fn carry(shared: &Shared, link: Arc<Link>) -> Ended {
    lock(&shared.standing).add(&link);
    let (began, before) = (Instant::now(), shared.answers.load(Ordering::Relaxed));
    let result = open_and_run(shared, &link);
    // However far it came, the receiver may be told over it why the copy ends.
    shared.await_farewell();
    let was_useful =
        shared.answers.load(Ordering::Relaxed) > before || began.elapsed() > shared.job.reconnect;
    lock(&shared.standing).remove(&link, was_useful, Instant::now());
    result
}

fn open_and_run(shared: &Shared, link: &Link) -> Ended {
    {
        // One connection opens the volumes; the others wait for it here.
        let _turn = lock(&shared.opening);
        if !shared.opened.load(Ordering::Acquire) {
            announce::open_volumes(shared, link)?;
            shared.note_resumed();
            shared.opened.store(true, Ordering::Release);
            shared.feed.start();
        }
    }
    lock(&shared.standing).note_opened();
    let in_flight = InFlight::new(&shared.owed);
    let mut turn = None;
    let dead = AtomicBool::new(false);
    let ends = std::thread::scope(|scope| {
        let heard = guard::start_in(scope, || {
            let end = hearing::hear(shared, link, &in_flight);
            dead.store(true, Ordering::Relaxed);
            if matches!(end, Err(End::Broken)) {
                link.abort(); // `send` may be stuck in it
            }
            end
        });
        let heard = match heard {
            Ok(heard) => heard,
            Err(error) => return [Err(End::Fatal(error)), Ok(())],
        };
        let sent = sending::send(shared, link, &in_flight, &dead, &mut turn);
        shared.await_farewell();
        if matches!(sent, Ok(()) | Err(End::Fatal(_))) {
            link.close_by(Instant::now() + CLOSING);
        }
        if !shared.stopping() {
            // An error of the receiver may still be on its way to `hear`.
            let end = Instant::now() + TICK * 5;
            while !dead.load(Ordering::Relaxed) && Instant::now() < end {
                std::thread::sleep(TICK / 20);
            }
        }
        link.abort();
        [sent, heard.join().unwrap_or(Err(End::Broken))]
    });
    drop(turn);
    for sent in in_flight.give_back() {
        shared.feed.put_back(&shared.volumes, &sent);
    }
    let mut result = Ok(());
    for end in ends {
        match end {
            Err(End::Fatal(error)) => return Err(End::Fatal(error)),
            Err(End::Broken) => result = Err(End::Broken),
            Ok(()) => {}
        }
    }
    result
}

/// The receipt of a frame, if it is for this volume.
fn read_receipt(
    volume: &Volume,
    peer: &str,
    header: &Header,
    payload: &[u8],
) -> Result<Receipt, MoverError> {
    let about = |receipt: &Receipt| {
        (&receipt.volume, receipt.size) == (&volume.id, volume.size())
            && receipt.mode == volume.source.mode()
            && receipt.data <= receipt.size
    };
    let receipt = Receipt::decode(payload).filter(about).ok_or_else(|| {
        let text = format!("the receipt that {peer} sent is not for this volume");
        MoverError::new(Code::Protocol, text).in_volume(&volume.id)
    })?;
    Ok(receipt.with_allocated_word(header.logical_len))
}

/// The receiver's error.
fn told(peer: &str, payload: &[u8]) -> MoverError {
    let text = || format!("{peer} sent an unreadable error");
    let unreadable = || MoverError::new(Code::Protocol, text());
    messages::decode_error(payload).unwrap_or_else(unreadable)
}

fn unexpected(peer: &str, header: &Header) -> MoverError {
    let text = format!("{peer} sent an unexpected {:?} frame", header.kind);
    MoverError::new(Code::Protocol, text)
}
