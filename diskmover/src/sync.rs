//! The locks of what threads hand to one another: buffers (pool.rs), room
//! (dirt.rs), work (feed.rs), the last word (push/finish.rs), connections
//! (nbd/pool.rs) and proofs (proofs.rs).
//!
//! tests/interleave builds these modules over locks that try all orders in which
//! threads can meet.

pub use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
