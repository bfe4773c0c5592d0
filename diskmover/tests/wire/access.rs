//! Who may talk to whom: certificates, identities, session keys.

use diskmover::error::{Code, Side};
use diskmover::push::Job;

use crate::peer::{Heard, Peer};
use crate::pki::uri;
use crate::rig::{Rig, SESSION, TAG, eventually, run};

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
            "the mover's own port is not everything that speaks TLS",
            |_, job| job.to = "127.0.0.1:1".into(),
            Code::ConnectFailed,
            Side::Sender,
        ),
    ];
    let rig = Rig::new();
    let source = rig.source("disk", 5000, &[(0, b"content")]);
    for (what, change, code, side) in table {
        rig.open(&[("disk", 5000)]).unwrap();
        let mut job = rig.job(&[&source]);
        job.reconnect = std::time::Duration::from_millis(300);
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
