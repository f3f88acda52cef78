"""The moments of a recovery: what is known, how long each part took, and never less than zero."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from reconstruction.savers import Mortal
from typing_extensions import TypedDict

from langgraph_peerctx.reconstruction.failure_detector import AgentFailure
from langgraph_peerctx.reconstruction.first_checkpoint import first_checkpoint_after
from langgraph_peerctx.reconstruction.incident import incident_record
from langgraph_peerctx.reconstruction.report import (
    IncidentTimes,
    Took,
    incident_times,
    moment_of,
    noticed,
    seconds_between,
)

ZERO = datetime(2030, 1, 1, tzinfo=UTC)


def at(seconds: float) -> str:
    return (ZERO + timedelta(seconds=seconds)).isoformat()


def step(name: str, start: float, took: float, **more: Any) -> dict[str, Any]:
    told = {"outcome": "done", "detail": {}, "host": "one", **more}
    return {"step": name, "started_at": at(start), "elapsed_seconds": took, **told}


STEPS = [
    step("claim", 5.0, 0.1),
    step("load_checkpoint", 5.1, 0.1),
    step("request_context", 5.2, 0.1),
    step("collect_context", 5.3, 0.4),
    step("reconstruct", 5.7, 0.1),
    step("resume_workflow", 5.8, 2.0),
    step("verify", 7.8, 0.1),
]
ANSWERS = [
    {"responder_id": "late", "agents": {"b": "nothing"}, "at": at(5.6)},
    {"responder_id": "early", "agents": {"a": "context"}, "at": at(5.3)},
]
NOTICED = {"last_heartbeat_at": at(0), "known_at": at(4.5), "why": "silent"}


def whole() -> IncidentTimes:
    return incident_times(
        STEPS,
        noticed=NOTICED,
        asked={"at": at(5.25), "trouble": None, "is_certain": False},
        answers=ANSWERS,
        first_checkpoint_at=at(6.0),
        ended_at=at(8.0),
    )


def test_every_moment_is_there_in_its_order() -> None:
    times = whole()
    assert (times["last_heartbeat_at"], times["known_at"], times["why"]) == (
        at(0),
        at(4.5),
        "silent",
    )
    assert times["claimed_at"] == at(5.1)
    assert times["requested_at"] == at(5.25)
    assert times["reconstructed_at"] == at(5.8)
    assert times["resumed_at"] == at(5.8)
    assert (times["first_checkpoint_at"], times["ended_at"]) == (at(6.0), at(8.0))
    assert times["clocks"] == "one"


def test_answers_stand_in_the_order_in_which_they_came_with_how_long_they_took() -> None:
    assert whole()["answers"] == [
        {
            "responder_id": "early",
            "agents": {"a": "context"},
            "at": at(5.3),
            "after_seconds": 0.05,
        },
        {"responder_id": "late", "agents": {"b": "nothing"}, "at": at(5.6), "after_seconds": 0.35},
    ]


def test_answers_are_in_order_where_a_fraction_is_left_out() -> None:
    ats = ["2030-01-01T00:00:05Z", "2030-01-01T00:00:05.5Z", "2030-01-01T00:00:06Z"]
    answers = [{"responder_id": "a", "agents": {}, "at": one} for one in reversed(ats)]
    assert [one["at"] for one in incident_times([], answers=answers)["answers"]] == ats


def test_the_parts_follow_each_other_and_the_whole_is_from_the_first_moment_to_the_end() -> None:
    assert whole()["took"] == {
        "to_known": 4.5,
        "to_claimed": 0.6,
        "to_answers": 0.5,
        "to_resumed": 0.2,
        "to_first_checkpoint": 0.2,
        "total": 8.0,
    }


def test_what_is_not_known_is_none_and_the_rest_counts_from_what_is() -> None:
    steps = [s for s in STEPS if s["step"] not in {"claim", "request_context"}]
    times = incident_times(steps, ended_at=at(8.0))
    assert (times["last_heartbeat_at"], times["known_at"], times["why"]) == (None, None, None)
    assert (times["claimed_at"], times["requested_at"], times["answers"]) == (None, None, [])
    assert times["took"] == {
        "to_known": None,
        "to_claimed": None,
        "to_answers": None,
        "to_resumed": 0.7,
        "to_first_checkpoint": None,
        "total": 2.9,
    }


def test_of_nothing_nothing_is_known() -> None:
    times = incident_times([])
    assert set(times) == IncidentTimes.__required_keys__
    assert not any(value for key, value in times.items() if key not in {"took", "clocks"})
    assert times["took"] == dict.fromkeys(Took.__required_keys__)


@pytest.mark.parametrize(
    ("asked", "more", "expected"),
    [
        (None, {}, at(5.2)),
        (None, {"detail": {"error": "BrokerUnavailableError"}}, None),
        (None, {"outcome": "failed"}, None),
        ({"at": at(5.25), "is_certain": True}, {}, None),
        ({}, {}, at(5.2)),
    ],
)
def test_peers_were_asked_only_if_the_question_may_have_left(
    asked: Any, more: Any, expected: str | None
) -> None:
    times = incident_times([step("request_context", 5.2, 0.1, **more)], asked=asked)
    assert times["requested_at"] == expected


def test_clocks_of_several_hosts_are_said_to_be_so() -> None:
    assert incident_times([*STEPS[:4], step("reconstruct", 9, 1, host="two")])["clocks"] == (
        "several"
    )


moments = st.none() | st.floats(-1e6, 1e6).map(at)


@given(moments, moments, moments, moments, moments, st.lists(st.floats(-1e6, 1e6).map(at)))
def test_no_duration_is_less_than_zero_whatever_the_clocks_say(
    heard: str | None,
    known: str | None,
    asked: str | None,
    first: str | None,
    ended: str | None,
    answered: list[str],
) -> None:
    times = incident_times(
        STEPS,
        noticed={"last_heartbeat_at": heard, "known_at": known, "why": "silent"},
        asked=asked and {"at": asked},
        answers=[{"responder_id": "a", "agents": {}, "at": one} for one in answered],
        first_checkpoint_at=first,
        ended_at=ended,
    )
    found = [*times["took"].values(), *(one["after_seconds"] for one in times["answers"])]
    assert all(one >= 0 for one in found if isinstance(one, float))


def test_a_moment_that_is_none_is_no_moment() -> None:
    assert [moment_of(one) for one in (None, "soon", 3)] == [None, None, None]
    assert moment_of("2030-01-01T00:00:00") == ZERO
    assert seconds_between(at(2), at(1)) == 0.0
    assert seconds_between(None, at(1)) is None


def failure(**more: Any) -> AgentFailure:
    return AgentFailure(
        agent_id="a",
        thread_id="t",
        run_id="r",
        workflow=None,
        epoch=1,
        process_id="p",
        incarnation="i",
        why="died",
        noticed_at=ZERO,
        silent_seconds=None,
        by="sentinel",
        **more,
    )


def test_how_a_failure_was_noticed_is_kept_as_plain_json() -> None:
    seen, known = ZERO - timedelta(seconds=2), ZERO - timedelta(seconds=1)
    assert noticed(failure(last_seen_at=seen, known_at=known)) == {
        "last_heartbeat_at": at(-2),
        "known_at": at(-1),
        "why": "died",
    }
    assert noticed(failure())["known_at"] == at(0)
    assert noticed(failure())["last_heartbeat_at"] is None


def test_a_record_says_what_the_recoverys_state_knows() -> None:
    state = {
        "incident_id": "i",
        "failed_agent_id": "a",
        "thread_id": "t",
        "started_at": at(5.0),
        "steps": STEPS,
        "noticed": NOTICED,
        "asked": {"at": at(5.25)},
        "gathered": {"answers": ANSWERS},
        "first_checkpoint_at": at(6.0),
    }
    effects: list[Any] = [{"key": "k"}]
    record = incident_record(state, "resumed", {"effects": effects, "consumed": [{"peer": "b"}]})
    assert {**record["times"], "ended_at": at(8.0), "took": None} == {**whole(), "took": None}
    assert record["times"]["ended_at"] is not None
    assert (record["effects"], record["consumed"]) == (effects, [{"peer": "b"}])
    assert record["traceparent"] is None
    assert incident_record(state, "failed", None, times=whole())["times"] == whole()
    others: list[Any] = [{"key": "another"}]
    assert incident_record(state, "failed", {"effects": effects}, effects=others)["effects"] == (
        others
    )


class State(TypedDict, total=False):
    count: int


def counting(saver: Any = None) -> Any:
    builder = StateGraph(State)
    builder.add_node("one", lambda _: {"count": 1})
    builder.add_node("two", lambda _: {"count": 2})
    builder.add_edge(START, "one")
    builder.add_edge("one", "two")
    return builder.compile(checkpointer=saver or InMemorySaver())


async def test_the_first_new_checkpoint_is_the_one_after_the_head(saver: Mortal) -> None:
    app, place = counting(saver), {"configurable": {"thread_id": "t"}}
    await app.ainvoke({"count": 0}, place)
    newest_first = [saved async for saved in app.checkpointer.alist(place)]
    ids = [saved.checkpoint["id"] for saved in newest_first]
    written = [saved.checkpoint["ts"] for saved in newest_first]
    assert await first_checkpoint_after(app, place, None) == written[-1]
    assert await first_checkpoint_after(app, place, ids[-1]) == written[-2]
    assert await first_checkpoint_after(app, place, ids[1]) == written[0]
    assert await first_checkpoint_after(app, place, ids[0]) is None


async def test_a_second_run_on_a_thread_has_a_first_checkpoint_of_its_own() -> None:
    app, place = counting(), {"configurable": {"thread_id": "t"}}
    await app.ainvoke({"count": 0}, place)
    head = (await app.aget_state(place)).config["configurable"]["checkpoint_id"]
    await app.ainvoke({"count": 0}, place)
    found = moment_of(await first_checkpoint_after(app, place, head))
    before = moment_of((await app.checkpointer.aget_tuple(place)).checkpoint["ts"])
    assert found is not None
    assert before is not None
    assert found < before


async def test_a_fork_beside_it_is_not_taken_for_it(saver: Mortal) -> None:
    app, place = counting(saver), {"configurable": {"thread_id": "t"}}
    await app.ainvoke({"count": 0}, place)
    last, head, before, *_ = [saved async for saved in app.checkpointer.alist(place)]
    await app.ainvoke(None, before.config)
    found = await first_checkpoint_after(app, place, head.checkpoint["id"])
    assert found == last.checkpoint["ts"]


class Silent(InMemorySaver):
    def alist(self, *_args: Any, **_more: Any) -> Any:
        raise NotImplementedError


async def test_a_checkpointer_that_cannot_say_costs_nothing() -> None:
    app = counting().copy({"checkpointer": Silent()})
    assert await first_checkpoint_after(app, {"configurable": {"thread_id": "t"}}, None) is None
    gone = counting().copy({"checkpointer": None})
    assert await first_checkpoint_after(gone, {"configurable": {"thread_id": "t"}}, None) is None
    kept = counting()
    unknown = await first_checkpoint_after(kept, {"configurable": {"thread_id": "t"}}, "none")
    assert unknown is None
