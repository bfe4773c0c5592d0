//! Buffers and room for what is not durable, in every order that threads can meet.
//!
//! The modules are the crate's own, built over loom's locks. Loom's waits never
//! time out: whoever has to be woken and is not stands still, and loom says so.
//! So these tests also show that no wait there depends on its timeout.

#![allow(missing_docs, dead_code)]

use std::sync::Arc;
use std::time::Duration;

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

#[path = "../../src/dirt.rs"]
mod dirt;
#[path = "../../src/pool.rs"]
mod pool;

mod digest {
    pub const CHUNK: u64 = 1 << 20;
}

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

        pub fn notify_one(&self) {
            self.0.notify_one();
        }

        pub fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}

/// All orders with up to so many switches away from a thread that could go on:
/// errors that need more are rare, and the number of orders explodes.
const SWITCHES: usize = 3;
const BUFFERS: u64 = 4;
const EVER: Duration = Duration::MAX;

fn explore(model: impl Fn() + Send + Sync + 'static) {
    let mut explorer = loom::model::Builder::new();
    explorer.preemption_bound = Some(SWITCHES);
    explorer.check(model);
}

/// A pool, and its buffers but for so many.
fn pool_with(left: u64) -> (Arc<pool::Pool>, Vec<pool::Buffer>) {
    let pool = pool::Pool::new(BUFFERS * digest::CHUNK);
    let out = (left..BUFFERS).map(|_| pool.take(EVER).unwrap()).collect();
    (pool, out)
}

#[test]
fn there_are_never_more_buffers_than_the_pool_has() {
    explore(|| {
        let (pool, held) = pool_with(1);
        let out = Arc::new(AtomicU64::new(held.len() as u64));
        let threads = [(), ()].map(|()| {
            let (pool, out) = (Arc::clone(&pool), Arc::clone(&out));
            thread::spawn(move || {
                let buffer = pool.take(EVER).unwrap();
                let before = out.fetch_add(1, Ordering::SeqCst);
                assert!(before < BUFFERS, "{before} were out, and another was given");
                out.fetch_sub(1, Ordering::SeqCst);
                drop(buffer);
            })
        });
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        drop(held);
    });
}

#[test]
fn everyone_who_waits_for_a_buffer_gets_one() {
    explore(|| {
        let (pool, mut held) = pool_with(0);
        let threads = [(), ()].map(|()| {
            let pool = Arc::clone(&pool);
            thread::spawn(move || pool.take(EVER).is_some())
        });
        held.truncate(2);
        assert!(threads.map(|thread| thread.join().unwrap()) == [true, true]);
    });
}

#[test]
fn a_pool_that_is_trimmed_forgets_nobody() {
    explore(|| {
        let (pool, mut held) = pool_with(0);
        let waiter = {
            let pool = Arc::clone(&pool);
            thread::spawn(move || pool.take(EVER).is_some())
        };
        let trimmer = {
            let pool = Arc::clone(&pool);
            thread::spawn(move || pool.trim())
        };
        held.truncate(3);
        trimmer.join().unwrap();
        assert!(waiter.join().unwrap());
        // Nothing was lost on the way: all of them can be out again.
        drop(held);
        let all: Vec<_> = (0..BUFFERS).map(|_| pool.take(EVER)).collect();
        assert!(all.iter().all(Option::is_some));
    });
}

#[test]
fn what_a_crash_costs_stays_within_its_bound() {
    const WRITE: u64 = 2 << 20;
    explore(|| {
        let dirt = Arc::new(dirt::Dirt::default());
        // Too full for what both write at the same time: they have to wait.
        dirt.add(dirt::MOST - WRITE - 1);
        let writers = [(), ()].map(|()| {
            let dirt = Arc::clone(&dirt);
            thread::spawn(move || {
                assert!(dirt.has_room(EVER));
                dirt.add(WRITE);
                assert!(dirt.bytes() <= dirt::MOST);
            })
        });
        // The keeper: makes durable what it has seen, and only that.
        let covered = dirt.bytes();
        dirt.settle(covered);
        writers
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        assert_eq!(dirt.bytes(), dirt::MOST + WRITE - 1 - covered);
    });
}

#[test]
fn everyone_who_waits_for_room_gets_it() {
    explore(|| {
        let dirt = Arc::new(dirt::Dirt::default());
        dirt.add(dirt::MOST);
        let writers = [(), ()].map(|()| {
            let dirt = Arc::clone(&dirt);
            thread::spawn(move || dirt.has_room(EVER))
        });
        dirt.settle(dirt.bytes());
        assert!(writers.map(|thread| thread.join().unwrap()) == [true, true]);
    });
}
