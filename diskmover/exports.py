"""NBD exports as the core takes them."""

from __future__ import annotations

from pathlib import Path

from diskmover.model import NbdExport

# address, name, content_id, (bitmap, since)
CoreExport = tuple[str, str, str | None, tuple[str | None, str] | None]


def core_source(source: Path | NbdExport) -> tuple[Path | None, CoreExport | None]:
    """A source as a path or an export, the other one None."""
    if not isinstance(source, NbdExport):
        return (source, None)
    changes = (source.changes.bitmap, source.changes.since) if source.changes else None
    return (None, (source.address, source.name, source.content_id, changes))
