"""The source's half of a move: the machine is put aside, put back, or deleted.

The states are drawn in `hostd.records`. All methods block; callers hold the lock of
the machine and have passed the fence.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import structlog

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from diskmover import OutgoingVolume
from hostd.hypervisor import Hypervisor
from hostd.records import Records, SourcePhase, SourceRecord
from hostd.v1 import domain_pb2, fence_pb2, host_service_pb2

log = structlog.stdlib.get_logger(__name__)


class SourceSteps:
    """What a host does for machines that leave it.

    Args:
        hypervisor: libvirt and the storage roots.
        records: What was done so far.
    """

    def __init__(self, hypervisor: Hypervisor, records: Records) -> None:
        self._hypervisor = hypervisor
        self._records = records

    def stopped_if_parked(
        self, fence: fence_pb2.Fence
    ) -> host_service_pb2.EnsureStoppedResponse | None:
        """The answer to EnsureStopped for a machine that is parked already."""
        record = self._records.source(fence.migration_id)
        stop = self._records.stop(fence.migration_id)
        if record is None or stop is None or record.phase is not SourcePhase.PARKED:
            return None
        return host_service_pb2.EnsureStoppedResponse(
            stopped=True, previous_power_state=stop.previous_power_state, forced=stop.forced
        )

    def refuse_if_parked(self, domain_uuid: str) -> None:
        """Refuse to start a machine whose files are aside.

        Raises:
            DroverError: INSTANCE_NOT_OWNED.
        """
        for record in self._records.sources_of(domain_uuid):
            if record.phase is SourcePhase.DISCARDED:
                continue
            raise DroverError(
                Reason.INSTANCE_NOT_OWNED,
                f"Domain {domain_uuid} was parked here by migration {record.migration_id}"
                f" ({record.phase.value}); it must not start.",
                subject=f"domains/{domain_uuid}",
                metadata={"migration_id": record.migration_id, "phase": record.phase.value},
            )

    def ensure_parked(self, fence: fence_pb2.Fence) -> host_service_pb2.EnsureParkedResponse:
        """Undefine the stopped machine and move its files aside.

        Raises:
            DroverError: INSTANCE_STARTED_MEANWHILE, DOMAIN_NOT_FOUND, MIGRATION_STATE,
                a reason about disks, LIBVIRT_UNAVAILABLE.
        """
        record = self._records.source(fence.migration_id)
        if record is not None and record.phase is SourcePhase.PARKED:
            return record.parked
        self._refuse_while_discarding(record, "parked")
        self._refuse_other_move(fence)
        begun = record is not None
        record = SourceRecord(fence.migration_id, fence.domain_uuid, SourcePhase.PARKING)
        self._records.put_source(record)
        try:
            parked = self._hypervisor.park(fence.migration_id, fence.domain_uuid)
        except DroverError as error:
            if error.reason is Reason.DOMAIN_NOT_FOUND and not begun:
                # There is nothing to put back.
                self._records.drop_source(fence.migration_id)
            raise
        self._records.put_source(replace(record, phase=SourcePhase.PARKED, parked=parked))
        log.info("parked", volumes=len(parked.volumes), manifest=parked.manifest_path)
        return parked

    def ensure_unparked(self, fence: fence_pb2.Fence) -> None:
        """Put a parked machine back; nothing when it was never parked.

        Raises:
            DroverError: MIGRATION_STATE once deletion has begun; PARKED_NOT_FOUND when
                what was parked is nowhere to be seen (then nothing has been changed);
                BUILD_FAILED, HOST_DISK_FULL, LIBVIRT_UNAVAILABLE.
        """
        record = self._records.source(fence.migration_id)
        self._refuse_while_discarding(record, "put back")
        if record is not None:
            self._refuse_lost(record)
            self._records.put_source(replace(record, phase=SourcePhase.UNPARKING))
        # Also without a record: the manifest beside the files is what counts.
        self._hypervisor.unpark(fence.migration_id, fence.domain_uuid)
        self._records.drop_source(fence.migration_id)
        log.info("unparked", had_record=record is not None)

    def discard(self, fence: fence_pb2.Fence) -> int:
        """Delete the parked copy for good.

        Returns:
            Allocated bytes of the files that this call deleted.

        Raises:
            DroverError: MIGRATION_STATE when the machine is not wholly parked,
                PARKED_NOT_FOUND when it is nowhere to be seen.
        """
        record = self._records.source(fence.migration_id)
        if record is not None and record.phase is SourcePhase.DISCARDED:
            return 0
        if record is not None and record.phase in (SourcePhase.PARKING, SourcePhase.UNPARKING):
            raise DroverError(
                Reason.MIGRATION_STATE,
                f"Domain {fence.domain_uuid} is not wholly parked ({record.phase.value}); nothing"
                " was deleted.",
                subject=f"migrations/{fence.migration_id}",
                metadata={"phase": record.phase.value},
            )
        if record is not None:
            if record.phase is SourcePhase.PARKED:
                self._refuse_lost(record)
            self._records.put_source(replace(record, phase=SourcePhase.DISCARDING))
        freed_bytes = self._hypervisor.discard_parked(fence.migration_id)
        if record is not None:
            self._records.put_source(replace(record, phase=SourcePhase.DISCARDED))
        log.info("parked copy deleted", freed_bytes=freed_bytes)
        return freed_bytes

    def outgoing(self, fence: fence_pb2.Fence, volume_ids: list[str]) -> list[OutgoingVolume]:
        """The parked files to send.

        Raises:
            DroverError: MIGRATION_STATE when the machine is not parked, INVALID_FIELD
                for a volume that it does not have.
        """
        record = self._records.source(fence.migration_id)
        if record is None or record.phase is not SourcePhase.PARKED:
            phase = record.phase.value if record else "not parked"
            raise DroverError(
                Reason.MIGRATION_STATE,
                f"Domain {fence.domain_uuid} is {phase} here; only a parked one is sent.",
                subject=f"migrations/{fence.migration_id}",
                metadata={"phase": phase},
            )
        parked = {volume.volume_id: volume for volume in record.parked.volumes}
        strangers = [volume_id for volume_id in volume_ids if volume_id not in parked]
        if strangers or not volume_ids:
            raise DroverError(
                Reason.INVALID_FIELD,
                f"volume_ids: {', '.join(strangers) or 'none'}; the machine has"
                f" {', '.join(parked)}.",
                subject="volume_ids",
            )
        return [
            OutgoingVolume(volume_id, Path(parked[volume_id].path), parked[volume_id].size_bytes)
            for volume_id in volume_ids
        ]

    def forget(self, migration_id: str) -> None:
        """Drop the record of a move that has ended.

        Raises:
            DroverError: MIGRATION_STATE while a parked copy depends on it.
        """
        record = self._records.source(migration_id)
        if record is None:
            return
        if record.phase is not SourcePhase.DISCARDED:
            raise DroverError(
                Reason.MIGRATION_STATE,
                f"Migration {migration_id} still has a parked machine here"
                f" ({record.phase.value}); put it back or delete it first.",
                subject=f"migrations/{migration_id}",
                metadata={"phase": record.phase.value},
            )
        self._records.drop_source(migration_id)

    def _refuse_lost(self, record: SourceRecord) -> None:
        """Refuse to call a parked machine put back, or deleted, that is nowhere to be seen.

        Its storage root may not be mounted. Without a manifest it is here only if it
        was never set aside or a person has put it back: it is defined then, and its
        disks are where they belong.
        """
        migration_id, uuid = record.migration_id, record.domain_uuid
        disks = [v for v in record.parked.volumes if v.kind == domain_pb2.VOLUME_KIND_DISK]
        if self._hypervisor.is_parked(migration_id) or self._hypervisor.is_here(uuid, disks):
            return
        manifest = record.parked.manifest_path or "manifest.json"
        raise DroverError(
            Reason.PARKED_NOT_FOUND,
            f"Domain {uuid} is {record.phase.value} here by migration {migration_id}, and its"
            f" manifest ({manifest}) is gone. Nothing was changed: see that its storage root is"
            " mounted and try again, or put the machine back by hand.",
            subject=f"migrations/{migration_id}",
            metadata={"manifest_path": record.parked.manifest_path},
        )

    def _refuse_while_discarding(self, record: SourceRecord | None, verb: str) -> None:
        if record is not None and record.phase in (SourcePhase.DISCARDING, SourcePhase.DISCARDED):
            raise DroverError(
                Reason.MIGRATION_STATE,
                f"The parked copy of domain {record.domain_uuid} is {record.phase.value}; it cannot"
                f" be {verb} any more.",
                subject=f"migrations/{record.migration_id}",
                metadata={"phase": record.phase.value},
            )

    def _refuse_other_move(self, fence: fence_pb2.Fence) -> None:
        for other in self._records.sources_of(fence.domain_uuid):
            if other.migration_id != fence.migration_id and (
                other.phase is not SourcePhase.DISCARDED
            ):
                raise DroverError(
                    Reason.INSTANCE_BUSY,
                    f"Domain {fence.domain_uuid} is {other.phase.value} here by migration"
                    f" {other.migration_id}.",
                    subject=f"domains/{fence.domain_uuid}",
                    metadata={"migration_id": other.migration_id},
                )
