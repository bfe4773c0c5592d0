//! What one connection sends: parcels, signs of life, and the last word if it is its turn.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{End, Ended, InFlight};
use crate::error::{Code, MoverError};
use crate::frame::{HEADER, Header, Kind};
use crate::link::Link;
use crate::pool::lock;
use crate::push::{Parcel, Shared, Turn};
use crate::session::TICK;
use crate::stages::count;

const PING: Duration = Duration::from_secs(5);

/// Most frames that one connection has sent and that are not answered: bounds the
/// memory for them. A receiver of ours answers long before.
const MOST_UNANSWERED: usize = 8192;

/// Sends until the connection or the copy ends.
pub(super) fn send<'a>(
    shared: &'a Shared,
    link: &Link,
    in_flight: &InFlight,
    dead: &AtomicBool,
    turn: &mut Option<Turn<'a>>,
) -> Ended {
    let mut sign = Instant::now();
    while !shared.stopping() {
        if dead.load(Ordering::Relaxed) {
            return Err(End::Broken);
        }
        if sign.elapsed() > PING {
            sign = Instant::now();
            link.send(&Header::new(Kind::Ping, 0), &[])
                .map_err(|_| End::Broken)?;
        }
        if turn.is_none() {
            *turn = shared.finish.take();
            if turn.is_some() {
                send_roots(shared, link)?;
            }
        }
        if lock(in_flight).len() >= MOST_UNANSWERED {
            std::thread::sleep(TICK / 20);
            continue;
        }
        let Ok(parcel) = shared.parcels.1.recv_timeout(TICK / 2) else {
            continue;
        };
        let header = match &parcel {
            Parcel::Data(header, ..) | Parcel::Hashes(header, _) | Parcel::Zeros(header) => {
                header.clone()
            }
        };
        // From here on it is this connection's: it goes back if it breaks.
        lock(in_flight).insert((header.volume, header.offset), header.clone());
        let bytes = HEADER + header.payload_len as usize;
        while !shared.throttle.admit(bytes as u64, TICK) {
            if shared.stopping() || dead.load(Ordering::Relaxed) {
                return Err(End::Broken);
            }
            if sign.elapsed() > PING {
                sign = Instant::now();
                link.send(&Header::new(Kind::Ping, 0), &[])
                    .map_err(|_| End::Broken)?;
            }
        }
        let sent = match &parcel {
            Parcel::Data(_, front, buffer, body) => link.send(&header, &[front, &buffer[..*body]]),
            Parcel::Hashes(_, hashes) => link.send(&header, &[hashes]),
            Parcel::Zeros(_) => link.send(&header, &[]),
        };
        sent.map_err(|_| End::Broken)?;
        count(shared, usize::from(header.volume), bytes);
    }
    Ok(())
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
