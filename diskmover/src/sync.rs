//! The locks of what threads hand to one another: buffers (pool.rs), room
//! (dirt.rs), work (feed.rs) and the last word (push/finish.rs).
//!
//! tests/interleave builds these modules over locks that try all orders in which
//! threads can meet.

pub use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
