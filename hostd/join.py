"""`drover-hostd join TOKEN`: become a host of a fleet.

    token -> key and CSR -> JoinHost over TLS -> certificate checked -> files written

The token carries the fleet's certificate authority, so the host knows whom it
talks to before it has a certificate itself. The private key never leaves the
host. Files are written whole or not at all, the certificate after its key and
the configuration last: a join that dies half-way can be repeated.
"""

from __future__ import annotations

import base64
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

import grpc
import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_status import rpc_status

from controlplane.common.errors import DroverError
from controlplane.common.foreign_json import decode
from controlplane.common.identity import host_identity
from controlplane.v1 import host_service_pb2, host_service_pb2_grpc
from hostd.config import HostdConfig, ListenConfig, TlsConfig, is_address, read_config

_TIMEOUT_SECONDS = 30.0
_TOKEN_VERSION = 1
_PRIVATE_MODE = 0o600
_PUBLIC_MODE = 0o644


class JoinError(Exception):
    """The host could not join; the message says why and what to do."""


class JoinToken(msgspec.Struct, frozen=True, kw_only=True):
    """What `drover host add` printed, decoded.

    Attributes:
        v: Version of the format.
        server: Address of the enrolment port, HOST:PORT.
        server_name: DNS name that the server's certificate has to carry.
        fleet: Name of the fleet.
        host: Name that the host will have.
        secret: One-time credential.
        ca_pem: Certificate authority of the fleet, PEM.
    """

    v: int
    server: str
    server_name: str
    fleet: str
    host: str
    secret: str
    ca_pem: str

    def __repr__(self) -> str:
        return f"JoinToken(server={self.server!r}, fleet={self.fleet!r}, host={self.host!r}, ...)"


@dataclass(frozen=True)
class JoinOptions:
    """How to join.

    Attributes:
        config: The configuration file; it is written when missing.
        address: HOST:PORT at which the control plane reaches this host; empty to
            take the address that leads to the control plane.
        data_address: HOST:PORT of the data port for other hosts; empty likewise.
        roots: Storage roots for a new configuration file, name -> directory.
        force: True to replace an existing identity.
    """

    config: Path
    address: str = ""
    data_address: str = ""
    roots: tuple[tuple[str, Path], ...] = ()
    force: bool = False


def decode_token(word: str) -> JoinToken:
    """Read a token.

    Raises:
        JoinError: It is cut off, mistyped or of another version.
    """
    word = word.strip()
    try:
        raw = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
        token = decode(raw, JoinToken)
    except ValueError as error:
        raise JoinError("The join token is damaged. Copy the whole word again.") from error
    if token.v != _TOKEN_VERSION:
        raise JoinError(
            f"The join token has version {token.v}; this hostd reads {_TOKEN_VERSION}."
            " Install the hostd of the control plane's release."
        )
    return token


def join(word: str, options: JoinOptions) -> list[Path]:
    """Exchange a token for a certificate and write what `run` needs.

    Returns:
        The files written.

    Raises:
        JoinError: It did not work. The host is as before, except that the token may
            be used up.
    """
    token = decode_token(word)
    config = _existing_config(token, options.config)
    pki = options.config.absolute().parent / "pki"
    tls = (
        config.tls
        if config
        else TlsConfig(ca=pki / "ca.pem", cert=pki / "host.pem", key=pki / "host.key")
    )
    if tls.cert.exists() and not options.force:
        raise JoinError(
            f"This host has an identity already: {tls.cert}. Use --force to replace it."
        )
    address, data_address = _addresses(token, options, config)
    for name, value in (("--address", address), ("--data-address", data_address)):
        if not is_address(value):
            raise JoinError(f"{name} {value!r} is not HOST:PORT.")
    key = ec.generate_private_key(ec.SECP256R1())
    answer = _ask(token, _signing_request(key, token.host), address)
    _check_answer(token, key, answer)
    written = _write_identity(tls, key, token, answer)
    if not options.config.exists():
        text = _config_text(token, tls, options.roots, address, data_address)
        _write(options.config, text.encode(), _PUBLIC_MODE)
        written.append(options.config)
    return written


def _existing_config(token: JoinToken, path: Path) -> HostdConfig | None:
    if not path.exists():
        return None
    config = read_config(path)
    if (config.fleet, config.host) != (token.fleet, token.host):
        raise JoinError(
            f"{path} is for host {config.host!r} of fleet {config.fleet!r}, the token for host"
            f" {token.host!r} of fleet {token.fleet!r}. Use the other token or file."
        )
    return config


def _addresses(
    token: JoinToken, options: JoinOptions, config: HostdConfig | None
) -> tuple[str, str]:
    """Where this host is reached: as asked, as configured, or as the route shows."""
    listen = config.listen if config else ListenConfig()
    local = _local_address(token.server)
    control_port = listen.control.rpartition(":")[2]
    data_port = listen.data.rpartition(":")[2]
    return (
        options.address or listen.advertise_control or f"{local}:{control_port}",
        options.data_address or listen.advertise_data or f"{local}:{data_port}",
    )


def _local_address(server: str) -> str:
    """The address of this host on the way to the server; no packet is sent."""
    host, _, port = server.rpartition(":")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            found = str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise JoinError(f"The control plane at {server} cannot be reached: {error}.") from error
    return f"[{found}]" if ":" in found else found


def _signing_request(key: ec.EllipticCurvePrivateKey, host: str) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def _ask(token: JoinToken, csr_pem: bytes, address: str) -> host_service_pb2.JoinHostResponse:
    credentials = grpc.ssl_channel_credentials(token.ca_pem.encode())
    options = [("grpc.ssl_target_name_override", token.server_name)]
    with grpc.secure_channel(token.server, credentials, options=options) as channel:
        stub = host_service_pb2_grpc.EnrollmentServiceStub(channel)
        try:
            return stub.JoinHost(
                host_service_pb2.JoinHostRequest(
                    secret=token.secret, host_id=token.host, csr_pem=csr_pem, address=address
                ),
                timeout=_TIMEOUT_SECONDS,
            )
        except grpc.RpcError as error:
            raise JoinError(_explain(token, error)) from None


def _explain(token: JoinToken, error: grpc.RpcError) -> str:
    # A client-side grpc.RpcError is a grpc.Call as well; the stubs do not know.
    status = rpc_status.from_call(error) if isinstance(error, grpc.Call) else None
    told = DroverError.from_status(status) if status is not None else None
    if told is not None:
        return told.advice
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    return f"The control plane at {token.server} did not answer the join: {details}."


def _check_answer(
    token: JoinToken, key: ec.EllipticCurvePrivateKey, answer: host_service_pb2.JoinHostResponse
) -> None:
    expected = host_identity(token.fleet, token.host)
    try:
        authority = x509.load_pem_x509_certificate(token.ca_pem.encode())
        certificate = x509.load_pem_x509_certificate(answer.certificate_pem)
        certificate.verify_directly_issued_by(authority)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise JoinError(
            f"The control plane's certificate for this host is bad: {error}."
        ) from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if uris != [expected.uri]:
        raise JoinError(f"The certificate is for {', '.join(uris)}, not for {expected.uri}.")
    if certificate.public_key() != key.public_key():
        raise JoinError("The certificate is for another key than the one of the request.")


def _write_identity(
    tls: TlsConfig,
    key: ec.EllipticCurvePrivateKey,
    token: JoinToken,
    answer: host_service_pb2.JoinHostResponse,
) -> list[Path]:
    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    # The authority is the token's, which an operator carried here, not the answer's.
    _write(tls.ca, token.ca_pem.encode(), _PUBLIC_MODE)
    _write(tls.key, key_pem, _PRIVATE_MODE)
    _write(tls.cert, answer.certificate_pem, _PUBLIC_MODE)
    return [tls.ca, tls.key, tls.cert]


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a file atomically and durably, with its mode from the start."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _config_text(
    token: JoinToken,
    tls: TlsConfig,
    roots: tuple[tuple[str, Path], ...],
    address: str,
    data_address: str,
) -> str:
    chosen = roots or (("images", Path("/var/lib/libvirt/images")),)
    control_port = address.rpartition(":")[2]
    data_port = data_address.rpartition(":")[2]
    lines = [
        "# Written by `drover-hostd join`; yours to edit.",
        f"fleet = {_quote(token.fleet)}",
        f"host = {_quote(token.host)}",
        "",
        "[listen]",
        f'control = "0.0.0.0:{control_port}"',
        f'data = "0.0.0.0:{data_port}"',
        f"advertise_control = {_quote(address)}",
        f"advertise_data = {_quote(data_address)}",
        "",
        "[tls]",
        f"ca = {_quote(str(tls.ca))}",
        f"cert = {_quote(str(tls.cert))}",
        f"key = {_quote(str(tls.key))}",
        "",
        "# Directories that Drover may read disks from and write disks to.",
        "[storage.roots]",
        *(f"{_quote(name)} = {_quote(str(directory))}" for name, directory in chosen),
    ]
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    """A TOML basic string; JSON's escapes are a subset of TOML's."""
    return msgspec.json.encode(text).decode()
