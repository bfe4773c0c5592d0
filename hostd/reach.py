"""Whether this host can reach the data port of another one.

Asked before a guest is stopped: a port that a firewall closes would be found out only
when the machine is parked and its copy cannot begin.
"""

from __future__ import annotations

import socket

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.config import is_address
from hostd.v1 import preflight_pb2

_CONNECT_SECONDS = 3.0


def check_reach(here: str, data_address: str) -> preflight_pb2.PreflightReport:
    """Connect once, and hang up.

    Args:
        here: Name of this host, for the message.
        data_address: HOST:PORT.

    Raises:
        DroverError: INVALID_FIELD.
    """
    if not is_address(data_address):
        raise DroverError(
            Reason.INVALID_FIELD,
            f"data_address is {data_address!r}; it has to be HOST:PORT.",
            subject="data_address",
        )
    host, _, port = data_address.rpartition(":")
    check = preflight_pb2.PreflightCheck(check="data-port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        check.outcome = preflight_pb2.PreflightCheck.OUTCOME_FAIL
        check.reason = Reason.TARGET_UNREACHABLE.name
        why = error.strerror or str(error)
        check.message = f"{here} cannot connect to the data port {data_address}: {why}."
        check.fix = f"Let {here} connect to {data_address}; see that drover-hostd listens there."
    else:
        check.outcome = preflight_pb2.PreflightCheck.OUTCOME_PASS
        check.message = f"{here} reaches the data port {data_address}."
    return preflight_pb2.PreflightReport(checks=[check])
