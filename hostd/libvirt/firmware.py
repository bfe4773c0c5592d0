"""Which firmware image of this host a machine from elsewhere may have."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

# Files of packages, which everybody may read. Elsewhere a path that another host names
# could hand any file of this host to the guest.
_PACKAGE_FILES = ("/usr/share", "/usr/lib", "/usr/local/share")


def loader_problem(path: str, known: Collection[str]) -> str:
    """Why a firmware image cannot be used here; empty when it can, or when none is named.

    Args:
        path: As in the definition.
        known: The images that libvirt here lists.
    """
    if not path:
        return ""
    if not path.startswith("/"):
        return f"The firmware image {path!r} is given without a full path."
    if not Path(path).is_file():
        return f"The firmware image {path} is not here."
    if path in known or is_package_file(path):
        return ""
    return f"{path} is none of the firmware images that libvirt here knows."


def is_package_file(path: str) -> bool:
    """True for a place where packages put files that everybody may read."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(place) for place in _PACKAGE_FILES)
