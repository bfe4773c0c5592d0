"""A stranger at one end, and diskmover at the other."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.diskmover import stranger, tool
from tests.diskmover.conftest import Certs
from tests.diskmover.stranger import frames
from tests.diskmover.tool import Ended, Serve

MIB = 1 << 20
CHUNKS = 145


def disk(path: Path) -> Path:
    """A segment of zeros, one that begins with noise, and one that is short."""
    noise = random.Random(1)
    with path.open("wb") as file:
        for at, size in ((64, 8 * MIB), (128, 6 * MIB), (CHUNKS - 1, 70_000)):
            file.seek(at * MIB)
            file.write(noise.randbytes(size))
    return path


def write(path: Path, at: int, content: bytes) -> None:
    """Change a disk."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


class Stranger:
    """Attempts of a stranger to send a file to a receiver."""

    def __init__(self, serve: Serve, certs: Certs, source: Path) -> None:
        self._serve = serve
        self._tls = stranger.context(False, *certs.paths("c"), certs.ca)
        self.source = source
        self.target = serve.root / source.name

    def opens(
        self, *, changed: int = 1, since: tuple[str, Iterable[int]] | None = None
    ) -> stranger.Sender:
        """An attempt, once the receiver has noticed the end of the one before."""
        end = time.monotonic() + tool.PATIENCE_SECONDS
        while True:
            wire = stranger.dial(self._serve.address, self._tls)
            sender = stranger.Sender(wire, self.source, self.source.name)
            try:
                sender.open(changed=changed, since=since)
            except stranger.Told as told:
                wire.close()
                if told.code != frames.TARGET_BUSY or time.monotonic() > end:
                    raise
                time.sleep(0.02)
            else:
                return sender

    def is_right(self, sender: stranger.Sender, receipt: dict[str, object]) -> bool:
        """Whether the copy has arrived, and its receipt tells of it."""
        return tool.same(self.source, self.target) and receipt == {
            "volume_id": self.source.name,
            "size_bytes": self.source.stat().st_size,
            "data_bytes": stranger.data_bytes_of(self.source),
            "wire_bytes": frames.content_bytes(sender.wire.sent),
            "digest": stranger.digest_of(self.source),
            "mode": "verbatim",
            "allocated_bytes": self.target.stat().st_blocks * 512,
        }


def kinds(heard: list[frames.Frame]) -> Counter[int]:
    """How many frames of content there are, by their kind."""
    return Counter(frame.kind for frame in heard if frame.kind in frames.CONTENT)


def sent_to_a_stranger(
    certs: Certs,
    *push: str | Path,
    volume: stranger.Volume | None = None,
    at_most: int | None = None,
    corrupt: int = 0,
) -> tuple[Ended, stranger.Volume, stranger.Wire]:
    """Push to a stranger's receiver.

    Args:
        certs: Of both.
        push: What to push, and further options.
        volume: What the stranger has of it.
        at_most: Frames of content after which he calls it off.
        corrupt: Frames of content that he takes for corrupt.

    Returns:
        How the push ended, what the stranger has now, and what was said.
    """
    tls = stranger.context(True, *certs.paths("b"), certs.ca)
    arrived = volume or stranger.Volume()
    wires: list[stranger.Wire] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def receive() -> None:
            raw, _ = listener.accept()
            raw.settimeout(60)
            wires.append(wire := stranger.Wire(tls.wrap_socket(raw, server_side=True)))
            stranger.serve_one(wire, arrived, at_most=at_most, corrupt=corrupt)
            while (late := wire.receive()) is not None:
                assert at_most is not None or late.kind == frames.ERROR, "it goes on after the end"
            wire.close()

        thread = threading.Thread(target=receive)
        thread.start()
        address = "{}:{}".format(*listener.getsockname())
        options = ["--to", address, "--connections", "1", "--json", *certs.options("a")]
        pushed = tool.run("push", *push, *options)
        thread.join(60)
    return pushed, arrived, wires[0]
