//! Why a connection is of no use any more.

use std::io::{self, ErrorKind};

use rustls::{AlertDescription, Error as TlsError};

use crate::error::{Code, MoverError};
use crate::frame::FrameError;
use crate::tls;

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer closed it.
    #[error("the peer closed the connection")]
    Closed,
    /// Nothing arrived for too long.
    #[error("the peer gave no sign of life in time")]
    Timeout,
    /// The network failed.
    #[error("{0}")]
    Io(io::Error),
    /// TLS failed.
    #[error("{0}")]
    Tls(rustls::Error),
    /// What arrived is not what the peer had sent.
    #[error("it was spoilt on its way: {0}")]
    Spoilt(rustls::Error),
    /// The peer sent what is no frame.
    #[error("{0}")]
    Frame(#[from] FrameError),
}

/// Result of an operation on a connection.
pub type Result<T> = std::result::Result<T, LinkError>;

impl LinkError {
    /// As a failure of the copy; the network's are retryable.
    pub fn to_mover(&self, peer: &str) -> MoverError {
        match self {
            LinkError::Tls(error) => tls::classify(error, peer),
            LinkError::Frame(error) => MoverError::new(
                Code::Protocol,
                format!("{peer} broke the protocol: {error}"),
            ),
            other => MoverError::new(Code::LinkLost, format!("connection to {peer}: {other}")),
        }
    }

    /// Whether another connection may do better.
    pub fn is_network(&self) -> bool {
        matches!(
            self,
            LinkError::Closed | LinkError::Timeout | LinkError::Io(_) | LinkError::Spoilt(_)
        )
    }
}

/// Whether a record was changed on its way. Peers that know each other do not send
/// such ones, and another connection may do better.
pub(super) fn is_spoilt(error: &TlsError) -> bool {
    use AlertDescription::{BadRecordMac, DecodeError, RecordOverflow};
    match error {
        TlsError::DecryptError
        | TlsError::InvalidMessage(_)
        | TlsError::PeerSentOversizedRecord => true,
        TlsError::AlertReceived(alert) => {
            matches!(alert, BadRecordMac | DecodeError | RecordOverflow)
        }
        _ => false,
    }
}

pub(super) fn io_error(error: io::Error) -> LinkError {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => LinkError::Timeout,
        ErrorKind::UnexpectedEof => LinkError::Closed,
        _ => LinkError::Io(error),
    }
}
