//! Who takes a degraded copy: only who said so, and never as a good one.

use crate::error::{Code, MoverError, Result};
use crate::feed::Volume;
use crate::messages::Receipt;
use crate::target::TargetSpec;
use crate::unreadable::Unreadable;

/// Fails when a sender could not read all of a volume, and its target takes no
/// degraded copy.
pub fn check_taken(spec: &TargetSpec, unreadable: &Unreadable) -> Result<()> {
    let Some(first) = unreadable.ranges().first().filter(|_| !spec.care.degraded) else {
        return Ok(());
    };
    let text = format!(
        "{} of the source could not be read, and no degraded copy is taken here; nothing was published",
        unreadable.shown()
    );
    let error = MoverError::new(Code::SourceIo, text).at_receiver();
    Err(error.in_volume(&spec.volume).at(first.start))
}

/// Fails when what stands at a target is a degraded copy and none is taken there.
pub fn check_found(spec: &TargetSpec, found: &Receipt) -> Result<()> {
    match found.unreadable.is_empty() || spec.care.degraded {
        true => Ok(()),
        false => Err(stands_there(found).at_receiver()),
    }
}

/// Fails when the receiver answers with an earlier copy that is degraded, and this
/// one is to be whole.
pub fn check_claim(volume: &Volume, claim: &Receipt) -> Result<()> {
    match claim.unreadable.is_empty() || volume.source.salvage().is_some() {
        true => Ok(()),
        false => Err(stands_there(claim).in_volume(&volume.id)),
    }
}

/// Fails when a receipt does not say of this copy what could not be read.
pub fn check_told(volume: &Volume, peer: &str, receipt: &Receipt) -> Result<()> {
    if receipt.unreadable == volume.unreadable() {
        return Ok(());
    }
    let text = format!(
        "the receipt that {peer} sent tells other ranges than those that could not be read"
    );
    Err(MoverError::new(Code::Protocol, text).in_volume(&volume.id))
}

fn stands_there(found: &Receipt) -> MoverError {
    let text = format!(
        "this copy has placed {:?} before, DEGRADED: {} of its source could not be read then; move it out of the way to copy again",
        found.volume,
        found.unreadable.shown()
    );
    MoverError::new(Code::TargetExists, text)
}
