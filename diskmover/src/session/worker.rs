//! A worker of a session: unpacks, verifies, writes and acknowledges.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use crossbeam_channel::select;

use super::mending::Refused;
use super::{QUEUE, Session, TICK};
use crate::answers::Answers;
use crate::base::{self, Mask};
use crate::bottleneck::piles_up;
use crate::codec::Decoder;
use crate::digest::{self, BLOCK, Bitmap, Hash};
use crate::error::{Code, MoverError, Result};
use crate::frame::{self, CODEC_ZSTD, Header, Kind};
use crate::guard;
use crate::link::Link;
use crate::pool::Buffer;
use crate::sys::AlignedBuf;
use crate::target::{Taken, Target};

/// A frame on its way to the target.
pub(super) struct Job {
    pub(super) link: Arc<Link>,
    pub(super) header: Header,
    pub(super) cargo: Cargo,
}

/// What a frame brings.
pub(super) enum Cargo {
    /// A run of zero chunks.
    Zeros,
    /// What a chunk holds: its hash, and its blocks'.
    Hashes(Vec<Hash>),
    /// A chunk: its bitmap, its data and the length of that; its hash, which was made as it
    /// arrived, unless it is packed.
    Data(Bitmap, Buffer, usize, Option<Hash>),
    /// Blocks of a chunk: which ones, then as above.
    Patch(Mask, Bitmap, Buffer, usize),
    /// Blocks of a chunk that its bitmap cannot be about: one of the two is spoilt.
    Misfit,
}

/// What became of a frame.
type Placed = std::result::Result<Taken, Refused>;

/// What a worker keeps from job to job.
struct Memory {
    unpacked: AlignedBuf,
    composed: AlignedBuf,
    decoder: Decoder,
}

impl Session {
    /// Works until the session ends.
    pub(super) fn work(&self) {
        let work = || {
            if let Err(error) = self.work_on() {
                self.fail(error);
            }
        };
        guard::run(work, || self.fail(guard::crash("a worker").at_receiver()));
        self.workers.fetch_sub(1, Ordering::Release);
    }

    fn work_on(&self) -> Result<()> {
        let no_memory = || MoverError::no_memory(digest::CHUNK as usize).at_receiver();
        let chunk = || AlignedBuf::new(digest::CHUNK as usize).ok_or_else(no_memory);
        let mut memory = Memory {
            unpacked: chunk()?,
            composed: chunk()?,
            decoder: Decoder::new().ok_or_else(no_memory)?,
        };
        let mut answers = Answers::default();
        while !self.stopping() {
            let Some(job) = self.next_job(&mut answers) else {
                if self.drained.has_come() {
                    return Ok(());
                }
                continue;
            };
            if !self.dirt.has_room(Duration::ZERO) {
                answers.send();
            }
            while !self.dirt.has_room(TICK) {
                if self.stopping() {
                    return Ok(());
                }
            }
            let Job {
                link,
                header,
                cargo,
            } = job;
            let taken = match self.place(&header, cargo, &mut memory) {
                Ok(taken) => taken,
                Err(Refused::Corrupt(why)) => self.ask_again(&header, &why, &link)?,
                Err(Refused::Failed(error)) => return Err(from_peer(error, &link)),
            };
            let mut answer = header;
            self.unplaced.fetch_sub(1, Ordering::Release);
            answer.auth = [0; 32];
            answer.kind = Kind::Ack;
            answer.codec = 0;
            answer.payload_len = 0;
            let mut payload = [0; 2];
            if let Taken::Without(mask) = taken {
                payload = mask.to_le_bytes();
                answer.kind = Kind::Want;
                answer.payload_len = payload.len() as u32;
            } else if piles_up(self.jobs.1.len(), QUEUE, &self.pool) {
                answer.codec = frame::ACK_TARGET_SLOW;
            }
            answers.add(&link, &answer, &payload[..answer.payload_len as usize]);
        }
        Ok(())
    }

    /// The next job; answers do not wait for one that is not there yet. None when the
    /// session ends: what still comes then has come before (`push` in intake.rs).
    fn next_job(&self, answers: &mut Answers) -> Option<Job> {
        self.jobs.1.try_recv().ok().or_else(|| {
            answers.send();
            select! {
                recv(self.jobs.1) -> job => job.ok(),
                recv(self.drained.awaited()) -> _ => None,
                recv(self.over.awaited()) -> _ => None,
            }
        })
    }

    fn place(&self, header: &Header, cargo: Cargo, memory: &mut Memory) -> Placed {
        match cargo {
            Cargo::Zeros => self.place_zeros(header),
            Cargo::Hashes(hashes) => self.place_from_base(header, &hashes, memory),
            Cargo::Data(bitmap, buffer, body, hash) => {
                self.place_data(header, &bitmap, &buffer[..body], hash, memory)
            }
            Cargo::Patch(mask, bitmap, buffer, body) => {
                self.place_patch(header, mask, &bitmap, &buffer[..body], memory)
            }
            Cargo::Misfit if self.target(header).is_none() => Ok(Taken::Whole),
            Cargo::Misfit => Err(Refused::Corrupt(
                "its bitmap does not fit its data".to_owned(),
            )),
        }
    }

    fn place_data(
        &self,
        header: &Header,
        bitmap: &Bitmap,
        body: &[u8],
        hash: Option<Hash>,
        memory: &mut Memory,
    ) -> Placed {
        let Some(target) = self.target(header) else {
            return Ok(Taken::Whole);
        };
        let data = unpack(
            header,
            bitmap,
            body,
            &mut memory.unpacked,
            &mut memory.decoder,
        )?;
        let hash = hash.unwrap_or_else(|| digest::chunk_hash(bitmap, data));
        if !header.is_authentic(&self.keys.frame, &hash) {
            let text = "the chunk does not match its authenticator";
            return Err(Refused::Corrupt(text.to_owned()));
        }
        if data.chunks(BLOCK).any(digest::is_zero) {
            let text = "a block that is all zero was sent as data";
            return Err(self.corrupt(header, text.to_owned()).into());
        }
        target.place(header.offset / digest::CHUNK, bitmap, data, hash)?;
        self.dirt.add(data.len() as u64);
        Ok(Taken::Whole)
    }

    /// Lays blocks over the base. When the result is not what the sender has, the
    /// base has changed since, and all of the chunk is wanted.
    fn place_patch(
        &self,
        header: &Header,
        mask: Mask,
        bitmap: &Bitmap,
        body: &[u8],
        memory: &mut Memory,
    ) -> Placed {
        let Some(target) = self.target(header) else {
            return Ok(Taken::Whole);
        };
        let sent = base::select(bitmap, mask);
        let data = unpack(
            header,
            &sent,
            body,
            &mut memory.unpacked,
            &mut memory.decoder,
        )?;
        let is_right = |hash: &Hash| header.is_authentic(&self.keys.frame, hash);
        let chunk = header.offset / digest::CHUNK;
        let taken = target.patch(chunk, mask, bitmap, data, &mut memory.composed, is_right)?;
        self.dirt.add(header.logical_len);
        Ok(taken)
    }

    fn place_from_base(&self, header: &Header, hashes: &[Hash], memory: &mut Memory) -> Placed {
        let (Some(target), [hash, pieces @ ..]) = (self.target(header), hashes) else {
            return Ok(Taken::Whole);
        };
        if !header.is_authentic(&self.keys.frame, hash) {
            let text = "hashes do not match their authenticator";
            return Err(Refused::Corrupt(text.to_owned()));
        }
        let chunk = header.offset / digest::CHUNK;
        let (taken, written) = target.take(chunk, *hash, pieces, &mut memory.composed)?;
        // What stood there already is noted in the journal too.
        self.dirt.add(written.max(1));
        Ok(taken)
    }

    fn place_zeros(&self, header: &Header) -> Placed {
        let Some(target) = self.target(header) else {
            return Ok(Taken::Whole);
        };
        if !header.is_authentic(&self.keys.frame, &digest::ZERO_HASH) {
            let text = "a zero run does not match its authenticator";
            return Err(Refused::Corrupt(text.to_owned()));
        }
        let end = (header.offset + header.logical_len).div_ceil(digest::CHUNK);
        let go_on = || !self.stopping();
        target.place_zeros(header.offset / digest::CHUNK, end, &go_on)?;
        self.dirt.add(1);
        Ok(Taken::Whole)
    }

    /// The open target of a frame; None once it is published.
    pub(super) fn target(&self, header: &Header) -> Option<Arc<Target>> {
        let targets = self.targets.read().unwrap_or_else(PoisonError::into_inner);
        targets[usize::from(header.volume)].clone()
    }
}

/// The data of a frame.
fn unpack<'a>(
    header: &Header,
    bitmap: &Bitmap,
    body: &'a [u8],
    scratch: &'a mut [u8],
    decoder: &mut Decoder,
) -> std::result::Result<&'a [u8], Refused> {
    if header.codec != CODEC_ZSTD {
        return Ok(body);
    }
    let len = digest::data_len(bitmap, header.logical_len as usize).unwrap_or(0);
    let out = &mut scratch[..len];
    let unpacked = decoder.decompress(body, out);
    unpacked.map_err(|e| Refused::Corrupt(e.to_string()))?;
    Ok(out)
}

/// The same error, naming who sent what is wrong.
fn from_peer(error: MoverError, link: &Link) -> MoverError {
    match error.code {
        Code::ChunkCorrupt | Code::SourceChanged | Code::Protocol => MoverError {
            message: format!("from {}: {}", link.peer, error.message),
            ..error
        },
        _ => error,
    }
}
