//! Every chunk is handed out, once at a time, and again when it is lost.

use std::sync::Arc;

use loom::thread::{self, JoinHandle};

use crate::copy::Copy;
use crate::{FEW_SWITCHES, explore};

fn readers<const N: usize>(copy: &Arc<Copy>) -> [JoinHandle<()>; N] {
    [(); N].map(|()| {
        let copy = Arc::clone(copy);
        thread::spawn(move || copy.read())
    })
}

fn join<const N: usize>(readers: [JoinHandle<()>; N]) {
    for reader in readers {
        reader.join().unwrap();
    }
}

#[test]
fn every_chunk_is_handed_out_once() {
    explore(FEW_SWITCHES, || {
        let copy = Copy::new(&[1, 1]);
        let readers = readers::<2>(&copy);
        copy.feed.start();
        (0..2).for_each(|_| copy.acknowledge(&copy.line.take()));
        assert!(copy.is_complete() && copy.line.is_empty());
        copy.end();
        join(readers);
        assert_eq!(copy.line.handed_out(), 2);
    });
}

#[test]
fn what_a_broken_connection_had_is_handed_out_again() {
    explore(FEW_SWITCHES, || {
        let copy = Copy::new(&[1]);
        let readers = readers::<2>(&copy);
        copy.feed.start();
        // Nothing else is left: the readers may be waiting by now.
        copy.lose(&copy.line.take());
        copy.acknowledge(&copy.line.take());
        assert!(copy.is_complete());
        copy.end();
        join(readers);
        assert_eq!(copy.line.handed_out(), 2);
    });
}

#[test]
fn what_the_receiver_lacks_is_handed_out_again() {
    explore(FEW_SWITCHES, || {
        let copy = Copy::new(&[1]);
        let readers = readers::<1>(&copy);
        copy.feed.start();
        copy.want(&copy.line.take());
        copy.acknowledge(&copy.line.take());
        assert!(copy.is_complete());
        copy.end();
        join(readers);
    });
}

#[test]
fn another_pass_hands_out_all_of_it_again() {
    explore(FEW_SWITCHES, || {
        let copy = Copy::new(&[1]);
        let readers = readers::<1>(&copy);
        copy.feed.start();
        copy.acknowledge(&copy.line.take());
        assert!(copy.is_complete());
        copy.feed.pause();
        copy.volumes[0].begin_again().unwrap();
        assert!(!copy.is_complete());
        copy.feed.start();
        copy.acknowledge(&copy.line.take());
        assert!(copy.is_complete());
        copy.end();
        join(readers);
        assert_eq!(copy.line.handed_out(), 2);
    });
}

#[test]
fn a_copy_that_ends_keeps_no_reader() {
    explore(FEW_SWITCHES, || {
        let copy = Copy::new(&[1]);
        let readers = readers::<2>(&copy);
        copy.feed.start();
        copy.end();
        join(readers);
    });
}
