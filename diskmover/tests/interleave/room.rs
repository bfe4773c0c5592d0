//! What is written and not durable stays within its bound, and nobody waits in vain.

use std::sync::Arc;

use loom::thread;

use crate::{EVER, SWITCHES, dirt, explore};

#[test]
fn what_a_crash_costs_stays_within_its_bound() {
    const WRITE: u64 = 2 << 20;
    explore(SWITCHES, || {
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
    explore(SWITCHES, || {
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
