//! The locks of what bounds a copy (pool.rs, dirt.rs).
//!
//! tests/interleave builds these modules over locks that try all orders in which
//! threads can meet.

pub use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
