//! Every buffer is there for whoever waits for one, and there are no more.

use std::sync::Arc;

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use crate::{EVER, SWITCHES, digest, explore, pool};

const BUFFERS: u64 = 4;

/// A pool, and its buffers but for so many.
fn pool_with(left: u64) -> (Arc<pool::Pool>, Vec<pool::Buffer>) {
    let pool = pool::Pool::new(BUFFERS * digest::CHUNK);
    let out = (left..BUFFERS)
        .map(|_| pool.take(EVER).unwrap().unwrap())
        .collect();
    (pool, out)
}

#[test]
fn there_are_never_more_buffers_than_the_pool_has() {
    explore(SWITCHES, || {
        let (pool, held) = pool_with(1);
        let out = Arc::new(AtomicU64::new(held.len() as u64));
        let threads = [(), ()].map(|()| {
            let (pool, out) = (Arc::clone(&pool), Arc::clone(&out));
            thread::spawn(move || {
                let buffer = pool.take(EVER).unwrap().unwrap();
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
    explore(SWITCHES, || {
        let (pool, mut held) = pool_with(0);
        let threads = [(), ()].map(|()| {
            let pool = Arc::clone(&pool);
            thread::spawn(move || pool.take(EVER).unwrap().is_some())
        });
        held.truncate(2);
        assert!(threads.map(|thread| thread.join().unwrap()) == [true, true]);
    });
}

#[test]
fn a_pool_that_is_trimmed_forgets_nobody() {
    explore(SWITCHES, || {
        let (pool, mut held) = pool_with(0);
        let waiter = {
            let pool = Arc::clone(&pool);
            thread::spawn(move || pool.take(EVER).unwrap().is_some())
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
        let all: Vec<_> = (0..BUFFERS).map(|_| pool.take(EVER).unwrap()).collect();
        assert!(all.iter().all(Option::is_some));
    });
}
