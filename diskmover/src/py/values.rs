//! Values that cross between Python and the core: plain tuples there, types here.
//!
//! `diskmover/_core.pyi` has the same tuples.

use std::path::PathBuf;
use std::time::Duration;

use pyo3::prelude::*;

use crate::digest::{CHUNK, hex, parse_hex};
use crate::effort::Compression;
use crate::error::{Code, MoverError, Result};
use crate::messages;
use crate::nbd::address::{Address, Changes, ExportSpec};
use crate::origin::Origin;
use crate::priority::IoPriority;
use crate::progress;
use crate::salvage::OnReadError;
use crate::seeds::SeedSpec;
use crate::target::{Care, Container, Place, Proof, TargetSpec, Trust};
use crate::tls::TlsFiles;
use crate::trust::Holes;

pub(super) type Tls = (PathBuf, PathBuf, PathBuf);
pub(super) type Placing = (
    Option<PathBuf>,
    bool,
    Option<bool>,
    Vec<(PathBuf, String)>,
    bool,
    bool,
    bool,
);
pub(super) type Incoming = (
    (String, PathBuf, String),
    u64,
    (Option<u32>, Option<u32>, Option<u32>),
    Placing,
);
pub(super) type Nbd = (
    String,
    String,
    Option<String>,
    Option<(Option<String>, String)>,
);
pub(super) type Outgoing = (String, Option<PathBuf>, Option<Nbd>, Option<u64>);
pub(super) type Eta = (Option<f64>, Option<f64>, Option<f64>);
pub(super) type Progress = (u64, u64, u64, u64, u64, Eta, &'static str, u64, u64);
pub(super) type Places = Vec<(u64, u64)>;
pub(super) type Receipt = (
    String,
    u64,
    u64,
    u64,
    u64,
    u64,
    String,
    &'static str,
    Places,
    Option<u64>,
);
pub(super) type Ended = (String, String, Vec<Receipt>, Option<Py<PyAny>>);
pub(super) type Status = (&'static str, Progress, Vec<Receipt>, Option<Py<PyAny>>);

pub(super) fn tls((cert, key, ca): Tls) -> TlsFiles {
    TlsFiles { cert, key, ca }
}

pub(super) fn secret(key: &[u8]) -> Result<[u8; 32]> {
    let text = "a session key has 32 bytes";
    key.try_into()
        .map_err(|_| MoverError::new(Code::InvalidArgument, text))
}

pub(super) fn seconds(value: f64) -> Result<Duration> {
    let text = format!("{value} is not a number of seconds");
    Duration::try_from_secs_f64(value).map_err(|_| MoverError::new(Code::InvalidArgument, text))
}

/// How the caller says how hard to compress.
#[derive(FromPyObject)]
pub(super) enum Wanted {
    Level(i32),
    Name(String),
}

pub(super) fn compression(wanted: Option<Wanted>) -> Result<Compression> {
    match wanted {
        None => Ok(Compression::Off),
        Some(Wanted::Level(level)) => Ok(Compression::Level(level)),
        Some(Wanted::Name(name)) if name == "adaptive" => Ok(Compression::Adaptive),
        Some(Wanted::Name(name)) => {
            let text = format!("{name:?} is not a way to compress; give a level or \"adaptive\"");
            Err(MoverError::new(Code::InvalidArgument, text))
        }
    }
}

pub(super) fn io_priority(name: &str) -> Result<IoPriority> {
    let text = format!("{name:?} is no I/O priority: \"normal\", \"low\" or \"idle\"");
    IoPriority::named(name).ok_or_else(|| MoverError::new(Code::InvalidArgument, text))
}

pub(super) fn holes(name: &str) -> Result<Holes> {
    let text = format!("{name:?} is nothing to do about holes: \"auto\", \"trust\" or \"read\"");
    Holes::named(name).ok_or_else(|| MoverError::new(Code::InvalidArgument, text))
}

pub(super) fn on_read_error(name: &str) -> Result<OnReadError> {
    let text = format!("{name:?} is nothing to do on a read error: \"fail\" or \"zero\"");
    OnReadError::named(name).ok_or_else(|| MoverError::new(Code::InvalidArgument, text))
}

pub(super) fn trust(paranoid: bool) -> Trust {
    match paranoid {
        true => Trust::Paranoid,
        false => Trust::Normal,
    }
}

pub(super) fn proof(readback: Option<bool>) -> Proof {
    match readback {
        None => Proof::Usual,
        Some(true) => Proof::Readback,
        Some(false) => Proof::Written,
    }
}

pub(super) fn container(qcow2: bool) -> Container {
    match qcow2 {
        true => Container::Qcow2,
        false => Container::AsSent,
    }
}

pub(super) fn seeds(names: Vec<(PathBuf, String)>) -> Vec<SeedSpec> {
    let seed = |(root, name)| SeedSpec { root, name };
    names.into_iter().map(seed).collect()
}

pub(super) fn origin(path: Option<PathBuf>, nbd: Option<Nbd>) -> Result<Origin> {
    match (path, nbd) {
        (Some(path), None) => Ok(Origin::File(path)),
        (None, Some((address, name, content_id, changes))) => Ok(Origin::Nbd(ExportSpec {
            address: Address::parse(&address)?,
            name,
            changes: changes.map(self::changes).transpose()?,
            content_id,
        })),
        _ => {
            let text = "a volume has either a path or an NBD export";
            Err(MoverError::new(Code::InvalidArgument, text))
        }
    }
}

pub(super) fn changes((bitmap, since): (Option<String>, String)) -> Result<Changes> {
    let text = format!("{since:?} is not a digest of 64 hexadecimal digits");
    let since = parse_hex(&since).ok_or(MoverError::new(Code::InvalidArgument, text))?;
    Ok(Changes { bitmap, since })
}

pub(super) fn progress_tuple(p: progress::Progress) -> Progress {
    (
        p.done,
        p.total,
        p.resumed,
        p.wire,
        p.rate,
        (p.eta.expected, p.eta.low, p.eta.high),
        p.limited_by,
        p.connections,
        p.unreadable,
    )
}

pub(super) fn receipt_tuple(r: messages::Receipt) -> Receipt {
    let places = r.unreadable.ranges().iter();
    let unreadable = places.map(|one| (one.start, one.end - one.start)).collect();
    (
        r.volume,
        r.size,
        r.data,
        r.size - r.data.min(r.size),
        r.wire,
        CHUNK,
        hex(&r.root),
        r.mode.name(),
        unreadable,
        r.allocated,
    )
}

pub(super) fn target(incoming: Incoming) -> TargetSpec {
    let ((volume, root, name), size, (mode, uid, gid), care) = incoming;
    let (state, paranoid, readback, seeds, qcow2, update, degraded) = care;
    TargetSpec {
        volume,
        root,
        name,
        size: Some(size),
        mode,
        uid,
        gid,
        care: Care {
            place: state.map_or(Place::File, |state| Place::Device { state }),
            trust: trust(paranoid),
            proof: proof(readback),
            seeds: self::seeds(seeds),
            container: container(qcow2),
            update,
            degraded,
        },
    }
}
