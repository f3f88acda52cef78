"""For any events: both databases keep the same, and a query finds what a list would."""

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from services.postgres import PostgresServer

from langgraph_peerctx.errors import PeerContextError
from langgraph_peerctx.identifiers import new_id
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.protocol.messages import Interaction

AGENTS = ("ann", "bob", "cid")
THREADS = ("t", "t2", "T", "t%", "t'")
START = datetime(2026, 5, 1, tzinfo=UTC)

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec=None), max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
bodies = st.dictionaries(st.text(st.characters(codec=None), max_size=5), anything, max_size=4)
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), min_size=1, max_size=20)
moments = st.integers(0, 9).map(lambda second: START + timedelta(seconds=second))
optional_moments = st.none() | moments


@st.composite
def events(draw: st.DrawFn) -> Interaction:
    return Interaction(
        interaction_id=f"i-{draw(st.integers(0, 12))}",
        thread_id=draw(st.sampled_from(THREADS)),
        from_agent=draw(st.sampled_from(AGENTS)),
        to_agent=draw(st.sampled_from(AGENTS)),
        kind="message",
        occurred_at=draw(moments),
        effect_key=draw(st.none() | st.sampled_from(("e", "E"))),
    )


@st.composite
def strange_events(draw: st.DrawFn) -> Interaction:
    """Whatever a caller may have put together, past validation."""
    moment = st.datetimes(timezones=st.just(UTC))
    return draw(events()).model_copy(
        update={
            "interaction_id": draw(texts),
            "payload": draw(bodies),
            "occurred_at": draw(moment),
            "run_id": draw(st.none() | texts),
        }
    )


@pytest.fixture(scope="module")
def stores(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[EventStore]]:
    """One of each kind, for all examples: each uses agents of its own."""
    folder: Path = tmp_path_factory.mktemp("events")
    with ExitStack() as stack:
        url = stack.enter_context(postgres_server.database())
        addresses = [f"sqlite:///{folder}/events.db", url]
        yield [stack.enter_context(EventStore(address)) for address in addresses]


def outcome(store: EventStore, event: Interaction, mark: str) -> Any:
    """What the store says to an event, and what it then returns of it."""
    name = f"ann-{mark}"
    event = event.model_copy(update={"from_agent": name, "thread_id": "t"})
    try:
        stored = store.append(name, event)
    except PeerContextError as error:
        return type(error), str(error)
    found = store.interactions_of(name, thread_id="t")
    assert found == [stored]
    return stored.model_copy(update={"sequence": None}).model_dump_json()


@pytest.mark.postgres
@given(event=strange_events())
@settings(max_examples=150, deadline=None)
def test_both_databases_accept_and_return_the_same(
    stores: list[EventStore], event: Interaction
) -> None:
    mark = new_id()[:12]
    on_sqlite, on_postgresql = (outcome(store, event, mark) for store in stores)
    assert on_sqlite == on_postgresql


@pytest.mark.postgres
@given(state=bodies)
@settings(max_examples=75, deadline=None)
def test_both_databases_remember_the_same(stores: list[EventStore], state: dict[str, Any]) -> None:
    mark = new_id()
    for store in stores:
        store.remember(mark, "peer", state)
    on_sqlite, on_postgresql = (store.memory_of(mark, "peer") for store in stores)
    assert on_sqlite == on_postgresql


@pytest.mark.postgres
@given(
    recorded=st.lists(st.tuples(st.sampled_from(AGENTS), events()), max_size=15),
    asked=st.sampled_from(AGENTS),
    of=st.sampled_from(AGENTS),
    thread=st.sampled_from(THREADS),
    since=optional_moments,
    until=optional_moments,
    limit=st.integers(1, 6),
)
@settings(max_examples=100, deadline=None)
def test_a_query_finds_what_a_list_would_and_nothing_of_others(
    *,
    stores: list[EventStore],
    recorded: list[tuple[str, Interaction]],
    asked: str,
    of: str,
    thread: str,
    since: datetime | None,
    until: datetime | None,
    limit: int,
) -> None:
    mark = new_id()[:12]
    named = [
        (
            f"{agent}-{mark}",
            event.model_copy(
                update={
                    "from_agent": f"{event.from_agent}-{mark}",
                    "to_agent": f"{event.to_agent}-{mark}",
                }
            ),
        )
        for agent, event in recorded
        if agent in (event.from_agent, event.to_agent)
    ]
    first: dict[tuple[str, str], Interaction] = {}
    for agent, event in named:
        first.setdefault((agent, event.interaction_id), event)
    me, other = f"{asked}-{mark}", f"{of}-{mark}"
    mine = [event for (agent, _), event in first.items() if agent == me]
    inside = [
        event
        for event in mine
        if event.thread_id == thread
        and (since is None or event.occurred_at >= since)
        and (until is None or event.occurred_at <= until)
    ]
    inside = sorted(inside, key=lambda event: event.occurred_at)[::-1]  # of equals the last first
    pair = [e for e in inside if {e.from_agent, e.to_agent} == {me, other}]
    window: dict[str, Any] = {"thread_id": thread, "since": since, "until": until, "limit": limit}
    for store in stores:
        for agent, event in named:
            store.append(agent, event)
        found = store.interactions_with(me, other, **window)
        assert _bare(found) == pair[:limit]
        assert _bare(store.interactions_of(me, **window)) == inside[:limit]
        by_key = store.by_effect_key(me, "e")
        assert _bare(by_key) == [event for event in mine if event.effect_key == "e"][::-1]


def _bare(found: list[Interaction]) -> list[Interaction]:
    return [event.model_copy(update={"sequence": None}) for event in found]
