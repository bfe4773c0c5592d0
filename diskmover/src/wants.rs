//! What a sender does when the receiver answers WANT.
//!
//! ```text
//! to HASHES      these pieces are not there     -> PATCH of them, or DATA
//! to PATCH       it did not fit what is there   -> DATA
//! to DATA, ZERO  it came corrupt                -> the same once more
//! ```
//! Each time the chunk is read from the source again: the copy in memory may be
//! the one that is corrupt. Only the last row can come more than once for a chunk,
//! and is counted.

use crate::base::{self, Mask};
use crate::digest::CHUNK;
use crate::error::{Code, MoverError, Result};
use crate::frame::{Header, Kind};
use crate::note;
use crate::push::Shared;

/// Takes note of an answer to the frame that began with `sent`; None when it can
/// be no answer to it.
pub fn take(shared: &Shared, sent: &Header, payload: &[u8]) -> Option<Result<()>> {
    let index = usize::from(sent.volume);
    let all = base::all(sent.logical_len as usize);
    let mask = Mask::from_le_bytes(payload.try_into().ok()?) & all;
    if mask == 0 {
        return None;
    }
    match sent.kind {
        Kind::Hashes => {
            shared.volumes[index].base.learn(mask);
            shared.feed.put_wanted(index, sent.offset / CHUNK, mask);
        }
        Kind::Patch => shared.feed.put_wanted(index, sent.offset / CHUNK, all),
        Kind::Data | Kind::Zero => return Some(send_again(shared, sent, all)),
        _ => return None,
    }
    Some(Ok(()))
}

fn send_again(shared: &Shared, sent: &Header, all: Mask) -> Result<()> {
    let index = usize::from(sent.volume);
    let id = &shared.volumes[index].id;
    if let Err(enough) = shared.repeats.count(sent.volume, sent.offset) {
        let text = format!(
            "{} wants a chunk again that it says came corrupt; {enough}",
            shared.job.to
        );
        let error = MoverError::new(Code::Protocol, text).in_volume(id);
        return Err(error.at(sent.offset));
    }
    note::once(&shared.told_corrupt, || {
        format!(
            "{} says that a chunk of {id:?} at byte {} came corrupt, and gets it again; TLS lets nothing of the kind through, so suspect the memory of one of the two hosts",
            shared.job.to, sent.offset
        )
    });
    match sent.kind {
        Kind::Zero => shared.feed.put_back(&shared.volumes, sent),
        _ => shared.feed.put_wanted(index, sent.offset / CHUNK, all),
    }
    Ok(())
}
