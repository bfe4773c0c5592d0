//! The bridge to Python: the only file that knows of it.
//!
//! `diskmover/_core.pyi` gives the types, `diskmover/` the documented API. No
//! thread of the core ever touches Python; calls that can block release the GIL.

use std::collections::HashMap;
use std::os::fd::IntoRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyOSError, PyRuntimeError};
use pyo3::prelude::*;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::beneath;
use crate::device;
use crate::digest::{CHUNK, hex, parse_hex};
use crate::effort::Compression;
use crate::error::{Code, MoverError, Result};
use crate::listener::{self, Limits};
use crate::messages;
use crate::nbd::address::{Address, Changes, ExportSpec};
use crate::note;
use crate::offer::Offer;
use crate::origin::Origin;
use crate::priority::IoPriority;
use crate::progress;
use crate::publish;
use crate::push;
use crate::salvage::OnReadError;
use crate::seeds::SeedSpec;
use crate::session::{Opening, Phase};
use crate::target::{Care, Container, Place, Proof, TargetSpec, Trust};
use crate::tls::TlsFiles;
use crate::{error, local};

/// Connections of a copy whose caller does not say, near by and at most.
const FEW: usize = 4;
const MANY: usize = 32;

type Tls = (PathBuf, PathBuf, PathBuf);
type Placing = (
    Option<PathBuf>,
    bool,
    bool,
    Vec<(PathBuf, String)>,
    bool,
    bool,
    bool,
);
type Incoming = (
    (String, PathBuf, String),
    u64,
    (u32, Option<u32>, Option<u32>),
    Placing,
);
type Nbd = (
    String,
    String,
    Option<String>,
    Option<(Option<String>, String)>,
);
type Outgoing = (String, Option<PathBuf>, Option<Nbd>, Option<u64>);
type Eta = (Option<f64>, Option<f64>, Option<f64>);
type Progress = (u64, u64, u64, u64, u64, Eta, &'static str, u64, u64);
type Places = Vec<(u64, u64)>;
type Receipt = (
    String,
    u64,
    u64,
    u64,
    u64,
    u64,
    String,
    &'static str,
    Places,
);
type Ended = (String, String, Vec<Receipt>, Option<Py<PyAny>>);
type Status = (&'static str, Progress, Vec<Receipt>, Option<Py<PyAny>>);

/// Nobody who is let in needs longer for handshake and HELLO.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

fn exception<'py>(py: Python<'py>, error: &MoverError) -> PyResult<Bound<'py, PyAny>> {
    py.import("diskmover.errors")?
        .getattr("MoverError")?
        .call1((
            error.code.name(),
            error.message.as_str(),
            error.volume.as_deref(),
            error.offset,
            error.side.name(),
            error.retryable,
        ))
}

fn raise(py: Python<'_>, error: &MoverError) -> PyErr {
    exception(py, error).map_or_else(|e| e, PyErr::from_value)
}

/// Runs something that blocks, without the GIL.
fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.detach(work).map_err(|error| raise(py, &error))
}

fn tls((cert, key, ca): Tls) -> TlsFiles {
    TlsFiles { cert, key, ca }
}

fn secret(key: &[u8]) -> Result<[u8; 32]> {
    let text = "a session key has 32 bytes";
    key.try_into()
        .map_err(|_| MoverError::new(Code::InvalidArgument, text))
}

fn seconds(value: f64) -> Result<Duration> {
    let text = format!("{value} is not a number of seconds");
    Duration::try_from_secs_f64(value).map_err(|_| MoverError::new(Code::InvalidArgument, text))
}

/// How the caller says how hard to compress.
#[derive(FromPyObject)]
enum Wanted {
    Level(i32),
    Name(String),
}

fn compression(wanted: Option<Wanted>) -> Result<Compression> {
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

fn io_priority(name: &str) -> Result<IoPriority> {
    let text = format!("{name:?} is no I/O priority: \"normal\", \"low\" or \"idle\"");
    IoPriority::named(name).ok_or_else(|| MoverError::new(Code::InvalidArgument, text))
}

fn on_read_error(name: &str) -> Result<OnReadError> {
    let text = format!("{name:?} is nothing to do on a read error: \"fail\" or \"zero\"");
    OnReadError::named(name).ok_or_else(|| MoverError::new(Code::InvalidArgument, text))
}

fn trust(paranoid: bool) -> Trust {
    match paranoid {
        true => Trust::Paranoid,
        false => Trust::Normal,
    }
}

fn proof(readback: bool) -> Proof {
    match readback {
        true => Proof::Readback,
        false => Proof::Written,
    }
}

fn container(qcow2: bool) -> Container {
    match qcow2 {
        true => Container::Qcow2,
        false => Container::AsSent,
    }
}

fn seeds(names: Vec<(PathBuf, String)>) -> Vec<SeedSpec> {
    let seed = |(root, name)| SeedSpec { root, name };
    names.into_iter().map(seed).collect()
}

fn origin(path: Option<PathBuf>, nbd: Option<Nbd>) -> Result<Origin> {
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

fn changes((bitmap, since): (Option<String>, String)) -> Result<Changes> {
    let text = format!("{since:?} is not a digest of 64 hexadecimal digits");
    let since = parse_hex(&since).ok_or(MoverError::new(Code::InvalidArgument, text))?;
    Ok(Changes { bitmap, since })
}

fn progress_tuple(p: progress::Progress) -> Progress {
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

fn receipt_tuple(r: messages::Receipt) -> Receipt {
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
    )
}

#[pyclass(frozen)]
struct Receiver {
    inner: listener::Receiver,
}

#[pymethods]
impl Receiver {
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        listen: &str,
        tls: Tls,
        max_sessions: usize,
        max_connections: usize,
        buffer_bytes: u64,
        idle_timeout_seconds: f64,
        io_priority: &str,
    ) -> PyResult<Self> {
        let inner = detached(py, || {
            let limits = Limits {
                sessions: max_sessions,
                connections: max_connections,
                buffer_bytes,
                io_priority: self::io_priority(io_priority)?,
                hello: HELLO_TIMEOUT,
                idle: seconds(idle_timeout_seconds)?,
            };
            listener::Receiver::bind(listen, self::tls(tls), limits)
        })?;
        Ok(Receiver { inner })
    }

    fn address(&self) -> String {
        self.inner.address().to_string()
    }

    fn open_session(
        &self,
        py: Python<'_>,
        session_id: String,
        key: &[u8],
        sender: String,
        volumes: Vec<Incoming>,
        tag: String,
    ) -> PyResult<()> {
        let key = secret(key).map_err(|e| raise(py, &e))?;
        let spec = |incoming: Incoming| {
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
        };
        let volumes = volumes.into_iter().map(spec).collect();
        let opening = Opening {
            id: session_id,
            key,
            sender: Some(sender),
            volumes,
            tag,
        };
        detached(py, || self.inner.open_session(opening))
    }

    fn session_status(&self, py: Python<'_>, session_id: &str) -> PyResult<Status> {
        let (phase, progress, receipts) = detached(py, || self.inner.status(session_id))?;
        let (state, error) = match phase {
            Phase::Waiting => ("WAITING", None),
            Phase::Receiving => ("RECEIVING", None),
            Phase::Done => ("DONE", None),
            Phase::Failed(error) => ("FAILED", Some(exception(py, &error)?.unbind())),
        };
        let receipts = receipts.into_iter().map(receipt_tuple).collect();
        Ok((state, progress_tuple(progress), receipts, error))
    }

    fn close_session(&self, py: Python<'_>, session_id: &str) {
        py.detach(|| self.inner.close_session(session_id));
    }

    #[allow(clippy::too_many_arguments)]
    fn serve_names(
        &self,
        py: Python<'_>,
        root: PathBuf,
        devices: HashMap<String, PathBuf>,
        paranoid: bool,
        readback: bool,
        seeds: Vec<(PathBuf, String)>,
        qcow2: bool,
        update: bool,
    ) -> PyResult<()> {
        let offer = Offer {
            root,
            devices,
            trust: trust(paranoid),
            proof: proof(readback),
            seeds: self::seeds(seeds),
            container: container(qcow2),
            update,
        };
        detached(py, || self.inner.serve_names(offer))
    }

    fn take_ended(&self, py: Python<'_>) -> PyResult<Vec<Ended>> {
        let tell = |ended: listener::Ended| {
            let (receipts, error) = match ended.outcome {
                Ok(receipts) => (receipts.into_iter().map(receipt_tuple).collect(), None),
                Err(error) => (Vec::new(), Some(exception(py, &error)?.unbind())),
            };
            Ok((ended.name, ended.sender, receipts, error))
        };
        let ended = py.detach(|| self.inner.take_ended());
        ended.into_iter().map(tell).collect()
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }
}

#[pyclass(frozen)]
struct Push {
    inner: push::Push,
}

#[pymethods]
impl Push {
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        to: String,
        receiver: Option<String>,
        tls: Tls,
        session_id: String,
        key: &[u8],
        tag: String,
        volumes: Vec<Outgoing>,
        connections: Option<usize>,
        limit_bytes_per_second: Option<u64>,
        compression: Option<Wanted>,
        trust_holes: bool,
        buffer_bytes: u64,
        reconnect_timeout_seconds: f64,
        io_priority: &str,
        on_read_error: &str,
    ) -> PyResult<Self> {
        let key = secret(key).map_err(|e| raise(py, &e))?;
        let compression = self::compression(compression);
        let inner = detached(py, || {
            let volumes = volumes
                .into_iter()
                .map(|(id, path, nbd, size)| Ok((id, origin(path, nbd)?, size)))
                .collect::<Result<_>>()?;
            push::Push::start(push::Job {
                to,
                receiver,
                tls: self::tls(tls),
                session: session_id,
                key,
                tag,
                volumes,
                connections: connections.unwrap_or(FEW),
                most_connections: connections.unwrap_or(MANY),
                limit: limit_bytes_per_second,
                compression: compression?,
                trust_holes,
                on_read_error: self::on_read_error(on_read_error)?,
                buffer_bytes,
                io_priority: self::io_priority(io_priority)?,
                reconnect: seconds(reconnect_timeout_seconds)?,
            })
        })?;
        Ok(Push { inner })
    }

    fn progress(&self, py: Python<'_>) -> Progress {
        progress_tuple(py.detach(|| self.inner.progress()))
    }

    fn cancel(&self, py: Python<'_>) {
        py.detach(|| self.inner.cancel());
    }

    fn set_limit(&self, py: Python<'_>, limit_bytes_per_second: Option<u64>) -> PyResult<()> {
        detached(py, || self.inner.set_limit(limit_bytes_per_second))
    }

    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<Vec<Receipt>>> {
        let limit = match timeout {
            Some(timeout) => Some(seconds(timeout.max(0.0)).map_err(|e| raise(py, &e))?),
            None => None,
        };
        let began = Instant::now();
        loop {
            py.check_signals()?;
            let slice = Duration::from_millis(100);
            let left = limit.map_or(slice, |limit| {
                limit.saturating_sub(began.elapsed()).min(slice)
            });
            match py.detach(|| self.inner.wait(left)) {
                Some(Ok(receipts)) => {
                    return Ok(Some(receipts.into_iter().map(receipt_tuple).collect()));
                }
                Some(Err(error)) => return Err(raise(py, &error)),
                None if limit.is_some_and(|limit| began.elapsed() >= limit) => return Ok(None),
                None => {}
            }
        }
    }
}

#[pyfunction]
fn reserve(
    py: Python<'_>,
    root: PathBuf,
    name: &str,
    tag: &str,
    size_bytes: u64,
    allocate: bool,
) -> PyResult<()> {
    detached(py, || {
        publish::reserve(&root, name, tag, size_bytes, allocate)
    })
}

#[pyfunction]
fn discard(py: Python<'_>, root: PathBuf, name: &str, tag: &str) -> PyResult<()> {
    detached(py, || publish::discard(&root, name, tag))
}

#[pyfunction]
fn discard_device(py: Python<'_>, state: PathBuf, name: &str, tag: &str) -> PyResult<()> {
    detached(py, || device::discard(&state, name, tag))
}

#[pyfunction]
fn discard_published(py: Python<'_>, root: PathBuf, name: &str, tag: &str) -> PyResult<bool> {
    detached(py, || publish::discard_published(&root, name, tag))
}

#[pyfunction]
fn take_notes() -> Vec<String> {
    note::take()
}

#[pyfunction]
fn digest(
    py: Python<'_>,
    path: Option<PathBuf>,
    nbd: Option<Nbd>,
) -> PyResult<(u64, u64, u64, u64, String)> {
    let (size, data, root) = detached(py, || local::digest_at(&origin(path, nbd)?))?;
    Ok((size, data, size - data, CHUNK, hex(&root)))
}

#[pyfunction]
fn open_beneath(py: Python<'_>, root: PathBuf, name: &str, flags: i32, mode: u32) -> PyResult<i32> {
    let root_fd = detached(py, || beneath::open_root(&root))?;
    let flags = OFlags::from_bits_retain(flags as u32);
    let mode = if flags.intersects(OFlags::CREATE | OFlags::TMPFILE) {
        mode
    } else {
        0
    };
    let opened = py.detach(|| beneath::open(&root_fd, name, flags, Mode::from_raw_mode(mode)));
    opened.map(IntoRawFd::into_raw_fd).map_err(|e| match e {
        Errno::XDEV | Errno::LOOP => raise(py, &beneath::refused(name, e)),
        e => PyOSError::new_err((
            e.raw_os_error(),
            std::io::Error::from(e).to_string(),
            name.to_owned(),
        )),
    })
}

#[pyfunction]
fn error_codes() -> Vec<(&'static str, bool)> {
    error::Code::ALL
        .iter()
        .map(|code| (code.name(), code.retryable()))
        .collect()
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    if !cfg!(target_os = "linux") {
        return Err(PyRuntimeError::new_err("diskmover needs Linux"));
    }
    module.add_class::<Receiver>()?;
    module.add_class::<Push>()?;
    module.add_function(wrap_pyfunction!(reserve, module)?)?;
    module.add_function(wrap_pyfunction!(discard, module)?)?;
    module.add_function(wrap_pyfunction!(discard_device, module)?)?;
    module.add_function(wrap_pyfunction!(discard_published, module)?)?;
    module.add_function(wrap_pyfunction!(take_notes, module)?)?;
    module.add_function(wrap_pyfunction!(digest, module)?)?;
    module.add_function(wrap_pyfunction!(open_beneath, module)?)?;
    module.add_function(wrap_pyfunction!(error_codes, module)?)?;
    Ok(())
}
