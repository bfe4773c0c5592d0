"""The target's half of a move: volumes arrive, the machine is built, or taken away again.

How room is made for it is in `hostd.preparing`.

The states are drawn in `hostd.records`. All methods block; callers hold the lock of
the machine and have passed the fence.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import structlog

import diskmover
from controlplane.common.errors import DroverError
from controlplane.common.identity import Identity, Role
from controlplane.common.reasons import Reason
from diskmover import MoverError
from hostd.config import HostdConfig
from hostd.hypervisor import Hypervisor
from hostd.incoming import SHARED, IncomingFiles, incoming, present_path
from hostd.libvirt.build import BuildOrder
from hostd.preparing import wrong_phase
from hostd.records import CreatedFile, Records, TargetPhase, TargetRecord
from hostd.reuse import Reuse
from hostd.transfer import DataPort, mover_error
from hostd.v1 import domain_pb2, fence_pb2, host_service_pb2

log = structlog.stdlib.get_logger(__name__)

RUNNING = domain_pb2.POWER_STATE_RUNNING
SHUTOFF = domain_pb2.POWER_STATE_SHUTOFF


class TargetSteps:
    """What a host does for machines that come to it.

    Args:
        config: Names and limits of this host.
        hypervisor: libvirt and the storage roots.
        records: What was done so far.
        data_port: Where volumes arrive.
        files: The files that come to this host.

    Attributes:
        files: As given.
    """

    def __init__(
        self,
        config: HostdConfig,
        hypervisor: Hypervisor,
        records: Records,
        data_port: DataPort,
        files: IncomingFiles,
    ) -> None:
        self._config = config
        self._hypervisor = hypervisor
        self._records = records
        self._data_port = data_port
        self.files = files
        self._reuse = Reuse(config.storage, hypervisor)

    # --- while it arrives

    def open_receive(self, request: host_service_pb2.OpenReceiveRequest) -> None:
        """Let the source send the machine's volumes.

        Raises:
            DroverError: MIGRATION_STATE unless the target is prepared, INVALID_FIELD.
        """
        fence = request.fence
        _check_sender(request.sender_identity, self._config.fleet)
        record = self._records.target(fence.migration_id)
        if record is None or record.phase is not TargetPhase.PREPARED:
            raise wrong_phase(record, "sent to", fence)
        if not request.volumes:
            raise DroverError(Reason.INVALID_FIELD, "volumes is empty.", subject="volumes")
        files = {v.volume_id: self.files.announce(record, v) for v in request.volumes}
        seeds = self._reuse.seeds(request.volumes, files)
        readback = self._config.storage.readback
        coming = [
            incoming(files[v.volume_id], v, seeds[v.volume_id], readback=readback)
            for v in request.volumes
        ]
        self._data_port.open(
            fence.migration_id, request.session_key, request.sender_identity, coming
        )
        log.info(
            "ready to receive",
            sender=request.sender_identity,
            volumes=len(coming),
            seeds=sorted({name for found in seeds.values() for _, name in found}),
        )

    # --- once it is here

    def ensure_built(self, request: host_service_pb2.EnsureBuiltRequest) -> domain_pb2.Domain:
        """Define the machine from what was received. It is not started.

        Raises:
            DroverError: MIGRATION_STATE, DIGEST_MISMATCH, BUILD_FAILED, DISK_SHRINK,
                LIBVIRT_UNAVAILABLE.
        """
        fence = request.fence
        record = self._records.target(fence.migration_id)
        if record is None or record.phase is TargetPhase.REMOVING:
            raise wrong_phase(record, "built", fence)
        if record.phase is TargetPhase.BUILT:
            return self._hypervisor.describe(fence.domain_uuid)
        if record.phase is TargetPhase.PREPARED:
            digests = self._verify(record, request)
            self._data_port.close_session(fence.migration_id)
            self._share_twins(record, digests)
        # From here on the files may change: a build that is cut off is repeated
        # without comparing them with what was sent.
        if record.phase is not TargetPhase.UNDEFINED:
            record = self._records.set_target_phase(record, TargetPhase.BUILDING)
        domain = self._hypervisor.build(
            BuildOrder(
                migration_id=fence.migration_id,
                domain_uuid=fence.domain_uuid,
                domain_name=record.machine.domain.name,
                loader_path=record.machine.domain.host_needs.loader_path,
                baggage=self.files.baggage(record),
                volumes=record.machine.domain.volumes,
                volume_paths=self.files.volume_paths(record),
                size=request.size if request.HasField("size") else None,
            )
        )
        self._records.put_target(
            replace(record, phase=TargetPhase.BUILT, was_built=True, reservations={})
        )
        log.info("built", name=domain.name, vcpus=domain.vcpus, memory_mib=domain.memory_mib)
        return domain

    def _verify(
        self, record: TargetRecord, request: host_service_pb2.EnsureBuiltRequest
    ) -> dict[str, str]:
        """Compare what is here with what was sent; the digests, by volume id."""
        expected = {digest.volume_id: digest.digest for digest in request.digests}
        arrived = self._records.created_files(record.migration_id)
        missing = set(arrived) - set(expected)
        if missing or not expected:
            raise DroverError(
                Reason.INVALID_FIELD,
                f"digests: none is given for {', '.join(sorted(missing)) or 'any volume'}.",
                subject="digests",
            )
        receipts = self._data_port.receipts(record.migration_id)
        for volume_id, file in arrived.items():
            receipt = receipts.get(volume_id)
            found = receipt.digest if receipt else self._digest(record, file)
            if found != expected[volume_id]:
                raise DroverError(
                    Reason.DIGEST_MISMATCH,
                    f"Volume {volume_id} has digest {found[:16]}..., its source had"
                    f" {expected[volume_id][:16]}...; the machine was not built.",
                    subject=f"migrations/{record.migration_id}",
                    metadata={
                        "volume_id": volume_id,
                        "found": found,
                        "expected": expected[volume_id],
                    },
                )
        return expected

    def _share_twins(self, record: TargetRecord, digests: dict[str, str]) -> None:
        """Use files that were here already in place of identical ones that arrived."""
        twins = self.files.twins(record)
        if not twins:
            return
        written = self._hypervisor.in_use_by_others(
            record.domain_uuid, list(twins.values()), written=True
        )
        unchanging = {id_: twin for id_, twin in twins.items() if twin not in written}
        self.files.drop_duplicates(record, unchanging, digests)

    def _digest(self, record: TargetRecord, file: CreatedFile) -> str:
        # The receiver's memory of the session went with an earlier hostd.
        log.info("computing a digest again", volume_id=file.volume_id)
        try:
            return diskmover.digest(present_path(file)).digest
        except MoverError as error:
            raise mover_error(error, f"migrations/{record.migration_id}") from error

    def ensure_undefined(self, fence: fence_pb2.Fence) -> None:
        """Take the definition away, keeping the disks; nothing when there is none.

        Raises:
            DroverError: INSTANCE_STATE while it runs, LIBVIRT_UNAVAILABLE.
        """
        record = self._records.target(fence.migration_id)
        if record is None or record.phase in (TargetPhase.PREPARED, TargetPhase.REMOVING):
            return
        self._refuse_running(record)
        if record.phase is TargetPhase.BUILT:
            # Before the effect: from here on it may not be started.
            record = self._records.set_target_phase(record, TargetPhase.UNDEFINED)
        self._hypervisor.undefine_built(fence.migration_id, fence.domain_uuid)
        log.info("undefined")

    def ensure_started(self, fence: fence_pb2.Fence) -> host_service_pb2.EnsureStartedResponse:
        """Start the machine that was built here.

        Raises:
            DroverError: INSTANCE_NOT_OWNED, START_FAILED, INSTANCE_STATE,
                LIBVIRT_UNAVAILABLE.
        """
        record = self._records.target(fence.migration_id)
        if record is None or record.phase is not TargetPhase.BUILT:
            phase = record.phase.value if record else "unknown here"
            raise DroverError(
                Reason.INSTANCE_NOT_OWNED,
                f"Domain {fence.domain_uuid} is {phase}; host {self._config.host} does not start"
                " what it has not built.",
                subject=f"domains/{fence.domain_uuid}",
                metadata={"phase": phase},
            )
        state = self._hypervisor.state(fence.domain_uuid)
        if state == SHUTOFF:
            self._hypervisor.start(fence.domain_uuid)
            log.info("started")
            state = self._hypervisor.state(fence.domain_uuid)
        if state == SHUTOFF:
            raise DroverError(
                Reason.START_FAILED,
                f"The guest {fence.domain_uuid} went off again at once on"
                f" {self._config.host}; see its log there.",
                subject=f"domains/{fence.domain_uuid}",
            )
        if state not in (RUNNING, domain_pb2.POWER_STATE_CHANGING):
            raise DroverError(
                Reason.START_FAILED,
                f"The guest {fence.domain_uuid} is {domain_pb2.PowerState.Name(state)} after its"
                f" start on {self._config.host}.",
                subject=f"domains/{fence.domain_uuid}",
            )
        # Whoever asks for the start has given the machine to this host.
        self._hypervisor.give_autostart(fence.migration_id, fence.domain_uuid)
        running = state == RUNNING
        return host_service_pb2.EnsureStartedResponse(
            running=running,
            time_synced=running and self._hypervisor.sync_time(fence.domain_uuid),
        )

    # --- leaving nothing behind

    def ensure_absent(self, fence: fence_pb2.Fence) -> None:
        """Remove everything that the move put here; nothing when there is nothing.

        Raises:
            DroverError: INSTANCE_STATE while the machine runs here, TARGET_LACKS_ROOT
                when a storage root that holds some of it is missing, DISK_IO_ERROR,
                LIBVIRT_UNAVAILABLE.
        """
        self.remove(self._records.target(fence.migration_id))

    def remove(self, record: TargetRecord | None) -> None:
        """The same, of a record; nothing without one."""
        if record is None:
            return
        may_be_defined = record.phase is not TargetPhase.PREPARED
        if may_be_defined:
            self._refuse_running(record)
            record = self._records.set_target_phase(record, TargetPhase.REMOVING)
        self._data_port.close_session(record.migration_id)
        if may_be_defined:
            self._hypervisor.remove_built(record.migration_id, record.domain_uuid)
        self.files.remove(record, keep=self._shared_files_in_use(record))
        self._records.drop_stop(record.migration_id)
        self._records.drop_target(record.migration_id)
        log.info("removed everything of the move")

    def _shared_files_in_use(self, record: TargetRecord) -> set[Path]:
        """Backing files and media that this move brought and another machine needs by now."""
        arrived = self._records.created_files(record.migration_id)
        shared = [
            arrived[volume.volume_id].path
            for volume in record.machine.domain.volumes
            if volume.kind in SHARED and volume.volume_id in arrived
        ]
        if not shared:
            return set()
        return self._hypervisor.in_use_by_others(record.domain_uuid, shared)

    def forget(self, migration_id: str) -> None:
        """Drop the small things of a move that ended with the machine living here.

        Raises:
            DroverError: MIGRATION_STATE while the move is not at its end.
        """
        record = self._records.target(migration_id)
        if record is None:
            return
        if record.phase is not TargetPhase.BUILT:
            raise wrong_phase(record, "forgotten")
        self._data_port.close_session(migration_id)
        self._hypervisor.give_autostart(migration_id, record.domain_uuid)
        self._hypervisor.forget_built(migration_id)
        self.files.keep(record)
        self._records.drop_target(migration_id)

    def refuse_unless_owned(self, migration_id: str) -> None:
        """Refuse to start a machine whose build here is not whole.

        Raises:
            DroverError: INSTANCE_NOT_OWNED.
        """
        record = self._records.target(migration_id)
        if record is not None and record.phase is not TargetPhase.BUILT:
            raise DroverError(
                Reason.INSTANCE_NOT_OWNED,
                f"Domain {record.domain_uuid} is {record.phase.value} here; it must not start.",
                subject=f"domains/{record.domain_uuid}",
                metadata={"phase": record.phase.value},
            )

    def _refuse_running(self, record: TargetRecord) -> None:
        try:
            state = self._hypervisor.state(record.domain_uuid)
        except DroverError as error:
            if error.reason is Reason.DOMAIN_NOT_FOUND:
                return
            raise
        if state != SHUTOFF:
            raise DroverError(
                Reason.INSTANCE_STATE,
                f"Domain {record.domain_uuid} is {domain_pb2.PowerState.Name(state)} on"
                f" {self._config.host}; stop it first.",
                subject=f"domains/{record.domain_uuid}",
                metadata={"power_state": domain_pb2.PowerState.Name(state)},
            )


def _check_sender(uri: str, fleet: str) -> None:
    try:
        identity = Identity.parse(uri)
    except ValueError as error:
        raise DroverError(
            Reason.INVALID_FIELD, f"sender_identity: {error}.", subject="sender_identity"
        ) from error
    if identity.role is not Role.HOST or identity.fleet != fleet:
        raise DroverError(
            Reason.INVALID_FIELD,
            f"sender_identity {uri} is not a host of fleet {fleet}.",
            subject="sender_identity",
        )
