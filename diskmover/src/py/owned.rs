//! What belongs to the process that made it.
//!
//! A fork copies memory and descriptors, and of the threads only the one that forks.
//! So in a child a copy or a listener of its parent does nothing any more, and whoever
//! waited for it would wait for ever.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

/// Something with threads, which is of use in its own process only.
pub(super) struct Owned<T> {
    /// None only while it is dropped.
    inner: Option<T>,
    what: &'static str,
    pid: u32,
}

impl<T> Owned<T> {
    /// Belongs to this process from now on; messages call it `what`.
    pub(super) fn new(what: &'static str, inner: T) -> Self {
        Owned {
            inner: Some(inner),
            what,
            pid: std::process::id(),
        }
    }

    /// The thing itself; raises RuntimeError in a child of its process.
    pub(super) fn get(&self) -> PyResult<&T> {
        let here = std::process::id();
        self.inner
            .as_ref()
            .filter(|_| here == self.pid)
            .ok_or_else(|| {
                let (what, pid) = (self.what, self.pid);
                PyRuntimeError::new_err(format!(
                    "this {what} belongs to process {pid}, and process {here} is a fork of it, \
                 in which its threads do not run: use it there, or make another one here"
                ))
            })
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            // Dropping it waits for its threads; what it holds goes with the process.
            std::mem::forget(self.inner.take());
        }
    }
}
