"""A guest whose QEMU has stopped answering holds up nothing but itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import libvirt
import pytest

from controlplane.common.errors import DroverError
from hostd.disks.roots import StorageRoots
from hostd.libvirt import domains, power
from hostd.libvirt.conn import LibvirtConnection
from hostd.v1 import domain_pb2
from tests.hostd.guests import Guest, guest_with_disks
from tests.hostd.private_host import virsh

pytestmark = pytest.mark.lab


@contextmanager
def hung(guest: Guest) -> Iterator[None]:
    """Stop the guest's QEMU as a disk that never answers would."""
    pid = int(Path(f"/run/libvirt/qemu/{guest.name}.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def ends(work: Callable[[], object], seconds: float = 20.0) -> bool:
    """True when blocking work ends in time; a thread that does not is left behind."""

    def quietly() -> None:
        # What waits for a QEMU ends with it, and says so.
        with suppress(DroverError):
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def test_the_inventory_goes_on_and_names_it(
    conn: libvirt.virConnect, roots: StorageRoots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(power, "HUNG_AFTER_MILLISECONDS", 500)
    guest, other = guest_with_disks("hangs"), guest_with_disks("lives")
    virsh("start", guest.uuid)
    dom = domains.find(conn, guest.uuid)
    buttons = LibvirtConnection("qemu:///system")
    with hung(guest):
        # The first one to press the button finds out, and waits.
        with buttons.get() as another:
            button = domains.find(another, guest.uuid)
        assert not ends(lambda: power.request_shutdown(button), seconds=1)
        assert ends(lambda: power.request_shutdown(dom))
        listed: list[domain_pb2.Domain] = []
        assert ends(lambda: listed.extend(domains.describe_all(conn, roots)))
        assert [d.uuid for d in listed] == [guest.uuid, other.uuid]
        assert "does not answer" in listed[0].obstacles[0]
        assert list(listed[1].obstacles) == []
    assert ends(lambda: power.force_off(dom))
    buttons.close()
