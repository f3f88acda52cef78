"""`record_interaction`, and the store that a process shares."""

import sqlite3
import threading
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from langgraph_peerctx.errors import ConfigurationError, ProtocolError, StoreBusyError, StoreError
from langgraph_peerctx.persistence import database
from langgraph_peerctx.persistence.event_store import (
    EventStore,
    aget_event_store,
    arecord_interaction,
    get_event_store,
    record_interaction,
)

ORDER: dict[str, Any] = {
    "agent_id": "product",
    "from_agent": "product",
    "to_agent": "inventory",
    "thread_id": "t",
    "kind": "order",
}


@pytest.fixture
def address(file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment's database."""
    url = f"sqlite:///{file}"
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", url)
    return url


def test_an_interaction_is_recorded_in_the_environments_store(address: str) -> None:
    before = datetime.now(UTC)
    recorded = record_interaction(**ORDER, payload={"pieces": 3}, effect_key="order-1")
    assert before <= recorded.occurred_at <= datetime.now(UTC)
    assert recorded.payload == {"pieces": 3}
    with EventStore(address) as store:
        assert store.by_effect_key("product", "order-1") == [recorded]
    get_event_store().close()


async def test_the_async_twin_records_in_the_environments_store(address: str) -> None:
    recorded = await arecord_interaction(**ORDER, run_id="r", checkpoint_id="c")
    with EventStore(address) as store:
        assert store.interactions_of("product", thread_id="t") == [recorded]
    get_event_store().close()


async def test_recorded_again_under_one_id_it_counts_once(store: EventStore) -> None:
    first = record_interaction(**ORDER, interaction_id="i", store=store)
    again = await arecord_interaction(**ORDER, interaction_id="i", payload={"n": 2}, store=store)
    assert again == first


def test_without_an_id_each_recording_is_another_interaction(store: EventStore) -> None:
    first, second = (record_interaction(**ORDER, store=store) for _ in range(2))
    assert first.interaction_id != second.interaction_id


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"from_agent": "no such/agent"}, "from_agent"),
        ({"to_agent": ""}, "to_agent"),
        ({"kind": "two words"}, "kind"),
        ({"thread_id": ""}, "thread_id"),
        ({"thread_id": "a\0b"}, "thread_id"),
        ({"interaction_id": "x" * 256}, "interaction_id"),
        ({"occurred_at": datetime(2026, 5, 1)}, "occurred_at"),  # noqa: DTZ001 - the fault
        ({"payload": {"when": datetime.now(UTC)}}, "payload.when"),
        ({"payload": {"deep": [[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]}}, "too_deep"),
        ({"payload": {1: "one"}}, "keys are strings"),
        ({"agent_id": "marketing"}, "no party"),
    ],
)
def test_an_illegal_value_is_named_and_nothing_is_recorded(
    store: EventStore, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ProtocolError, match=said):
        record_interaction(**ORDER | fields, store=store)
    assert store.interactions_of("product", thread_id="t") == []


@pytest.mark.usefixtures("address")
def test_a_process_has_one_store_for_an_address() -> None:
    opened: list[EventStore] = []
    together = threading.Barrier(8)

    def ask() -> None:
        together.wait()
        opened.append(get_event_store())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, opened))) == 1
    opened[0].close()


def test_another_address_has_another_store(address: str, tmp_path: Path) -> None:
    other = get_event_store(f"sqlite:///{tmp_path}/other.db")
    assert other is not get_event_store()
    assert get_event_store(address) is get_event_store()
    other.close()
    get_event_store().close()


async def test_the_async_twin_returns_the_same_store(address: str) -> None:
    assert await aget_event_store() is get_event_store(address)
    get_event_store().close()


async def test_opening_for_ever_is_given_up(
    file: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "OPENING_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_TIMEOUT_SECONDS", "1")
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreBusyError, match="not open within"):
            await aget_event_store(address)


@pytest.mark.usefixtures("address")
def test_a_shared_store_that_somebody_closed_is_opened_again() -> None:
    closed = get_event_store()
    closed.close()
    with get_event_store() as again:
        assert again is not closed
        again.ping()


def test_a_store_that_cannot_be_opened_is_tried_again_the_next_time(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/later/events.db"
    with pytest.raises(StoreError):
        get_event_store(url)
    (tmp_path / "later").mkdir()
    get_event_store(url).close()
    with pytest.raises(ConfigurationError):
        get_event_store("mysql://host/name")
