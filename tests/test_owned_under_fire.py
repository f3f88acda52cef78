"""Owned runs where two come at once, callers leave, and the database is away for a moment."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command
from owning import AGENT, AT, THREAD, State, asks, newest, until, workflow

from langgraph_peerctx import background
from langgraph_peerctx.durability.fenced_checkpointer import FencedCheckpointer
from langgraph_peerctx.durability.ownership import Ownership
from langgraph_peerctx.errors import StoreBusyError, StoreError, ThreadBusyError
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.incidents import ControlDatabase

pytestmark = pytest.mark.usefixtures("_no_runtime_left")


@pytest.fixture
async def ownership(_no_runtime_left: None) -> AsyncIterator[Ownership]:
    """What this process owns, whose runtime runs as long as the test."""
    del _no_runtime_left
    lease = background.lease()
    yield await (await lease.aruntime()).own()
    await lease.arelease()


class Gate:
    """A node that waits, and counts how often it is run."""

    def __init__(self) -> None:
        self.reached, self.opened, self.visits = asyncio.Event(), asyncio.Event(), 0

    async def __call__(self, _state: State) -> State:
        self.visits += 1
        self.reached.set()
        async with asyncio.timeout(30):
            await self.opened.wait()
        return {"log": ["second"]}


# Two at once


async def test_of_two_answers_at_once_one_is_taken(control: ControlDatabase) -> None:
    gate = Gate()
    builder = StateGraph(State)
    builder.add_node("ask", asks)
    builder.add_node("order", gate)
    builder.add_edge(START, "ask")
    builder.add_edge("ask", "order")
    app = own_runs(builder.compile(checkpointer=InMemorySaver(), name="order"), agent_id=AGENT)
    await app.ainvoke({"log": []}, AT)

    async def answer() -> Any:
        try:
            return await app.ainvoke(Command(resume="three"), AT)
        except ThreadBusyError:
            gate.opened.set()
            raise

    both = await asyncio.gather(answer(), answer(), return_exceptions=True)
    assert sorted(type(one).__name__ for one in both) == ["ThreadBusyError", "dict"]
    assert gate.visits == 1
    assert (newest(control).end_kind, len(newest(control).inputs)) == ("returned", 2)


@pytest.mark.parametrize("given", [None, Command(resume="three")])
async def test_nobody_goes_on_with_a_run_that_is_at_work(
    control: ControlDatabase, given: Any
) -> None:
    gate = Gate()
    app = own_runs(workflow(gate), agent_id=AGENT)
    running = asyncio.create_task(app.ainvoke({"log": []}, AT))
    await gate.reached.wait()
    with pytest.raises(ThreadBusyError):
        await app.ainvoke(given, AT)
    gate.opened.set()
    assert (await running)["log"] == ["first", "second"]
    assert gate.visits == 1
    assert (newest(control).end_kind, len(newest(control).inputs)) == ("returned", 1)


async def test_two_agents_with_checkpointers_of_their_own_may_share_a_threads_name(
    control: ControlDatabase,
) -> None:
    gate, saver = Gate(), InMemorySaver()
    one = own_runs(workflow(gate), agent_id=AGENT)
    other = own_runs(workflow(saver=saver), agent_id="another-agent")
    await other.ainvoke({"log": []}, AT)
    running = asyncio.create_task(one.ainvoke({"log": []}, AT))
    await gate.reached.wait()
    assert (await other.ainvoke({"log": []}, AT))["log"] == ["first", "second"] * 2
    assert {saved.metadata["peerctx_epoch"] for saved in saver.list(AT)} == {1, 2}
    gate.opened.set()
    assert (await running)["log"] == ["first", "second"]
    assert newest(control).end_kind == "returned"


# Callers that leave


def waiting(ownership: Ownership, name: str, *, when: str = "after") -> tuple[Any, Any]:
    """Let the database's next answer wait, before or after it has done its work."""
    control: Any = ownership.control
    work, reached, opened = getattr(control, name), threading.Event(), threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        setattr(control, name, work)
        done = work(*arguments, **options) if when == "after" else None
        reached.set()
        assert opened.wait(30)
        return work(*arguments, **options) if when == "before" else done

    setattr(control, name, slow)
    return reached, opened


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("goes_on", [False, True])
async def test_an_admission_whose_caller_is_cancelled_is_taken_back(
    control: ControlDatabase, ownership: Ownership, when: str, *, goes_on: bool
) -> None:
    app = own_runs(workflow(asks), agent_id=AGENT)
    given: Any = {"log": []}
    if goes_on:
        await app.ainvoke(given, AT)
        given = Command(resume="three")
    reached, opened = waiting(ownership, "reopen" if goes_on else "admit", when=when)
    asking = asyncio.create_task(app.ainvoke(given, AT))
    await until(reached.is_set)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    opened.set()
    await until(lambda: newest(control) is not None and newest(control).end_kind == "cancelled")
    assert control.lease_of(AGENT, THREAD).is_free  # type: ignore[union-attr]
    assert (ownership.held, control.lost_runs()) == ((), [])
    final = await app.ainvoke(given, AT)
    assert final["log"][-1] == ("three" if goes_on else "first")


async def test_an_admission_that_comes_too_late_is_taken_back(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_TIMEOUT_SECONDS", "2")
    app = own_runs(workflow(), agent_id=AGENT)
    lease = background.lease()
    ownership = await (await lease.aruntime()).own()
    reached, opened = waiting(ownership, "admit")
    with pytest.raises(StoreBusyError):
        await app.ainvoke({"log": []}, AT)
    assert reached.is_set()
    opened.set()
    await until(lambda: not newest(control).is_open)
    assert newest(control).end_kind == "cancelled"
    assert (await app.ainvoke({"log": ["again"]}, AT))["log"] == ["again", "first", "second"]
    await lease.arelease()


async def test_wherever_an_admission_is_cancelled_nothing_stays(
    control: ControlDatabase, ownership: Ownership
) -> None:
    app = own_runs(workflow(), agent_id=AGENT)
    for number in range(24):
        place: Any = {"configurable": {"thread_id": f"thread-{number}"}}
        asking = asyncio.create_task(app.ainvoke({"log": []}, place))
        await asyncio.sleep(0.0005 * (number % 12))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    await until(lambda: not ownership.held and not ownership.owes)
    await asyncio.sleep(0.9)  # an expired lease would be one of a run that is lost
    assert control.lost_runs() == []
    assert control.leases_owned_by(ownership.owner.incarnation) == []


async def test_an_end_is_written_though_its_caller_leaves_and_the_database_too(
    control: ControlDatabase, ownership: Ownership
) -> None:
    app = own_runs(workflow(), agent_id=AGENT)
    database: Any = ownership.control
    end, reached, gone = database.end, threading.Event(), threading.Event()

    def fails(*_: Any, **__: Any) -> bool:
        database.end = end
        reached.set()
        assert gone.wait(30)
        raise StoreError("gone for a moment")

    database.end = fails
    running = asyncio.create_task(app.ainvoke({"log": []}, AT))
    await until(reached.is_set)
    running.cancel()
    await asyncio.sleep(0)
    gone.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: not newest(control).is_open)
    assert newest(control).end_kind == "returned"
    assert control.lease_of(AGENT, THREAD).is_free  # type: ignore[union-attr]


# What is owed


async def test_an_end_that_is_owed_is_written_before_the_thread_is_taken_again(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_HEARTBEAT_INTERVAL_SECONDS", "5")  # nobody else pays
    monkeypatch.setenv("PEER_CONTEXT_HEARTBEAT_PAUSE_SECONDS", "10")
    app = own_runs(workflow(asks), agent_id=AGENT)
    lease = background.lease()
    database: Any = (await (await lease.aruntime()).own()).control
    end = database.end

    def fails(*_: Any, **__: Any) -> bool:
        database.end = end
        raise StoreError("gone for a moment")

    database.end = fails
    await app.ainvoke({"log": []}, AT)
    assert newest(control).is_open
    assert (await app.ainvoke(Command(resume="three"), AT))["log"] == ["first", "three"]
    assert (newest(control).end_kind, len(newest(control).inputs)) == ("returned", 2)
    await lease.arelease()


async def test_an_end_that_is_owed_is_not_forgotten_over_the_next_admission(
    control: ControlDatabase, ownership: Ownership
) -> None:
    app = own_runs(workflow(), agent_id=AGENT)
    database: Any = ownership.control
    end = database.end

    def fails(*_: Any, **__: Any) -> bool:
        raise StoreError("gone for a while")

    database.end = fails
    await app.ainvoke({"log": []}, AT)
    with pytest.raises(StoreError):
        await app.ainvoke({"log": ["again"]}, AT)
    database.end = end
    await until(lambda: not newest(control).is_open)
    assert newest(control).end_kind == "returned"
    assert (await app.ainvoke({"log": ["again"]}, AT))["log"][-3] == "again"


async def test_what_can_never_be_written_stops_no_renewal(
    control: ControlDatabase, ownership: Ownership, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    running = asyncio.create_task(own_runs(workflow(gate), agent_id=AGENT).ainvoke({"log": []}, AT))
    await gate.reached.wait()

    def never() -> bool:
        raise ValueError("no such value")

    def is_held() -> bool:
        return control.lease_of(AGENT, THREAD).seconds_left > 0  # type: ignore[union-attr]

    began = time.monotonic()  # a lease lives for 0.8 s
    async with asyncio.timeout(20):
        while time.monotonic() - began < 1.2 or not is_held():
            ownership.owe(AGENT, "another", never)
            await asyncio.sleep(0.02)
    await until(lambda: not ownership.owes)
    assert "is given up" in caplog.text
    gate.opened.set()
    await running


# Reading and editing


@pytest.mark.parametrize("is_fenced", [False, True])
async def test_a_thread_that_waits_is_shown_as_it_is(*, is_fenced: bool) -> None:
    builder = StateGraph(State)
    builder.add_node("left", lambda _state: {"log": ["left"]})
    builder.add_node("right", asks)
    builder.add_edge(START, "left")
    builder.add_edge(START, "right")
    saver: Any = FencedCheckpointer(InMemorySaver()) if is_fenced else InMemorySaver()
    app = own_runs(builder.compile(checkpointer=saver), agent_id=AGENT)
    await app.ainvoke({"log": []}, AT)
    for state in (await app.aget_state(AT), app.get_state(AT)):
        assert state.next == ("right",), "the other branch has ended"
        assert [question.value for question in state.interrupts] == ["how many?"]
        assert state.values["log"] == ["left"]


async def edited(app: Any, log: list[str], *, in_sync: bool) -> None:
    if in_sync:
        await asyncio.to_thread(app.update_state, AT, {"log": log}, "first")
    else:
        await app.aupdate_state(AT, {"log": log}, as_node="first")


@pytest.mark.parametrize("in_sync", [False, True])
async def test_a_state_is_edited_between_two_runs_and_the_next_one_sees_it(
    control: ControlDatabase, *, in_sync: bool
) -> None:
    app = own_runs(workflow(asks), agent_id=AGENT)
    await app.ainvoke({"log": ["in"]}, AT)
    await edited(app, ["edited"], in_sync=in_sync)
    assert (await app.aget_state(AT)).values["log"] == ["in", "first", "edited"]
    assert control.lease_of(AGENT, THREAD).is_free  # type: ignore[union-attr]
    final = await app.ainvoke(Command(resume="three"), AT)
    assert final["log"] == ["in", "first", "edited", "three"]


@pytest.mark.parametrize("in_sync", [False, True])
async def test_a_state_is_not_edited_while_a_run_is_at_work(*, in_sync: bool) -> None:
    gate = Gate()
    app = own_runs(workflow(gate), agent_id=AGENT)
    running = asyncio.create_task(app.ainvoke({"log": []}, AT))
    await gate.reached.wait()
    with pytest.raises(ThreadBusyError):
        await edited(app, ["edited"], in_sync=in_sync)
    gate.opened.set()
    assert (await running)["log"] == ["first", "second"]


async def test_of_two_who_take_a_thread_at_once_one_is_refused(
    control: ControlDatabase, ownership: Ownership
) -> None:
    """The database knows processes only: to it, two of one are the same."""
    app = own_runs(workflow(), agent_id=AGENT)
    await app.ainvoke({"log": []}, AT)
    reached, opened = waiting(ownership, "take")
    editing = asyncio.create_task(app.aupdate_state(AT, {"log": ["edited"]}))
    await until(reached.is_set)
    for other in (app.aupdate_state(AT, {"log": ["x"]}), app.ainvoke({"log": ["x"]}, AT)):
        with pytest.raises(ThreadBusyError):
            await other
    opened.set()
    await editing
    reached, opened = waiting(ownership, "release", when="before")
    editing = asyncio.create_task(app.aupdate_state(AT, {"log": ["again"]}))
    await until(reached.is_set)
    with pytest.raises(ThreadBusyError):
        await app.ainvoke({"log": ["x"]}, AT)
    opened.set()
    await editing
    assert (await app.aget_state(AT)).values["log"] == ["first", "second", "edited", "again"]
    assert control.lease_of(AGENT, THREAD).is_free  # type: ignore[union-attr]
