"""Build the guest's disk image from Debian packages, without root's loop mounts.

    MBR | FAT: syslinux, kernel, initramfs (busybox) | ext4: data with checksums

The kernel comes from the package that `linux-image-cloud-amd64` depends on; it
is downloaded and unpacked, never installed. Images are cached by the content of
this recipe and their parameters, and must be copied before use.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SECTOR_BYTES = 512
MIB = 1024 * 1024
BOOT_START_BYTES = MIB
BOOT_SIZE_BYTES = 28 * MIB
MBR_CODE = Path("/usr/lib/syslinux/mbr/mbr.bin")
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "evdev",
    "button",
)
_HERE = Path(__file__).parent
CACHE = _HERE.parents[2] / "build" / "lab"


@dataclass(frozen=True)
class Recipe:
    """What varies between images.

    Attributes:
        data_mib: Random-looking and compressible data in the data partition, in MiB.
        free_mib: Free space of the data partition, in MiB.
        command_line: Added to the kernel's; "drover.ignore_acpi" makes the guest
            ignore the power button.
    """

    data_mib: int = 24
    free_mib: int = 24
    command_line: str = ""

    @property
    def key(self) -> str:
        """Changes with everything that the image is made of."""
        digest = hashlib.sha256(repr(self).encode())
        for source in (_HERE / "init", Path(__file__)):
            digest.update(source.read_bytes())
        return digest.hexdigest()[:16]


def build_image(recipe: Recipe = Recipe()) -> Path:  # a frozen value
    """The raw image for a recipe, built if it is not there yet.

    Of several that ask at the same time one builds and the others wait for it.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    image = CACHE / f"guest-{recipe.key}.raw"
    if image.exists():
        return image
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not image.exists():
            _build(image, recipe)
    return image


def _build(image: Path, recipe: Recipe) -> None:
    work = CACHE / f"work-{recipe.key}-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        boot = _boot_partition(work, recipe)
        data = _data_partition(work, recipe)
        part = work / "disk.raw"
        _assemble(part, boot, data)
        part.rename(image)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _kernel() -> Path:
    """The unpacked kernel package."""
    unpacked = CACHE / "kernel"
    if unpacked.exists():
        return unpacked
    depends = _run("apt-cache", "depends", "linux-image-cloud-amd64").splitlines()
    package = next(line.split()[1] for line in depends if "Depends:" in line)
    work = CACHE / f"kernel-{os.getpid()}"
    work.mkdir(parents=True)
    _run("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package, cwd=work)
    _run("dpkg", "-x", str(next(work.glob("*.deb"))), str(work / "root"))
    (work / "root").rename(unpacked)
    shutil.rmtree(work)
    return unpacked


def _boot_partition(work: Path, recipe: Recipe) -> Path:
    kernel = _kernel()
    image = work / "boot.fat"
    with image.open("wb") as file:
        file.truncate(BOOT_SIZE_BYTES)
    _run("mkfs.vfat", "-F", "16", "-h", str(BOOT_START_BYTES // SECTOR_BYTES), str(image))
    # The kernel's tests of its ciphers take a sixth of an emulated boot.
    config = work / "syslinux.cfg"
    config.write_text(
        "SERIAL 0 115200\nPROMPT 0\nTIMEOUT 1\nDEFAULT drover\nLABEL drover\n"
        "  KERNEL vmlinuz\n  INITRD initrd.gz\n"
        f"  APPEND console=ttyS0 quiet loglevel=3 panic=1 cryptomgr.notests {recipe.command_line}\n"
    )
    initrd = work / "initrd.gz"
    initrd.write_bytes(gzip.compress(_initramfs(kernel), 1, mtime=0))
    vmlinuz = next((kernel / "boot").glob("vmlinuz-*"))
    for source, name in ((vmlinuz, "vmlinuz"), (initrd, "initrd.gz"), (config, "syslinux.cfg")):
        _run("mcopy", "-i", str(image), str(source), f"::{name}")
    _run("syslinux", "--install", str(image))
    return image


def _initramfs(kernel: Path) -> bytes:
    """A newc archive: busybox, the init script and the modules in loading order."""
    archive = bytearray()
    inode = 0

    def add(name: str, mode: int, content: bytes = b"") -> None:
        nonlocal inode
        inode += 1
        encoded = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        archive.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        archive.extend(bytes(-len(archive) % 4))
        archive.extend(content)
        archive.extend(bytes(-len(archive) % 4))

    for folder in ("bin", "dev", "proc", "sys", "etc", "modules"):
        add(folder, 0o040755)
    add("bin/busybox", 0o100755, Path("/bin/busybox").read_bytes())
    add("init", 0o100755, (_HERE / "init").read_bytes())
    add("modules/order", 0o100644, " ".join(MODULES).encode())
    for module in MODULES:
        found = next((kernel / "lib" / "modules").rglob(f"{module}.ko"))
        add(f"modules/{module}.ko", 0o100644, found.read_bytes())
    add("TRAILER!!!", 0)
    return bytes(archive)


def _data_partition(work: Path, recipe: Recipe) -> Path:
    tree = work / "data"
    tree.mkdir()
    sums = []
    for number, content in enumerate(_files(recipe)):
        name = f"file-{number:03}"
        (tree / name).write_bytes(content)
        sums.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    (tree / "SHA256SUMS").write_text("".join(sums))
    image = work / "data.ext4"
    size_mib = recipe.data_mib + recipe.free_mib + 8
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "0"}
    _run(
        "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", "-d", str(tree),
        str(image), f"{size_mib}M", env=environment,
    )  # fmt: skip
    return image


def _files(recipe: Recipe) -> Iterator[bytes]:
    """Files of 2 MiB, of which about half compresses; the same for the same recipe."""
    generator = random.Random(20261123)
    for _ in range(max(1, recipe.data_mib // 2)):
        noise = generator.randbytes(MIB)
        words = generator.randbytes(1024)
        yield noise + words * (MIB // len(words))


def _assemble(image: Path, boot: Path, data: Path) -> None:
    """Put MBR and partitions together; zeros become holes."""
    data_start = BOOT_START_BYTES + BOOT_SIZE_BYTES
    entries = (
        (0x80, 0x0E, BOOT_START_BYTES, BOOT_SIZE_BYTES),
        (0x00, 0x83, data_start, data.stat().st_size),
    )
    table = b"".join(
        struct.pack(
            "<B3sB3sII", flag, b"\xfe\xff\xff", kind, b"\xfe\xff\xff",
            start // SECTOR_BYTES, size // SECTOR_BYTES,
        )
        for flag, kind, start, size in entries
    )  # fmt: skip
    code = MBR_CODE.read_bytes()[:440].ljust(446, b"\0")
    with image.open("wb") as file:
        file.truncate(data_start + data.stat().st_size)
        file.write(code + table + bytes(32) + b"\x55\xaa")
    for part, start in ((boot, BOOT_START_BYTES), (data, data_start)):
        _run(
            "dd", f"if={part}", f"of={image}", "bs=1M", f"seek={start // MIB}",
            "conv=notrunc,sparse", "status=none",
        )  # fmt: skip


def _run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=env, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}")
    return done.stdout
