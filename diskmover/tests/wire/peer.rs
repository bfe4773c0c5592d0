//! Raw ends of the protocol: they send whatever a test wants.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use diskmover::digest::{self, CHUNK, Hash};
use diskmover::entry::Entry;
use diskmover::error::{MoverError, Result};
use diskmover::frame::{self, HEADER, Header, Kind};
use diskmover::ledger::Ledger;
use diskmover::messages::{self, EXPORTER_LABEL, Hello, Keys, Open, Receipt, VERSION};
use diskmover::mode::CopyMode;
use diskmover::push::Job;
use diskmover::tls::{TlsFiles, no_name};
use diskmover::unreadable::Unreadable;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConnection};

use crate::pki::Pki;
use crate::rig::{KEY, PATIENCE, Rig, SESSION, TAG, job_to, run};
use crate::sample;

/// Either end of a TLS connection, with frames on top.
pub struct Peer {
    tls: Connection,
    socket: TcpStream,
    broken: bool,
    held: Option<Vec<u8>>,
    pub keys: Keys,
    pub nonce: [u8; 16],
    /// What its HELLO says that it can; nothing, as in the first senders.
    pub abilities: u64,
    /// The session that it asks for.
    pub session: String,
}

/// What a peer heard.
#[derive(Debug)]
pub enum Heard {
    Frame(Header, Vec<u8>),
    /// The connection ended.
    End,
}

impl Peer {
    /// A sender, handshake done.
    pub fn dial(rig: &Rig, credentials: &TlsFiles) -> Peer {
        Peer::dial_with(rig, (*credentials.client().unwrap()).clone())
    }

    /// A sender with a TLS configuration of its own.
    pub fn dial_with(rig: &Rig, config: ClientConfig) -> Peer {
        let socket = TcpStream::connect(rig.receiver.address()).unwrap();
        // Little room for what is never read.
        rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 64 << 10).unwrap();
        let tls = ClientConnection::new(Arc::new(config), no_name()).unwrap();
        Peer::shake(tls.into(), socket, rig.key())
    }

    /// A sender whose HELLO was accepted and whose volume 0 is open.
    pub fn sending(rig: &Rig, volume: &str, size: u64) -> Peer {
        Peer::sending_with(rig, volume, size, 0)
    }

    /// The same with abilities.
    pub fn sending_with(rig: &Rig, volume: &str, size: u64, abilities: u64) -> Peer {
        let mut peer = Peer::dial(rig, &rig.pki.host("a"));
        peer.abilities = abilities;
        peer.hello(|_| {});
        assert!(matches!(peer.hear(), Heard::Frame(h, _) if h.kind == Kind::Welcome));
        peer.open(0, volume, size);
        peer.hear_kind(Kind::Opened);
        peer
    }

    /// A receiver that has accepted one connection.
    pub fn accept(listener: &TcpListener, credentials: &TlsFiles) -> Peer {
        let (socket, _) = listener.accept().unwrap();
        let tls = ServerConnection::new(credentials.server().unwrap()).unwrap();
        Peer::shake(tls.into(), socket, KEY)
    }

    fn shake(mut tls: Connection, mut socket: TcpStream, key: [u8; 32]) -> Peer {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        while tls.is_handshaking() && tls.complete_io(&mut socket).is_ok() {}
        Peer {
            tls,
            socket,
            broken: false,
            held: None,
            keys: Keys::derive(&key),
            nonce: [7; 16],
            abilities: 0,
            session: SESSION.to_owned(),
        }
    }

    /// Sends a HELLO that is right, or what `change` makes of it.
    pub fn hello(&mut self, change: impl FnOnce(&mut Hello)) {
        let mut exporter = [0; 32];
        let Connection::Client(tls) = &self.tls else {
            panic!("only senders say HELLO")
        };
        let context = Some(self.session.as_bytes());
        // Fails when the handshake did; then there is nobody to prove it to.
        let _ = tls.export_keying_material(&mut exporter, EXPORTER_LABEL, context);
        let mut hello = Hello {
            version: VERSION,
            chunk: CHUNK as u32,
            nonce: self.nonce,
            proof: self.keys.prove(&exporter, &self.nonce, &self.session),
            session: self.session.clone(),
            tag: TAG.to_owned(),
        };
        change(&mut hello);
        let mut header = Header::new(Kind::Hello, 0);
        header.logical_len = self.abilities;
        self.send(header, &hello.encode());
    }

    pub fn open(&mut self, volume: u16, name: &str, size: u64) {
        let open = Open {
            identity: sample::identity(size),
            mode: CopyMode::Verbatim,
            volume: name.to_owned(),
        };
        self.send(Header::new(Kind::Open, volume), &open.encode());
    }

    /// Sends chunk `chunk` of a volume as an honest sender would.
    pub fn data(&mut self, volume: u16, chunk: u64, size: u64, content: &[u8]) {
        let (header, payload) = self.data_frame(volume, chunk, size, content);
        self.send(header, &payload);
    }

    /// The frame of a chunk, signed, for tests that spoil it.
    pub fn data_frame(
        &self,
        volume: u16,
        chunk: u64,
        size: u64,
        content: &[u8],
    ) -> (Header, Vec<u8>) {
        let mut content = content.to_vec();
        let bitmap = digest::scan(&content);
        let len = digest::compact(&mut content, &bitmap);
        let hash = digest::chunk_hash(&bitmap, &content[..len]);
        let mut header = frame::ranged(Kind::Data, volume, chunk..chunk + 1, size);
        let payload = [&bitmap[..], &content[..len]].concat();
        header.payload_len = payload.len() as u32;
        header.sign(&self.keys.frame, &hash);
        (header, payload)
    }

    /// Sends a run of zero chunks as an honest sender would.
    pub fn zeros(&mut self, volume: u16, chunks: std::ops::Range<u64>, size: u64) {
        let mut header = frame::ranged(Kind::Zero, volume, chunks, size);
        header.sign(&self.keys.frame, &digest::ZERO_HASH);
        self.send(header, &[]);
    }

    /// Says that a volume is complete and has this root digest.
    pub fn finish(&mut self, volume: u16, size: u64, root: &Hash) {
        let payload = [&root[..], &7u64.to_le_bytes()].concat();
        let mut header = Header::new(Kind::Finish, volume);
        header.payload_len = payload.len() as u32;
        header.logical_len = size;
        header.sign(&self.keys.frame, root);
        self.send(header, &payload);
    }

    /// Sends the whole of volume 0, a segment of nothing but zeros, and hears its receipt.
    pub fn publish_zeros(&mut self, chunks: std::ops::Range<u64>, size: u64) {
        self.zeros(0, chunks, size);
        self.hear_kind(Kind::Ack);
        let root = diskmover::digest::root(size, [[0; 32]].iter());
        self.finish(0, size, &root);
        self.hear_kind(Kind::Receipt);
    }

    /// Sends a frame; a length that the header lacks is filled in.
    pub fn send(&mut self, mut header: Header, payload: &[u8]) {
        if header.payload_len == 0 {
            header.payload_len = payload.len() as u32;
        }
        self.send_bytes(&header.encode());
        self.send_bytes(payload);
    }

    /// Sends what `act` does so many times, in few TLS records.
    pub fn gathered(&mut self, times: usize, act: impl Fn(&mut Peer)) {
        self.held = Some(Vec::new());
        (0..times).for_each(|_| act(self));
        let bytes = self.held.take().unwrap();
        self.send_bytes(&bytes);
    }

    /// Sends bytes as they are; the other end may have hung up.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        if let Some(held) = &mut self.held {
            return held.extend(bytes);
        }
        for piece in bytes.chunks(16 << 10) {
            if self.tls.writer().write_all(piece).is_err() || !self.flush() {
                self.broken = true;
                return;
            }
        }
    }

    fn flush(&mut self) -> bool {
        while self.tls.wants_write() {
            if self.tls.write_tls(&mut self.socket).is_err() {
                return false;
            }
        }
        true
    }

    /// Waits for the next frame.
    pub fn hear(&mut self) -> Heard {
        let mut head = [0; HEADER];
        if !self.read(&mut head) {
            return Heard::End;
        }
        let header = Header::decode(&head).expect("the other end sent nonsense");
        let mut payload = vec![0; header.payload_len as usize];
        match self.read(&mut payload) {
            true => Heard::Frame(header, payload),
            false => Heard::End,
        }
    }

    /// Waits for the next frame of a kind; drops others.
    pub fn hear_kind(&mut self, kind: Kind) -> (Header, Vec<u8>) {
        loop {
            match self.hear() {
                Heard::Frame(header, payload) if header.kind == kind => return (header, payload),
                Heard::Frame(header, payload) => assert_ne!(
                    header.kind,
                    Kind::Error,
                    "{:?}",
                    messages::decode_error(&payload)
                ),
                Heard::End => panic!("the connection ended before {kind:?}"),
            }
        }
    }

    /// What the receiver has of a volume that it opens, by its STATE frames.
    pub fn hear_state(&mut self, size: u64) -> Ledger {
        let mut ledger = Ledger::new(size);
        loop {
            match self.hear() {
                Heard::Frame(header, payload) if header.kind == Kind::State => {
                    let mut rest = payload.as_slice();
                    while !rest.is_empty() {
                        let entry = Entry::decode(&mut rest).unwrap();
                        entry.apply(&mut ledger).unwrap();
                    }
                }
                Heard::Frame(header, _) if header.kind == Kind::Opened => return ledger,
                other => panic!("{other:?}"),
            }
        }
    }

    /// Waits for the ERROR frame that ends the session; None when there is only an end.
    pub fn hear_error(&mut self) -> Option<MoverError> {
        loop {
            match self.hear() {
                Heard::Frame(header, payload) if header.kind == Kind::Error => {
                    return messages::decode_error(&payload);
                }
                Heard::Frame(..) => {}
                Heard::End => return None,
            }
        }
    }

    /// Whether the other end has ended the connection, within `PATIENCE`.
    pub fn hears_the_end(&mut self) -> bool {
        loop {
            if matches!(self.hear(), Heard::End) {
                return true;
            }
        }
    }

    /// The same, without having been let in before.
    pub fn hears_the_end_without_welcome(&mut self) -> bool {
        loop {
            match self.hear() {
                Heard::End => return true,
                Heard::Frame(header, _) if header.kind == Kind::Welcome => return false,
                Heard::Frame(..) => {}
            }
        }
    }

    /// Own address, as the other end knows it.
    pub fn address(&self) -> String {
        self.socket.local_addr().unwrap().to_string()
    }

    /// Whether sending has failed for good.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Breaks the connection.
    pub fn hang_up(self) {
        self.break_off();
    }

    /// The same, and keeps what is left of it.
    pub fn break_off(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// How long a send may block.
    pub fn set_write_timeout(&self, timeout: Duration) {
        self.socket.set_write_timeout(Some(timeout)).unwrap();
    }

    fn read(&mut self, mut out: &mut [u8]) -> bool {
        while !out.is_empty() {
            match self.tls.reader().read(out) {
                Ok(0) => return false,
                Ok(count) => out = &mut out[count..],
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    let _ = self.flush();
                    match self.tls.read_tls(&mut self.socket) {
                        Ok(0) => return false,
                        Ok(_) => {}
                        Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return false,
                        Err(e) => panic!("the other end says nothing: {e}"),
                    }
                    if self.tls.process_new_packets().is_err() {
                        return false;
                    }
                }
                Err(_) => return false,
            }
        }
        true
    }
}

/// A zstd frame of this content.
pub fn zstd(content: &[u8]) -> Vec<u8> {
    let mut out = vec![0; zstd_safe::compress_bound(content.len())];
    let len = zstd_safe::compress(&mut out[..], content, 1).unwrap();
    out.truncate(len);
    out
}

/// What a receiver says of the chunks that a frame was about.
pub fn about(kind: Kind, sent: &Header) -> Header {
    Header {
        kind,
        codec: 0,
        payload_len: 0,
        auth: [0; 32],
        ..sent.clone()
    }
}

/// The receipt of a volume "disk" without holes.
pub fn receipt(size: u64, root: Hash) -> Receipt {
    Receipt {
        volume: "disk".into(),
        size,
        data: size,
        wire: 5,
        root,
        mode: CopyMode::Verbatim,
        unreadable: Unreadable::default(),
        allocated: Some(0), // as the length of these headers says
    }
}

/// How the copy of a file by one connection ends, with a receiver that does `act` and
/// no more. When `act` lets go of the listener, nobody comes back.
pub fn received_by(
    act: impl FnOnce(Peer, TcpListener) + Send,
    source: &Path,
    reconnect: Duration,
) -> Result<Vec<Receipt>> {
    let pki = Pki::new();
    let (listener, address) = listener();
    let credentials = pki.host("b");
    std::thread::scope(|scope| {
        scope.spawn(move || act(Peer::accept(&listener, &credentials), listener));
        run(Job {
            volumes: vec![("disk".into(), source.to_path_buf().into(), None)],
            connections: 1,
            most_connections: 1,
            reconnect,
            ..job_to(&address, &pki)
        })
    })
}

/// A socket to accept on, and its address.
pub fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}
