"""The node, as users put it into their graphs."""

import asyncio
import threading
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import RetryPolicy, Send
from pydantic import BaseModel

from langgraph_peerctx import background
from langgraph_peerctx.background import BackgroundRuntime
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    ProtocolError,
    TooFewResponsesError,
)
from langgraph_peerctx.gathering.gatherer import Gatherer
from langgraph_peerctx.nodes.peer_context_node import PeerContextNode, peer_context_retry_policy
from langgraph_peerctx.nodes.state import PeerContextState, merge_peer_context

ABOUT = {"failed_agent_id": "product-agent", "thread_id": "thread-1"}


class State(PeerContextState, total=False):
    failed_agent_id: str
    thread_id: str
    time_window_seconds: float


def graph(node: PeerContextNode | None = None, schema: Any = State, **options: Any) -> Any:
    node = node or PeerContextNode(expect=["inventory-agent"], timeout_seconds=10)
    builder = StateGraph(schema)
    builder.add_node("peer_context", node, **options)
    builder.add_edge(START, "peer_context")
    return builder.compile(checkpointer=InMemorySaver())


def config(thread_id: str = "outer") -> Any:
    return {"configurable": {"thread_id": thread_id}}


def check(state: Any) -> None:
    fact = state["peer_context"]["order-1"]
    assert (fact["source"], fact["told_by"]) == ("peer", ["inventory-agent"])
    assert fact["payload"] == {"sku": "A1"}
    report = state["peer_context_report"]
    assert report["coverage"]["complete"]
    assert (report["facts"], report["degraded"]) == (1, [])


@pytest.mark.usefixtures("team")
async def test_a_node_brings_the_peers_facts_into_the_state() -> None:
    check(await graph().ainvoke(ABOUT, config()))


@pytest.mark.usefixtures("team")
def test_the_same_graph_runs_in_sync() -> None:
    check(graph().invoke(ABOUT, config()))


@pytest.mark.usefixtures("team")
async def test_sync_inside_a_running_loop_as_in_a_notebook() -> None:
    check(graph().invoke(ABOUT, config()))


def by_gather(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """A reducer of the user's own: every report, under its gather."""
    fresh = {right["correlation_id"]: right} if "correlation_id" in right else right
    return {**left, **fresh}


class FannedOut(State, total=False):
    peer_context_report: Annotated[dict[str, Any], by_gather]


@pytest.mark.usefixtures("team")
async def test_several_in_one_step_bring_their_facts_and_reports() -> None:
    builder = StateGraph(FannedOut)
    builder.add_node(
        "peer_context", PeerContextNode(expect=["inventory-agent"], timeout_seconds=10)
    )
    builder.add_conditional_edges(
        START, lambda _: [Send("peer_context", ABOUT) for _ in range(3)], ["peer_context"]
    )
    state = await builder.compile(checkpointer=InMemorySaver()).ainvoke({}, config())
    assert set(state["peer_context"]) == {"order-1"}
    reports = state["peer_context_report"].values()
    assert [report["coverage"]["complete"] for report in reports] == [True] * 3


@pytest.mark.usefixtures("team")
async def test_a_node_may_run_on_any_loop() -> None:
    def elsewhere() -> Any:
        return asyncio.run(graph().ainvoke(ABOUT, config()))

    check(await asyncio.to_thread(elsewhere))
    check(await graph().ainvoke(ABOUT, config()))


EVENTS = ["asking", "request_sent", "answer", "coverage"]


@pytest.mark.usefixtures("team")
async def test_progress_goes_to_the_custom_stream() -> None:
    events = [
        event["peer_context"]
        async for event in graph().astream(ABOUT, config(), stream_mode="custom")
    ]
    assert sorted(event["event"] for event in events) == sorted(EVENTS)
    assert (events[0]["event"], events[-1]["event"]) == ("asking", "coverage")
    said = {event["event"]: event for event in events}
    assert said["asking"]["expect"] == ["inventory-agent"]
    assert said["answer"]["agents"] == {"inventory-agent": "context"}
    assert said["answer"]["interactions"] == 1
    assert said["coverage"]["coverage"]["complete"]


@pytest.mark.usefixtures("team")
def test_progress_is_streamed_in_sync_too() -> None:
    events = [
        event["peer_context"] for event in graph().stream(ABOUT, config(), stream_mode="custom")
    ]
    assert sorted(event["event"] for event in events) == sorted(EVENTS)


class Model(BaseModel):
    failed_agent_id: str
    thread_id: str
    peer_context: Annotated[dict[str, Any], merge_peer_context] = {}
    peer_context_report: dict[str, Any] = {}


@dataclass
class Data:
    failed_agent_id: str
    thread_id: str
    peer_context: Annotated[dict[str, Any], merge_peer_context] = field(default_factory=dict)
    peer_context_report: dict[str, Any] = field(default_factory=dict)


@pytest.mark.usefixtures("team")
@pytest.mark.parametrize("schema", [Model, Data])
async def test_the_state_may_be_a_model_or_a_dataclass(schema: Any) -> None:
    check(await graph(schema=schema).ainvoke(ABOUT, config()))


class Renamed(TypedDict, total=False):
    who: str
    where: str
    back: int
    known: Annotated[dict[str, Any], merge_peer_context]


async def test_keys_have_other_names_where_the_state_has(
    team: BackgroundRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    del team
    asked: list[Any] = []
    send = Gatherer.send

    async def remember(self: Gatherer, request: Any, addressees: Any = ()) -> None:
        asked.append(request)
        await send(self, request, addressees)

    monkeypatch.setattr(Gatherer, "send", remember)
    node = PeerContextNode(
        failed_agent_key="who",
        thread_key="where",
        window_key="back",
        output_channel="known",
        expect=["inventory-agent"],
        timeout_seconds=10,
    )
    state = await graph(node, Renamed).ainvoke(
        {"who": "product-agent", "where": "thread-1", "back": 7_200}, config()
    )
    assert list(state["known"]) == ["order-1"]
    assert "peer_context_report" not in state
    assert asked[0].time_window_seconds == 7_200


@pytest.mark.usefixtures("team")
async def test_without_a_thread_in_the_state_it_is_the_graphs_own() -> None:
    state = await graph().ainvoke({"failed_agent_id": "product-agent"}, config("thread-1"))
    check(state)


@pytest.mark.usefixtures("team")
async def test_an_agent_that_nobody_knows_has_no_facts_and_full_coverage() -> None:
    state = await graph().ainvoke(ABOUT | {"failed_agent_id": "nobody"}, config())
    assert state["peer_context"] == {}
    assert state["peer_context_report"]["coverage"]["empty"] == ["inventory-agent"]


@pytest.mark.parametrize(
    ("state", "error", "said"),
    [
        ({}, ConfigurationError, r"state\['failed_agent_id'\] should name the agent"),
        ({"failed_agent_id": 7}, ConfigurationError, "it is 7"),
        ({"failed_agent_id": "../x", "thread_id": "t"}, ProtocolError, "failed_agent_id"),
        (ABOUT | {"thread_id": ""}, ConfigurationError, r"state\['thread_id'\]"),
        (ABOUT | {"time_window_seconds": -1}, ConfigurationError, "positive number of seconds"),
        (ABOUT | {"time_window_seconds": 1e12}, ProtocolError, "time_window_seconds"),
    ],
)
@pytest.mark.usefixtures("team")
def test_bad_input_is_named(state: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        graph().invoke(state, config())


def test_outside_a_graph_a_thread_must_be_named() -> None:
    settings = PeerContextSettings(mock_mode="always", timeout_seconds=0.1)
    node = PeerContextNode(settings=settings)
    with pytest.raises(ConfigurationError, match="which thread"):
        node.invoke({"failed_agent_id": "product-agent"})
    update = node.invoke(ABOUT)
    assert update["peer_context"] == {}
    assert update["peer_context_report"]["degraded"][0].startswith("mock mode")


async def test_it_starts_the_runtime_if_need_be_and_keeps_it() -> None:
    settings = PeerContextSettings(mock_mode="always", timeout_seconds=0.1)
    app = graph(PeerContextNode(settings=settings))
    await app.ainvoke(ABOUT, config())
    assert background.settings_in_use() is not None
    before = {thread.ident for thread in threading.enumerate() if thread.name == "peerctx-runtime"}
    await app.ainvoke(ABOUT, config("another"))
    after = {thread.ident for thread in threading.enumerate() if thread.name == "peerctx-runtime"}
    assert before == after


async def test_switched_off_it_asks_nobody_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEER_CONTEXT_ENABLED", "false")
    state = await graph(PeerContextNode()).ainvoke(ABOUT, config())
    assert state["peer_context"] == {}
    assert "switched off" in state["peer_context_report"]["degraded"][0]
    assert background.settings_in_use() is None


@pytest.mark.usefixtures("team")
async def test_a_node_that_is_cancelled_leaves_nothing_behind() -> None:
    node = PeerContextNode(expect=["nobody"], timeout_seconds=30)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await graph(node).ainvoke(ABOUT, config())
    check(await graph().ainvoke(ABOUT, config("another")))


@pytest.mark.usefixtures("team")
async def test_too_few_answers_are_tried_again_by_a_retry_policy() -> None:
    node = PeerContextNode(expect=["nobody"], timeout_seconds=0.2, min_responses=2)
    events: list[Any] = []
    app = graph(node, retry_policy=fast(peer_context_retry_policy(max_attempts=3)))

    async def run() -> None:
        async for event in app.astream(ABOUT, config(), stream_mode="custom"):
            events.append(event["peer_context"]["event"])  # noqa: PERF401 - it raises half-way

    with pytest.raises(TooFewResponsesError, match="of at least 2"):
        await run()
    assert events.count("asking") == 3


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_broker_that_is_not_there_is_retried_and_a_wrong_id_is_not(
    monkeypatch: pytest.MonkeyPatch, *, is_async: bool
) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setenv("KAFKA_CONNECT_TIMEOUT_SECONDS", "0.3")
    monkeypatch.setenv("PEER_CONTEXT_MOCK_MODE", "never")
    starts: list[int] = []
    start = BackgroundRuntime.start
    monkeypatch.setattr(BackgroundRuntime, "start", lambda self: starts.append(1) or start(self))
    app = graph(PeerContextNode(), retry_policy=fast(peer_context_retry_policy()))

    async def run(state: Any) -> None:
        place = config(f"outer-{len(state)}")
        await app.ainvoke(state, place) if is_async else app.invoke(state, place)

    with pytest.raises(BrokerUnavailableError):
        await run(ABOUT)
    assert len(starts) == 3
    with pytest.raises(ConfigurationError):
        await run({"thread_id": "t"})
    assert len(starts) == 3


def fast(policy: RetryPolicy) -> RetryPolicy:
    return policy._replace(initial_interval=0.01, jitter=False)
