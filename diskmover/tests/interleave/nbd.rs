//! An NBD server whose connections are numbers.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

pub use diskmover::nbd::{error, handshake};

#[path = "../../src/nbd/pool.rs"]
pub mod pool;

use handshake::Export;

/// A server that lets so many in.
pub struct Server {
    pub multi_conn: bool,
    pub most: usize,
    pub standing: AtomicUsize,
    /// Connections that it gave out.
    pub given: AtomicUsize,
    /// It lets nobody in any more.
    pub left: AtomicBool,
    /// Connections that were broken from another thread.
    pub shut: AtomicUsize,
}

impl Server {
    pub fn new(multi_conn: bool, most: usize) -> Arc<Server> {
        Arc::new(Server {
            multi_conn,
            most,
            standing: AtomicUsize::new(0),
            given: AtomicUsize::new(0),
            left: AtomicBool::new(false),
            shut: AtomicUsize::new(0),
        })
    }

    /// Lets nobody in any more.
    pub fn leave(&self) {
        self.left.store(true, SeqCst);
    }

    fn export(&self) -> Export {
        Export {
            size: 0,
            read_only: true,
            multi_conn: self.multi_conn,
            min_block: 1,
            max_block: 1,
            structured: true,
            contexts: Vec::new(),
        }
    }
}

pub mod address {
    use super::{Arc, Server};

    pub struct ExportSpec {
        pub address: Arc<Server>,
        pub name: String,
    }
}

pub mod socket {
    use super::{Arc, Duration, SeqCst, Server, io};

    /// Stands as long as anything holds it.
    struct Held(Arc<Server>);

    pub struct Socket(Arc<Held>);

    pub struct Breaker(Arc<Held>);

    impl Socket {
        pub fn connect(server: &Arc<Server>, _time: Duration) -> io::Result<Socket> {
            let socket = Socket(Arc::new(Held(Arc::clone(server))));
            let full = server.standing.fetch_add(1, SeqCst) >= server.most;
            if full || server.left.load(SeqCst) {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            server.given.fetch_add(1, SeqCst);
            Ok(socket)
        }

        pub fn breaker(&self) -> io::Result<Breaker> {
            Ok(Breaker(Arc::clone(&self.0)))
        }

        pub fn server(&self) -> &Server {
            &self.0.0
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            self.0.standing.fetch_sub(1, SeqCst);
        }
    }

    impl Breaker {
        pub fn shut(&self) {
            self.0.0.shut.fetch_add(1, SeqCst);
        }
    }
}

pub mod client {
    use super::error::Result;
    use super::handshake::Export;
    use super::socket::Socket;

    pub use diskmover::nbd::client::Patience;

    pub struct Client<W> {
        wire: W,
        export: Export,
    }

    impl Client<Socket> {
        pub fn new(
            wire: Socket,
            _name: &str,
            _contexts: &[String],
            _patience: Patience,
        ) -> Result<Client<Socket>> {
            let export = wire.server().export();
            Ok(Client { wire, export })
        }

        pub fn export(&self) -> &Export {
            &self.export
        }

        pub fn disconnect(&mut self) {
            let _ = &self.wire;
        }
    }
}
