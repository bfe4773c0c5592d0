"""sd_notify: tell systemd how a daemon is doing."""

from __future__ import annotations

import os
import socket


def notify(*states: str) -> None:
    """Send states such as "READY=1"; does nothing when systemd did not start us."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.connect(address)
        channel.sendall("\n".join(states).encode())
