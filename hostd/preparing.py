"""Before a machine comes to this host: would it run here, and room is made for it.

All methods block; callers hold the lock of the machine and have passed the fence.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from diskmover import MoverError
from hostd.config import HostdConfig
from hostd.hypervisor import Hypervisor
from hostd.incoming import IncomingFiles
from hostd.preflight import refuse_failures
from hostd.preflight_model import Neighbour
from hostd.preflight_storage import placements
from hostd.records import Records, SourcePhase, TargetPhase, TargetRecord
from hostd.transfer import mover_error
from hostd.v1 import fence_pb2, host_service_pb2, preflight_pb2


class Preparation:
    """What a host does for machines before they come to it.

    Args:
        config: Names and limits of this host.
        hypervisor: libvirt and the storage roots.
        records: What was done so far.
        files: The files that come to this host.
        remove: Removes what a move has put here.
    """

    def __init__(
        self,
        config: HostdConfig,
        hypervisor: Hypervisor,
        records: Records,
        files: IncomingFiles,
        remove: Callable[[TargetRecord | None], None],
    ) -> None:
        self._config = config
        self._hypervisor = hypervisor
        self._records = records
        self._files = files
        self._remove = remove
        self._preparing = threading.Lock()

    def check(self, machine: preflight_pb2.IncomingMachine) -> preflight_pb2.PreflightReport:
        """Would the machine run here; nothing is changed."""
        _check_machine(machine)
        placed = self._files.place_beside(machine, "check")
        return self._hypervisor.check_target(
            placed, self._files.reserved_bytes(), coming=self._coming()
        )

    def prepare(
        self, request: host_service_pb2.PrepareTargetRequest
    ) -> host_service_pb2.PrepareTargetResponse:
        """Check, and reserve room for the volumes.

        Raises:
            DroverError: The first failed check's reason, all of them as violations;
                INSTANCE_BUSY or MIGRATION_STATE; LIBVIRT_UNAVAILABLE.
        """
        fence = request.fence
        _check_machine(request.machine)
        if request.machine.domain.uuid != fence.domain_uuid:
            raise DroverError(
                Reason.INVALID_FIELD,
                f"machine.domain.uuid is {request.machine.domain.uuid}, the fence is about"
                f" {fence.domain_uuid}.",
                subject="machine.domain.uuid",
            )
        record = self._records.target(fence.migration_id)
        if record is not None and record.phase is not TargetPhase.PREPARED:
            if record.phase is TargetPhase.REMOVING:
                raise wrong_phase(record, "prepared")
            return self._prepared(record, preflight_pb2.PreflightReport())
        self._refuse_parked_here(fence)
        # What one move reserves the next one has to see: one at a time.
        with self._preparing:
            record, report = self._reserve(request, record)
        if request.preallocate:
            self._preallocate(record)
        return self._prepared(record, report)

    def _reserve(
        self, request: host_service_pb2.PrepareTargetRequest, before: TargetRecord | None
    ) -> tuple[TargetRecord, preflight_pb2.PreflightReport]:
        fence = request.fence
        machine = self._files.place_beside(request.machine, fence.migration_id)
        report = self._check_again(machine, fence.migration_id)
        try:
            refuse_failures(report, f"hosts/{self._config.host}")
        except DroverError as error:
            # What is away comes back; anything else is a refusal that leaves nothing.
            if error.reason is not Reason.LIBVIRT_UNAVAILABLE:
                self._remove(before)
            raise
        record = TargetRecord(
            fence.migration_id,
            fence.domain_uuid,
            TargetPhase.PREPARED,
            machine=machine,
            placements={v.volume_id: (v.root, v.name) for v in placements(machine)},
            reservations=self._files.room(machine, preallocate=request.preallocate),
        )
        self._records.put_target(record)
        return record, report

    def _check_again(
        self, machine: preflight_pb2.IncomingMachine, migration_id: str
    ) -> preflight_pb2.PreflightReport:
        own = [file.path for file in self._records.created_files(migration_id).values()]
        reserved = self._files.reserved_bytes(but=migration_id)
        coming = self._coming(but=migration_id)
        return self._hypervisor.check_target(machine, reserved, own, coming)

    def _coming(self, *, but: str = "") -> list[Neighbour]:
        """Machines that other moves are bringing here and libvirt does not know yet."""
        found = []
        for record in self._records.targets():
            if record.migration_id == but or record.phase is TargetPhase.BUILT:
                continue
            domain = record.machine.domain
            macs = frozenset(i.mac_address for i in domain.interfaces if i.mac_address)
            places = self._files.kept_places(record)
            found.append(Neighbour(domain.uuid, domain.name, macs, places, record.migration_id))
        return found

    def _prepared(
        self, record: TargetRecord, report: preflight_pb2.PreflightReport
    ) -> host_service_pb2.PrepareTargetResponse:
        return host_service_pb2.PrepareTargetResponse(
            report=report,
            placements=[
                preflight_pb2.VolumeMapping(volume_id=volume_id, root=root, name=name)
                for volume_id, (root, name) in record.placements.items()
            ],
            data_address=self._config.listen.data_address,
            data_identity=self._config.identity.uri,
        )

    def _preallocate(self, record: TargetRecord) -> None:
        try:
            for volume in record.machine.domain.volumes:
                if volume.volume_id in record.placements:
                    self._files.allocate(record, volume)
        except MoverError as error:
            self._remove(record)
            raise mover_error(error, f"migrations/{record.migration_id}") from error

    def _refuse_parked_here(self, fence: fence_pb2.Fence) -> None:
        for other in self._records.sources_of(fence.domain_uuid):
            if other.phase is not SourcePhase.DISCARDED:
                raise DroverError(
                    Reason.INSTANCE_BUSY,
                    f"Host {self._config.host} holds the parked copy of domain"
                    f" {fence.domain_uuid} by migration {other.migration_id}; confirm or revert"
                    " that move first.",
                    subject=f"domains/{fence.domain_uuid}",
                    metadata={"migration_id": other.migration_id},
                )


def _check_machine(machine: preflight_pb2.IncomingMachine) -> None:
    if not machine.domain.uuid or not machine.domain.name:
        raise DroverError(
            Reason.INVALID_FIELD, "machine.domain has no uuid or name.", subject="machine.domain"
        )


def wrong_phase(
    record: TargetRecord | None, verb: str, fence: fence_pb2.Fence | None = None
) -> DroverError:
    """That a target half of a move cannot be treated so where it stands."""
    migration_id = record.migration_id if record else fence.migration_id if fence else ""
    phase = record.phase.value if record else "not prepared"
    return DroverError(
        Reason.MIGRATION_STATE,
        f"Migration {migration_id} is {phase} on this target; it cannot be {verb} now.",
        subject=f"migrations/{migration_id}",
        metadata={"phase": phase},
    )
