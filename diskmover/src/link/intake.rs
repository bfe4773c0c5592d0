//! What a connection receives: records from the socket, plaintext out of TLS.

use std::io::{ErrorKind, Read};
use std::time::Instant;

use super::error::{io_error, is_spoilt};
use super::{Link, LinkError, Result};
use crate::pool::lock;

/// Ciphertext that is read in one go.
const INTAKE: usize = 64 << 10;

/// Ciphertext that was read and TLS has not seen.
pub(super) struct Intake {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Default for Intake {
    fn default() -> Self {
        Intake {
            bytes: vec![0; INTAKE].into(),
            start: 0,
            end: 0,
        }
    }
}

impl Link {
    pub(super) fn recv(&self, out: &mut [u8], deadline: Instant) -> Result<()> {
        let mut filled = 0;
        while filled < out.len() {
            let read = lock(&self.tls).reader().read(&mut out[filled..]);
            match read {
                Ok(0) => return Err(LinkError::Closed),
                Ok(count) => filled += count,
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.pump(deadline)?,
                Err(e) => return Err(io_error(e)),
            }
        }
        Ok(())
    }

    /// Takes in some ciphertext, waiting for it if there is none.
    pub(super) fn pump(&self, deadline: Instant) -> Result<()> {
        let mut intake = lock(&self.intake);
        if intake.start == intake.end {
            let left = deadline
                .saturating_duration_since(Instant::now())
                .min(self.idle);
            if left.is_zero() {
                return Err(LinkError::Timeout);
            }
            self.socket
                .set_read_timeout(Some(left))
                .map_err(LinkError::Io)?;
            let count = loop {
                match (&self.socket).read(&mut intake.bytes) {
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    other => break other.map_err(io_error)?,
                }
            };
            if count == 0 {
                return Err(LinkError::Closed);
            }
            (intake.start, intake.end) = (0, count);
        }
        let mut tls = lock(&self.tls);
        let mut rest = &intake.bytes[intake.start..intake.end];
        let before = rest.len();
        tls.read_tls(&mut rest).map_err(LinkError::Io)?;
        let taken = before - rest.len();
        intake.start += taken;
        let is_new = tls.is_handshaking();
        match tls.process_new_packets() {
            Err(error) if !is_new && is_spoilt(&error) => Err(LinkError::Spoilt(error)),
            other => other.map(|_| ()).map_err(LinkError::Tls),
        }
    }
}
