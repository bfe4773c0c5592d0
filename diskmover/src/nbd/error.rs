//! What can go wrong with an NBD server.

use std::io;

use thiserror::Error;

/// A failure of a connection, or of one request over it.
#[derive(Debug, Error)]
pub enum NbdError {
    /// The server went away.
    #[error("the server closed the connection")]
    Closed,
    /// Nothing, or not enough, came in time.
    #[error("the server did not answer in time")]
    Timeout,
    /// The socket failed.
    #[error("{0}")]
    Io(io::Error),
    /// The server said something that the protocol does not allow.
    #[error("the server broke the NBD protocol: it sent {0}")]
    Protocol(String),
    /// The server does not serve us.
    #[error("{0}")]
    Refused(String),
    /// The server reports that a request failed.
    #[error("the server reports {error}{}", told(message))]
    Server {
        /// What it reports.
        error: io::Error,
        /// Its own words, printable.
        message: String,
        /// Where, in bytes of the export.
        offset: Option<u64>,
    },
}

/// Result of anything that talks to a server.
pub type Result<T> = std::result::Result<T, NbdError>;

impl NbdError {
    /// A broken protocol.
    pub fn protocol(what: impl Into<String>) -> NbdError {
        NbdError::Protocol(what.into())
    }

    /// A failure that the server reports by number.
    pub fn server(number: u32, message: &[u8], offset: Option<u64>) -> NbdError {
        // The protocol's numbers are Linux's; others mean no more than "failed".
        let error = match number {
            1 | 5 | 12 | 22 | 28 | 75 | 95 | 108 => io::Error::from_raw_os_error(number as i32),
            other => io::Error::other(format!("error {other}")),
        };
        NbdError::Server {
            error,
            message: printable(message),
            offset,
        }
    }
}

impl From<io::Error> for NbdError {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
        match error.kind() {
            UnexpectedEof | BrokenPipe | ConnectionReset => NbdError::Closed,
            TimedOut | WouldBlock => NbdError::Timeout,
            _ => NbdError::Io(error),
        }
    }
}

/// Text of a server, without what could play with a terminal, and not too long.
pub fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text)
        .chars()
        .take(256)
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

fn told(message: &str) -> String {
    match message {
        "" => String::new(),
        message => format!(" ({message})"),
    }
}
