//! A copy under way: the threads of the sending end, and their common state.
//!
//! ```text
//! feed -> readers (8) -> work queue -> workers -> send queue -> uplinks (N)
//!   ^                                                              |
//!   +------------------ what a broken connection had --------------+
//! ```
//! The coordinator (push/coordinator.rs) watches: when all is acknowledged it
//! checks that the source did not change (else another pass begins, over what was
//! placed), lets one uplink send the root digests, and ends the copy when all
//! receipts are there.

mod check;
mod coordinator;
mod finish;
mod patience;
mod shared;
mod standing;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::digest::Hash;
use crate::effort::Compression;
use crate::error::{Code, MoverError, Result};
use crate::feed::Volume;
use crate::guard;
use crate::messages::Receipt;
use crate::origin::Origin;
use crate::pool::lock;
use crate::priority::IoPriority;
use crate::progress::Progress;
use crate::salvage::OnReadError;
use crate::tls::TlsFiles;
use crate::trust::Holes;

pub use finish::{Finish, Turn};
pub use patience::STALL;
pub use shared::{CLOSING, Parcel, QUEUE, Raw, Shared};

/// What to copy, and how.
pub struct Job {
    /// HOST:PORT.
    pub to: String,
    /// The URI name that the receiver must have; None for any of the CA.
    pub receiver: Option<String>,
    /// Own credentials.
    pub tls: TlsFiles,
    /// Name of the session.
    pub session: String,
    /// The secret shared with the receiver.
    pub key: Hash,
    /// The copy, across sessions.
    pub tag: String,
    /// Id, origin and expected size of each volume.
    pub volumes: Vec<(String, Origin, Option<u64>)>,
    /// Number of connections to begin with.
    pub connections: usize,
    /// Most connections, which long distances lead to.
    pub most_connections: usize,
    /// Bytes a second.
    pub limit: Option<u64>,
    /// How hard to compress.
    pub compression: Compression,
    /// Whether holes are believed.
    pub holes: Holes,
    /// Copy also what a QEMU has open for writing.
    pub despite_lock: bool,
    /// What to do where a source gives EIO.
    pub on_read_error: OnReadError,
    /// Memory for chunks.
    pub buffer_bytes: u64,
    /// How much its reads count beside others'.
    pub io_priority: IoPriority,
    /// How long to try when no connection stands.
    pub reconnect: Duration,
    /// How long a receiver that says that it lives may leave what it was sent
    /// unanswered (see push/patience.rs).
    pub stall: Duration,
}

/// A running copy.
pub struct Push {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Push {
    /// Checks the job, opens the sources and starts.
    pub fn start(job: Job) -> Result<Push> {
        check::job(&job)?;
        let config = job.tls.client()?;
        let mut volumes = Vec::with_capacity(job.volumes.len());
        let mut nonce = [0; 16];
        random_bytes(&mut nonce)?;
        for (id, origin, expected) in &job.volumes {
            let source = origin.open(&nonce, job.on_read_error);
            let source = source.map_err(|e| e.in_volume(id))?;
            let size = source.identity().size;
            if expected.is_some_and(|expected| expected != size) {
                let text = format!(
                    "{} has {size} bytes, not {}",
                    source.shown(),
                    expected.unwrap_or(0)
                );
                return Err(MoverError::new(Code::SourceInvalid, text).in_volume(id));
            }
            if !job.despite_lock {
                source.check_unused().map_err(|e| e.in_volume(id))?;
            }
            let trust_holes = match job.holes {
                Holes::Auto => source.has_sound_holes(),
                Holes::Trust => true,
                Holes::Read => false,
            };
            volumes.push(Volume::new(id.clone(), source, trust_holes)?);
        }
        let shared = Arc::new(Shared::new(job, config, nonce, volumes));
        let thread = {
            let shared = Arc::clone(&shared);
            guard::start(move || coordinator::coordinate(&shared))?
        };
        Ok(Push {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.shared.progress()
    }

    /// Changes the limit.
    pub fn set_limit(&self, limit: Option<u64>) -> Result<()> {
        check::limit(limit)?;
        self.shared.throttle.set(limit);
        Ok(())
    }

    /// Stops it and waits for its threads.
    pub fn cancel(&self) {
        self.shared
            .fail(MoverError::new(Code::Cancelled, "the copy was cancelled"));
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }

    /// Waits for the end; None when it still runs after `timeout`.
    pub fn wait(&self, timeout: Duration) -> Option<Result<Vec<Receipt>>> {
        let running = |outcome: &mut Option<_>| outcome.is_none();
        let (slot, _) = self
            .shared
            .ended
            .wait_timeout_while(lock(&self.shared.outcome), timeout, running)
            .unwrap_or_else(PoisonError::into_inner);
        let outcome = slot.clone();
        // Threads that fail after the first one lock it too, before they end.
        drop(slot);
        if outcome.is_some()
            && let Some(thread) = lock(&self.thread).take()
        {
            let _ = thread.join();
        }
        outcome
    }
}

impl Drop for Push {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// Runs a thread of the copy; the copy fails when it crashes.
fn guarded(shared: &Shared, what: &str, work: impl FnOnce()) {
    guard::run(work, || shared.fail(guard::crash(what)));
}

fn random_bytes(out: &mut [u8]) -> Result<()> {
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let error = |_| MoverError::new(Code::Internal, "the system gives no random numbers");
    provider.secure_random.fill(out).map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crashed_thread_ends_the_copy() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let own = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
        let cert = file("cert", &own.cert.pem());
        let push = Push::start(Job {
            to: "127.0.0.1:1".into(),
            receiver: None,
            tls: TlsFiles {
                key: file("key", &own.signing_key.serialize_pem()),
                ca: cert.clone(),
                cert,
            },
            session: "s".into(),
            key: [0; 32],
            tag: "t".into(),
            volumes: vec![("disk".into(), file("disk", "x").into(), None)],
            connections: 1,
            most_connections: 1,
            limit: None,
            compression: Compression::Off,
            holes: Holes::Auto,
            despite_lock: false,
            on_read_error: OnReadError::Fail,
            buffer_bytes: 0,
            io_priority: IoPriority::Normal,
            reconnect: Duration::from_secs(600),
            stall: STALL,
        })
        .unwrap();
        guarded(&push.shared, "a reader", || panic!("on purpose"));
        let outcome = push.wait(Duration::from_secs(60)).expect("it hangs");
        assert_eq!(outcome.unwrap_err().code, Code::Internal);
    }
}
