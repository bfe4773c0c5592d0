//! The bridge to Python: this file and those in `py/` alone know of it.
//!
//! ```text
//! receiver.rs   a listener and its sessions
//! push.rs       a copy under way
//! owned.rs      neither goes along in a fork
//! values.rs     tuples there, types here
//! ```
//! `diskmover/_core.pyi` gives the types, `diskmover/` the documented API. No
//! thread of the core ever touches Python; calls that can block release the GIL.

mod owned;
mod push;
mod receiver;
mod values;

use std::os::fd::IntoRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};
use pyo3::exceptions::{PyOSError, PyRuntimeError};
use pyo3::prelude::*;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::beneath;
use crate::device;
use crate::digest::{CHUNK, hex};
use crate::error::{self, MoverError, Result};
use crate::guard;
use crate::local;
use crate::note;
use crate::publish;
use values::Nbd;

/// How often it is looked for signals.
const SIGNALS: Duration = Duration::from_millis(100);

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

/// The same of what can last long: a signal (Ctrl-C) sets what `work` is given, and is
/// raised once that has ended.
fn interruptible<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&AtomicBool) -> Result<T> + Send,
) -> PyResult<T> {
    let stop = AtomicBool::new(false);
    let stopping = &stop;
    let (done, outcome) = bounded(1);
    std::thread::scope(|scope| {
        let started = guard::start_in(scope, move || {
            let _ = done.send(work(stopping)); // nobody listens after a signal
        });
        let worker = started.map_err(|error| raise(py, &error))?;
        loop {
            match py.detach(|| outcome.recv_timeout(SIGNALS)) {
                Ok(outcome) => return outcome.map_err(|error| raise(py, &error)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let _ = worker.join();
                    return Err(raise(py, &guard::crash("what was asked for")));
                }
            }
            if let Err(signal) = py.check_signals() {
                stop.store(true, Ordering::Relaxed);
                let _ = py.detach(|| worker.join());
                return Err(signal);
            }
        }
    })
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
    let (size, data, root) = interruptible(py, |stopping| {
        let stopping = || stopping.load(Ordering::Relaxed);
        local::digest_at(&values::origin(path, nbd)?, stopping)
    })?;
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
    module.add_class::<receiver::Receiver>()?;
    module.add_class::<push::Push>()?;
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
