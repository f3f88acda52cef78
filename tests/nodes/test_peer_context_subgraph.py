"""The gather whose steps are nodes: in its parent, and after SIGKILL at each of its places."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from dying import PLACES
from forking import exit_code_of
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, StateGraph
from nodes.dying_gather import ABOUT, CONFIG, main, workflow
from nodes.test_peer_context_node import State, check
from two_peers import Peers

from langgraph_peerctx import background
from langgraph_peerctx.errors import ConfigurationError, ProtocolError, TooFewResponsesError
from langgraph_peerctx.nodes.peer_context_subgraph import create_peer_context_subgraph


def parent(subgraph: Any, **options: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node("peers", subgraph)
    builder.add_edge(START, "peers")
    return builder.compile(**options)


@pytest.mark.usefixtures("team")
@pytest.mark.parametrize("checkpointer", [None, True, False])
@pytest.mark.parametrize("is_async", [True, False])
async def test_it_is_a_node_of_any_graph(*, checkpointer: bool | None, is_async: bool) -> None:
    subgraph = create_peer_context_subgraph(expect=["inventory-agent"], timeout_seconds=10)
    app = parent(subgraph.compile(checkpointer=checkpointer), checkpointer=InMemorySaver())
    check(await app.ainvoke(ABOUT, CONFIG) if is_async else app.invoke(ABOUT, CONFIG))


@pytest.mark.usefixtures("team")
async def test_it_runs_alone_and_the_input_says_more_than_the_defaults() -> None:
    app = create_peer_context_subgraph(expect=["nobody"], timeout_seconds=0.1).compile()
    asked = ABOUT | {"expect": ["inventory-agent"], "timeout_seconds": 10, "min_responses": 1}
    state = await app.ainvoke(asked)
    assert set(state) == {"peer_context", "peer_context_report"}
    check(state)


@pytest.mark.usefixtures("team")
async def test_its_steps_and_progress_are_seen() -> None:
    subgraph = create_peer_context_subgraph(expect=["inventory-agent"], timeout_seconds=10)
    app = parent(subgraph.compile(), checkpointer=InMemorySaver())
    nodes, events = [], []
    async for _, mode, chunk in app.astream(
        ABOUT, CONFIG, stream_mode=["updates", "custom"], subgraphs=True
    ):
        if mode == "custom":
            events.append(chunk["peer_context"]["event"])
        else:
            nodes += list(chunk)
    assert nodes == ["position", "request_context", "collect_context", "peers"]
    assert events == ["asking", "request_sent", "answer", "coverage"]


@pytest.mark.parametrize(
    ("state", "error", "said"),
    [
        ({}, ConfigurationError, "failed_agent_id"),
        ({"failed_agent_id": "product-agent"}, ConfigurationError, "which thread"),
        (ABOUT | {"failed_agent_id": "../x"}, ProtocolError, "failed_agent_id"),
        (ABOUT | {"expect": "inventory-agent"}, ConfigurationError, "list of names"),
        (ABOUT | {"expect": [7]}, ConfigurationError, "list of names"),
        (ABOUT | {"timeout_seconds": "long"}, ConfigurationError, "positive number"),
        (ABOUT | {"min_responses": 1.5}, ConfigurationError, "whole number"),
        (ABOUT | {"min_responses": 9, "timeout_seconds": 0.1}, TooFewResponsesError, "at least 9"),
    ],
)
@pytest.mark.usefixtures("team")
async def test_bad_input_is_named(state: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        await create_peer_context_subgraph().compile().ainvoke(state)


@pytest.mark.usefixtures("team")
async def test_a_step_whose_forerunner_did_not_run_says_so() -> None:
    builder = create_peer_context_subgraph()
    app = builder.compile(checkpointer=InMemorySaver())
    for node, key in (("position", "question"), ("request_context", "asked")):
        config: Any = {"configurable": {"thread_id": node}}
        wrong = {"question": {}} if node == "position" else {"asked": {"at": "then"}}
        await app.ainvoke(ABOUT, config, interrupt_after=[node])
        await app.aupdate_state(config, wrong, as_node=node)
        with pytest.raises(ConfigurationError, match=key):
            await app.ainvoke(None, config)


async def test_switched_off_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEER_CONTEXT_ENABLED", "false")
    state = await create_peer_context_subgraph().compile().ainvoke(ABOUT)
    assert state["peer_context"] == {}
    assert "switched off" in state["peer_context_report"]["degraded"][0]
    assert background.settings_in_use() is None


def test_its_schemas_read_well() -> None:
    app = create_peer_context_subgraph().compile()
    for name, described in app.get_input_jsonschema()["properties"].items():
        assert described["title"], name
        assert described["description"], name
        assert described["examples"], name
    assert set(app.get_output_jsonschema()["properties"]) == {"peer_context", "peer_context_report"}


# Killed


async def killed(place: str, database: Path, *, checkpointer: bool | None = None) -> None:
    ended = await asyncio.to_thread(exit_code_of, main, str(database), place, checkpointer)
    assert ended == -signal.SIGKILL


@asynccontextmanager
async def successor(database: Path, *, checkpointer: bool | None = None) -> AsyncIterator[Any]:
    async with AsyncSqliteSaver.from_conn_string(str(database)) as saver:
        yield workflow(saver, checkpointer=checkpointer)


@pytest.mark.parametrize("checkpointer", [None, True], ids=["inherited", "remembering"])
@pytest.mark.parametrize("place", PLACES[1:4])
async def test_killed_at_any_place_it_goes_on_where_it_was(
    two: Peers, tmp_path: Path, place: str, *, checkpointer: bool | None
) -> None:
    database = tmp_path / "checkpoints.db"
    await killed(place, database, checkpointer=checkpointer)
    before = len(two.requests)
    if place == "before request":
        await two.start("b")
    async with successor(database, checkpointer=checkpointer) as app:
        state = await app.ainvoke(None, CONFIG, durability="sync")

    assert state["used"] == ["order-a", "order-b"]
    coverage = state["peer_context_report"]["coverage"]
    assert coverage["answered"] == ["a", "b"]
    assert len({request.correlation_id for request in two.requests}) == 1
    addressed = [request.addressees for request in two.requests]
    assert addressed[:before] == ([] if place == "before request" else [()])
    if place != "before request":
        assert addressed[before:] == [("b",)]


async def test_killed_before_it_began_it_begins(two: Peers, tmp_path: Path) -> None:
    database = tmp_path / "checkpoints.db"
    await killed("before position", database)
    assert two.requests == []
    await two.start("b")
    async with successor(database) as app:
        state = await app.ainvoke(None, CONFIG, durability="sync")
    assert state["used"] == ["order-a", "order-b"]


async def test_killed_when_all_was_there_nobody_is_asked_again(two: Peers, tmp_path: Path) -> None:
    await two.start("b")
    database = tmp_path / "checkpoints.db"
    await killed("after collect", database)
    async with successor(database) as app:
        state = await app.ainvoke(None, CONFIG, durability="sync")
    assert state["used"] == ["order-a", "order-b"]
    assert len(two.requests) == 1


async def test_without_a_checkpointer_it_begins_anew(two: Peers, tmp_path: Path) -> None:
    """The parent has one, the subgraph has not: it runs again whole, with a question of its own."""
    database = tmp_path / "checkpoints.db"
    await killed("in the middle of collect", database, checkpointer=False)
    async with successor(database, checkpointer=False) as app:
        state = await app.ainvoke(None, CONFIG, durability="async")
    assert state["used"] == ["order-a", "order-b"]
    assert len({request.correlation_id for request in two.requests}) == 2
