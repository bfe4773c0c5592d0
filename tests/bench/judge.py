"""What is wrong with what was measured, in words; nothing when all is as it should be.

Every tool has to make true copies. Drover has to keep its promises as well: memory that
does not grow with the disk, a page cache left to the guests, sparse disks that stay so.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.bench.copying import Result
from tests.bench.place import Place
from tests.bench.row import Failure, Row

_MIB = 1 << 20
_RSS = 300 * _MIB
_CACHED = 256 * _MIB
_DISK = 1.02  # of what the source takes
_BLOCKS = _MIB  # and so much for blocks of the file system, which count where there is no data


def faults(row: Row) -> list[str]:
    """What is wrong with a row; each run of it counts."""
    head = f"{row.place.title}: {row.tool.name}: "
    return [head + words for run in row.runs for words in _of_run(row, run.result)]


def failed(failure: Failure) -> str | None:
    """That a copy was not made; where links are cut, tools may give up."""
    if failure.place.shape.cut_seconds:
        return None
    return f"{failure.place.title}: {failure.tool.name}: {failure.why}"


def _of_run(row: Row, result: Result) -> Iterator[str]:
    if not result.identical:
        yield "the target is not what the source is"
    if "hash" not in row.tool.promises:  # only Drover makes them
        return
    sides = {"sender": result.sender_rss_bytes, "receiver": result.receiver_rss_bytes}
    for side, took in sides.items():
        if took >= _RSS:
            yield f"the {side} took {_mib(took)} of memory; below {_mib(_RSS)} are promised"
    if result.cached_bytes >= _CACHED:
        stayed = _mib(result.cached_bytes)
        yield f"{stayed} stayed in the page cache; below {_mib(_CACHED)} are promised"
    yield from _of_disk(row.place, result.allocated_bytes)


def _of_disk(place: Place, taken: int) -> Iterator[str]:
    """Blocks of an older copy are taken as they lie there: then nothing can be said."""
    source = place.image.allocated_bytes
    if place.older is None and taken > max(source * _DISK, source + _BLOCKS):
        share = taken / max(source, 1)
        yield f"the target takes {share:.3f} of the source's disk; {_DISK} is promised"


def _mib(count: int) -> str:
    return f"{count / _MIB:.0f} MiB"
