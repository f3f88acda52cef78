"""A graph's start and stop, in each way that LangGraph has."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langgraph.graph import START, StateGraph
from runtime_threads import no_runtime_left, running_threads
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from langgraph_peerctx import background
from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    ProtocolError,
    StoreError,
)
from langgraph_peerctx.lifecycle import PeerContextHook, peer_context_lifespan
from langgraph_peerctx.messaging.embedded_broker import EmbeddedBroker
from langgraph_peerctx.nodes.peer_context_node import PeerContextNode
from langgraph_peerctx.nodes.state import PeerContextState
from langgraph_peerctx.runtime import PeerContextRuntime

NOWHERE = PeerContextSettings(
    kafka=KafkaConfig(bootstrap_servers="127.0.0.1:1", connect_timeout_seconds=0.3),
    mock_mode="never",
)
ABOUT = {"failed_agent_id": "product-agent", "thread_id": "thread-1"}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with no_runtime_left():
        yield


@pytest.fixture
def settings(tmp_path: Path) -> PeerContextSettings:
    return PeerContextSettings(
        mock_mode="always", timeout_seconds=0.1, database_url=f"sqlite:///{tmp_path}/events.db"
    )


class State(PeerContextState, total=False):
    failed_agent_id: str
    thread_id: str


def graph() -> Any:
    builder = StateGraph(State)
    builder.add_node("peer_context", PeerContextNode())
    builder.add_edge(START, "peer_context")
    return builder.compile()


async def test_around_a_graph(settings: PeerContextSettings) -> None:
    async with peer_context_lifespan(agents=["a", "b"], settings=settings) as runtime:
        assert runtime.agents == ("a", "b")
        state = await graph().ainvoke(ABOUT)
        assert state["peer_context_report"]["degraded"][0].startswith("mock mode")
    assert background.settings_in_use() is None


async def test_all_its_agents_answer_what_was_asked_before_it_was_entered(tmp_path: Path) -> None:
    with EmbeddedBroker() as broker:
        settings = PeerContextSettings(
            kafka=KafkaConfig(bootstrap_servers=broker.bootstrap_servers),
            mock_mode="never",
            requester_id="asker",
            database_url=f"sqlite:///{tmp_path}/events.db",
        )
        async with PeerContextRuntime(settings) as asker:
            gathering = asyncio.create_task(
                asker.gather(**ABOUT, expect=["a", "b"], timeout_seconds=20)
            )
            await asyncio.sleep(0.2)
            async with peer_context_lifespan(agents=["a", "b"], settings=settings):
                context = await gathering
    assert context.coverage.answered == ("a", "b")
    assert context.coverage.complete


async def test_entered_twice_it_runs_until_both_have_left(settings: PeerContextSettings) -> None:
    async with peer_context_lifespan(agents=["a"], settings=settings) as outer:
        async with peer_context_lifespan(agents=["a", "b"]) as inner:
            assert inner is outer
            assert outer.agents == ("a", "b")
        assert outer.agents == ("a",)
    assert background.settings_in_use() is None


async def test_started_again_after_it_stopped(settings: PeerContextSettings) -> None:
    for _ in range(3):
        async with peer_context_lifespan(agents=["a"], settings=settings) as runtime:
            assert runtime.agents == ("a",)
        assert "peerctx-runtime" not in running_threads()


async def test_several_copies_at_once_as_in_queue_workers(settings: PeerContextSettings) -> None:
    entered: list[int] = []

    async def worker() -> int:
        async with (
            peer_context_lifespan(agents=["a"], settings=settings) as runtime,
            asyncio.timeout(20),
        ):
            entered.append(id(runtime))
            while len(entered) < 8:  # or the first would be gone before the last comes
                await asyncio.sleep(0.01)
            return id(runtime)

    def on_a_loop_of_its_own() -> int:
        return asyncio.run(worker())

    copies = await asyncio.gather(
        *(worker() for _ in range(4)), *(asyncio.to_thread(on_a_loop_of_its_own) for _ in range(4))
    )
    assert len(set(copies)) == 1


async def test_left_while_a_node_runs_it_stops_after_the_node(
    settings: PeerContextSettings,
) -> None:
    """LangGraph's server leaves the lifespan before its running nodes are done."""
    began, finish = asyncio.Event(), asyncio.Event()
    lease: list[background.Lease] = []

    async def node() -> str:
        lease.append(background.lease())
        runtime = await lease[0].aruntime()
        began.set()
        await finish.wait()
        try:
            return (await runtime.acall(_thread)).strip()
        finally:
            await lease[0].arelease()

    async with peer_context_lifespan(settings=settings):
        running = asyncio.create_task(node())
        await began.wait()
    assert background.settings_in_use() is not None
    finish.set()
    assert await running == "peerctx-runtime"
    assert background.settings_in_use() is None


async def _thread(_runtime: Any) -> str:
    return threading.current_thread().name


def application(lifespan: Any) -> Starlette:
    def agents(request: Request) -> JSONResponse:
        return JSONResponse(list(request.state.peer_context.agents))

    return Starlette(routes=[Route("/agents", agents)], lifespan=lifespan)


def test_as_the_lifespan_of_an_application(settings: PeerContextSettings) -> None:
    lifespan = partial(peer_context_lifespan, agents=["a"], settings=settings)
    with TestClient(application(lifespan)) as client:
        assert client.get("/agents").json() == ["a"]
    assert background.settings_in_use() is None


def test_within_an_applications_own_lifespan(settings: PeerContextSettings) -> None:
    events: list[str] = []

    @asynccontextmanager
    async def own(app: Starlette) -> AsyncIterator[Any]:
        events.append("up")
        async with peer_context_lifespan(app, agents=["a"], settings=settings) as state:
            yield {**state, "more": 1}
        events.append("down")

    with TestClient(application(own)) as client:
        assert client.get("/agents").json() == ["a"]
    assert events == ["up", "down"]
    assert background.settings_in_use() is None


async def test_inside_a_graph_factory_that_is_entered_at_every_read(
    settings: PeerContextSettings,
) -> None:
    @asynccontextmanager
    async def make_graph(*, executes: bool) -> AsyncIterator[Any]:
        if not executes:  # a schema or a state is read
            yield graph()
            return
        async with peer_context_lifespan(agents=["a"], settings=settings):
            yield graph()

    async with make_graph(executes=False) as app:
        assert app.get_input_jsonschema()
    assert background.settings_in_use() is None
    async with make_graph(executes=True) as first, make_graph(executes=True) as second:
        states = await asyncio.gather(first.ainvoke(ABOUT), second.ainvoke(ABOUT))
        assert all("peer_context_report" in state for state in states)


async def test_what_keeps_it_from_starting_is_raised_and_logged(
    settings: PeerContextSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = settings.model_copy(update={"database_url": f"sqlite:///{tmp_path}/missing/x.db"})
    for wrong, error, said in (
        (NOWHERE, BrokerUnavailableError, "no Kafka broker"),
        (nowhere, StoreError, "missing"),
    ):
        caplog.clear()
        with pytest.raises(error, match=said):
            async with peer_context_lifespan(agents=["a"], settings=wrong):
                pass
        assert [r.levelno for r in caplog.records if "did not start" in r.message] == [
            logging.ERROR
        ]
        assert background.settings_in_use() is None
    with pytest.raises(ProtocolError, match="agents"):
        peer_context_lifespan(agents=["../x"])
    with pytest.raises(ProtocolError, match="agents"):
        PeerContextHook(["../x"])


def test_an_application_whose_peer_context_cannot_start_does_not_start() -> None:
    app = application(partial(peer_context_lifespan, settings=NOWHERE))
    with pytest.raises(BrokerUnavailableError), TestClient(app):
        pass


# The hook


class Plain(TypedDict, total=False):
    seen: list[str]


def plain_graph(seen: Any) -> Any:
    builder = StateGraph(Plain)
    builder.add_node("look", seen)
    builder.add_edge(START, "look")
    outer = StateGraph(Plain)
    outer.add_node("inner", builder.compile())
    outer.add_edge(START, "inner")
    return outer.compile()


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_hook_starts_it_with_the_first_run(
    settings: PeerContextSettings, *, is_async: bool
) -> None:
    runtimes: list[int] = []

    def look(_state: Plain) -> None:
        lease = background.lease()
        runtimes.append(id(lease.runtime()))
        lease.release()

    hook = PeerContextHook(["a"], settings)
    app = plain_graph(look).with_config(callbacks=[hook])
    assert background.settings_in_use() is None
    for _ in range(2):
        await app.ainvoke({}) if is_async else app.invoke({})
    assert len(set(runtimes)) == 1
    assert background.settings_in_use() == settings
    await asyncio.to_thread(hook.close)
    hook.close()
    assert background.settings_in_use() is None


async def test_a_hook_hosts_its_agents_and_lets_them_go(settings: PeerContextSettings) -> None:
    async with peer_context_lifespan(settings=settings) as runtime:
        hook = PeerContextHook(["a", "b"])
        hook.start()
        hook.start()
        async with asyncio.timeout(20):
            while runtime.agents != ("a", "b"):
                await asyncio.sleep(0.01)
        await asyncio.to_thread(hook.close)
        assert runtime.agents == ()


async def test_a_hook_that_cannot_start_it_says_so_and_lets_the_graph_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hook = PeerContextHook(["a"], NOWHERE)
    app = plain_graph(lambda _state: {"seen": ["ran"]}).with_config(callbacks=[hook])
    for attempt in (1, 2):
        assert await app.ainvoke({}) == {"seen": ["ran"]}
        async with asyncio.timeout(20):
            while hook._lease is not None:  # it says so first, and may then be started again
                await asyncio.sleep(0.01)
        assert len([r for r in caplog.records if "did not start" in r.message]) == attempt
    await asyncio.to_thread(hook.close)


async def test_a_hook_with_other_settings_is_an_error(settings: PeerContextSettings) -> None:
    async with peer_context_lifespan(settings=settings):
        app = plain_graph(lambda _state: {}).with_config(callbacks=[PeerContextHook((), NOWHERE)])
        with pytest.raises(ConfigurationError, match="other settings"):
            await app.ainvoke({})
