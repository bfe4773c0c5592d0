from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from controlplane.cli.root import cli as drover


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What `drover init` makes, with both ports left to the kernel to choose."""
    made = CliRunner().invoke(
        drover,
        [
            *("init", "--dir", str(tmp_path), "--fleet", "lab"),
            *("--advertise", "127.0.0.1:7440", "--listen", "127.0.0.1:1"),
        ],
    )
    assert made.exit_code == 0, made.stderr
    path = tmp_path / "controlplane.toml"
    text = path.read_text().replace('"127.0.0.1:1"', '"127.0.0.1:0"')
    path.write_text(text.replace('enrol = "0.0.0.0:7441"', 'enrol = "127.0.0.1:0"'))
    return tmp_path
