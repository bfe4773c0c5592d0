//! Threads that others wait for: a crash in one, or one that the system does not give,
//! must not leave the others waiting.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
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

/// Most threads that do the same: enough for what reads and hashes, and a hypervisor's
/// cores are its guests'.
const TOGETHER: usize = 4;

/// Runs `work` in several threads at once, of which this is one: as many as are worth
/// it, and as the system gives. What each of them returned.
pub fn together<T: Send>(work: impl Fn() -> T + Sync) -> Vec<T> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        let others = (1..cores.min(TOGETHER)).map_while(|_| start_in(scope, &work).ok());
        let others: Vec<_> = others.collect();
        let mut all = vec![work()];
        for other in others {
            all.push(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        all
    })
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
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn work_is_done_together_and_a_panic_in_any_of_it_is_not_lost() {
        let done = AtomicUsize::new(0);
        let all = together(|| done.fetch_add(1, Ordering::Relaxed));
        assert_eq!(all.len(), done.into_inner());
        let here = std::thread::current().id();
        let panics = || assert!(std::thread::current().id() == here, "on purpose");
        let is_lost = catch_unwind(AssertUnwindSafe(|| together(panics))).is_ok();
        let is_alone = std::thread::available_parallelism().is_ok_and(|n| n.get() == 1);
        assert_eq!(is_lost, is_alone);
    }

    #[test]
    fn a_panic_is_reported_and_goes_no_further() {
        let mut told = false;
        run(|| panic!("on purpose"), || told = true);
        assert!(told);
        run(|| {}, || panic!("nothing has crashed"));
    }
}
