//! The volumes are announced, and what the receiver has of them is taken over.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{End, Ended, PING, read_receipt, told, unexpected};
use crate::degraded;
use crate::entry::Entry;
use crate::error::{Code, MoverError, Result};
use crate::frame::{Header, Kind};
use crate::ledger::MOST_ADOPTED;
use crate::link::{Link, LinkError};
use crate::messages::{Open, Receipt};
use crate::pool::lock;
use crate::push::Shared;
use crate::revision::Revision;

/// Announces the volumes and takes over what the receiver has.
pub(super) fn open_volumes(shared: &Shared, link: &Link) -> Ended {
    let broken = |e: LinkError| match e.is_network() {
        true => End::Broken,
        false => End::Fatal(e.to_mover(&link.peer)),
    };
    let mut said = Instant::now();
    for (index, volume) in shared.volumes.iter().enumerate() {
        let open = Open {
            identity: volume.identity(shared.boot),
            mode: volume.source.mode(),
            volume: volume.id.clone(),
        };
        let changes = volume.source.revision().map(Revision::encode);
        let frames = changes.into_iter().flatten().map(|p| (Kind::Dirty, p));
        for (kind, payload) in frames.chain([(Kind::Open, open.encode())]) {
            let mut header = Header::new(kind, index as u16);
            header.payload_len = payload.len() as u32;
            link.send(&header, &[&payload]).map_err(broken)?;
        }
        loop {
            let answer = link.recv_header(None).map_err(broken)?;
            let payload = link.recv_small(&answer).map_err(broken)?;
            if shared.stopping() {
                return Err(End::Broken);
            }
            let ours = usize::from(answer.volume) == index;
            match answer.kind {
                // The receiver has much to read, and drops who says nothing for long.
                Kind::Ping if said.elapsed() > PING => {
                    said = Instant::now();
                    link.send(&Header::new(Kind::Ping, 0), &[])
                        .map_err(broken)?;
                }
                Kind::Ping | Kind::Receipt => {}
                Kind::Error => return Err(End::Fatal(told(&link.peer, &payload))),
                Kind::State if ours => adopt(shared, &link.peer, index, &payload)?,
                Kind::Opened if ours => {
                    shared.answers.fetch_add(1, Ordering::Relaxed);
                    if !payload.is_empty() {
                        claim_receipt(shared, &link.peer, &answer, &payload)?;
                    } else if answer.offset <= volume.size() {
                        lock(&volume.ledger).set_data_bytes(answer.offset);
                        volume.base.set(answer.logical_len);
                    } else {
                        let text =
                            format!("{} says that it has more data than there is", link.peer);
                        let error = MoverError::new(Code::Protocol, text);
                        return Err(End::Fatal(error.in_volume(&volume.id)));
                    }
                    break;
                }
                _ => return Err(End::Fatal(unexpected(&link.peer, &answer))),
            }
        }
    }
    Ok(())
}

fn adopt(shared: &Shared, peer: &str, index: usize, payload: &[u8]) -> Result<()> {
    let mut ledger = lock(&shared.volumes[index].ledger);
    let mut rest = payload;
    while !rest.is_empty() {
        let entry = Entry::decode(&mut rest);
        // What there is no room for is sent again, and is fine with the receiver.
        if entry
            .as_ref()
            .is_some_and(|entry| !entry.has_room(&ledger, MOST_ADOPTED))
        {
            continue;
        }
        if entry.and_then(|entry| entry.apply(&mut ledger)).is_none() {
            let text = format!("{peer} says that it has what this volume cannot have");
            return Err(MoverError::new(Code::Protocol, text).in_volume(&shared.volumes[index].id));
        }
    }
    Ok(())
}

/// Keeps the receipt of a volume that was published before; whether it is for
/// what the source holds now is checked before the copy ends.
fn claim_receipt(shared: &Shared, peer: &str, header: &Header, payload: &[u8]) -> Result<()> {
    let volume = &shared.volumes[usize::from(header.volume)];
    let is_resized =
        |receipt: Receipt| receipt.volume == volume.id && receipt.size != volume.size();
    if Receipt::decode(payload).is_some_and(is_resized) {
        return Err(volume.placed_otherwise());
    }
    let receipt = read_receipt(volume, peer, header, payload)?;
    degraded::check_claim(volume, &receipt)?;
    *lock(&volume.receipt) = Some(receipt);
    Ok(())
}
