"""The fleet's certificate authority and the certificates it issues.

Every certificate but the authority's own carries exactly one URI name, which is
the identity (`controlplane.common.identity`), and the DNS name that stands for
that identity. gRPC and rustls verify servers by DNS name only, so clients ask
for that one; further names and addresses of the API server are added for
clients that go by address.

A host's certificate never carries an address, however it asks for one: a host
that could choose a name could pose as the control plane to such clients.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controlplane.common.errors import DroverError
from controlplane.common.identity import Identity, Role, host_identity
from controlplane.common.reasons import Reason
from controlplane.security.files import PRIVATE_MODE, PUBLIC_MODE, write_file

AUTHORITY_LIFETIME = timedelta(days=3650)
MACHINE_LIFETIME = timedelta(days=730)
PERSON_LIFETIME = timedelta(days=365)
SHORTEST_LIFETIME = timedelta(seconds=1)
RENEW_BEFORE = timedelta(days=30)
API_SERVER_NAME = "api"

_CLOCK_SKEW = timedelta(minutes=5)
_LARGEST_CSR_BYTES = 16_384
_SMALLEST_RSA_BITS = 2048
_MACHINES = frozenset({Role.HOST, Role.CONTROLPLANE})

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


def api_server_identity(fleet: str) -> Identity:
    """The identity that every replica's API and enrolment ports show."""
    return Identity(fleet, Role.CONTROLPLANE, API_SERVER_NAME)


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its private key.

    Attributes:
        certificate_pem: The certificate, PEM.
        key_pem: Its private key, PKCS #8 PEM, not encrypted.
    """

    certificate_pem: bytes
    key_pem: bytes

    def __repr__(self) -> str:
        return "KeyPair(...)"

    def write(self, certificate: Path, key: Path, *, replace: bool = False) -> None:
        """Store both, the key readable by its owner only.

        Raises:
            FileExistsError: One exists and is not to be replaced.
        """
        write_file(key, self.key_pem, mode=PRIVATE_MODE, replace=replace)
        write_file(certificate, self.certificate_pem, mode=PUBLIC_MODE, replace=replace)


class CertificateAuthority:
    """Issues the certificates of one fleet.

    Attributes:
        certificate: The authority's own certificate.
    """

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self._key = key

    @classmethod
    def create(cls, fleet: str, *, now: datetime | None = None) -> CertificateAuthority:
        """Make a new authority with a new key."""
        start = now or datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Drover fleet {fleet}"[:64])])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start - _CLOCK_SKEW)
            .not_valid_after(start + AUTHORITY_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @classmethod
    def load(cls, certificate: Path, key: Path) -> CertificateAuthority:
        """Read an authority that `write` stored.

        Raises:
            OSError: A file cannot be read.
            ValueError: The files are not a certificate and its EC key.
        """
        loaded = serialization.load_pem_private_key(key.read_bytes(), password=None)
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{key}: not an EC private key")
        authority = x509.load_pem_x509_certificate(certificate.read_bytes())
        if authority.public_key() != loaded.public_key():
            raise ValueError(f"{key} is not the key of {certificate}")
        return cls(authority, loaded)

    @property
    def certificate_pem(self) -> bytes:
        """The authority's certificate, PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def write(self, certificate: Path, key: Path) -> None:
        """Store the authority; existing files are never replaced."""
        KeyPair(self.certificate_pem, private_key_pem(self._key)).write(certificate, key)

    def issue(
        self,
        identity: Identity,
        *,
        names: Iterable[str] = (),
        now: datetime | None = None,
        lifetime: timedelta | None = None,
    ) -> KeyPair:
        """Make a key and certify it.

        Args:
            identity: What the certificate says its holder is.
            names: Further DNS names and IP addresses, as text.
            now: Start of validity; the present if None.
            lifetime: How long it is valid; by role if None.

        Raises:
            ValueError: The lifetime is under a second, which is the unit of certificates.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.certify(
            identity, key.public_key(), names=names, now=now, lifetime=lifetime
        )
        return KeyPair(certificate, private_key_pem(key))

    def certify(
        self,
        identity: Identity,
        public_key: PublicKey,
        *,
        names: Iterable[str] = (),
        now: datetime | None = None,
        lifetime: timedelta | None = None,
    ) -> bytes:
        """Certify a public key; the arguments are those of `issue`.

        Returns:
            The certificate, PEM.
        """
        machine = identity.role in _MACHINES
        start = now or datetime.now(UTC)
        if lifetime is None:
            lifetime = MACHINE_LIFETIME if machine else PERSON_LIFETIME
        if lifetime < SHORTEST_LIFETIME:
            raise ValueError(f"a lifetime of {lifetime} is not at least 1 s")
        end = start + lifetime
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if machine:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        alternative = [
            x509.UniformResourceIdentifier(identity.uri),
            x509.DNSName(identity.dns_name),
            *(_general_name(name) for name in dict.fromkeys(names) if name != identity.dns_name),
        ]
        common_name = f"{identity.role.value} {identity.name}"[:64]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start - _CLOCK_SKEW)
            .not_valid_after(min(end, self.certificate.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName(alternative), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def sign_host_csr(self, csr_pem: bytes, *, fleet: str, host: str) -> bytes:
        """Certify the key of a joining host.

        Only the public key is taken from the request, once its own signature
        proves that the sender has the private half. What the certificate says is
        decided here.

        Returns:
            The host's certificate, PEM.

        Raises:
            DroverError: INVALID_FIELD when the request cannot be used.
        """
        return self.certify(host_identity(fleet, host), csr_public_key(csr_pem))

    def renew(self, certificate_pem: bytes, *, now: datetime | None = None) -> bytes:
        """Certify the same key and names again, with a new validity.

        Returns:
            The new certificate, PEM; the private key stays as it is.

        Raises:
            ValueError: The certificate is not one of this authority's.
        """
        old = x509.load_pem_x509_certificate(certificate_pem)
        try:
            old.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise ValueError("the certificate was not issued by this authority") from error
        key = old.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
            raise ValueError("the certificate has a kind of key that is never issued here")
        return self.certify(certificate_identity(old), key, names=_extra_names(old), now=now)


def private_key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Encode a private key as PKCS #8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def csr_public_key(csr_pem: bytes) -> PublicKey:
    """The public key of a signing request whose self-signature holds.

    Raises:
        DroverError: INVALID_FIELD when it does not, or the key is of a kind or
            size that is not accepted.
    """
    if len(csr_pem) > _LARGEST_CSR_BYTES:
        raise _bad_csr(f"is longer than {_LARGEST_CSR_BYTES} bytes")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        if not request.is_signature_valid:
            raise _bad_csr("is not signed by its own key")
        key = request.public_key()
    except (ValueError, TypeError, InvalidSignature) as error:
        raise _bad_csr(f"cannot be read: {error}") from error
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(
        key.curve, ec.SECP256R1 | ec.SECP384R1
    ):
        return key
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _SMALLEST_RSA_BITS:
        return key
    raise _bad_csr(f"has no EC P-256 or P-384 key and no RSA key of {_SMALLEST_RSA_BITS} bits")


def certificate_identity(certificate: x509.Certificate) -> Identity:
    """The identity in a certificate of the fleet.

    Raises:
        ValueError: It does not carry exactly one URI name of Drover's form.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise ValueError("the certificate carries no alternative names") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise ValueError(f"the certificate carries {len(uris)} URI names instead of one")
    return Identity.parse(uris[0])


def remaining_lifetime(certificate: Path, *, now: datetime | None = None) -> timedelta:
    """How long a certificate file is valid yet; negative once it has expired.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a certificate.
    """
    loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
    return loaded.not_valid_after_utc - (now or datetime.now(UTC))


def _extra_names(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = names.get_values_for_type(x509.IPAddress)
    return [*names.get_values_for_type(x509.DNSName), *(str(address) for address in addresses)]


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _bad_csr(why: str) -> DroverError:
    return DroverError(
        Reason.INVALID_FIELD, f"The certificate signing request {why}.", subject="csr_pem"
    )
