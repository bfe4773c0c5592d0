//! Mutual TLS 1.3: who may talk to whom.
//!
//! Both ends must present a certificate of the CA. Names are not checked by
//! address: what counts is the URI subject alternative name, compared exactly.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, Resumption};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::server::{ServerConfig, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    AlertDescription, DigitallySignedStruct, Error as TlsError, PeerIncompatible, RootCertStore,
    SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::error::{Code, MoverError, Result};
use crate::messages::ALPN;

/// Own credentials, by file name.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Certificate chain, leaf first.
    pub cert: PathBuf,
    /// Private key.
    pub key: PathBuf,
    /// Authorities that peers must come from.
    pub ca: PathBuf,
}

struct Loaded {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
}

impl TlsFiles {
    /// Configuration of the end that connects.
    pub fn client(&self) -> Result<Arc<ClientConfig>> {
        let loaded = self.load()?;
        let provider = provider();
        let verifier = ChainVerifier {
            roots: loaded.roots,
            provider: Arc::clone(&provider),
        };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(loaded.chain, loaded.key)
            .map_err(unusable)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        Ok(Arc::new(config))
    }

    /// Configuration of the end that listens.
    pub fn server(&self) -> Result<Arc<ServerConfig>> {
        let loaded = self.load()?;
        let provider = provider();
        let verifier =
            WebPkiClientVerifier::builder_with_provider(loaded.roots, Arc::clone(&provider))
                .build()
                .map_err(|e| {
                    MoverError::new(Code::Credentials, format!("{}: {e}", self.ca.display()))
                })?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(loaded.chain, loaded.key)
            .map_err(unusable)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    fn load(&self) -> Result<Loaded> {
        let bad = |path: &PathBuf, why: String| {
            MoverError::new(Code::Credentials, format!("{}: {why}", path.display()))
        };
        let certs = |path: &PathBuf| -> Result<Vec<CertificateDer<'static>>> {
            let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
                .map_err(|e| bad(path, e.to_string()))?
                .collect();
            let found = found.map_err(|e| bad(path, e.to_string()))?;
            if found.is_empty() {
                return Err(bad(path, "there is no certificate in it".to_owned()));
            }
            Ok(found)
        };
        let mut roots = RootCertStore::empty();
        for cert in certs(&self.ca)? {
            roots.add(cert).map_err(|e| bad(&self.ca, e.to_string()))?;
        }
        Ok(Loaded {
            chain: certs(&self.cert)?,
            key: PrivateKeyDer::from_pem_file(&self.key)
                .map_err(|e| bad(&self.key, e.to_string()))?,
            roots: Arc::new(roots),
        })
    }
}

/// The URI names in the leaf of a chain.
pub fn uri_names(chain: Option<&[CertificateDer<'_>]>) -> Vec<String> {
    let leaf = chain.and_then(|chain| chain.first());
    let parsed = leaf.and_then(|leaf| webpki::EndEntityCert::try_from(leaf).ok());
    parsed
        .map(|cert| cert.valid_uri_names().map(str::to_owned).collect())
        .unwrap_or_default()
}

/// A name for a connection that the protocol does not check (see `ChainVerifier`).
pub fn no_name() -> ServerName<'static> {
    ServerName::IpAddress(rustls_pki_types::IpAddr::V4([0, 0, 0, 0].into()))
}

/// Which failure a TLS error is.
pub fn classify(error: &TlsError, peer: &str) -> MoverError {
    use AlertDescription as Alert;
    match error {
        TlsError::InvalidCertificate(why) => MoverError::new(
            Code::PeerUntrusted,
            format!("the certificate of {peer} is refused: {why:?}; is it of our CA, and valid?"),
        ),
        TlsError::NoCertificatesPresented => {
            MoverError::new(Code::PeerUntrusted, format!("{peer} has no certificate"))
        }
        TlsError::AlertReceived(
            alert @ (Alert::UnknownCA
            | Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateExpired
            | Alert::CertificateRevoked
            | Alert::CertificateUnknown
            | Alert::CertificateRequired
            | Alert::DecryptError
            | Alert::AccessDenied),
        ) => MoverError::new(
            Code::PeerUntrusted,
            format!(
                "{peer} refuses our certificate ({alert:?}); is it of the same fleet, and valid?"
            ),
        ),
        TlsError::PeerIncompatible(
            PeerIncompatible::NoCertificateRequestSignatureSchemesInCommon,
        ) => MoverError::new(
            Code::PeerUntrusted,
            format!("{peer} cannot use our certificate"),
        ),
        other => MoverError::new(
            Code::Protocol,
            format!("{peer} does not speak diskmover's TLS: {other}"),
        ),
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn unusable(error: TlsError) -> MoverError {
    MoverError::new(
        Code::Credentials,
        format!("certificate and key cannot be used: {error}"),
    )
}

/// Checks that a server's chain leads to the CA, and leaves the name to the
/// caller, who compares the URI name after the handshake.
#[derive(Debug)]
struct ChainVerifier {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ChainVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, TlsError> {
        let cert = rustls::server::ParsedCertificate::try_from(end_entity)?;
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &cert,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
