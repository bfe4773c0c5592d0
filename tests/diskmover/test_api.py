"""The Python package: its tables, its types, and what it promises."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

import diskmover
from diskmover import (
    ErrorCode,
    IncomingVolume,
    MoverError,
    OutgoingVolume,
    Push,
    Receiver,
    SessionState,
    TlsFiles,
    _core,
)
from diskmover.model import IoPriority
from tests.diskmover import tool
from tests.diskmover.conftest import Certs

KEY = bytes(range(32))


def _tls(certs: Certs, name: str) -> TlsFiles:
    return TlsFiles(*certs.paths(name), certs.ca)


def test_the_two_tables_of_errors_are_one() -> None:
    rust = dict(_core.error_codes())
    assert list(rust) == [code.value for code in ErrorCode]
    for name, retryable in rust.items():
        assert MoverError(name, "x", retryable=retryable).code.value == name


def test_every_code_is_explained() -> None:
    source = Path(diskmover.errors.__file__).read_text()
    for code in ErrorCode:
        after = source.split(f'{code.name} = "{code.value}"\n')[1].lstrip()
        assert after.startswith('"""'), code


def test_everything_exported_exists_and_is_documented() -> None:
    for name in diskmover.__all__:
        assert getattr(diskmover, name).__doc__, name


@pytest.mark.parametrize(("priority", "shown"), [("low", "best-effort: prio 7"), ("idle", "idle")])
def test_a_copy_has_the_io_priority_that_was_asked_for(
    priority: IoPriority, shown: str, certs: Certs, tmp_path: Path
) -> None:
    source = tool.noise(tmp_path / "source", 3 << 20)
    before = _io_priorities()
    with Receiver("127.0.0.1:0", _tls(certs, "b"), io_priority=priority) as receiver:
        volume = IncomingVolume("vda", tmp_path, "target", source.stat().st_size)
        receiver.open_session("s", KEY, sender="diskmover://a", volumes=[volume], tag="t")
        tool.eventually("the receiver has it", lambda: _priorities_since(before) == {shown})
        receiving = _io_priorities() - before
        push = Push(
            to=receiver.address,
            receiver="diskmover://b",
            tls=_tls(certs, "a"),
            session_id="s",
            key=KEY,
            tag="t",
            volumes=[OutgoingVolume("vda", source)],
            limit_bytes_per_second=1 << 20,
            io_priority=priority,
        )
        while push.progress().done_bytes == 0:
            assert push.wait(0.01) is None
        tool.eventually("all threads have it", lambda: _priorities_since(before) == {shown})
        copying = _io_priorities() - before
        push.cancel()
    # Both ends read and write with several threads.
    assert len(copying) >= len(receiving) + 2 + 2 + 1


def _priorities_since(before: set[tuple[str, str]]) -> set[str]:
    return {of for _, of in _io_priorities() - before}


def _io_priorities() -> set[tuple[str, str]]:
    """Threads of this process that are there now, each with its I/O priority."""
    threads = os.listdir("/proc/self/task")
    told = [
        (thread, subprocess.run(["ionice", "-p", thread], capture_output=True, text=True).stdout)
        for thread in threads
    ]
    return {(thread, line.strip()) for thread, line in told if line}


def test_a_session_from_opening_to_receipt(certs: Certs, tmp_path: Path) -> None:
    source = tool.noise(tmp_path / "source", 3 << 20)
    size = source.stat().st_size
    with Receiver("127.0.0.1:0", _tls(certs, "b")) as receiver:
        receiver.open_session(
            "s",
            KEY,
            sender="diskmover://a",
            volumes=[IncomingVolume("vda", tmp_path, "target", size, mode=0o640)],
            tag="t",
        )
        assert receiver.session_status("s").state is SessionState.WAITING
        push = Push(
            to=receiver.address,
            receiver="diskmover://b",
            tls=_tls(certs, "a"),
            session_id="s",
            key=KEY,
            tag="t",
            volumes=[OutgoingVolume("vda", source, size)],
        )
        receipts = push.wait()
        assert receipts == push.wait(0)
        status = receiver.session_status("s")
        assert status.state is SessionState.DONE
        assert list(status.receipts) == receipts
        assert push.progress().done_bytes == push.progress().total_bytes == size
        receiver.close_session("s")
        with pytest.raises(MoverError, match="no session") as unknown:
            receiver.session_status("s")
        assert unknown.value.code is ErrorCode.SESSION_UNKNOWN
    assert tool.same(source, tmp_path / "target")
    assert (tmp_path / "target").stat().st_mode & 0o7777 == 0o640


def test_errors_are_data(certs: Certs, tmp_path: Path) -> None:
    with pytest.raises(MoverError) as missing:
        Push(
            to="127.0.0.1:1",
            receiver=None,
            tls=_tls(certs, "a"),
            session_id="s",
            key=KEY,
            tag="t",
            volumes=[OutgoingVolume("vda", tmp_path / "nothing")],
        )
    error = missing.value
    assert (error.code, error.volume_id, error.side) == (ErrorCode.SOURCE_MISSING, "vda", "sender")
    assert not error.retryable
    assert str(error) == f"SOURCE_MISSING: {tmp_path}/nothing does not exist (volume vda)"


@pytest.mark.parametrize(
    "change",
    [
        {"key": b"short"},
        {"connections": 0},
        {"connections": 65},
        {"limit_bytes_per_second": 0},
        {"volumes": []},
        {"session_id": ""},
        {"reconnect_timeout_seconds": -1.0},
        {"reconnect_timeout_seconds": float("nan")},
        {"holes": "some"},
    ],
)
def test_impossible_arguments_are_refused(
    change: dict[str, object], certs: Certs, tmp_path: Path
) -> None:
    source = tool.noise(tmp_path / "source", 10)
    arguments: dict[str, object] = {
        "to": "127.0.0.1:1",
        "receiver": None,
        "tls": _tls(certs, "a"),
        "session_id": "s",
        "key": KEY,
        "tag": "t",
        "volumes": [OutgoingVolume("vda", source)],
    }
    with pytest.raises(MoverError) as refused:
        Push(**(arguments | change))  # type: ignore[arg-type]
    assert refused.value.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo", "size"])
def test_sources_that_are_no_disks_are_refused(kind: str, certs: Certs, tmp_path: Path) -> None:
    path = tmp_path / "source"
    if kind == "symlink":
        path.symlink_to(tool.noise(tmp_path / "real", 10))
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        tool.noise(path, 10)
    with pytest.raises(MoverError) as refused:
        Push(
            to="127.0.0.1:1",
            receiver=None,
            tls=_tls(certs, "a"),
            session_id="s",
            key=KEY,
            tag="t",
            volumes=[OutgoingVolume("vda", path, 11)],
        )
    assert refused.value.code is ErrorCode.SOURCE_INVALID


def test_waiting_leaves_other_python_threads_running(certs: Certs, tmp_path: Path) -> None:
    push = Push(
        to="127.0.0.1:1",
        receiver=None,
        tls=_tls(certs, "a"),
        session_id="s",
        key=KEY,
        tag="t",
        volumes=[OutgoingVolume("vda", tool.noise(tmp_path / "source", 10))],
        reconnect_timeout_seconds=600,
    )
    ran = threading.Event()
    threading.Timer(0.05, ran.set).start()
    assert push.wait(0.5) is None
    assert ran.is_set()
    push.cancel()
    push.cancel()
    with pytest.raises(MoverError) as cancelled:
        push.wait()
    assert cancelled.value.code is ErrorCode.CANCELLED


def test_reservations_are_kept_used_and_discarded(tmp_path: Path) -> None:
    diskmover.reserve(tmp_path, "disk", "t", 8 << 20, allocate=True)
    diskmover.reserve(tmp_path, "disk", "t", 8 << 20, allocate=True)
    part = tool.part_of(tmp_path, "disk")
    assert part is not None
    assert part.stat().st_blocks * 512 >= 8 << 20
    diskmover.discard(tmp_path, "disk", "t")
    diskmover.discard(tmp_path, "disk", "t")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "disk").write_bytes(b"precious")
    with pytest.raises(MoverError) as taken:
        diskmover.reserve(tmp_path, "disk", "t", 10, allocate=False)
    assert taken.value.code is ErrorCode.TARGET_EXISTS
    assert not diskmover.discard_published(tmp_path, "disk", "t")
    assert (tmp_path / "disk").read_bytes() == b"precious"


def test_paths_stay_beneath_their_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("x")
    (root / "link").symlink_to("../secret")
    (root / "file").write_text("y")
    for name in ("../secret", "link", str(tmp_path / "secret")):
        with pytest.raises(MoverError) as refused:
            diskmover.open_beneath(root, name, os.O_RDONLY)
        assert refused.value.code is ErrorCode.TARGET_PATH
    descriptor = diskmover.open_beneath(root, "file", os.O_RDONLY)
    assert os.read(descriptor, 10) == b"y"
    os.close(descriptor)
    with pytest.raises(FileNotFoundError):
        diskmover.open_beneath(root, "nothing", os.O_RDONLY)
