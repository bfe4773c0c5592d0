"""NVRAM and TPM state: moving them between their places and a captured domain.

They may lie on another file system than the disks and are small, so they are
copied to travel. The originals are renamed meanwhile, where they are: putting them
back needs no room that may be gone by then.
"""

from __future__ import annotations

from pathlib import Path

from hostd.disks.durable import copy_file, copy_tree, remove_tree, sync_directory
from hostd.libvirt.capture import NVRAM, TPM, copy_small_state


def set_aside_small_state(
    machine: Path, nvram: str, tpm: str, *, aside: str, refresh: bool
) -> None:
    """Rename the originals, their copies in `machine` brought up to date first.

    Args:
        machine: The captured domain.
        nvram: Where the NVRAM file belongs; empty without one.
        tpm: Where the TPM state belongs; empty without any.
        aside: Who sets them aside; part of the names that they get.
        refresh: Whether the originals, where they exist, are whole and can only
            be newer. False when libvirt may have removed a part; then they are
            deleted, and the copies are what counts.

    Raises:
        OSError: They cannot be moved.
    """
    if refresh:
        copy_small_state(machine, _path(nvram), _path(tpm))
    for original in _paths(nvram, tpm):
        if original.exists():
            # Renamed first: an original that exists is always whole.
            going = aside_name(original, aside)
            _remove(going)
            original.rename(going)
            sync_directory(original.parent)
        if not refresh:
            _remove(aside_name(original, aside))


def put_back_small_state(
    machine: Path, nvram: str, tpm: str, *, aside: str = "", replace_tpm: bool = False
) -> None:
    """Bring NVRAM and TPM state back to where they belong, from aside or from `machine`.

    What lies there already is whole and at least as new, and is left alone. So is
    what is not in `machine`: a person has put it back by hand.

    Args:
        machine: The captured domain.
        nvram: Where the NVRAM file belongs; empty without one.
        tpm: Where the TPM state belongs; empty without any.
        aside: Who set the originals aside; empty when nobody did.
        replace_tpm: Replace TPM state that may be there in part.

    Raises:
        OSError: They cannot be put there.
    """
    if replace_tpm and tpm and (machine / TPM).is_dir():
        remove_tree(Path(tpm))
    for original in _paths(nvram, tpm):
        if aside and not original.exists() and aside_name(original, aside).exists():
            aside_name(original, aside).rename(original)
            sync_directory(original.parent)
    if nvram and (machine / NVRAM).exists() and not Path(nvram).exists():
        Path(nvram).parent.mkdir(parents=True, exist_ok=True)
        copy_file(machine / NVRAM, Path(nvram))
    if tpm and (machine / TPM).is_dir() and not Path(tpm).exists():
        Path(tpm).parent.mkdir(parents=True, exist_ok=True)
        copy_tree(machine / TPM, Path(tpm))
    if aside:
        drop_small_state_aside(nvram, tpm, aside=aside)


def drop_small_state_aside(nvram: str, tpm: str, *, aside: str) -> None:
    """Delete what was set aside; nothing when it is gone.

    Raises:
        OSError: It cannot be deleted.
    """
    for original in _paths(nvram, tpm):
        _remove(aside_name(original, aside))


def aside_name(original: Path, by: str) -> Path:
    """Where NVRAM or TPM state waits while `by` has set it aside."""
    return original.with_name(f"{original.name}.drover-parked-{by}")


def remove_small_state(nvram: str, tpm: str) -> None:
    """Delete NVRAM and TPM state where they belong; nothing when they are gone."""
    for original in _paths(nvram, tpm):
        _remove(original)


def _paths(*texts: str) -> list[Path]:
    return [Path(text) for text in texts if text]


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _remove(path: Path) -> None:
    if path.is_dir():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)
