//! Copies disk images between hosts: sparse, verified and resumable.
//!
//! ```text
//! sender                                         receiver
//! plan -> readers -> workers -> connections  =>  connections -> workers -> part
//!         (pread)    (scan, hash, zstd)   N x TLS   (check, hash) (unpack, pwrite)
//!                                                              barrier -> journal
//! ```
//! Threads block and queues are bounded; the buffer pool of each side is the
//! only flow control. docs/wire-protocol.md tells what goes over the wire.

// Unit tests use the rig of tests/wire, which speaks of this crate by its name.
#[cfg(test)]
extern crate self as diskmover;

pub mod alignment;
pub mod answers;
#[cfg(test)]
mod attribution;
pub mod audit;
pub mod base;
pub mod beneath;
pub mod boot;
pub mod bottleneck;
#[cfg(test)]
mod bounds;
pub mod budget;
pub mod codec;
pub mod degraded;
pub mod device;
pub mod digest;
pub mod dirt;
pub mod earlier;
pub mod effort;
pub mod entry;
pub mod error;
#[cfg(test)]
mod faults;
pub mod feed;
pub mod frame;
pub mod growth;
pub mod guard;
pub mod holes;
pub mod identity;
pub mod in_use;
pub mod journal;
pub mod keeper;
pub mod ledger;
pub mod link;
pub mod listener;
pub mod local;
pub mod locked;
pub mod medium;
pub mod messages;
pub mod mode;
pub mod naming;
pub mod nbd;
pub mod note;
pub mod offer;
pub mod opening;
pub mod origin;
pub mod passing;
pub mod plan;
pub mod pool;
#[cfg(test)]
mod power;
pub mod priority;
pub mod progress;
pub mod proofs;
pub mod publish;
pub mod push;
#[cfg(feature = "python")]
mod py;
pub mod qcow2;
pub mod rebase;
pub mod receipt;
pub mod repeats;
pub mod revision;
pub mod runway;
pub mod salvage;
pub mod seedlist;
pub mod seeds;
pub mod session;
pub mod silence;
pub mod source;
pub mod stages;
pub mod store;
pub mod sync;
pub mod sys;
pub mod target;
pub mod throttle;
pub mod tls;
pub mod trust;
pub mod unreadable;
pub mod uplink;
pub mod wake;
pub mod wants;
pub mod written;

// What the tests over the wire use serves those that need a seam in here too.
#[cfg(test)]
#[path = "../tests/wire/peer.rs"]
#[allow(dead_code, unreachable_pub, missing_docs)]
mod peer;
#[cfg(test)]
#[path = "../tests/wire/pki.rs"]
#[allow(dead_code, unreachable_pub)]
mod pki;
#[cfg(test)]
#[path = "../tests/wire/rig.rs"]
#[allow(dead_code, unreachable_pub)]
mod rig;
#[cfg(test)]
#[path = "../tests/wire/sample.rs"]
#[allow(dead_code, unreachable_pub)]
mod sample;
