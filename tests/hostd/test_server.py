"""Who may call hostd, what it says of itself, and how it starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from controlplane.common.config import ConfigError
from controlplane.common.errors import DroverError
from controlplane.common.identity import Identity, Role, host_identity
from controlplane.common.reasons import Reason
from controlplane.common.rpc import TlsPaths
from hostd.config import (
    HostdConfig,
    LibvirtConfig,
    ListenConfig,
    StateConfig,
    StorageConfig,
    TlsConfig,
)
from hostd.server import SERVICE, Daemon
from hostd.state import StateError
from hostd.v1 import fence_pb2, host_service_pb2_grpc
from hostd.v1 import host_service_pb2 as pb
from tests.hostd.small_filesystem import filled, small_filesystem
from tests.support.pki import FLEET, TestPki

if TYPE_CHECKING:
    from hostd.v1.host_service_pb2_grpc import HostServiceAsyncStub

CALL_SECONDS = 10.0
UUID = "11111111-1111-1111-1111-111111111111"


def configuration(
    tmp_path: Path, pki: TestPki, libvirt_uri: str = "test:///default"
) -> HostdConfig:
    tls = pki.host("a")
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    return HostdConfig(
        fleet=FLEET,
        host="a",
        listen=ListenConfig(control="127.0.0.1:0", data="127.0.0.1:0"),
        tls=TlsConfig(ca=tls.ca, cert=tls.cert, key=tls.key),
        libvirt=LibvirtConfig(uri=libvirt_uri),
        storage=StorageConfig(roots={"images": images}),
        state=StateConfig(directory=tmp_path / "state"),
    )


@pytest.fixture
def pki(tmp_path: Path) -> TestPki:
    return TestPki(tmp_path / "pki")


@pytest.fixture
async def daemon(tmp_path: Path, pki: TestPki) -> AsyncIterator[Daemon]:
    running = Daemon(configuration(tmp_path, pki))
    await running.start()
    yield running
    await running.stop()


Dial = Callable[[TlsPaths], grpc.aio.Channel]


def open_channel(daemon: Daemon, tls: TlsPaths) -> grpc.aio.Channel:
    return grpc.aio.secure_channel(
        f"127.0.0.1:{daemon.control_port}",
        tls.channel_credentials(),
        options=[("grpc.ssl_target_name_override", host_identity(FLEET, "a").dns_name)],
    )


@pytest.fixture
async def dial(daemon: Daemon) -> AsyncIterator[Dial]:
    channels: list[grpc.aio.Channel] = []

    def dial_daemon(tls: TlsPaths) -> grpc.aio.Channel:
        channel = open_channel(daemon, tls)
        channels.append(channel)
        return channel

    yield dial_daemon
    for channel in channels:
        await channel.close()


async def told(call: Awaitable[Any]) -> DroverError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    untyped: Any = refused.value
    status = rpc_status.from_call(untyped)
    error = DroverError.from_status(status) if status is not None else None
    assert error is not None, refused.value
    return error


def stub(channel: grpc.aio.Channel) -> HostServiceAsyncStub:
    untyped: Any = host_service_pb2_grpc.HostServiceStub(channel)
    opened: HostServiceAsyncStub = untyped
    return opened


async def test_the_control_plane_of_the_fleet_is_served(dial: Dial, pki: TestPki) -> None:
    answer = await stub(dial(pki.controlplane())).GetInventory(
        pb.GetInventoryRequest(), timeout=CALL_SECONDS
    )
    assert answer.facts.name == "a"
    assert answer.facts.libvirt_connected
    assert [root.name for root in answer.facts.roots] == ["images"]


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.CONTROLPLANE])
async def test_every_other_role_is_refused(dial: Dial, pki: TestPki, role: Role) -> None:
    tls = pki.host("b") if role is Role.HOST else pki.person(role)
    error = await told(stub(dial(tls)).GetInventory(pb.GetInventoryRequest(), timeout=CALL_SECONDS))
    assert error.reason is Reason.PERMISSION_DENIED
    assert role.value in error.metadata["identity"]


async def test_another_fleet_under_the_same_authority_is_refused(dial: Dial, pki: TestPki) -> None:
    stranger = pki.issue(Identity("other", Role.CONTROLPLANE, "cp"))
    error = await told(
        stub(dial(stranger)).GetInventory(pb.GetInventoryRequest(), timeout=CALL_SECONDS)
    )
    assert error.reason is Reason.UNAUTHENTICATED


async def test_a_certificate_of_another_authority_is_refused_by_tls(
    dial: Dial, pki: TestPki, tmp_path: Path
) -> None:
    stranger = TestPki(tmp_path / "stranger").controlplane()
    mixed = TlsPaths(cert=stranger.cert, key=stranger.key, ca=pki.ca)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub(dial(mixed)).GetInventory(pb.GetInventoryRequest(), timeout=CALL_SECONDS)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_expired_certificate_is_refused_by_tls(
    dial: Dial, pki: TestPki, tmp_path: Path
) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=2)
    cert, key = tmp_path / "expired.pem", tmp_path / "expired.key"
    controlplane = Identity(FLEET, Role.CONTROLPLANE, "cp")
    pki.authority.issue(controlplane, now=long_ago, lifetime=timedelta(days=1)).write(cert, key)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub(dial(TlsPaths(cert=cert, key=key, ca=pki.ca))).GetInventory(
            pb.GetInventoryRequest(), timeout=CALL_SECONDS
        )
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_message_too_big_reaches_no_call(dial: Dial, pki: TestPki) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub(dial(pki.controlplane())).GetDomain(
            pb.GetDomainRequest(domain_uuid="x" * (5 << 20)), timeout=CALL_SECONDS
        )
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_no_certificate_and_no_tls_are_refused(daemon: Daemon, pki: TestPki) -> None:
    address = f"127.0.0.1:{daemon.control_port}"
    nobody = grpc.ssl_channel_credentials(pki.ca.read_bytes())
    override = [("grpc.ssl_target_name_override", host_identity(FLEET, "a").dns_name)]
    for channel in (
        grpc.aio.secure_channel(address, nobody, options=override),
        grpc.aio.insecure_channel(address),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub(channel).GetInventory(pb.GetInventoryRequest(), timeout=CALL_SECONDS)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        await channel.close()


async def test_reflection_and_health_are_for_the_control_plane_too(
    dial: Dial, pki: TestPki
) -> None:
    async def services(tls: TlsPaths) -> list[str]:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        channel: Any = dial(tls)
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        found = reflection.ServerReflectionInfo(iter([request]), timeout=CALL_SECONDS)
        return [
            service.name
            async for response in found
            for service in response.list_services_response.service
        ]

    assert SERVICE in await services(pki.controlplane())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await services(pki.person(Role.ADMIN))
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    health: Any = health_pb2_grpc.HealthStub(dial(pki.controlplane()))
    answer = await health.Check(
        health_pb2.HealthCheckRequest(service=SERVICE), timeout=CALL_SECONDS
    )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_bad_requests_name_the_field(dial: Dial, pki: TestPki) -> None:
    calls = stub(dial(pki.controlplane()))
    fence = fence_pb2.Fence(
        domain_uuid=UUID, migration_id=UUID, saga_id=UUID, saga_seq=1, generation=1, step="x"
    )
    for call, subject in (
        (calls.GetDomain(pb.GetDomainRequest(domain_uuid="web1")), "domain_uuid"),
        (calls.EnsureParked(pb.EnsureParkedRequest()), "fence.domain_uuid"),
        (calls.StartCopy(pb.StartCopyRequest(fence=fence, session_key=b"short")), "session_key"),
        (
            calls.StartCopy(pb.StartCopyRequest(fence=fence, session_key=bytes(32))),
            "job_id",
        ),
        (calls.EnsureStopped(pb.EnsureStoppedRequest(fence=fence)), "timeout"),
    ):
        error = await told(call)
        assert error.reason is Reason.INVALID_FIELD, subject
        assert error.subject == subject


async def test_undo_calls_accept_what_never_was(dial: Dial, pki: TestPki) -> None:
    calls = stub(dial(pki.controlplane()))
    fence = fence_pb2.Fence(
        domain_uuid=UUID, migration_id=UUID, saga_id=UUID, saga_seq=1, generation=1, step="undo"
    )
    for _ in range(2):
        await calls.CancelJob(pb.CancelJobRequest(fence=fence, job_id="none"), timeout=CALL_SECONDS)
        await calls.EnsureUnparked(pb.EnsureUnparkedRequest(fence=fence), timeout=CALL_SECONDS)
        restored = await calls.RestorePower(
            pb.RestorePowerRequest(fence=fence), timeout=CALL_SECONDS
        )
        assert restored.restored
        await calls.EnsureUndefined(pb.EnsureUndefinedRequest(fence=fence), timeout=CALL_SECONDS)
        await calls.EnsureAbsent(pb.EnsureAbsentRequest(fence=fence), timeout=CALL_SECONDS)
        freed = await calls.DiscardParked(
            pb.DiscardParkedRequest(fence=fence), timeout=CALL_SECONDS
        )
        assert freed.freed_bytes == 0
        await calls.ForgetMigration(pb.ForgetMigrationRequest(fence=fence), timeout=CALL_SECONDS)


async def test_forward_calls_out_of_order_are_refused(dial: Dial, pki: TestPki) -> None:
    calls = stub(dial(pki.controlplane()))
    fence = fence_pb2.Fence(
        domain_uuid=UUID, migration_id=UUID, saga_id=UUID, saga_seq=1, generation=1, step="x"
    )
    sender = host_identity(FLEET, "b").uri
    expected: list[tuple[Awaitable[Any], Reason]] = [
        (calls.EnsureStarted(pb.EnsureStartedRequest(fence=fence)), Reason.INSTANCE_NOT_OWNED),
        (calls.EnsureBuilt(pb.EnsureBuiltRequest(fence=fence)), Reason.MIGRATION_STATE),
        (
            calls.OpenReceive(
                pb.OpenReceiveRequest(fence=fence, session_key=bytes(32), sender_identity=sender)
            ),
            Reason.MIGRATION_STATE,
        ),
        (
            calls.StartCopy(
                pb.StartCopyRequest(
                    fence=fence, session_key=bytes(32), job_id="j", volume_ids=["vda"]
                )
            ),
            Reason.MIGRATION_STATE,
        ),
        (calls.EnsureParked(pb.EnsureParkedRequest(fence=fence)), Reason.DOMAIN_NOT_FOUND),
        (calls.GetJob(pb.GetJobRequest(job_id="j")), Reason.JOB_NOT_FOUND),
    ]
    for call, reason in expected:
        assert (await told(call)).reason is reason
    # What was refused left nothing to undo.
    await calls.EnsureUnparked(pb.EnsureUnparkedRequest(fence=fence), timeout=CALL_SECONDS)


async def test_without_libvirt_it_serves_and_says_so(tmp_path: Path, pki: TestPki) -> None:
    nowhere = f"qemu+unix:///system?socket={tmp_path}/none"
    daemon = Daemon(configuration(tmp_path, pki, nowhere))
    await daemon.start()
    override = [("grpc.ssl_target_name_override", host_identity(FLEET, "a").dns_name)]
    async with grpc.aio.secure_channel(
        f"127.0.0.1:{daemon.control_port}",
        pki.controlplane().channel_credentials(),
        options=override,
    ) as channel:
        inventory = await stub(channel).GetInventory(pb.GetInventoryRequest(), timeout=CALL_SECONDS)
        assert not inventory.facts.libvirt_connected
        error = await told(stub(channel).GetDomain(pb.GetDomainRequest(domain_uuid=UUID)))
        assert error.reason is Reason.LIBVIRT_UNAVAILABLE
    await daemon.stop()


@pytest.mark.lab
async def test_a_full_state_is_told_as_such_and_ends_with_the_cause(
    tmp_path: Path, pki: TestPki
) -> None:
    with small_filesystem(tmp_path / "state", tmp_path / "state.img") as mounted:
        daemon = Daemon(configuration(tmp_path, pki))
        await daemon.start()
        channel = open_channel(daemon, pki.controlplane())
        calls = stub(channel)

        def absent(number: int) -> Awaitable[Any]:
            uuid = f"11111111-1111-1111-1111-{number:012}"
            fence = fence_pb2.Fence(
                domain_uuid=uuid, migration_id=UUID, saga_id=UUID, saga_seq=1, generation=1,
                step="undo",
            )  # fmt: skip
            return calls.EnsureAbsent(pb.EnsureAbsentRequest(fence=fence), timeout=CALL_SECONDS)

        with filled(mounted):
            await asyncio.to_thread(use_up_the_room, daemon)

            async def until_refused() -> None:
                for number in range(1000):
                    await absent(number)

            error = await told(until_refused())
            assert error.reason is Reason.HOST_DISK_FULL
            assert error.code is grpc.StatusCode.UNAVAILABLE
            assert str(mounted) in error.message
        await absent(1000)
        await channel.close()
        await daemon.stop()


def use_up_the_room(daemon: Daemon) -> None:
    """Write into the state until the disk takes no more."""
    with contextlib.suppress(sqlite3.OperationalError):
        for number in range(10_000):
            with daemon._state.transaction() as tx:
                tx.execute(f"CREATE TABLE filler{number} (x INTEGER)")


async def test_a_second_daemon_on_the_same_state_refuses(
    daemon: Daemon, tmp_path: Path, pki: TestPki
) -> None:
    with pytest.raises(StateError, match="Another drover-hostd"):
        await Daemon(configuration(tmp_path, pki)).start()


async def test_a_taken_port_is_one_line(daemon: Daemon, tmp_path: Path, pki: TestPki) -> None:
    config = configuration(tmp_path / "images", pki)
    taken = ListenConfig(control="127.0.0.1:0", data=daemon.data_port.address)
    with pytest.raises(ConfigError, match=r"listen\.data"):
        await Daemon(
            HostdConfig(
                fleet=FLEET,
                host="a",
                listen=taken,
                tls=config.tls,
                storage=config.storage,
                state=config.state,
            )
        ).start()


async def test_the_process_tells_systemd_and_obeys_sigterm(tmp_path: Path, pki: TestPki) -> None:
    tls = pki.host("a")
    config = tmp_path / "hostd.toml"
    config.write_text(
        f'fleet="{FLEET}"\nhost="a"\n[listen]\ncontrol="127.0.0.1:0"\ndata="127.0.0.1:0"\n'
        f'[tls]\nca="{tls.ca}"\ncert="{tls.cert}"\nkey="{tls.key}"\n'
        f'[libvirt]\nuri="test:///default"\n[storage.roots]\nimages="{tmp_path}"\n'
        f'[state]\ndirectory="{tmp_path}/state"\n'
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        loop = asyncio.get_running_loop()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hostd.main", "--config", str(config),
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        ready = await asyncio.wait_for(loop.sock_recv(systemd, 4096), 20)
        assert ready.startswith(b"READY=1\n")
        process.send_signal(signal.SIGTERM)
        stopping = await asyncio.wait_for(loop.sock_recv(systemd, 4096), 20)
        assert stopping.startswith(b"STOPPING=1\n")
        _, log = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == 0, log
        assert b"Traceback" not in log
