"""The Rust core; `diskmover` is the documented API over it."""

from collections.abc import Sequence
from os import PathLike
from typing import Literal

from diskmover.errors import MoverError

_Path = str | PathLike[str]
_Tls = tuple[_Path, _Path, _Path]
# root, name
_Seed = tuple[_Path, str]
# (volume_id, root, name), size_bytes, (mode, uid, gid),
# (device_state, paranoid, readback, seeds, qcow2, update, accept_degraded)
_Incoming = tuple[
    tuple[str, _Path, str],
    int,
    tuple[int | None, int | None, int | None],
    tuple[_Path | None, bool, bool | None, Sequence[_Seed], bool, bool, bool],
]
# address, name, content_id, (bitmap, since)
_Nbd = tuple[str, str, str | None, tuple[str | None, str] | None]
# volume_id, path, export, size_bytes
_Outgoing = tuple[str, _Path | None, _Nbd | None, int | None]
# expected, low, high
_Eta = tuple[float | None, float | None, float | None]
# done, total, resumed, wire, rate, eta, limited_by, connections, unreadable
Progress = tuple[int, int, int, int, int, _Eta, str, int, int]
# volume_id, size, data, zero, wire, chunk_size, digest, mode, unreadable, allocated
Receipt = tuple[str, int, int, int, int, int, str, str, list[tuple[int, int]], int | None]

class Receiver:
    def __init__(
        self,
        listen: str,
        tls: _Tls,
        max_sessions: int,
        max_connections: int,
        buffer_bytes: int,
        volume_memory_bytes: int,
        idle_timeout_seconds: float,
        io_priority: str,
    ) -> None: ...
    def address(self) -> str: ...
    def open_session(
        self, session_id: str, key: bytes, sender: str, volumes: Sequence[_Incoming], tag: str
    ) -> None: ...
    def session_status(
        self, session_id: str
    ) -> tuple[str, Progress, list[Receipt], MoverError | None]: ...
    def close_session(self, session_id: str) -> None: ...
    def serve_names(
        self,
        root: _Path,
        devices: dict[str, _Path],
        paranoid: bool,
        readback: bool | None,
        seeds: Sequence[_Seed],
        qcow2: bool,
        update: bool,
    ) -> None: ...
    def take_ended(self) -> list[tuple[str, str, list[Receipt], MoverError | None]]: ...
    def close(self) -> None: ...

class Push:
    def __init__(
        self,
        to: str,
        receiver: str | None,
        tls: _Tls,
        session_id: str,
        key: bytes,
        tag: str,
        volumes: Sequence[_Outgoing],
        connections: int | None,
        limit_bytes_per_second: int | None,
        compression: int | Literal["adaptive"] | None,
        holes: str,
        buffer_bytes: int,
        reconnect_timeout_seconds: float,
        io_priority: str,
        on_read_error: str,
        despite_lock: bool,
    ) -> None: ...
    def progress(self) -> Progress: ...
    def cancel(self) -> None: ...
    def set_limit(self, limit_bytes_per_second: int | None) -> None: ...
    def wait(self, timeout: float | None) -> list[Receipt] | None: ...

def reserve(root: _Path, name: str, tag: str, size_bytes: int, allocate: bool) -> None: ...
def discard(root: _Path, name: str, tag: str) -> None: ...
def discard_device(state: _Path, name: str, tag: str) -> None: ...
def discard_published(root: _Path, name: str, tag: str) -> bool: ...
def digest(path: _Path | None, nbd: _Nbd | None) -> tuple[int, int, int, int, str]: ...
def take_notes() -> list[str]: ...
def open_beneath(root: _Path, name: str, flags: int, mode: int) -> int: ...
def error_codes() -> list[tuple[str, bool]]: ...
