"""A recorded API server: the generated services, answering from a script.

It stands in for the control plane where a test is about what the command line
does with answers; test_with_api.py uses the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
from click.testing import CliRunner, Result

from controlplane.cli.root import cli
from controlplane.common import rpc
from controlplane.common.errors import DroverError
from controlplane.common.identity import Role
from controlplane.common.reasons import Reason
from controlplane.security.audit import AuditLog
from controlplane.security.authn import Authenticator
from controlplane.security.pki import api_server_identity
from controlplane.server import ports
from controlplane.v1 import (
    flavor_service_pb2,
    flavor_service_pb2_grpc,
    host_pb2,
    host_service_pb2,
    host_service_pb2_grpc,
    instance_pb2,
    instance_service_pb2,
    instance_service_pb2_grpc,
    migration_pb2,
    migration_service_pb2,
    migration_service_pb2_grpc,
)
from controlplane.v1.migration_pb2 import HostVerdict, Migration, Placement
from tests.controlplane.fleet_pki import FLEET, FleetPki

UID = "6d0f7d9e-5a3c-4d8e-9a55-0f3c1d2e4b5a"
MOVE = "3f6c1a52-8a0e-4c1c-9b59-d0b7f1f7a001"


def make_instance(name: str = "web1", uid: str = UID, **more: Any) -> instance_pb2.Instance:
    given: dict[str, Any] = {
        "host": "hosts/a",
        "vm_state": instance_pb2.Instance.VM_STATE_ACTIVE,
        "vcpus": 2,
        "memory_mib": 2048,
        "disk_size_bytes": 5 << 30,
        **more,
    }
    return instance_pb2.Instance(name=f"instances/{uid}", uid=uid, display_name=name, **given)


def make_move(state: Migration.State.ValueType, **more: Any) -> Migration:
    given: dict[str, Any] = {
        "name": f"migrations/{MOVE}",
        "instance": f"instances/{UID}",
        "instance_display_name": "web1",
        "kind": Migration.KIND_MIGRATION,
        "source_host": "hosts/a",
        "target_host": "hosts/b",
        "etag": "7",
        "placement": Placement(
            chosen_host="hosts/b",
            verdicts=[
                HostVerdict(host="hosts/b", fits=True, weight=1.5, message="Most free memory."),
                HostVerdict(
                    host="hosts/c",
                    reason="TARGET_LACKS_SPACE",
                    message="Root images has 2 GiB free; 5 GiB are needed.",
                ),
            ],
            estimated_bytes=5 << 30,
        ),
        **more,
    }
    return Migration(state=state, **given)


@dataclass
class Script:
    """What the recorded server answers, and what it was asked.

    Attributes:
        refusals: Method name -> error to answer with.
        streams: What each WatchMigration sends, in order; a DroverError ends the
            stream with it, a float waits so many seconds, None for ever.
    """

    hosts: list[host_pb2.Host] = field(default_factory=list)
    instances: list[instance_pb2.Instance] = field(default_factory=list)
    moves: list[Migration] = field(default_factory=list)
    refusals: dict[str, DroverError] = field(default_factory=dict)
    streams: list[list[Migration | DroverError | float | None]] = field(default_factory=list)
    asked: list[tuple[str, Any]] = field(default_factory=list)

    def note(self, method: str, request: Any) -> None:
        self.asked.append((method, request))
        if method in self.refusals:
            raise self.refusals[method]

    def requests(self, method: str) -> list[Any]:
        return [request for name, request in self.asked if name == method]


class Hosts(host_service_pb2_grpc.HostServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def _named(self, method: str, request: Any) -> host_pb2.Host:
        self.script.note(method, request)
        for host in self.script.hosts:
            if host.name == request.name:
                return host
        raise DroverError(
            Reason.HOST_NOT_FOUND, f"There is no {request.name}.", subject=request.name
        )

    async def GetHost(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._named("GetHost", request)

    async def ListHosts(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("ListHosts", request)
        return host_service_pb2.ListHostsResponse(hosts=self.script.hosts)

    async def AddHost(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("AddHost", request)
        answer = host_service_pb2.AddHostResponse(
            host=host_pb2.Host(name=f"hosts/{request.host_id}"), join_token="TOKEN"
        )
        answer.expire_time.GetCurrentTime()
        return answer

    async def EnableHost(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._named("EnableHost", request)

    async def DisableHost(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._named("DisableHost", request)

    async def DeclareHostGone(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._named("DeclareHostGone", request)


class Instances(instance_service_pb2_grpc.InstanceServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    async def GetInstance(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("GetInstance", request)
        name = request.name.removeprefix("instances/")
        found = [i for i in self.script.instances if name in (i.uid, i.display_name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise DroverError(
                Reason.AMBIGUOUS_NAME, f"{len(found)} instances are called {name}.", subject="name"
            )
        raise DroverError(
            Reason.INSTANCE_NOT_FOUND, f"There is no instance {name!r}.", subject=request.name
        )

    async def ListInstances(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("ListInstances", request)
        start = int(request.page_token or 0)
        page = self.script.instances[start : start + 2]  # small pages, whatever is asked for
        end = start + len(page)
        more = str(end) if end < len(self.script.instances) else ""
        return instance_service_pb2.ListInstancesResponse(instances=page, next_page_token=more)

    async def AdoptInstance(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("AdoptInstance", request)
        return self.script.instances[0]

    async def ReleaseInstance(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("ReleaseInstance", request)
        return instance_service_pb2.ReleaseInstanceResponse()

    async def LockInstance(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("LockInstance", request)
        return self.script.instances[0]

    async def UnlockInstance(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("UnlockInstance", request)
        return self.script.instances[0]


class Migrations(migration_service_pb2_grpc.MigrationServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def _present(self, method: str, request: Any) -> Migration:
        self.script.note(method, request)
        for move in self.script.moves:
            if move.name == request.name:
                return move
        raise DroverError(
            Reason.MIGRATION_NOT_FOUND, f"There is no {request.name}.", subject=request.name
        )

    async def CreateMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("CreateMigration", request)
        move = Migration()
        move.CopyFrom(self.script.moves[0])
        move.options.CopyFrom(request.options)
        return move

    async def GetMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._present("GetMigration", request)

    async def ListMigrations(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("ListMigrations", request)
        wanted = [m for m in self.script.moves if request.instance in ("", m.instance)]
        return migration_service_pb2.ListMigrationsResponse(migrations=wanted)

    async def WatchMigration(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.script.note("WatchMigration", request)
        for item in self.script.streams.pop(0):
            if isinstance(item, DroverError):
                raise item
            if item is None:
                await asyncio.Event().wait()
            elif isinstance(item, float):
                await asyncio.sleep(item)
            else:
                yield item

    async def ConfirmMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._present("ConfirmMigration", request)

    async def RevertMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._present("RevertMigration", request)

    async def CancelMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._present("CancelMigration", request)

    async def LimitMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._present("LimitMigration", request)

    async def RetryMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._present("RetryMigration", request)

    async def AbandonMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._present("AbandonMigration", request)

    async def ListMigrationEvents(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("ListMigrationEvents", request)
        event = migration_pb2.MigrationEvent(
            sequence=1, saga="move", step="copy", kind="STARTED", message="Copying."
        )
        return migration_service_pb2.ListMigrationEventsResponse(events=[event])

    async def ListAuditEntries(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("ListAuditEntries", request)
        entry = migration_service_pb2.AuditEntry(
            sequence=1,
            principal="drover://lab/admin/eve",
            method="/controlplane.v1.HostService/AddHost",
            resource="hosts/c",
            outcome="PERMISSION_DENIED",
            reason="PERMISSION_DENIED",
        )
        return migration_service_pb2.ListAuditEntriesResponse(entries=[entry])


class Flavors(flavor_service_pb2_grpc.FlavorServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    async def CreateFlavor(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("CreateFlavor", request)
        return request.flavor

    async def GetFlavor(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise AssertionError("the command line never asks for one flavor")

    async def ListFlavors(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("ListFlavors", request)
        return flavor_service_pb2.ListFlavorsResponse()

    async def DeleteFlavor(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.script.note("DeleteFlavor", request)
        return flavor_service_pb2.DeleteFlavorResponse()


class RecordedApi:
    """The recorded server on a real mutual-TLS port, and the command that talks to it."""

    def __init__(self, directory: Path) -> None:
        self.script = Script()
        self.pki = FleetPki(directory / "pki")
        self.config = directory / "cli.toml"
        self.port = 0
        self._tls = self.pki.server()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listen: on a port of its own, or again on the one it had."""

        async def write(add: Callable[[Any], None]) -> None:
            return None

        server = ports.make_api_server(
            Authenticator(FLEET),
            AuditLog(write),
            ports.Health([]),
            [
                lambda s: host_service_pb2_grpc.add_HostServiceServicer_to_server(
                    Hosts(self.script), s
                ),
                lambda s: instance_service_pb2_grpc.add_InstanceServiceServicer_to_server(
                    Instances(self.script), s
                ),
                lambda s: migration_service_pb2_grpc.add_MigrationServiceServicer_to_server(
                    Migrations(self.script), s
                ),
                lambda s: flavor_service_pb2_grpc.add_FlavorServiceServicer_to_server(
                    Flavors(self.script), s
                ),
            ],
            [],
        )
        self.port = ports.bind_api(server, f"127.0.0.1:{self.port}", self._tls)
        await server.start()
        self._server = server
        self.be(Role.ADMIN)

    async def stop(self) -> None:
        """Stop at once, as a crash would."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def be(self, role: Role) -> None:
        """Have the command run with a certificate of this role."""
        tls: rpc.TlsPaths = self.pki.person(role)
        self.config.write_text(
            f'server = "127.0.0.1:{self.port}"\n'
            f'server_name = "{api_server_identity(FLEET).dns_name}"\n'
            f'ca = "{tls.ca}"\ncert = "{tls.cert}"\nkey = "{tls.key}"\n'
        )

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "DROVER_CONFIG": str(self.config), "NO_COLOR": "1"}

    async def run(self, *arguments: str, stdin: str | None = None) -> Result:
        """Run the command in a thread; standard output and error are no terminal."""
        return await asyncio.to_thread(
            CliRunner().invoke, cli, list(arguments), stdin, self.environment
        )

    async def spawn(self, *arguments: str, **more: Any) -> asyncio.subprocess.Process:
        """Run the command as a process."""
        code = "from controlplane.cli.main import main; main()"
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            code,
            *arguments,
            cwd=Path(__file__).parents[3],
            **{
                "env": self.environment,
                "stdout": asyncio.subprocess.PIPE,
                "stderr": asyncio.subprocess.PIPE,
                **more,
            },
        )


@contextlib.asynccontextmanager
async def recorded_api(directory: Path) -> AsyncIterator[RecordedApi]:
    """A started server that is stopped at the end."""
    api = RecordedApi(directory)
    await api.start()
    try:
        yield api
    finally:
        await api.stop()
