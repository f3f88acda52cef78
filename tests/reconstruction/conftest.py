from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from reconstruction.orders import Peer
from reconstruction.savers import Mortal, mortal_saver

from langgraph_peerctx.config import PeerContextSettings

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


@pytest.fixture
def settings_on_broker(
    embedded_settings: PeerContextSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> PeerContextSettings:
    """The embedded broker with a presence topic of its own, and a control database."""
    del embedded_settings
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/control.db")
    monkeypatch.setenv("PEER_CONTEXT_HEARTBEAT_INTERVAL_SECONDS", "0.1")
    monkeypatch.setenv("PEER_CONTEXT_HEARTBEAT_PAUSE_SECONDS", "0.4")
    monkeypatch.setenv("PEER_CONTEXT_SWEEP_SECONDS", "0.5")
    monkeypatch.setenv("KAFKA_PRESENCE_TOPIC", f"presence.{tmp_path.name}"[:100])
    return PeerContextSettings()


@pytest.fixture
def short_window(
    settings_on_broker: PeerContextSettings, monkeypatch: pytest.MonkeyPatch
) -> PeerContextSettings:
    """The same, for peers that are silent: nobody waits long for them."""
    del settings_on_broker
    monkeypatch.setenv("PEER_CONTEXT_TIMEOUT_SECONDS", "0.6")
    return PeerContextSettings()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    made = Peer(tmp_path)
    yield made
    made.store.close()
