"""What peers remember names a run, or leaves it open; a lie does neither harm nor wonders."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

from langgraph_peerctx.errors import StoreBusyError
from langgraph_peerctx.reconstruction.lost_stores import (
    HIGHEST_EPOCH,
    MARGIN,
    Remembered,
    epoch_above,
    remembered,
    said_of,
    unheard,
    what_is_missing,
)

NOW = datetime(2026, 5, 1, tzinfo=UTC)
SAME, OTHER = "a" * 32, "b" * 32


def receipt(run_id: str = "r1", digest: str | None = SAME, **more: Any) -> dict[str, Any]:
    payload = {"epoch": more.pop("epoch", 3), "input_digest": digest}
    at = NOW + timedelta(seconds=more.pop("after", 0))
    return {
        "from_agent": "me",
        "kind": "effect",
        "run_id": run_id,
        "thread_id": "t",
        "occurred_at": at.isoformat(),
        "payload": payload,
        **more,
    }


def told(*facts: dict[str, Any], digest: str | None = SAME) -> Remembered:
    return remembered("me", {str(n): fact for n, fact in enumerate(facts)}, digest)


def test_where_nobody_remembers_anything_there_is_no_run() -> None:
    assert told() == Remembered()
    assert told(receipt(from_agent="somebody else")) == Remembered()


def test_the_run_that_was_given_the_same_is_it() -> None:
    found = told(receipt(after=5), receipt("r0", OTHER, epoch=7), receipt(after=2))
    assert found == Remembered(
        run_ids=("r1",), is_sure=True, epoch=7, since=NOW + timedelta(seconds=2)
    )
    assert found.run_id == "r1"


def test_a_run_that_was_given_something_else_is_another_one() -> None:
    found = told(receipt(digest=OTHER))
    assert (found.run_ids, found.run_id, found.since) == ((), None, None)
    assert found.epoch == 3, "and its epochs are passed nevertheless"


def test_of_two_that_were_given_the_same_neither_is_chosen() -> None:
    found = told(receipt("r1"), receipt("r2", after=60))
    assert (found.run_ids, found.run_id) == (("r1", "r2"), None)


@pytest.mark.parametrize("fact", [receipt(digest=None), receipt(kind="order")])
def test_a_run_of_which_nobody_knows_what_it_was_given_is_not_chosen(fact: Any) -> None:
    found = told(fact)
    assert (found.run_ids, found.run_id) == (("r1",), None)
    assert told(fact, receipt("r2")).run_id == "r2", "where another one is known to be it"


def test_an_effect_of_the_whole_thread_names_no_run() -> None:
    assert told(receipt("t")).run_ids == ()


@pytest.mark.parametrize("lie", [-1, 0, HIGHEST_EPOCH + 1, 2**63, True, "9", None, {"a": 1}])
def test_an_epoch_that_cannot_be_is_not_believed(lie: Any) -> None:
    assert told(receipt(epoch=lie)).epoch == 0


def test_an_epoch_counts_only_where_a_receipt_has_it() -> None:
    assert told(receipt(kind="order", epoch=99)).epoch == 0


def covered(**more: Any) -> dict[str, Any]:
    return {"answered": ["a"], "roster_known": True, **more}


@pytest.mark.parametrize(
    ("coverage", "expect", "missing"),
    [
        (None, ["a"], []),
        (covered(), [], []),
        (covered(), ["a"], []),
        (covered(), ["a", "b"], ["b"]),
        (covered(silent=["c"], busy=["d"]), ["a"], ["c", "d"]),
        (covered(roster_known=False), [], ["whoever worked with it"]),
        ({}, ["b"], ["b"]),
    ],
)
def test_who_was_not_heard_is_named(coverage: Any, expect: list[str], missing: list[str]) -> None:
    assert unheard(coverage, expect) == missing


def test_what_is_missing_is_said_and_how_to_go_on() -> None:
    assert what_is_missing(Remembered(), covered(), []) is None
    silent = what_is_missing(Remembered(), covered(), ["b"])
    assert silent is not None
    assert "b may remember" in silent
    assert "despite_silence=True" in silent
    open_ = what_is_missing(Remembered(run_ids=("r1", "r2")), covered(), [])
    assert open_ is not None
    assert "r1, r2" in open_
    assert "run_id=" in open_


def test_what_a_run_was_begun_with_is_said() -> None:
    assert "nobody remembers one with this input" in said_of(Remembered(), "new")
    assert "run r1" in said_of(Remembered(run_ids=("r1",), is_sure=True), "r1")


class State(TypedDict, total=False):
    topic: str


class Slow(InMemorySaver):
    async def aget_tuple(self, config: Any) -> CheckpointTuple | None:
        await asyncio.sleep(60)
        return await super().aget_tuple(config)


AT: Any = {"configurable": {"thread_id": "t"}}


def workflow(saver: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node("write", lambda _: {"topic": "x"})
    builder.add_edge(START, "write")
    return builder.compile(checkpointer=saver)


async def test_a_new_lease_begins_above_what_a_checkpoint_says_or_else_above_any() -> None:
    app = workflow(InMemorySaver())
    assert abs(await epoch_above(app, AT, 5) - time.time()) < 60
    await app.ainvoke({}, AT)
    assert await epoch_above(app, AT, 5) == MARGIN
    await app.ainvoke({}, {**AT, "metadata": {"peerctx_epoch": 7}})
    assert await epoch_above(app, AT, 5) == MARGIN + 7


async def test_a_checkpointer_that_says_nothing_is_waited_for_so_long_and_no_longer() -> None:
    with pytest.raises(StoreBusyError, match=r"did not answer within 0\.1 s"):
        await epoch_above(workflow(Slow()), AT, 0.1)
