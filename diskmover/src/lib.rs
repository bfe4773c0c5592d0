//! Copies disk images between hosts: sparse, verified and resumable.
//!
//! ```text
//! sender                                         receiver
//! plan -> readers -> workers -> connections  =>  connections -> workers -> part
//!         (pread)    (scan, hash, zstd)   N x TLS   (check)    (unpack, hash, pwrite)
//!                                                              barrier -> journal
//! ```
//! Threads block and queues are bounded; the buffer pool of each side is the
//! only flow control. docs/wire-protocol.md tells what goes over the wire.

pub mod beneath;
pub mod codec;
pub mod digest;
pub mod entry;
pub mod error;
pub mod frame;
pub mod journal;
pub mod ledger;
pub mod messages;
pub mod plan;
pub mod pool;
pub mod publish;
pub mod receipt;
pub mod source;
pub mod sys;
pub mod target;
