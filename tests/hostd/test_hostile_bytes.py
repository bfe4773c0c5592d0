"""Bytes that come from guests and from other hosts: understood or refused, never more.

Each parser is given what it may meet and what nobody would write: it may raise its own
error and no other, it reads and writes a bounded amount, and nothing lies outside of
where it was told to put things. Headers of qcow2 images are in test_hostile_headers.py.
"""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks import baggage
from hostd.disks.baggage import unpack
from hostd.disks.manifest import Home, read_manifest, volumes_of
from hostd.libvirt.definition import parse_definition
from hostd.libvirt.transform import transform_domain, transform_snapshot
from hostd.libvirt.xml import XmlError
from hostd.v1 import preflight_pb2

UUID = "11111111-2222-4333-8444-555555555555"
in_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

# --- baggage -----------------------------------------------------------------


def archive(members: list[tuple[str, bytes]], change: Callable[[tarfile.TarInfo], None]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            change(member)
            tar.addfile(member, io.BytesIO(content))
    return zstandard.ZstdCompressor().compress(raw.getvalue())


def untouched(member: tarfile.TarInfo) -> None:
    pass


GOOD = archive([("meta.json", b"{}"), ("domain.xml", b"<domain/>")], untouched)


def unpacked(folder: Path, data: bytes) -> Reason | None:
    """Unpack in a folder of its own; why it was refused, and that nothing else is there."""
    place = folder / "place"
    place.mkdir(exist_ok=True)
    (place / "in.tar.zst").write_bytes(data)
    try:
        unpack(place / "in.tar.zst", place / "out")
    except DroverError as error:
        assert not (place / "out").exists()
        (place / "in.tar.zst").unlink()
        assert list(folder.rglob("*")) == [place]
        return error.reason
    for path in (place / "out").rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or path.stat().st_nlink == 1
    (place / "in.tar.zst").unlink()
    assert list(place.iterdir()) == [place / "out"]
    return None


def test_baggage_as_hosts_pack_it_is_taken(tmp_path: Path) -> None:
    assert unpacked(tmp_path, GOOD) is None
    assert (tmp_path / "place/out/domain.xml").read_bytes() == b"<domain/>"


@pytest.mark.parametrize(
    "name",
    ["../meta.json", "/etc/passwd", "tpm/../../x", "tpm//x", "meta.json/", "meta.json\n", "./nvram",
     "nvram/x", "tpm/.hidden", "snapshots/1.xml", "a" * 5000, "tpm/" + "/".join("abcde"), "",
     "domain.xml\0", "tpm/é"],
)  # fmt: skip
def test_baggage_with_names_of_its_own_is_refused(tmp_path: Path, name: str) -> None:
    data = archive([("meta.json", b"{}"), (name, b"x")], untouched)
    taken = unpacked(tmp_path, data)
    # tarfile itself ends a name at a zero byte and drops the slash behind one.
    plain = name.partition("\0")[0].rstrip("/")
    assert taken is (None if plain in ("meta.json", "domain.xml") and taken is None else
                     Reason.BUILD_FAILED)  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
     tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z"],
)  # fmt: skip
def test_baggage_holds_files_and_nothing_else(tmp_path: Path, kind: bytes) -> None:
    def change(member: tarfile.TarInfo) -> None:
        if member.name == "nvram":
            member.type, member.linkname, member.size = kind, "/etc/passwd", 0

    data = archive([("meta.json", b"{}"), ("nvram", b"")], change)
    assert unpacked(tmp_path, data) is Reason.BUILD_FAILED


def test_baggage_is_bounded_however_small_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The bounds themselves are far above what a test can write.
    monkeypatch.setattr(baggage, "MAX_MEMBER_BYTES", most_bytes := 1 << 20)
    monkeypatch.setattr(baggage, "MAX_TOTAL_BYTES", 1 << 22)
    monkeypatch.setattr(baggage, "MAX_MEMBERS", most_members := 100)
    large = archive([("nvram", bytes(most_bytes + 1))], untouched)
    assert unpacked(tmp_path, large) is Reason.BUILD_FAILED
    many = archive([(f"tpm/f{n}", b"") for n in range(most_members + 1)], untouched)
    assert unpacked(tmp_path, many) is Reason.BUILD_FAILED
    twice = archive([("nvram", b"a"), ("nvram", b"b")], untouched)
    assert unpacked(tmp_path, twice) is Reason.BUILD_FAILED
    file_then_folder = archive([("tpm", b"a"), ("tpm/x", b"b")], untouched)
    assert unpacked(tmp_path, file_then_folder) is Reason.BUILD_FAILED


def test_a_name_as_long_as_a_bomb_is_not_held_in_memory(tmp_path: Path) -> None:
    # A long name is a member of its own, which tarfile reads before anybody sees it.
    bomb = archive([("x" * (64 << 20), b"")], untouched)
    assert len(bomb) < 1 << 16
    tracemalloc.start()
    assert unpacked(tmp_path, bomb) is Reason.BUILD_FAILED
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 8 << 20


def test_baggage_that_claims_a_size_it_does_not_have_is_refused(tmp_path: Path) -> None:
    raw = bytearray(zstandard.ZstdDecompressor().decompress(GOOD))
    for size in (b"7777777777\0", b"-0000000001", b"\x80" + bytes(10), b"\xff" * 11):
        lying = bytearray(raw)
        lying[124:135] = size
        assert unpacked(tmp_path, zstandard.ZstdCompressor().compress(bytes(lying))) in (
            None, Reason.BUILD_FAILED,
        )  # fmt: skip


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda b: b"\x28\xb5\x2f\xfd" + b))
@in_a_folder
def test_any_bytes_are_baggage_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    assert unpacked(tmp_path_factory.mktemp("any"), data) in (None, Reason.BUILD_FAILED)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255), st.booleans())
@in_a_folder
def test_damaged_baggage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int, inside: bool
) -> None:
    raw = bytearray(zstandard.ZstdDecompressor().decompress(GOOD) if inside else GOOD)
    raw[at * len(raw) // len(GOOD)] ^= flip
    data = zstandard.ZstdCompressor().compress(bytes(raw)) if inside else bytes(raw)
    assert unpacked(tmp_path_factory.mktemp("damaged"), data) in (None, Reason.BUILD_FAILED)


# --- manifest ----------------------------------------------------------------

MANIFEST = {
    "version": 1, "how_to_restore": [], "state": "PARKED", "migration_id": UUID,
    "domain_uuid": UUID, "domain_name": "web1", "machine": "/m", "volumes": [],
    "files": [{"volume_id": "vda", "original": "/a", "parked": "/b", "inode": 1}],
}  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=10,
)


def manifest_read(folder: Path, data: bytes) -> Reason | None:
    (folder / "manifest.json").write_bytes(data)
    try:
        volumes_of(read_manifest(Home(folder)))
    except DroverError as error:
        return error.reason
    return None


def test_the_manifest_of_these_tests_is_read(tmp_path: Path) -> None:
    assert manifest_read(tmp_path, json.dumps(MANIFEST).encode()) is None


@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b'{"volumes":' + b"[" * 100_000)
@example(b'{"nobody":' + b"[" * 100_000)
@example(b'{"inode": ' + b"9" * 10_000 + b"}")
@in_a_folder
def test_any_bytes_are_a_manifest_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    assert manifest_read(tmp_path_factory.mktemp("m"), data) is Reason.DISK_IO_ERROR


@given(st.sampled_from(sorted(MANIFEST)), json_values)
@example("volumes", [{"size_bytes": "many"}])
@example("volumes", [[]])
@example("volumes", [{"nobody": 1}])
@in_a_folder
def test_a_manifest_with_other_values_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: object
) -> None:
    data = json.dumps({**MANIFEST, key: value}).encode("utf-8", "surrogatepass")
    assert manifest_read(tmp_path_factory.mktemp("m"), data) in (None, Reason.DISK_IO_ERROR)


# --- definitions -------------------------------------------------------------

TEXTS = [
    "", "0", "1", "-1", "9" * 30, "9" * 5000, "1.5", "٣", "x" * 300, "../../etc/passwd", "/dev/sda",
    "0-3,^2", "0-99999," * 50, "4294967296", "a\tb",
]  # fmt: skip
texts = st.sampled_from(TEXTS) | st.text("ab01-/.^,", max_size=9)


def element(tag: str, inner: str = "", **attributes: str) -> str:
    written = "".join(f" {name}='{value}'" for name, value in attributes.items())
    return f"<{tag}{written}>{inner}</{tag}>"


sources = st.builds(
    lambda kind, key, value: element("source", **{key: value}),
    texts, st.sampled_from(["file", "dev", "dir", "pool", "volume"]), texts,
)  # fmt: skip
disks = st.builds(
    lambda kind, device, target, source, format_, backing: element(
        "disk",
        element("driver", type=format_) + source + element("target", dev=target)
        + ("<backingStore type='file'>" + source) * backing + "</backingStore>" * backing,
        type=kind, device=device,
    ),
    st.sampled_from(["file", "block", "volume", "network", "nvme", ""]),
    st.sampled_from(["disk", "cdrom", "lun", ""]),
    st.sampled_from(["vda", "vdb", ""]) | texts,
    sources | st.just(""),
    st.sampled_from(["qcow2", "raw", ""]) | texts,
    st.integers(0, 4),
)  # fmt: skip
definitions = st.builds(
    lambda name, vcpu, memory, unit, pin, counts, cells, disks_, nvram: element(
        "domain",
        element("name", name) + element("vcpu", vcpu, current=vcpu)
        + element("memory", memory, unit=unit) + element("currentMemory", memory)
        + element("os", element("type", "hvm", arch="x86_64", machine="q35")
                  + element("nvram", nvram, type=name), firmware="efi")
        + element("cputune", element("vcpupin", vcpu=pin, cpuset=pin)
                  + element("vcpusched", vcpus=pin))
        + element("cpu", element("topology", sockets=counts[0], cores=counts[1],
                                 threads=counts[2], dies=counts[1])
                  + element("numa", element("cell", id="0", cpus=pin, memory=memory) * cells))
        + element("devices", "".join(disks_)),
        type="kvm",
    ),
    texts, texts, texts, st.sampled_from(["KiB", "GiB", "EiB", "x", ""]), texts,
    st.tuples(texts, texts, texts), st.integers(0, 2), st.lists(disks, max_size=3), texts,
)  # fmt: skip


def transformed(xml: str, vcpus: int, memory_mib: int) -> None:
    size = preflight_pb2.TargetSize(vcpus=vcpus, memory_mib=memory_mib)
    paths = {"vda": "/images/a", "vda.backing1": "/images/b"}
    for wanted in (None, size):
        told = transformed_once(xml, paths, wanted)
        # What was written is read again, and a second time changes nothing more.
        assert told is None or transform_domain(told, paths, wanted, "/nvram") == told


def transformed_once(
    xml: str, paths: dict[str, str], size: preflight_pb2.TargetSize | None
) -> str | None:
    try:
        return transform_domain(xml, paths, size, "/nvram")
    except DroverError as error:
        if error.reason in (Reason.BUILD_FAILED, Reason.INSTANCE_IMMOVABLE):
            return None
        raise


@given(definitions, st.integers(1, 4096), st.integers(1, 1 << 40))
@settings(max_examples=300, deadline=None)
def test_a_hostile_definition_is_read_and_transformed_or_refused(
    xml: str, vcpus: int, memory_mib: int
) -> None:
    found = parse_definition(xml)
    assert found.vcpus >= 1
    assert found.memory_mib >= 0
    transformed(xml, vcpus, memory_mib)


LAUGHS = (
    "<!DOCTYPE d [<!ENTITY a 'ha'>"
    + "".join(
        f"<!ENTITY {c} '{'&' + p + ';'}{'&' + p + ';'}'>"
        for p, c in zip("abcdefghijklmn", "bcdefghijklmno", strict=True)
    )
    + "]><domain><name>&o;</name></domain>"
)


@pytest.mark.parametrize(
    "xml",
    ["", "x", "<domain", "<domain></domain><domain/>", "<other/>", LAUGHS, "\0", "\ud800",
     "<!DOCTYPE d SYSTEM 'file:///etc/passwd'><domain/>",
     "<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><domain><name>&x;</name></domain>",
     "<domain>" * 100_000, "<?xml version='1.0' encoding='utf-16'?><domain/>",
     "<domain xmlns='urn:x'/>", "<domain>" + "<a>" * 300 + "</a>" * 300 + "</domain>"],
    ids=range(14),
)  # fmt: skip
def test_what_is_no_definition_is_refused(xml: str) -> None:
    with pytest.raises(XmlError):
        parse_definition(xml)
    for transform in (transform_domain, transform_snapshot):
        with pytest.raises(DroverError) as refused:
            transform(xml, {})
        assert refused.value.reason is Reason.BUILD_FAILED


@given(st.text(max_size=100))
def test_any_text_is_a_definition_or_refused(text: str) -> None:
    for xml in (text, f"<domain>{text}</domain>"):
        try:
            parse_definition(xml)
        except XmlError:
            with pytest.raises(DroverError):
                transform_domain(xml, {})
