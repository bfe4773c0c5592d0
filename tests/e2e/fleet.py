"""A lab with one guest that lives through all tests of a session.

    up() -> guest runs on a -> test -> guest runs on a or b -> test -> ...

What the tests believe is what the guest says on its console and what the leak
scanner finds, not what the control plane answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from controlplane.v1 import migration_pb2 as pb
from controlplane.v1 import migration_service_pb2 as api
from controlplane.v1.migration_service_pb2_grpc import MigrationServiceStub
from tests.lab.host import Host
from tests.lab.lab import Lab
from tests.lab.leaks import leaks
from tests.lab.process import Daemon, alive
from tests.lab.wait import wait_for

T = TypeVar("T")

GUEST = "web1"
# Some seconds for the 27 to 40 MB that the guest's disk takes on the wire.
SLOWLY = ("--limit", "4M")
State = pb.Migration
_RESTING = (
    State.STATE_AWAITING_CONFIRM,
    State.STATE_CONFIRMED,
    State.STATE_REVERTED,
    State.STATE_FAILED,
    State.STATE_CANCELLED,
    State.STATE_STUCK,
    State.STATE_ABANDONED,
)
_RECONNECT = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)


@dataclass
class Guest:
    """The guest, and what its next boot has to say.

    Attributes:
        uuid: libvirt UUID.
        boots: How often it has booted from the disk that it runs on.
        identity: MAC address, disk serial and UUID as the guest sees them.
    """

    uuid: str
    boots: int
    identity: str


class Fleet:
    """The lab, its guest, and the verbs of the tests.

    Args:
        directory: Of the lab.
        hosts: Names of its hosts.
        database_url: Database of the control plane; its own SQLite file if empty.
    """

    def __init__(
        self, directory: Path, hosts: tuple[str, ...] = ("a", "b", "c"), database_url: str = ""
    ) -> None:
        self.lab = Lab(directory, hosts, database_url)
        self.guest = Guest("", 0, "")
        self._channel: grpc.Channel | None = None

    # --- life ----------------------------------------------------------------

    def up(self) -> None:
        """Start everything anew; afterwards the guest runs on a and Drover knows it."""
        self._disconnect()
        self.lab.up()
        home = self.lab.hosts["a"]
        uuid = home.define_guest(GUEST)
        home.wait_for_console(GUEST, "DROVER READY", timeout_seconds=120)
        wait_for(lambda: self.lab.answers("instance", "show", GUEST), "adoption")
        self.guest = Guest(uuid, 1, _identity(home.console(GUEST)))

    def down(self) -> None:
        """Remove the lab without a trace."""
        self._disconnect()
        self.lab.down()

    def revive(self) -> None:
        """Start again what a test has left dead."""
        for host in self.lab.hosts.values():
            for daemon in (host.libvirtd, self.lab.hostds[host.name]):
                if not alive(daemon.pid):
                    daemon.start()
        if not alive(self.lab.controlplane.pid):
            self.lab.controlplane.start()

    def wait_until_clean(self) -> None:
        """Wait until the scanner finds nothing: what the last call did may still be written."""
        wait_for(
            lambda: not leaks(self.lab),
            "nothing left over",
            timeout_seconds=60,
            interval_seconds=0.5,
            explain=lambda: "; ".join(leaks(self.lab)),
        )

    # --- the API -------------------------------------------------------------

    def migrations(self) -> MigrationServiceStub:
        """The API, over one connection that heals."""
        if self._channel is None:
            pki = self.lab.pki
            names = ("ca.pem", "admin.key", "admin.pem")
            credentials = grpc.ssl_channel_credentials(*((pki / n).read_bytes() for n in names))
            server = self.lab.environment["DROVER_SERVER"]
            self._channel = grpc.secure_channel(server, credentials, _RECONNECT)
        return MigrationServiceStub(self._channel)

    def talk_to(self, port: int) -> None:
        """Talk to another replica of the control plane from now on."""
        self._disconnect()
        self.lab.api_port = port

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    # --- where things are ----------------------------------------------------

    @property
    def source(self) -> Host:
        """The host that the guest runs on."""
        return next(h for h in self.lab.hosts.values() if h.state(GUEST))

    @property
    def target(self) -> Host:
        """The host that the tests move it to."""
        return self.lab.hosts["b" if self.source.name == "a" else "a"]

    # --- moving --------------------------------------------------------------

    def migrate(self, *options: str, to: str = "") -> Move:
        """Start a move as a user does, and do not wait for it."""
        source, target = self.source, self.lab.hosts[to] if to else self.target
        self.forget_consoles()
        answer = self.lab.drover(
            "migrate", GUEST, "--host", target.name, "--no-wait", "-o", "json", *options
        )
        return Move(self, json.loads(answer)["name"], source, target, self.guest.boots)

    def forget_consoles(self) -> None:
        """Drop what the guest has said so far, so that what is waited for next is new."""
        for host in self.lab.hosts.values():
            host.forget_console(GUEST)

    def expect_boot(self, host: Host, number: int) -> None:
        """Wait until the guest has booted from its disk and found it whole.

        Args:
            host: Where it boots.
            number: How often it has, counted on the disk.
        """
        said = host.wait_for_console(
            GUEST, rf"DROVER BOOT n={number} (.|\n)*DROVER READY", timeout_seconds=120
        )
        assert re.findall(r"DROVER CHECK (\w+)", said) == ["ok"], said
        assert _identity(said) == self.guest.identity
        assert host.state(GUEST) == "running"
        others = [h for h in self.lab.hosts.values() if h is not host]
        assert [h.state(GUEST) for h in others] == [""] * len(others)
        self.guest.boots = number


@dataclass
class Move:
    """A move under way.

    Attributes:
        fleet: Where.
        name: Resource name.
        source: Host that the guest leaves.
        target: Host that it goes to.
        boots_before: How often the guest had booted from the disk that moves.
    """

    fleet: Fleet
    name: str
    source: Host
    target: Host
    boots_before: int

    @property
    def source_hostd(self) -> Daemon:
        """hostd on the source."""
        return self.fleet.lab.hostds[self.source.name]

    @property
    def target_hostd(self) -> Daemon:
        """hostd on the target."""
        return self.fleet.lab.hostds[self.target.name]

    # --- looking

    def look(self) -> pb.Migration | None:
        """The move now; None while the control plane does not answer."""
        try:
            return self.fleet.migrations().GetMigration(
                api.GetMigrationRequest(name=self.name), timeout=5
            )
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return None
            raise

    def wait_until(
        self, what: str, true: Callable[[pb.Migration], bool], timeout_seconds: float = 150.0
    ) -> pb.Migration:
        """Look at the move again and again until something is true of it."""
        seen: list[pb.Migration] = []

        def reached() -> pb.Migration | None:
            found = self.look()
            if found is None:
                return None
            seen[:] = [found]
            return found if true(found) else None

        return wait_for(
            reached,
            f"{self.name}: {what}",
            timeout_seconds=timeout_seconds,
            explain=lambda: f"{seen}\n{self.fleet.lab.controlplane.tail()}",
        )

    def wait_for_state(self, state: str) -> pb.Migration:
        """Wait for a state, and for no other that a move rests in."""
        wanted = State.State.Value(f"STATE_{state}")
        wanted_or_resting = {wanted, *_RESTING}
        found = self.wait_until(state, lambda m: m.state in wanted_or_resting)
        assert found.state == wanted, found
        return found

    def wait_for_mid_copy(self) -> pb.Migration:
        """Wait until a good part of the disk is durable on the target, and not all."""
        found = self.wait_until("in mid-copy", lambda m: copied(m) > 0.2)
        assert found.state == State.STATE_COPYING
        assert copied(found) < 0.9
        return found

    def wait_for_step(self, step: str) -> None:
        """Wait until a step has started."""
        self.wait_until(f"step {step}", lambda m: m.step == step)

    def wait_for_trouble(self) -> pb.Migration:
        """Wait until the control plane has noticed that something is wrong."""
        return self.wait_until("trouble seen", lambda m: m.HasField("error"))

    # --- what users do

    def confirm(self, *options: str) -> None:
        """`drover migration confirm`."""
        self.fleet.lab.drover("migration", "confirm", self.name, *options)

    def revert(self, *options: str) -> None:
        """`drover migration revert`."""
        self.source.forget_console(GUEST)
        self.fleet.lab.drover("migration", "revert", self.name, "--yes", *options)

    def cancel(self, *options: str) -> None:
        """`drover migration cancel`."""
        self.fleet.lab.drover("migration", "cancel", self.name, *options)

    # --- what is true afterwards

    def expect_moved(self) -> None:
        """The guest runs on the target with its data, after one boot."""
        self.wait_for_state("AWAITING_CONFIRM")
        self.fleet.expect_boot(self.target, self.boots_before + 1)

    def expect_back(self) -> None:
        """The guest runs on the source again, from the disk that it left there."""
        self.fleet.expect_boot(self.source, self.boots_before + 1)


def copied(move: pb.Migration) -> float:
    """The share of the disks that is on the target, 0 to 1."""
    total = move.progress.total_bytes
    return move.progress.done_bytes / total if total else 0.0


def _identity(said: str) -> str:
    found = re.search(r"DROVER BOOT .* (mac=\S+) (serial=\S+) .*(uuid=\S+)", said)
    assert found is not None, said
    return " ".join(found.groups())


@contextmanager
def dead(daemon: Daemon) -> Iterator[None]:
    """Kill a daemon without warning; it is started again after the block."""
    daemon.kill()
    yield
    daemon.start()
