//! Threads that others wait for: a crash in one must not leave the others waiting.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Code, MoverError};

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
