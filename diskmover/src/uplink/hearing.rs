//! What one connection hears: answers to what it sent, receipts and errors.

use std::sync::atomic::Ordering;

use super::in_flight::InFlight;
use super::{End, Ended, read_receipt, told, unexpected};
use crate::degraded;
use crate::error::{Code, MoverError, Result};
use crate::frame::{ACK_TARGET_SLOW, Header, Kind};
use crate::link::Link;
use crate::pool::lock;
use crate::push::Shared;
use crate::wants;

/// Hears acknowledgements, receipts and errors.
pub(super) fn hear(shared: &Shared, link: &Link, in_flight: &InFlight<'_>) -> Ended {
    loop {
        let header = match link.recv_header(None) {
            Ok(header) => header,
            Err(error) if error.is_network() => return Err(End::Broken),
            Err(error) => return Err(End::Fatal(error.to_mover(&link.peer))),
        };
        let Ok(payload) = link.recv_small(&header) else {
            return Err(End::Broken);
        };
        let index = usize::from(header.volume);
        if matches!(header.kind, Kind::Ack | Kind::Receipt) {
            shared.answers.fetch_add(1, Ordering::Relaxed);
        }
        match header.kind {
            Kind::Ping => {}
            Kind::Ack => {
                let known = in_flight.answer(&header);
                let Some(sent) = known.filter(|sent| sent.logical_len == header.logical_len) else {
                    return Err(End::Fatal(unasked(shared, &link.peer, &header)));
                };
                let slow = header.codec & ACK_TARGET_SLOW != 0;
                shared.target_slow.note(slow);
                let volume = &shared.volumes[index];
                let completes = match sent.kind {
                    Kind::Zero => volume.acknowledge_zeros(&sent)?,
                    _ => volume.acknowledge(&sent)?,
                };
                if completes {
                    shared.bell.ring();
                }
                if sent.kind == Kind::Hashes {
                    volume.base.learn(0);
                }
            }
            Kind::Want => {
                let known = in_flight.answer(&header);
                let taken = known.and_then(|sent| wants::take(shared, &sent, &payload));
                taken.unwrap_or_else(|| Err(unasked(shared, &link.peer, &header)))?;
            }
            Kind::Receipt if index < shared.volumes.len() => {
                keep_receipt(shared, &link.peer, &header, &payload)?;
            }
            Kind::Error => return Err(End::Fatal(told(&link.peer, &payload))),
            _ => return Err(End::Fatal(unexpected(&link.peer, &header))),
        }
    }
}

/// An answer to what this connection has not sent, or not so.
fn unasked(shared: &Shared, peer: &str, header: &Header) -> MoverError {
    let error = unexpected(peer, header);
    match shared.volumes.get(usize::from(header.volume)) {
        Some(volume) => error.in_volume(&volume.id).at(header.offset),
        None => error,
    }
}

/// Checks a receipt against what was sent, and keeps it.
fn keep_receipt(shared: &Shared, peer: &str, header: &Header, payload: &[u8]) -> Result<()> {
    let volume = &shared.volumes[usize::from(header.volume)];
    let receipt = read_receipt(volume, peer, header, payload)?;
    if lock(&volume.receipt).as_ref() == Some(&receipt) {
        return Ok(()); // told again
    }
    let own = lock(&volume.ledger).root();
    if own != Some(receipt.root) {
        let text = format!("the receipt that {peer} sent has another digest than this copy");
        return Err(MoverError::new(Code::Protocol, text).in_volume(&volume.id));
    }
    degraded::check_told(volume, peer, &receipt)?;
    *lock(&volume.receipt) = Some(receipt);
    shared.bell.ring();
    Ok(())
}
