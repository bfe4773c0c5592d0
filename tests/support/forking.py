"""A fork that a test process with gRPC in it survives."""

from __future__ import annotations

import gc
import os


def fork() -> int:
    """Like `os.fork`; the child never collects what the parent left as garbage.

    Among that may be channels and servers of gRPC, which other tests have dropped.
    Freeing them waits for threads that the child does not have: it hangs or dies.
    """
    child = os.fork()
    if child == 0:
        gc.freeze()
    return child
