from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.controlplane.cli.recorded import RecordedApi, recorded_api


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[RecordedApi]:
    async with recorded_api(tmp_path) as started:
        yield started
