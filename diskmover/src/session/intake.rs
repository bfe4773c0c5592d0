//! Frames of a connection are checked, and filled into buffers for the workers; what is not
//! packed is hashed as it arrives.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crossbeam_channel::SendTimeoutError;

use super::worker::{Cargo, Job};
use super::{OPEN_TO_ALL, Session, TICK};
use crate::base::{self, Mask};
use crate::digest::{self, Bitmap, ChunkHasher};
use crate::error::{Code, MoverError, Result};
#[cfg(test)]
use crate::faults::{self, Op};
use crate::frame::{CODEC_ZSTD, HEADER, Header, Kind};
use crate::keeper::Order;
use crate::link::Link;
use crate::messages;
use crate::pool::{Buffer, lock};

impl Session {
    pub(super) fn intake(&self, link: &Arc<Link>) -> Result<()> {
        loop {
            let header = match link.recv_header(None) {
                Ok(header) => header,
                Err(error) if error.is_network() => return Ok(()),
                Err(error) => return Err(error.to_mover(&link.peer).at_receiver()),
            };
            let size = HEADER as u64 + u64::from(header.payload_len);
            self.wire.fetch_add(size, Ordering::Relaxed);
            let is_step = header.kind != Kind::Ping;
            self.steps.fetch_add(is_step.into(), Ordering::Relaxed);
            let on = match header.kind {
                Kind::Ping => link.send(&Header::new(Kind::Ping, 0), &[]).is_ok(),
                Kind::Data | Kind::Patch => self.take_data(link, header)?,
                Kind::Hashes => self.take_hashes(link, header)?,
                Kind::Zero => {
                    self.chunks(&header, link)?;
                    self.push(link, header, Cargo::Zeros)
                }
                Kind::Dirty | Kind::Open | Kind::Finish => {
                    let Ok(payload) = link.recv_small(&header) else {
                        return Ok(());
                    };
                    let volume = self.volume(&header, link)?;
                    if header.kind == Kind::Finish && lock(&self.sizes)[volume].is_none() {
                        return Err(self.not_open(link));
                    }
                    self.order(Order {
                        link: Arc::clone(link),
                        header,
                        payload,
                    })
                }
                Kind::Error => {
                    let Ok(payload) = link.recv_small(&header) else {
                        return Ok(());
                    };
                    let error = messages::decode_error(&payload);
                    return Err(error.unwrap_or_else(|| self.broken(link, "an unreadable error")));
                }
                _ => return Err(self.broken(link, &format!("{:?} out of phase", header.kind))),
            };
            if !on {
                return Ok(());
            }
        }
    }

    fn take_data(&self, link: &Arc<Link>, header: Header) -> Result<bool> {
        let chunk = self.chunks(&header, link)?;
        let len = header.logical_len as usize;
        debug_assert!(chunk.end - chunk.start == 1);
        let is_patch = header.kind == Kind::Patch;
        let mut mask = [0xFF; 2];
        let mut bitmap: Bitmap = [0; 32];
        let front = bitmap.len() + if is_patch { mask.len() } else { 0 };
        let Some(body) = (header.payload_len as usize).checked_sub(front) else {
            return Err(self.broken(link, "a chunk without a bitmap"));
        };
        if is_patch && link.recv_payload(&mut mask).is_err()
            || link.recv_payload(&mut bitmap).is_err()
        {
            return Ok(false);
        }
        let mask = Mask::from_le_bytes(mask);
        let data = digest::data_len(&bitmap, len)
            .and_then(|_| digest::data_len(&base::select(&bitmap, mask), len))
            .unwrap_or(0);
        let fits = if header.codec == CODEC_ZSTD {
            body < data
        } else {
            body == data
        };
        let is_misfit = (data == 0 && !is_patch) || !fits;
        let Some(mut buffer) = self.buffer(link)? else {
            return Ok(false);
        };
        let is_plain = header.codec != CODEC_ZSTD && !is_patch && !is_misfit;
        let mut hasher = is_plain.then(|| ChunkHasher::new(&bitmap));
        #[cfg(test)]
        let mut is_first = true;
        let arrived = |piece: &mut [u8]| {
            #[cfg(test)]
            if std::mem::take(&mut is_first) {
                self.spoil(&header, piece);
            }
            if let Some(hasher) = &mut hasher {
                hasher.update(piece);
            }
        };
        let strides = digest::strides(body);
        if link
            .recv_pieces(&mut buffer[..body], strides, arrived)
            .is_err()
        {
            return Ok(false);
        }
        if !is_misfit
            && !is_patch
            && let Some(target) = self.target(&header)
        {
            target.expect(header.offset / digest::CHUNK, &bitmap);
        }
        let cargo = match (is_misfit, is_patch) {
            (true, _) => Cargo::Misfit,
            (false, true) => Cargo::Patch(mask, bitmap, buffer, body),
            (false, false) => Cargo::Data(bitmap, buffer, body, hasher.map(ChunkHasher::finish)),
        };
        Ok(self.push(link, header, cargo))
    }

    fn take_hashes(&self, link: &Arc<Link>, header: Header) -> Result<bool> {
        self.chunks(&header, link)?;
        let Ok(payload) = link.recv_small(&header) else {
            return Ok(false);
        };
        let (hashes, rest) = payload.as_chunks::<32>();
        let pieces = (header.logical_len as usize).div_ceil(base::PIECE);
        if !rest.is_empty() || hashes.len() != 1 + pieces {
            return Err(self.broken(link, "a HASHES frame of the wrong length"));
        }
        Ok(self.push(link, header, Cargo::Hashes(hashes.to_vec())))
    }

    /// Waits for a buffer; the sender is told meanwhile that we live. None when the
    /// session ends.
    fn buffer(&self, link: &Link) -> Result<Option<Buffer>> {
        let mut sign = Instant::now();
        while !self.stopping() && !self.drained.has_come() {
            let taken = self.pool.take(TICK).map_err(MoverError::at_receiver)?;
            if taken.is_some() {
                return Ok(taken);
            }
            self.sign_of_life(link, &mut sign);
        }
        Ok(None)
    }

    /// Hands a job to the workers; false when there are none any more. Then it
    /// is a late duplicate: nothing is finished while a chunk is missing.
    pub(super) fn push(&self, link: &Arc<Link>, header: Header, cargo: Cargo) -> bool {
        let mut job = Job {
            link: Arc::clone(link),
            header,
            cargo,
        };
        let mut sign = Instant::now();
        self.unplaced.fetch_add(1, Ordering::Acquire);
        while !self.stopping() && !self.drained.has_come() {
            match self.jobs.0.send_timeout(job, TICK) {
                Ok(()) => return true,
                Err(SendTimeoutError::Timeout(back)) => job = back,
                Err(SendTimeoutError::Disconnected(_)) => return false,
            }
            self.sign_of_life(link, &mut sign);
        }
        false
    }

    fn order(&self, order: Order) -> bool {
        let mut order = order;
        while !self.stopping() {
            match self.orders.0.send_timeout(order, TICK) {
                Ok(()) => return true,
                Err(SendTimeoutError::Timeout(back)) => order = back,
                Err(SendTimeoutError::Disconnected(_)) => return false,
            }
        }
        false
    }

    /// The volume that a frame is about.
    fn volume(&self, header: &Header, link: &Link) -> Result<usize> {
        let volume = usize::from(header.volume);
        if volume >= self.specs.len() {
            return Err(self.broken(link, "a volume that the session does not have"));
        }
        Ok(volume)
    }

    fn chunks(&self, header: &Header, link: &Link) -> Result<Range<u64>> {
        let volume = self.volume(header, link)?;
        let Some(size) = lock(&self.sizes)[volume] else {
            return Err(self.not_open(link));
        };
        header
            .chunks(size)
            .map_err(|e| self.broken(link, &e.to_string()).at(header.offset))
    }

    /// The error for content of a volume that is not open.
    fn not_open(&self, link: &Link) -> MoverError {
        if !self.id.starts_with(OPEN_TO_ALL) {
            return self.broken(link, "a frame for a volume before opening it");
        }
        // Such a session is made by its first HELLO: the sender opened its volume
        // in an earlier one.
        let text = "the receiver has restarted meanwhile; copy again to go on";
        MoverError::new(Code::SessionUnknown, text).at_receiver()
    }
}

#[cfg(test)]
impl Session {
    fn spoil(&self, header: &Header, piece: &mut [u8]) {
        let spec = &self.specs[usize::from(header.volume)];
        let path = spec.root.join(&spec.name);
        faults::in_memory(&path, Op::Arrive, header.offset, piece);
    }
}

#[cfg(test)]
mod tests {
    use crate::digest::CHUNK;
    use crate::faults::{self, Op};
    use crate::medium::tests::ext4;
    use crate::rig::{Rig, noise, run};

    #[test]
    fn what_arrives_has_its_blocks_laid_before_it_is_placed() {
        let (_dir, _mount, at) = ext4("");
        let rig = Rig::new();
        *rig.targets.borrow_mut() = at.clone();
        // Chunks in holes, and too few for a stretch: nothing is laid unexpectedly.
        let data = noise(1, CHUNK as usize);
        let pieces = [1, 4, 9, 16, 25].map(|chunk| (chunk * CHUNK, data.as_slice()));
        let source = rig.source("disk", 30 * CHUNK, &pieces);
        let laid = faults::count(&at, ".part", Op::Lay);
        rig.open(&[("disk", 30 * CHUNK)]).unwrap();
        run(rig.job(&[&source])).unwrap();
        assert_eq!(laid.met() as usize, pieces.len(), "each of them, and once");
    }
}
