"""The stand-alone tool: `diskmover serve`, `push`, `certs`, `digest`.

There is no control plane here, so there are no session keys: `serve` lets in
everybody who has a certificate of its CA. A file keeps its own name or the one
of --name, is placed directly in --root, and never over an existing file. The
same `push` again goes on where it stopped.

`push --nbd` sends a disk as its guest sees it, read from an NBD export:

    qemu-nbd --read-only --shared 8 --persistent --socket /run/web1.sock web1.qcow2
    diskmover push --nbd unix:/run/web1.sock --name web1.raw --to b:7443 ...

`serve --format qcow2` makes an image of it; `push --since --bitmap` sends what was
written since an earlier copy, to a receiver that runs with `serve --update`.

Exit codes: 0 done, 1 failed, 2 wrong usage, 5 out of reach (try again).
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import click

import diskmover
from diskmover import certs as authority
from diskmover.errors import ErrorCode, MoverError
from diskmover.model import Changes, NbdExport, OutgoingVolume, Progress, Receipt, TlsFiles
from diskmover.transfer import Push, Receiver

EXIT_FAILED = 1
EXIT_UNAVAILABLE = 5
EXIT_INTERRUPTED = 130
_NO_KEY = bytes(32)  # `serve` has no sessions: certificates decide
_RESTARTED = (ErrorCode.SESSION_UNKNOWN, ErrorCode.SESSION_CLOSED)
_ATTEMPTS = 10  # each ends with a restart of the receiver
_TAG = "open"  # and it makes the tag from the names of sender and file
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

_existing = click.Path(exists=True, dir_okay=False, path_type=Path)


class Rate(click.ParamType[int]):
    """Bytes a second: a number with K, M or G."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse "20M" and the like."""
        if isinstance(value, int):
            return value
        text = str(value).strip().upper()
        digits, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "")
        if not digits.isdigit() or int(digits) == 0:
            self.fail(f"{value!r} is not a rate such as 20M", param, ctx)
        return int(digits) * _UNITS[unit]


class Device(click.ParamType[tuple[str, Path]]):
    """A name for senders, and the block device behind it."""

    name = "device"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        """Parse "NAME=PATH"; links such as /dev/VG/LV are followed."""
        if isinstance(value, tuple):
            return value
        name, given, path = str(value).partition("=")
        if not name or not given or not Path(path).is_block_device():
            self.fail(f"{value!r} is not NAME=PATH of a block device", param, ctx)
        return name, Path(path).resolve()


class Export(click.ParamType[NbdExport]):
    """An NBD export: unix:PATH or tcp:HOST:PORT, and :NAME where it has one."""

    name = "export"
    _FORM = re.compile(r"(unix:[^:]+|tcp:(?:\[[^]]+\]|[^:]+):\d+)(?::(.*))?", re.DOTALL)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> NbdExport:
        """Parse "unix:/run/web1.sock:vda" and the like."""
        if isinstance(value, NbdExport):
            return value
        form = self._FORM.fullmatch(str(value))
        if form is None:
            self.fail(f"{value!r} is neither unix:PATH[:NAME] nor tcp:HOST:PORT[:NAME]", param, ctx)
        return NbdExport(form[1], form[2] or "")


def _tls_options(command: Any) -> Any:
    for option, help_ in (
        ("--ca", "Authority that peers must come from (PEM)."),
        ("--key", "Own private key (PEM)."),
        ("--cert", "Own certificate chain (PEM)."),
    ):
        command = click.option(option, type=_existing, required=True, help=help_)(command)
    return command


@click.group()
@click.version_option(package_name="drover", message="diskmover %(version)s")
def main() -> None:
    """Copy disk images between hosts: sparse, verified, resumable.

    \b
    Three steps, for hosts "one" (which has disk.qcow2) and "two":
      diskmover certs pki one two
          ... and bring pki/ca.pem, pki/two.pem and pki/two.key to "two"
      diskmover serve --root /var/lib/libvirt/images \\
          --cert two.pem --key two.key --ca ca.pem           # on "two"
      diskmover push disk.qcow2 --to two:7443 --peer two \\
          --cert pki/one.pem --key pki/one.key --ca pki/ca.pem

    Both ends prove who they are by certificates of one authority; nothing is
    ever sent in the clear. A file gets its name only when it is complete, durable
    and its digest is the source's. A copy that was stopped, on either side and in
    whatever way, goes on when the same `push` is run again.

    \b
    Exit codes:
      0    done
      1    failed; running it again as it is would fail again
      2    wrong usage
      5    out of reach, busy or broken off: run it again later
      130  interrupted
    """  # noqa: D301 - click wants the escape, not a raw string


@main.command()
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Directory that files are placed in.",
)
@click.option(
    "--listen",
    default="0.0.0.0:7443",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to listen; port 0 lets the system choose.",
)
@click.option(
    "--device",
    "devices",
    type=Device(),
    multiple=True,
    metavar="NAME=PATH",
    help="A block device that is overwritten when a sender pushes to NAME; may be repeated.",
)
@click.option(
    "--paranoid",
    is_flag=True,
    help="Going on after a break, hash all that is there, not only what came last.",
)
@click.option(
    "--readback",
    is_flag=True,
    help="Read everything back from the disk and compare before it is published.",
)
@click.option(
    "--seed",
    "seeds",
    multiple=True,
    metavar="NAME",
    help="A file in --root, such as a base image or an older copy, whose content is "
    "reused and not sent again; may be repeated.",
)
@click.option(
    "--format",
    "file_format",
    default="as-sent",
    show_default=True,
    type=click.Choice(["as-sent", "qcow2"]),
    help="What is made of what arrives. qcow2: an image of each disk that is sent as its guest "
    "sees it; files sent as they are are refused then.",
)
@click.option(
    "--update",
    is_flag=True,
    help="Let `push --since` bring a file that it has placed before up to date. The file must "
    "not be in use, and has no name until the new content is complete and verified.",
)
@click.option("--json", "as_json", is_flag=True, help="Say where it listens as JSON.")
@_tls_options
def serve(
    root: Path,
    listen: str,
    devices: tuple[tuple[str, Path], ...],
    paranoid: bool,
    readback: bool,
    seeds: tuple[str, ...],
    file_format: Literal["as-sent", "qcow2"],
    update: bool,
    as_json: bool,
    cert: Path,
    key: Path,
    ca: Path,
) -> None:
    """Receive files from everybody who has a certificate of the CA.

    Files are placed directly in --root under the names that their senders give
    them, never over something that is there. What is incomplete is called
    .NAME.dm-TAG.part, beside a .journal that tells what of it is durable; a
    .receipt remembers what was placed, and may be removed. Of a device, journal
    and receipt lie in --root too.

    Ends on SIGINT or SIGTERM with exit code 0; senders go on when it is back.
    """
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with _told(as_json), Receiver(listen, TlsFiles(cert, key, ca)) as receiver:
        receiver.serve_names(
            root,
            devices=dict(devices),
            paranoid=paranoid,
            readback=readback,
            seeds=seeds,
            format=file_format,
            update=update,
        )
        if as_json:
            _emit({"listening": receiver.address, "root": str(root)})
        else:
            click.echo(f"listening on {receiver.address}, files go to {root}")
        while not ended.wait(1.0):
            pass


@main.command()
@click.argument("files", nargs=-1, type=_existing)
@click.option(
    "--nbd",
    type=Export(),
    metavar="unix:PATH[:NAME]",
    help="Send a disk as its guest sees it, from this read-only NBD export (tcp:HOST:PORT[:NAME] "
    "too, for addresses of this machine: NBD is not encrypted). Needs --name.",
)
@click.option(
    "--content-id",
    help="Promise that the export has the same bytes whenever this id is given, so that the same "
    "command can go on where it stopped.",
)
@click.option(
    "--bitmap",
    help="Read only what this dirty bitmap of the export says was written since that copy.",
)
@click.option(
    "--since",
    metavar="DIGEST",
    help="Bring an earlier copy up to date, the one with this digest, as `push` printed it. The "
    "receiver runs with --update.",
)
@click.option("--to", required=True, metavar="HOST:PORT", help="Where `serve` listens.")
@click.option("--name", help="Name at the other end; for one file only.")
@click.option("--peer", help="Name or URI that the receiver's certificate must have.")
@click.option(
    "--connections",
    default=4,
    show_default=True,
    type=click.IntRange(1, 64),
    help="TCP connections; more help over long distances.",
)
@click.option("--limit", type=Rate(), help="Most bytes a second, such as 20M.")
@click.option(
    "--level",
    type=click.IntRange(-7, 19),
    help="zstd level; by default each chunk is compressed as hard as the link leaves time for.",
)
@click.option("--no-compress", is_flag=True, help="Send everything as it is.")
@click.option(
    "--holes",
    default="trust",
    show_default=True,
    type=click.Choice(["trust", "read"]),
    help="Whether holes reported by the file system are believed, or read.",
)
@click.option(
    "--retry-for",
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    type=click.FloatRange(0, 86400),
    help="How long to try when no connection stands.",
)
@click.option("--json", "as_json", is_flag=True, help="Progress and receipts as JSON lines.")
@_tls_options
def push(
    files: tuple[Path, ...],
    nbd: NbdExport | None,
    content_id: str | None,
    bitmap: str | None,
    since: str | None,
    name: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Send FILES, one after the other, or an NBD export.

    The same command again goes on where it stopped. FILES are regular files or
    block devices. One that is written meanwhile is noticed, and what has changed
    is copied again before the copy gets its name; one that is never at rest
    ends with SOURCE_CHANGED.

    With --json, each line of the output is an object with "file" and "progress",
    "receipt" and "seconds", or "error".
    """
    if bool(files) == (nbd is not None):
        raise click.UsageError("name the files to send, or one export with --nbd")
    if name is not None and len(files) > 1:
        raise click.UsageError("--name goes with one file only")
    if nbd is not None and name is None:
        raise click.UsageError("an export has no file name: give one with --name")
    if nbd is None and (content_id, bitmap, since) != (None, None, None):
        raise click.UsageError("--content-id, --bitmap and --since go with --nbd only")
    if bitmap is not None and since is None:
        raise click.UsageError("--bitmap needs --since: what it tells is counted from a copy")
    with _told(as_json):
        if nbd is not None and name is not None:
            changes = Changes(since, bitmap) if since is not None else None
            export = replace(nbd, content_id=content_id, changes=changes)
            _push_one(export, name, as_json, options)
        for file in files:
            _push_one(file.resolve(), name or file.name, as_json, options)


@main.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.argument("names", nargs=-1, required=True)
def certs(directory: Path, names: tuple[str, ...]) -> None:
    """Make a CA in DIRECTORY (or use the one there) and a certificate for each NAME.

    Prints certificate, key and URI name of each. Keep ca.key to yourself: who has
    it can become anybody.
    """
    for name in names:
        if not name or name == "ca" or "/" in name or name.startswith("."):
            raise click.UsageError(f"{name!r} cannot be a file name here")
    try:
        ca = authority.open_authority(directory)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    for name in names:
        cert, key = authority.issue(ca, directory, name)
        click.echo(f"{cert} {key} {authority.uri_of(name)}")


@main.command()
@click.argument("file", type=_existing, required=False)
@click.option(
    "--nbd",
    type=Export(),
    metavar="unix:PATH[:NAME]",
    help="The digest of a disk as its guest sees it, from this read-only export.",
)
def digest(file: Path | None, nbd: NbdExport | None) -> None:
    """Print the root digest of FILE, as receipts give it, or of an NBD export."""
    source = file or nbd
    if source is None or (file and nbd):
        raise click.UsageError("name either a file, or an export with --nbd")
    with _told(as_json=False):
        shown = source if isinstance(source, Path) else source.address
        click.echo(f"{diskmover.digest(source).digest}  {shown}")


def _push_one(source: Path | NbdExport, name: str, as_json: bool, options: dict[str, Any]) -> None:
    started = time.monotonic()
    for receipt in _push_through(source, name, as_json, options):
        _tell(receipt, time.monotonic() - started, as_json)


def _push_through(
    source: Path | NbdExport, name: str, as_json: bool, options: dict[str, Any]
) -> list[Receipt]:
    """Push a source; go on when the receiver has restarted meanwhile."""
    for attempt in itertools.count(1):
        job = _start(source, name, options)
        try:
            return _follow(job, name, as_json)
        except MoverError as error:
            if error.code not in _RESTARTED or attempt == _ATTEMPTS:
                raise
        except KeyboardInterrupt:
            job.cancel()
            raise
    raise AssertionError("the last attempt returns or raises")


def _start(source: Path | NbdExport, name: str, options: dict[str, Any]) -> Push:
    peer: str | None = options["peer"]
    return Push(
        to=options["to"],
        receiver=authority.uri_of(peer) if peer else None,
        tls=TlsFiles(options["cert"], options["key"], options["ca"]),
        session_id=f"open/{name}",
        key=_NO_KEY,
        tag=_TAG,
        volumes=[OutgoingVolume(name, source)],
        connections=options["connections"],
        limit_bytes_per_second=options["limit"],
        compression=_compression(options["level"], options["no_compress"]),
        holes=options["holes"],
        reconnect_timeout_seconds=options["retry_for"],
    )


def _compression(level: int | None, off: bool) -> int | Literal["adaptive"] | None:
    if off:
        return None
    return "adaptive" if level is None else level


def _follow(job: Push, name: str, as_json: bool) -> list[Receipt]:
    live = sys.stderr.isatty() and not as_json
    while (receipts := job.wait(0.5)) is None:
        if as_json:
            _emit({"file": name, "progress": asdict(job.progress())})
        elif live:
            click.echo(f"\r\x1b[K{name}: {_bar(job.progress())}", nl=False, err=True)
    if live:
        click.echo("\r\x1b[K", nl=False, err=True)
    return receipts


def _bar(progress: Progress) -> str:
    share = progress.done_bytes / progress.total_bytes if progress.total_bytes else 1.0
    eta = "" if progress.eta_seconds is None else f", {progress.eta_seconds:.0f} s left"
    rate = _size(progress.rate_bytes_per_second)
    return f"{share:6.1%} of {_size(progress.total_bytes)}, {rate}/s{eta} [{progress.limited_by}]"


def _tell(receipt: Receipt, seconds: float, as_json: bool) -> None:
    if as_json:
        _emit({"receipt": asdict(receipt), "seconds": round(seconds, 3)})
        return
    click.echo(
        f"{receipt.volume_id}: {_size(receipt.size_bytes)}, of it {_size(receipt.data_bytes)} data,"
        f" {_size(receipt.wire_bytes)} on the wire, {seconds:.1f} s, digest {receipt.digest}"
    )


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _emit(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value))


@contextmanager
def _told(as_json: bool) -> Iterator[None]:
    try:
        yield
    except MoverError as error:
        _fail(error, as_json)
    except KeyboardInterrupt:
        click.echo("diskmover: interrupted; the same command goes on from here", err=True)
        sys.exit(EXIT_INTERRUPTED)


def _fail(error: MoverError, as_json: bool) -> NoReturn:
    if as_json:
        _emit(
            {
                "error": {
                    "code": error.code.value,
                    "message": error.message,
                    "volume_id": error.volume_id,
                    "offset": error.offset,
                    "side": error.side,
                    "retryable": error.retryable,
                }
            }
        )
    click.echo(f"diskmover: {error}", err=True)
    sys.exit(EXIT_UNAVAILABLE if error.retryable else EXIT_FAILED)
