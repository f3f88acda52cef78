"""Who names the checkpoint at which a thread stands goes on with its run: that is no fork."""

import asyncio
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_config
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt
from owning import AGENT, AT, GHOST, THREAD, State, asks, new_run, newest, workflow

from langgraph_peerctx import effect
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.admission import config_of
from langgraph_peerctx.durability.ownership import Held, Ownership
from langgraph_peerctx.durability.run_effects import effects_in
from langgraph_peerctx.errors import StoreBusyError, StoreError, ThreadBusyError
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.runs import NewRun

pytestmark = pytest.mark.usefixtures("_no_runtime_left")


@pytest.fixture
def settings(settings: PeerContextSettings, monkeypatch: pytest.MonkeyPatch) -> PeerContextSettings:
    """Leases that nobody outlives here: who has a thread keeps it, however busy the machine is."""
    del settings
    monkeypatch.setenv("PEER_CONTEXT_HEARTBEAT_PAUSE_SECONDS", "30")
    return PeerContextSettings()


class Watched(InMemorySaver):
    """Does each of these things once, when the thread's head is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.once: list[Any] = []  # shared with the clone that LangGraph makes

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        while self.once:
            await self.once.pop()()
        return await super().aget_tuple(config)

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        while self.once:
            self.once.pop()()
        return super().get_tuple(config)


class Shop:
    """A workflow's second node, which orders, asks, and pays."""

    def __init__(self) -> None:
        self.done: list[str] = []

    async def node(self, _state: State) -> State:
        await effect("order", self.does, "ordered")
        said = interrupt("go?")
        await effect("pay", self.does, "paid")
        return {"log": [said]}

    async def does(self, what: str) -> None:
        self.done.append(what)


async def test_an_answer_at_the_named_head_goes_on_with_the_run_that_asked(
    control: ControlDatabase,
) -> None:
    shop = Shop()
    app = own_runs(workflow(shop.node), agent_id=AGENT)
    await app.ainvoke({"log": ["in"]}, AT)
    asked = newest(control)
    head = (await app.aget_state(AT)).config
    assert head["configurable"]["checkpoint_id"]
    final = await app.ainvoke(Command(resume="yes"), head)
    assert final["log"] == ["in", "first", "yes"]
    assert shop.done == ["ordered", "paid"]
    answered = newest(control)
    assert answered.run_id == asked.run_id
    assert answered.inputs[1].checkpoint_id == head["configurable"]["checkpoint_id"]
    assert "checkpoint_id" not in config_of(app, answered)["configurable"], "it is no fork"


def test_sync_code_does_the_same(control: ControlDatabase) -> None:
    app = own_runs(workflow(asks), agent_id=AGENT)
    app.invoke({"log": ["in"]}, AT)
    asked = newest(control)
    head = app.get_state(AT).config
    assert app.invoke(Command(resume="three"), head)["log"] == ["in", "first", "three"]
    assert newest(control).run_id == asked.run_id
    assert len(newest(control).inputs) == 2


@pytest.mark.parametrize("nothing", [None, ""])
async def test_a_checkpoint_that_is_named_nothing_is_not_named(
    control: ControlDatabase, nothing: Any
) -> None:
    app = own_runs(workflow(asks), agent_id=AGENT)
    await app.ainvoke({"log": ["in"]}, AT)
    at: Any = {"configurable": {"thread_id": THREAD, "checkpoint_id": nothing}}
    assert (await app.ainvoke(Command(resume="three"), at))["log"] == ["in", "first", "three"]
    assert len(newest(control).inputs) == 2


async def test_a_new_input_at_the_named_head_is_a_run_that_forks_from_nothing(
    control: ControlDatabase,
) -> None:
    app = own_runs(workflow(), agent_id=AGENT)
    await app.ainvoke({"log": ["in"]}, AT)
    head = (await app.aget_state(AT)).config
    final = await app.ainvoke({"log": ["more"]}, head)
    assert final["log"] == ["in", "first", "second", "more", "first", "second"]
    assert "checkpoint_id" not in config_of(app, newest(control))["configurable"]


async def test_an_earlier_checkpoint_of_a_thread_that_asks_is_a_fork(
    control: ControlDatabase,
) -> None:
    shop = Shop()
    app = own_runs(workflow(shop.node), agent_id=AGENT)
    await app.ainvoke({"log": ["in"]}, AT)
    asked = newest(control)
    (before,) = [s async for s in app.aget_state_history(AT) if s.next == ("first",)]
    await app.ainvoke(None, before.config)
    assert newest(control).run_id != asked.run_id
    assert shop.done == ["ordered", "ordered"]


class Branches:
    """A workflow with a subgraph, whose nodes order, ask and pay."""

    def __init__(self) -> None:
        self.done: list[str] = []
        inner = StateGraph(State)
        inner.add_node("order", self.order)
        inner.add_node("ask", self.ask)
        inner.add_edge(START, "order")
        inner.add_edge("order", "ask")
        self.app: Any = workflow(inner.compile())

    async def order(self, _state: State) -> State:
        return {"log": [await self.does("ordered")]}

    async def ask(self, _state: State) -> State:
        said = interrupt("go?")
        return {"log": [said, await self.does("paid")]}

    async def does(self, what: str) -> str:
        """Do it as an effect, where the run is owned."""
        if effects_in(get_config()) is None:
            return await self.did(what)
        done: str = await effect(what, self.did, what)
        return done

    async def did(self, what: str) -> str:
        self.done.append(what)
        return what


async def at_the_head(app: Any) -> Any:
    return (await app.aget_state(AT)).config


async def at_an_earlier_one(app: Any) -> Any:
    (found,) = [s async for s in app.aget_state_history(AT) if s.next == ("first",)]
    return found.config


async def at_the_subgraphs_head(app: Any) -> Any:
    found = (await app.aget_state(AT, subgraphs=True)).tasks[0].state.config
    assert {"", found["configurable"]["checkpoint_ns"]} == {
        *found["configurable"]["checkpoint_map"]
    }
    return found


async def at_an_earlier_one_of_the_subgraph(app: Any) -> Any:
    inside = await at_the_subgraphs_head(app)
    place, names = inside["configurable"], []
    bare = {"thread_id": THREAD, "checkpoint_ns": place["checkpoint_ns"]}
    names = [t.checkpoint["id"] async for t in app.checkpointer.alist({"configurable": bare})]
    assert names[0] == place["checkpoint_id"]
    mapped = {**place["checkpoint_map"], place["checkpoint_ns"]: names[-1]}
    return {"configurable": {**place, "checkpoint_id": names[-1], "checkpoint_map": mapped}}


async def in_the_subgraph_without_a_map(app: Any) -> Any:
    place = (await at_the_subgraphs_head(app))["configurable"]
    return {"configurable": {k: v for k, v in place.items() if k != "checkpoint_map"}}


async def in_some_namespace(_app: Any) -> Any:
    return {"configurable": {"thread_id": THREAD, "checkpoint_ns": "second:1234"}}


@pytest.mark.parametrize("given", [Command(resume="yes"), None, {"log": ["more"]}])
@pytest.mark.parametrize(
    ("place", "forks"),
    [
        (at_the_head, False),
        (at_an_earlier_one, True),
        (at_the_subgraphs_head, False),
        (at_an_earlier_one_of_the_subgraph, True),
        (in_the_subgraph_without_a_map, False),
        (in_some_namespace, False),
    ],
)
async def test_an_owned_run_goes_on_where_langgraph_does_whatever_is_named(
    control: ControlDatabase, place: Any, given: Any, *, forks: bool
) -> None:
    plain, ours = Branches(), Branches()
    owning = own_runs(ours.app, agent_id=AGENT)
    logs = []
    for app in (plain.app, owning):
        await app.ainvoke({"log": ["in"]}, AT)
        logs.append((await app.ainvoke(given, await place(app)))["log"])
    assert logs[0] == logs[1]
    # To go on at the head is no replay to an owned run, and repeats nothing of the step.
    assert ours.done == (plain.done if forks or given is not None else ["ordered"])
    run = newest(control)
    runs_twice = given is not None and not isinstance(given, Command)
    assert len(run.inputs) == (1 if forks or runs_twice else 2)
    named = config_of(owning, run)["configurable"]
    assert ("checkpoint_id" in named) is forks
    assert not named.get("checkpoint_ns")


async def test_nobody_writes_while_it_is_seen_whether_it_is_the_head(
    control: ControlDatabase,
) -> None:
    saver, refused = Watched(), []
    app = own_runs(workflow(asks, saver), agent_id=AGENT)
    await app.ainvoke({"log": ["in"]}, AT)

    async def rival() -> None:
        with pytest.raises(ThreadBusyError):
            control.admit(new_run(app, run_id="rival"), GHOST)
        refused.append("rival")

    head = (await app.aget_state(AT)).config
    saver.once.append(rival)
    final = await app.ainvoke(Command(resume="three"), head)
    assert refused == ["rival"]
    assert final["log"] == ["in", "first", "three"]


def test_sync_code_keeps_others_off_and_gives_the_thread_back_where_it_fails(
    control: ControlDatabase,
) -> None:
    saver = Watched()
    app = own_runs(workflow(asks, saver), agent_id=AGENT)
    app.invoke({"log": ["in"]}, AT)

    def rival() -> None:
        with pytest.raises(ThreadBusyError):
            control.admit(new_run(app, run_id="rival"), GHOST)
        raise ValueError("nothing to read")

    head = app.get_state(AT).config
    saver.once.append(rival)
    with pytest.raises(ValueError, match="nothing to read"):
        app.invoke(Command(resume="three"), head)
    assert control.lease_of(AGENT, THREAD).is_free  # type: ignore[union-attr]
    assert app.invoke(Command(resume="three"), head)["log"] == ["in", "first", "three"]


def away(*_: Any, **__: Any) -> Any:
    raise StoreError("away for a moment")


async def test_a_thread_is_given_back_if_the_run_is_not_admitted_for_which_it_was_taken(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = own_runs(workflow(asks), agent_id=AGENT)
    await app.ainvoke({"log": ["in"]}, AT)
    head = (await app.aget_state(AT)).config
    with monkeypatch.context() as broken:
        broken.setattr(ControlDatabase, "reopen", away)
        with pytest.raises(StoreError, match="away for a moment"):
            await app.ainvoke(Command(resume="three"), head)
        assert control.lease_of(AGENT, THREAD).is_free  # type: ignore[union-attr]
    final = await app.ainvoke(Command(resume="three"), head)
    assert final["log"] == ["in", "first", "three"]


def test_sync_code_gives_the_thread_back_too(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = own_runs(workflow(asks), agent_id=AGENT)
    app.invoke({"log": ["in"]}, AT)
    head = app.get_state(AT).config
    with monkeypatch.context() as broken:
        broken.setattr(ControlDatabase, "reopen", away)
        with pytest.raises(StoreError, match="away for a moment"):
            app.invoke(Command(resume="three"), head)
        assert control.lease_of(AGENT, THREAD).is_free  # type: ignore[union-attr]
    assert app.invoke(Command(resume="three"), head)["log"] == ["in", "first", "three"]


async def test_what_kept_a_run_from_being_admitted_is_said_if_the_thread_cannot_be_given_back(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = own_runs(workflow(asks), agent_id=AGENT)
    await app.ainvoke({"log": ["in"]}, AT)
    head = (await app.aget_state(AT)).config
    with monkeypatch.context() as broken:
        for name in ("reopen", "release"):
            broken.setattr(ControlDatabase, name, away)
        with pytest.raises(StoreError, match="away for a moment"):
            await app.ainvoke(Command(resume="three"), head)
        assert "is not given back, its lease runs out" in caplog.text
    assert not control.lease_of(AGENT, THREAD).is_free  # type: ignore[union-attr]
    assert len(newest(control).inputs) == 1


def test_a_thread_that_somebody_else_in_here_was_faster_to_take_is_not_given_back(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = own_runs(workflow(asks), agent_id=AGENT)
    app.invoke({"log": ["in"]}, AT)
    head = app.get_state(AT).config
    admit, taken = Ownership.admit, []

    def slower(self: Ownership, run: NewRun, **more: Any) -> Held:
        taken.append((self, self.take(AGENT, THREAD)))
        return admit(self, run, **more)

    with monkeypatch.context() as late:
        late.setattr(Ownership, "admit", slower)
        with pytest.raises(ThreadBusyError, match="at work in this process"):
            app.invoke(Command(resume="three"), head)
    assert not control.lease_of(AGENT, THREAD).is_free  # type: ignore[union-attr]
    ((ownership, held),) = taken
    assert ownership.give(held)
    assert app.invoke(Command(resume="three"), head)["log"] == ["in", "first", "three"]


@pytest.mark.parametrize("place", ["the head", "the thread"])
async def test_a_checkpointer_that_does_not_say_where_the_thread_stands_is_waited_for_no_longer(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_TIMEOUT_SECONDS", "2")
    saver = Watched()
    app = own_runs(workflow(asks, saver), agent_id=AGENT)
    await app.ainvoke({"log": ["in"]}, AT)
    head = (await app.aget_state(AT)).config if place == "the head" else AT
    saver.once.append(asyncio.Event().wait)
    async with asyncio.timeout(20):
        with pytest.raises(StoreBusyError, match="did not say within 2 s where the thread stands"):
            await app.ainvoke(Command(resume="three"), head)
    assert len(newest(control).inputs) == 1, "nothing was begun"
    assert control.lease_of(AGENT, THREAD).is_free  # type: ignore[union-attr]
    final = await app.ainvoke(Command(resume="three"), head)
    assert final["log"] == ["in", "first", "three"]
