import operator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.graph import START, StateGraph
from reconstruction.fake_runtime import FakeRuntime, FakeStore, interaction
from reconstruction.savers import KilledError, Mortal

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError, ProtocolError, TooFewResponsesError
from langgraph_peerctx.reconstruction import sources
from langgraph_peerctx.reconstruction.reconstructor import AgentReconstructor


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


async def dead_workflow(saver: Mortal) -> Any:
    def die(_state: State) -> None:
        saver.life.end()

    builder = StateGraph(State)
    builder.add_node("die", die)
    builder.add_edge(START, "die")
    graph: Any = builder.compile(checkpointer=saver)
    with pytest.raises(KilledError):
        await graph.ainvoke({"log": ["in"]}, {"configurable": {"thread_id": "thread-1"}})
    saver.life.dead = False
    return graph


async def test_checkpoint_own_events_and_peers_are_put_together(memory: Mortal) -> None:
    runtime = FakeRuntime(store=FakeStore([interaction("own-1")]))
    reconstructor = AgentReconstructor(workflow=await dead_workflow(memory), runtime=runtime)

    result = await reconstructor.reconstruct_async(agent_id="product-agent", thread_id="thread-1")

    assert result["state"] == {"log": ["in"]}
    assert result["checkpoint"] is not None
    assert result["checkpoint"]["status"] == "interrupted_work"
    assert [event["interaction_id"] for event in result["own_events"]] == ["own-1"]
    assert result["peer_agents_queried"] == ["inventory-agent"]
    assert list(result["peer_context"]) == ["order-1"]
    assert result["peer_context_used"]
    assert not result["degraded"]


async def test_nothing_is_run_or_written(memory: Mortal) -> None:
    workflow = await dead_workflow(memory)
    before = [saved async for saved in memory.alist({"configurable": {"thread_id": "thread-1"}})]

    await AgentReconstructor(workflow=workflow, runtime=FakeRuntime()).reconstruct_async(
        agent_id="product-agent", thread_id="thread-1"
    )

    after = [saved async for saved in memory.alist({"configurable": {"thread_id": "thread-1"}})]
    assert after == before


async def test_an_agent_that_died_long_ago_is_asked_about_as_it_was_then(
    memory: Mortal, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow, runtime = await dead_workflow(memory), FakeRuntime()
    hours = timedelta(hours=60)
    monkeypatch.setattr(sources, "_seconds_since", lambda _moment: hours.total_seconds())
    reconstructor = AgentReconstructor(workflow=workflow, runtime=runtime)

    unasked = await reconstructor.reconstruct_async("product-agent", "thread-1")
    enough = await reconstructor.reconstruct_async(
        "product-agent", "thread-1", time_window_seconds=61 * 3_600
    )
    short = await reconstructor.reconstruct_async(
        "product-agent", "thread-1", time_window_seconds=3_600
    )

    windows = [question["time_window_seconds"] / 3_600 for question in runtime.questions]
    assert windows == [61, 61, 1]
    assert runtime.store.since[0] == pytest.approx(61 * 3_600, abs=60)
    assert (unasked["reasons"], enough["reasons"]) == ([], [])
    assert short["degraded"]
    assert [reason.split(":")[0] for reason in short["reasons"]] == ["window"]


async def test_own_events_beyond_the_limit_are_said_to_be_cut() -> None:
    events = [interaction(f"own-{number}") for number in range(4)]
    settings = PeerContextSettings(max_interactions=3)
    runtime = FakeRuntime(store=FakeStore(events), settings=settings)

    result = await AgentReconstructor(runtime=runtime, enable_peer_context=False).reconstruct_async(
        "product-agent", "thread-1"
    )

    assert [event["interaction_id"] for event in result["own_events"]] == [
        "own-0",
        "own-1",
        "own-2",
    ]
    assert any(reason.startswith("own_events_cut: ") for reason in result["reasons"])


async def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    settings = PeerContextSettings(database_url=f"sqlite:///{tmp_path}/nobody.db")

    result = await AgentReconstructor(
        settings=settings, enable_peer_context=False
    ).reconstruct_async("product-agent", "thread-1")

    assert any(reason.startswith("no_own_events: there is no") for reason in result["reasons"])
    assert not (tmp_path / "nobody.db").exists()


async def test_without_a_workflow_own_events_and_peers_are_all_there_is() -> None:
    reconstructor = AgentReconstructor(runtime=FakeRuntime(store=FakeStore([interaction("own-1")])))

    result = await reconstructor.reconstruct_async(agent_id="product-agent", thread_id="thread-1")

    assert (result["checkpoint"], result["state"]) == (None, {})
    assert len(result["own_events"]) == 1
    assert list(result["peer_context"]) == ["order-1"]
    assert [reason.split(":")[0] for reason in result["reasons"]] == ["no_workflow"]


async def test_peers_are_asked_as_it_was_set_up() -> None:
    runtime = FakeRuntime()
    reconstructor = AgentReconstructor(peer_context_timeout=1.5, runtime=runtime)

    await reconstructor.reconstruct_async(
        "product-agent", "thread-1", expect=["inventory-agent"], min_responses=1
    )

    (question,) = runtime.questions
    assert question["timeout_seconds"] == 1.5
    assert (question["expect"], question["min_responses"]) == (("inventory-agent",), 1)


async def test_peers_are_not_asked_if_they_are_not_wanted() -> None:
    runtime = FakeRuntime()

    result = await AgentReconstructor(enable_peer_context=False, runtime=runtime).reconstruct_async(
        "product-agent", "thread-1"
    )

    assert runtime.questions == []
    assert (result["peer_context"], result["coverage"]) == ({}, None)


async def test_too_few_answers_are_an_error() -> None:
    runtime = FakeRuntime(error=TooFewResponsesError(0, 1))

    with pytest.raises(TooFewResponsesError):
        await AgentReconstructor(runtime=runtime).reconstruct_async(
            "product-agent", "thread-1", min_responses=1
        )


async def test_illegal_arguments_are_refused_before_anybody_is_asked() -> None:
    runtime = FakeRuntime()
    reconstructor = AgentReconstructor(runtime=runtime)

    with pytest.raises(ProtocolError, match="agent_id"):
        await reconstructor.reconstruct_async("../x", "thread-1")
    with pytest.raises(ConfigurationError, match="thread_id"):
        await reconstructor.reconstruct_async("product-agent", "")
    with pytest.raises(ConfigurationError, match="compile"):
        AgentReconstructor(workflow=StateGraph(State), runtime=runtime)  # type: ignore[arg-type]  # the mistake
    assert runtime.questions == []
