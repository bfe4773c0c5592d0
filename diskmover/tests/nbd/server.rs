//! An NBD server that can be told to misbehave, at any point.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

pub const MIB: u64 = 1 << 20;
/// Data, a hole, data with an odd end.
pub const SIZE: u64 = 3 * MIB + 512;
pub const HOLE: std::ops::Range<u64> = MIB..2 * MIB;

pub const DONE: u16 = 1;
pub const NONE: u16 = 0;
pub const DATA: u16 = 1;
pub const ZEROS: u16 = 2;
pub const STATUS: u16 = 5;
pub const ERROR: u16 = 1 << 15 | 1;
pub const ERROR_AT: u16 = 1 << 15 | 2;
pub const EIO: u32 = 5;
/// Id of base:allocation here.
pub const ALLOCATION: u32 = 7;

const READ_ONLY: u16 = 0b11;
const MULTI_CONN: u16 = 1 << 8;

/// From a fresh connection to the first request; false ends it.
pub type Shake = fn(&mut Conn) -> io::Result<bool>;

/// What the server does; the default is honest.
#[derive(Clone, Copy)]
pub struct Manners {
    pub shake: Shake,
    pub read: fn(&mut Conn, &Request) -> io::Result<()>,
    pub status: fn(&mut Conn, &Request) -> io::Result<()>,
}

impl Default for Manners {
    fn default() -> Self {
        Manners {
            shake: |conn| conn.shake(&Terms::default()),
            read: |conn, request| conn.answer_read(request),
            status: |conn, request| conn.answer_status(request),
        }
    }
}

/// What is agreed on by the handshake.
pub struct Terms {
    pub size: u64,
    pub flags: u16,
    pub blocks: Option<[u32; 3]>,
    pub structured: bool,
}

impl Default for Terms {
    fn default() -> Self {
        Terms {
            size: SIZE,
            flags: READ_ONLY,
            blocks: Some([1, 4096, 32 << 20]),
            structured: true,
        }
    }
}

impl Terms {
    /// Several connections are welcome.
    pub fn multi() -> Terms {
        Terms {
            flags: READ_ONLY | MULTI_CONN,
            ..Terms::default()
        }
    }
}

pub struct Request {
    pub kind: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

/// An option that the client asks for.
pub struct Asked {
    pub option: u32,
}

/// A connection of a client.
pub struct Conn {
    stream: UnixStream,
    /// How many came before it.
    pub number: usize,
    /// Requests that it has made.
    pub requests: usize,
}

/// A running server.
pub struct Server {
    pub path: std::path::PathBuf,
    pub connections: Arc<AtomicUsize>,
    _dir: tempfile::TempDir,
    _thread: JoinHandle<()>,
}

impl Server {
    pub fn start(manners: Manners) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (Ok(stream), number) = (stream, count.fetch_add(1, Ordering::SeqCst)) else {
                    return;
                };
                std::thread::spawn(move || {
                    let conn = Conn {
                        stream,
                        number,
                        requests: 0,
                    };
                    // The client may hang up at any time.
                    let _ = conn.serve(&manners);
                });
            }
        });
        Server {
            path,
            connections,
            _dir: dir,
            _thread: thread,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Conn {
    fn serve(mut self, manners: &Manners) -> io::Result<()> {
        if !(manners.shake)(&mut self)? {
            return Ok(());
        }
        loop {
            let head: [u8; 28] = self.take()?;
            let word = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().unwrap());
            let request = Request {
                kind: u16::from_be_bytes([head[6], head[7]]),
                cookie: word(8),
                offset: word(16),
                len: u32::from_be_bytes(head[24..].try_into().unwrap()),
            };
            self.requests += 1;
            match request.kind {
                0 => (manners.read)(&mut self, &request)?,
                7 => (manners.status)(&mut self, &request)?,
                _ => return Ok(()),
            }
        }
    }

    // --- handshake ---------------------------------------------------------

    pub fn greet(&mut self) -> io::Result<()> {
        self.send(b"NBDMAGICIHAVEOPT\x00\x03")?;
        self.take::<4>()?;
        Ok(())
    }

    pub fn asked(&mut self) -> io::Result<Asked> {
        let head: [u8; 16] = self.take()?;
        assert_eq!(&head[..8], b"IHAVEOPT");
        let len = u32::from_be_bytes(head[12..].try_into().unwrap());
        let mut payload = vec![0; len as usize];
        self.stream.read_exact(&mut payload)?;
        Ok(Asked {
            option: u32::from_be_bytes(head[8..12].try_into().unwrap()),
        })
    }

    /// Answers an option.
    pub fn reply(&mut self, option: u32, kind: u32, payload: &[u8]) -> io::Result<()> {
        self.reply_head(option, kind, payload.len() as u32)?;
        self.send(payload)
    }

    pub fn reply_head(&mut self, option: u32, kind: u32, len: u32) -> io::Result<()> {
        self.send(&0x0003_e889_0455_65a9_u64.to_be_bytes())?;
        self.send(&[option.to_be_bytes(), kind.to_be_bytes(), len.to_be_bytes()].concat())
    }

    /// The whole handshake, honestly.
    pub fn shake(&mut self, terms: &Terms) -> io::Result<bool> {
        self.greet()?;
        loop {
            let asked = self.asked()?;
            match asked.option {
                8 if terms.structured => self.reply(8, 1, &[])?,
                10 => self.reply_contexts()?,
                7 => {
                    self.reply_info(terms)?;
                    self.reply(7, 1, &[])?;
                    return Ok(true);
                }
                other => self.reply(other, 1 << 31 | 1, b"")?,
            }
        }
    }

    pub fn reply_contexts(&mut self) -> io::Result<()> {
        let context = [&ALLOCATION.to_be_bytes()[..], b"base:allocation"].concat();
        self.reply(10, 4, &context)?;
        self.reply(10, 1, &[])
    }

    pub fn reply_info(&mut self, terms: &Terms) -> io::Result<()> {
        let mut info = vec![0, 0];
        info.extend(terms.size.to_be_bytes());
        info.extend(terms.flags.to_be_bytes());
        self.reply(7, 3, &info)?;
        if let Some(blocks) = terms.blocks {
            let sizes = blocks.map(u32::to_be_bytes).concat();
            self.reply(7, 3, &[&[0, 3], &sizes[..]].concat())?;
        }
        Ok(())
    }

    // --- transmission ------------------------------------------------------

    /// A chunk of a structured reply.
    pub fn chunk(&mut self, flags: u16, kind: u16, cookie: u64, body: &[u8]) -> io::Result<()> {
        self.chunk_head(flags, kind, cookie, body.len() as u32)?;
        self.send(body)
    }

    pub fn chunk_head(&mut self, flags: u16, kind: u16, cookie: u64, len: u32) -> io::Result<()> {
        let mut head = 0x668e_33ef_u32.to_be_bytes().to_vec();
        head.extend(flags.to_be_bytes());
        head.extend(kind.to_be_bytes());
        head.extend(cookie.to_be_bytes());
        head.extend(len.to_be_bytes());
        self.send(&head)
    }

    pub fn simple(&mut self, error: u32, cookie: u64, body: &[u8]) -> io::Result<()> {
        let mut reply = 0x6744_6698_u32.to_be_bytes().to_vec();
        reply.extend(error.to_be_bytes());
        reply.extend(cookie.to_be_bytes());
        reply.extend(body);
        self.send(&reply)
    }

    /// A piece of content, as a chunk.
    pub fn data(&mut self, flags: u16, cookie: u64, range: std::ops::Range<u64>) -> io::Result<()> {
        let body = [&range.start.to_be_bytes()[..], &content(range)].concat();
        self.chunk(flags, DATA, cookie, &body)
    }

    pub fn answer_read(&mut self, request: &Request) -> io::Result<()> {
        let end = request.offset + u64::from(request.len);
        self.data(DONE, request.cookie, request.offset..end)
    }

    pub fn fail(&mut self, kind: u16, cookie: u64, number: u32, text: &[u8]) -> io::Result<()> {
        self.chunk(DONE, kind, cookie, &failure(number, text))
    }

    pub fn answer_status(&mut self, request: &Request) -> io::Result<()> {
        let end = request.offset + u64::from(request.len);
        let edges = [0, HOLE.start, HOLE.end, SIZE];
        let parts = edges.windows(2).enumerate().filter_map(|(index, edge)| {
            let (from, to) = (edge[0].max(request.offset), edge[1].min(end));
            let flags = if index == 1 { 3 } else { 0 };
            (from < to).then_some(((to - from) as u32, flags))
        });
        let parts: Vec<_> = parts.collect();
        self.extents(DONE, request.cookie, ALLOCATION, &parts)
    }

    pub fn extents(
        &mut self,
        flags: u16,
        cookie: u64,
        context: u32,
        parts: &[(u32, u32)],
    ) -> io::Result<()> {
        let mut body = context.to_be_bytes().to_vec();
        for (len, flags) in parts {
            body.extend(len.to_be_bytes());
            body.extend(flags.to_be_bytes());
        }
        self.chunk(flags, STATUS, cookie, &body)
    }

    /// Says nothing until the client has had enough.
    pub fn stall(&mut self) -> io::Result<()> {
        let mut byte = [0];
        while self.stream.read(&mut byte)? > 0 {}
        Ok(())
    }

    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    pub fn hang_up(&mut self) -> io::Result<()> {
        self.stream.shutdown(std::net::Shutdown::Both)
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut out = [0; N];
        self.stream.read_exact(&mut out)?;
        Ok(out)
    }
}

/// Payload of an error chunk.
pub fn failure(number: u32, text: &[u8]) -> Vec<u8> {
    let mut body = number.to_be_bytes().to_vec();
    body.extend((text.len() as u16).to_be_bytes());
    body.extend(text);
    body
}

/// What the disk holds.
pub fn content(range: std::ops::Range<u64>) -> Vec<u8> {
    let byte = |at: u64| match HOLE.contains(&at) {
        true => 0,
        false => (at / 512 % 251) as u8 + 1,
    };
    range.map(byte).collect()
}
