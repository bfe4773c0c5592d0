"""A small authority for the stand-alone tool and for tests.

Drover's own fleet has its own authority; this one only writes files.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from diskmover.model import uri_of

_LIFETIME = datetime.timedelta(days=365)
_CLOCK_SKEW = datetime.timedelta(minutes=5)


@dataclass(frozen=True)
class Authority:
    """A certificate authority.

    Attributes:
        cert: Its self-signed certificate.
        key: Its private key.
    """

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def open_authority(directory: Path) -> Authority:
    """Read the authority in a directory, or make one there (ca.pem, ca.key).

    Raises:
        ValueError: One of the two files is missing or no such thing: a new
            authority in its place would make all certificates worthless.
    """
    directory.mkdir(parents=True, exist_ok=True)
    cert_path, key_path = directory / "ca.pem", directory / "ca.key"
    for present, missing in ((cert_path, key_path), (key_path, cert_path)):
        if present.exists() and not missing.exists():
            raise ValueError(
                f"{present} is there, but {missing.name} is not; "
                "put it back, or use a new directory"
            )
    if cert_path.exists():
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{key_path} is not an elliptic-curve key")
        return Authority(x509.load_pem_x509_certificate(cert_path.read_bytes()), key)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "diskmover CA")])
    builder = _builder(name, name, key.public_key(), _LIFETIME * 10)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    authority = Authority(builder.sign(key, hashes.SHA256()), key)
    _write(key_path, _pem(key))
    cert_path.write_bytes(authority.cert.public_bytes(serialization.Encoding.PEM))
    return authority


def issue(
    authority: Authority,
    directory: Path,
    name: str,
    *,
    uri: str | None = None,
    lifetime: datetime.timedelta = _LIFETIME,
) -> tuple[Path, Path]:
    """Make NAME.pem and NAME.key (mode 0600) for both ends of a connection.

    Args:
        authority: Who signs.
        directory: Where the files go.
        name: File name, and common name.
        uri: URI name of the certificate; made of `name` when None.
        lifetime: How long it is valid; negative makes an expired one.

    Returns:
        The paths of certificate and key.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, authority.cert.subject, key.public_key(), lifetime)
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri or uri_of(name))])
    usage = x509.ExtendedKeyUsage(
        [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    )
    builder = builder.add_extension(names, critical=False).add_extension(usage, critical=False)
    cert = builder.sign(authority.key, hashes.SHA256())
    cert_path, key_path = directory / f"{name}.pem", directory / f"{name}.key"
    _write(key_path, _pem(key))
    cert_path.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    return cert_path, key_path


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    lifetime: datetime.timedelta,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    begin = min(now, now + lifetime) - _CLOCK_SKEW
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(now + lifetime)
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, secret: bytes) -> None:
    """Write a secret file that nobody else can read at any moment."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
