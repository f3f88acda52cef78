from collections.abc import Iterator
from pathlib import Path

import pytest
from durability.effect_world import World

from langgraph_peerctx.persistence.incidents import ControlDatabase


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[ControlDatabase]:
    with ControlDatabase(f"sqlite:///{tmp_path}/control.db") as opened:
        yield opened


@pytest.fixture
def world(ledger: ControlDatabase) -> World:
    return World(ledger)
