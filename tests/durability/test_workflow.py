from dataclasses import dataclass
from typing import Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel

from langgraph_peerctx.durability.workflow import (
    check_initial_state,
    checkpointer_of,
    compiled,
    input_keys,
    is_functional,
    of_run,
    safest_durability,
    state_keys,
    thread_config,
)
from langgraph_peerctx.errors import ConfigurationError, UnknownChannelError


class Input(TypedDict):
    question: str


class State(TypedDict, total=False):
    question: str
    answer: str


def build(*, checkpointer: Any = None, **schemas: Any) -> Any:
    builder = StateGraph(schemas.pop("state", State), **schemas)
    builder.add_node("work", lambda _state: None)
    builder.add_edge(START, "work")
    return builder.compile(checkpointer=checkpointer)


@entrypoint(checkpointer=InMemorySaver())
async def functional(number: int) -> int:
    return number


def test_a_state_graph_that_is_not_compiled_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigurationError, match=r"\.compile\(checkpointer="):
        compiled(StateGraph(State))


@pytest.mark.parametrize("workflow", [None, "graph", RunnableLambda(lambda value: value)])
def test_what_is_no_workflow_is_refused(workflow: object) -> None:
    with pytest.raises(ConfigurationError, match="compiled StateGraph or an @entrypoint"):
        compiled(workflow)


def test_a_root_graph_that_speaks_of_subgraphs_only_has_no_checkpointer() -> None:
    assert checkpointer_of(build(checkpointer=InMemorySaver())) is not None
    assert [checkpointer_of(build(checkpointer=value)) for value in (None, True, False)] == [
        None,
        None,
        None,
    ]


def test_a_functional_workflow_is_told_from_a_graph() -> None:
    assert is_functional(functional)
    assert not is_functional(build())
    assert state_keys(functional) == input_keys(functional) == frozenset()


def test_state_and_input_keys_are_those_of_the_schemas() -> None:
    workflow = build(input_schema=Input)

    assert state_keys(workflow) == {"question", "answer"}
    assert input_keys(workflow) == {"question"}


def test_a_state_that_is_one_value_has_no_keys() -> None:
    assert state_keys(build(state=int)) == input_keys(build(state=int)) == frozenset()


def test_an_initial_state_with_unknown_keys_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(UnknownChannelError, match=r"answer, colour.*it has question"):
        check_initial_state(build(input_schema=Input), {"answer": "", "colour": 1})


def test_initial_states_that_langgraph_takes_are_taken() -> None:
    class Model(BaseModel):
        question: str = ""

    @dataclass
    class Data:
        question: str = ""

    check_initial_state(build(), {"question": "why?"})
    check_initial_state(build(), None)
    check_initial_state(build(state=Model), Model())
    check_initial_state(build(state=Data), Data())
    check_initial_state(build(state=MessagesState), {"messages": []})
    check_initial_state(functional, {"anything": 1})


def test_the_callers_config_is_kept_and_pointed_at_the_thread() -> None:
    given: RunnableConfig = {
        "tags": ["nightly"],
        "recursion_limit": 7,
        "configurable": {"user": "u1", "thread_id": "thread-1", "checkpoint_ns": ""},
    }

    config = thread_config(given, "thread-1")

    assert config == {
        "tags": ["nightly"],
        "recursion_limit": 7,
        "configurable": {"user": "u1", "thread_id": "thread-1"},
    }
    assert "checkpoint_ns" in given["configurable"]


def test_what_langgraph_hands_to_a_node_is_left_out_of_the_config() -> None:
    given: RunnableConfig = {
        "configurable": {"__pregel_task_id": "t", "checkpoint_map": {"": "c"}, "user": "u1"}
    }

    assert thread_config(given, "thread-1")["configurable"] == {
        "user": "u1",
        "thread_id": "thread-1",
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [("thread_id", "thread-2"), ("checkpoint_id", "1ef"), ("checkpoint_ns", "sub:1")],
)
def test_a_config_that_points_elsewhere_is_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=key.split("_", maxsplit=1)[0]):
        thread_config({"configurable": {key: value}}, "thread-1")


@pytest.mark.parametrize("thread_id", ["", "t" * 256, 7, None])
def test_a_thread_id_must_be_text_of_legal_length(thread_id: Any) -> None:
    with pytest.raises(ConfigurationError, match="thread_id"):
        thread_config(None, thread_id)


def test_checkpoints_of_a_recovery_belong_to_the_run_unless_the_caller_says_otherwise() -> None:
    config: RunnableConfig = {"metadata": {"owner": "ops"}}

    assert of_run(config, "run-1")["metadata"] == {"owner": "ops", "run_id": "run-1"}
    assert of_run(config, None) == config
    named: RunnableConfig = {"metadata": {"run_id": "mine"}}
    assert of_run(named, "run-1") == named


def test_durability_is_sync_wherever_langgraph_can_run_the_workflow_so() -> None:
    saver = InMemorySaver()
    unsaved = StateGraph(State)
    unsaved.add_node("inner", build(checkpointer=False))
    unsaved.add_edge(START, "inner")
    nested = StateGraph(State)
    nested.add_node("outer", unsaved.compile())
    nested.add_edge(START, "outer")

    assert safest_durability(build(checkpointer=saver)) == "sync"
    assert safest_durability(unsaved.compile(checkpointer=saver)) == "async"
    assert safest_durability(nested.compile(checkpointer=saver)) == "async"
    assert safest_durability(build()) is None
