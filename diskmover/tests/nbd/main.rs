//! NBD servers that break the protocol, lie, stall and die: what must come of it.
//!
//! Whatever a server does, a copy ends: with the right content, or with an error
//! that names the export, the place and the reason. It never panics, hangs, or
//! takes memory because a server says so.

mod bitmaps;
mod handshakes;
mod reads;
mod server;
mod statuses;
mod table;

use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use diskmover::digest::{self, CHUNK, Hash, ZERO_HASH};
use diskmover::error::{Code, MoverError, Result};
use diskmover::local;
use diskmover::nbd::address::{Address, ExportSpec};
use diskmover::nbd::client::Patience;
use diskmover::nbd::export::NbdSource;
use diskmover::plan::{Plan, Work};
use diskmover::source::Source;
use diskmover::sys::{ALIGN, AlignedBuf};

use server::{Manners, SIZE, Server, Shake, Terms};

/// Longer than anything here takes on a busy machine.
const BOUND: Duration = Duration::from_secs(60);
/// For servers that answer.
pub const PATIENT: Patience = Patience {
    hello: Duration::from_secs(30),
    reply: Duration::from_secs(30),
};
/// For servers that do not, after a while in which they may have to.
pub const HASTY: Patience = Patience {
    hello: Duration::from_secs(1),
    reply: Duration::from_secs(1),
};

/// The export of a server.
pub fn spec(server: &Server) -> ExportSpec {
    ExportSpec {
        address: Address::Unix(server.path().to_owned()),
        name: "vda".to_owned(),
        changes: None,
        content_id: None,
    }
}

/// Reads all of an export in order, within `BOUND`; its digest.
pub fn read_all(spec: ExportSpec, patience: Patience) -> Result<Hash> {
    within_bound(move || {
        let source = NbdSource::open_within(&spec, &[1; 16], patience)?;
        let size = source.identity().size;
        let mut hashes = vec![ZERO_HASH; digest::chunk_count(size) as usize];
        let unmapped = |e| MoverError::source_io("cannot map the source", &e);
        let mut plan = Plan::new(source.extents(true)?, size);
        while let Some(work) = plan.next(|_| false).map_err(unmapped)? {
            if let Work::Chunk(chunk, ranges) = work {
                let len = digest::chunk_len(size, chunk);
                let mut buffer = AlignedBuf::new(CHUNK as usize).unwrap();
                source.read_chunk(chunk, &ranges, &mut buffer[..len.next_multiple_of(ALIGN)])?;
                hashes[chunk as usize] = hash_of(&mut buffer[..len]);
            }
        }
        Ok(digest::root(size, [digest::segment_hash(&hashes)].iter()))
    })
}

/// Reads all of an export as copies do, in several threads at once.
fn read_in_parallel(spec: ExportSpec, patience: Patience) -> Result<Hash> {
    within_bound(move || {
        let source = NbdSource::open_within(&spec, &[1; 16], patience)?;
        local::digest_of(&source, || false).map(|(_, _, root)| root)
    })
}

fn hash_of(chunk: &mut [u8]) -> Hash {
    let bitmap = digest::scan(chunk);
    let data = digest::compact(chunk, &bitmap);
    digest::chunk_hash(&bitmap, &chunk[..data])
}

/// Runs something that must not hang.
fn within_bound<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || tell.send(work()));
    match told.recv_timeout(BOUND) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("it hangs"),
        Err(mpsc::RecvTimeoutError::Disconnected) => panic!("it panicked"),
    }
}

/// The digest of what an honest server has.
pub fn right() -> Hash {
    let chunks = (0..digest::chunk_count(SIZE)).map(|chunk| {
        let start = chunk * CHUNK;
        hash_of(&mut server::content(start..(start + CHUNK).min(SIZE)))
    });
    let hashes: Vec<_> = chunks.collect();
    digest::root(SIZE, [digest::segment_hash(&hashes)].iter())
}

/// Whether an error names the export, and the place where there is one.
pub fn is_clear(error: &MoverError, place: Option<u64>) -> bool {
    let named = error.message.contains("NBD export \"vda\" at unix:");
    let placed = |at| error.offset == Some(at) || error.message.contains(&format!("byte {at}"));
    named && place.is_none_or(placed)
}

#[test]
fn an_honest_server_is_read() {
    let server = Server::start(Manners::default());
    assert_eq!(read_all(spec(&server), PATIENT).unwrap(), right());
    assert_eq!(read_in_parallel(spec(&server), PATIENT).unwrap(), right());
}

#[test]
fn one_connection_goes_on_alone_when_others_are_not_served_or_see_another_disk() {
    let unserved: Shake = |conn| match conn.number {
        0 => conn.shake(&Terms::multi()),
        _ => Ok(false),
    };
    let smaller: Shake = |conn| {
        let size = if conn.number == 0 { SIZE } else { SIZE - 512 };
        conn.shake(&Terms {
            size,
            ..Terms::multi()
        })
    };
    for shake in [unserved, smaller] {
        let server = Server::start(Manners {
            shake,
            // So slowly that all readers want a connection at the same time.
            read: |conn, request| {
                std::thread::sleep(Duration::from_millis(20));
                let len = request.len as usize;
                match conn.number {
                    0 => conn.answer_read(request),
                    _ => {
                        let other = [&request.offset.to_be_bytes()[..], &vec![9; len]].concat();
                        conn.chunk(server::DONE, server::DATA, request.cookie, &other)
                    }
                }
            },
            ..Manners::default()
        });
        assert_eq!(read_in_parallel(spec(&server), PATIENT).unwrap(), right());
        assert!(server.connections.load(Ordering::SeqCst) > 1);
    }
}

#[test]
fn what_a_server_calls_zero_is_read_when_it_is_not_trusted() {
    let manners = Manners {
        status: |conn, request| {
            conn.extents(1, request.cookie, server::ALLOCATION, &[(request.len, 2)])
        },
        ..Manners::default()
    };
    let server = Server::start(manners);
    let source = NbdSource::open_within(&spec(&server), &[1; 16], PATIENT).unwrap();
    let first = |trust| {
        let mut extents = source.extents(trust).unwrap();
        extents.next_data(0).unwrap()
    };
    assert_eq!(first(true), None, "believed");
    assert_eq!(first(false), Some(0..SIZE), "not believed");
}

#[test]
fn reads_under_way_end_when_the_copy_is_cancelled() {
    let server = Server::start(Manners {
        read: |conn, _| conn.stall(),
        ..Manners::default()
    });
    let spec = spec(&server);
    within_bound(move || {
        let source = NbdSource::open_within(&spec, &[1; 16], PATIENT).unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| source.read_chunk(0, &[0..CHUNK], &mut vec![0; 1 << 20]));
            while !reader.is_finished() {
                source.abort();
                std::thread::yield_now();
            }
            assert_eq!(reader.join().unwrap().unwrap_err().code, Code::SourceIo);
        });
    });
}

#[test]
fn an_export_of_another_host_is_refused_before_anything_is_sent() {
    // TEST-NET-1, and a name that leads to all addresses of a host.
    for address in ["192.0.2.1:10809", "0.0.0.0:10809"] {
        let began = Instant::now();
        let spec = ExportSpec {
            address: Address::Tcp(address.to_owned()),
            name: "vda".to_owned(),
            changes: None,
            content_id: None,
        };
        let error = read_all(spec, PATIENT).unwrap_err();
        assert_eq!(error.code, Code::SourceInvalid);
        let why = "is not an address of this host";
        assert!(error.message.contains(why), "{error:?}");
        assert!(began.elapsed() < PATIENT.hello, "it tried to connect");
    }
}

#[test]
fn an_export_of_the_own_host_may_be_on_tcp() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (spec, heard) = (
        ExportSpec {
            address: Address::Tcp(address),
            name: "vda".to_owned(),
            changes: None,
            content_id: None,
        },
        std::thread::spawn(move || listener.accept().is_ok()),
    );
    let error = read_all(spec, HASTY).unwrap_err();
    assert!(heard.join().unwrap());
    assert_eq!(error.code, Code::SourceIo);
}
