"""What pyproject.toml promises about the generated code and the lock file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EVERYTHING = [
    *PROJECT["dependencies"],
    *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
]


def floor_of(name: str) -> Version:
    """The oldest version of a package that pyproject.toml allows."""
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        if requirement.name == name:
            return Version(next(s.version for s in requirement.specifier if s.operator == ">="))
    raise AssertionError(f"{name} is not a dependency")


def generated_with(pattern: str, glob: str) -> set[Version]:
    """Versions that the generated code asks for."""
    found: set[Version] = set()
    for room in ("controlplane/v1", "hostd/v1"):
        for file in (ROOT / room).glob(glob):
            found |= {Version(text) for text in re.findall(pattern, file.read_text())}
    return found


def test_the_oldest_allowed_grpcio_can_load_the_generated_code() -> None:
    assert generated_with(r"GRPC_GENERATED_VERSION = '([\d.]+)'", "*_pb2_grpc.py") == {
        floor_of("grpcio")
    }


def test_the_oldest_allowed_protobuf_can_load_the_generated_code() -> None:
    assert generated_with(r"Protobuf Python Version: ([\d.]+)", "*_pb2.py") == {
        floor_of("protobuf")
    }


def test_everything_is_locked() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)(?:\[[^\]]*\])?==([\w.]+)", lock, flags=re.MULTILINE))
    for line in EVERYTHING:
        requirement = Requirement(line)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in locked, f"{name} is not locked; run `make lock`"
        assert requirement.specifier.contains(locked[name]), f"{line} but {locked[name]} is locked"


def test_the_lock_names_no_registry() -> None:
    assert "://" not in (ROOT / "requirements.lock").read_text()
