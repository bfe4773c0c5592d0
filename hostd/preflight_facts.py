"""Collecting what `hostd.preflight` judges; all the I/O of preflight is here."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import libvirt

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.direct_io import direct_io_unit
from hostd.disks.roots import StorageRoots
from hostd.disks.users import find_users
from hostd.inventory import HostSettings, collect_facts, network_devices
from hostd.libvirt.capabilities import capabilities, compare_cpu
from hostd.libvirt.conn import LibvirtConnection
from hostd.libvirt.domains import find, inspect, read_definition
from hostd.libvirt.sharing import find_sharers
from hostd.preflight import check_source
from hostd.preflight_model import Neighbour, Supplies, TargetFacts
from hostd.preflight_storage import placements
from hostd.supplies import gather_supplies
from hostd.v1 import domain_pb2, preflight_pb2

_TIMEX_BYTES = 512  # larger than struct timex on any architecture
_TIME_ERROR = 5


def gather_target(
    connection: LibvirtConnection,
    roots: StorageRoots,
    settings: HostSettings,
    machine: preflight_pb2.IncomingMachine,
    *,
    reserved_bytes: Mapping[str, int] | None = None,
    own_files: Collection[Path] = (),
    others: Sequence[Neighbour] = (),
) -> TargetFacts:
    """Collect what the checks of a target go by.

    Args:
        connection: libvirt.
        roots: Where volumes may lie.
        settings: What the configuration says.
        machine: The machine that is to come.
        reserved_bytes: Root name -> bytes that other moves have reserved.
        own_files: Files that this migration created; they are in nobody's way.
        others: Machines that other moves have parked here or are bringing here.
    """
    host = collect_facts(connection, roots, settings, reserved_bytes=reserved_bytes)
    occupied, misplaced = _places(roots, machine, {os.path.realpath(path) for path in own_files})
    occupied |= _kept_places(roots, machine, others)
    neighbours = tuple(others)
    cpu_fits, max_vcpus, supplies = None, 0, Supplies()
    domain = machine.domain
    if host.libvirt_connected:
        try:
            with connection.get() as conn:
                neighbours += _neighbours(conn)
                if domain.cpu_xml:
                    cpu_fits = compare_cpu(
                        conn, domain.arch, domain.machine_type, domain.virt_type, domain.cpu_xml
                    )
                supplies = gather_supplies(conn, capabilities(connection), domain.host_needs)
            max_vcpus = capabilities(connection).max_vcpus.get(domain.machine_type, 0)
        except DroverError as error:
            if error.reason is not Reason.LIBVIRT_UNAVAILABLE:
                raise
            host.libvirt_connected = False
    return TargetFacts(
        host=host,
        neighbours=neighbours,
        network_devices=frozenset(network_devices()),
        max_vcpus=max_vcpus,
        cpu_fits=cpu_fits,
        occupied=occupied,
        misplaced=misplaced,
        clock_synchronised=clock_synchronised(),
        supplies=supplies,
        direct_io_bytes=_direct_io(roots, machine),
    )


def check_source_now(
    conn: libvirt.virConnect, domain_uuid: str, roots: StorageRoots
) -> preflight_pb2.PreflightReport:
    """Look at a domain and judge whether it could leave.

    Raises:
        DroverError: DOMAIN_NOT_FOUND, LIBVIRT_UNAVAILABLE.
    """
    found = inspect(find(conn, domain_uuid), roots)
    paths = [
        Path(volume.path)
        for volume in found.domain.volumes
        if volume.kind == domain_pb2.VOLUME_KIND_DISK
    ]
    return check_source(found, find_users(paths), find_sharers(conn, domain_uuid, paths, roots))


def clock_synchronised() -> bool | None:
    """Whether the kernel believes its clock to be synchronised; None when unknown."""
    libc = ctypes.CDLL(None, use_errno=True)
    adjtimex = getattr(libc, "adjtimex", None)
    if adjtimex is None:
        return None
    # Zeroed: no field of it asks for a change.
    state = int(adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)))
    return None if state < 0 else state != _TIME_ERROR


def _neighbours(conn: libvirt.virConnect) -> tuple[Neighbour, ...]:
    found = []
    for dom in conn.listAllDomains(0):
        try:
            definition = read_definition(dom)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                continue
            raise
        macs = frozenset(i.mac_address for i in definition.interfaces if i.mac_address)
        found.append(Neighbour(definition.uuid, definition.name, macs))
    return tuple(found)


def _places(
    roots: StorageRoots, machine: preflight_pb2.IncomingMachine, own: Collection[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Where files are in the way, and where a place cannot be used."""
    occupied: dict[str, str] = {}
    misplaced: dict[str, str] = {}
    for place in placements(machine):
        try:
            path = roots.resolve(place.root, place.name)
        except DroverError as error:
            if error.reason is not Reason.TARGET_LACKS_ROOT:
                misplaced[place.volume_id] = error.message
            continue
        if os.path.lexists(path) and os.path.realpath(path) not in own:
            occupied[place.volume_id] = str(path)
    return occupied, misplaced


def _direct_io(roots: StorageRoots, machine: preflight_pb2.IncomingMachine) -> dict[str, int]:
    """Units of direct I/O where the disks would lie that their guest writes with it."""
    needing = {v.volume_id for v in machine.domain.volumes if v.direct_io and not v.read_only}
    units: dict[str, int] = {}
    for place in placements(machine):
        if place.volume_id not in needing:
            continue
        try:
            path = roots.resolve(place.root, place.name)
        except DroverError:
            continue  # told by the checks of roots and files
        unit = direct_io_unit(next(parent for parent in path.parents if parent.is_dir()))
        if unit is not None:
            units[place.volume_id] = unit
    return units


def _kept_places(
    roots: StorageRoots, machine: preflight_pb2.IncomingMachine, others: Sequence[Neighbour]
) -> dict[str, str]:
    """Where another move keeps the place of a volume, though no file is there now."""
    kept = {os.path.realpath(path) for other in others for path in other.places}
    found: dict[str, str] = {}
    for place in placements(machine):
        if place.root in roots.names:
            path = roots.directory(place.root) / place.name
            if os.path.realpath(path) in kept:
                found[place.volume_id] = str(path)
    return found
