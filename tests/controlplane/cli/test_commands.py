"""Listing, showing and changing, and what errors look like."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import yaml

from controlplane.common.errors import DroverError, Violation
from controlplane.common.identity import Role
from controlplane.common.reasons import Reason
from controlplane.v1.host_pb2 import Host, HostUsage
from hostd.v1.host_pb2 import HostFacts, StorageRoot
from tests.controlplane.cli.recorded import UID, RecordedApi, make_instance
from tests.controlplane.fleet_pki import FleetPki

HOST_A = Host(
    name="hosts/a",
    state=Host.STATE_ENABLED,
    alive=True,
    usage=HostUsage(vcpus=2, memory_mib=2048, instances=1),
    facts=HostFacts(
        cpus=8,
        memory_mib=16384,
        roots=[
            StorageRoot(name="images", path="/a", available_bytes=10 << 30, device_id=1),
            StorageRoot(name="more", path="/b", available_bytes=10 << 30, device_id=1),
        ],
    ),
)


async def test_host_list_is_an_aligned_table_without_colours(api: RecordedApi) -> None:
    api.script.hosts = [HOST_A, Host(name="hosts/b-long-name", state=Host.STATE_DISABLED)]

    result = await api.run("host", "list")

    assert result.exit_code == 0
    header, first, second = result.stdout.splitlines()
    assert header.split()[:3] == ["NAME", "STATE", "ALIVE"]
    assert header.index("STATE") == first.index("ENABLED") == second.index("DISABLED")
    assert "10.0 GiB" in first  # both roots lie on one file system
    assert "\x1b" not in result.stdout
    assert not first.endswith(" ")


async def test_json_is_the_protobuf_mapping_with_every_field(api: RecordedApi) -> None:
    api.script.hosts = [HOST_A]

    result = await api.run("host", "list", "-o", "json")

    (host,) = json.loads(result.stdout)
    assert host["name"] == "hosts/a"
    assert host["state"] == "STATE_ENABLED"
    assert host["usage"]["memoryMib"] == "2048"
    assert host["stateReason"] == ""


async def test_yaml_holds_the_same(api: RecordedApi) -> None:
    api.script.hosts = [HOST_A]

    as_json = json.loads((await api.run("host", "show", "a", "-o", "json")).stdout)
    as_yaml = yaml.safe_load((await api.run("host", "show", "a", "-o", "yaml")).stdout)

    assert as_yaml == as_json


async def test_empty_list_says_what_to_do_on_stderr(api: RecordedApi) -> None:
    result = await api.run("host", "list")

    assert result.exit_code == 0
    assert result.stdout == ""
    assert "drover host add" in result.stderr
    assert (await api.run("host", "list", "-o", "json")).stdout == "[]\n"


async def test_host_show(api: RecordedApi) -> None:
    api.script.hosts = [HOST_A]

    result = await api.run("host", "show", "a")

    assert "images: /a" in result.stdout
    assert "2 on 8 host CPUs" in result.stdout


async def test_host_add_prints_the_join_command_alone_on_stdout(api: RecordedApi) -> None:
    result = await api.run("host", "add", "c", "--no-adopt")

    assert result.stdout == "drover-hostd join TOKEN\n"
    (request,) = api.script.requests("AddHost")
    assert request.host_id == "c"
    assert request.adopt_domains is False
    assert request.request_id


async def test_host_gone_needs_agreement(api: RecordedApi) -> None:
    api.script.hosts = [HOST_A]

    refused = await api.run("host", "gone", "a", "--reason", "burnt")
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    assert api.script.requests("DeclareHostGone") == []

    agreed = await api.run("host", "gone", "a", "--reason", "burnt", "--yes")
    assert agreed.exit_code == 0
    assert api.script.requests("DeclareHostGone")[0].reason == "burnt"


async def test_instances_of_all_pages_are_listed(api: RecordedApi) -> None:
    api.script.instances = [make_instance(f"web{n}", uid=f"{n}{UID[1:]}") for n in range(5)]

    result = await api.run("instance", "list", "--host", "a")

    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == [
        f"web{n}" for n in range(5)
    ]
    assert {r.host for r in api.script.requests("ListInstances")} == {"hosts/a"}


async def test_release_acts_on_the_uuid_and_says_how_to_take_it_back(api: RecordedApi) -> None:
    api.script.instances = [make_instance()]

    result = await api.run("instance", "release", "web1")

    assert api.script.requests("ReleaseInstance")[0].name == f"instances/{UID}"
    assert f"drover instance adopt {UID}" in result.stdout


async def test_lock_needs_a_reason(api: RecordedApi) -> None:
    api.script.instances = [make_instance()]

    assert (await api.run("instance", "lock", "web1")).exit_code == 2
    locked = await api.run("instance", "lock", "web1", "--reason", "fragile")

    assert locked.exit_code == 0
    assert api.script.requests("LockInstance")[0].reason == "fragile"


async def test_ambiguous_name_shows_the_candidates(api: RecordedApi) -> None:
    other = f"f{UID[1:]}"
    api.script.instances = [
        make_instance(),
        make_instance("db"),
        make_instance(uid=other, host="hosts/b"),
    ]

    result = await api.run("instance", "show", "web1")

    assert result.exit_code == 2
    assert f"{UID}  web1 on a" in result.stderr
    assert f"{other}  web1 on b" in result.stderr
    assert "db" not in result.stderr


async def test_unknown_name_exits_3_with_advice(api: RecordedApi) -> None:
    result = await api.run("host", "show", "nope")

    assert result.exit_code == 3
    assert result.stdout == ""
    assert "There is no hosts/nope." in result.stderr
    assert "drover host list" in result.stderr


async def test_name_of_another_kind_is_wrong_usage(api: RecordedApi) -> None:
    result = await api.run("host", "show", "instances/web1")

    assert result.exit_code == 2
    assert api.script.asked == []


async def test_refusal_lists_the_reason_of_each_host(api: RecordedApi) -> None:
    api.script.refusals["CreateMigration"] = DroverError(
        Reason.NO_VALID_HOST,
        "No host can take web1.",
        subject="instances/web1",
        violations=[
            Violation("hosts/b", "b is disabled.", "HOST_DISABLED"),
            Violation("hosts/long", "images has 2 GiB.", "TARGET_LACKS_SPACE"),
        ],
    )

    result = await api.run("migrate", "web1")

    assert result.exit_code == 4
    assert "error: No host can take web1." in result.stderr
    assert "  b     HOST_DISABLED       b is disabled." in result.stderr
    assert "  long  TARGET_LACKS_SPACE  images has 2 GiB." in result.stderr
    assert Reason.NO_VALID_HOST.info.help in result.stderr


async def test_missing_role_exits_6(api: RecordedApi) -> None:
    api.be(Role.VIEWER)

    result = await api.run("host", "add", "c")

    assert result.exit_code == 6
    assert "needs the role admin" in result.stderr


async def test_certificate_of_another_fleet_exits_6(api: RecordedApi, tmp_path: Path) -> None:
    stranger = FleetPki(tmp_path / "stranger")

    result = await api.run("--ca", str(stranger.ca), "host", "list")

    assert result.exit_code == 6
    assert "not the control plane's" in result.stderr


async def test_refused_certificate_exits_6_and_says_why(api: RecordedApi) -> None:
    """The server just hangs up; the reason is found on this side."""
    late = api.pki.expired(Role.ADMIN)

    result = await api.run("--cert", str(late.cert), "--key", str(late.key), "host", "list")

    assert result.exit_code == 6
    assert f"{late.cert} expired on" in result.stderr
    assert "drover cert" in result.stderr


async def test_certificate_of_another_authority_exits_6(api: RecordedApi, tmp_path: Path) -> None:
    theirs = FleetPki(tmp_path / "stranger").person(Role.ADMIN)

    result = await api.run("--cert", str(theirs.cert), "--key", str(theirs.key), "host", "list")

    assert result.exit_code == 6
    assert "was not issued by" in result.stderr


async def test_a_key_of_another_certificate_is_named(api: RecordedApi) -> None:
    """Unchecked, it would look like a server that is down."""
    mine, theirs = api.pki.person(Role.ADMIN, "mine"), api.pki.person(Role.ADMIN, "theirs")

    result = await api.run("--cert", str(mine.cert), "--key", str(theirs.key), "host", "list")
    assert result.exit_code == 2
    assert f"{theirs.key} is not the private key of {mine.cert}" in result.stderr

    result = await api.run("--cert", str(mine.key), "--key", str(mine.cert), "host", "list")
    assert result.exit_code == 2
    assert "in PEM form" in result.stderr


async def test_unreachable_server_exits_5_and_says_where(
    api: RecordedApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlplane.cli.session.PATIENCE_SECONDS", 0.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"

        result = await api.run("--server", address, "host", "list")

    assert result.exit_code == 5
    assert address in result.stderr


async def test_unconfigured_says_what_is_missing(
    api: RecordedApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlplane.cli.session.SYSTEM_CONFIG", tmp_path / "none.toml")
    monkeypatch.setenv("HOME", str(tmp_path))
    api.config.unlink()

    named = await api.run("host", "list")
    assert named.exit_code == 2
    assert str(api.config) in named.stderr

    from click.testing import CliRunner

    from controlplane.cli.root import cli

    bare = CliRunner().invoke(cli, ["host", "list"], env={"HOME": str(tmp_path)})
    assert bare.exit_code == 2
    assert "drover init" in bare.stderr


async def test_flavor_sizes_are_binary(api: RecordedApi) -> None:
    result = await api.run(
        "flavor", "create", "big", "--vcpus", "4", "--memory", "2G", "--root-disk", "20"
    )

    assert result.exit_code == 0
    flavor = api.script.requests("CreateFlavor")[0].flavor
    assert (flavor.memory_mib, flavor.root_disk_bytes) == (2048, 20 << 30)


async def test_audit_list(api: RecordedApi) -> None:
    result = await api.run("audit", "list")

    assert "AddHost" in result.stdout
    assert "PERMISSION_DENIED" in result.stdout


async def test_completion_of_names_comes_from_the_server(api: RecordedApi) -> None:
    api.script.instances = [make_instance(), make_instance("db1")]
    process = await api.spawn(
        env={
            **api.environment,
            "_DROVER_COMPLETE": "bash_complete",
            "COMP_WORDS": "drover migrate w",
            "COMP_CWORD": "2",
        }
    )
    out, _ = await process.communicate()

    assert out.decode().split() == ["plain,web1"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_completion_scripts(api: RecordedApi, shell: str) -> None:
    result = await api.run("completion", shell)

    assert "_DROVER_COMPLETE" in result.stdout


async def test_bug_in_the_server_exits_1_with_its_incident(api: RecordedApi) -> None:
    api.script.refusals["ListHosts"] = DroverError(Reason.INTERNAL, "Incident 123 in ListHosts.")

    result = await api.run("host", "list")

    assert result.exit_code == 1
    assert "Incident 123" in result.stderr
