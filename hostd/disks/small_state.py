"""NVRAM and TPM state: moving them between their places and a captured domain.

They may lie on another file system than the disks and are small, so they are
copied; the original goes only after its copy is durable, and never half.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hostd.disks.durable import copy_file, copy_tree, remove_tree, sync_directory
from hostd.libvirt.capture import NVRAM, TPM, copy_small_state

_GOING = ".drover-parked"


def set_aside_small_state(machine: Path, nvram: str, tpm: str, *, refresh: bool) -> None:
    """Remove the originals, their copies in `machine` brought up to date first.

    Args:
        machine: The captured domain.
        nvram: Where the NVRAM file belongs; empty without one.
        tpm: Where the TPM state belongs; empty without any.
        refresh: Whether the originals, where they exist, are whole and can only
            be newer. False when libvirt may have removed a part.

    Raises:
        OSError: They cannot be moved.
    """
    if refresh:
        copy_small_state(machine, _path(nvram), _path(tpm))
    if nvram:
        with suppress(FileNotFoundError):
            Path(nvram).unlink()
            sync_directory(Path(nvram).parent)
    if tpm:
        original = Path(tpm)
        going = original.with_name(original.name + _GOING)
        # Renamed first: an original that exists is always whole.
        remove_tree(going)
        with suppress(FileNotFoundError):
            original.rename(going)
            sync_directory(original.parent)
        remove_tree(going)


def put_back_small_state(machine: Path, nvram: str, tpm: str, *, replace_tpm: bool = False) -> None:
    """Copy NVRAM and TPM state from `machine` to where they belong.

    What lies there already is whole and at least as new, and is left alone. So is
    what is not in `machine`: a person has put it back by hand.

    Args:
        machine: The captured domain.
        nvram: Where the NVRAM file belongs; empty without one.
        tpm: Where the TPM state belongs; empty without any.
        replace_tpm: Replace TPM state that may be there in part.

    Raises:
        OSError: They cannot be copied.
    """
    if nvram and (machine / NVRAM).exists() and not Path(nvram).exists():
        Path(nvram).parent.mkdir(parents=True, exist_ok=True)
        copy_file(machine / NVRAM, Path(nvram))
    if tpm and (machine / TPM).is_dir() and (replace_tpm or not Path(tpm).exists()):
        Path(tpm).parent.mkdir(parents=True, exist_ok=True)
        remove_tree(Path(tpm))
        copy_tree(machine / TPM, Path(tpm))


def remove_small_state(nvram: str, tpm: str) -> None:
    """Delete NVRAM and TPM state where they belong; nothing when they are gone."""
    if nvram:
        Path(nvram).unlink(missing_ok=True)
    if tpm:
        remove_tree(Path(tpm))


def _path(text: str) -> Path | None:
    return Path(text) if text else None
