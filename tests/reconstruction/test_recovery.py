import asyncio
import json
import logging
import operator
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.func import entrypoint
from langgraph.graph import START, StateGraph
from langgraph.runtime import get_runtime
from langgraph.types import Command, interrupt
from reconstruction.fake_runtime import FakeRuntime, FakeStore, context, interaction
from reconstruction.savers import KilledError, Mortal

from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    ProtocolError,
    StoreBusyError,
    StoreError,
    TooFewResponsesError,
    UnknownChannelError,
)
from langgraph_peerctx.nodes.state import PeerContextState
from langgraph_peerctx.reconstruction.incident import StepRecord
from langgraph_peerctx.reconstruction.reconstructor import (
    RecoveryResult,
    recover_and_resume_workflow_async,
)

CONFIG: RunnableConfig = {"configurable": {"thread_id": "thread-1"}}


class State(PeerContextState, total=False):
    log: Annotated[list[str], operator.add]


class Bare(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


class Bench:
    """Workflows whose nodes die as often as they are told to, and the recovery of them."""

    def __init__(self, saver: Mortal) -> None:
        self.saver = saver
        self.runtime = FakeRuntime()
        self.began: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    def node(self, name: str, body: Callable[[Any], str] | None = None) -> Any:
        async def run(state: Any) -> dict[str, Any]:
            self.began[name] += 1
            text = body(state) if body else name
            if self.kills[name] > 0:
                self.kills[name] -= 1
                await self.saver.life.end_when_quiet()
            if self.errors[name] > 0:
                self.errors[name] -= 1
                raise RuntimeError(f"{name} failed")
            return {"log": [text]}

        return run

    def graph(self, schema: Any = State, nodes: Any = ("left", "right"), **options: Any) -> Any:
        builder = StateGraph(schema, **options.pop("schemas", {}))
        for name in nodes:
            body = nodes[name] if isinstance(nodes, dict) else None
            builder.add_node(name, self.node(name, body))
            builder.add_edge(START, name)
        options.setdefault("checkpointer", self.saver)
        return builder.compile(**options)

    async def die(self, graph: Any, value: Any = None, **options: Any) -> None:
        """Run the workflow as the process that is killed."""
        with pytest.raises(KilledError):
            await graph.ainvoke(value or {"log": ["in"]}, CONFIG, durability="sync", **options)
        self.saver.life.dead = False

    async def recover(self, graph: Any, **options: Any) -> RecoveryResult:
        options.setdefault("runtime", self.runtime)
        try:
            return await recover_and_resume_workflow_async(
                workflow=graph, agent_id="product-agent", thread_id="thread-1", **options
            )
        finally:
            self.saver.life.dead = False


@pytest.fixture
def bench(saver: Mortal) -> Bench:
    return Bench(saver)


@pytest.fixture
def quick(memory: Mortal) -> Bench:
    """A bench for what does not depend on the kind of checkpointer."""
    return Bench(memory)


def codes(result: RecoveryResult) -> list[str]:
    return [reason.split(":")[0] for reason in result["reasons"]]


def event_ids(facts: Any) -> list[str]:
    """Return the events that are in a channel of any kind."""
    return list(facts) if isinstance(facts, dict) else [fact["event_id"] for fact in facts]


async def test_a_broken_superstep_goes_on_with_the_peers_facts(bench: Bench) -> None:
    graph = bench.graph()
    bench.kills["right"] = 1
    await bench.die(graph)

    result = await bench.recover(graph)

    assert result["status"] == "resumed"
    assert result["recovered"]
    assert result["peer_context_used"]
    assert (result["degraded"], result["reasons"]) == (False, [])
    assert result["final_state"]["log"] == ["in", "left", "right"]
    fact = result["final_state"]["peer_context"]["order-1"]
    assert (fact["source"], fact["told_by"]) == ("peer", ["inventory-agent"])
    assert fact["occurred_at"].startswith("2030-01-01T12:00:00")
    assert bench.began == {"left": 1, "right": 2}


async def test_the_resumed_node_sees_what_the_peers_know(bench: Bench) -> None:
    seen: list[Any] = []
    graph = bench.graph(nodes={"work": lambda state: seen.append(state.get("peer_context")) or ""})
    bench.kills["work"] = 1
    await bench.die(graph)

    await bench.recover(graph)

    assert [list(facts or ()) for facts in seen] == [[], ["order-1"]]


CHANNELS: dict[str, Any] = {
    "ours": State,
    "plain": TypedDict(  # type: ignore[misc]  # the two below differ in one annotation
        "plain", {"log": Annotated[list[str], operator.add], "peer_context": dict[str, Any]}
    ),
    "or": TypedDict(  # type: ignore[misc]
        "or_",
        {
            "log": Annotated[list[str], operator.add],
            "peer_context": Annotated[dict[str, Any], operator.or_],
        },
    ),
    "list": TypedDict(  # type: ignore[misc]
        "list_",
        {
            "log": Annotated[list[str], operator.add],
            "peer_context": Annotated[list[dict[str, Any]], operator.add],
        },
    ),
}


@pytest.mark.parametrize("kind", CHANNELS)
async def test_four_deaths_in_one_superstep_deliver_the_facts_once(bench: Bench, kind: str) -> None:
    graph = bench.graph(CHANNELS[kind])
    bench.kills["right"] = 4
    await bench.die(graph)
    for _ in range(3):
        failed = await bench.recover(graph)
        assert failed["status"] == "failed"

    result = await bench.recover(graph)

    assert result["status"] == "resumed"
    assert result["peer_context_used"]
    assert event_ids(result["final_state"]["peer_context"]) == ["order-1"]
    assert result["final_state"]["log"] == ["in", "left", "right"]
    assert bench.began == {"left": 1, "right": 5}


@pytest.mark.parametrize("kind", CHANNELS)
async def test_facts_that_come_up_while_others_are_pending_are_not_sent(
    bench: Bench, kind: str
) -> None:
    graph = bench.graph(CHANNELS[kind])
    bench.kills["right"] = 2
    await bench.die(graph)
    await bench.recover(graph)
    bench.runtime.answer = context(interaction(), interaction("order-2"))

    result = await bench.recover(graph)

    assert result["status"] == "resumed"
    assert result["peer_context_used"]
    assert codes(result) == ["not_delivered"]
    assert len(result["final_state"]["peer_context"]) == 1


@pytest.mark.parametrize("kind", CHANNELS)
async def test_deaths_in_later_supersteps_deliver_the_facts_once(quick: Bench, kind: str) -> None:
    builder = StateGraph(CHANNELS[kind])
    builder.add_sequence([(name, quick.node(name)) for name in ("first", "second")])
    builder.add_edge(START, "first")
    graph: Any = builder.compile(checkpointer=quick.saver)
    quick.kills.update(first=1, second=1)
    await quick.die(graph)
    await quick.recover(graph)

    result = await quick.recover(graph)

    assert result["status"] == "resumed"
    assert result["peer_context_used"]
    assert len(result["final_state"]["peer_context"]) == 1


async def test_facts_of_the_workflows_own_are_kept(quick: Bench) -> None:
    graph = quick.graph(CHANNELS["plain"])
    quick.kills["right"] = 1
    await quick.die(graph, {"log": ["in"], "peer_context": {"order-0": {"source": "own"}}})

    result = await quick.recover(graph)

    assert list(result["final_state"]["peer_context"]) == ["order-0", "order-1"]


async def test_a_channel_of_another_name_receives_the_facts(quick: Bench) -> None:
    class Named(Bare, total=False):
        known: dict[str, Any]

    graph = quick.graph(Named)
    quick.kills["right"] = 1
    await quick.die(graph)

    result = await quick.recover(graph, peer_context_channel="known")

    assert list(result["final_state"]["known"]) == ["order-1"]
    assert result["peer_context_used"]


async def test_a_schema_without_the_channel_is_resumed_all_the_same_and_it_is_said(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    graph = bench.graph(Bare)
    bench.kills["right"] = 1
    await bench.die(graph)

    result = await bench.recover(graph)

    assert result["status"] == "resumed"
    assert not result["peer_context_used"]
    assert result["degraded"]
    assert codes(result) == ["no_channel"]
    assert result["final_state"] == {"log": ["in", "left", "right"]}
    assert "unknown channel" not in caplog.text


async def test_a_channel_that_cannot_hold_facts_is_left_alone(quick: Bench) -> None:
    class Text(Bare, total=False):
        peer_context: str

    graph = quick.graph(Text)
    quick.kills["right"] = 1
    await quick.die(graph)

    result = await quick.recover(graph)

    assert result["status"] == "resumed"
    assert "neither a mapping nor a list" in result["reasons"][0]


async def test_a_finished_thread_is_not_run_again(bench: Bench) -> None:
    graph = bench.graph()
    finished = await graph.ainvoke({"log": ["in"]}, CONFIG)

    result = await bench.recover(graph, initial_state={"log": ["in"]})

    assert (result["status"], result["recovered"]) == ("already_finished", False)
    assert result["final_state"] == finished
    assert bench.began == {"left": 1, "right": 1}
    assert bench.runtime.questions == []


async def test_a_thread_that_waits_for_a_human_is_left_waiting(bench: Bench) -> None:
    graph = bench.graph(nodes={"ask": lambda _state: str(interrupt("sure?"))})
    await graph.ainvoke({"log": ["in"]}, CONFIG)

    result = await bench.recover(graph)

    assert (result["status"], result["recovered"]) == ("waiting_for_human", False)
    assert result["reasons"] == [
        "waiting_for_human: ask asks 'sure?': answer with Command(resume=...)"
    ]
    assert bench.began["ask"] == 1
    assert (await graph.ainvoke(Command(resume="yes"), CONFIG))["log"] == ["in", "yes"]


async def test_a_thread_at_a_static_breakpoint_is_left_waiting(bench: Bench) -> None:
    graph = bench.graph(nodes=("pay",), interrupt_before=["pay"])
    await graph.ainvoke({"log": ["in"]}, CONFIG)

    result = await bench.recover(graph)

    assert (result["status"], result["recovered"]) == ("waiting_for_human", False)
    assert "static breakpoint holds pay" in result["reasons"][0]
    assert bench.began["pay"] == 0


async def test_what_died_beside_a_question_is_finished_and_the_question_stays(
    bench: Bench,
) -> None:
    graph = bench.graph(nodes={"ask": lambda _state: str(interrupt("sure?")), "work": None})
    bench.kills["work"] = 1
    await bench.die(graph)

    result = await bench.recover(graph)

    assert (result["status"], result["recovered"]) == ("waiting_for_human", True)
    assert result["peer_context_used"]
    assert "__interrupt__" not in result["final_state"]
    assert bench.began["work"] == 2
    done = await graph.ainvoke(Command(resume="yes"), CONFIG)
    assert done["log"] == ["in", "yes", "work"]
    assert list(done["peer_context"]) == ["order-1"]


@pytest.mark.parametrize("kind", CHANNELS)
async def test_an_answered_question_is_not_asked_again_and_the_facts_arrive(
    bench: Bench, kind: str
) -> None:
    graph = bench.graph(CHANNELS[kind], nodes={"ask": lambda _state: str(interrupt("sure?"))})
    await graph.ainvoke({"log": ["in"]}, CONFIG)
    bench.kills["ask"] = 3
    await bench.die(graph, Command(resume="yes"))

    attempts = [await bench.recover(graph) for _ in range(3)]

    assert [attempt["status"] for attempt in attempts] == ["failed", "failed", "resumed"]
    assert attempts[-1]["final_state"]["log"] == ["in", "yes"]
    assert event_ids(attempts[-1]["final_state"]["peer_context"]) == ["order-1"]


@pytest.mark.parametrize("kind", CHANNELS)
async def test_facts_that_came_with_an_answer_are_not_doubled_by_the_next_answer(
    bench: Bench, kind: str
) -> None:
    """LangGraph before 1.2.16 stored them again under another number: they counted twice.

    Beside them a database's checkpointer does not store the second answer: it is asked for again.
    """
    deaths = Counter(one=1, two=1)

    async def ask(_state: Any) -> dict[str, Any]:
        answers = []
        for question in ("one", "two"):
            answers.append(interrupt(question))
            deaths[question] -= 1
            if deaths[question] == 0:
                await bench.saver.life.end_when_quiet()
        return {"log": answers}

    builder = StateGraph(CHANNELS[kind])
    builder.add_node("ask", ask)
    builder.add_edge(START, "ask")
    graph: Any = builder.compile(checkpointer=bench.saver)
    await graph.ainvoke({"log": ["in"]}, CONFIG)
    await bench.die(graph, Command(resume="yes"))
    asked_again = await bench.recover(graph)
    await bench.die(graph, Command(resume="no"))

    result = await bench.recover(graph)

    assert asked_again["status"] == "waiting_for_human"
    done = result["final_state"]
    if result["status"] == "waiting_for_human":
        done = await graph.ainvoke(Command(resume="no"), CONFIG)
    assert done["log"] == ["in", "yes", "no"]
    assert event_ids(done["peer_context"]) == ["order-1"]


@pytest.mark.parametrize("by_id", [False, True], ids=["plain", "by_id"])
async def test_a_node_that_raised_with_its_answer_gets_it_again(
    bench: Bench, *, by_id: bool
) -> None:
    answers: list[Any] = []

    def ask(_state: State) -> dict[str, Any]:
        answers.append(interrupt("sure?"))
        if len(answers) < 3:
            raise OSError("the network is down")
        return {"log": [answers[-1], interrupt("really?")]}

    builder = StateGraph(State)
    builder.add_node("ask", ask)
    builder.add_edge(START, "ask")
    graph: Any = builder.compile(checkpointer=bench.saver)
    asked = await graph.ainvoke({"log": ["in"]}, CONFIG)
    answer = {asked["__interrupt__"][0].id: "yes"} if by_id else "yes"
    with pytest.raises(OSError, match="network"):
        await graph.ainvoke(Command(resume=answer), CONFIG)

    attempts = [await bench.recover(graph) for _ in range(2)]

    assert [attempt["status"] for attempt in attempts] == ["failed", "waiting_for_human"]
    assert answers == ["yes"] * 3
    done = await graph.ainvoke(Command(resume="no"), CONFIG)
    assert done["log"] == ["in", "yes", "no"]


async def test_an_answer_that_was_used_does_not_answer_the_question_of_a_sibling(
    bench: Bench,
) -> None:
    asked = asyncio.Event()

    async def ask(_state: State) -> dict[str, Any]:
        answer = interrupt("first?")
        asked.set()
        return {"log": [answer]}

    async def work(_state: State) -> dict[str, Any]:
        bench.began["work"] += 1
        if bench.began["work"] < 5:
            if bench.began["work"] > 1:
                await asked.wait()
            await bench.saver.life.end_when_quiet()
        return {"log": [interrupt("second?")]}

    builder = StateGraph(State)
    builder.add_node("ask", ask)
    builder.add_node("work", work)
    builder.add_edge(START, "ask")
    builder.add_edge(START, "work")
    graph: Any = builder.compile(checkpointer=bench.saver)
    await bench.die(graph)
    await bench.die(graph, Command(resume="yes"))

    # Twice, since the facts go with the first attempt, and the second has nothing to send.
    attempts = [await bench.recover(graph) for _ in range(3)]

    assert [attempt["status"] for attempt in attempts] == [
        "failed",
        "failed",
        "waiting_for_human",
    ]
    done = await graph.ainvoke(Command(resume="no"), CONFIG)
    assert done["log"] == ["in", "yes", "no"]


async def test_a_thread_without_a_checkpoint_begins_with_the_initial_state(bench: Bench) -> None:
    result = await bench.recover(bench.graph(), initial_state={"log": ["in"]})

    assert (result["status"], result["recovered"]) == ("restarted", True)
    assert result["peer_context_used"]
    assert codes(result) == ["no_checkpoint"]
    assert result["final_state"]["log"] == ["in", "left", "right"]
    assert list(result["final_state"]["peer_context"]) == ["order-1"]


@pytest.mark.parametrize("kind", CHANNELS)
async def test_an_initial_states_own_facts_are_kept(quick: Bench, kind: str) -> None:
    given: Any = [{"event_id": "order-0"}] if kind == "list" else {"order-0": {"source": "own"}}

    result = await quick.recover(
        quick.graph(CHANNELS[kind]), initial_state={"log": ["in"], "peer_context": given}
    )

    assert event_ids(result["final_state"]["peer_context"]) == ["order-0", "order-1"]


async def test_facts_that_the_input_cannot_carry_stay_in_the_result(quick: Bench) -> None:
    graph = quick.graph(schemas={"input_schema": Bare})

    result = await quick.recover(graph, initial_state={"log": ["in"]})

    assert result["status"] == "restarted"
    assert not result["peer_context_used"]
    assert codes(result) == ["no_checkpoint", "not_delivered"]


async def test_without_checkpoint_and_initial_state_there_is_nothing_to_recover(
    bench: Bench,
) -> None:
    result = await bench.recover(bench.graph())

    assert (result["status"], result["recovered"]) == ("nothing_to_recover", False)
    assert codes(result) == ["no_checkpoint"]
    assert result["final_state"] == {}
    assert bench.began == {}


@pytest.mark.parametrize("checkpointer", [None, True, False])
async def test_a_missing_checkpointer_is_said(quick: Bench, checkpointer: Any) -> None:
    graph = quick.graph(checkpointer=checkpointer)

    nothing = await quick.recover(graph)

    assert nothing["status"] == "nothing_to_recover"
    assert codes(nothing) == ["no_checkpointer"]
    if checkpointer is True:  # LangGraph refuses to run such a root graph at all
        return
    result = await quick.recover(graph, initial_state={"log": ["in"]})
    assert result["status"] == "restarted"
    assert result["degraded"]
    assert codes(result) == ["no_checkpointer"]
    assert result["final_state"]["log"] == ["in", "left", "right"]


async def test_an_initial_state_with_unknown_keys_is_refused(quick: Bench) -> None:
    with pytest.raises(UnknownChannelError, match="colour"):
        await quick.recover(quick.graph(), initial_state={"log": [], "colour": "red"})
    assert quick.began == {}


async def test_a_workflow_that_raises_again_has_failed(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    graph = bench.graph()
    bench.errors["right"] = 2
    with pytest.raises(RuntimeError):
        await graph.ainvoke({"log": ["in"]}, CONFIG, durability="sync")

    result = await bench.recover(graph)

    assert (result["status"], result["recovered"]) == ("failed", False)
    assert result["reasons"] == ["failed: RuntimeError: 'right failed'"]
    assert result["final_state"]["log"][0] == "in"
    assert any(record.exc_info for record in caplog.records)
    assert (await bench.recover(graph))["status"] == "resumed"


async def test_a_workflow_with_a_context_schema_is_not_run_without_a_context(bench: Bench) -> None:
    class Context(TypedDict):
        user: str

    seen: list[Any] = []

    def look(_state: Any) -> str:
        seen.append(get_runtime().context)
        return "look"

    graph = bench.graph(nodes={"look": look}, schemas={"context_schema": Context})
    bench.kills["look"] = 1
    await bench.die(graph, context={"user": "u1"})

    refused = await bench.recover(graph)
    result = await bench.recover(graph, context={"user": "u1"})

    assert (refused["status"], refused["recovered"]) == ("needs_context", False)
    assert codes(refused) == ["needs_context"]
    assert result["status"] == "resumed"
    assert seen == [{"user": "u1"}, {"user": "u1"}]


async def test_a_functional_workflow_is_resumed_without_an_update(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    @entrypoint(checkpointer=bench.saver)
    async def workflow(names: list[str]) -> list[str]:
        bench.began["workflow"] += 1
        if bench.began["workflow"] == 1:
            bench.saver.life.end()
        return [*names, "done"]

    await bench.die(workflow, ["in"])

    result = await bench.recover(workflow)

    assert result["status"] == "resumed"
    assert result["final_state"] == ["in", "done"]
    assert codes(result) == ["no_channel"]
    assert "unknown channel" not in caplog.text
    assert (await bench.recover(workflow))["final_state"] == ["in", "done"]


async def test_a_functional_workflows_second_question_is_not_answered_by_the_first_answer(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    armed = True

    @entrypoint(checkpointer=bench.saver)
    async def workflow(names: list[str]) -> list[str]:
        nonlocal armed
        first = interrupt("first?")
        if armed and first:
            armed = False
            await bench.saver.life.end_when_quiet()
        return [*names, first, interrupt("second?")]

    await workflow.ainvoke(["in"], CONFIG)
    await bench.die(workflow, Command(resume="yes"))

    first = await bench.recover(workflow)
    second = await bench.recover(workflow)

    assert (first["status"], first["recovered"]) == ("waiting_for_human", True)
    assert (second["status"], second["recovered"]) == ("waiting_for_human", False)
    assert await workflow.ainvoke(Command(resume="no"), CONFIG) == ["in", "yes", "no"]
    assert "unknown channel" not in caplog.text


async def test_peers_that_cannot_be_reached_do_not_stop_the_recovery(bench: Bench) -> None:
    graph = bench.graph()
    bench.kills["right"] = 1
    await bench.die(graph)
    bench.runtime.error = BrokerUnavailableError("nobody at localhost:9092")

    result = await bench.recover(graph)

    assert (result["status"], result["degraded"]) == ("resumed", True)
    assert result["reasons"] == ["no_broker: nobody at localhost:9092"]
    assert not result["peer_context_used"]
    assert result["final_state"]["log"] == ["in", "left", "right"]


async def test_what_a_gather_did_without_is_passed_on(quick: Bench) -> None:
    graph = quick.graph()
    quick.kills["right"] = 1
    await quick.die(graph)
    quick.runtime.answer = context(degraded=("mock_mode: nothing was sent",))

    result = await quick.recover(graph)

    assert result["degraded"]
    assert result["reasons"] == ["mock_mode: nothing was sent"]


async def test_too_few_answers_stop_the_recovery_before_anything_is_run(quick: Bench) -> None:
    graph = quick.graph()
    quick.kills["right"] = 1
    await quick.die(graph)
    quick.runtime.error = TooFewResponsesError(0, 2)

    with pytest.raises(TooFewResponsesError):
        await quick.recover(graph, min_responses=2)

    assert quick.began["right"] == 1
    assert quick.runtime.questions[0]["min_responses"] == 2


async def test_a_broken_event_store_does_not_stop_the_recovery(quick: Bench) -> None:
    graph = quick.graph()
    quick.kills["right"] = 1
    await quick.die(graph)
    quick.runtime.store = FakeStore(error=StoreBusyError("locked"))

    result = await quick.recover(graph)

    assert result["status"] == "resumed"
    assert result["reasons"] == ["no_own_events: locked"]


async def test_peers_are_not_asked_if_they_are_not_wanted(quick: Bench) -> None:
    graph = quick.graph(Bare)
    quick.kills["right"] = 1
    await quick.die(graph)

    result = await quick.recover(graph, use_peer_context=False)

    assert (result["status"], result["degraded"], result["reasons"]) == ("resumed", False, [])
    assert quick.runtime.questions == []


async def test_the_peers_are_asked_as_the_caller_wishes(quick: Bench) -> None:
    graph = quick.graph()
    quick.kills["right"] = 1
    with pytest.raises(KilledError):
        await graph.ainvoke(
            {"log": ["in"]}, {**CONFIG, "metadata": {"run_id": "run-1"}}, durability="sync"
        )
    quick.saver.life.dead = False

    await quick.recover(
        graph,
        peer_context_timeout=1.5,
        time_window_seconds=60.0,
        expect=["inventory-agent"],
    )

    assert quick.runtime.questions == [
        {
            "failed_agent_id": "product-agent",
            "thread_id": "thread-1",
            "timeout_seconds": 1.5,
            "time_window_seconds": 60.0,
            "expect": ("inventory-agent",),
            "min_responses": None,
            "in_doubt": (),
            "run_id": "run-1",
            "epoch": 0,
        }
    ]


async def test_the_resumed_checkpoints_belong_to_the_run_that_died(bench: Bench) -> None:
    graph = bench.graph()
    config: RunnableConfig = {**CONFIG, "metadata": {"run_id": "run-1"}}
    bench.kills["right"] = 1
    with pytest.raises(KilledError):
        await graph.ainvoke({"log": ["in"]}, config, durability="sync")
    bench.saver.life.dead = False
    await bench.recover(graph)

    # LangGraph does nothing for an input whose run has finished.
    again = await graph.ainvoke({"log": ["in"]}, config)

    assert again["log"] == ["in", "left", "right"]
    assert bench.began == {"left": 1, "right": 2}


async def test_the_callers_config_reaches_the_nodes(quick: Bench) -> None:
    seen: list[Any] = []

    async def look(_state: State, config: RunnableConfig) -> dict[str, Any]:
        seen.append((config["configurable"]["user"], config["metadata"]["ticket"]))
        if len(seen) == 1:
            quick.saver.life.end()
        return {}

    builder = StateGraph(State)
    builder.add_node("look", look)
    builder.add_edge(START, "look")
    graph: Any = builder.compile(checkpointer=quick.saver)
    mine: Any = {"configurable": {"user": "u1"}, "metadata": {"ticket": 7}}
    with pytest.raises(KilledError):
        await graph.ainvoke({}, {**mine, "configurable": {"user": "u1", **CONFIG["configurable"]}})
    quick.saver.life.dead = False

    await quick.recover(graph, config=mine)

    assert seen == [("u1", 7), ("u1", 7)]


async def test_a_config_of_another_thread_is_refused(quick: Bench) -> None:
    with pytest.raises(ConfigurationError, match="thread-2"):
        await quick.recover(quick.graph(), config={"configurable": {"thread_id": "thread-2"}})


async def test_an_illegal_agent_id_is_refused(quick: Bench) -> None:
    with pytest.raises(ProtocolError, match="agent_id"):
        await recover_and_resume_workflow_async(
            workflow=quick.graph(), agent_id="../x", thread_id="thread-1", runtime=quick.runtime
        )


async def test_a_state_graph_that_is_not_compiled_is_refused(quick: Bench) -> None:
    with pytest.raises(ConfigurationError, match="compile"):
        await quick.recover(StateGraph(State))


async def test_a_recovery_inside_another_graphs_node_is_not_a_part_of_it(bench: Bench) -> None:
    metadata: list[Any] = []

    async def look(_state: State, config: RunnableConfig) -> dict[str, Any]:
        metadata.append(dict(config["metadata"]))
        if len(metadata) == 1:
            bench.saver.life.end()
        return {"log": ["look"]}

    builder = StateGraph(State)
    builder.add_node("look", look)
    builder.add_edge(START, "look")
    dead: Any = builder.compile(checkpointer=bench.saver)
    await bench.die(dead)
    results: list[RecoveryResult] = []

    async def rescue(_state: State, config: RunnableConfig) -> dict[str, Any]:
        mine: Any = {**config, "configurable": {**config["configurable"]}}
        mine["configurable"].pop("thread_id")
        mine["configurable"].pop("checkpoint_ns")
        results.append(await bench.recover(dead, config={"configurable": mine["configurable"]}))
        return {}

    builder = StateGraph(State)
    builder.add_node("rescue", rescue)
    builder.add_edge(START, "rescue")
    rescuer: Any = builder.compile(checkpointer=bench.saver)
    await rescuer.ainvoke(
        {}, {"configurable": {"thread_id": "rescue-1"}, "metadata": {"outer": True}}
    )

    assert results[0]["status"] == "resumed"
    assert results[0]["final_state"]["log"] == ["in", "look"]
    assert metadata[1]["thread_id"] == "thread-1"
    assert "outer" not in metadata[1]
    assert (await dead.aget_state(CONFIG)).next == ()


async def test_a_cancelled_recovery_cancels_its_workflow(quick: Bench) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def wait(_state: State) -> dict[str, Any]:
        quick.began["wait"] += 1
        if quick.began["wait"] == 1:
            quick.saver.life.end()
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return {}

    builder = StateGraph(State)
    builder.add_node("wait", wait)
    builder.add_edge(START, "wait")
    graph: Any = builder.compile(checkpointer=quick.saver)
    await quick.die(graph)
    recovery = asyncio.create_task(quick.recover(graph))
    await began.wait()
    recovery.cancel()

    with pytest.raises(asyncio.CancelledError):
        await recovery
    assert ended.is_set()


async def test_the_incident_is_plain_json_and_names_every_step(bench: Bench) -> None:
    graph = bench.graph()
    bench.kills["right"] = 1
    await bench.die(graph)
    bench.runtime.store.events.append(interaction("own-1"))
    told: list[StepRecord] = []

    result = await bench.recover(graph, on_step=told.append)

    incident = result["incident"]
    assert json.loads(json.dumps(incident)) == incident
    assert [step["step"] for step in incident["steps"]] == [
        "load_checkpoint",
        "position",
        "request_context",
        "collect_context",
        "reconstruct",
        "resume_workflow",
        "verify",
    ]
    assert told == incident["steps"]
    assert {step["outcome"] for step in told} == {"done"}
    assert incident["status"] == "resumed"
    assert incident["coverage"] is not None
    assert {(item["fact"], item["source"]) for item in incident["provenance"]} == {
        ("state.log", "checkpoint"),
        ("state.peer_context", "checkpoint"),
        ("event.own-1", "own"),
        ("event.order-1", "peer"),
    }


async def test_a_stopped_recovery_has_an_incident_too(quick: Bench) -> None:
    result = await quick.recover(quick.graph())

    assert [step["step"] for step in result["incident"]["steps"]] == ["load_checkpoint"]
    assert result["incident"]["status"] == "nothing_to_recover"
    assert json.loads(json.dumps(result["incident"])) == result["incident"]


async def test_steps_are_logged_with_ids_and_without_payloads(
    quick: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    graph = quick.graph()
    quick.kills["right"] = 1
    await quick.die(graph, {"log": ["a secret"]})
    quick.runtime.answer = context(interaction(payload={"card": "card no. 4111"}))

    result = await quick.recover(graph)

    lines = [record for record in caplog.records if record.name.endswith("incident")]
    assert len(lines) == 7
    for line in lines:
        assert vars(line)["incident_id"] == result["incident"]["incident_id"]
        assert (vars(line)["agent_id"], vars(line)["thread_id"]) == ("product-agent", "thread-1")
        assert "secret" not in str(vars(line))
        assert "card no. 4111" not in str(vars(line))


async def test_a_checkpointer_that_drops_the_update_is_noticed(quick: Bench) -> None:
    graph = quick.graph()
    quick.kills["right"] = 2
    await quick.die(graph)
    keep = type(quick.saver).aput_writes

    async def lose_updates(
        _self: Mortal, config: Any, writes: Any, task_id: str, *rest: Any
    ) -> None:
        if set(task_id) != {"0", "-"}:
            await keep(quick.saver, config, writes, task_id, *rest)

    class Forgetful(type(quick.saver)):  # type: ignore[misc]  # the kind of the fixture's saver
        aput_writes = lose_updates

    graph.checkpointer.__class__ = Forgetful

    result = await quick.recover(graph)

    assert result["status"] == "failed"
    assert codes(result) == ["update_lost", "failed"]


async def test_a_run_whose_end_cannot_be_read_is_said_to_be_unverified(quick: Bench) -> None:
    class Forgotten(type(quick.saver)):  # type: ignore[misc]  # the kind of the fixture's saver
        async def aget_tuple(self, config: RunnableConfig) -> Any:
            if quick.began["right"] == 2:
                raise OSError("gone")
            return await super().aget_tuple(config)

    graph = quick.graph()
    quick.kills["right"] = 1
    await quick.die(graph)
    graph.checkpointer.__class__ = Forgotten

    result = await quick.recover(graph)

    assert result["status"] == "resumed"
    assert codes(result) == ["unverified"]
    assert result["final_state"]["log"] == ["in", "left", "right"]


async def test_going_on_without_something_is_a_warning(
    quick: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    graph = quick.graph(Bare)
    quick.kills["right"] = 1
    await quick.die(graph)
    quick.runtime.error = BrokerUnavailableError("gone")

    await quick.recover(graph)

    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "recovered without all that was asked for: no_broker, no_channel"
    ]


async def test_a_checkpointer_that_cannot_be_read_is_an_error(quick: Bench) -> None:
    class Broken(type(quick.saver)):  # type: ignore[misc]  # the kind of the fixture's saver
        async def aget_tuple(self, _config: RunnableConfig) -> Any:
            raise OSError("gone")

    graph = quick.graph()
    graph.checkpointer.__class__ = Broken

    with pytest.raises(StoreError, match="gone"):
        await quick.recover(graph, initial_state={"log": ["in"]})
    assert quick.began == {}
