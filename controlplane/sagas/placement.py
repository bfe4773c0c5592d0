"""The list of candidates of a move as targets refuse it: data in, data out."""

from __future__ import annotations

from collections.abc import Iterable

from controlplane.common.errors import DroverError
from controlplane.domain.names import host_name
from controlplane.v1 import migration_pb2


def refuse_host(
    placement: migration_pb2.Placement, host: str, why: DroverError
) -> migration_pb2.Placement:
    """A copy of the placement in which the host no longer fits, with the reason, ranked last."""
    after = migration_pb2.Placement()
    after.CopyFrom(placement)
    after.chosen_host = ""
    verdicts = list(after.verdicts)
    for verdict in verdicts:
        if verdict.host == host_name(host):
            verdict.fits = False
            verdict.weight = 0.0
            verdict.reason = why.reason.name
            verdict.message = why.message
    kept = [v for v in verdicts if v.fits]
    refused = [v for v in verdicts if not v.fits]
    ranked = [migration_pb2.HostVerdict.FromString(v.SerializeToString()) for v in kept + refused]
    del after.verdicts[:]
    after.verdicts.extend(ranked)
    return after


def with_warnings(
    placement: migration_pb2.Placement, warnings: Iterable[str]
) -> migration_pb2.Placement:
    """A copy of the placement with these warnings, each once and in this order, and no others."""
    after = migration_pb2.Placement()
    after.CopyFrom(placement)
    after.warnings[:] = dict.fromkeys(warnings)
    return after


def next_candidate(placement: migration_pb2.Placement) -> str:
    """The best host that still fits, by its bare name; empty when none is left."""
    return next((v.host.partition("/")[2] for v in placement.verdicts if v.fits), "")
