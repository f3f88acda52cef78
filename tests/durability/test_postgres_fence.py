"""Where one PostgreSQL has checkpoints and leases, each write stands in one transaction with its
lease."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from operator import add
from pathlib import Path
from typing import Annotated, Any

import psycopg
import pytest
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.graph import START, StateGraph
from psycopg import AsyncConnection
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool
from pydantic import BaseModel
from services.postgres import PostgresServer
from typing_extensions import TypedDict

from langgraph_peerctx.durability import postgres_fence
from langgraph_peerctx.durability.fenced_checkpointer import FencedCheckpointer
from langgraph_peerctx.durability.ownership import Ownership
from langgraph_peerctx.errors import StaleOwnerError, StoreError
from langgraph_peerctx.persistence.leases import Leases

pytestmark = pytest.mark.postgres

AGENT, THREAD = "agent", "thread-1"
SESSIONS = "FROM pg_stat_activity WHERE application_name = 'peerctx-fence'"
SESSIONS += " AND datname = current_database()"
Hook = Callable[[AsyncConnection[Any]], Awaitable[None]]


@dataclass
class Hooks:
    """What happens inside a write's transaction."""

    before: Hook | None = None
    after: Hook | None = None


class HookedSaver(AsyncPostgresSaver):
    """A saver that can be held between the lock and the write, and the write and the commit."""

    hooks: Hooks

    async def aput(self, *arguments: Any, **options: Any) -> Any:
        connection: Any = self.conn
        if self.hooks.before:
            await self.hooks.before(connection)
        result = await super().aput(*arguments, **options)
        if self.hooks.after:
            await self.hooks.after(connection)
        return result


@dataclass
class Gate:
    """Holds a write, as if its process were frozen there: nothing is sent any more."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, connection: AsyncConnection[Any]) -> None:
        del connection
        self.reached.set()
        await self.opened.wait()


@dataclass
class HalfSent(Gate):
    """The same, with a statement sent and no end to it: the server does not call it idle."""

    async def __call__(self, connection: AsyncConnection[Any]) -> None:
        connection.pgconn.enter_pipeline_mode()
        connection.pgconn.send_query_params(b"SELECT 1", None)
        connection.pgconn.send_flush_request()
        connection.pgconn.flush()
        await super().__call__(connection)


@dataclass
class Process:
    ownership: Ownership
    saver: Any
    hooks: Hooks

    async def claim(self, thread_id: str = THREAD, **more: Any) -> Any:
        return await self.ownership.claim(AGENT, thread_id, **more)


@dataclass
class World:
    url: str
    leases: Leases
    stack: AsyncExitStack

    async def process(self, name: str, *, ttl: float = 60) -> Process:
        saver = await opened(HookedSaver, self.url, self.stack)
        saver.hooks = Hooks()
        owner = Ownership(self.leases, owner_id=f"p-{name}", incarnation=name, ttl_seconds=ttl)
        fenced = FencedCheckpointer(saver, owner)
        assert await is_shared(fenced)
        return Process(owner, fenced, saver.hooks)

    def ask(self, statement: str) -> list[Any]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def written(self) -> set[str]:
        rows = self.ask("SELECT checkpoint->'channel_values'->>'value' FROM checkpoints")
        return {value for (value,) in rows}


async def opened(kind: type[Any], url: str, stack: AsyncExitStack, **options: Any) -> Any:
    return await stack.enter_async_context(kind.from_conn_string(url, **options))


async def is_shared(fenced: FencedCheckpointer) -> bool:
    transactions = fenced._transactions
    saver: Any = fenced._saver
    return transactions is not None and await transactions.ownership(saver) is not None


@pytest.fixture
def control(postgres_url: str) -> Iterator[Leases]:
    with Leases(postgres_url, timeout_seconds=20) as leases:
        yield leases


@pytest.fixture
def patient_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a writer say nothing for a minute before the server ends its session."""
    monkeypatch.setattr(postgres_fence, "IDLE_SECONDS", 60.0)
    monkeypatch.setattr(postgres_fence, "BUSY_SECONDS", 60.0)


@pytest.fixture
async def world(postgres_url: str, control: Leases) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        await (await opened(AsyncPostgresSaver, postgres_url, stack)).setup()
        yield World(postgres_url, control, stack)


def place(thread_id: str = THREAD, checkpoint_id: str | None = None) -> Any:
    named = {} if checkpoint_id is None else {"checkpoint_id": checkpoint_id}
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": "", **named}}


def checkpoint(value: str) -> Any:
    return {
        **empty_checkpoint(),
        "channel_values": {"value": value, "blob": [value]},
        "channel_versions": {"value": "1", "blob": "1"},
    }


async def put(saver: Any, value: str, thread_id: str = THREAD) -> Any:
    metadata: Any = {"source": "loop", "step": 1}
    return await saver.aput(place(thread_id), checkpoint(value), metadata, {"blob": "1"})


async def seconds(work: Awaitable[Any]) -> float:
    started = time.monotonic()
    await work
    return time.monotonic() - started


@pytest.mark.timeout(180)
async def test_its_conformance_report_is_the_bare_savers(postgres_url: str, world: World) -> None:
    reports = []
    for name in ("bare", "fenced"):

        @checkpointer_test(name=name)
        async def made(name: str = name) -> AsyncIterator[Any]:
            async with AsyncExitStack() as stack:
                saver = await opened(AsyncPostgresSaver, postgres_url, stack)
                owner = Ownership(world.leases, owner_id="p", incarnation="i", ttl_seconds=60)
                fenced = FencedCheckpointer(saver, owner)
                assert await is_shared(fenced)
                yield saver if name == "bare" else fenced

        reports.append((await validate(made)).results)
    bare, fenced = reports
    assert fenced == bare
    assert all(result.passed for result in bare.values() if result.detected)
    assert len(bare) >= 5


@pytest.mark.parametrize("where", ["before", "after"])
async def test_a_writer_frozen_in_its_transaction_holds_no_takeover_up_and_writes_nothing(
    world: World, where: str
) -> None:
    a, b, gate = await world.process("a"), await world.process("b"), Gate()
    await a.claim()
    await put(a.saver, "shared")
    setattr(a.hooks, where, gate)
    began = time.monotonic()
    zombie = asyncio.create_task(put(a.saver, "zombie"))
    await gate.reached.wait()
    await b.claim(dead_incarnation="a")
    took = time.monotonic() - began
    assert 1.4 < took < 12, "it waited for the server to end the frozen session"
    await put(b.saver, "successor")
    gate.opened.set()
    with pytest.raises(StaleOwnerError, match="we held epoch 1"):
        await zombie
    assert world.written() == {"shared", "successor"}


async def test_nor_does_one_frozen_half_way_through_sending(world: World) -> None:
    a, b, gate = await world.process("a"), await world.process("b"), HalfSent()
    await a.claim()
    a.hooks.before = gate
    began = time.monotonic()
    zombie = asyncio.create_task(put(a.saver, "zombie"))
    await gate.reached.wait()
    await b.claim(dead_incarnation="a")
    assert 2 < time.monotonic() - began < 15
    assert await put(b.saver, "successor")
    gate.opened.set()
    with pytest.raises((StaleOwnerError, StoreError)):
        await zombie
    assert world.written() == {"successor"}


async def test_who_lost_its_lease_is_refused_and_nothing_is_written(world: World) -> None:
    a, b = await world.process("a"), await world.process("b")
    await a.claim()
    stored = await put(a.saver, "a")
    with pytest.raises(StaleOwnerError, match="run it as owned"):
        await put(b.saver, "too early")
    await b.claim(dead_incarnation="a")
    with pytest.raises(StaleOwnerError, match="we held epoch 1"):
        await put(a.saver, "zombie")
    with pytest.raises(StaleOwnerError):
        await a.saver.aput_writes(stored, [("value", 1)], "task")
    await b.saver.aput_writes(stored, [("value", 2)], "task")
    assert world.written() == {"a"}
    assert world.ask("SELECT count(*) FROM checkpoint_writes") == [(1,)]


@pytest.mark.parametrize("threads", [1, 8])
async def test_eight_puts_at_once_are_all_written(world: World, threads: int) -> None:
    a = await world.process("a")
    for number in range(threads):
        await a.claim(f"thread-{number}")
    puts = [put(a.saver, str(n), f"thread-{n % threads}") for n in range(8)]
    assert len(await asyncio.gather(*puts)) == 8
    assert world.written() == {str(number) for number in range(8)}


@pytest.mark.usefixtures("patient_server")
async def test_a_takeover_waits_for_an_honest_write_and_gets_through_after_it(
    world: World,
) -> None:
    a, b, gate = await world.process("a"), await world.process("b"), Gate()
    await a.claim()
    a.hooks.after = gate
    writing = asyncio.create_task(put(a.saver, "in time"))
    await gate.reached.wait()
    taking = asyncio.create_task(b.claim(dead_incarnation="a"))
    await asyncio.sleep(0.3)
    assert not taking.done()
    gate.opened.set()
    await writing
    assert (await taking).epoch == 2
    assert world.written() == {"in time"}
    with pytest.raises(StaleOwnerError):
        await put(a.saver, "late")


async def test_renewals_come_through_while_one_thread_is_written_all_the_time(
    world: World,
) -> None:
    """Sharers of a row lock may join for ever, past who waits to change it."""
    a = await world.process("a")
    await a.claim()
    ended, puts = asyncio.Event(), 0

    async def writing(name: str) -> None:
        nonlocal puts
        while not ended.is_set():
            await put(a.saver, name)
            puts += 1

    writers = [asyncio.create_task(writing(str(number))) for number in range(8)]
    took: list[float] = []
    async with asyncio.timeout(60):
        while len(took) < 20 or puts <= 40:
            took.append(await seconds(a.ownership.renew()))
    ended.set()
    await asyncio.gather(*writers)
    assert max(took) < 10, "it would wait for as long as they write"
    assert [held.thread_id for held in a.ownership.held] == [THREAD]


async def test_connections_that_the_server_ended_are_replaced(world: World) -> None:
    a = await world.process("a")
    for thread_id in ("x", "y"):
        await a.claim(thread_id)
    await asyncio.gather(put(a.saver, "1", "x"), put(a.saver, "2", "y"))
    assert len(world.ask(f"SELECT pg_terminate_backend(pid) {SESSIONS}")) >= 2
    await put(a.saver, "3", "x")
    assert world.written() == {"1", "2", "3"}
    await sessions(world, 1)


async def ended_by_the_server(connection: AsyncConnection[Any]) -> None:
    await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")


async def test_a_write_whose_connection_was_lost_is_repeated_once(world: World) -> None:
    a = await world.process("a")
    await a.claim()
    tries = []

    async def ended_at_first(connection: AsyncConnection[Any]) -> None:
        tries.append(connection)
        if len(tries) == 1:
            await ended_by_the_server(connection)

    a.hooks.before = ended_at_first
    await put(a.saver, "x")
    assert len(tries) == 2
    a.hooks.before = ended_by_the_server
    with pytest.raises(StoreError):
        await put(a.saver, "y")
    a.hooks.before = None
    await put(a.saver, "z")
    assert world.written() == {"x", "z"}


async def test_what_may_have_been_committed_is_not_repeated(world: World) -> None:
    a = await world.process("a")
    await a.claim()
    pids: list[int] = []

    async def ended_meanwhile(connection: AsyncConnection[Any]) -> None:
        pids.append(connection.info.backend_pid)
        await asyncio.to_thread(world.ask, f"SELECT pg_terminate_backend({pids[-1]}, 1000)")

    a.hooks.after = ended_meanwhile
    with pytest.raises(StoreError):
        await put(a.saver, "x")
    assert len(pids) == 1


@pytest.mark.usefixtures("patient_server")
async def test_a_cancelled_write_lets_go_of_the_lease_at_once(world: World) -> None:
    a, b, gate = await world.process("a"), await world.process("b"), Gate()
    await a.claim()
    a.hooks.after = gate
    writing = asyncio.create_task(put(a.saver, "x"))
    await gate.reached.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert await seconds(b.claim(dead_incarnation="a")) < 10
    assert world.written() == set()


async def test_what_the_saver_raises_goes_through_and_the_next_write_works(world: World) -> None:
    a = await world.process("a")
    await a.claim()
    with pytest.raises(TypeError):
        await a.saver.aput(place(), checkpoint("x"), {"step": object()}, {})
    await put(a.saver, "y")
    assert world.written() == {"y"}


async def test_a_lease_that_became_old_is_renewed_before_its_row_is_locked(world: World) -> None:
    a = await world.process("a", ttl=0.9)
    await a.claim()
    await asyncio.sleep(0.65)
    a.ownership.owner = replace(a.ownership.owner, ttl_seconds=60)
    await put(a.saver, "x")
    lease = await world.leases.alease_of(AGENT, THREAD)
    assert lease is not None
    assert lease.seconds_left > 0.5


async def test_its_connections_are_closed_when_asked_and_opened_anew(world: World) -> None:
    a = await world.process("a")
    await put(a.saver, "x")
    await a.saver.aclose()
    await a.saver.aclose()
    await sessions(world, 0)
    await put(a.saver, "y")
    assert world.written() == {"x", "y"}


async def test_its_connections_go_with_it(world: World) -> None:
    a = await world.process("a")
    clone = a.saver.with_allowlist([("somebody", "Else")])
    assert clone is not a.saver
    await put(clone, "x")
    assert len(world.ask(f"SELECT pid {SESSIONS}")) == 1, "a clone shares them"
    del a, clone
    gc.collect()
    await sessions(world, 0)


async def sessions(world: World, count: int) -> None:
    """Wait until there are so many: one that was ended shows for a moment longer."""
    async with asyncio.timeout(20):
        while len(world.ask(f"SELECT pid {SESSIONS}")) != count:
            await asyncio.sleep(0.01)


async def test_in_a_thread_it_does_the_same(world: World) -> None:
    a, b = await world.process("a"), await world.process("b")
    await a.claim()
    held: list[int] = []

    async def locks(connection: AsyncConnection[Any]) -> None:
        held.append(connection.info.transaction_status)

    a.hooks.after = locks
    made: Any = (place(), checkpoint("a"), {"step": 1}, {"blob": "1"})
    stored = await asyncio.to_thread(a.saver.put, *made)
    await asyncio.to_thread(a.saver.put_writes, stored, [("value", 1)], "task")
    assert held == [psycopg.pq.TransactionStatus.INTRANS]
    with pytest.raises(StaleOwnerError):
        await asyncio.to_thread(b.saver.put, *made)
    assert world.written() == {"a"}


async def test_a_pool_and_a_pipeline_share_it_too(world: World) -> None:
    kwargs: Any = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    pool: Any = AsyncConnectionPool(
        world.url, min_size=1, max_size=1, open=False, timeout=5, kwargs=kwargs
    )
    await world.stack.enter_async_context(pool)
    owner = Ownership(world.leases, owner_id="p", incarnation="i", ttl_seconds=60)
    await owner.claim(AGENT, THREAD)
    pipelined = await opened(AsyncPostgresSaver, world.url, world.stack, pipeline=True)
    for name, saver in (("pool", AsyncPostgresSaver(pool)), ("pipeline", pipelined)):
        fenced = FencedCheckpointer(saver, owner)
        assert await is_shared(fenced)
        await put(fenced, name)
    assert world.written() == {"pool", "pipeline"}


async def elsewhere(kind: str, world: World, server: PostgresServer, folder: Path) -> str:
    """Return a place for leases that a saver's transaction cannot reach."""
    if kind == "a file":
        return f"sqlite:///{folder}/control.db"
    if kind == "another database":
        return world.stack.enter_context(server.database())
    world.ask("CREATE SCHEMA control")
    return f"{world.url}?options=-csearch_path%3Dcontrol"


@pytest.mark.parametrize("kind", ["a file", "another database", "another schema"])
async def test_leases_that_are_elsewhere_are_asked_before_the_write(
    kind: str, world: World, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    """The saver sees a table of leases, and it is another one."""
    saver = await opened(AsyncPostgresSaver, world.url, world.stack)
    leases = Leases(await elsewhere(kind, world, postgres_server, tmp_path))
    world.stack.callback(leases.close)
    await refuses_and_shares_nothing(saver, leases)
    assert world.written() == {"a"}


async def test_who_may_not_lock_the_leases_asks_before_the_write(
    world: World, postgres_server: PostgresServer
) -> None:
    world.ask("""
        CREATE ROLE poor LOGIN PASSWORD 'poor';
        GRANT SELECT, INSERT, UPDATE ON checkpoints, checkpoint_blobs, checkpoint_writes TO poor;
        GRANT SELECT ON peerctx_leases TO poor
    """)
    try:
        database = world.url.rpartition("/")[2]
        poor = postgres_server.url(database, "poor", password="poor")  # noqa: S106 - its own
        saver = await opened(AsyncPostgresSaver, poor, world.stack)
        await refuses_and_shares_nothing(saver, world.leases)
    finally:
        world.ask("DROP OWNED BY poor; DROP ROLE poor")


async def test_a_saver_whose_transactions_are_its_users_is_left_alone(world: World) -> None:
    connection: Any = await AsyncConnection.connect(world.url, row_factory=dict_row)
    async with connection:
        await refuses_and_shares_nothing(AsyncPostgresSaver(connection), world.leases)
        await connection.commit()
    assert world.written() == {"a"}


async def refuses_and_shares_nothing(saver: Any, leases: Leases) -> None:
    a, b = (
        Ownership(leases, owner_id="p", incarnation=name, ttl_seconds=60) for name in ("a", "b")
    )
    await a.claim(AGENT, THREAD)
    fenced, other = FencedCheckpointer(saver, a), FencedCheckpointer(saver, b)
    assert not await is_shared(fenced)
    await put(fenced, "a")
    with pytest.raises(StaleOwnerError):
        await put(other, "b")


async def test_a_synchronous_saver_is_asked_before_the_write(world: World) -> None:
    owner = Ownership(world.leases, owner_id="p", incarnation="i", ttl_seconds=60)
    await owner.claim(AGENT, THREAD)
    with PostgresSaver.from_conn_string(world.url) as saver:
        fenced = FencedCheckpointer(saver, owner)
        fenced.put(place(), checkpoint("x"), {"step": 1}, {"blob": "1"})
        await owner.release(AGENT, THREAD)
        with pytest.raises(StaleOwnerError):
            fenced.put(place(), checkpoint("y"), {"step": 1}, {"blob": "1"})
    assert world.written() == {"x"}


class Person(BaseModel):
    name: str


def appended(value: list[str], writes: Any) -> list[str]:
    return [*value, *(item for write in writes for item in write)]


class State(TypedDict, total=False):
    person: Person
    log: Annotated[list[str], add]
    delta: Annotated[list[str], DeltaChannel(appended)]


async def test_state_models_and_delta_channels_survive(world: World) -> None:
    """LangGraph clones the checkpointer when it compiles, to allow the state's own types."""
    a = await world.process("a")
    await a.claim()
    builder = StateGraph(State)
    builder.add_node("first", lambda _: {"person": Person(name="Ada"), "delta": ["first"]})
    builder.add_node("second", lambda state: {"log": [state["person"].name], "delta": ["second"]})
    builder.add_edge(START, "first")
    builder.add_edge("first", "second")
    app = builder.compile(checkpointer=a.saver)
    config: Any = {"configurable": {"thread_id": THREAD}}
    await app.ainvoke({"delta": ["in"]}, config, durability="sync")
    state = await app.aget_state(config)
    assert state.values == {
        "person": Person(name="Ada"),
        "log": ["Ada"],
        "delta": ["in", "first", "second"],
    }
