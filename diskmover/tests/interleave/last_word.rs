//! FINISH is sent when every chunk is there, by one connection at a time, and by
//! another when that one breaks.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use loom::thread;

use crate::copy::Copy;
use crate::finish::{Finish, Turn};
use crate::frame::Header;
use crate::{FEW_SWITCHES, SWITCHES, explore};

/// At which event a connection breaks, once.
#[derive(Clone, Copy, PartialEq)]
enum Breaks {
    WithAParcel,
    WithTheTurn,
    Never,
}

enum Event<'a> {
    Turn(Turn<'a>),
    Parcel(Header),
}

/// How often FINISH is being sent, and was heard; loom does not see these.
#[derive(Default)]
struct Words {
    under_way: AtomicUsize,
    heard: AtomicUsize,
}

/// Keeps a connection up until the copy ends, as src/uplink.rs does.
fn carry(copy: &Copy, words: &Words, mut breaks: Breaks, coordinate: impl Fn()) {
    let look = |parcels: &mut VecDeque<Header>| {
        coordinate();
        match copy.finish.take() {
            Some(turn) => Some(Event::Turn(turn)),
            None => parcels.pop_front().map(Event::Parcel),
        }
    };
    while let Some(event) = copy.line.wait_for(look) {
        match event {
            Event::Turn(turn) => {
                assert_eq!(words.under_way.fetch_add(1, SeqCst), 0, "FINISH twice");
                assert!(copy.is_complete(), "FINISH, and chunks are missing");
                assert!(copy.line.is_empty(), "FINISH, and chunks are under way");
                words.under_way.fetch_sub(1, SeqCst);
                if breaks == Breaks::WithTheTurn {
                    breaks = Breaks::Never;
                    drop(turn);
                    copy.line.stir();
                } else {
                    words.heard.fetch_add(1, SeqCst);
                    copy.end(); // the receipts came
                }
            }
            Event::Parcel(sent) if breaks == Breaks::WithAParcel => {
                breaks = Breaks::Never;
                copy.lose(&sent);
            }
            Event::Parcel(sent) => copy.acknowledge(&sent),
        }
    }
}

/// A copy of one chunk over two connections.
fn finishes_once(breaks: [Breaks; 2]) {
    explore(FEW_SWITCHES, move || {
        let copy = Copy::new(&[1]);
        let words = Arc::new(Words::default());
        copy.feed.start();
        let reader = {
            let copy = Arc::clone(&copy);
            thread::spawn(move || copy.read())
        };
        let other = {
            let (copy, words) = (Arc::clone(&copy), Arc::clone(&words));
            thread::spawn(move || carry(&copy, &words, breaks[0], || ()))
        };
        // As src/push/coordinator.rs does.
        carry(&copy, &words, breaks[1], || {
            if !copy.finish.is_allowed() && copy.is_complete() {
                copy.finish.allow();
                copy.line.tell();
            }
        });
        other.join().unwrap();
        reader.join().unwrap();
        assert_eq!(words.heard.load(SeqCst), 1);
    });
}

#[test]
fn two_never_have_the_turn() {
    explore(SWITCHES, || {
        let finish = Arc::new(Finish::default());
        finish.allow();
        let words = Arc::new(Words::default());
        let connections = [(), ()].map(|()| {
            let (finish, words) = (Arc::clone(&finish), Arc::clone(&words));
            thread::spawn(move || {
                if let Some(turn) = finish.take() {
                    assert_eq!(words.under_way.fetch_add(1, SeqCst), 0, "FINISH twice");
                    assert!(finish.is_allowed());
                    words.under_way.fetch_sub(1, SeqCst);
                    drop(turn);
                }
            })
        });
        for connection in connections {
            connection.join().unwrap();
        }
        assert!(finish.take().is_some(), "the turn is lost");
    });
}

#[test]
fn one_connection_has_the_last_word() {
    finishes_once([Breaks::Never, Breaks::Never]);
}

#[test]
fn nothing_is_finished_before_what_was_lost_is_there() {
    finishes_once([Breaks::WithAParcel, Breaks::Never]);
}

#[test]
fn the_last_word_is_not_lost_with_its_connection() {
    finishes_once([Breaks::WithTheTurn, Breaks::WithTheTurn]);
}
