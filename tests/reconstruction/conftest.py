from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from reconstruction.savers import Mortal, mortal_saver

POSTGRES = pytest.param("postgres", marks=pytest.mark.postgres)


@pytest.fixture(params=["memory", "sqlite", POSTGRES])
async def saver(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Mortal]:
    """A checkpointer whose process can be killed."""
    kind: str = request.param
    url = request.getfixturevalue("postgres_url") if kind == "postgres" else None
    async with mortal_saver(kind, tmp_path, url) as opened:
        yield opened


@pytest.fixture
async def memory(tmp_path: Path) -> AsyncIterator[Mortal]:
    """A checkpointer for what does not depend on the kind."""
    async with mortal_saver("memory", tmp_path, None) as opened:
        yield opened
