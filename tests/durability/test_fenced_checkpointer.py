"""A superseded writer is refused, and what slips in all the same never counts."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from operator import add
from pathlib import Path
from typing import Annotated, Any

import pytest
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, interrupt
from pydantic import BaseModel
from typing_extensions import TypedDict

from langgraph_peerctx.durability.fenced_checkpointer import EPOCH, FencedCheckpointer
from langgraph_peerctx.durability.ownership import Ownership
from langgraph_peerctx.errors import (
    CheckpointerError,
    ConfigurationError,
    StaleOwnerError,
    StoreError,
)
from langgraph_peerctx.persistence.leases import Leases

AGENT, THREAD = "agent", "thread-1"
CONFIG: Any = {"configurable": {"thread_id": THREAD, "checkpoint_ns": ""}}
AT: Any = {"configurable": {"thread_id": THREAD}}


@dataclass
class World:
    """One checkpointer, one control database, and processes that share them."""

    saver: BaseCheckpointSaver[Any]
    leases: Leases

    def process(self, name: str, *, ttl: float = 60) -> "Process":
        ownership = Ownership(
            self.leases, owner_id=f"process-{name}", incarnation=name, ttl_seconds=ttl
        )
        return Process(ownership, FencedCheckpointer(self.saver, ownership))


@dataclass
class Process:
    ownership: Ownership
    saver: Any

    async def claim(self, **more: Any) -> Any:
        return await self.ownership.claim(AGENT, THREAD, **more)

    def renews_for(self, seconds: float) -> None:
        """Let what is renewed from now on live longer than what was claimed."""
        self.ownership.owner = replace(self.ownership.owner, ttl_seconds=seconds)


async def opened(kind: str, stack: AsyncExitStack, place: str) -> BaseCheckpointSaver[Any]:
    if kind == "memory":
        return InMemorySaver()
    if kind == "sqlite":
        return await stack.enter_async_context(AsyncSqliteSaver.from_conn_string(place))
    saver = await stack.enter_async_context(AsyncPostgresSaver.from_conn_string(place))
    await saver.setup()
    return saver


KINDS = ["memory", "sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


@pytest.fixture
def place(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> str:
    if kind == "postgresql":
        address: str = request.getfixturevalue("postgres_url")
        return address
    return str(tmp_path / "checkpoints.db")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def control(kind: str, place: str, tmp_path: Path) -> Iterator[Leases]:
    """Beside the checkpoints: in the same PostgreSQL, or in a file of its own."""
    with Leases(place if kind == "postgresql" else f"sqlite:///{tmp_path}/control.db") as leases:
        yield leases


@pytest.fixture
async def world(kind: str, place: str, control: Leases) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(await opened(kind, stack, place), control)


def checkpoint(value: str, version: Any, *, years_ahead: int = 0) -> Any:
    made = empty_checkpoint()
    # Ids are times: a clock that is ahead makes a later one.
    first = f"{int(made['id'][0], 16) + years_ahead:x}"
    return {
        **made,
        "id": first + made["id"][1:],
        "channel_values": {"value": value},
        "channel_versions": {"value": version},
    }


async def put(saver: Any, value: str, config: Any = CONFIG, **more: Any) -> Any:
    version = saver.get_next_version(None, None)
    made = checkpoint(value, version, **more)
    return await saver.aput(config, made, {"source": "loop", "step": 1}, {"value": version})


async def head(saver: Any) -> str:
    found = await saver.aget_tuple(AT)
    assert found is not None
    value: str = found.checkpoint["channel_values"]["value"]
    return value


@pytest.mark.timeout(180)
async def test_its_conformance_report_is_the_bare_savers(
    kind: str, place: str, control: Leases, request: pytest.FixtureRequest
) -> None:
    reports = []
    for name in ("bare", "fenced"):

        @checkpointer_test(name=f"{name}-{kind}")
        async def made(name: str = name) -> AsyncIterator[Any]:
            async with AsyncExitStack() as stack:
                saver = await opened(kind, stack, place)
                ownership = Ownership(control, owner_id="p", incarnation="i", ttl_seconds=60)
                yield saver if name == "bare" else FencedCheckpointer(saver, ownership)

        reports.append((await validate(made)).results)
    bare, fenced = reports
    assert fenced == bare
    assert all(result.passed for result in bare.values() if result.detected)
    assert len(bare) >= 5
    del request


async def test_a_thread_that_never_had_an_owner_is_anybodys(world: World) -> None:
    process = world.process("a")
    stored = await put(process.saver, "x")
    await process.saver.aput_writes(stored, [("value", 1)], "task")
    assert await head(process.saver) == "x"
    assert await head(world.saver) == "x"


async def test_a_thread_that_is_anothers_is_refused_and_nothing_is_written(world: World) -> None:
    a, b = world.process("a"), world.process("b")
    assert await a.claim()
    stored = await put(a.saver, "mine")
    with pytest.raises(StaleOwnerError, match="run it as owned") as caught:
        await put(b.saver, "theirs")
    assert caught.value.is_stale_write_owner_error
    with pytest.raises(StaleOwnerError):
        await b.saver.aput_writes(stored, [("value", 1)], "task")
    assert await head(b.saver) == "mine"
    assert (await a.saver.aget_tuple(AT)).pending_writes == []


async def test_a_thread_that_was_given_back_has_to_be_claimed_again(world: World) -> None:
    a = world.process("a")
    await a.claim()
    await put(a.saver, "x")
    assert await a.ownership.release(AGENT, THREAD)
    with pytest.raises(StaleOwnerError):
        await put(a.saver, "y")
    assert (await a.claim()).epoch == 2
    await put(a.saver, "y")
    assert await head(a.saver) == "y"


async def test_who_was_replaced_is_refused(world: World) -> None:
    a, b = world.process("a"), world.process("b")
    await a.claim()
    stored = await put(a.saver, "a")
    assert (await b.claim(dead_incarnation="a")).epoch == 2
    with pytest.raises(StaleOwnerError, match="we held epoch 1"):
        await put(a.saver, "zombie")
    with pytest.raises(StaleOwnerError):
        await a.saver.aput_writes(stored, [("value", 1)], "task")
    await put(b.saver, "b", stored)
    assert await head(a.saver) == "b"


async def test_an_owner_that_comes_back_to_an_unchanged_epoch_renews_and_goes_on(
    world: World,
) -> None:
    """Its lease is old by its own clock, expired by the database's, and nobody's yet."""
    a = world.process("a", ttl=0.2)
    await a.claim()
    await put(a.saver, "x")
    await asyncio.sleep(0.3)
    a.renews_for(60)
    await put(a.saver, "y")
    assert await head(a.saver) == "y"
    (lease,) = world.leases.leases_of_thread(THREAD)
    assert (lease.epoch, lease.is_free) == (1, False)


async def test_a_lease_that_cannot_be_renewed_is_not_written_under(world: World) -> None:
    a = world.process("a", ttl=0.2)
    await a.claim()
    await put(a.saver, "x")
    await asyncio.sleep(0.3)
    world.leases.close()
    with pytest.raises(StoreError):
        await put(a.saver, "y")
    found = await world.saver.aget_tuple(AT)
    assert found is not None
    assert found.checkpoint["channel_values"] == {"value": "x"}


async def test_an_owner_that_comes_back_too_late_is_refused(world: World) -> None:
    a, b = world.process("a", ttl=0.2), world.process("b")
    await a.claim()
    await put(a.saver, "x")
    await asyncio.sleep(0.3)
    assert (await b.claim()).epoch == 2
    with pytest.raises(StaleOwnerError, match="we held epoch 1"):
        await put(a.saver, "y")
    assert a.ownership.held == ()


async def test_what_was_lost_is_told_at_the_renewal(world: World) -> None:
    a, b = world.process("a"), world.process("b")
    await a.claim()
    await a.ownership.claim(AGENT, "another")
    await b.claim(dead_incarnation="a")
    assert await a.ownership.renew() == (THREAD,)
    assert [held.thread_id for held in a.ownership.held] == ["another"]
    with pytest.raises(StaleOwnerError, match="any more: we held epoch 1"):
        await put(a.saver, "x")


class Frozen:
    """A fence that a process has passed before it was frozen, at the write itself."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    async def amay_write(self, thread_id: str) -> int:
        del thread_id
        return self._epoch

    async def aepoch_of(self, thread_id: str) -> int:
        del thread_id
        return self._epoch


def thawed(world: World, epoch: int) -> Any:
    return FencedCheckpointer(world.saver, Frozen(epoch))  # type: ignore[arg-type]


@pytest.mark.parametrize("years_ahead", [0, 1])
async def test_what_a_frozen_writer_writes_after_the_takeover_is_never_the_head(
    world: World, years_ahead: int
) -> None:
    a, b = world.process("a"), world.process("b")
    await a.claim()
    shared = await put(a.saver, "shared")
    await b.claim(dead_incarnation="a")
    theirs = await put(b.saver, "successor", shared)
    await put(thawed(world, 1), "zombie", shared, years_ahead=years_ahead)
    assert await head(b.saver) == "successor"
    after = await put(b.saver, "after", theirs)
    assert await head(b.saver) == "after"
    chain = []
    found = await b.saver.aget_tuple(AT)
    while found is not None:
        chain.append(found.checkpoint["channel_values"]["value"])
        found = found.parent_config and await b.saver.aget_tuple(found.parent_config)
    assert chain == ["after", "successor", "shared"]
    listed = [t.checkpoint["channel_values"]["value"] async for t in b.saver.alist(AT)]
    assert sorted(listed) == ["after", "shared", "successor", "zombie"], "it shows in history"
    del after


async def test_what_slips_in_before_the_successors_first_write_was_before_the_takeover(
    world: World,
) -> None:
    a, b = world.process("a"), world.process("b")
    await a.claim()
    shared = await put(a.saver, "shared")
    await b.claim(dead_incarnation="a")
    await put(thawed(world, 1), "late", shared)
    assert await head(b.saver) == "late"


async def test_of_a_tasks_writes_the_highest_epochs_count_and_count_whole(world: World) -> None:
    a, b = world.process("a"), world.process("b")
    await a.claim()
    shared = await put(a.saver, "shared")
    await a.saver.aput_writes(shared, [("value", "a1"), ("value", "a2")], "task-1")
    await a.saver.aput_writes(shared, [("value", "only a")], "task-2")
    await b.claim(dead_incarnation="a")
    await b.saver.aput_writes(shared, [("value", "b1")], "task-1")
    await thawed(world, 1).aput_writes(shared, [("value", "zombie")], "task-1")
    found = await b.saver.aget_tuple(AT)
    assert found.pending_writes == [("task-1", "value", "b1"), ("task-2", "value", "only a")]


async def test_epochs_are_nobodys_business(world: World) -> None:
    a = world.process("a")
    await a.claim()
    stored = await put(a.saver, "x")
    await a.saver.aput_writes(stored, [("value", 1)], "task")
    found = await a.saver.aget_tuple(AT)
    assert EPOCH not in found.metadata
    assert found.pending_writes == [("task", "value", 1)]
    assert [EPOCH in t.metadata async for t in a.saver.alist(AT)] == [False]
    bare = await world.saver.aget_tuple(AT)
    assert bare is not None
    assert bare.metadata[EPOCH] == 1  # type: ignore[typeddict-item]


async def test_namespaces_have_heads_of_their_own(world: World) -> None:
    a, b = world.process("a"), world.process("b")
    inner: Any = {"configurable": {"thread_id": THREAD, "checkpoint_ns": "inner"}}
    await a.claim()
    await put(a.saver, "root")
    await put(a.saver, "inner", inner)
    await b.claim(dead_incarnation="a")
    await put(b.saver, "inner, again", inner)
    assert await head(b.saver) == "root"
    found = await b.saver.aget_tuple(inner)
    assert found.checkpoint["channel_values"] == {"value": "inner, again"}


async def test_an_older_checkpoint_can_be_asked_for_by_name(world: World) -> None:
    a = world.process("a")
    await a.claim()
    first = await put(a.saver, "first")
    await put(a.saver, "second", first)
    found = await a.saver.aget_tuple(first)
    assert found.checkpoint["channel_values"] == {"value": "first"}


def test_what_is_no_checkpointer_is_refused(tmp_path: Path) -> None:
    with Leases(f"sqlite:///{tmp_path}/c.db") as leases:
        ownership = Ownership(leases, owner_id="p", incarnation="i", ttl_seconds=1)
        with pytest.raises(ConfigurationError, match="a str is no checkpointer"):
            FencedCheckpointer("x", ownership)  # type: ignore[arg-type]
        fenced = FencedCheckpointer(InMemorySaver(), ownership)
        with pytest.raises(ConfigurationError, match="a fence already"):
            FencedCheckpointer(fenced, ownership)


def test_in_sync_code_it_does_the_same(tmp_path: Path) -> None:
    with Leases(f"sqlite:///{tmp_path}/c.db") as leases:
        saver = InMemorySaver()
        world = World(saver, leases)
        a, b = world.process("a"), world.process("b")
        asyncio.run(a.claim())
        stored = a.saver.put(CONFIG, checkpoint("a", "1.0"), {"step": 1}, {"value": "1.0"})
        a.saver.put_writes(stored, [("value", "a")], "task")
        asyncio.run(b.claim(dead_incarnation="a"))
        with pytest.raises(StaleOwnerError):
            a.saver.put(CONFIG, checkpoint("zombie", "1.1"), {"step": 1}, {"value": "1.1"})
        with pytest.raises(StaleOwnerError):
            a.saver.put_writes(stored, [("value", "zombie")], "task")
        b.saver.put_writes(stored, [("value", "b")], "task")
        found = b.saver.get_tuple(AT)
        assert found.pending_writes == [("task", "value", "b")]
        b.saver.put(stored, checkpoint("b", "1.2"), {"step": 2}, {"value": "1.2"})
        zombies: Any = {"step": 2, EPOCH: 1}
        saver.put(stored, checkpoint("zombie", "1.3", years_ahead=1), zombies, {"value": "1.3"})
        assert b.saver.get_tuple(AT).checkpoint["channel_values"] == {"value": "b"}
        assert len(list(b.saver.list(AT))) == 3


class Person(BaseModel):
    name: str


class State(TypedDict, total=False):
    person: Person
    log: Annotated[list[str], add]


def workflow(saver: Any, gates: dict[str, Any] | None = None) -> Any:
    """Two nodes; a gate holds its node until it is opened."""
    gates = gates or {}

    async def first(_state: State) -> State:
        if "first" in gates:
            await gates["first"].wait()
        return {"person": Person(name="Ada"), "log": ["first"]}

    async def second(state: State) -> State:
        return {"log": [f"second: {state['person'].name}"]}

    builder = StateGraph(State)
    builder.add_node("first", first)
    builder.add_node("second", second)
    builder.add_edge(START, "first")
    builder.add_edge("first", "second")
    builder.add_edge("second", END)
    return builder.compile(checkpointer=saver)


async def test_state_models_survive_strict_serialisation(world: World) -> None:
    """LangGraph clones the checkpointer when it compiles, to allow the state's own types."""
    a = world.process("a")
    await a.claim()
    app = workflow(a.saver)
    await app.ainvoke({"log": []}, AT, durability="sync")
    state = await app.aget_state(AT)
    assert state.values["person"] == Person(name="Ada")
    assert state.values["log"] == ["first", "second: Ada"]


async def test_a_frozen_process_that_comes_back_writes_nothing(world: World) -> None:
    """It is in the middle of a node when it is replaced; its successor ends the workflow."""
    a, b = world.process("a"), world.process("b")
    gate = asyncio.Event()
    await a.claim()
    zombie = asyncio.create_task(
        workflow(a.saver, {"first": gate}).ainvoke({"log": ["in"]}, AT, durability="sync")
    )
    while await world.saver.aget_tuple(AT) is None:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    await b.claim(dead_incarnation="a")
    app = workflow(b.saver)
    final = await app.ainvoke(None, AT, durability="sync")
    gate.set()
    with pytest.raises(StaleOwnerError):
        await zombie
    assert final["log"] == ["in", "first", "second: Ada"]
    state = await app.aget_state(AT)
    assert (state.values["log"], state.next) == (final["log"], ())


async def test_a_question_and_its_answer_go_through_the_fence(world: World) -> None:
    async def ask(_state: State) -> State:
        return {"log": [interrupt("well?")]}

    def app(process: Process) -> Any:
        builder = StateGraph(State)
        builder.add_node("ask", ask)
        builder.add_edge(START, "ask")
        return builder.compile(checkpointer=process.saver)

    a, b = world.process("a"), world.process("b")
    await a.claim()
    await app(a).ainvoke({"log": []}, AT, durability="sync")
    await b.claim(dead_incarnation="a")
    state = await app(b).aget_state(AT)
    assert [question.value for question in state.interrupts] == ["well?"]
    final = await app(b).ainvoke(Command(resume="yes"), AT, durability="sync")
    assert final["log"] == ["yes"]
    with pytest.raises(StaleOwnerError):
        await app(a).ainvoke({"log": ["more"]}, AT, durability="sync")


async def test_time_travel_forks_under_the_owners_epoch(world: World) -> None:
    a, b = world.process("a"), world.process("b")
    await a.claim()
    await workflow(a.saver).ainvoke({"log": ["in"]}, AT, durability="sync")
    await b.claim(dead_incarnation="a")
    app = workflow(b.saver)
    (before_second,) = [s async for s in app.aget_state_history(AT) if s.next == ("second",)]
    await app.aupdate_state(before_second.config, {"log": ["forked"]})
    final = await app.ainvoke(None, AT, durability="sync")
    assert final["log"] == ["in", "first", "forked", "second: Ada"]


def appended(value: list[str], writes: Any) -> list[str]:
    return [*value, *(item for write in writes for item in write)]


class Delta(TypedDict, total=False):
    log: Annotated[list[str], DeltaChannel(appended)]


async def test_what_a_channel_is_rebuilt_from_has_nothing_of_a_superseded_writer(
    world: World,
) -> None:
    """Delta channels keep no values: they replay the pending writes of the head's chain."""
    builder = StateGraph(Delta)
    for number, name in enumerate(("first", "second", "third")):
        builder.add_node(name, lambda _state, name=name: {"log": [name]})
        builder.add_edge(START if number == 0 else ("first", "second")[number - 1], name)
    a, b = world.process("a"), world.process("b")
    await a.claim()
    await b.claim(dead_incarnation="a")
    app = builder.compile(checkpointer=b.saver)
    await app.ainvoke({"log": ["in"]}, AT, durability="sync")
    zombies = 0
    for state in [s async for s in app.aget_state_history(AT)]:
        found = await b.saver.aget_tuple(state.config)
        for task_id in {task_id for task_id, channel, _ in found.pending_writes}:
            await thawed(world, 1).aput_writes(found.config, [("log", ["zombie"])], task_id)
            zombies += 1
    assert zombies >= 3
    final = await app.aget_state(AT)
    assert final.values["log"] == ["in", "first", "second", "third"]


class Broken(InMemorySaver):
    """Fails as a database's driver does."""

    fault: Exception = OSError("the disk is gone")

    def put(self, *_: Any, **__: Any) -> Any:
        raise self.fault

    def put_writes(self, *_: Any, **__: Any) -> Any:
        raise self.fault

    def get_tuple(self, *_: Any, **__: Any) -> Any:
        raise self.fault

    async def aput(self, *_: Any, **__: Any) -> Any:
        raise self.fault

    async def aput_writes(self, *_: Any, **__: Any) -> Any:
        raise self.fault

    async def aget_tuple(self, *_: Any, **__: Any) -> Any:
        raise self.fault


async def test_a_savers_failure_is_said_to_be_one_whatever_its_driver_raises(
    tmp_path: Path,
) -> None:
    with Leases(f"sqlite:///{tmp_path}/c.db") as leases:
        ownership = Ownership(leases, owner_id="p", incarnation="i", ttl_seconds=60)
        saver = FencedCheckpointer(Broken(), ownership)
        made, place = checkpoint("x", "1"), {"configurable": {**CONFIG["configurable"]}}
        for call in (
            lambda: saver.put(CONFIG, made, {}, {}),
            lambda: saver.put_writes(place, [("value", 1)], "task"),
            lambda: saver.get_tuple(AT),
        ):
            with pytest.raises(CheckpointerError, match=r"Broken.*the disk is gone"):
                call()
        for waiting in (
            saver.aput(CONFIG, made, {}, {}),
            saver.aput_writes(place, [("value", 1)], "task"),
            saver.aget_tuple(AT),
        ):
            with pytest.raises(CheckpointerError, match=r"Broken.*the disk is gone"):
                await waiting
        saver.bare.fault = ValueError("what is no database's fault goes through")  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="goes through"):
            saver.get_tuple(AT)
    with pytest.raises(CheckpointerError, match="closed"):
        saver.put(CONFIG, made, {}, {})
