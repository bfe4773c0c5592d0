//! What threads hand to one another, in every order that they can meet.
//!
//! ```text
//! buffers.rs      memory for chunks                       src/pool.rs
//! room.rs         what a crash may cost                   src/dirt.rs
//! work.rs         chunks to read, lost ones again         src/feed.rs
//! last_word.rs    the end of a copy, when links break     src/push/finish.rs, feed.rs
//! connections.rs  the connections to an NBD export        src/nbd/pool.rs
//! read_back.rs    what the medium has given back          src/proofs.rs
//! ```
//! The modules are the crate's own, built over loom's locks. Loom's waits never
//! time out: whoever has to be woken and is not stands still, and loom says so.
//! So these tests also show that no wait there depends on its timeout.

#![allow(missing_docs, dead_code)]

use std::time::Duration;

// What those modules use and nothing here waits in.
use diskmover::{
    base, digest, error, frame, holes, ledger, messages, plan, salvage, session, source,
    unreadable, wake,
};

mod buffers;
mod connections;
mod copy;
#[path = "../../src/dirt.rs"]
mod dirt;
#[path = "../../src/feed.rs"]
mod feed;
#[path = "../../src/push/finish.rs"]
mod finish;
mod last_word;
mod nbd;
#[path = "../../src/pool.rs"]
mod pool;
#[path = "../../src/proofs.rs"]
mod proofs;
mod read_back;
mod room;
mod work;

mod sys {
    use std::ops::{Deref, DerefMut};

    /// Memory, without any.
    #[derive(Default)]
    pub struct AlignedBuf([u8; 0]);

    impl AlignedBuf {
        pub fn several(count: usize, _len: usize) -> Option<Vec<AlignedBuf>> {
            Some((0..count).map(|_| AlignedBuf::default()).collect())
        }
    }

    impl Deref for AlignedBuf {
        type Target = [u8];

        fn deref(&self) -> &[u8] {
            &self.0
        }
    }

    impl DerefMut for AlignedBuf {
        fn deref_mut(&mut self) -> &mut [u8] {
            &mut self.0
        }
    }
}

mod sync {
    use std::sync::LockResult;
    use std::time::Duration;

    pub use loom::sync::{Mutex, MutexGuard};
    pub use std::sync::PoisonError;

    #[derive(Debug)]
    pub struct Condvar(loom::sync::Condvar);

    impl Condvar {
        pub fn new() -> Condvar {
            Condvar(loom::sync::Condvar::new())
        }

        /// As the system's, but it waits as long as it takes.
        pub fn wait_timeout_while<'a, T>(
            &self,
            mut guard: MutexGuard<'a, T>,
            _timeout: Duration,
            mut goes_on: impl FnMut(&mut T) -> bool,
        ) -> LockResult<(MutexGuard<'a, T>, ())> {
            while goes_on(&mut guard) {
                guard = self.0.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
            Ok((guard, ()))
        }

        /// As the system's, but it waits as long as it takes.
        pub fn wait_timeout<'a, T>(
            &self,
            guard: MutexGuard<'a, T>,
            _timeout: Duration,
        ) -> LockResult<(MutexGuard<'a, T>, ())> {
            let guard = self.0.wait(guard).unwrap_or_else(PoisonError::into_inner);
            Ok((guard, ()))
        }

        pub fn notify_one(&self) {
            self.0.notify_one();
        }

        pub fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}

/// Switches away from a thread that could go on, in one order: errors that need
/// more are rare, and the number of orders explodes.
const SWITCHES: usize = 3;
/// The same where much is shared.
const FEW_SWITCHES: usize = 2;
const EVER: Duration = Duration::MAX;

/// Tries all orders with up to so many switches.
fn explore(switches: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut explorer = loom::model::Builder::new();
    explorer.preemption_bound = Some(switches);
    explorer.check(model);
}
