from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from controlplane.common.errors import DroverError, Transient
from controlplane.common.reasons import Reason
from controlplane.domain.model import Host
from controlplane.domain.states import HostState
from controlplane.fleet.clients import HostClients, tls_channels
from hostd.v1 import host_pb2, host_service_pb2
from hostd.v1.host_service_pb2_grpc import add_HostServiceServicer_to_server
from tests.controlplane.machines import make_domain, make_host
from tests.controlplane.simulated_host import SimulatedHost, served
from tests.support.pki import TestPki


class Directory:
    """The hosts that the clients look up."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self.opened: list[str] = []

    async def lookup(self, name: str) -> Host:
        if name not in self.hosts:
            raise DroverError(Reason.HOST_NOT_FOUND, f"There is no hosts/{name}.")
        return self.hosts[name]

    def connect(self, host: Host) -> grpc.aio.Channel:
        self.opened.append(host.address)
        return grpc.aio.insecure_channel(host.address)


@pytest.fixture
async def simulated(tmp_path: Path) -> AsyncIterator[SimulatedHost]:
    async with served(SimulatedHost("b", tmp_path / "b.sock")) as host:  # type: ignore[abstract]
        yield host


@pytest.fixture
def directory(simulated: SimulatedHost) -> Directory:
    directory = Directory()
    directory.hosts["b"] = make_host("b", address=simulated.address)
    return directory


@pytest.fixture
async def clients(directory: Directory) -> AsyncIterator[HostClients]:
    made = HostClients(directory.lookup, directory.connect)
    yield made
    await made.close()


async def ask(clients: HostClients, host: str = "b", seconds: float = 10.0) -> host_pb2.Inventory:
    return await clients.call(
        host,
        lambda h: h.GetInventory,
        host_service_pb2.GetInventoryRequest(),
        timeout_seconds=seconds,
    )


async def unknown(clients: HostClients, **arguments: Any) -> DroverError:
    with pytest.raises(Transient) as caught:
        await ask(clients, **arguments)
    return caught.value.error


async def test_an_answer_comes_back_over_one_channel(
    clients: HostClients, simulated: SimulatedHost, directory: Directory
) -> None:
    simulated.put(make_domain())
    for _ in range(3):
        assert [d.name for d in (await ask(clients)).domains] == ["web1"]
    assert directory.opened == [simulated.address]


async def test_what_hostd_refuses_is_a_definite_answer(
    clients: HostClients, simulated: SimulatedHost
) -> None:
    simulated.refusal = DroverError(
        Reason.TARGET_LACKS_SPACE, "Full.", subject="hosts/b", metadata={"free": "0"}
    )
    with pytest.raises(DroverError) as caught:
        await ask(clients)
    assert (caught.value.reason, caught.value.message) == (Reason.TARGET_LACKS_SPACE, "Full.")
    assert caught.value.metadata == {"free": "0"}


async def test_a_host_whose_libvirt_is_away_is_asked_again(
    clients: HostClients, simulated: SimulatedHost
) -> None:
    simulated.refusal = DroverError(Reason.LIBVIRT_UNAVAILABLE, "libvirtd restarts.")
    assert (await unknown(clients)).reason is Reason.LIBVIRT_UNAVAILABLE


async def test_silence_is_not_an_answer(clients: HostClients, simulated: SimulatedHost) -> None:
    simulated.delay_seconds = 30.0
    error = await unknown(clients, seconds=0.2)
    assert error.reason is Reason.HOST_UNREACHABLE
    assert "DEADLINE_EXCEEDED" in error.message


async def test_a_closed_port_is_not_an_answer(
    clients: HostClients, directory: Directory, tmp_path: Path
) -> None:
    directory.hosts["b"] = make_host("b", address=f"unix:{tmp_path}/nobody.sock")
    error = await unknown(clients)
    assert (error.reason, error.subject) == (Reason.HOST_UNREACHABLE, "hosts/b")


async def test_an_error_that_hostd_did_not_give_is_not_an_answer(
    clients: HostClients, directory: Directory, tmp_path: Path
) -> None:
    stranger = grpc.aio.server()
    directory.hosts["b"] = make_host("b", address=f"unix:{tmp_path}/stranger.sock")
    stranger.add_insecure_port(directory.hosts["b"].address)
    await stranger.start()
    try:
        assert "UNIMPLEMENTED" in (await unknown(clients)).message
    finally:
        await stranger.stop(0)


async def test_a_call_cut_off_by_a_restart_is_not_an_answer(
    directory: Directory, clients: HostClients, tmp_path: Path
) -> None:
    restarting = SimulatedHost("b", tmp_path / "restarting.sock")  # type: ignore[abstract]
    restarting.delay_seconds = 30.0
    directory.hosts["b"] = make_host("b", address=restarting.address)
    async with served(restarting):
        call = asyncio.create_task(unknown(clients, seconds=20.0))
        async with asyncio.timeout(60):
            while not restarting.asked:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert (await call).reason is Reason.HOST_UNREACHABLE


async def test_an_operators_word_ends_the_asking(
    clients: HostClients, directory: Directory, simulated: SimulatedHost
) -> None:
    directory.hosts["b"] = replace(
        directory.hosts["b"], state=HostState.GONE, state_reason="burnt down"
    )
    with pytest.raises(DroverError) as caught:
        await ask(clients)
    assert caught.value.reason is Reason.HOST_GONE
    assert "burnt down" in caught.value.message
    assert simulated.asked == []


async def test_unknown_and_unjoined_hosts(clients: HostClients, directory: Directory) -> None:
    with pytest.raises(DroverError) as caught:
        await ask(clients, host="zz")
    assert caught.value.reason is Reason.HOST_NOT_FOUND
    directory.hosts["c"] = make_host("c", address="", state=HostState.JOINING)
    assert (await unknown(clients, host="c")).reason is Reason.HOST_UNREACHABLE


async def test_a_host_that_joined_anew_gets_a_new_channel(
    clients: HostClients, directory: Directory, tmp_path: Path
) -> None:
    await ask(clients)
    moved = SimulatedHost("b", tmp_path / "moved.sock")  # type: ignore[abstract]
    moved.put(make_domain("elsewhere"))
    async with served(moved):
        directory.hosts["b"] = replace(directory.hosts["b"], address=moved.address)
        assert [d.name for d in (await ask(clients)).domains] == ["elsewhere"]
    assert len(directory.opened) == 2


async def test_a_host_has_to_prove_its_name(tmp_path: Path) -> None:
    pki = TestPki(tmp_path / "pki")
    simulated = SimulatedHost("b", tmp_path / "b.sock")  # type: ignore[abstract]
    server = grpc.aio.server()
    add_HostServiceServicer_to_server(simulated, server)
    port = server.add_secure_port("127.0.0.1:0", pki.host("b").server_credentials())
    await server.start()
    directory = Directory()
    for name in ("b", "c"):
        directory.hosts[name] = make_host(name, address=f"127.0.0.1:{port}")
    made = HostClients(directory.lookup, tls_channels(pki.fleet, pki.controlplane()))
    try:
        assert (await ask(made)).facts.name == "b"
        assert (await unknown(made, host="c")).reason is Reason.HOST_UNREACHABLE
        assert simulated.asked == ["GetInventory"]
    finally:
        await made.close()
        await server.stop(0)
