//! Servers that tell of a dirty bitmap for ever, or nothing of it.

use std::io;
use std::thread::sleep;
use std::time::Duration;

use diskmover::digest::CHUNK;
use diskmover::error::{Code, MoverError, Result};
use diskmover::nbd::address::{Changes, ExportSpec};
use diskmover::nbd::client::Patience;
use diskmover::nbd::export::NbdSource;
use diskmover::revision::Revision;
use diskmover::source::Source;

use crate::server::*;
use crate::table::Answer;
use crate::{PATIENT, is_clear, spec, within_bound};

const BITMAP: u32 = ALLOCATION + 1;
const GIB: u64 = 1 << 30;
/// Three windows of questions.
const LARGE: u64 = 2 * GIB + 5 * CHUNK;
const DIRTY: u32 = 1;

/// A handshake of an export with a bitmap.
fn shake(conn: &mut Conn) -> io::Result<bool> {
    conn.greet()?;
    loop {
        match conn.asked()?.option {
            10 => {
                for (id, name) in [
                    (ALLOCATION, "base:allocation"),
                    (BITMAP, "qemu:dirty-bitmap:b0"),
                ] {
                    conn.reply(10, 4, &[&id.to_be_bytes()[..], name.as_bytes()].concat())?;
                }
                conn.reply(10, 1, &[])?;
            }
            7 => {
                conn.reply_info(&Terms {
                    size: LARGE,
                    ..Terms::default()
                })?;
                conn.reply(7, 1, &[])?;
                return Ok(true);
            }
            other => conn.reply(other, 1, &[])?,
        }
    }
}

/// A server that answers so what has changed.
fn server(status: Answer) -> (Server, ExportSpec) {
    let server = Server::start(Manners {
        shake,
        status,
        ..Manners::default()
    });
    let changes = Changes {
        bitmap: Some("b0".to_owned()),
        since: [7; 32],
    };
    let spec = ExportSpec {
        changes: Some(changes),
        ..spec(&server)
    };
    (server, spec)
}

/// What a server tells, within a bound.
fn learn(spec: ExportSpec, patience: Patience) -> Result<Revision> {
    within_bound(move || {
        let source = NbdSource::open_within(&spec, &[1; 16], patience)?;
        assert!(source.revision().is_none(), "nobody has asked yet");
        let before = source.identity();
        source.learn()?;
        assert_eq!(before.size, source.identity().size);
        assert_ne!(before, source.identity());
        Ok(source.revision().cloned().expect("it has learnt it"))
    })
}

fn never_ends(error: &MoverError) -> bool {
    error.code == Code::SourceIo && is_clear(error, None) && error.message.contains("never end")
}

#[test]
fn what_changed_is_told_a_window_at_a_time() {
    let (_server, spec) = server(|conn, request| {
        let len = request.len;
        conn.extents(DONE, request.cookie, BITMAP, &[(5, DIRTY), (len - 5, 0)])
    });
    let mut expected = Revision::new([7; 32]);
    for window in 0..3 {
        expected.mark(window * GIB..window * GIB + 5);
    }
    assert_eq!(learn(spec, PATIENT).unwrap(), expected);
}

#[test]
fn a_server_that_tells_of_a_bitmap_in_crumbs_has_an_end() {
    let (_server, spec) =
        server(|conn, request| conn.extents(DONE, request.cookie, BITMAP, &[(512, 0)]));
    let error = learn(spec, PATIENT).unwrap_err();
    assert!(never_ends(&error), "{error}");
    assert!(error.message.contains("192 answers"), "{error}");
}

#[test]
fn a_server_that_takes_its_time_for_each_crumb_has_one_too() {
    let (_server, spec) = server(|conn, request| {
        sleep(Duration::from_millis(200));
        conn.extents(DONE, request.cookie, BITMAP, &[(512, 0)])
    });
    let patience = Patience {
        reply: Duration::from_secs(3),
        ..PATIENT
    };
    let error = learn(spec, patience).unwrap_err();
    assert!(never_ends(&error), "{error}");
    assert!(!error.message.contains("192 answers"), "{error}");
}

#[test]
fn asking_what_changed_ends_when_the_copy_is_cancelled() {
    let (_server, spec) = server(|conn, request| match conn.requests {
        1 => conn.extents(DONE, request.cookie, BITMAP, &[(512, 0)]),
        _ => conn.stall(),
    });
    within_bound(move || {
        let source = NbdSource::open_within(&spec, &[1; 16], PATIENT).unwrap();
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| source.learn());
            while !asking.is_finished() {
                source.abort();
                std::thread::yield_now();
            }
            let error = asking.join().unwrap().unwrap_err();
            assert!(error.message.contains("closed the connection"), "{error}");
        });
    });
}
