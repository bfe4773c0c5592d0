"""hostd's configuration file, /etc/drover/hostd.toml.

The file names the host, where it listens, which certificate it shows, which
libvirt it serves and which directories it may touch. Nothing has a default that
would let Drover read or write a path nobody allowed.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from controlplane.common.config import ConfigError, load_config
from controlplane.common.identity import NAME_PATTERN, Identity, host_identity
from controlplane.common.rpc import TlsPaths
from diskmover.model import IoPriority

DEFAULT_CONFIG = Path("/etc/drover/hostd.toml")
CONTROL_PORT = 7442
DATA_PORT = 7443
LOG_LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("qcow2", "raw")
_LARGEST_PORT = 65_535


class ListenConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[listen]`: where hostd is reached.

    Attributes:
        control: HOST:PORT of the gRPC API.
        data: HOST:PORT of the diskmover receiver.
        advertise_control: HOST:PORT that the control plane is told; `control` if empty.
        advertise_data: HOST:PORT that other hosts are told; `data` if empty.
    """

    control: str = f"0.0.0.0:{CONTROL_PORT}"
    data: str = f"0.0.0.0:{DATA_PORT}"
    advertise_control: str = ""
    advertise_data: str = ""

    @property
    def control_address(self) -> str:
        """Where the control plane reaches this host."""
        return self.advertise_control or self.control

    @property
    def data_address(self) -> str:
        """Where other hosts reach the data port."""
        return self.advertise_data or self.data


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[tls]`: the host's certificate.

    Attributes:
        ca: Certificate authority of the fleet, PEM.
        cert: The host's certificate, PEM.
        key: Its private key, PEM.
    """

    ca: Path = Path("/etc/drover/pki/ca.pem")
    cert: Path = Path("/etc/drover/pki/host.pem")
    key: Path = Path("/etc/drover/pki/host.key")

    @property
    def paths(self) -> TlsPaths:
        """As the gRPC helpers take them."""
        return TlsPaths(cert=self.cert, key=self.key, ca=self.ca)


class LibvirtConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[libvirt]`: the hypervisor.

    Attributes:
        uri: libvirt connection URI of the local system driver.
    """

    uri: str = "qemu:///system"


class StorageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[storage]`: what Drover may read and write.

    Attributes:
        roots: Name -> absolute directory. Other hosts name disks by root and
            relative name, so the same name stands for the same purpose everywhere.
        allowed_formats: Disk formats that may be moved.
        seeds: Files, as "ROOT/NAME", whose blocks are reused for disks that come here:
            templates that disks were made from, or older copies. They are only read.
        readback: Read what arrives back from the disk, and compare it, before it counts
            as arrived.
    """

    roots: dict[str, Path]
    allowed_formats: tuple[str, ...] = FORMATS
    seeds: tuple[str, ...] = ()
    readback: bool = False

    @property
    def seed_places(self) -> list[tuple[str, str]]:
        """Root and relative name of each seed."""
        places = [seed.partition("/") for seed in self.seeds]
        return [(root, name) for root, _, name in places]


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[limits]`: what Drover leaves to others.

    Attributes:
        reserved_memory_mib: Host memory that guests never get, in MiB.
        volume_memory_mib: Most memory for what is known of volumes that arrive, over all
            copies; one for which there is none is tried again later.
        max_copies: Copies that this host sends at once; further ones wait.
        copy_connections: Connections of one copy unless the caller says otherwise; 0
            begins with 4 and adds some over long distances.
        io_priority: How much reads and writes of copies count beside those of guests:
            "normal", "low" or "idle".
    """

    reserved_memory_mib: int = 0
    volume_memory_mib: int = 512
    max_copies: int = 2
    copy_connections: int = 0
    io_priority: IoPriority = "normal"


class StateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[state]`: what survives a restart.

    Attributes:
        directory: Holds hostd.db and the private folders of running builds.
    """

    directory: Path = Path("/var/lib/drover")


class LogConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[log]`.

    Attributes:
        level: "debug", "info", "warning" or "error".
    """

    level: str = "info"


class HostdConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file.

    Attributes:
        fleet: Name of the fleet that the host belongs to.
        host: Drover's name of the host, as in its certificate.
    """

    fleet: str
    host: str
    storage: StorageConfig
    listen: ListenConfig = ListenConfig()
    tls: TlsConfig = TlsConfig()
    libvirt: LibvirtConfig = LibvirtConfig()
    limits: LimitsConfig = LimitsConfig()
    state: StateConfig = StateConfig()
    log: LogConfig = LogConfig()

    @property
    def identity(self) -> Identity:
        """Who this host is to the fleet."""
        return host_identity(self.fleet, self.host)


def read_config(path: Path) -> HostdConfig:
    """Read and check a configuration file.

    Raises:
        ConfigError: It cannot be used; the message names file, place and remedy.
    """
    config = load_config(path, HostdConfig)
    problem = _first_problem(config)
    if problem:
        raise ConfigError(f"{path}: {problem}")
    return config


def _first_problem(config: HostdConfig) -> str:
    for field, name in (("fleet", config.fleet), ("host", config.host)):
        if not NAME_PATTERN.fullmatch(name):
            return f"{field}: {name!r} is not a name of lower-case letters, digits, '-' and '.'"
    addresses = {
        "listen.control": config.listen.control,
        "listen.data": config.listen.data,
        "listen.advertise_control": config.listen.control_address,
        "listen.advertise_data": config.listen.data_address,
    }
    for field, address in addresses.items():
        if not is_address(address):
            return f"{field}: {address!r} is not HOST:PORT"
    if config.limits.max_copies < 1 or config.limits.copy_connections < 0:
        return "limits: max_copies must be at least 1, copy_connections at least 0"
    if config.limits.reserved_memory_mib < 0:
        return "limits.reserved_memory_mib: must not be negative"
    if config.limits.volume_memory_mib < 1:
        return "limits.volume_memory_mib: must be at least 1"
    if config.log.level not in LOG_LEVELS:
        return f"log.level: {config.log.level!r} is not one of {', '.join(LOG_LEVELS)}"
    return _storage_problem(config.storage)


def _storage_problem(storage: StorageConfig) -> str:
    if not storage.roots:
        return "storage.roots: name at least one directory, as images = '/var/lib/libvirt/images'"
    for name, directory in storage.roots.items():
        if not NAME_PATTERN.fullmatch(name):
            return f"storage.roots: {name!r} is not a name of lower-case letters, digits, '-', '.'"
        if not directory.is_absolute() or ".." in directory.parts:
            return f"storage.roots.{name}: {str(directory)!r} is not an absolute path"
    for root, name in storage.seed_places:
        if root not in storage.roots or not name or ".." in Path(name).parts:
            return f"storage.seeds: {f'{root}/{name}'!r} is not ROOT/NAME of a file in a root"
    strange = set(storage.allowed_formats) - set(FORMATS)
    if strange or not storage.allowed_formats:
        return f"storage.allowed_formats: choose among {', '.join(FORMATS)}"
    return ""


def is_address(text: str) -> bool:
    """True for HOST:PORT; an IPv6 address stands in brackets."""
    host, separator, port = text.rpartition(":")
    bare_ipv6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    return (
        bool(separator and host and not bare_ipv6)
        and port.isascii()
        and port.isdigit()
        and 0 <= int(port) <= _LARGEST_PORT
    )
