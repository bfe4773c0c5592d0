"""Directories that a move made on its target, so that they go again with what it put there.

Each is noted before it is made. One that several moves use is noted by each of them:
it goes with the last that is taken back, and stays with the first that stays.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import diskmover
from controlplane.common.reasons import Reason
from diskmover import MoverError
from hostd.disks.trouble import io_trouble
from hostd.state import StateFile
from hostd.transfer import mover_error


class MadeDirectories:
    """The directories of all moves. All methods block.

    Args:
        state: Where they are noted.
    """

    def __init__(self, state: StateFile) -> None:
        self._state = state

    def make_parents(self, migration_id: str, root: Path, name: str) -> None:
        """Make the directories between a root and a file, following no symlink.

        Args:
            migration_id: The move that needs them.
            root: Directory that the file will lie beneath.
            name: Path of the file relative to it.

        Raises:
            DroverError: DISK_OUTSIDE_ROOTS when a symlink is on the way,
                TARGET_LACKS_SPACE, DISK_IO_ERROR.
        """
        subject = f"migrations/{migration_id}"
        try:
            with io_trouble(subject, full=Reason.TARGET_LACKS_SPACE):
                for directory in reversed(PurePosixPath(name).parents[:-1]):
                    self._make(migration_id, root, directory)
        except MoverError as error:
            raise mover_error(error, subject) from error

    def _make(self, migration_id: str, root: Path, directory: PurePosixPath) -> None:
        with _parent(root, directory) as parent:
            if _is_there(parent, directory.name) and not self._is_noted(root, directory):
                # Somebody else's.
                return
            self._note(migration_id, root, directory)
            with suppress(FileExistsError):
                os.mkdir(directory.name, 0o755, dir_fd=parent)

    def remove(self, migration_id: str) -> None:
        """Remove those of a move's directories in which nothing is left.

        Raises:
            DroverError: One cannot be removed.
        """
        with io_trouble(f"migrations/{migration_id}"):
            # The deepest first.
            for root, directory in sorted(self._of(migration_id), key=lambda d: -len(d[1].parts)):
                _remove_if_empty(root, directory)
        self.forget(migration_id)

    def forget(self, migration_id: str) -> None:
        """Leave a move's directories to the machine that stays in them."""
        with self._state.transaction() as tx:
            tx.execute("DELETE FROM made_directory WHERE migration_id=?", (migration_id,))

    def _is_noted(self, root: Path, directory: PurePosixPath) -> bool:
        with self._state.transaction() as tx:
            row = tx.execute(
                "SELECT 1 FROM made_directory WHERE root=? AND name=?", (str(root), str(directory))
            ).fetchone()
        return row is not None

    def _note(self, migration_id: str, root: Path, directory: PurePosixPath) -> None:
        with self._state.transaction() as tx:
            tx.execute(
                "INSERT OR IGNORE INTO made_directory VALUES (?, ?, ?)",
                (migration_id, str(root), str(directory)),
            )

    def _of(self, migration_id: str) -> list[tuple[Path, PurePosixPath]]:
        with self._state.transaction() as tx:
            rows = tx.execute(
                "SELECT root, name FROM made_directory WHERE migration_id=?", (migration_id,)
            ).fetchall()
        return [(Path(row["root"]), PurePosixPath(row["name"])) for row in rows]


@contextmanager
def _parent(root: Path, directory: PurePosixPath) -> Iterator[int]:
    opened = diskmover.open_beneath(root, str(directory.parent), os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield opened
    finally:
        os.close(opened)


def _is_there(parent: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _remove_if_empty(root: Path, directory: PurePosixPath) -> None:
    try:
        with _parent(root, directory) as parent:
            os.rmdir(directory.name, dir_fd=parent)
    except MoverError:
        # A symlink has taken the place of one of its parents: it is not the one we made.
        return
    except OSError as error:
        # Gone, or somebody else has put something into it or mounted something on it.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EBUSY):
            raise
