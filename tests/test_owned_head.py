"""Who names the checkpoint at which a thread stands goes on with its run: that is no fork."""

import asyncio
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command, interrupt
from owning import AGENT, AT, GHOST, THREAD, State, asks, new_run, newest, workflow

from langgraph_peerctx import effect
from langgraph_peerctx.durability.admission import config_of
from langgraph_peerctx.errors import StoreBusyError, ThreadBusyError
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.incidents import ControlDatabase

pytestmark = pytest.mark.usefixtures("_no_runtime_left")


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


@pytest.mark.parametrize("place", ["the head", "the thread"])
async def test_a_checkpointer_that_does_not_say_where_the_thread_stands_is_waited_for_no_longer(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_TIMEOUT_SECONDS", "1")
    saver = Watched()
    app = own_runs(workflow(asks, saver), agent_id=AGENT)
    await app.ainvoke({"log": ["in"]}, AT)
    head = (await app.aget_state(AT)).config if place == "the head" else AT
    saver.once.append(asyncio.Event().wait)
    async with asyncio.timeout(10):
        with pytest.raises(StoreBusyError, match="did not say within 1 s where the thread stands"):
            await app.ainvoke(Command(resume="three"), head)
    assert len(newest(control).inputs) == 1, "nothing was begun"
    assert control.lease_of(AGENT, THREAD).is_free  # type: ignore[union-attr]
    final = await app.ainvoke(Command(resume="three"), head)
    assert final["log"] == ["in", "first", "three"]
