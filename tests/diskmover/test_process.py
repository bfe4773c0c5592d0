"""What the library promises the process that it runs in: forks, descriptors, the end."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from diskmover import (
    ErrorCode,
    IncomingVolume,
    MoverError,
    OutgoingVolume,
    Push,
    Receiver,
    TlsFiles,
    digest,
)
from tests.diskmover import tool
from tests.diskmover.conftest import Certs
from tests.support.forking import fork

KEY = bytes(range(32))
MIB = 1 << 20
SLOW = 1 * MIB  # bytes a second: it is still under way when it is looked at


def tls(certs: Certs, name: str) -> TlsFiles:
    return TlsFiles(*certs.paths(name), certs.ca)


def receiver_of(certs: Certs) -> Receiver:
    return Receiver("127.0.0.1:0", tls(certs, "b"))


def open_session(receiver: Receiver, root: Path, size: int, session: str = "s") -> None:
    volume = IncomingVolume("vda", root, f"target-{session}", size)
    receiver.open_session(session, KEY, sender="diskmover://a", volumes=[volume], tag="t")


def push_to(
    address: str, certs: Certs, source: Path, limit: int | None = None, session: str = "s"
) -> Push:
    return Push(
        to=address,
        receiver="diskmover://b",
        tls=tls(certs, "a"),
        session_id=session,
        key=KEY,
        tag="t",
        volumes=[OutgoingVolume("vda", source)],
        limit_bytes_per_second=limit,
        reconnect_timeout_seconds=600,
    )


def under_way(receiver: Receiver, certs: Certs, folder: Path) -> Push:
    """A slow copy of which something has arrived."""
    source = tool.noise(folder / "source", 64 * MIB)
    open_session(receiver, folder, source.stat().st_size)
    push = push_to(receiver.address, certs, source, SLOW)
    tool.eventually("it is under way", lambda: push.progress().done_bytes > 0)
    return push


# --- forks --------------------------------------------------------------------


def in_a_fork(act: Callable[[], str]) -> str:
    """What `act` says in a child of this process, which has to end by itself."""
    reader, writer = os.pipe()
    child = fork()
    if child == 0:
        try:
            said = act()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    end = time.monotonic() + tool.PATIENCE_SECONDS
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("the child hangs")
        time.sleep(0.02)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    assert ended == (child, 0), said
    return said


def test_in_a_fork_nothing_of_the_parent_is_waited_for(certs: Certs, tmp_path: Path) -> None:
    with receiver_of(certs) as receiver:
        push = under_way(receiver, certs, tmp_path)
        volume = IncomingVolume("vda", tmp_path, "other", MIB)
        uses: dict[str, Callable[[], object]] = {
            "push.progress": push.progress,
            "push.cancel": push.cancel,
            "push.set_limit": lambda: push.set_limit(None),
            "push.wait": push.wait,
            "push.wait a while": lambda: push.wait(0.1),
            "address": lambda: receiver.address,
            "open_session": lambda: receiver.open_session(
                "s2", KEY, sender="diskmover://a", volumes=[volume], tag="t2"
            ),
            "session_status": lambda: receiver.session_status("s"),
            "close_session": lambda: receiver.close_session("s"),
            "serve_names": lambda: receiver.serve_names(tmp_path),
            "take_ended": receiver.take_ended,
            "close": receiver.close,
        }
        pid = os.getpid()
        for name, use in uses.items():

            def refused(use: Callable[[], object] = use) -> str:
                use()
                return "it did something"

            said = in_a_fork(refused)
            kind = "Push" if name.startswith("push") else "Receiver"
            assert said.startswith(f"RuntimeError: this {kind} belongs to process {pid}, "), said
            assert "make another one here" in said
        # And none of it touched what the parent has.
        push.set_limit(None)
        assert push.wait(tool.PATIENCE_SECONDS) is not None
    assert tool.same(tmp_path / "source", tmp_path / "target-s")


def test_dropped_in_a_fork_they_end_nothing_and_wait_for_nobody(
    certs: Certs, tmp_path: Path
) -> None:
    receivers = [receiver_of(certs)]
    pushes = [under_way(receivers[0], certs, tmp_path)]

    def drop() -> str:
        before = sys.getrefcount(receivers[0]), sys.getrefcount(pushes[0])
        receivers.clear()
        pushes.clear()
        gc.collect()
        return f"dropped {before}"

    assert in_a_fork(drop) == "dropped (2, 2)", "something else held them"
    pushes[0].set_limit(None)
    assert pushes[0].wait(tool.PATIENCE_SECONDS) is not None
    receivers[0].close()
    assert tool.same(tmp_path / "source", tmp_path / "target-s")


def test_a_fork_may_make_its_own(certs: Certs, tmp_path: Path) -> None:
    with receiver_of(certs) as receiver:
        push = under_way(receiver, certs, tmp_path)
        source = tool.noise(tmp_path / "small", 3 * MIB)

        def copy() -> str:
            with receiver_of(certs) as own:
                open_session(own, tmp_path, 3 * MIB, "child")
                mine = push_to(own.address, certs, source, session="child")
                receipts = mine.wait(tool.PATIENCE_SECONDS)
                return receipts[0].digest if receipts else "nothing"

        assert in_a_fork(copy) == digest(source).digest
        push.cancel()
    assert tool.same(source, tmp_path / "target-child")


# --- threads ------------------------------------------------------------------

FEW_THREADS = """
import os, resource, sys
from pathlib import Path
from diskmover import IncomingVolume, MoverError, OutgoingVolume, Push, Receiver, TlsFiles
certs, folder = Path(sys.argv[1]), Path(sys.argv[2])
tls = {n: TlsFiles(certs / f"{n}.pem", certs / f"{n}.key", certs / "ca.pem") for n in "ab"}

def copy(session):
    with Receiver("127.0.0.1:0", tls["b"]) as receiver:
        volume = IncomingVolume("vda", folder, f"target-{session}", 3 << 20)
        receiver.open_session(session, bytes(32), sender="diskmover://a", volumes=[volume], tag="t")
        push = Push(to=receiver.address, receiver="diskmover://b", tls=tls["a"], tag="t",
                    session_id=session, key=bytes(32), reconnect_timeout_seconds=1,
                    volumes=[OutgoingVolume("vda", folder / "source")])
        return push.wait(30)

COUNTS = [1, 2, 3, 4, 5, 7, 9, 11, 13, 15, 17, 19, 22, 60]
for threads in COUNTS:
    child = os.fork()
    if child == 0:
        # Nobody has this user id, and of root's processes there may be any number.
        resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))
        os.setgid(54321)
        os.setuid(54321)
        try:
            print("done" if copy(f"s{threads}") else "HANGS", flush=True)
        except MoverError as error:
            print(error.code, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_without_threads_a_copy_fails_and_does_not_hang(certs: Certs, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shutil.copytree(certs.directory, folder / "certs")
        tool.noise(folder / "source", 3 * MIB)
        for path in (folder, folder / "certs", *folder.rglob("*")):
            os.chown(path, 54321, 54321)
        ended = subprocess.run(
            [sys.executable, "-c", FEW_THREADS, str(folder / "certs"), made],
            capture_output=True, text=True, timeout=tool.PATIENCE_SECONDS * 3, check=False,
        )  # fmt: skip
    said = ended.stdout.split()
    assert (ended.returncode, len(said)) == (0, 14), ended
    assert said[0] == "LIMIT_EXCEEDED", said
    assert said[-1] == "done", said
    # A connection that got no thread is one that did not stand.
    kinds = {"LIMIT_EXCEEDED", "CONNECT_FAILED", "LINK_LOST", "SESSION_KEY_REPLAYED", "done"}
    assert set(said) <= kinds, said


# --- descriptors --------------------------------------------------------------


def descriptors() -> dict[str, str]:
    """What this process has open: number and what it leads to."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def failure(push: Push) -> ErrorCode:
    """The code that a copy fails with."""
    with pytest.raises(MoverError) as failed:
        push.wait(tool.PATIENCE_SECONDS)
    return failed.value.code


@pytest.mark.parametrize("end", ["cancelled", "done", "closed under it"])
def test_a_copy_that_is_over_has_nothing_open(end: str, certs: Certs, tmp_path: Path) -> None:
    gc.collect()  # what other tests have left
    before = descriptors()
    receiver = receiver_of(certs)
    push = under_way(receiver, certs, tmp_path)
    assert len(descriptors()) > len(before) + 4, "that is not how to count"
    if end == "cancelled":
        push.cancel()
    elif end == "done":
        push.set_limit(None)
        assert push.wait(tool.PATIENCE_SECONDS) is not None
    else:
        receiver.close_session("s")
        assert failure(push) is ErrorCode.SESSION_CLOSED
    receiver.close()
    del push, receiver
    gc.collect()  # what an error's traceback holds
    # Something of another test may be closed meanwhile; nothing may be there that is new.
    tool.eventually(
        f"all is closed: {descriptors().items() - before.items()}",
        lambda: descriptors().items() <= before.items(),
    )


# --- cancelling ---------------------------------------------------------------


def cancelled(push: Push) -> None:
    """Cancel from another thread: it must return, and the copy be cancelled."""
    thread = threading.Thread(target=push.cancel, daemon=True)
    thread.start()
    thread.join(tool.PATIENCE_SECONDS)
    assert not thread.is_alive(), "cancelling hangs"
    assert failure(push) is ErrorCode.CANCELLED


@pytest.mark.parametrize("answer", [b"", b"\x16\x03\x03\x40\x00"], ids=["silent", "half a record"])
def test_cancelled_while_a_peer_that_says_nothing_is_waited_for(
    answer: bytes, certs: Certs, tmp_path: Path
) -> None:
    source = tool.noise(tmp_path / "source", MIB)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        push = push_to("{}:{}".format(*listener.getsockname()), certs, source)
        peer, _ = listener.accept()
        with peer:
            assert peer.recv(1) == b"\x16"  # it has begun to shake hands
            peer.sendall(answer)
            cancelled(push)


def test_cancelled_while_nobody_answers(certs: Certs, tmp_path: Path) -> None:
    source = tool.noise(tmp_path / "source", MIB)
    push = push_to("127.0.0.1:1", certs, source)
    assert push.wait(0.2) is None
    cancelled(push)


def test_cancelled_while_it_is_under_way(certs: Certs, tmp_path: Path) -> None:
    with receiver_of(certs) as receiver:
        push = under_way(receiver, certs, tmp_path)
        cancelled(push)
        cancelled(push)
    assert not (tmp_path / "target-s").exists()


# --- the end ------------------------------------------------------------------

LIVE = """
import os, sys
from pathlib import Path
from diskmover import IncomingVolume, OutgoingVolume, Push, Receiver, TlsFiles
folder, certs, kept = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
tls = {n: TlsFiles(certs / f"{n}.pem", certs / f"{n}.key", certs / "ca.pem") for n in "ab"}
receiver = Receiver("127.0.0.1:0", tls["b"])
volume = IncomingVolume("vda", folder, "target", 64 << 20)
receiver.open_session("s", bytes(32), sender="diskmover://a", volumes=[volume], tag="t")
push = Push(to=receiver.address, receiver="diskmover://b", tls=tls["a"], session_id="s",
            key=bytes(32), tag="t", volumes=[OutgoingVolume("vda", folder / "source")],
            limit_bytes_per_second=1 << 20, reconnect_timeout_seconds=600)
while push.progress().done_bytes == 0:
    assert push.wait(0.01) is None
if kept == "cycle":
    circle = [push, receiver]
    circle.append(circle)
elif kept == "immortal":
    sys.modules["kept"] = [push, receiver]
    import ctypes
    for one in (push, receiver):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))
print("live", flush=True)
if kept == "error":
    raise SystemExit(7)
if kept == "fork" and (child := os.fork()):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.parametrize(
    ("kept", "code"), [("module", 0), ("cycle", 0), ("immortal", 0), ("fork", 0), ("error", 7)]
)
def test_an_interpreter_with_live_copies_ends_by_itself(
    kept: str, code: int, certs: Certs, tmp_path: Path
) -> None:
    tool.noise(tmp_path / "source", 64 * MIB)
    paths = [str(tmp_path), str(certs.directory)]
    command = [sys.executable, "-W", "error", "-c", LIVE, *paths, kept]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=tool.PATIENCE_SECONDS, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "live\n", "")
    assert not (tmp_path / "target").exists()
