//! The stages before the wire: reading chunks, then packing them.

use std::sync::atomic::Ordering;

use crossbeam_channel::{Sender, select};

use crate::base;
use crate::codec::Encoder;
use crate::digest::{self, ZERO_HASH};
use crate::error::{Code, MoverError, Result};
#[cfg(test)]
use crate::faults::{self, Op};
use crate::feed;
use crate::frame::{CODEC_ZSTD, Kind};
use crate::ledger::{MOST_HELD, Unfit};
use crate::plan::Work;
use crate::pool::lock;
use crate::push::{Parcel, Raw, Shared};
use crate::session::TICK;
use crate::sys::{ALIGN, AlignedBuf};

/// A reader: work of the feed becomes chunks in memory.
pub fn read(shared: &Shared) {
    if let Err(error) = read_all(shared) {
        shared.fail(error);
    }
}

/// A worker: chunks in memory become parcels.
pub fn pack(shared: &Shared) {
    if let Err(error) = pack_all(shared) {
        shared.fail(error);
    }
}

fn read_all(shared: &Shared) -> Result<()> {
    while !shared.opened.load(Ordering::Acquire) {
        if shared.stopping() {
            return Ok(());
        }
        std::thread::sleep(TICK / 10);
    }
    while let Some(task) = shared.feed.next(&shared.volumes)? {
        let (index, work) = (task.volume, task.work);
        let volume = &shared.volumes[index];
        match work {
            Work::Zeros(chunks) => {
                let mut header = feed::header(Kind::Zero, index, chunks, volume);
                header.sign(&shared.keys.frame, &ZERO_HASH);
                put(shared, &shared.parcels.0, Parcel::Zeros(header));
            }
            Work::Chunk(chunk, ranges) => {
                let mut buffer = loop {
                    match shared.pool.take(TICK)? {
                        Some(buffer) => break buffer,
                        None if shared.stopping() => return Ok(()),
                        None => {}
                    }
                };
                let len = digest::chunk_len(volume.size(), chunk).next_multiple_of(ALIGN);
                let read = volume
                    .source
                    .read_chunk(chunk, &ranges, &mut buffer[..len])
                    .map_err(|e| e.in_volume(&volume.id))?;
                put(
                    shared,
                    &shared.work.0,
                    Raw {
                        volume: index,
                        chunk,
                        buffer,
                        read,
                        wanted: task.wanted,
                    },
                );
            }
        }
    }
    Ok(())
}

fn pack_all(shared: &Shared) -> Result<()> {
    let no_memory = || MoverError::no_memory(digest::CHUNK as usize);
    let mut encoder = Encoder::new().ok_or_else(no_memory)?;
    let mut scratch = AlignedBuf::new(digest::CHUNK as usize).ok_or_else(no_memory)?;
    while !shared.stopping() {
        let raw = select! {
            recv(shared.work.1) -> raw => raw.ok(),
            recv(shared.over()) -> _ => None,
        };
        if let Some(raw) = raw
            && let Some(parcel) = pack_one(shared, raw, &mut encoder, &mut scratch)
        {
            put(shared, &shared.parcels.0, parcel);
        }
    }
    Ok(())
}

fn pack_one(
    shared: &Shared,
    raw: Raw,
    encoder: &mut Encoder,
    scratch: &mut AlignedBuf,
) -> Option<Parcel> {
    let Raw {
        volume: index,
        chunk,
        mut buffer,
        read,
        wanted,
    } = raw;
    let volume = &shared.volumes[index];
    let len = digest::chunk_len(volume.size(), chunk);
    let bitmap = digest::scan_marked(&buffer[..len], &read);
    let offers = wanted.is_none() && volume.base.pays(chunk);
    let pieces = if offers {
        digest::blank(&mut buffer[..len], &read);
        base::hashes(&buffer[..len])
    } else {
        Vec::new()
    };
    let data = digest::compact(&mut buffer[..len], &bitmap);
    let hash = digest::chunk_hash(&bitmap, &buffer[..data]);
    let offered = lock(&volume.ledger).offer(chunk, hash, data as u32);
    match offered {
        Ok(()) => {}
        Err(Unfit::Conflict) => {
            volume.tear(chunk);
            return None;
        }
        Err(Unfit::Full) => {
            shared.fail(too_little_heard(shared, volume));
            return None;
        }
    }
    let framed = |kind| feed::header(kind, index, chunk..chunk + 1, volume);
    if data == 0 {
        let mut header = framed(Kind::Zero);
        header.sign(&shared.keys.frame, &ZERO_HASH);
        return Some(Parcel::Zeros(header));
    }
    if offers {
        let payload = [&[hash], pieces.as_slice()].concat().into_flattened();
        #[cfg(test)]
        let mut payload = payload;
        #[cfg(test)]
        spoil(Op::Pack, &mut payload, volume, chunk);
        let mut header = framed(Kind::Hashes);
        header.payload_len = payload.len() as u32;
        header.sign(&shared.keys.frame, &hash);
        return Some(Parcel::Hashes(header, payload));
    }
    let mask = wanted.unwrap_or(base::all(len));
    let whole = mask == base::all(len);
    let mut header = framed(if whole { Kind::Data } else { Kind::Patch });
    let mut front = if whole {
        Vec::new()
    } else {
        mask.to_le_bytes().to_vec()
    };
    front.extend(bitmap);
    let data = match whole {
        true => data,
        false => base::narrow(&mut buffer[..data], &bitmap, mask),
    };
    let mut body = data;
    let level = shared.level();
    let packed = level.and_then(|level| encoder.compress(level, &buffer[..data], scratch));
    if let Some(packed) = packed {
        // The memory that was read into becomes the next scratch.
        buffer.swap(scratch);
        header.codec = CODEC_ZSTD;
        body = packed;
    }
    header.payload_len = (front.len() + body) as u32;
    header.sign(&shared.keys.frame, &hash);
    #[cfg(test)]
    spoil(Op::Pack, &mut buffer[..body], volume, chunk);
    #[cfg(test)]
    spoil(
        Op::Mark,
        front.last_chunk_mut::<32>().unwrap(),
        volume,
        chunk,
    );
    Some(Parcel::Data(header, front, buffer, body))
}

/// The error for a receiver that takes chunks all over a volume, or never says so.
fn too_little_heard(shared: &Shared, volume: &feed::Volume) -> MoverError {
    let text = format!(
        "{} was sent {MOST_HELD} chunks of {:?} and says of none that all of the 64 MiB around it is there; no receiver of ours does that: look at what runs there",
        shared.job.to, volume.id
    );
    MoverError::new(Code::Protocol, text).in_volume(&volume.id)
}

/// Lets memory fail, if a test wants it.
#[cfg(test)]
fn spoil(op: Op, bytes: &mut [u8], volume: &feed::Volume, chunk: u64) {
    let path = volume.source.shown();
    faults::in_memory(path.as_ref(), op, chunk * digest::CHUNK, bytes);
}

/// Puts something into a queue, unless the copy ends meanwhile.
fn put<T>(shared: &Shared, queue: &Sender<T>, item: T) {
    select! {
        send(queue, item) -> _ => {}
        recv(shared.over()) -> _ => {}
    }
}

/// Counts bytes that were sent for a volume.
pub fn count(shared: &Shared, volume: usize, bytes: usize) {
    shared.wire.fetch_add(bytes as u64, Ordering::Relaxed);
    shared.volumes[volume]
        .wire
        .fetch_add(bytes as u64, Ordering::Relaxed);
}
