//! The records of a journal's file: each with its length, and a checksum of both.

use std::io;

use super::HEADER;
use crate::entry;
use crate::error::{MoverError, Result};
use crate::store::Store;

/// Appends a record to bytes that are to be written.
pub(super) fn put_record(bytes: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let start = bytes.len();
    bytes.extend([0; 4]);
    body(bytes);
    let len = (bytes.len() - start - 4) as u32;
    bytes[start..start + 4].copy_from_slice(&len.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[start..]);
    bytes.extend(crc.to_le_bytes());
}

/// Gives each good record to `see`, with its place, until that says that it is none;
/// returns where the good ones end.
pub fn each_record(file: &Store, see: &mut dyn FnMut(u64, &[u8]) -> Result<bool>) -> Result<u64> {
    let unread = |e: io::Error| unread(&e);
    let end = file.file().metadata().map_err(unread)?.len();
    let mut at = HEADER as u64;
    let mut record = Vec::new();
    loop {
        let mut head = [0; 4];
        if at + 4 > end {
            return Ok(at);
        }
        file.read_at(&mut head, at).map_err(unread)?;
        let len = u64::from(u32::from_le_bytes(head));
        if len > entry::MAX_ENTRY as u64 || at + 8 + len > end {
            return Ok(at);
        }
        record.resize(8 + len as usize, 0);
        file.read_at(&mut record, at).map_err(unread)?;
        let (body, crc) = record.split_at(4 + len as usize);
        let good = crc == crc32c::crc32c(body).to_le_bytes();
        if !good || !see(at, &body[4..])? {
            return Ok(at);
        }
        at += 8 + len;
    }
}

/// The error for a journal that cannot be read.
pub(super) fn unread(error: &io::Error) -> MoverError {
    MoverError::target_io("cannot read a journal", error)
}
