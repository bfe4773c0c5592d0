//! Whoever waits for a connection to an export gets one, or is told that there is none.

use std::sync::Arc;

use loom::sync::atomic::Ordering::SeqCst;
use loom::thread;

use crate::nbd::Server;
use crate::nbd::address::ExportSpec;
use crate::nbd::client::Patience;
use crate::nbd::error::{NbdError, Result};
use crate::nbd::pool::Pool;
use crate::{FEW_SWITCHES, SWITCHES, explore};

fn open(server: &Arc<Server>) -> Arc<Pool> {
    let spec = ExportSpec {
        address: Arc::clone(server),
        name: String::new(),
    };
    Pool::open(spec, Vec::new(), Patience::default()).unwrap()
}

/// One request; what it failed with.
fn ask(pool: &Pool, answer: fn() -> Result<()>) -> Result<()> {
    let reusable = |error: &NbdError| matches!(error, NbdError::Server { .. });
    pool.with(reusable, |_| answer())
}

fn fine() -> Result<()> {
    Ok(())
}

fn broken() -> Result<()> {
    Err(NbdError::Closed)
}

fn refused() -> Result<()> {
    Err(NbdError::server(5, b"", None))
}

/// Asks from as many threads; how it went for each.
fn ask_at_once<const N: usize>(
    pool: &Arc<Pool>,
    answers: [fn() -> Result<()>; N],
) -> [Result<()>; N] {
    let threads = answers.map(|answer| {
        let pool = Arc::clone(pool);
        thread::spawn(move || ask(&pool, answer))
    });
    threads.map(|thread| thread.join().unwrap())
}

/// Nothing is left of what was lent: so many can be had at once.
fn all_are_there(pool: &Pool, count: usize) {
    let nothing_failed = |_: &NbdError| true;
    if count > 0 {
        let lent = pool.with(nothing_failed, |_| {
            all_are_there(pool, count - 1);
            Ok(())
        });
        lent.unwrap();
    }
}

#[test]
fn one_connection_serves_all_in_turn() {
    explore(FEW_SWITCHES, || {
        let server = Server::new(false, 1);
        let pool = open(&server);
        let results = ask_at_once(&pool, [fine, refused, fine]);
        assert!(results[0].is_ok() && results[1].is_err() && results[2].is_ok());
        assert_eq!(server.given.load(SeqCst), 1);
        all_are_there(&pool, 1);
    });
}

#[test]
fn a_server_that_promised_more_is_used_with_what_stands() {
    explore(FEW_SWITCHES, || {
        let server = Server::new(true, 2);
        let pool = open(&server);
        let results = ask_at_once(&pool, [fine, fine, fine]);
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        all_are_there(&pool, server.standing.load(SeqCst));
    });
}

#[test]
fn a_connection_that_fails_makes_room_for_another() {
    explore(FEW_SWITCHES, || {
        let server = Server::new(false, 1);
        let pool = open(&server);
        let results = ask_at_once(&pool, [broken, fine, fine]);
        assert!(results[0].is_err() && results[1].is_ok() && results[2].is_ok());
        all_are_there(&pool, 1);
    });
}

#[test]
fn nobody_waits_for_what_cannot_be_connected_again() {
    explore(FEW_SWITCHES, || {
        let server = Server::new(true, 1);
        let pool = open(&server);
        // Who is late finds no connection, and no room for one.
        server.leave();
        let results = ask_at_once(&pool, [broken, fine, fine]);
        assert!(results[0].is_err());
    });
}

/// Asks from as many threads while the copy is aborted.
fn aborted<const N: usize>(pool: &Arc<Pool>) {
    let threads = [(); N].map(|()| {
        let pool = Arc::clone(pool);
        thread::spawn(move || ask(&pool, fine))
    });
    pool.abort();
    for thread in threads {
        let _ = thread.join().unwrap(); // some were in time
    }
    assert!(matches!(ask(pool, fine), Err(NbdError::Closed)));
}

#[test]
fn all_who_wait_are_told_of_an_abort() {
    explore(SWITCHES, || aborted::<3>(&open(&Server::new(false, 1))));
}

#[test]
fn no_connection_outlives_an_abort() {
    explore(SWITCHES, || {
        let server = Server::new(true, 2);
        aborted::<2>(&open(&server));
        assert_eq!(server.shut.load(SeqCst), server.given.load(SeqCst));
    });
}
