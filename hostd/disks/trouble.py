"""What a file that cannot be used means to a caller of Drover."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def io_trouble(subject: str, *, full: Reason = Reason.DISK_IO_ERROR) -> Iterator[None]:
    """Let OSErrors leave the block as DroverError, with the file's name.

    Args:
        subject: What the work is about.
        full: The reason when no block is free.
    """
    try:
        yield
    except OSError as error:
        reason = full if error.errno in FULL else Reason.DISK_IO_ERROR
        raise DroverError(
            reason,
            f"{error.filename or 'A file'} cannot be used: {error.strerror}.",
            subject=subject,
        ) from error
