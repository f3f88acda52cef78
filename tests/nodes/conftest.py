"""An inventory agent that remembers, on an embedded broker, in the process's own runtime."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_threads import no_runtime_left

from langgraph_peerctx import background
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.messaging.context_handler import ContextRequestHandler
from langgraph_peerctx.persistence.event_store import EventStore, record_interaction


@pytest.fixture(autouse=True)
def nothing_left(embedded_servers: str) -> Iterator[None]:  # noqa: ARG001 - the broker outlives it
    with no_runtime_left():
        yield


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
    embedded_settings: PeerContextSettings, store: EventStore
) -> Iterator[background.BackgroundRuntime]:
    """The runtime that runs, with the inventory agent in it."""
    lease = background.lease(embedded_settings)
    runtime = lease.runtime()
    handler = ContextRequestHandler("inventory-agent", store=store)
    runtime.host_now("inventory-agent", handler)
    yield runtime
    background.stop_kept_runtime()
    runtime.stop()
    lease.release()
