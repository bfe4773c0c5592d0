"""The connection to libvirtd: opened when it is needed, and again after it broke.

    (none) --get()--> open --close callback, dead socket, close()--> (none)

libvirt wants its event loop registered before the first connection of a process;
keepalive replies and the close callback depend on that loop. One daemon thread
runs it for all connections of the process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import libvirt
import structlog

from controlplane.common.errors import DroverError
from hostd.libvirt.errors import is_connection_trouble, translate

log = structlog.stdlib.get_logger(__name__)

# A daemon that hangs is noticed after about interval * (count + 1) seconds.
_KEEPALIVE_SECONDS = 5
_KEEPALIVE_COUNT = 3

_loop_lock = threading.Lock()
_loop_running = False


def _ensure_event_loop() -> None:
    global _loop_running  # libvirt's loop is global to the process as well
    with _loop_lock:
        if _loop_running:
            return
        # Errors reach us as exceptions; libvirt would print them to stderr too.
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True).start()
        _loop_running = True


def _run_event_loop() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError:
            # The edge of a thread that nobody joins; the loop must not end.
            log.exception("the event loop of libvirt met an error")


class LibvirtConnection:
    """A connection that mends itself. May be used by several threads at once.

    Args:
        uri: libvirt connection URI.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._lock = threading.Lock()
        self._connection: libvirt.virConnect | None = None

    @property
    def uri(self) -> str:
        """The connection URI."""
        return self._uri

    @property
    def connected(self) -> bool:
        """True while a connection is open and its daemon answers keepalives."""
        with self._lock:
            return _is_alive(self._connection)

    @contextmanager
    def get(self, subject: str = "libvirt") -> Iterator[libvirt.virConnect]:
        """Lend the connection, opening it first if need be.

        A libvirt error that leaves the block becomes a DroverError. A connection
        that broke is opened anew by the next call, not by this one: whether an
        interrupted operation happened is for the caller to find out.

        Args:
            subject: What the errors are about, as "domains/<uuid>".

        Raises:
            DroverError: LIBVIRT_UNAVAILABLE, or what the block met.
        """
        connection = self._open(subject)
        try:
            yield connection
        except libvirt.libvirtError as error:
            if is_connection_trouble(error):
                self._drop(connection)
            raise translate(error, subject) from error
        except DroverError as error:
            if isinstance(error.__cause__, libvirt.libvirtError) and is_connection_trouble(
                error.__cause__
            ):
                self._drop(connection)
            raise

    def close(self) -> None:
        """Close the connection; `get` opens a new one."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(libvirt.libvirtError):
                connection.unregisterCloseCallback()
            with suppress(libvirt.libvirtError):
                connection.close()

    def _open(self, subject: str) -> libvirt.virConnect:
        _ensure_event_loop()
        with self._lock:
            if self._connection is not None and _is_alive(self._connection):
                return self._connection
            try:
                connection = libvirt.open(self._uri)
                connection.registerCloseCallback(self._closed, None)
                with suppress(libvirt.libvirtError):
                    # Drivers inside this process have no keepalive, and need none.
                    connection.setKeepAlive(_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT)
            except libvirt.libvirtError as error:
                raise translate(error, subject) from error
            self._connection = connection
            log.info("connected to libvirt", uri=self._uri)
            return connection

    def _closed(self, connection: libvirt.virConnect, reason: int, _opaque: object) -> None:
        log.warning("the connection to libvirt was closed", uri=self._uri, why=reason)
        self._drop(connection)

    def _drop(self, connection: libvirt.virConnect) -> None:
        with self._lock:
            if self._connection is connection:
                self._connection = None


def _is_alive(connection: libvirt.virConnect | None) -> bool:
    if connection is None:
        return False
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False
