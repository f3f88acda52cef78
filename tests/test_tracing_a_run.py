"""A run keeps the span in which it began, so that its recovery can refer to it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt
from runtime_threads import no_runtime_left
from spans import Spans, tracing_on
from typing_extensions import TypedDict

from langgraph_peerctx import background
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.tracing import span

AT: Any = {"configurable": {"thread_id": "t"}}


class State(TypedDict, total=False):
    said: str


@pytest.fixture
def spans() -> Iterator[Spans]:
    with tracing_on() as found:
        yield found


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ControlDatabase]:
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/control.db")
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", f"sqlite:///{tmp_path}/own.db")
    monkeypatch.setenv("PEER_CONTEXT_MOCK_MODE", "always")
    with no_runtime_left(), ControlDatabase(PeerContextSettings().control_url) as opened:
        yield opened
        background.stop_kept_runtime()


def asking() -> Any:
    builder = StateGraph(State)
    builder.add_node("ask", lambda _: {"said": interrupt("what?")})
    builder.add_edge(START, "ask")
    app = builder.compile(checkpointer=InMemorySaver(), name="launch")
    return own_runs(app, agent_id="agent")


def kept(control: ControlDatabase) -> str | None:
    run = control.newest_run("agent", "t")
    assert run is not None
    return run.traceparent


@pytest.mark.usefixtures("spans")
async def test_a_run_is_admitted_with_the_span_in_which_it_began(control: ControlDatabase) -> None:
    app = asking()
    with span("first") as first:
        await app.ainvoke({}, AT)
    assert kept(control) == first.traceparent is not None
    with span("second") as second:
        await app.ainvoke(Command(resume="yes"), AT)
    assert kept(control) == second.traceparent


@pytest.mark.usefixtures("spans")
def test_so_is_one_of_sync_code(control: ControlDatabase) -> None:
    with span("first") as first:
        asking().invoke({}, AT)
    assert kept(control) == first.traceparent is not None


async def test_a_run_that_is_not_traced_has_none(control: ControlDatabase) -> None:
    await asking().ainvoke({}, AT)
    assert kept(control) is None
