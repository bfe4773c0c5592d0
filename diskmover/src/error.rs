//! The one table of failure codes, and the error that carries one.
//!
//! `diskmover/errors.py` mirrors the table; a test compares the two.

use std::fmt;
use std::io;

macro_rules! codes {
    ($($variant:ident = $wire:literal, $name:literal, $retryable:literal;)*) => {
        /// What kind of failure. The number goes over the wire.
        #[allow(missing_docs)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u16)]
        pub enum Code { $($variant = $wire,)* }

        impl Code {
            /// Every code.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            /// The public name.
            pub fn name(self) -> &'static str {
                match self { $(Code::$variant => $name,)* }
            }

            /// Whether the same copy can succeed later without anybody acting.
            pub fn retryable(self) -> bool {
                match self { $(Code::$variant => $retryable,)* }
            }

            /// The code with this wire number.
            pub fn from_wire(number: u16) -> Option<Code> {
                match number { $($wire => Some(Code::$variant),)* _ => None }
            }
        }
    };
}

codes! {
    InvalidArgument = 1, "INVALID_ARGUMENT", false;
    Credentials = 2, "CREDENTIALS", false;
    SessionUnknown = 10, "SESSION_UNKNOWN", true;
    SessionKeyWrong = 11, "SESSION_KEY_WRONG", true;
    SessionKeyReplayed = 12, "SESSION_KEY_REPLAYED", true;
    SessionClosed = 13, "SESSION_CLOSED", true;
    PeerUntrusted = 20, "PEER_UNTRUSTED", false;
    PeerIdentity = 21, "PEER_IDENTITY", false;
    Protocol = 22, "PROTOCOL", false;
    LimitExceeded = 23, "LIMIT_EXCEEDED", true;
    ConnectFailed = 24, "CONNECT_FAILED", true;
    LinkLost = 25, "LINK_LOST", true;
    ChunkCorrupt = 30, "CHUNK_CORRUPT", true;
    DigestMismatch = 31, "DIGEST_MISMATCH", false;
    SourceMissing = 40, "SOURCE_MISSING", false;
    SourceInvalid = 41, "SOURCE_INVALID", false;
    SourceChanged = 42, "SOURCE_CHANGED", false;
    SourceIo = 43, "SOURCE_IO", false;
    TargetExists = 50, "TARGET_EXISTS", false;
    TargetPath = 51, "TARGET_PATH", false;
    TargetBusy = 52, "TARGET_BUSY", true;
    TargetIo = 53, "TARGET_IO", false;
    NoSpace = 54, "NO_SPACE", false;
    Quota = 55, "QUOTA", false;
    Cancelled = 60, "CANCELLED", true;
    Internal = 61, "INTERNAL", false;
}

/// Where a failure was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// At the end that reads the source.
    Sender,
    /// At the end that writes the target.
    Receiver,
}

impl Side {
    /// The public name.
    pub fn name(self) -> &'static str {
        match self {
            Side::Sender => "sender",
            Side::Receiver => "receiver",
        }
    }
}

/// A failure, as data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoverError {
    /// What kind.
    pub code: Code,
    /// What happened, to what, why.
    pub message: String,
    /// The volume concerned.
    pub volume: Option<String>,
    /// Byte offset within the volume.
    pub offset: Option<u64>,
    /// Where it was found.
    pub side: Side,
    /// Whether trying again can help.
    pub retryable: bool,
}

/// Result of anything that can fail with a `MoverError`.
pub type Result<T> = std::result::Result<T, MoverError>;

impl MoverError {
    /// An error found at the sender, retryable as its code says.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        MoverError {
            code,
            message: message.into(),
            volume: None,
            offset: None,
            side: Side::Sender,
            retryable: code.retryable(),
        }
    }

    /// The same error, found at the receiver.
    pub fn at_receiver(mut self) -> Self {
        self.side = Side::Receiver;
        self
    }

    /// The same error, about a volume.
    pub fn in_volume(mut self, volume: &str) -> Self {
        self.volume.get_or_insert_with(|| volume.to_owned());
        self
    }

    /// The same error, at a byte of its volume.
    pub fn at(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }

    /// The system gives no memory.
    pub fn no_memory(bytes: usize) -> Self {
        let text = format!(
            "the system gives no {bytes} bytes of memory to copy with; free memory on this host, or raise the limit of this process, and copy again"
        );
        Self::new(Code::LimitExceeded, text)
    }

    /// The system gives no thread.
    pub fn no_thread(why: &io::Error) -> Self {
        let text = format!(
            "the system gives no thread to copy with ({why}); end something on this host, or raise the limit of this process or its service (ulimit -u, TasksMax), and copy again"
        );
        Self::new(Code::LimitExceeded, text)
    }

    /// A failure of the source's storage.
    pub fn source_io(what: &str, error: &io::Error) -> Self {
        Self::new(Code::SourceIo, format!("{what}: {error}"))
    }

    /// A failure of the target's storage, with full disks told apart, and what to do.
    pub fn target_io(what: &str, error: &io::Error) -> Self {
        let (code, advice) = match error.raw_os_error() {
            Some(libc::ENOSPC) => (Code::NoSpace, "; free space there and copy again"),
            Some(libc::EDQUOT) => (Code::Quota, "; raise the quota and copy again"),
            Some(libc::EROFS) => (Code::TargetIo, "; make it writable and copy again"),
            Some(libc::EACCES | libc::EPERM) => (
                Code::TargetIo,
                "; let the receiver's user write there and copy again",
            ),
            Some(libc::EIO) => (Code::TargetIo, "; look at the disk and the kernel's log"),
            _ => (Code::TargetIo, ""),
        };
        Self::new(code, format!("{what}: {error}{advice}")).at_receiver()
    }
}

impl fmt::Display for MoverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.name(), self.message)
    }
}

impl std::error::Error for MoverError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_survive_the_wire() {
        for code in Code::ALL {
            assert_eq!(Code::from_wire(*code as u16), Some(*code));
        }
        assert_eq!(Code::from_wire(0), None);
        assert_eq!(Code::from_wire(u16::MAX), None);
    }

    #[test]
    fn the_documentation_has_every_code_with_its_number() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let told = std::fs::read_to_string(root.join("docs/wire-protocol.md")).unwrap();
        for code in Code::ALL {
            let cells = format!("| {} | {} |", *code as u16, code.name());
            assert!(
                told.contains(&cells),
                "{cells} is not in docs/wire-protocol.md"
            );
        }
    }

    #[test]
    fn full_disks_are_named() {
        for (errno, code, advice) in [
            (libc::ENOSPC, Code::NoSpace, "free space"),
            (libc::EDQUOT, Code::Quota, "raise the quota"),
            (libc::EIO, Code::TargetIo, "the kernel's log"),
            (libc::EROFS, Code::TargetIo, "make it writable"),
            (libc::EACCES, Code::TargetIo, "the receiver's user"),
        ] {
            let error = MoverError::target_io("write", &io::Error::from_raw_os_error(errno));
            assert_eq!(error.code, code);
            assert!(error.message.contains(advice), "{error}");
        }
    }
}
