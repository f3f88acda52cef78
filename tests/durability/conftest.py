from collections.abc import Iterator
from pathlib import Path

import pytest
from durability.effect_world import World

from langgraph_peerctx.durability import recorder
from langgraph_peerctx.persistence.incidents import ControlDatabase


@pytest.fixture(autouse=True)
def _the_end_of_a_run_waits_for_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk is: what a run has recorded is there when it has ended."""
    monkeypatch.setattr(recorder, "END_DEADLINE_SECONDS", 30.0)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[ControlDatabase]:
    with ControlDatabase(f"sqlite:///{tmp_path}/control.db") as opened:
        yield opened


@pytest.fixture
def world(ledger: ControlDatabase) -> World:
    return World(ledger)
