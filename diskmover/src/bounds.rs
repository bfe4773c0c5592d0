//! Tests of what bounds a copy: its buffers (pool.rs) and what is not durable
//! (dirt.rs). They run here with the system's locks; tests/interleave tries all
//! orders of the same code, which is why they do not stand beside it.

use std::time::Duration;

use crate::digest::CHUNK;
use crate::dirt::{Dirt, MOST};
use crate::pool::Pool;

#[test]
fn the_pool_bounds_what_is_out() {
    let pool = Pool::new(4 * CHUNK);
    let mut out: Vec<_> = (0..4)
        .map(|_| pool.take(Duration::ZERO).unwrap().unwrap())
        .collect();
    assert!(pool.take(Duration::ZERO).unwrap().is_none());
    assert_eq!(out[0].len(), CHUNK as usize);
    out.pop();
    assert!(pool.take(Duration::ZERO).unwrap().is_some());
}

#[test]
fn a_waiting_taker_gets_what_is_returned() {
    let pool = Pool::new(4 * CHUNK);
    let out: Vec<_> = (0..4)
        .map(|_| pool.take(Duration::ZERO).unwrap().unwrap())
        .collect();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| pool.take(Duration::from_secs(20)).unwrap().is_some());
        drop(out);
        assert!(waiter.join().unwrap());
    });
}

#[test]
fn writers_wait_until_something_is_durable() {
    let dirt = Dirt::default();
    assert!(dirt.has_room(Duration::ZERO));
    dirt.add(MOST);
    assert!(!dirt.has_room(Duration::ZERO));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| dirt.has_room(Duration::from_secs(20)));
        dirt.settle(MOST);
        assert!(writer.join().unwrap());
    });
    assert_eq!(dirt.bytes(), 0);
}
