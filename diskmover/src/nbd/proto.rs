//! Numbers of the NBD protocol, and the one frame that we send in volume.

/// First 8 bytes of a server.
pub const SERVER_MAGIC: [u8; 8] = *b"NBDMAGIC";
/// Next 8 bytes, and first of every option.
pub const OPTION_MAGIC: [u8; 8] = *b"IHAVEOPT";
/// First 8 bytes of an answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First 4 bytes of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First 4 bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First 4 bytes of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, both ways.
pub mod handshake_flag {
    #![allow(missing_docs)]
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options.
pub mod option {
    #![allow(missing_docs)]
    pub const ABORT: u32 = 2;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Kinds of answers to options; errors have the top bit set.
pub mod option_reply {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR | 1;
    pub const ERR_POLICY: u32 = ERROR | 2;
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
}

/// Kinds of information about an export.
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
pub mod export_flag {
    #![allow(missing_docs)]
    pub const READ_ONLY: u16 = 1 << 1;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Commands.
pub mod command {
    #![allow(missing_docs)]
    pub const READ: u16 = 0;
    pub const DISCONNECT: u16 = 2;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Kinds of chunks; errors have the top bit set.
pub mod chunk {
    #![allow(missing_docs)]
    pub const DONE: u16 = 1 << 0;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 1 << 15;
    pub const ERROR_OFFSET: u16 = ERROR | 2;
}

/// Status flags of `base:allocation`.
pub mod allocation {
    /// It reads as zero; the only flag that lets us skip.
    pub const ZERO: u32 = 1 << 1;
}

/// Status flags of `qemu:dirty-bitmap:NAME`.
pub mod bitmap {
    /// It was written since the bitmap began.
    pub const DIRTY: u32 = 1 << 0;
}

/// Bytes of a request.
pub const REQUEST: usize = 28;

/// A request without a payload.
pub fn request(command: u16, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST] {
    let mut out = [0; REQUEST];
    out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    out[6..8].copy_from_slice(&command.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..24].copy_from_slice(&offset.to_be_bytes());
    out[24..].copy_from_slice(&len.to_be_bytes());
    out
}
