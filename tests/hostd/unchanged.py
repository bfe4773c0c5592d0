"""Proof that a refusal changed nothing: both hosts before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.hostd.fleet import HostdHost, TwoHosts
from tests.lab.host import IMAGES


@dataclass(frozen=True)
class Snapshot:
    """Everything on a host that a move could change.

    Attributes:
        domains: Definition and state of each domain.
        files: Path, mode, inode and kind of everything below the storage root.
        moves: What hostd itself has put aside for moves.
        parked: Ids of the moves that have a machine parked here.
    """

    domains: dict[str, tuple[str, str]]
    files: list[str]
    moves: list[str]
    parked: list[str]

    @classmethod
    def of(cls, host: HostdHost) -> Snapshot:
        """What is on a host now."""
        find = ("find", IMAGES, "-mindepth", "1")
        moves = host.host.path("/var/lib/drover/moves")
        return cls(
            domains={
                uuid: (
                    host.host.virsh("dumpxml", "--inactive", "--security-info", uuid),
                    host.host.state(uuid),
                )
                for uuid in host.host.virsh("list", "--all", "--uuid").split()
            },
            # A running guest writes to its disk: its size and time say nothing then.
            files=sorted(host.host.run(*find, "-printf", "%p %m %i %y\n").splitlines()),
            moves=sorted(path.name for path in moves.iterdir()) if moves.exists() else [],
            parked=sorted(parked.migration_id for parked in host.inventory().parked),
        )


@contextmanager
def both_unchanged(fleet: TwoHosts) -> Iterator[None]:
    """Both hosts are after the block as they were before it."""
    before = {name: Snapshot.of(host) for name, host in fleet.hosts.items()}
    yield
    for name, host in fleet.hosts.items():
        assert Snapshot.of(host) == before[name], f"host {name} changed"
