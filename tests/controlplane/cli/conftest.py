from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.controlplane.cli.recorded import RecordedApi, recorded_api


@pytest.fixture(autouse=True)
def no_log_lines_among_the_output() -> Iterator[None]:
    """The server logs in this process, where the command's output is being caught."""
    with capture_logs():
        yield


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[RecordedApi]:
    async with recorded_api(tmp_path) as started:
        yield started
