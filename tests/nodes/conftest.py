"""An inventory agent that remembers, on an embedded broker, in the process's own runtime."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from runtime_threads import no_runtime_left

from langgraph_peerctx import background
from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.messaging.context_handler import ContextRequestHandler
from langgraph_peerctx.messaging.embedded_broker import EmbeddedBroker
from langgraph_peerctx.persistence.event_store import EventStore, record_interaction


@pytest.fixture(autouse=True)
def nothing_left(bootstrap_servers: str) -> Iterator[None]:  # noqa: ARG001 - the broker outlives it
    with no_runtime_left():
        yield


@pytest.fixture(scope="module")
def bootstrap_servers() -> Iterator[str]:
    with EmbeddedBroker(["agent.context.request", "agent.context.response.reconstructor"]) as b:
        yield b.bootstrap_servers


@pytest.fixture
def settings(
    bootstrap_servers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> PeerContextSettings:
    """What the environment says too."""
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", bootstrap_servers)
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", f"sqlite:///{tmp_path}/own.db")
    monkeypatch.setenv("PEER_CONTEXT_MOCK_MODE", "never")
    settings = PeerContextSettings()
    assert settings.kafka == KafkaConfig(bootstrap_servers=bootstrap_servers)
    return settings


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    with EventStore(f"sqlite:///{tmp_path / 'inventory.db'}") as store:
        record_interaction(
            agent_id="inventory-agent",
            from_agent="product-agent",
            to_agent="inventory-agent",
            thread_id="thread-1",
            kind="order",
            payload={"sku": "A1"},
            interaction_id="order-1",
            store=store,
        )
        yield store


@pytest.fixture
def team(
    settings: PeerContextSettings, store: EventStore
) -> Iterator[background.BackgroundRuntime]:
    """The runtime that runs, with the inventory agent in it."""
    lease = background.lease(settings)
    runtime = lease.runtime()
    handler = ContextRequestHandler("inventory-agent", store=store)
    runtime.call(partial(runtime._host, "inventory-agent", handler))
    yield runtime
    background.stop_kept_runtime()
    runtime.stop()
    lease.release()
