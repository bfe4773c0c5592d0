"""A hostd on a unix socket whose machines exist in memory only.

It speaks the real protocol to the real client, so that what the control plane
makes of answers, refusals and silence is tried through a real connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.common.rpc import ErrorInterceptor
from hostd.v1 import domain_pb2, host_pb2, host_service_pb2, preflight_pb2
from hostd.v1.host_service_pb2_grpc import HostServiceServicer, add_HostServiceServicer_to_server
from tests.controlplane.machines import make_facts

_WARN = preflight_pb2.PreflightCheck.OUTCOME_WARN
_FAIL = preflight_pb2.PreflightCheck.OUTCOME_FAIL


class SimulatedHost(HostServiceServicer):
    """What it reports can be changed at any time."""

    def __init__(self, name: str, socket: Path) -> None:
        self.name = name
        self.address = f"unix:{socket}"
        self.facts = make_facts(name)
        self.domains: dict[str, domain_pb2.Domain] = {}
        self.checks: list[preflight_pb2.PreflightCheck] = []
        self.out_of_reach: set[str] = set()
        self.refusal: DroverError | None = None
        self.delay_seconds = 0.0
        self.asked: list[str] = []

    def put(self, domain: domain_pb2.Domain) -> None:
        """Have a machine."""
        self.domains[domain.uuid] = domain

    def fail_check(self, reason: Reason, message: str) -> None:
        """Fail every preflight from now on."""
        self._tell(_FAIL, message, reason=reason.name)

    def warn(self, message: str) -> None:
        """Warn in every preflight from now on."""
        self._tell(_WARN, message)

    def _tell(
        self,
        outcome: preflight_pb2.PreflightCheck.Outcome.ValueType,
        message: str,
        reason: str = "",
    ) -> None:
        self.checks.append(
            preflight_pb2.PreflightCheck(
                check="test", outcome=outcome, reason=reason, message=message
            )
        )

    async def GetInventory(self, request: Any, context: Any) -> host_pb2.Inventory:  # noqa: N802
        await self._answer("GetInventory")
        return host_pb2.Inventory(facts=self.facts, domains=self.domains.values())

    async def GetDomain(  # noqa: N802
        self, request: host_service_pb2.GetDomainRequest, context: Any
    ) -> domain_pb2.Domain:
        await self._answer("GetDomain")
        if request.domain_uuid not in self.domains:
            raise DroverError(Reason.DOMAIN_NOT_FOUND, f"No domain {request.domain_uuid}.")
        return self.domains[request.domain_uuid]

    async def CheckSource(  # noqa: N802
        self, request: Any, context: Any
    ) -> preflight_pb2.PreflightReport:
        await self._answer("CheckSource")
        return preflight_pb2.PreflightReport(checks=self.checks)

    async def CheckTarget(  # noqa: N802
        self, request: Any, context: Any
    ) -> preflight_pb2.PreflightReport:
        await self._answer("CheckTarget")
        return preflight_pb2.PreflightReport(checks=self.checks)

    async def CheckReach(  # noqa: N802
        self, request: Any, context: Any
    ) -> preflight_pb2.PreflightReport:
        await self._answer("CheckReach")
        report = preflight_pb2.PreflightReport()
        if request.data_address in self.out_of_reach:
            report.checks.add(
                check="data-port",
                outcome=preflight_pb2.PreflightCheck.OUTCOME_FAIL,
                reason=Reason.TARGET_UNREACHABLE.name,
                message=f"{request.data_address} cannot be reached.",
            )
        return report

    async def _answer(self, method: str) -> None:
        self.asked.append(method)
        await asyncio.sleep(self.delay_seconds)
        if self.refusal is not None:
            raise self.refusal


@asynccontextmanager
async def served(host: SimulatedHost) -> AsyncIterator[SimulatedHost]:
    """Serve a host within a block."""
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    add_HostServiceServicer_to_server(host, server)
    server.add_insecure_port(host.address)
    await server.start()
    try:
        yield host
    finally:
        await server.stop(0)
