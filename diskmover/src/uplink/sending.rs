//! What one connection sends: parcels, signs of life, and the last word if it is its turn.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crossbeam_channel::{Receiver, never, select};

use super::in_flight::InFlight;
use super::{End, Ended, PING};
use crate::error::{Code, MoverError};
use crate::frame::{HEADER, Header, Kind};
use crate::link::Link;
use crate::pool::lock;
use crate::push::{Parcel, Shared, Turn};
use crate::session::TICK;
use crate::stages::count;

/// What a connection does now and then, whatever else it does.
struct Pulse {
    said: Instant,
    looked: Instant,
}

impl Pulse {
    fn new() -> Pulse {
        let now = Instant::now();
        Pulse {
            said: now,
            looked: now,
        }
    }

    /// Says that we live, when it is time to. Fails when the receiver has not
    /// answered what it has for too long: another connection may do better.
    fn beat(&mut self, shared: &Shared, link: &Link, in_flight: &InFlight<'_>) -> Ended {
        if self.said.elapsed() > PING {
            self.said = Instant::now();
            link.send(&Header::new(Kind::Ping, 0), &[])
                .map_err(|_| End::Broken)?;
        }
        if self.looked.elapsed() > TICK {
            self.looked = Instant::now();
            if in_flight.is_stalled(shared.job.stall) {
                return Err(End::Broken);
            }
        }
        Ok(())
    }
}

/// Most frames that one connection has sent and that are not answered: bounds the
/// memory for them. A receiver of ours answers long before.
const MOST_UNANSWERED: usize = 8192;

/// Sends until the connection or the copy ends.
pub(super) fn send<'a>(
    shared: &'a Shared,
    link: &Link,
    in_flight: &InFlight<'_>,
    dead: &AtomicBool,
    turn: &mut Option<Turn<'a>>,
) -> Ended {
    let mut pulse = Pulse::new();
    let mut all_sent = shared.all_sent().clone();
    while !shared.stopping() {
        if dead.load(Ordering::Relaxed) {
            return Err(End::Broken);
        }
        pulse.beat(shared, link, in_flight)?;
        if turn.is_none() {
            *turn = shared.finish.take();
            if turn.is_some() {
                send_roots(shared, link)?;
            }
        }
        if in_flight.count() >= MOST_UNANSWERED {
            std::thread::sleep(TICK / 20);
            continue;
        }
        let Some(parcel) = next_parcel(shared, &mut all_sent) else {
            continue;
        };
        let header = match &parcel {
            Parcel::Data(header, ..) | Parcel::Hashes(header, _) | Parcel::Zeros(header) => {
                header.clone()
            }
        };
        // From here on it is this connection's: it goes back if it breaks.
        in_flight.take(&header);
        let bytes = HEADER + header.payload_len as usize;
        while !shared.throttle.admit(bytes as u64, TICK) {
            if shared.stopping() || dead.load(Ordering::Relaxed) {
                return Err(End::Broken);
            }
            pulse.beat(shared, link, in_flight)?;
        }
        let sent = match &parcel {
            Parcel::Data(_, front, buffer, body) => link.send(&header, &[front, &buffer[..*body]]),
            Parcel::Hashes(_, hashes) => link.send(&header, &[hashes]),
            Parcel::Zeros(_) => link.send(&header, &[]),
        };
        sent.map_err(|_| End::Broken)?;
        in_flight.note_sent(&header);
        count(shared, usize::from(header.volume), bytes);
    }
    Ok(())
}

/// The next parcel; None when there is something else to look at. Among that is the end
/// of all parcels, and whoever has heard of that puts `never` into its place.
fn next_parcel(shared: &Shared, all_sent: &mut Receiver<Infallible>) -> Option<Parcel> {
    select! {
        recv(shared.parcels.1) -> parcel => parcel.ok(),
        recv(shared.over()) -> _ => None,
        recv(all_sent) -> _ => {
            *all_sent = never();
            None
        }
        default(TICK / 2) => None,
    }
}

/// Sends the root digest of every volume that is not published yet.
fn send_roots(shared: &Shared, link: &Link) -> Ended {
    for (index, volume) in shared.volumes.iter().enumerate() {
        if lock(&volume.receipt).is_some() {
            continue;
        }
        let Some(root) = lock(&volume.ledger).root() else {
            let text = "a complete volume without a digest";
            return Err(End::Fatal(
                MoverError::new(Code::Internal, text).in_volume(&volume.id),
            ));
        };
        let mut payload = root.to_vec();
        payload.extend(volume.wire.load(Ordering::Relaxed).to_le_bytes());
        payload.extend(volume.unreadable().encode());
        let mut header = Header::new(Kind::Finish, index as u16);
        header.payload_len = payload.len() as u32;
        header.logical_len = volume.size();
        header.sign(&shared.keys.frame, &root);
        link.send(&header, &[&payload]).map_err(|_| End::Broken)?;
    }
    Ok(())
}
