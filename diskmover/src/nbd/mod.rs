//! An NBD client that reads: what a guest sees on its disk, from a QEMU export.
//!
//! ```text
//! address.rs    where the export is            unix:PATH, tcp:HOST:PORT
//! socket.rs     bytes with a deadline
//! handshake.rs  fixed newstyle, structured replies, meta contexts, GO
//! client.rs     READ and BLOCK_STATUS over one connection
//! status.rs     extents -> ranges that have to be read
//! map.rs        ... of the whole export
//! pool.rs       several connections when the server allows it
//! export.rs     the source that a copy reads
//! ```
//! Every answer of the server is checked before it is used: a reply outside its
//! request, doubled, missing or in crumbs ends the connection, never the process.
//! What the server does not know, or knows wrongly, is read as data.
//!
//! The protocol: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>

pub mod address;
pub mod client;
pub mod error;
pub mod export;
pub mod handshake;
pub mod map;
pub mod pool;
pub mod proto;
pub mod socket;
pub mod status;
