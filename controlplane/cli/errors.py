"""Errors as the user sees them, and the exit codes that scripts rely on.

==== ==================================================================
code meaning
==== ==================================================================
0    done
1    it was tried and failed, or a bug
2    the command line or its values are wrong
3    something named does not exist
4    refused in the present state: nothing was changed
5    the control plane cannot be reached or did not answer in time
6    not known to the control plane, or not allowed
130  interrupted with Ctrl-C
==== ==================================================================
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import IO, Any

import click
import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from controlplane.cli.output import visible
from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason

OK = 0
FAILED = 1
USAGE = 2
NOT_FOUND = 3
REFUSED = 4
UNAVAILABLE = 5
DENIED = 6
INTERRUPTED = 130

EXIT_CODES_HELP = (
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 refused in the present "
    "state, 5 control plane unavailable, 6 not allowed, 130 interrupted."
)

_C = grpc.StatusCode
_EXIT_CODES: dict[grpc.StatusCode, int] = {
    _C.INVALID_ARGUMENT: USAGE,
    _C.OUT_OF_RANGE: USAGE,
    _C.NOT_FOUND: NOT_FOUND,
    _C.ALREADY_EXISTS: REFUSED,
    _C.FAILED_PRECONDITION: REFUSED,
    _C.ABORTED: REFUSED,
    _C.RESOURCE_EXHAUSTED: REFUSED,
    _C.UNAVAILABLE: UNAVAILABLE,
    _C.DEADLINE_EXCEEDED: UNAVAILABLE,
    _C.PERMISSION_DENIED: DENIED,
    _C.UNAUTHENTICATED: DENIED,
}


def exit_code_of(code: grpc.StatusCode) -> int:
    """The exit code for a gRPC status code."""
    return _EXIT_CODES.get(code, FAILED)


class CliError(click.ClickException):
    """An error that ends the command.

    Attributes:
        exit_code: See the table of this module.
        details: Further lines, one thing that stands in the way each.
        advice: What to do next; may be several lines.
        reason: The API's reason, if it is an error of the API.
    """

    def __init__(
        self,
        message: str,
        *,
        exit_code: int = FAILED,
        details: Sequence[str] = (),
        advice: str = "",
        reason: Reason | None = None,
    ) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # one class, many codes
        self.details = tuple(details)
        self.advice = advice
        self.reason = reason

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it on standard error."""
        stream = file or sys.stderr
        red = click.style("error:", fg="red", bold=True) if stream.isatty() else "error:"
        symbol = f" [{self.reason.name}]" if self.reason else ""
        click.echo(f"{red} {visible(self.message)}{symbol}", file=stream)
        for line in self.details:
            click.echo(f"  {visible(line)}", file=stream)
        if self.advice:
            click.echo(self.advice, file=stream)


def from_drover_error(error: DroverError) -> CliError:
    """Show an error of the API."""
    return CliError(
        error.message,
        exit_code=exit_code_of(error.code),
        details=_violation_lines(error),
        advice=error.reason.info.help,
        reason=error.reason,
    )


def from_status(status: status_pb2.Status) -> CliError:
    """Show the error that a resource carries."""
    error = DroverError.from_status(status)
    return from_drover_error(error) if error else CliError(status.message or "unknown error")


def from_rpc_error(error: grpc.RpcError, *, server: str) -> CliError:
    """Show why a call failed.

    Args:
        error: What grpc raised; it is a call with code and details.
        server: Address that was called, for the message.
    """
    call: Any = error
    status = rpc_status.from_call(call)
    known = DroverError.from_status(status) if status is not None else None
    if known is not None:
        return from_drover_error(known)
    code, text = call.code(), call.details() or ""
    if code is _C.UNAVAILABLE:
        return _unreachable(server, text)
    if code is _C.DEADLINE_EXCEEDED:
        return CliError(f"{server} did not answer in time.", exit_code=UNAVAILABLE)
    return CliError(f"{server} answered {code.name}: {text}", exit_code=exit_code_of(code))


def _unreachable(server: str, text: str) -> CliError:
    if "CERTIFICATE_VERIFY_FAILED" in text or "Hostname Verification" in text:
        return CliError(
            f"{server} showed a certificate that is not the control plane's of this fleet.",
            exit_code=DENIED,
            details=[text],
            advice="Check the address, the CA file and server_name in the configuration.",
        )
    return CliError(
        f"The control plane at {server} cannot be reached.",
        exit_code=UNAVAILABLE,
        details=[text],
        advice="Check that drover-controlplane runs there (`systemctl status drover-controlplane`),"
        "\nthat the address is right and that your certificate has not expired.",
    )


def _violation_lines(error: DroverError) -> list[str]:
    lines = [
        (v.subject.removeprefix("hosts/") if v.subject.startswith("hosts/") else v.subject, v)
        for v in error.violations
        if v.description.strip() != error.message.strip()
    ]
    subject_width = max((len(subject) for subject, _ in lines), default=0)
    type_width = max((len(v.type) for _, v in lines), default=0)
    return [
        "  ".join(
            part
            for part in (
                subject.ljust(subject_width),
                v.type.ljust(type_width) if type_width else "",
                v.description,
            )
            if part
        )
        for subject, v in lines
    ]
