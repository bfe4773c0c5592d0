//! Threads that others wait for: a crash in one, or one that the system does not give,
//! must not leave the others waiting.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

use crate::error::{Code, MoverError, Result};

/// Starts a thread; fails when the system gives none.
pub fn start(work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let started = Builder::new().spawn(work);
    started.map_err(|e| MoverError::no_thread(&e))
}

/// The same in a scope.
pub fn start_in<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>> {
    let started = Builder::new().spawn_scoped(scope, work);
    started.map_err(|e| MoverError::no_thread(&e))
}

/// Runs `work`; when it panics, runs `crashed` and returns all the same.
pub fn run(work: impl FnOnce(), crashed: impl FnOnce()) {
    // Everything shared is behind locks that ignore poison, or atomic.
    if catch_unwind(AssertUnwindSafe(work)).is_err() {
        crashed();
    }
}

/// The failure of a copy that lost a thread.
pub fn crash(what: &str) -> MoverError {
    let text = format!("{what} crashed; this is a bug in diskmover, please report it");
    MoverError::new(Code::Internal, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_reported_and_goes_no_further() {
        let mut told = false;
        run(|| panic!("on purpose"), || told = true);
        assert!(told);
        run(|| {}, || panic!("nothing has crashed"));
    }
}
