"""Owned runs are recorded by whoever is named: for the run, or for the process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from owning import AGENT, AT, THREAD, new_run
from typing_extensions import TypedDict

from langgraph_peerctx import (
    EventStore,
    InteractionRecorder,
    PeerContextSettings,
    own_runs,
    owned,
    peer_context_lifespan,
    recover_and_resume_workflow_async,
)
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.runs import Owner

pytestmark = pytest.mark.usefixtures("_no_runtime_left")


class State(TypedDict, total=False):
    topic: str


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    with EventStore(f"sqlite:///{tmp_path}/events.db") as opened:
        yield opened


@pytest.fixture
def recorder(store: EventStore) -> Iterator[InteractionRecorder]:
    made = InteractionRecorder(AGENT, store=store)
    yield made
    made.close()


def workflow() -> Any:
    builder = StateGraph(State)
    builder.add_node("write", lambda state: {"topic": state["topic"].upper()})
    builder.add_edge(START, "write")
    builder.add_edge("write", END)
    return builder.compile(checkpointer=InMemorySaver(), name="launch")


def kinds(store: EventStore) -> list[str]:
    return [i.kind for i in reversed(store.interactions_of(AGENT, thread_id=THREAD))]


async def test_a_run_is_recorded_under_the_id_it_was_admitted_with(
    store: EventStore, recorder: InteractionRecorder, settings: PeerContextSettings
) -> None:
    async with owned(workflow(), agent_id=AGENT, thread_id=THREAD, recorder=recorder) as run:
        await run.ainvoke({"topic": "umbrella"})
    with ControlDatabase(settings.control_url) as control:
        admitted = control.newest_run(AGENT, THREAD)
    assert admitted is not None
    found = store.interactions_of(AGENT, thread_id=THREAD)
    assert {interaction.run_id for interaction in found} == {admitted.run_id}
    assert kinds(store) == ["run_begin", "node", "run_end"]


def test_a_sync_run_is_recorded_too(store: EventStore, recorder: InteractionRecorder) -> None:
    own_runs(workflow(), agent_id=AGENT, recorder=recorder).invoke({"topic": "umbrella"}, AT)
    assert kinds(store) == ["run_begin", "node", "run_end"]


async def test_a_lifespans_recorder_records_its_agents_runs_as_long_as_it_lasts(
    store: EventStore, recorder: InteractionRecorder
) -> None:
    app, stranger = own_runs(workflow(), agent_id=AGENT), own_runs(workflow(), agent_id="other")
    async with peer_context_lifespan(recorders=[recorder]):
        await app.ainvoke({"topic": "umbrella"}, AT)
        await stranger.ainvoke({"topic": "umbrella"}, AT)
    assert kinds(store) == ["run_begin", "node", "run_end"]
    await app.ainvoke({"topic": "lantern"}, AT)
    assert len(kinds(store)) == 3


async def test_a_run_is_recorded_once_though_it_was_asked_for_twice(
    store: EventStore, recorder: InteractionRecorder
) -> None:
    watched = workflow().with_config(callbacks=[recorder])
    async with peer_context_lifespan(recorders=[recorder]):
        await own_runs(watched, agent_id=AGENT, recorder=recorder).ainvoke({"topic": "x"}, AT)
    assert kinds(store) == ["run_begin", "node", "run_end"]


async def test_callbacks_of_the_workflow_and_of_the_call_are_called_once_each() -> None:
    class Counting(BaseCallbackHandler):
        def __init__(self) -> None:
            self.roots = 0

        def on_chain_start(self, *_: Any, parent_run_id: Any = None, **__: Any) -> None:
            self.roots += parent_run_id is None

    of_workflow, of_call = Counting(), Counting()
    app = own_runs(workflow().with_config(callbacks=[of_workflow]), agent_id=AGENT)
    await app.ainvoke({"topic": "x"}, {**AT, "callbacks": [of_call]})
    assert (of_workflow.roots, of_call.roots) == (1, 1)


async def test_a_recovered_run_is_recorded(
    store: EventStore, recorder: InteractionRecorder, settings: PeerContextSettings
) -> None:
    app = workflow()
    with ControlDatabase(settings.control_url) as control:
        control.admit(
            new_run(app, {"topic": "umbrella"}),
            Owner(owner_id="ghost", incarnation="ghost", ttl_seconds=0.001),
        )
    async with peer_context_lifespan(recorders=[recorder]):
        result = await recover_and_resume_workflow_async(
            workflow=app, agent_id=AGENT, thread_id=THREAD, use_peer_context=False
        )
    assert result["status"] == "restarted"
    assert kinds(store) == ["run_begin", "node", "run_end"]
    assert {i.run_id for i in store.interactions_of(AGENT, thread_id=THREAD)} == {"r1"}


async def test_a_run_of_which_no_record_is_left_is_recorded_too(
    store: EventStore,
    recorder: InteractionRecorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    app = workflow().with_config(callbacks=[recorder])
    async with peer_context_lifespan(recorders=[recorder]):
        result = await recover_and_resume_workflow_async(
            workflow=app,
            agent_id=AGENT,
            thread_id=THREAD,
            initial_state={"topic": "umbrella"},
            use_peer_context=False,
        )
    assert result["status"] == "restarted"
    assert kinds(store) == ["run_begin", "node", "run_end"]
