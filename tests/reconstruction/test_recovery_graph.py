"""The recovery graph: its nodes, its questions to a human, and what it makes of bad input."""

import json
import operator
from collections.abc import Iterator
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command
from reconstruction.fake_runtime import FakeRuntime, context, interaction
from reconstruction.savers import KilledError, Mortal
from runtime_threads import no_runtime_left

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    ProtocolError,
    RecoveryError,
    TooFewResponsesError,
    UnknownChannelError,
)
from langgraph_peerctx.gathering.peer_context import Coverage
from langgraph_peerctx.nodes.peer_context_subgraph import Limits
from langgraph_peerctx.nodes.state import PeerContextState
from langgraph_peerctx.protocol.messages import InDoubtAnswer
from langgraph_peerctx.reconstruction.approval import Thresholds
from langgraph_peerctx.reconstruction.recovery import _Borrowed
from langgraph_peerctx.reconstruction.recovery_graph import (
    RecoverySteps,
    create_recovery_graph,
)
from langgraph_peerctx.reconstruction.recovery_plan import RecoveryPlan

RECOVERY: Any = {"configurable": {"thread_id": "recovery-1"}}
ORDER: Any = {"failed_agent_id": "product-agent", "thread_id": "thread-1"}
NODES = [
    "load_checkpoint",
    "position",
    "request_context",
    "collect_context",
    "reconstruct",
    "settle",
    "approve",
    "resume_workflow",
]


class State(PeerContextState, total=False):
    log: Annotated[list[str], operator.add]


class Case:
    """A workflow that died in its only node, and the graph that recovers it."""

    def __init__(self, saver: Mortal) -> None:
        self.runtime = FakeRuntime()
        self.deaths = 1
        self.saver = saver

        def work(_state: State) -> dict[str, Any]:
            self.deaths -= 1
            if self.deaths >= 0:
                saver.life.end()
            return {"log": ["work"]}

        builder = StateGraph(State)
        builder.add_node("work", work)
        builder.add_edge(START, "work")
        self.workflow: Any = builder.compile(checkpointer=saver)

    async def die(self) -> None:
        with pytest.raises(KilledError):
            await self.workflow.ainvoke(
                {"log": ["in"]}, {"configurable": {"thread_id": "thread-1"}}, durability="sync"
            )
        self.saver.life.dead = False

    def graph(self, **plan: Any) -> Any:
        plan = {
            "workflow": self.workflow,
            "source": _Borrowed(self.runtime),
            "open_store": lambda: self.runtime.store,
            "limits": Limits(expect=("inventory-agent", "marketing-agent")),
        } | plan
        return RecoverySteps(RecoveryPlan(**plan)).graph().compile(checkpointer=InMemorySaver())


@pytest.fixture
async def case(memory: Mortal) -> Case:
    case = Case(memory)
    await case.die()
    return case


async def test_its_nodes_are_the_steps_by_name(case: Case) -> None:
    seen = [name async for update in case.graph().astream(ORDER, RECOVERY) for name in update]
    assert seen == NODES


async def test_its_state_is_plain_json_and_its_output_the_result(case: Case) -> None:
    graph = case.graph()
    out = await graph.ainvoke(ORDER, RECOVERY)
    state = (await graph.aget_state(RECOVERY)).values

    assert set(out) == {"result"}
    result = out["result"]
    assert (result["status"], result["recovered"], result["reasons"]) == ("resumed", True, [])
    assert result["final_state"]["log"] == ["in", "work"]
    assert list(result["final_state"]["peer_context"]) == ["order-1"]
    assert [step["step"] for step in result["incident"]["steps"]] == [
        *(name for name in NODES if name not in ("settle", "approve")),
        "verify",
    ]
    assert json.loads(json.dumps(state)) == state


def test_its_schemas_read_well(memory: Mortal) -> None:
    app = create_recovery_graph(Case(memory).workflow).compile()
    properties = app.get_input_jsonschema()["properties"]
    assert {"failed_agent_id", "thread_id", "initial_state", "expect"} <= properties.keys()
    for name, described in properties.items():
        assert described["title"], name
        assert described["description"], name
        assert described["examples"], name
    assert set(app.get_output_jsonschema()["properties"]) == {"result"}


async def test_a_second_recovery_on_the_same_thread_begins_anew(case: Case) -> None:
    graph = case.graph()
    await graph.ainvoke(ORDER, RECOVERY)
    again = (await graph.ainvoke(ORDER, RECOVERY))["result"]
    assert (again["status"], again["recovered"]) == ("already_finished", False)
    assert [step["step"] for step in again["incident"]["steps"]] == ["load_checkpoint"]


async def test_without_a_broker_it_goes_on_without_the_peers(case: Case) -> None:
    case.runtime.error = BrokerUnavailableError("nobody at localhost:9092")
    result = (await case.graph().ainvoke(ORDER, RECOVERY))["result"]
    assert (result["status"], result["degraded"]) == ("resumed", True)
    assert result["reasons"] == ["no_broker: nobody at localhost:9092"]
    assert len(case.runtime.questions) == 1  # asked twice, with one question


async def test_too_few_answers_stop_it_and_it_can_be_tried_again(case: Case) -> None:
    graph = case.graph(limits=Limits(min_responses=2))
    case.runtime.error = TooFewResponsesError(0, 2)
    with pytest.raises(TooFewResponsesError):
        await graph.ainvoke(ORDER, RECOVERY)
    case.runtime.error = None
    result = (await graph.ainvoke(None, RECOVERY))["result"]
    assert result["status"] == "resumed"


async def test_the_head_is_read_again_before_the_workflow_is_resumed(case: Case) -> None:
    """Somebody else finished it while this recovery waited."""
    graph = case.graph()
    await graph.ainvoke(ORDER, RECOVERY, interrupt_before=["resume_workflow"])
    await case.workflow.ainvoke(None, {"configurable": {"thread_id": "thread-1"}})
    result = (await graph.ainvoke(None, RECOVERY))["result"]
    assert (result["status"], result["recovered"]) == ("already_finished", False)
    assert result["final_state"]["log"] == ["in", "work"]


async def test_it_is_a_node_of_another_graph_and_the_workflow_runs_apart_from_both(
    case: Case,
) -> None:
    class Outer(TypedDict, total=False):
        failed_agent_id: str
        thread_id: str
        result: dict[str, Any]

    builder = StateGraph(Outer)
    builder.add_node("recover", case.graph().builder.compile())
    builder.add_edge(START, "recover")
    app: Any = builder.compile(checkpointer=InMemorySaver())
    state = await app.ainvoke(ORDER, {"configurable": {"thread_id": "outer"}})
    assert state["result"]["status"] == "resumed"
    threads = {saved.config["configurable"]["thread_id"] for saved in case.saver.list(None)}
    assert threads == {"thread-1"}


# Asking a human


def half_covered() -> Any:
    return context(
        interaction(),
        coverage=Coverage(
            asked=("inventory-agent", "marketing-agent"),
            answered=("inventory-agent",),
            silent=("marketing-agent",),
            roster_known=True,
        ),
        degraded=("silent: marketing-agent",),
    )


async def test_a_human_is_asked_where_coverage_is_low_and_sees_what_would_be_written(
    case: Case,
) -> None:
    case.runtime.answer = half_covered()
    graph = case.graph(thresholds=Thresholds(coverage=0.8))
    asked = (await graph.ainvoke(ORDER, RECOVERY))["__interrupt__"][0].value

    assert asked["why"] == ["coverage is 0.50, below 0.8"]
    assert asked["would_write"]["channel"] == "peer_context"
    fact = asked["would_write"]["facts"]["order-1"]
    assert (fact["source"], fact["told_by"]) == ("peer", ["inventory-agent"])
    assert asked["coverage"]["silent"] == ["marketing-agent"]
    assert asked["checkpoint"]["tasks"][0]["name"] == "work"
    assert json.loads(json.dumps(asked)) == asked

    unclear = (await graph.ainvoke(Command(resume="perhaps"), RECOVERY))["__interrupt__"][0].value
    assert unclear["not_understood"] == "'perhaps'"

    result = (await graph.ainvoke(Command(resume={"approve": True}), RECOVERY))["result"]
    assert result["status"] == "resumed"
    assert list(result["final_state"]["peer_context"]) == ["order-1"]


@pytest.mark.parametrize("no", [False, "no", " Reject ", {"approve": False}])
async def test_a_human_may_say_no(case: Case, no: Any) -> None:
    case.runtime.answer = half_covered()
    graph = case.graph(thresholds=Thresholds(coverage=0.8))
    await graph.ainvoke(ORDER, RECOVERY)
    result = (await graph.ainvoke(Command(resume=no), RECOVERY))["result"]
    assert (result["status"], result["recovered"]) == ("not_approved", False)
    assert "coverage is 0.50" in result["reasons"][0]
    assert result["incident"]["coverage"]["silent"] == ["marketing-agent"]
    assert case.deaths == 0  # not run


async def test_nobody_is_asked_where_the_evidence_is_good(case: Case) -> None:
    case.runtime.answer = half_covered()
    graph = case.graph(thresholds=Thresholds(coverage=0.5, confidence=1.0))
    assert (await graph.ainvoke(ORDER, RECOVERY))["result"]["status"] == "resumed"


async def test_a_human_is_asked_where_confidence_is_low(case: Case) -> None:
    unsettled = InDoubtAnswer(effect_key="pay", agent_id="bank", verdict="cannot_tell")
    case.runtime.answer = context(interaction(), in_doubt=(unsettled,))
    graph = case.graph(thresholds=Thresholds(confidence=0.9))
    asked = (await graph.ainvoke(ORDER, RECOVERY))["__interrupt__"][0].value
    assert asked["why"] == ["confidence is 0.50, below 0.9"]


async def test_where_peers_are_not_asked_coverage_counts_as_none(case: Case) -> None:
    graph = case.graph(thresholds=Thresholds(coverage=0.1), use_peer_context=False)
    asked = (await graph.ainvoke(ORDER, RECOVERY))["__interrupt__"][0].value
    assert asked["why"] == ["coverage is 0.00, below 0.1"]
    assert case.runtime.questions == []


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_threshold_out_of_its_range_is_refused(memory: Mortal, value: float) -> None:
    with pytest.raises(ConfigurationError, match="approve_below_coverage"):
        create_recovery_graph(Case(memory).workflow, approve_below_coverage=value)
    with pytest.raises(ConfigurationError, match="approve_below_confidence"):
        create_recovery_graph(Case(memory).workflow, approve_below_confidence=value)


# Bad input


@pytest.mark.parametrize(
    ("order", "error", "said"),
    [
        ({}, ConfigurationError, "failed_agent_id"),
        ({"failed_agent_id": "product-agent"}, ConfigurationError, "thread_id"),
        (ORDER | {"failed_agent_id": "../x"}, ProtocolError, "failed_agent_id"),
        (ORDER | {"thread_id": "t" * 300}, ConfigurationError, "thread_id"),
        (ORDER | {"initial_state": {"unknown": 1}}, UnknownChannelError, "unknown"),
        (ORDER | {"in_doubt": [{"effect_key": "x"}]}, ConfigurationError, "in_doubt"),
        (ORDER | {"expect": 7}, ConfigurationError, "expect"),
    ],
)
async def test_bad_input_is_named(
    case: Case, order: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        await case.graph().ainvoke(order, RECOVERY)
    assert case.deaths == 0


def test_a_workflow_that_cannot_be_resumed_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match="not compiled"):
        create_recovery_graph(StateGraph(State))  # type: ignore[arg-type]  # the mistake
    with pytest.raises(ConfigurationError, match="expected a compiled"):
        create_recovery_graph("workflow")  # type: ignore[arg-type]  # the mistake


@pytest.mark.parametrize("has_checkpointer", [True, False])
async def test_a_thread_of_which_nothing_is_left_has_a_status(
    memory: Mortal, *, has_checkpointer: bool
) -> None:
    case = Case(memory)
    workflow = case.workflow if has_checkpointer else case.workflow.builder.compile()
    result = (await case.graph(workflow=workflow).ainvoke(ORDER, RECOVERY))["result"]
    assert result["status"] == "nothing_to_recover"
    begun = {"initial_state": {"log": ["in"]}}
    case.deaths = 0
    result = (await case.graph(workflow=workflow).ainvoke(ORDER | begun, RECOVERY))["result"]
    assert (result["status"], result["final_state"]["log"]) == ("restarted", ["in", "work"])


class Bare(TypedDict):
    log: Annotated[list[str], operator.add]


async def test_a_workflow_without_the_channel_is_resumed_and_says_so(memory: Mortal) -> None:
    case = Case(memory)
    builder = StateGraph(Bare)
    builder.add_node("work", case.workflow.builder.nodes["work"].runnable)
    builder.add_edge(START, "work")
    case.workflow = builder.compile(checkpointer=memory)
    await case.die()
    result = (await case.graph().ainvoke(ORDER, RECOVERY))["result"]
    assert (result["status"], result["peer_context_used"]) == ("resumed", False)
    assert result["reasons"][0].startswith("no_channel: ")


@pytest.fixture
def nothing_left() -> Iterator[None]:
    with no_runtime_left():
        yield


@pytest.mark.usefixtures("nothing_left")
async def test_by_default_it_uses_the_processs_own_runtime(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", f"sqlite:///{tmp_path}/own.db")
    settings = PeerContextSettings(mock_mode="always")
    graph = create_recovery_graph(case.workflow, settings=settings, timeout_seconds=1)
    result = (await graph.compile().ainvoke(ORDER))["result"]
    assert (result["status"], result["degraded"]) == ("resumed", True)
    assert any(reason.startswith("mock mode") for reason in result["reasons"])


async def test_a_thread_that_cannot_be_read_is_an_error(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise RecoveryError("the thread moved on while it was read")

    monkeypatch.setattr("langgraph_peerctx.reconstruction.recovered_thread.load_checkpoint", broken)
    with pytest.raises(RecoveryError, match="moved on"):
        await case.graph().ainvoke(ORDER, RECOVERY)
