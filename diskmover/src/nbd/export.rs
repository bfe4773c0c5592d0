//! An NBD export as the source of a copy: the disk as its guest sees it.

use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::digest::{self, Bitmap, CHUNK};
use crate::error::{Code, MoverError, Result};
use crate::mode::CopyMode;
use crate::nbd::address::{Changes, ExportSpec};
use crate::nbd::client::Patience;
use crate::nbd::error::NbdError;
use crate::nbd::handshake::{ALLOCATION, DIRTY_PREFIX};
use crate::nbd::map::{Context, Map};
use crate::nbd::pool::Pool;
use crate::nbd::status::Known;
use crate::plan::Extents;
use crate::revision::Revision;
use crate::source::{Identity, Source};

/// Gaps up to this size are read too: a request costs more.
const SMALL_GAP: u64 = 64 << 10;

/// An open export.
pub struct NbdSource {
    shown: String,
    pool: Arc<Pool>,
    spec: ExportSpec,
    nonce: [u8; 16],
    /// What it is, and what has changed in it, once that is learnt.
    learnt: OnceLock<(Identity, Option<Revision>)>,
}

impl NbdSource {
    /// Connects; `nonce` makes an identity of content that has no name.
    pub fn open(spec: &ExportSpec, nonce: &[u8; 16]) -> Result<NbdSource> {
        NbdSource::open_within(spec, nonce, Patience::default())
    }

    /// The same with other deadlines.
    pub fn open_within(
        spec: &ExportSpec,
        nonce: &[u8; 16],
        patience: Patience,
    ) -> Result<NbdSource> {
        spec.check()?;
        let shown = spec.to_string();
        let mut contexts = vec![ALLOCATION.to_owned()];
        let bitmap = spec.bitmap();
        contexts.extend(bitmap.map(|name| format!("{DIRTY_PREFIX}{name}")));
        let pool = Pool::open(spec.clone(), contexts, patience);
        let pool = pool.map_err(|e| failed(&shown, &e))?;
        let export = pool.export();
        if !export.read_only {
            let text = format!(
                "the {shown} is writable, so it can change while it is read; export it read-only"
            );
            return Err(MoverError::new(Code::SourceInvalid, text));
        }
        if export.size > digest::MAX_SIZE {
            let text = format!("the {shown} has {} bytes, more than 64 TiB", export.size);
            return Err(MoverError::new(Code::SourceInvalid, text));
        }
        if let Some(name) = bitmap
            && !has(&pool, Context::Bitmap)
        {
            let text = format!(
                "the {shown} has no dirty bitmap {name:?}; export it with the bitmap, or copy all of it"
            );
            return Err(MoverError::new(Code::SourceInvalid, text));
        }
        Ok(NbdSource {
            shown,
            pool,
            spec: spec.clone(),
            nonce: *nonce,
            learnt: OnceLock::new(),
        })
    }

    fn size(&self) -> u64 {
        self.pool.export().size
    }
}

/// What the bitmap says; without one, that all may have changed.
fn changed_since(shown: &str, pool: &Arc<Pool>, changes: &Changes) -> Result<Revision> {
    let mut revision = Revision::new(changes.since);
    if changes.bitmap.is_none() {
        revision.mark(0..pool.export().size);
        return Ok(revision);
    }
    let mut map = Map::new(shown, pool, Context::Bitmap, Known::default());
    let mut at = 0;
    let unread = |e: io::Error| MoverError::new(Code::SourceIo, e.to_string());
    while let Some(dirty) = map.next_data(at).map_err(unread)? {
        at = dirty.end;
        revision.mark(dirty);
    }
    Ok(revision)
}

impl Source for NbdSource {
    /// Before it is learnt, that of content which nobody has seen or will see again.
    fn identity(&self) -> Identity {
        let unknown = || identity(self.size(), None, &self.nonce, None);
        self.learnt.get().map_or_else(unknown, |(known, _)| *known)
    }

    fn learn(&self) -> Result<()> {
        let changes = self.spec.changes.as_ref();
        let changes = changes.map(|changes| changed_since(&self.shown, &self.pool, changes));
        let revision = changes.transpose()?;
        let content_id = self.spec.content_id.as_deref();
        let identity = identity(self.size(), content_id, &self.nonce, revision.as_ref());
        let _ = self.learnt.set((identity, revision)); // it was the same before
        Ok(())
    }

    /// A name of the content, or a number of this attempt alone.
    fn is_named(&self) -> bool {
        true
    }

    fn mode(&self) -> CopyMode {
        CopyMode::GuestVisible
    }

    fn revision(&self) -> Option<&Revision> {
        self.learnt.get()?.1.as_ref()
    }

    fn extents(&self, trust_holes: bool) -> Result<Box<dyn Extents + Send>> {
        let size = self.size();
        let known = if trust_holes && has(&self.pool, Context::Allocation) {
            Known::default()
        } else {
            Known::all(0..size)
        };
        let map = Map::new(&self.shown, &self.pool, Context::Allocation, known);
        Ok(Box::new(map))
    }

    fn read_chunk(&self, chunk: u64, ranges: &[Range<u64>], buffer: &mut [u8]) -> Result<Bitmap> {
        let base = chunk * CHUNK;
        let end = base + digest::chunk_len(self.size(), chunk) as u64;
        let wanted = widen(ranges, u64::from(self.pool.export().min_block), base..end);
        let mut at = 0;
        for range in &wanted {
            buffer[at..(range.start - base) as usize].fill(0);
            at = (range.end - base) as usize;
        }
        buffer[at..].fill(0);
        self.pool
            .with(|_| false, |client| client.read(&wanted, base, buffer))
            .map_err(|e| failed(&self.shown, &e).at(offset_of(&e).unwrap_or(base)))?;
        Ok([0xFF; 32]) // what was not read was made zero here
    }

    /// Nothing can be written through the export, and it says no more than that.
    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }

    /// A read-only export that changes is not what was promised.
    fn renew(&self) -> Result<()> {
        Err(self.changed("a part that was read twice was not the same"))
    }

    fn shown(&self) -> String {
        format!("the {}", self.shown)
    }

    fn abort(&self) {
        self.pool.abort();
    }
}

fn has(pool: &Pool, context: Context) -> bool {
    matches!(pool.export().contexts.get(context as usize), Some(Some(_)))
}

/// Ranges as requests can have them: whole blocks, small gaps closed.
fn widen(ranges: &[Range<u64>], block: u64, within: Range<u64>) -> Vec<Range<u64>> {
    let mut wide: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let start = (range.start - range.start % block).max(within.start);
        let end = range.end.next_multiple_of(block).min(within.end);
        match wide.last_mut() {
            Some(last) if start <= last.end + SMALL_GAP => last.end = last.end.max(end),
            _ => wide.push(start..end),
        }
    }
    wide
}

/// A server tells neither inode nor time: without the caller's word for it, the
/// content of another attempt may be another.
///
/// What was placed with one bitmap in hand is not gone on from with another.
fn identity(
    size: u64,
    content_id: Option<&str>,
    nonce: &[u8; 16],
    revision: Option<&Revision>,
) -> Identity {
    let mut hasher = blake3::Hasher::new_derive_key("diskmover 1 NBD content");
    match content_id {
        Some(id) => hasher
            .update(b"named")
            .update(&(id.len() as u64).to_le_bytes())
            .update(id.as_bytes()),
        None => hasher.update(b"once").update(nonce),
    };
    for payload in revision.map(Revision::encode).into_iter().flatten() {
        hasher.update(&payload);
    }
    let mut words = [0; 24];
    hasher.finalize_xof().fill(&mut words);
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&words[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    Identity {
        size,
        mtime_ns: word(0) as i64,
        ctime_ns: word(8) as i64,
        inode: word(16),
    }
}

fn failed(shown: &str, error: &NbdError) -> MoverError {
    let code = match error {
        NbdError::Refused(_) => Code::SourceInvalid,
        _ => Code::SourceIo,
    };
    MoverError::new(code, format!("cannot read the {shown}: {error}"))
}

fn offset_of(error: &NbdError) -> Option<u64> {
    match error {
        NbdError::Server { offset, .. } => *offset,
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_whole_blocks_inside_the_chunk() {
        assert_eq!(widen(&[700..1000], 512, 0..4096), [512..1024]);
        assert_eq!(widen(&[700..1000], 4096, 0..1500), [0..1500]);
        let gap = 1 << 20;
        assert_eq!(
            widen(&[0..1, gap..gap + 1], 512, 0..2 << 20),
            [0..512, gap..gap + 512]
        );
        assert_eq!(widen(&[0..1, 1024..1025], 512, 0..4096), [0..1536]);
        assert_eq!(widen(&[], 512, 0..4096), []);
    }

    #[test]
    fn content_without_a_name_is_never_the_same_again() {
        let one = identity(5, None, &[1; 16], None);
        assert_ne!(one, identity(5, None, &[2; 16], None));
        let named = identity(5, Some("a"), &[1; 16], None);
        assert_eq!(named, identity(5, Some("a"), &[2; 16], None));
        assert_ne!(named, identity(5, Some("b"), &[1; 16], None));
    }

    #[test]
    fn another_bitmap_is_another_source() {
        let with = |since, dirty: Range<u64>| {
            let mut revision = Revision::new([since; 32]);
            revision.mark(dirty);
            identity(CHUNK * 9, Some("a"), &[1; 16], Some(&revision))
        };
        assert_eq!(with(1, 0..1), with(1, 0..2));
        assert_ne!(with(1, 0..1), with(2, 0..1));
        assert_ne!(with(1, 0..1), with(1, CHUNK..CHUNK + 1));
        assert_ne!(
            with(1, 0..1),
            identity(CHUNK * 9, Some("a"), &[1; 16], None)
        );
    }
}
