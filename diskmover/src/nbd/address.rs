//! Where an export is: `unix:PATH`, `tcp:HOST:PORT`, and its name.

use std::fmt;
use std::path::PathBuf;

use crate::digest::Hash;
use crate::error::{Code, MoverError, Result};

/// Longest name of an export or a bitmap that the protocol allows.
const MAX_NAME: usize = 4096;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A UNIX socket.
    Unix(PathBuf),
    /// HOST:PORT. Nothing on this wire is encrypted: for the own host only.
    Tcp(String),
}

/// An export, and what of it to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportSpec {
    /// Where the server listens.
    pub address: Address,
    /// Name of the export; the default export has the empty one.
    pub name: String,
    /// What changed since an earlier copy; None to know nothing of one.
    pub changes: Option<Changes>,
    /// Promise of the caller that the same id stands for the same bytes, so that
    /// another attempt can go on where this one stopped.
    pub content_id: Option<String>,
}

/// What changed in an export since an earlier copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// Dirty bitmap of the export that tells; without one, all may have changed.
    pub bitmap: Option<String>,
    /// Root digest of the copy that was made when it began.
    pub since: Hash,
}

impl ExportSpec {
    /// Name of the dirty bitmap to read by.
    pub fn bitmap(&self) -> Option<&str> {
        self.changes.as_ref()?.bitmap.as_deref()
    }
}

impl Address {
    /// Parses `unix:PATH` or `tcp:HOST:PORT`.
    pub fn parse(text: &str) -> Result<Address> {
        if let Some(path) = text.strip_prefix("unix:")
            && !path.is_empty()
        {
            return Ok(Address::Unix(PathBuf::from(path)));
        }
        if let Some(to) = text.strip_prefix("tcp:")
            && to
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        {
            return Ok(Address::Tcp(to.to_owned()));
        }
        let text = format!("{text:?} is neither unix:PATH nor tcp:HOST:PORT");
        Err(MoverError::new(Code::InvalidArgument, text))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(to) => write!(f, "tcp:{to}"),
        }
    }
}

impl ExportSpec {
    /// Fails when a name is too long.
    pub fn check(&self) -> Result<()> {
        let longest = self.bitmap().map_or(0, |bitmap| bitmap.len() + 64);
        if self.name.len().max(longest) > MAX_NAME {
            let text = "the name of an export or a bitmap is longer than NBD allows";
            return Err(MoverError::new(Code::InvalidArgument, text));
        }
        Ok(())
    }
}

impl fmt::Display for ExportSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NBD export {:?} at {}", self.name, self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let parse = |text: &str| Address::parse(text).ok();
        assert_eq!(
            parse("unix:/run/x.sock"),
            Some(Address::Unix("/run/x.sock".into()))
        );
        assert_eq!(
            parse("tcp:127.0.0.1:10809"),
            Some(Address::Tcp("127.0.0.1:10809".into()))
        );
        assert_eq!(
            parse("tcp:[::1]:10809"),
            Some(Address::Tcp("[::1]:10809".into()))
        );
        for bad in [
            "",
            "unix:",
            "tcp:",
            "tcp:host",
            "tcp::1",
            "tcp:h:99999",
            "/run/x",
        ] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
