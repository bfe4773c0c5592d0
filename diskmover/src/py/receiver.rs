//! The receiving end, as Python sees it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use pyo3::prelude::*;

use super::owned::Owned;
use super::values::{self, Ended, Incoming, Status, Tls};
use super::{detached, exception, raise};
use crate::listener::{self, Limits};
use crate::offer::Offer;
use crate::session::{Opening, Phase};

/// Nobody who is let in needs longer for handshake and HELLO.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// A sender that has no frame for so long does not get anywhere.
const QUIET: Duration = Duration::from_secs(3600);

#[pyclass(frozen)]
pub(super) struct Receiver {
    inner: Owned<listener::Receiver>,
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
        volume_memory_bytes: u64,
        idle_timeout_seconds: f64,
        io_priority: &str,
    ) -> PyResult<Self> {
        let inner = detached(py, || {
            let limits = Limits {
                sessions: max_sessions,
                connections: max_connections,
                buffer_bytes,
                volume_memory: volume_memory_bytes,
                io_priority: values::io_priority(io_priority)?,
                hello: HELLO_TIMEOUT,
                idle: values::seconds(idle_timeout_seconds)?,
                quiet: QUIET,
            };
            listener::Receiver::bind(listen, values::tls(tls), limits)
        })?;
        Ok(Receiver {
            inner: Owned::new("Receiver", inner),
        })
    }

    fn address(&self) -> PyResult<String> {
        Ok(self.inner.get()?.address().to_string())
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
        let receiver = self.inner.get()?;
        let key = values::secret(key).map_err(|e| raise(py, &e))?;
        let volumes = volumes.into_iter().map(values::target).collect();
        let opening = Opening {
            id: session_id,
            key,
            sender: Some(sender),
            volumes,
            tag,
        };
        detached(py, || receiver.open_session(opening))
    }

    fn session_status(&self, py: Python<'_>, session_id: &str) -> PyResult<Status> {
        let receiver = self.inner.get()?;
        let (phase, progress, receipts) = detached(py, || receiver.status(session_id))?;
        let (state, error) = match phase {
            Phase::Waiting => ("WAITING", None),
            Phase::Receiving => ("RECEIVING", None),
            Phase::Done => ("DONE", None),
            Phase::Failed(error) => ("FAILED", Some(exception(py, &error)?.unbind())),
        };
        let receipts = receipts.into_iter().map(values::receipt_tuple).collect();
        Ok((state, values::progress_tuple(progress), receipts, error))
    }

    fn close_session(&self, py: Python<'_>, session_id: &str) -> PyResult<()> {
        let receiver = self.inner.get()?;
        py.detach(|| receiver.close_session(session_id));
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn serve_names(
        &self,
        py: Python<'_>,
        root: PathBuf,
        devices: HashMap<String, PathBuf>,
        paranoid: bool,
        readback: Option<bool>,
        seeds: Vec<(PathBuf, String)>,
        qcow2: bool,
        update: bool,
    ) -> PyResult<()> {
        let receiver = self.inner.get()?;
        let offer = Offer {
            root,
            devices,
            trust: values::trust(paranoid),
            proof: values::proof(readback),
            seeds: values::seeds(seeds),
            container: values::container(qcow2),
            update,
        };
        detached(py, || receiver.serve_names(offer))
    }

    fn take_ended(&self, py: Python<'_>) -> PyResult<Vec<Ended>> {
        let receiver = self.inner.get()?;
        let tell = |ended: listener::Ended| {
            let (receipts, error) = match ended.outcome {
                Ok(receipts) => (
                    receipts.into_iter().map(values::receipt_tuple).collect(),
                    None,
                ),
                Err(error) => (Vec::new(), Some(exception(py, &error)?.unbind())),
            };
            Ok((ended.name, ended.sender, receipts, error))
        };
        let ended = py.detach(|| receiver.take_ended());
        ended.into_iter().map(tell).collect()
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let receiver = self.inner.get()?;
        py.detach(|| receiver.close());
        Ok(())
    }
}
