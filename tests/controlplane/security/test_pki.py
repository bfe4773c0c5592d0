"""The certificates themselves; test_handshake.py tries them on a real server."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controlplane.common.errors import DroverError
from controlplane.common.identity import Identity, Role, host_identity
from controlplane.common.reasons import Reason
from controlplane.security import pki
from controlplane.security.files import write_file
from controlplane.security.pki import CertificateAuthority, api_server_identity


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority.create("lab")


def alternative_names(certificate_pem: bytes) -> x509.SubjectAlternativeName:
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def make_csr(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey,
    *names: x509.GeneralName,
) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "i-am-admin")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, digest).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "identity",
    [
        api_server_identity("lab"),
        host_identity("lab", "a.rack-1"),
        Identity("lab", Role.ADMIN, "root"),
        Identity("lab", Role.MEMBER, "eve", "web"),
    ],
)
def test_certificate_carries_one_identity(
    authority: CertificateAuthority, identity: Identity
) -> None:
    names = alternative_names(
        authority.issue(identity, names=["cp.example", "10.0.0.1", "::1"]).certificate_pem
    )

    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [identity.uri]
    assert names.get_values_for_type(x509.DNSName) == [identity.dns_name, "cp.example"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "::1"]


@pytest.mark.parametrize(
    ("identity", "is_server"),
    [
        (host_identity("lab", "a"), True),
        (api_server_identity("lab"), True),
        (Identity("lab", Role.ADMIN, "root"), False),
        (Identity("lab", Role.VIEWER, "eve"), False),
    ],
)
def test_only_machines_can_be_servers(
    authority: CertificateAuthority, identity: Identity, is_server: bool
) -> None:
    certificate = x509.load_pem_x509_certificate(authority.issue(identity).certificate_pem)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value

    assert (ExtendedKeyUsageOID.SERVER_AUTH in usage) is is_server
    assert ExtendedKeyUsageOID.CLIENT_AUTH in usage


def test_host_request_decides_nothing_but_the_key(authority: CertificateAuthority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = make_csr(
        key,
        x509.UniformResourceIdentifier("drover://lab/admin/root"),
        x509.DNSName("api.controlplane.lab.drover.internal"),
    )

    pem = authority.sign_host_csr(csr, fleet="lab", host="c")

    names = alternative_names(pem)
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["drover://lab/host/c"]
    assert names.get_values_for_type(x509.DNSName) == ["c.host.lab.drover.internal"]
    certificate = x509.load_pem_x509_certificate(pem)
    assert certificate.public_key() == key.public_key()
    assert "i-am-admin" not in certificate.subject.rfc4514_string()
    certificate.verify_directly_issued_by(authority.certificate)


def test_forged_request_is_refused(authority: CertificateAuthority) -> None:
    """A request for a key that the sender does not have: the signature is another's."""
    mine, theirs = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    good = x509.load_pem_x509_csr(make_csr(mine))
    der = good.public_bytes(serialization.Encoding.DER)
    spki = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    forged_der = der.replace(
        mine.public_key().public_bytes(*spki), theirs.public_key().public_bytes(*spki)
    )
    forged = x509.load_der_x509_csr(forged_der).public_bytes(serialization.Encoding.PEM)

    with pytest.raises(DroverError, match="not signed by its own key") as caught:
        authority.sign_host_csr(forged, fleet="lab", host="c")

    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.subject == "csr_pem"


@pytest.mark.parametrize(
    "csr",
    [
        b"",
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        b"x" * 20_000,
        make_csr(ed25519.Ed25519PrivateKey.generate()),
        make_csr(rsa.generate_private_key(65537, 1024)),
    ],
    ids=["empty", "garbage", "too long", "ed25519", "short rsa"],
)
def test_unusable_request_is_refused(authority: CertificateAuthority, csr: bytes) -> None:
    with pytest.raises(DroverError) as caught:
        authority.sign_host_csr(csr, fleet="lab", host="c")

    assert caught.value.reason is Reason.INVALID_FIELD


def test_large_rsa_key_is_taken(authority: CertificateAuthority) -> None:
    csr = make_csr(rsa.generate_private_key(65537, 2048))

    assert b"BEGIN CERTIFICATE" in authority.sign_host_csr(csr, fleet="lab", host="c")


def test_files_are_private_complete_and_never_replaced(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    certificate, key = tmp_path / "ca.pem", tmp_path / "ca.key"
    authority.write(certificate, key)

    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(certificate.stat().st_mode) == 0o644
    assert CertificateAuthority.load(certificate, key).certificate == authority.certificate
    before = key.read_bytes()
    with pytest.raises(FileExistsError):
        CertificateAuthority.create("lab").write(certificate, key)
    assert key.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"ca.pem", "ca.key"}


def test_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    import os

    old = os.umask(0)
    try:
        write_file(tmp_path / "secret", b"x", mode=0o600)
    finally:
        os.umask(old)

    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_key_of_another_authority_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        CertificateAuthority.create("lab").write(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")

    with pytest.raises(ValueError, match="is not the key of"):
        CertificateAuthority.load(tmp_path / "one.pem", tmp_path / "two.key")


def test_renewal_keeps_key_and_names(authority: CertificateAuthority, tmp_path: Path) -> None:
    start = datetime.now(UTC) - timedelta(days=720)
    pair = authority.issue(api_server_identity("lab"), names=["cp.example", "10.0.0.1"], now=start)
    path = tmp_path / "server.pem"
    write_file(path, pair.certificate_pem, mode=0o644)
    assert pki.remaining_lifetime(path) < pki.RENEW_BEFORE

    write_file(path, authority.renew(pair.certificate_pem), mode=0o644, replace=True)

    old = x509.load_pem_x509_certificate(pair.certificate_pem)
    new = x509.load_pem_x509_certificate(path.read_bytes())
    assert pki.remaining_lifetime(path) > timedelta(days=700)
    assert new.public_key() == old.public_key()
    assert alternative_names(path.read_bytes()) == alternative_names(pair.certificate_pem)


def test_foreign_certificate_is_not_renewed(authority: CertificateAuthority) -> None:
    foreign = CertificateAuthority.create("lab").issue(Identity("lab", Role.ADMIN, "root"))

    with pytest.raises(ValueError, match="not issued by this authority"):
        authority.renew(foreign.certificate_pem)


def test_leaf_never_outlives_the_authority() -> None:
    long_ago = datetime.now(UTC) - pki.AUTHORITY_LIFETIME + timedelta(days=10)
    old = CertificateAuthority.create("lab", now=long_ago)

    leaf = x509.load_pem_x509_certificate(old.issue(host_identity("lab", "a")).certificate_pem)

    assert leaf.not_valid_after_utc == old.certificate.not_valid_after_utc


def test_secrets_stay_out_of_representations(authority: CertificateAuthority) -> None:
    pair = authority.issue(Identity("lab", Role.ADMIN, "root"))

    assert "PRIVATE" not in repr(pair)


@pytest.mark.parametrize("seconds", [-1, 0, 0.9])
def test_no_lifetime_is_not_the_usual_one(authority: CertificateAuthority, seconds: float) -> None:
    with pytest.raises(ValueError, match="at least 1 s"):
        authority.issue(Identity("lab", Role.VIEWER, "eve"), lifetime=timedelta(seconds=seconds))
