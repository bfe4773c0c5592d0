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

`push --on-read-error zero` reads around what a dying disk does not give any more;
what it makes is DEGRADED, and says so wherever it says anything.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but degraded, 5 out of reach (try again).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import click

import diskmover
from diskmover import show
from diskmover.errors import MoverError
from diskmover.model import Changes, IoPriority, NbdExport, TlsFiles, uri_of
from diskmover.params import PORT, Address, Device, Export, Rate, Size
from diskmover.pushing import check_names, push_files, push_one
from diskmover.transfer import Receiver

EXIT_FAILED = 1
EXIT_DEGRADED = 3
EXIT_UNAVAILABLE = 5
EXIT_INTERRUPTED = 130
_LOOK_SECONDS = 0.5

_existing = click.Path(exists=True, dir_okay=False, path_type=Path)


def _tls_options(command: Any) -> Any:
    for option, help_ in (
        ("--ca", "Authority that peers must come from (PEM)."),
        ("--key", "Own private key (PEM)."),
        ("--cert", "Own certificate chain (PEM)."),
    ):
        variable = f"DISKMOVER_{option[2:].upper()}"
        command = click.option(
            option, type=_existing, required=True, help=help_, envvar=variable, show_envvar=True
        )(command)
    return command


_io_priority = click.option(
    "--io-priority",
    default="normal",
    show_default=True,
    type=click.Choice(["normal", "low", "idle"]),
    help="Of reads and writes beside those of others: low comes behind all, idle only when nobody "
    "else wants the disk. Its scheduler has to heed it (bfq, mq-deadline).",
)


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
      3    done, but DEGRADED: not all of the source could be read (--on-read-error)
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
    default=f"0.0.0.0:{PORT}",
    show_default=True,
    type=Address(),
    metavar="HOST[:PORT]",
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
    "--readback/--no-readback",
    default=None,
    help="Read what arrives back from the disk and compare it, while the rest still comes and "
    "before it is published.  [default: for --device, not for files]",
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
@click.option(
    "--volume-memory",
    default="512Mi",
    show_default=True,
    type=Size(),
    help="Most memory for what is known of the volumes of all copies, about 2 MiB for each TiB of "
    "them. A copy for which there is none is told to come again later.",
)
@_io_priority
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Say where it listens, and how each copy ended, as JSON lines.",
)
@_tls_options
def serve(
    root: Path,
    listen: str,
    devices: tuple[tuple[str, Path], ...],
    paranoid: bool,
    readback: bool | None,
    seeds: tuple[str, ...],
    file_format: Literal["as-sent", "qcow2"],
    update: bool,
    volume_memory: int,
    io_priority: IoPriority,
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

    \b
    Examples:
      # files of everybody in the fleet
      diskmover serve --root /var/lib/libvirt/images
      # blocks of a template and of last week's copy are not sent again
      diskmover serve --root /srv/copies --seed debian-12.qcow2 --seed web1-0417.qcow2
      # into a logical volume, which is read back before it is called good
      diskmover serve --root /srv/copies --device backup=/dev/vg0/backup
      # files are read back, too
      diskmover serve --root /srv/copies --readback

    \b
    Exit codes: 0 it was told to end; 1 failed, 2 wrong usage, 5 try again: the address
    is taken, or nobody reads its output.
    """  # noqa: D301
    ended = threading.Event()

    def tell(receiver: Receiver) -> None:
        for copy in receiver.take_ended():
            show.arrival(copy, as_json=as_json)
        show.say_notes()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    tls = TlsFiles(cert, key, ca)
    for name in seeds:
        if not (root / name).is_file():
            text = f"there is no file {name!r} in {root} yet; it is a seed once it is there"
            click.echo(f"diskmover: {text}", err=True)
    with (
        _told(as_json),
        Receiver(
            listen, tls, volume_memory_bytes=volume_memory, io_priority=io_priority
        ) as receiver,
    ):
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
            show.emit({"listening": receiver.address, "root": str(root)})
        else:
            click.echo(f"listening on {receiver.address}, files go to {root}")
        while not ended.wait(_LOOK_SECONDS):
            tell(receiver)
        tell(receiver)  # what has ended since


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
@click.option(
    "--to",
    required=True,
    type=Address(),
    metavar="HOST[:PORT]",
    help="Where `serve` listens.  [default port: 7443]",
)
@click.option("--name", help="Name at the other end; for one file only.")
@click.option("--peer", help="Name or URI that the receiver's certificate must have.")
@click.option(
    "--connections",
    type=click.IntRange(1, 64),
    help="TCP connections.  [default: 4, and more over long distances while it helps]",
)
@click.option("--limit", type=Rate(), help="Most bytes a second on the wire, such as 20M or 20Mi.")
@_io_priority
@click.option(
    "--level",
    type=click.IntRange(-7, 19),
    help="zstd level; by default each chunk is compressed as hard as the link leaves time for.",
)
@click.option("--no-compress", is_flag=True, help="Send everything as it is.")
@click.option(
    "--holes",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "trust", "read"]),
    help="Whether holes reported by the file system are believed, or read. auto: believed on "
    "ext4, xfs, btrfs, tmpfs, bcachefs and overlay, read elsewhere (NFS, FUSE, 9p, ZFS ...).",
)
@click.option(
    "--force",
    is_flag=True,
    help="Copy FILE also when a QEMU has it open for writing. What it has not written back yet "
    "is missing then: the copy can be no disk at all.",
)
@click.option(
    "--on-read-error",
    default="fail",
    show_default=True,
    type=click.Choice(["fail", "zero"]),
    help="What to do when the disk does not give a part of FILE any more (EIO). zero: put zeros "
    "there, sector by sector, and call the copy DEGRADED (exit code 3). For rescuing what is "
    "left of a dying disk.",
)
@click.option(
    "--retry-for",
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    type=click.FloatRange(0, 86400, min_open=True),
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
    ends with SOURCE_CHANGED. One that a QEMU has open for writing is refused at once
    (exit code 5): stop the guest, or export its disk (virsh backup-begin in pull
    mode) and send that with --nbd. All are sent as they are; a qcow2 that needs
    another file, or was not closed, is noted (NOTE).

    On a terminal a line on standard error tells how far it is, how long it will
    take at the fastest and slowest of the last seconds, and what limits it:
    source-read, compress, network, target-write (all that the receiver does) or
    throttle (--limit). With --json, each line of the output is an object with
    "file" and "progress" or "note", "receipt" (or "degraded") and "seconds", or
    "error".

    \b
    Examples:
      # two disks, at most 50 MB a second, behind everybody else on the disk
      diskmover push web1.qcow2 web2.qcow2 --to two --limit 50M --io-priority low
      # a logical volume, into one that `serve --device backup=/dev/VG/LV` offers
      diskmover push /dev/vg0/db --name backup --to two --peer two
      # a disk as its guest sees it, whatever its format
      qemu-nbd --read-only --shared 8 --persistent --socket /run/db.sock db.qcow2
      diskmover push --nbd unix:/run/db.sock --name db.raw --to two
      # what is left on a dying disk: exit code 3, and the places that are lost
      diskmover push /dev/sdb --name sdb.img --to two --on-read-error zero
      # over a long and lossy line
      diskmover push web1.qcow2 --to far.example.net --connections 16 --retry-for 600
    The options --cert, --key and --ca may come from the environment, as shown.

    \b
    Exit codes: 0 all are there; 1 one failed, 2 wrong usage, 3 all are there but
    one is DEGRADED, 5 try again, 130 interrupted. docs/diskmover.md lists the
    errors and what to do.
    """  # noqa: D301
    if bool(files) == (nbd is not None):
        raise click.UsageError("name the files to send, or one export with --nbd")
    if name is not None and len(files) > 1:
        raise click.UsageError("--name goes with one file only")
    if nbd is not None and name is None:
        raise click.UsageError("an export has no file name: give one with --name")
    if nbd is None and (content_id, bitmap, since) != (None, None, None):
        raise click.UsageError("--content-id, --bitmap and --since go with --nbd only")
    if nbd is not None and options["on_read_error"] == "zero":
        raise click.UsageError("--on-read-error zero goes with files and devices, not with --nbd")
    if bitmap is not None and since is None:
        raise click.UsageError("--bitmap needs --since: what it tells is counted from a copy")
    names = [name or file.name for file in files]
    check_names(names)
    # Told to end in whatever way, it lets go of its files first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _told(as_json, goes_on=True):
        if nbd is not None and name is not None:
            changes = Changes(since, bitmap) if since is not None else None
            export = replace(nbd, content_id=content_id, changes=changes)
            whole = push_one(export, name, as_json=as_json, options=options)
        else:
            whole = push_files(files, names, as_json=as_json, options=options)
    if not whole:
        click.echo("diskmover: not all could be read: the copy is DEGRADED", err=True)
        sys.exit(EXIT_DEGRADED)


@main.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.argument("names", nargs=-1, required=True)
def certs(directory: Path, names: tuple[str, ...]) -> None:
    """Make a CA in DIRECTORY (or use the one there) and a certificate for each NAME.

    Prints certificate, key and URI name of each. Keep ca.key to yourself: who has
    it can become anybody. Certificates are valid for a year; the same command makes
    new ones.

    \b
    Examples:
      # an authority, and certificates for two hosts
      diskmover certs pki one two
      # a third host, later
      diskmover certs pki three

    \b
    Exit codes: 0 all are made; 1 one cannot be made, and the message says why,
    2 wrong usage.
    """  # noqa: D301
    # The only command that needs it: loading it takes a third of the others' start.
    from diskmover import certs as authority

    for name in names:
        if not name or name == "ca" or "/" in name or name.startswith("."):
            raise click.UsageError(f"{name!r} cannot be a file name here")
    # TypeError: of a key with a password, which nobody could give here.
    for name in names:
        try:
            ca = authority.open_authority(directory)
            cert, key = authority.issue(ca, directory, name)
        except (OSError, TypeError, ValueError) as error:
            text = f"cannot make a certificate for {name!r} in {directory}: {error}"
            raise click.ClickException(text) from error
        click.echo(f"{cert} {key} {uri_of(name)}")


@main.command()
@click.argument("file", type=_existing, required=False)
@click.option(
    "--nbd",
    type=Export(),
    metavar="unix:PATH[:NAME]",
    help="The digest of a disk as its guest sees it, from this read-only export.",
)
@click.option("--json", "as_json", is_flag=True, help="All that a receipt says of the content.")
def digest(file: Path | None, nbd: NbdExport | None, as_json: bool) -> None:
    """Print the root digest of FILE, as receipts give it, or of an NBD export.

    A copy that is whole has the digest of its source: compare the two at any time.

    \b
    Examples:
      # what `push` has printed for it, as long as nobody writes to it
      diskmover digest /var/lib/libvirt/images/web1.qcow2
      # a disk as its guest sees it, with sizes, for programs
      qemu-nbd --read-only --shared 8 --persistent --socket /run/db.sock db.qcow2
      diskmover digest --nbd unix:/run/db.sock --json

    \b
    Exit codes: 0 done; 1 it cannot be read, 2 wrong usage, 5 try again, 130
    interrupted. docs/diskmover.md lists the errors and what to do.
    """  # noqa: D301
    source = file.resolve() if file else nbd
    if source is None or (file and nbd):
        raise click.UsageError("name either a file, or an export with --nbd")
    with _told(as_json):
        found = diskmover.digest(source)
        if as_json:
            click.echo(json.dumps(asdict(found), sort_keys=True, separators=(",", ":")))
        else:
            click.echo(f"{found.digest}  {file or (nbd and nbd.address)}")


@contextmanager
def _told(as_json: bool, *, goes_on: bool = False) -> Iterator[None]:
    """Turn errors into words and exit codes; `goes_on` when it can be taken up again."""
    advice = "; the same command goes on from here" if goes_on else ""
    try:
        yield
    except MoverError as error:
        _fail(error, as_json, goes_on=goes_on and error.retryable)
    except KeyboardInterrupt:
        click.echo(f"diskmover: interrupted{advice}", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:  # of the output: all else is told as a MoverError
        if error.filename is not None:
            raise
        # What is still to be flushed there must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            click.echo(f"diskmover: nobody reads its output any more{advice}", err=True)
            sys.exit(EXIT_UNAVAILABLE)
        why = error.strerror or error
        click.echo(f"diskmover: its output cannot be written: {why}{advice}", err=True)
        sys.exit(EXIT_FAILED)


def _fail(error: MoverError, as_json: bool, *, goes_on: bool) -> NoReturn:
    if as_json:
        show.emit(show.failure(error))
    click.echo(f"diskmover: {show.printable(str(error))}", err=True)
    if goes_on:
        click.echo("diskmover: run the same command again to go on", err=True)
    sys.exit(EXIT_UNAVAILABLE if error.retryable else EXIT_FAILED)
