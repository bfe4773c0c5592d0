"""What a migration has built on its target, besides disks: noted before it is made."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import msgspec

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.durable import write_file
from hostd.disks.manifest import check_migration_id

RECORD = "built.json"


class BuildState(StrEnum):
    """Where a built machine stands; drawn in `hostd.libvirt.build`."""

    BUILDING = "BUILDING"
    BUILT = "BUILT"
    KEPT = "KEPT"


class BuildRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a migration made here besides disks.

    Attributes:
        state: Where it stands.
        domain_uuid: The machine.
        nvram: Its NVRAM file; empty without one.
        tpm: Its TPM state; empty without any.
        autostart: It is to start together with the host, and does not yet: until the
            move has given it to this host, nothing but a call may start it.
    """

    state: BuildState
    domain_uuid: str
    nvram: str = ""
    tpm: str = ""
    autostart: bool = False


def work_of(migration_id: str, state_dir: Path) -> Path:
    """The directory of a migration, existing or not."""
    return state_dir / "built" / check_migration_id(migration_id)


def read_record(work: Path) -> BuildRecord | None:
    """What was noted; None when the migration has built nothing.

    Raises:
        DroverError: DISK_IO_ERROR.
    """
    try:
        return msgspec.json.decode((work / RECORD).read_bytes(), type=BuildRecord)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise DroverError(
            Reason.DISK_IO_ERROR, f"{work / RECORD} cannot be read: {error}."
        ) from error


def write_record(work: Path, record: BuildRecord) -> None:
    """Note what is made; durable when it returns."""
    write_file(work / RECORD, msgspec.json.encode(record))
