"""What the steps of all sagas share: the migration they act for, its fence, its hosts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import grpc.aio
import msgspec

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain.model import Migration
from controlplane.domain.names import instance_name
from controlplane.saga.definition import StepContext, Wait
from controlplane.sagas.resources import MoveResources
from controlplane.store import migrations, sightings
from hostd.v1 import domain_pb2, fence_pb2
from hostd.v1 import host_service_pb2 as hostd

if TYPE_CHECKING:
    from hostd.v1.host_service_pb2_grpc import HostServiceAsyncStub

_DISKS = (domain_pb2.VOLUME_KIND_DISK, domain_pb2.VOLUME_KIND_BACKING)
Q = TypeVar("Q")
A = TypeVar("A")


class MigrationParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of every saga here.

    Attributes:
        migration_id: UUID of the migration that the saga conducts.
    """

    migration_id: str


@dataclass(frozen=True)
class Move:
    """A migration under way, as one step sees it.

    Attributes:
        row: The migration as of the beginning of the step.
        context: The step's context.
    """

    row: Migration
    context: StepContext

    @classmethod
    async def of(cls, context: StepContext) -> Move:
        """Load the migration that the saga conducts."""
        migration_id = context.params.migration_id
        return cls(await context.transaction(lambda tx: migrations.get(tx, migration_id)), context)

    @property
    def resources(self) -> MoveResources:
        """What the runner was built with."""
        resources: MoveResources = self.context.resources
        return resources

    @property
    def fence(self) -> fence_pb2.Fence:
        """The fence of calls that this step makes."""
        return fence_pb2.Fence(
            domain_uuid=self.row.instance_uid,
            migration_id=self.row.id,
            saga_id=self.context.saga_id,
            saga_seq=self.context.token.seq,
            generation=self.context.token.generation,
            step=self.context.step,
        )

    @property
    def job_id(self) -> str:
        """Id of the copy job on the source."""
        return f"{self.row.id}/copy"

    @property
    def poll(self) -> Wait:
        """Look again soon."""
        return Wait(self.resources.poll_seconds)

    async def on_source(
        self,
        method: Callable[[HostServiceAsyncStub], grpc.aio.UnaryUnaryMultiCallable[Q, A]],
        request: Q,
        *,
        timeout_seconds: float = 60.0,
    ) -> A:
        """Call the host that the machine leaves."""
        return await self.resources.hosts.call(
            self.row.source_host, method, request, timeout_seconds=timeout_seconds
        )

    async def on_target(
        self,
        method: Callable[[HostServiceAsyncStub], grpc.aio.UnaryUnaryMultiCallable[Q, A]],
        request: Q,
        *,
        timeout_seconds: float = 60.0,
    ) -> A:
        """Call the host that the machine goes to."""
        return await self.resources.hosts.call(
            self.row.target_host, method, request, timeout_seconds=timeout_seconds
        )

    async def verify_whole(self, host: str, consequence: str) -> None:
        """See with a host's own eyes that it has the machine with all its disks.

        Comes before anything that only makes sense if it has: above all before
        the copy on the other host is deleted.

        Args:
            host: Bare name of the host.
            consequence: What did not happen because of it, as a sentence.

        Raises:
            DroverError: DOMAIN_NOT_FOUND or DISK_MISSING; HOST_GONE.
        """
        subject = instance_name(self.row.instance_uid)
        try:
            domain = await self.resources.hosts.call(
                host,
                lambda h: h.GetDomain,
                hostd.GetDomainRequest(domain_uuid=self.row.instance_uid),
                timeout_seconds=60.0,
            )
        except DroverError as error:
            if error.reason is not Reason.DOMAIN_NOT_FOUND:
                raise
            raise DroverError(
                Reason.DOMAIN_NOT_FOUND,
                f"Host {host} does not have {self.row.instance_name}. {consequence}",
                subject=subject,
                metadata={"host": host},
            ) from error
        missing = [v.path for v in domain.volumes if v.kind in _DISKS and v.size_bytes == 0]
        if missing or not domain.persistent:
            raise DroverError(
                Reason.DISK_MISSING,
                f"Host {host} does not have all of {domain.name}: "
                f"{', '.join(missing) or 'no persistent definition'}. {consequence}",
                subject=subject,
                metadata={"host": host},
            )

    async def note_absence(self, host: str) -> None:
        """Note that a host has just said that it does not define the machine any more."""
        uid = self.row.instance_uid
        await self.context.transaction(lambda tx: sightings.leave(tx, host, uid))

    async def forget_on_source(self) -> None:
        """Have the source drop its small records of this migration."""
        await self.on_source(
            lambda h: h.ForgetMigration, hostd.ForgetMigrationRequest(fence=self.fence)
        )

    async def forget_on_target(self) -> None:
        """Have the target drop its small records of this migration."""
        await self.on_target(
            lambda h: h.ForgetMigration, hostd.ForgetMigrationRequest(fence=self.fence)
        )


def gone(error: DroverError) -> bool:
    """True when an operator has declared the called host gone for good."""
    return error.reason is Reason.HOST_GONE
