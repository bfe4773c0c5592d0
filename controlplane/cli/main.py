"""Entry point of the `drover` command.

What can happen at any instant is dealt with before the command is even loaded,
which takes long enough for a user to press Ctrl-C.
"""

from __future__ import annotations

import os
import sys

_INTERRUPTED = 130


def main() -> None:
    """Run the command and exit with a code of `controlplane.cli.errors`."""
    # gRPC would log to standard error what the command explains itself.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    _open_closed_streams()
    try:
        from controlplane.cli.root import run

        code = run()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        code = _INTERRUPTED
    _drop_what_cannot_be_written()
    sys.exit(code)


def _open_closed_streams() -> None:
    """Stand in for streams that the caller has closed (`>&-`): there is nobody to tell."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 open to the end


def _drop_what_cannot_be_written() -> None:
    """Keep Python from failing once more, at its end, over output that has failed before."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
