"""Changing disk images with qemu-img; formats are always given, never probed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import BinaryIO

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.qcow2 import Qcow2Error, read_header

_TIMEOUT_SECONDS = 120


def grow(path: Path, format_: str, wanted_bytes: int) -> bool:
    """Make the disk that the guest sees at least this large.

    Args:
        path: The image.
        format_: "raw" or "qcow2".
        wanted_bytes: The size.

    Returns:
        True when it grew; False when it was large enough. It never shrinks.

    Raises:
        DroverError: BUILD_FAILED with qemu-img's words, DISK_IO_ERROR.
    """
    if virtual_size_bytes(path, format_) >= wanted_bytes:
        return False
    _qemu_img("resize", "-f", format_, str(path), str(wanted_bytes))
    return True


def set_backing_file(path: Path, backing: Path, backing_format: str) -> bool:
    """Make a qcow2 overlay point to where its backing file lies here.

    Args:
        path: The overlay.
        backing: The backing file.
        backing_format: Its format.

    Returns:
        True when the overlay was changed; False when it pointed there already.

    Raises:
        DroverError: BUILD_FAILED with qemu-img's words, DISK_IO_ERROR.
    """
    named = _backing_name(path)
    if named is not None and os.path.realpath(path.parent / named) == os.path.realpath(backing):
        return False
    _qemu_img(
        "rebase", "-u", "-f", "qcow2", "-b", str(backing), "-F", backing_format, str(path)
    )  # fmt: skip
    return True


def virtual_size_bytes(path: Path, format_: str) -> int:
    """Size of the disk that the guest sees.

    Raises:
        DroverError: DISK_IO_ERROR, DISK_CORRUPT.
    """
    with _opened(path) as file:
        if format_ != "qcow2":
            return os.fstat(file.fileno()).st_size
        try:
            return read_header(file.fileno()).virtual_size_bytes
        except Qcow2Error as error:
            raise DroverError(Reason.DISK_CORRUPT, f"{path}: {error}.") from error


def _backing_name(path: Path) -> str | None:
    with _opened(path) as file:
        try:
            return read_header(file.fileno()).backing_file
        except Qcow2Error as error:
            raise DroverError(Reason.DISK_CORRUPT, f"{path}: {error}.") from error


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DroverError(
            Reason.DISK_IO_ERROR, f"{path} cannot be opened: {error.strerror}."
        ) from error


def _qemu_img(*arguments: str) -> None:
    try:
        subprocess.run(
            ["qemu-img", *arguments],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode("utf-8", "replace").strip().removeprefix("qemu-img: ")
        raise DroverError(
            Reason.BUILD_FAILED, f"qemu-img {arguments[0]} failed: {said.rstrip('.')}."
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DroverError(
            Reason.BUILD_FAILED, f"qemu-img {arguments[0]} did not end: {error}."
        ) from error
