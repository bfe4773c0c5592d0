//! A copy under way at the sending end, as Python sees it.

use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::owned::Owned;
use super::values::{self, Outgoing, Progress, Receipt, Tls, Wanted};
use super::{detached, raise};
use crate::error::Result;
use crate::push;

/// Connections of a copy whose caller does not say, near by and at most.
const FEW: usize = 4;
const MANY: usize = 32;

#[pyclass(frozen)]
pub(super) struct Push {
    inner: Owned<push::Push>,
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
        holes: &str,
        buffer_bytes: u64,
        reconnect_timeout_seconds: f64,
        io_priority: &str,
        on_read_error: &str,
        despite_lock: bool,
    ) -> PyResult<Self> {
        let key = values::secret(key).map_err(|e| raise(py, &e))?;
        let compression = values::compression(compression);
        let inner = detached(py, || {
            let volumes = volumes
                .into_iter()
                .map(|(id, path, nbd, size)| Ok((id, values::origin(path, nbd)?, size)))
                .collect::<Result<_>>()?;
            push::Push::start(push::Job {
                to,
                receiver,
                tls: values::tls(tls),
                session: session_id,
                key,
                tag,
                volumes,
                connections: connections.unwrap_or(FEW),
                most_connections: connections.unwrap_or(MANY),
                limit: limit_bytes_per_second,
                compression: compression?,
                holes: values::holes(holes)?,
                despite_lock,
                on_read_error: values::on_read_error(on_read_error)?,
                buffer_bytes,
                io_priority: values::io_priority(io_priority)?,
                reconnect: values::seconds(reconnect_timeout_seconds)?,
                stall: push::STALL,
            })
        })?;
        Ok(Push {
            inner: Owned::new("Push", inner),
        })
    }

    fn progress(&self, py: Python<'_>) -> PyResult<Progress> {
        let push = self.inner.get()?;
        Ok(values::progress_tuple(py.detach(|| push.progress())))
    }

    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        let push = self.inner.get()?;
        py.detach(|| push.cancel());
        Ok(())
    }

    fn set_limit(&self, py: Python<'_>, limit_bytes_per_second: Option<u64>) -> PyResult<()> {
        let push = self.inner.get()?;
        detached(py, || push.set_limit(limit_bytes_per_second))
    }

    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<Vec<Receipt>>> {
        let push = self.inner.get()?;
        let limit = match timeout {
            Some(timeout) => Some(values::seconds(timeout.max(0.0)).map_err(|e| raise(py, &e))?),
            None => None,
        };
        let began = Instant::now();
        loop {
            py.check_signals()?;
            let slice = Duration::from_millis(100);
            let left = limit.map_or(slice, |limit| {
                limit.saturating_sub(began.elapsed()).min(slice)
            });
            match py.detach(|| push.wait(left)) {
                Some(Ok(receipts)) => {
                    return Ok(Some(
                        receipts.into_iter().map(values::receipt_tuple).collect(),
                    ));
                }
                Some(Err(error)) => return Err(raise(py, &error)),
                None if limit.is_some_and(|limit| began.elapsed() >= limit) => return Ok(None),
                None => {}
            }
        }
    }
}
