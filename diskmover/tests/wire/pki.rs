//! A throw-away authority, and the certificates that tests need from it.

use std::path::{Path, PathBuf};

use diskmover::tls::TlsFiles;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType, date_time_ymd,
};
use tempfile::TempDir;

pub struct Pki {
    dir: TempDir,
    ca: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// The URI name of a host.
pub fn uri(name: &str) -> String {
    format!("test://fleet/{name}")
}

impl Pki {
    pub fn new() -> Pki {
        let dir = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params
            .distinguished_name
            .push(DnType::CommonName, "test CA");
        let key = KeyPair::generate().unwrap();
        let cert = params.self_signed(&key).unwrap();
        let ca = dir.path().join("ca.pem");
        std::fs::write(&ca, cert.pem()).unwrap();
        Pki {
            dir,
            ca,
            issuer: Issuer::new(params, key),
        }
    }

    /// Credentials of a host.
    pub fn host(&self, name: &str) -> TlsFiles {
        self.issue(name, |_| {})
    }

    /// Credentials that were valid once.
    pub fn expired(&self, name: &str) -> TlsFiles {
        self.issue(name, |params| {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2020, 2, 1);
        })
    }

    /// The same credentials, but trusting the authority of `other`.
    pub fn trusting(&self, name: &str, other: &Pki) -> TlsFiles {
        TlsFiles {
            ca: other.ca.clone(),
            ..self.host(name)
        }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    fn issue(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> TlsFiles {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = vec![SanType::URI(uri(name).try_into().unwrap())];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let file = |ending: &str| self.path().join(format!("{name}.{ending}"));
        std::fs::write(file("pem"), cert.pem()).unwrap();
        std::fs::write(file("key"), key.serialize_pem()).unwrap();
        TlsFiles {
            cert: file("pem"),
            key: file("key"),
            ca: self.ca.clone(),
        }
    }
}
