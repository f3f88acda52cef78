"""Who stands where, told by callbacks as LangGraph makes them, late and in any order."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.pregel._algo import LazyAtomicCounter

from langgraph_peerctx.durability.positions import Execution, Positions, place_of
from langgraph_peerctx.errors import ConfigurationError

ROOT = uuid4()


def metadata(namespace: str, path: Any = ("__pregel_pull", "x"), step: int = 1) -> Any:
    node = namespace.rpartition("|")[2].partition(":")[0]
    return {
        "langgraph_checkpoint_ns": namespace,
        "langgraph_node": node,
        "langgraph_step": step,
        "langgraph_path": path,
    }


class Run:
    """A run whose root has begun."""

    def __init__(self) -> None:
        self.positions = Positions()
        self.positions.began(ROOT, {})

    def began(self, namespace: str, parent: UUID = ROOT, **more: Any) -> tuple[UUID, Any]:
        run_id = uuid4()
        found = self.positions.began(run_id, metadata(namespace, **more), parent)
        return run_id, found

    def node(self, namespace: str, parent: UUID = ROOT, **more: Any) -> tuple[UUID, Execution]:
        run_id, found = self.began(namespace, parent, **more)
        assert found is not None
        return run_id, found


def scratchpad() -> Any:
    return SimpleNamespace(call_counter=LazyAtomicCounter(), subgraph_counter=LazyAtomicCounter())


@contextmanager
def inside(namespace: str, pad: Any) -> Iterator[None]:
    """Stand in a node, as LangGraph says it."""
    configurable = {"checkpoint_ns": namespace, "__pregel_scratchpad": pad}
    token = var_child_runnable_config.set({"configurable": configurable})
    yield
    var_child_runnable_config.reset(token)


def test_whatever_is_inside_of_a_node_is_no_node() -> None:
    run = Run()
    node, execution = run.node("a:1")
    chain, found = run.began("a:1", node)
    assert found is None
    assert run.began("a:1", chain)[1] is None
    assert run.positions.execution("a:1") is execution


def test_what_is_called_by_somebody_unknown_is_no_other_attempt() -> None:
    run = Run()
    _, execution = run.node("a:1")
    assert run.began("a:1", uuid4())[1] is None
    assert run.positions.execution("a:1") is execution


def test_what_a_node_has_left_running_is_no_node_either() -> None:
    run = Run()
    node, _ = run.node("a:1")
    chain, _ = run.began("a:1", node)
    run.positions.ended(node)
    assert run.began("a:1", chain)[1] is None
    assert run.began("a:1", node)[1] is None
    with pytest.raises(ConfigurationError, match="the place in the run is not known"):
        run.positions.execution("a:1")


def test_an_attempt_that_was_given_up_is_told_from_the_next_one() -> None:
    run = Run()
    one, first = run.node("a:1")
    other, second = run.node("a:1")
    assert first is not second
    assert run.positions.execution("a:1") is second

    def config(parent: UUID) -> Any:
        return {"callbacks": SimpleNamespace(parent_run_id=parent)}

    assert run.positions.execution("a:1", config(one)) is first
    run.positions.ended(one, has_failed=True)
    assert run.positions.execution("a:1") is second, "only the first one is over"
    assert run.positions.execution("a:1", config(other)) is second


def test_graphs_that_cannot_be_told_apart_have_no_place() -> None:
    run = Run()
    run.node("a:1", path=("__pregel_push", 0, False))
    _, alone = run.node("a|inner:3", uuid4())
    assert place_of(alone) == "a@1[0]/inner@1"
    run.node("a:2", path=("__pregel_push", 1, False))
    _, either = run.node("a|inner:4", uuid4())
    with pytest.raises(ConfigurationError, match="the place in the run is not known"):
        place_of(either)


def test_a_call_that_begins_when_its_caller_has_failed_is_that_ones() -> None:
    run = Run()
    node, _ = run.node("a:1")
    path = ("__pregel_push", ("__pregel_pull", "a"), 0, True)
    run.positions.ended(node, has_failed=True)
    _, call = run.node("a:1|b:2", node, path=path)
    assert place_of(call) == "a@1/b@1(0)"


@pytest.mark.parametrize("is_anew", [True, False])
def test_an_attempt_counts_from_where_the_one_before_it_stopped(*, is_anew: bool) -> None:
    run, pad = Run(), scratchpad()
    node, _ = run.node("a:1")
    with inside("a:1", pad):
        run.began("a:1", node)
    pad.subgraph_counter()
    run.positions.ended(node, has_failed=True)
    again, _ = run.node("a:1")
    # Taken up by another run of the same process, it has a scratchpad of its own.
    with inside("a:1", scratchpad() if is_anew else pad):
        graph, _ = run.began("a:1", again)
        _, inner = run.node("a:1|1|b:2", graph)
    assert place_of(inner) == ("a@1+1/b@1" if is_anew else "a@1/b@1")


def test_calls_of_which_nothing_is_known_have_no_place_but_the_first() -> None:
    run, pad = Run(), scratchpad()
    node, _ = run.node("a:1")
    run.positions.ended(node, has_failed=True)
    again, _ = run.node("a:1")
    pad.call_counter()
    pad.call_counter()
    with inside("a:1", pad):
        _, first = run.node("a:1|b:2", again, path=("__pregel_push", (), 0, True))
        _, second = run.node("a:1|b:3", again, path=("__pregel_push", (), 1, True))
    assert place_of(first) == "a@1/b@1(0)"
    with pytest.raises(ConfigurationError, match="go on with ainvoke"):
        place_of(second)


def test_without_counters_a_first_attempt_has_its_place_and_a_retry_its_first_call_alone() -> None:
    """As with a LangGraph that keeps them elsewhere."""
    run, pad = Run(), SimpleNamespace()
    for attempt in (1, 2):
        node, _ = run.node("a:1")
        with inside("a:1", pad):
            _, first = run.node(f"a:1|b:{attempt}", node, path=("__pregel_push", (), 0, True))
            _, later = run.node(f"a:1|c:{attempt}", node, path=("__pregel_push", (), 1, True))
        assert place_of(first) == "a@1/b@1(0)"
        if attempt == 1:
            assert place_of(later) == "a@1/c@1(1)"
        else:
            with pytest.raises(ConfigurationError, match="go on with ainvoke"):
                place_of(later)
        run.positions.ended(node, has_failed=True)


def test_a_node_that_ends_well_is_forgotten_as_one_that_failed() -> None:
    run = Run()
    for has_failed in (True, False):
        node, _ = run.node("a:1")
        run.positions.ended(node, has_failed=has_failed)
    assert run.positions._failed == {}


def test_of_many_that_fail_the_last_are_known() -> None:
    positions = Positions(max_failures=2)
    positions.began(ROOT, {})
    for number in range(4):
        run_id = uuid4()
        positions.began(run_id, metadata(f"a:{number}"), ROOT)
        positions.ended(run_id, has_failed=True)
    assert list(positions._failed) == ["a:2", "a:3"]
