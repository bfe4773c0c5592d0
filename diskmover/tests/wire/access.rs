//! Who may talk to whom: certificates, identities, session keys.

use std::io::{Read, Write};
use std::net::TcpStream;

use diskmover::error::{Code, Side};
use diskmover::frame::{Header, Kind};
use diskmover::push::Job;

use crate::peer::{Heard, Peer, listener};
use crate::pki::uri;
use crate::rig::{PATIENCE, Rig, SESSION, TAG, eventually, run};

type Change = fn(&Rig, &mut Job);

/// What is wrong with the sender | what it is told | why.
#[test]
fn a_sender_with_wrong_credentials_is_told_why() {
    let table: &[(&str, Change, Code, Side)] = &[
        (
            "a certificate of another fleet: the receiver's CA does not know it",
            |rig, job| job.tls = rig.foreign.trusting("a", &rig.pki),
            Code::PeerUntrusted,
            Side::Sender,
        ),
        (
            "a receiver of another fleet: the sender must not send anything",
            |rig, job| job.tls = rig.pki.trusting("a", &rig.foreign),
            Code::PeerUntrusted,
            Side::Sender,
        ),
        (
            "an expired certificate: it proves nothing any more",
            |rig, job| job.tls = rig.pki.expired("a"),
            Code::PeerUntrusted,
            Side::Sender,
        ),
        (
            "another host of the fleet: the session is not for it",
            |rig, job| job.tls = rig.pki.host("mallory"),
            Code::PeerIdentity,
            Side::Receiver,
        ),
        (
            "another host listens there: nothing may be sent to it",
            |_, job| job.receiver = Some(uri("c")),
            Code::PeerIdentity,
            Side::Sender,
        ),
        (
            "another key: whoever has the certificate alone may not write",
            |_, job| job.key = [1; 32],
            Code::SessionKeyWrong,
            Side::Receiver,
        ),
        (
            "no such session: the receiver may have restarted",
            |_, job| job.session = "s2".into(),
            Code::SessionUnknown,
            Side::Receiver,
        ),
        (
            "the tag of another copy: its parts are not to be touched",
            |_, job| job.tag = "t2".into(),
            Code::InvalidArgument,
            Side::Receiver,
        ),
        (
            "another number of volumes: the two ends disagree about the copy",
            |_, job| {
                let (_, path, size) = job.volumes[0].clone();
                job.volumes.push(("extra".into(), path, size));
            },
            Code::InvalidArgument,
            Side::Sender,
        ),
        (
            "another volume: the two ends disagree about the copy",
            |_, job| job.volumes[0].0 = "other".into(),
            Code::Protocol,
            Side::Receiver,
        ),
        (
            "nobody listens there",
            |_, job| {
                job.to = "127.0.0.1:1".into();
                job.reconnect = std::time::Duration::from_millis(300);
            },
            Code::ConnectFailed,
            Side::Sender,
        ),
    ];
    let rig = Rig::new();
    let source = rig.source("disk", 5000, &[(0, b"content")]);
    for (what, change, code, side) in table {
        rig.open(&[("disk", 5000)]).unwrap();
        let mut job = rig.job(&[&source]);
        job.reconnect = PATIENCE / 2;
        change(&rig, &mut job);
        let error = run(job).expect_err(what);
        assert_eq!((error.code, error.side), (*code, *side), "{what}: {error}");
        assert_eq!(rig.arrived(), [""; 0], "{what}: something was written");
    }
}

#[test]
fn a_connection_that_comes_while_its_session_is_closed_is_told_so() {
    let rig = Rig::new();
    rig.open(&[("disk", 5000)]).unwrap();
    let _hangs_on = Peer::sending(&rig, "disk", 5000);
    std::thread::scope(|scope| {
        // It takes a while: the first connection does not hang up.
        scope.spawn(|| rig.receiver.close_session(SESSION));
        eventually("it is being closed", || rig.receiver.status(SESSION).err());
        let mut late = Peer::dial(&rig, &rig.pki.host("a"));
        late.hello(|_| {});
        assert_eq!(late.hear_error().unwrap().code, Code::SessionClosed);
    });
    let mut later = Peer::dial(&rig, &rig.pki.host("a"));
    later.hello(|_| {});
    assert_eq!(later.hear_error().unwrap().code, Code::SessionClosed);
}

#[test]
fn a_key_works_for_one_opening_and_one_attempt() {
    let rig = Rig::new();
    let source = rig.source("disk", 5000, &[(0, b"content")]);
    rig.open(&[("disk", 5000)]).unwrap();
    let key = rig.key();
    run(rig.job(&[&source])).unwrap();
    let again = run(rig.job(&[&source])).unwrap_err();
    assert_eq!(again.code, Code::SessionKeyReplayed, "same opening");
    rig.receiver.close_session(SESSION);
    let closed = run(rig.job(&[&source])).unwrap_err();
    assert_eq!(closed.code, Code::SessionKeyReplayed, "closed session");
    rig.open_as(SESSION, TAG, &[("disk", 5000)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.key = key;
    let reopened = run(job).unwrap_err();
    assert_eq!(reopened.code, Code::SessionKeyReplayed, "opened anew");
}

#[test]
fn a_recorded_hello_is_worth_nothing_on_another_connection() {
    let rig = Rig::new();
    rig.open(&[("disk", 5000)]).unwrap();
    let credentials = rig.pki.host("a");
    let mut first = Peer::dial(&rig, &credentials);
    let mut recorded = None;
    first.hello(|hello| recorded = Some(hello.clone()));
    assert!(matches!(first.hear(), Heard::Frame(..)));
    let mut second = Peer::dial(&rig, &credentials);
    second.hello(|hello| *hello = recorded.unwrap());
    assert_eq!(second.hear_error().unwrap().code, Code::SessionKeyWrong);
}

#[test]
fn a_peer_without_a_certificate_gets_no_further_than_the_handshake() {
    let rig = Rig::new();
    rig.open(&[("disk", 5000)]).unwrap();
    let mut config = (*rig.pki.host("a").client().unwrap()).clone();
    config.client_auth_cert_resolver = std::sync::Arc::new(NoCertificate);
    let mut peer = Peer::dial_with(&rig, config);
    peer.hello(|_| {});
    assert!(peer.hears_the_end());
    assert_eq!(
        rig.receiver.status(SESSION).unwrap().0,
        diskmover::session::Phase::Waiting
    );
}

#[test]
fn another_protocol_over_the_same_certificates_is_refused() {
    let rig = Rig::new();
    for names in [vec![b"h2".to_vec()], vec![]] {
        rig.open(&[("disk", 5000)]).unwrap();
        let mut config = (*rig.pki.host("a").client().unwrap()).clone();
        config.alpn_protocols = names.clone();
        let mut peer = Peer::dial_with(&rig, config);
        peer.hello(|_| {});
        assert!(peer.hears_the_end_without_welcome(), "let in as {names:?}");
    }
}

/// Puts a body into a TLS record or handshake message of this kind.
fn enclosed(front: &[u8], width: usize, body: &[u8]) -> Vec<u8> {
    let len = (body.len() as u32).to_be_bytes();
    [front, &len[4 - width..], body].concat()
}

/// The first message of an end that speaks TLS 1.2 and nothing later: its kind,
/// and what is between the session id and the extensions.
fn of_tls_1_2(kind: u8, chosen: &[u8], extensions: &[u8]) -> Vec<u8> {
    let random = [7; 32];
    let extensions = enclosed(&[], 2, extensions);
    let body = [&[3, 3], &random[..], &[0], chosen, &extensions].concat();
    enclosed(&[22, 3, 3], 2, &enclosed(&[kind], 3, &body))
}

/// ECDHE-ECDSA-AES128-GCM-SHA256.
const SUITE: [u8; 2] = [0xC0, 0x2B];
/// Secure renegotiation, as every such server confirms it.
const RENEGOTIATION: [u8; 5] = [0xFF, 1, 0, 1, 0];

fn hello_of_tls_1_2() -> Vec<u8> {
    let groups = [0, 10, 0, 4, 0, 2, 0, 23];
    let signatures = [0, 13, 0, 4, 0, 2, 4, 3];
    let chosen = [&[0, 2][..], &SUITE, &[1, 0]].concat();
    let extensions = [&groups[..], &signatures, &RENEGOTIATION].concat();
    of_tls_1_2(1, &chosen, &extensions)
}

/// A frame as it would be without TLS.
fn in_the_clear(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut header = Header::new(kind, 1);
    header.payload_len = payload.len() as u32;
    [&header.encode()[..], payload].concat()
}

#[test]
fn a_sender_without_our_tls_gets_an_alert_and_the_end() {
    let rig = Rig::new();
    rig.open(&[("disk", 5000)]).unwrap();
    let protocol_version = [21, 3, 3, 0, 2, 2, 70];
    for (what, said, alert) in [
        ("TLS 1.2", hello_of_tls_1_2(), Some(protocol_version)),
        ("a browser", b"GET / HTTP/1.1\r\n\r\n".to_vec(), None),
        (
            "frames in the clear",
            in_the_clear(Kind::Hello, &[1; 80]),
            None,
        ),
    ] {
        let mut socket = TcpStream::connect(rig.receiver.address()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.write_all(&said).unwrap();
        let mut heard = Vec::new();
        socket.read_to_end(&mut heard).expect(what);
        assert_eq!(heard[..3], [21, 3, 3], "{what}: no alert but {heard:?}");
        assert_eq!(heard.len(), 7, "{what}: {heard:?}");
        if let Some(alert) = alert {
            assert_eq!(heard, alert, "{what}");
        }
    }
    let phase = rig.receiver.status(SESSION).unwrap().0;
    assert_eq!(phase, diskmover::session::Phase::Waiting);
    // And the receiver serves who does speak it.
    let source = rig.source("disk", 5000, &[(0, b"content")]);
    run(rig.job(&[&source])).unwrap();
}

#[test]
fn a_receiver_without_our_tls_is_sent_nothing() {
    let rig = Rig::new();
    let source = rig.source("disk", 5000, &[(0, b"content")]);
    let server_hello = of_tls_1_2(2, &[&SUITE[..], &[0]].concat(), &RENEGOTIATION);
    for (what, said) in [
        ("TLS 1.2", server_hello),
        ("a web server", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        ("frames in the clear", in_the_clear(Kind::Welcome, &[1, 0])),
    ] {
        let (listener, address) = listener();
        let mut job = rig.job(&[&source]);
        job.to = address;
        job.connections = 1;
        let heard = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut heard = vec![0; 5];
            socket.read_exact(&mut heard).unwrap();
            socket.write_all(&said).unwrap();
            // A reset is an end as well.
            let _ = socket.read_to_end(&mut heard);
            heard
        });
        let error = run(job).expect_err(what);
        let heard = heard.join().unwrap();
        assert_eq!(error.code, Code::Protocol, "{what}: {error}");
        assert!(!error.retryable, "{what}");
        // A ClientHello, an alert, and nothing else.
        assert_eq!(heard[..2], [22, 3], "{what}");
        let hello = 5 + usize::from(u16::from_be_bytes([heard[3], heard[4]]));
        assert_eq!(heard.get(hello), Some(&21), "{what}: no alert");
        assert_eq!(heard.len(), hello + 7, "{what}: more than an alert");
    }
}

#[test]
fn certificates_are_read_again_for_every_connection() {
    let rig = Rig::new();
    let source = rig.source("disk", 5000, &[(0, b"content")]);
    rig.open(&[("disk", 5000)]).unwrap();
    rig.pki.expired("b"); // takes the place of the receiver's
    let error = run(rig.job(&[&source])).unwrap_err();
    assert_eq!(error.code, Code::PeerUntrusted, "{error}");
    rig.pki.host("b");
    rig.open(&[("disk", 5000)]).unwrap();
    assert!(run(rig.job(&[&source])).is_ok());
}

#[test]
fn openings_that_cannot_be_are_refused() {
    let rig = Rig::new();
    let code = |id: &str, tag: &str, volumes: &[(&str, u64)]| {
        rig.open_as(id, tag, volumes).unwrap_err().code
    };
    let long = "x".repeat(129);
    for (id, tag, volumes) in [
        ("", TAG, &[("d", 1)][..]),
        (long.as_str(), TAG, &[("d", 1)]),
        ("open/d", TAG, &[("d", 1)]),
        ("s", "a/b", &[("d", 1)]),
        ("s", TAG, &[]),
        ("s", TAG, &[("../d", 1)]),
        ("s", TAG, &[("/d", 1)]),
        ("s", TAG, &[("d", 1), ("d", 1)]),
    ] {
        assert_eq!(
            code(id, tag, volumes),
            Code::InvalidArgument,
            "{id} {tag} {volumes:?}"
        );
    }
    for number in 0..16 {
        rig.open_as(&number.to_string(), TAG, &[("d", 1)]).unwrap();
    }
    assert_eq!(code("17", TAG, &[("d", 1)]), Code::LimitExceeded);
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(
        &self,
        _authorities: &[&[u8]],
        _schemes: &[rustls::SignatureScheme],
    ) -> Option<std::sync::Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}
