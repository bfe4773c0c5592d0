"""Checks of where the volumes of a machine would lie on a target. Pure."""

from __future__ import annotations

from controlplane.common.reasons import Reason
from hostd.preflight_model import Check, IncomingMachine, TargetFacts, failed, passed, warned
from hostd.v1 import domain_pb2, preflight_pb2

_GIB, _MIB = 1024**3, 1024**2
_SECTOR_BYTES = 512

_Machine = IncomingMachine


def placements(machine: _Machine) -> list[preflight_pb2.VolumeMapping]:
    """Where each volume goes: where it is told to, else the same root and name."""
    told = {mapping.volume_id: mapping for mapping in machine.volume_mappings}
    return [
        told.get(volume.volume_id)
        or preflight_pb2.VolumeMapping(
            volume_id=volume.volume_id, root=volume.root, name=volume.name
        )
        for volume in machine.domain.volumes
    ]


def _root(machine: _Machine, facts: TargetFacts) -> Check:
    present = {root.name for root in facts.host.roots}
    missing = sorted({place.root for place in placements(machine)} - present)
    if missing:
        names = ", ".join(repr(name) for name in missing)
        message = f"There is no storage root {names}; there are {', '.join(sorted(present))}."
        fix = "Configure it in [storage.roots], or map the volumes to another root."
        return failed("root", Reason.TARGET_LACKS_ROOT, message, fix)
    return passed("root", "Every storage root that its volumes lie in is here.")


def _target_file(machine: _Machine, facts: TargetFacts) -> Check:
    for volume_id, why in facts.misplaced.items():
        message = f"Volume {volume_id} cannot be placed: {why}"
        return failed("target-file", Reason.DISK_OUTSIDE_ROOTS, message, "Map it elsewhere.")
    for volume_id, path in facts.occupied.items():
        message = f"{path} is in the way of volume {volume_id}."
        fix = f"Move {path} away, or map the volume to another name."
        return failed("target-file", Reason.TARGET_FILE_EXISTS, message, fix)
    return passed("target-file", "No file is in the way of its volumes.")


def _space(machine: _Machine, facts: TargetFacts) -> Check:
    """Data has to fit; that the disks may grow to full size is worth a warning."""
    volumes = {volume.volume_id: volume for volume in machine.domain.volumes}
    roots = {root.name: root for root in facts.host.roots}
    data: dict[int, int] = {}
    full: dict[int, int] = {}
    for place in placements(machine):
        volume, root = volumes.get(place.volume_id), roots.get(place.root)
        if volume is None or root is None:
            continue
        grown = max(volume.size_bytes, volume.virtual_size_bytes)
        data[root.device_id] = data.get(root.device_id, 0) + volume.allocated_bytes
        full[root.device_id] = full.get(root.device_id, 0) + grown
    tight = None
    for root in roots.values():
        free = root.available_bytes
        if data.get(root.device_id, 0) > free:
            need = _size(data[root.device_id])
            message = f"Its volumes hold {need}; {_size(free)} are free in root {root.name}."
            fix = f"Free {_size(data[root.device_id] - free)} in {root.path}."
            return failed("space", Reason.TARGET_LACKS_SPACE, message, fix)
        if full.get(root.device_id, 0) > free:
            need = _size(full[root.device_id])
            message = f"Its disks can grow to {need}; {_size(free)} are free in root {root.name}."
            tight = warned("space", message, "Watch the space.")
    return tight or passed("space", f"There is room for the {_size(sum(data.values()))} it holds.")


def _direct_io(machine: _Machine, facts: TargetFacts) -> Check:
    """Whether QEMU can go past the page cache here where the definition tells it to.

    It does so in whole units, and writes only to images that are made of them: to a qcow2
    it can add, to a raw disk it cannot.
    """
    slow = None
    for volume in machine.domain.volumes:
        unit = facts.direct_io_bytes.get(volume.volume_id, 0)
        size_bytes = _whole(_size_after(machine, volume), _SECTOR_BYTES)
        if not unit:
            continue
        units = f"takes direct I/O in units of {unit} bytes"
        if volume.format == "raw" and size_bytes % unit:
            message = (
                f"Disk {volume.volume_id} is raw and has {size_bytes} bytes; the storage here"
                f" {units}, so QEMU would not start the machine."
            )
            larger = f"qemu-img resize -f raw {volume.path} {_whole(size_bytes, unit)}"
            fix = f"On the source, with the machine off: {larger}"
            return failed("direct-io", Reason.TARGET_LACKS_SMALL_BLOCKS, message, fix)
        block = volume.logical_block_bytes or _SECTOR_BYTES
        if block < unit:
            message = (
                f"Disk {volume.volume_id} has blocks of {block} bytes for its guest; the storage"
                f" here {units}, so that smaller writes are slow."
            )
            slow = warned("direct-io", message, "Choose a host with smaller blocks.")
    return slow or passed("direct-io", "Nothing is known against direct I/O of its disks here.")


def _size_after(machine: _Machine, volume: domain_pb2.Volume) -> int:
    """Bytes of a raw disk once it is here: a resize lets the first one grow."""
    disks = [v for v in machine.domain.volumes if v.kind == domain_pb2.VOLUME_KIND_DISK]
    is_root = bool(disks) and disks[0].volume_id == volume.volume_id
    return max(volume.size_bytes, machine.size.root_disk_bytes if is_root else 0)


STORAGE = (_root, _target_file, _space, _direct_io)


def _whole(size_bytes: int, unit: int) -> int:
    return -(-size_bytes // unit) * unit


def _size(size_bytes: int) -> str:
    if size_bytes >= _GIB:
        return f"{size_bytes / _GIB:.1f} GiB"
    return f"{size_bytes / _MIB:.1f} MiB"
