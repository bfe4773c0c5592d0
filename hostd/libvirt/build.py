"""Making a machine on its target from what arrived, and taking it away again.

    (nothing) --build_domain--> BUILDING --> BUILT --undefine_built--> KEPT
        ^                           |          |  <---build_domain------ |
        +--------remove_built-------+----------+-------------------------+

What a migration built is noted in <state>/built/<migration id>/ before it is
made, so that removal touches nothing else. In KEPT the machine as it was when it
was last defined here lies in that directory, NVRAM and TPM state included: the
guest may have run, and building again continues from there and not from the
baggage. Disks are never removed here; they belong to the copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import libvirt
import msgspec
import structlog

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.baggage import unpack
from hostd.disks.durable import give_to, make_private_directory, remove_tree
from hostd.disks.images import grow, set_backing_file
from hostd.disks.roots import StorageRoots
from hostd.disks.small_state import put_back_small_state, remove_small_state
from hostd.disks.trouble import io_trouble
from hostd.libvirt.build_record import (
    RECORD,
    BuildRecord,
    BuildState,
    read_record,
    work_of,
    write_record,
)
from hostd.libvirt.capture import (
    DOMAIN,
    TPM_DIRECTORY,
    Meta,
    capture,
    checkpoint_files,
    define,
    give_small_state,
    read_meta,
    refuse_taken_name,
    rewrite,
    snapshot_files,
    undefine,
)
from hostd.libvirt.definition import Definition, default_nvram_path, parse_definition
from hostd.libvirt.domains import describe, find, try_find
from hostd.libvirt.errors import translated
from hostd.libvirt.foreign import Own, foreign_in_definition, foreign_in_snapshot
from hostd.libvirt.transform import transform_domain, transform_snapshot
from hostd.libvirt.xml import XmlError, parse
from hostd.v1 import domain_pb2, preflight_pb2

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True)
class BuildOrder:
    """What to build.

    Attributes:
        migration_id: The move.
        domain_uuid: The machine.
        domain_name: Its libvirt name, as the move announced it.
        baggage: The archive that arrived.
        volumes: The machine's volumes, as its source described them.
        volume_paths: volume_id -> path here, for each volume that is here.
        size: Size to give it; None to keep the source's.
        loader_path: Its firmware image, as the move announced it and the preflight
            judged it; empty when libvirt chooses one.
    """

    migration_id: str
    domain_uuid: str
    domain_name: str
    baggage: Path
    volumes: Sequence[domain_pb2.Volume]
    volume_paths: Mapping[str, Path]
    size: preflight_pb2.TargetSize | None = None
    loader_path: str = ""


def build_domain(
    conn: libvirt.virConnect, order: BuildOrder, roots: StorageRoots, state_dir: Path
) -> domain_pb2.Domain:
    """Define the machine here; nothing when this migration has it defined already.

    It is not started.

    Raises:
        DroverError: TARGET_UUID_TAKEN, TARGET_NAME_TAKEN, TARGET_FILE_EXISTS;
            BUILD_FAILED with the words of libvirt or qemu-img, or when the
            baggage is not usable; DISK_IO_ERROR; LIBVIRT_UNAVAILABLE. Repeat it,
            or remove_built.
    """
    work = work_of(order.migration_id, state_dir)
    subject = f"domains/{order.domain_uuid}"
    with io_trouble(subject):
        record = read_record(work)
        dom = try_find(conn, order.domain_uuid)
        if dom is not None and record is None:
            raise DroverError(
                Reason.TARGET_UUID_TAKEN,
                f"A domain with UUID {order.domain_uuid} ({dom.name()}) is here already.",
                subject=subject,
            )
        if dom is not None and record is not None and record.state is BuildState.BUILT:
            return describe(dom, roots)
        if dom is not None:
            _refuse_active(dom)
        if record is not None and record.state is BuildState.KEPT:
            record = _define_kept(conn, work, record)
        else:
            record = _define_from_baggage(conn, order, work, record)
        write_record(work, msgspec.structs.replace(record, state=BuildState.BUILT))
        remove_tree(work / "kept")
        remove_tree(work / "baggage")
    log.info("built", migration=order.migration_id, domain=order.domain_uuid)
    return describe(find(conn, order.domain_uuid), roots)


def give_autostart(
    conn: libvirt.virConnect, domain_uuid: str, migration_id: str, state_dir: Path
) -> None:
    """Let a built machine start with this host if it did with its source.

    For when the machine is this host's; does nothing the second time.

    Raises:
        DroverError: DISK_IO_ERROR, LIBVIRT_UNAVAILABLE.
    """
    work = work_of(migration_id, state_dir)
    subject = f"domains/{domain_uuid}"
    with io_trouble(subject):
        record = read_record(work)
        if record is None or not record.autostart:
            return
        dom = try_find(conn, domain_uuid)
        if dom is not None:
            with translated(subject):
                dom.setAutostart(1)
        write_record(work, msgspec.structs.replace(record, autostart=False))


def undefine_built(
    conn: libvirt.virConnect, domain_uuid: str, migration_id: str, state_dir: Path
) -> None:
    """Take away the definition that `build_domain` made; nothing when it made none.

    Disks stay. Everything else is kept aside for building it again.

    Raises:
        DroverError: INSTANCE_STARTED_MEANWHILE while it runs; DISK_IO_ERROR;
            LIBVIRT_UNAVAILABLE.
    """
    work = work_of(migration_id, state_dir)
    with io_trouble(f"domains/{domain_uuid}"):
        record = read_record(work)
        if record is None:
            return
        dom = try_find(conn, domain_uuid)
        if record.state is BuildState.BUILDING:
            # Never whole, never started: the baggage is the better source.
            if dom is not None:
                undefine(dom)
            return
        if dom is not None:
            _refuse_active(dom)
            capture(dom, [], work / "kept.new")
            remove_tree(work / "kept")
            (work / "kept.new").rename(work / "kept")
            record = msgspec.structs.replace(record, state=BuildState.KEPT)
            write_record(work, record)
            undefine(dom)
        if record.state is BuildState.KEPT:
            remove_small_state(record.nvram, record.tpm)
    log.info("definition taken away", migration=migration_id, domain=domain_uuid)


def remove_built(
    conn: libvirt.virConnect, domain_uuid: str, migration_id: str, state_dir: Path
) -> None:
    """Remove definition, NVRAM, TPM state and records of this migration; not disks.

    Does nothing when this migration built nothing here.

    Raises:
        DroverError: INSTANCE_STATE while it runs; LIBVIRT_UNAVAILABLE;
            DISK_IO_ERROR.
    """
    work = work_of(migration_id, state_dir)
    with io_trouble(f"domains/{domain_uuid}"):
        record = read_record(work)
        if record is None:
            remove_tree(work)
            return
        dom = try_find(conn, domain_uuid)
        if dom is not None:
            _refuse_active(dom)
            undefine(dom)
        remove_small_state(record.nvram, record.tpm)
        (work / RECORD).unlink()
        remove_tree(work)
    log.info("removed what was built", migration=migration_id, domain=domain_uuid)


def forget_built(migration_id: str, state_dir: Path) -> None:
    """Drop the records of a migration that has ended; the machine stays."""
    with io_trouble(f"migrations/{migration_id}"):
        remove_tree(work_of(migration_id, state_dir))


# --- building


def _define_from_baggage(
    conn: libvirt.virConnect, order: BuildOrder, work: Path, record: BuildRecord | None
) -> BuildRecord:
    make_private_directory(work)
    machine = unpack(order.baggage, work / "baggage")
    meta = read_meta(machine)
    definition = _definition(machine)
    if meta.uuid != order.domain_uuid or definition.uuid != order.domain_uuid:
        raise DroverError(
            Reason.BUILD_FAILED,
            f"The baggage is that of domain {meta.uuid}, not of {order.domain_uuid}.",
            subject=f"domains/{order.domain_uuid}",
        )
    _refuse_untold(order, definition)
    refuse_taken_name(conn, definition.name, order.domain_uuid)
    # The other host names files; the places are decided here.
    suffix = ".qcow2" if definition.nvram.endswith(".qcow2") else ".fd"
    nvram = default_nvram_path(definition.name, suffix) if definition.nvram else ""
    tpm = str(TPM_DIRECTORY / order.domain_uuid) if definition.has_tpm else ""
    if record is None:
        _refuse_existing(nvram, tpm)
        record = BuildRecord(
            state=BuildState.BUILDING,
            domain_uuid=order.domain_uuid,
            nvram=nvram,
            tpm=tpm,
            autostart=meta.autostart,
        )
        write_record(work, record)
    _prepare_disks(order, meta)
    emulator = _emulator(conn, definition)
    paths = {volume_id: str(path) for volume_id, path in order.volume_paths.items()}
    rewrite(
        machine,
        lambda xml: transform_domain(xml, paths, order.size, nvram or None, emulator),
        lambda xml: transform_snapshot(xml, paths, nvram or None),
    )
    _refuse_foreign(machine, Own(set(paths.values()), nvram, order.loader_path))
    remove_small_state(nvram, tpm)
    put_back_small_state(machine, nvram, tpm)
    give_small_state(meta, nvram, tpm)
    define(conn, machine, meta, autostart=False)
    return record


def _define_kept(conn: libvirt.virConnect, work: Path, record: BuildRecord) -> BuildRecord:
    meta = read_meta(work / "kept")
    put_back_small_state(work / "kept", meta.nvram, meta.tpm)
    define(conn, work / "kept", meta, autostart=meta.autostart)
    return record


def _prepare_disks(order: BuildOrder, meta: Meta) -> None:
    by_id = {volume.volume_id: volume for volume in order.volumes}
    for volume_id, volume in by_id.items():
        path = order.volume_paths.get(volume_id)
        if path is None or volume.kind == domain_pb2.VOLUME_KIND_BACKING:
            continue
        if volume_id in meta.owners:
            give_to(path, meta.owners[volume_id])
    for volume in order.volumes:
        path = order.volume_paths.get(volume.volume_id)
        backing = order.volume_paths.get(volume.backing_volume_id)
        if path is not None and backing is not None:
            set_backing_file(path, backing, by_id[volume.backing_volume_id].format)
    if order.size is None or not order.size.root_disk_bytes:
        return
    for volume in order.volumes:
        if volume.kind == domain_pb2.VOLUME_KIND_DISK and volume.volume_id in order.volume_paths:
            grow(order.volume_paths[volume.volume_id], volume.format, order.size.root_disk_bytes)
            return


def _emulator(conn: libvirt.virConnect, definition: Definition) -> str | None:
    """QEMU of this host, when the one that the definition names is not here."""
    if not definition.emulator or Path(definition.emulator).exists():
        return None
    with translated("libvirt", Reason.BUILD_FAILED):
        capabilities = conn.getDomainCapabilities(
            None, definition.arch or None, definition.machine_type or None, definition.virt_type, 0
        )
    return parse(capabilities).findtext("path")


def _definition(machine: Path) -> Definition:
    try:
        return parse_definition((machine / DOMAIN).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, XmlError) as error:
        raise DroverError(
            Reason.BUILD_FAILED, f"The definition in the baggage cannot be read: {error}."
        ) from error


def _refuse_untold(order: BuildOrder, definition: Definition) -> None:
    """Refuse a machine that is not the one whose move was judged and allowed.

    Its source may be in strange hands: its name becomes part of a path here, and a
    piece of this host in its definition would be handed to the guest.
    """
    problem = ""
    if definition.name != order.domain_name or "/" in definition.name:
        problem = f"it is called {definition.name!r}, and {order.domain_name!r} was announced"
    elif definition.host_needs.loader_path != order.loader_path:
        found = definition.host_needs.loader_path or "none"
        problem = f"its firmware image is {found}, and {order.loader_path or 'none'} was announced"
    elif definition.obstacles:
        problem = definition.obstacles[0].message
    if problem:
        raise DroverError(
            Reason.BUILD_FAILED,
            f"The machine that arrived is not the one that was announced: {problem.rstrip('.')}.",
            subject=f"domains/{order.domain_uuid}",
        )


def _refuse_foreign(machine: Path, own: Own) -> None:
    """Nothing in the definition or its snapshots may be another's than the machine's."""
    problem = foreign_in_definition((machine / DOMAIN).read_text("utf-8"), own)
    for path in [*snapshot_files(machine), *checkpoint_files(machine)]:
        problem = problem or foreign_in_snapshot(path.read_text("utf-8"), own)
    if problem:
        raise DroverError(
            Reason.BUILD_FAILED,
            f"What arrived names what is not the machine's: {problem}"
            " Remove it on the source; a snapshot goes with virsh snapshot-delete.",
        )


def _refuse_existing(*places: str) -> None:
    for place in places:
        if place and Path(place).exists():
            raise DroverError(
                Reason.TARGET_FILE_EXISTS,
                f"{place} is here already; it belongs to a machine with the same UUID.",
                metadata={"path": place},
            )


def _refuse_active(dom: libvirt.virDomain) -> None:
    with translated(f"domains/{dom.UUIDString()}"):
        if dom.isActive():
            raise DroverError(
                Reason.INSTANCE_STATE,
                f"{dom.name()} runs here; it has to be off before it is taken away.",
                subject=f"domains/{dom.UUIDString()}",
            )
