"""A peer does each effect once, in one transaction with its receipt, whatever happens to it."""

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from services.postgres import PostgresServer
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError

from langgraph_peerctx.durability.receiver import Receipt, Receiver
from langgraph_peerctx.errors import (
    ConfigurationError,
    InDoubtError,
    ProtocolError,
    StaleOwnerError,
    StoreBusyError,
    StoreError,
)
from langgraph_peerctx.persistence import postgresql
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.persistence.postgresql import IDLE_MILLISECONDS
from langgraph_peerctx.persistence.receipts import SettledKey
from langgraph_peerctx.protocol.messages import Interaction
from langgraph_peerctx.protocol.tickets import EffectTicket

STOCK = "CREATE TABLE stock (item TEXT PRIMARY KEY)"
PUT = text("INSERT INTO stock VALUES (:item)")


@pytest.fixture(autouse=True)
def _a_transaction_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, the server does not end a test's: who tests that says so."""
    monkeypatch.setattr(postgresql, "IDLE_MILLISECONDS", 60_000)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/events.db"
    address: str = request.getfixturevalue("postgres_url")
    return address


def opened(url: str, seconds: float = 5.0) -> EventStore:
    store = EventStore(url, timeout_seconds=seconds)
    with store._engine.connect() as connection:
        connection.exec_driver_sql(STOCK.replace("TABLE", "TABLE IF NOT EXISTS"))
    return store


@pytest.fixture
def store(url: str) -> Iterator[EventStore]:
    with opened(url) as store:
        yield store
        settled(store)


@pytest.fixture
def receiver(store: EventStore) -> Receiver:
    return Receiver("inventory", store=store)


def settled(store: EventStore) -> None:
    """See that no transaction is open, and none is about to be; a thread may be ending one."""
    until = time.monotonic() + 20
    while store._engine.pool.checkedout() or store._permits._value != store._at_once:  # type: ignore[attr-defined]
        assert time.monotonic() < until, "a connection is leaked"
        time.sleep(0.01)


def ticket(key: str = "k", epoch: int = 1, **changes: Any) -> EffectTicket:
    fields = {"name": "reserve", "sender_id": "product", "thread_id": "t", "run_id": "r"}
    return EffectTicket(effect_key=key, epoch=epoch, **(fields | changes))


def put(receipt: Receipt | Connection, item: str) -> None:
    connection = receipt.connection if isinstance(receipt, Receipt) else receipt
    connection.execute(PUT, {"item": item})


def stock(store: EventStore) -> list[str]:
    with store._engine.connect() as connection:
        return list(connection.execute(text("SELECT item FROM stock ORDER BY item")).scalars())


def receipts(store: EventStore) -> list[str]:
    with store._engine.connect() as connection:
        return list(connection.execute(text("SELECT status FROM peerctx_receipts")).scalars())


def verdict(store: EventStore, key: str = "k", epoch: int = 2) -> SettledKey:
    asked = {"intent_at": datetime.now(UTC), "epoch": epoch}
    return store.settle_key("inventory", "product", "t", key, **asked)  # type: ignore[arg-type]


# In one transaction.


def test_an_effect_that_comes_again_is_answered_and_not_done_again(
    receiver: Receiver, store: EventStore
) -> None:
    def reserve() -> Any:
        with receiver.receive(ticket()) as receipt:
            assert receipt.ticket == ticket()
            assert not receipt.is_open
            if receipt.is_first:
                put(receipt, "ham")
                receipt.reply = {"reserved": ("ham",)}
        return receipt.reply

    assert [reserve(), reserve()] == [{"reserved": ["ham"]}] * 2
    assert stock(store) == ["ham"]
    assert verdict(store) == SettledKey("seen", {"reserved": ["ham"]})


async def test_it_works_the_same_without_blocking_the_loop(
    receiver: Receiver, store: EventStore
) -> None:
    async def reserve(key: str) -> Any:
        async with receiver.areceive(ticket(key)) as receipt:
            if receipt.is_first:
                assert await receipt.work(lambda c: (put(c, key), len(key))[1]) == len(key)
                receipt.reply = key
        return receipt.reply

    assert await asyncio.gather(*map(reserve, ["a", "bb", "a", "a", "bb"])) == [
        "a", "bb", "a", "a", "bb",
    ]  # fmt: skip
    assert stock(store) == ["a", "bb"]


def test_a_body_that_returns_or_breaks_off_commits(receiver: Receiver, store: EventStore) -> None:
    for key in "ab":
        with receiver.receive(ticket(key)) as receipt:
            put(receipt, key)
            continue
    assert receipts(store) == ["done", "done"]


def test_a_body_that_raises_has_received_nothing(receiver: Receiver, store: EventStore) -> None:
    def receive() -> None:
        with receiver.receive(ticket()) as receipt:
            put(receipt, "ham")
            receipt.reply = "done"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        receive()
    assert (stock(store), receipts(store)) == ([], [])
    assert verdict(store) == SettledKey("not_seen")


async def test_an_async_body_that_raises_has_received_nothing(
    receiver: Receiver, store: EventStore
) -> None:
    async def receive() -> None:
        async with receiver.areceive(ticket()) as receipt:
            await receipt.work(lambda connection: put(connection, "ham"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await receive()
    assert store._engine.pool.checkedout() == 0, "it is rolled back before the error is out"
    assert (stock(store), receipts(store)) == ([], [])


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_who_is_superseded_does_nothing(
    receiver: Receiver,
    store: EventStore,
    elsewhere: bool,  # noqa: FBT001 - a case
) -> None:
    assert verdict(store, epoch=2).verdict == "not_seen"
    with (
        pytest.raises(StaleOwnerError, match="do not repeat it"),
        receiver.receive(ticket(), elsewhere=elsewhere),
    ):
        pytest.fail("the body ran")
    with pytest.raises(StaleOwnerError, match="do not repeat it"):
        async with receiver.areceive(ticket(), elsewhere=elsewhere):
            pytest.fail("the body ran")
    with receiver.receive(ticket(epoch=2), elsewhere=elsewhere) as receipt:
        assert receipt.is_first


def test_the_bodys_own_database_errors_stay_what_they_are(
    receiver: Receiver, store: EventStore
) -> None:
    with receiver.receive(ticket("a")) as receipt:
        put(receipt, "ham")
    with pytest.raises(IntegrityError), receiver.receive(ticket("b")) as receipt:
        put(receipt, "ham")
    with receiver.receive(ticket("c")) as receipt:
        with pytest.raises(IntegrityError), receipt.connection.begin_nested():
            put(receipt, "ham")
        put(receipt, "eggs")
    assert stock(store) == ["eggs", "ham"]
    assert receipts(store) == ["done", "done"]


@pytest.mark.parametrize("how", ["commit", "rollback"])
def test_a_body_that_ends_the_transaction_itself_is_not_taken_for_done(
    receiver: Receiver, store: EventStore, how: str
) -> None:
    def receive() -> None:
        with receiver.receive(ticket()) as receipt:
            put(receipt, "ham")
            getattr(receipt.connection, how)()

    with pytest.raises(StoreError):
        receive()
    assert receipts(store) == (["open"] if how == "commit" else [])
    with receiver.receive(ticket()) as receipt:
        assert receipt.is_open == (how == "commit")
        receipt.reply = "found out"
    assert receipts(store) == ["done"]


def test_a_reply_that_is_no_json_is_refused_where_it_is_set(
    receiver: Receiver, store: EventStore
) -> None:
    with receiver.receive(ticket()) as receipt:
        with pytest.raises(ProtocolError, match="no JSON"):
            receipt.reply = {1, 2}
        assert receipt.reply is None
    assert receipts(store) == ["done"]


def test_a_reply_that_was_given_stands(receiver: Receiver) -> None:
    with receiver.receive(ticket()) as receipt:
        receipt.reply = "first"
    with pytest.raises(ConfigurationError, match="stands"):
        receipt.reply = "later"
    with receiver.receive(ticket()) as receipt, pytest.raises(ConfigurationError, match="stands"):
        receipt.reply = "again"
    assert receipt.reply == "first"


# Elsewhere.


def test_an_effect_elsewhere_is_open_while_it_is_done(
    receiver: Receiver, store: EventStore
) -> None:
    with receiver.receive(ticket(), elsewhere=True) as receipt:
        assert receipt.is_first
        assert receipts(store) == ["open"]
        assert verdict(store) == SettledKey("cannot_tell")
        with pytest.raises(ConfigurationError, match="elsewhere"):
            _ = receipt.connection
        receipt.reply = 10
    assert verdict(store) == SettledKey("seen", 10)
    with receiver.receive(ticket(), elsewhere=True) as receipt:
        assert not receipt.is_first
        assert not receipt.is_open
    assert receipt.reply == 10


async def test_an_async_effect_elsewhere_is_open_while_it_is_done(
    receiver: Receiver, store: EventStore
) -> None:
    async with receiver.areceive(ticket(), elsewhere=True) as receipt:
        assert receipt.is_first
        assert receipts(store) == ["open"]
        with pytest.raises(ConfigurationError, match="elsewhere"):
            await receipt.work(lambda _connection: None)
        receipt.reply = 10
    assert verdict(store) == SettledKey("seen", 10)


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_what_nobody_knows_the_end_of_is_not_taken_for_done(
    receiver: Receiver,
    store: EventStore,
    elsewhere: bool,  # noqa: FBT001 - a case
) -> None:
    with pytest.raises(ZeroDivisionError), receiver.receive(ticket(), elsewhere=True):
        raise ZeroDivisionError
    with (
        pytest.raises(InDoubtError, match=r"'reserve' of product began.*set its reply"),
        receiver.receive(ticket(), elsewhere=elsewhere) as receipt,
    ):
        assert (receipt.is_first, receipt.is_open) == (False, True)
    with pytest.raises(InDoubtError):
        async with receiver.areceive(ticket(), elsewhere=elsewhere):
            pass
    assert receipts(store) == ["open"]
    with receiver.receive(ticket(), elsewhere=elsewhere) as receipt:
        receipt.reply = None  # it was found out
    assert verdict(store) == SettledKey("seen", None)


def test_of_two_attempts_the_reply_of_the_one_that_ended_first_is_kept(receiver: Receiver) -> None:
    with receiver.receive(ticket(), elsewhere=True) as slow:
        with receiver.receive(ticket(), elsewhere=True) as quick:
            quick.reply = "quick"
        slow.reply = "slow"
    assert slow.reply == "quick"


async def test_a_cancelled_effect_elsewhere_stays_open(
    receiver: Receiver, store: EventStore
) -> None:
    async def body() -> None:
        async with receiver.areceive(ticket(), elsewhere=True):
            await asyncio.sleep(60)

    await cancelled_in(body(), lambda: receipts(store) == ["open"])
    assert receipts(store) == ["open"]


async def test_many_effects_elsewhere_need_no_threads_and_no_connections(
    receiver: Receiver, store: EventStore
) -> None:
    gate = asyncio.Event()
    inside = 0

    async def one(number: int) -> None:
        nonlocal inside
        async with receiver.areceive(ticket(f"k{number}"), elsewhere=True):
            inside += 1
            await gate.wait()

    tasks = [asyncio.create_task(one(number)) for number in range(50)]
    async with asyncio.timeout(20):
        while inside < 50:
            await asyncio.sleep(0.01)
    assert store._engine.pool.checkedout() == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("peerctx-receipt")]
    gate.set()
    await asyncio.gather(*tasks)
    assert receipts(store) == ["done"] * 50


# Made, used, given up.


async def test_to_make_one_declares_the_agent(
    store: EventStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await Receiver.acreate("inventory", store=store)
    assert store.receiver_since("inventory") == first.since
    assert Receiver("inventory", store=store).since == first.since
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", url)
    by_default = [Receiver("shipping"), await Receiver.acreate("shipping")]
    assert [made.since for made in by_default] == [store.receiver_since("shipping")] * 2
    by_default[0].store.close()
    with pytest.raises(ProtocolError, match="agent_id"):
        Receiver("no id", store=store)


async def test_a_receipt_that_is_over_does_no_more(receiver: Receiver) -> None:
    async with receiver.areceive(ticket()) as receipt:
        pass
    with pytest.raises(StoreError, match="over"):
        await receipt.work(lambda connection: put(connection, "ham"))


async def test_a_closed_store_receives_nothing(url: str) -> None:
    store = opened(url)
    receiver = Receiver("inventory", store=store)
    store.close()
    for elsewhere in (False, True):
        with (
            pytest.raises(StoreError, match="closed"),
            receiver.receive(ticket(), elsewhere=elsewhere),
        ):
            pytest.fail("the body ran")
        with pytest.raises(StoreError, match="closed"):
            async with receiver.areceive(ticket(), elsewhere=elsewhere):
                pytest.fail("the body ran")


async def cancelled_in(body: Any, is_there: Any, then: Callable[[], object] = bool) -> None:
    """Cancel a body once it is somewhere, and do something else then."""
    task = asyncio.create_task(body)
    async with asyncio.timeout(30):
        while not is_there():
            await asyncio.sleep(0.005)
    task.cancel()
    then()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_body_has_received_nothing(receiver: Receiver, store: EventStore) -> None:
    is_in = asyncio.Event()

    async def body() -> None:
        async with receiver.areceive(ticket()) as receipt:
            await receipt.work(lambda connection: put(connection, "ham"))
            is_in.set()
            await asyncio.sleep(60)

    await cancelled_in(body(), is_in.is_set)
    assert store._engine.pool.checkedout() == 0, "it is rolled back before it is out"
    assert (stock(store), receipts(store)) == ([], [])


async def test_work_that_is_cancelled_is_rolled_back_once_it_ends(
    receiver: Receiver, store: EventStore
) -> None:
    works, goes_on = threading.Event(), threading.Event()

    def work(connection: Connection) -> None:
        works.set()
        goes_on.wait(30)
        put(connection, "ham")

    async def body() -> None:
        async with receiver.areceive(ticket()) as receipt:
            await receipt.work(work)

    def go_on_soon() -> None:
        asyncio.get_running_loop().call_later(0.2, goes_on.set)

    await cancelled_in(body(), works.is_set, go_on_soon)
    assert store._engine.pool.checkedout() == 0
    assert (stock(store), receipts(store)) == ([], [])


async def test_cancelled_anywhere_it_leaves_no_transaction_and_no_connection(
    receiver: Receiver, store: EventStore
) -> None:
    chance = random.Random(11)
    loop = asyncio.get_running_loop()
    ends = set()

    async def body(key: str) -> None:
        async with receiver.areceive(ticket(key)) as receipt:
            await receipt.work(lambda connection: put(connection, key))
            await asyncio.sleep(0.001)
            receipt.reply = key

    within = 0.02
    for number in range(150):
        key = f"k{number:03}"
        task = asyncio.create_task(body(key))
        loop.call_later(chance.random() * within, task.cancel)
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        assert ended is None or isinstance(ended, asyncio.CancelledError), ended
        ends.add(type(ended))
        # Whatever the machine's pace is at the moment, about as many are cancelled as are not.
        within *= 1.25 if ended is not None else 0.8
    assert len(ends) == 2, "some were cancelled and some were not"
    await asyncio.to_thread(settled, store)
    done = [i.effect_key for i in store.interactions_of("inventory", thread_id="t")]
    assert stock(store) == sorted(str(key) for key in done), "both or none"
    assert receipts(store) == ["done"] * len(done)
    await body("last")


async def test_cancelled_while_it_waits_for_the_database_it_goes_at_once(url: str) -> None:
    with opened(url, 30) as store, opened(url, 30) as another:
        receiver = Receiver("inventory", store=store)
        joint = another.open_receipt("inventory", ticket())  # another process is at this key

        async def body() -> None:
            async with receiver.areceive(ticket()):
                pytest.fail("the body ran")

        task = asyncio.create_task(body())
        async with asyncio.timeout(30):
            while store._engine.pool.checkedout() < 1:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        before = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - before < 10
        joint.connection.rollback()
        joint.open.close()
        await asyncio.to_thread(settled, store)
        assert receipts(store) == []
        with receiver.receive(ticket()) as receipt:
            assert receipt.is_first


async def test_what_began_when_nobody_waited_any_more_is_undone(url: str) -> None:
    """It is not left to the garbage collector: here somebody keeps what began."""
    kept = []

    class Keeping(EventStore):
        def receiving(self, *arguments: Any, **options: Any) -> Any:
            kept.append(super().receiving(*arguments, **options))
            return kept[-1]

    with opened(url) as another, Keeping(url) as store:
        joint = another.open_receipt("inventory", ticket())
        receiver = Receiver.__new__(Receiver)  # to declare itself it would wait too
        receiver.agent_id, receiver.store = "inventory", store

        async def body() -> None:
            async with receiver.areceive(ticket()):
                pytest.fail("the body ran")

        await cancelled_in(body(), store._engine.pool.checkedout)  # type: ignore[attr-defined]
        joint.connection.rollback()
        joint.open.close()
        await asyncio.to_thread(settled, store)


# Deadlines, and others.


async def test_who_waits_for_its_turn_needs_no_thread_and_leaves_connections_to_others(
    receiver: Receiver, store: EventStore
) -> None:
    gate, inside = asyncio.Event(), 0

    async def body(number: int) -> None:
        nonlocal inside
        async with receiver.areceive(ticket(f"k{number}")):
            inside += 1
            await gate.wait()

    tasks = [asyncio.create_task(body(number)) for number in range(30)]
    async with asyncio.timeout(30):
        while inside < store._at_once:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert inside == store._at_once, "more have got in"
    names = [thread.name for thread in threading.enumerate()]
    assert sum(name.startswith("peerctx-receipt") for name in names) <= store._at_once
    async with asyncio.timeout(20):
        await store.acreated_at()
    gate.set()
    await asyncio.gather(*tasks)


def test_threads_that_receive_leave_connections_to_others(
    receiver: Receiver, store: EventStore
) -> None:
    gate, inside = threading.Event(), []

    def body(number: int) -> None:
        with receiver.receive(ticket(f"k{number}")):
            inside.append(number)
            gate.wait(60)

    with ThreadPoolExecutor(10) as threads:
        bodies = [threads.submit(body, number) for number in range(10)]
        deadline = time.monotonic() + 30
        while len(inside) < store._at_once:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(inside) == store._at_once, "more have got in"
        store.created_at()
        gate.set()
        for done in bodies:
            done.result()


async def test_who_waits_too_long_for_another_receipt_is_told_to_try_again(url: str) -> None:
    with opened(url, 1.0) as store, opened(url, 1.0) as another:
        receiver, elsewhere = (Receiver("inventory", store=s) for s in (store, another))
        async with receiver.areceive(ticket()) as receipt:
            await receipt.work(lambda connection: connection.execute(text("SELECT 1")).all())
            for other in (receiver, elsewhere):
                with pytest.raises(StoreBusyError, match="try again"):
                    async with other.areceive(ticket()):
                        pytest.fail("the body ran")
                with pytest.raises(StoreBusyError, match="try again"), other.receive(ticket()):
                    pytest.fail("the body ran")
        for each in (store, another):
            await asyncio.to_thread(settled, each)
        assert receipts(store) == ["done"]


async def test_a_thread_that_waits_and_a_loop_that_waits_take_turns(
    receiver: Receiver, store: EventStore
) -> None:
    def blocking(number: int) -> None:
        with receiver.receive(ticket(f"s{number}")) as receipt:
            put(receipt, f"s{number}")

    async def waiting(number: int) -> None:
        async with receiver.areceive(ticket(f"a{number}")) as receipt:
            await receipt.work(lambda connection: put(connection, f"a{number}"))

    with ThreadPoolExecutor(8) as threads:
        loop = asyncio.get_running_loop()
        blocked = [loop.run_in_executor(threads, blocking, number) for number in range(40)]
        await asyncio.gather(*blocked, *map(waiting, range(40)))
    assert len(stock(store)) == 80


async def test_a_receipt_ends_although_all_threads_of_the_store_wait_for_it(url: str) -> None:
    """On SQLite they wait for the lock that only its end gives back."""

    def note(number: int) -> Interaction:
        return Interaction(
            interaction_id=f"n{number}", thread_id="t2", from_agent="inventory",
            to_agent="product", kind="note", occurred_at=datetime.now(UTC),
        )  # fmt: skip

    with opened(url, 30) as store:
        before = time.monotonic()
        async with Receiver("inventory", store=store).areceive(ticket()) as receipt:
            notes = [store.aappend("inventory", note(number)) for number in range(20)]
            writing = asyncio.gather(*notes)
            await asyncio.sleep(0.2)
            await receipt.work(lambda connection: put(connection, "ham"))
        await writing
        assert time.monotonic() - before < 20
        assert stock(store) == ["ham"]


@pytest.mark.postgres
async def test_a_transaction_that_says_nothing_is_ended_by_the_server(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "IDLE_MILLISECONDS", IDLE_MILLISECONDS)
    with opened(postgres_url) as store:
        receiver = Receiver("inventory", store=store)

        async def receive() -> None:
            async with receiver.areceive(ticket()) as receipt:
                await receipt.work(lambda connection: put(connection, "ham"))
                await asyncio.sleep(2 * IDLE_MILLISECONDS / 1_000)

        with pytest.raises(StoreError):
            await receive()
        assert (stock(store), receipts(store)) == ([], [])
        settled(store)


@pytest.mark.postgres
async def test_of_a_lost_connection_nothing_is_received(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    name = postgres_url.rpartition("/")[2]
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    end += f"WHERE datname = '{name}' AND pid <> pg_backend_pid()"
    with opened(postgres_url) as store:
        receiver = Receiver("inventory", store=store)

        def loses() -> None:
            with receiver.receive(ticket()) as receipt:
                put(receipt, "ham")
                postgres_server.execute(end)

        async def loses_and_raises() -> None:
            async with receiver.areceive(ticket()) as receipt:
                await receipt.work(lambda connection: put(connection, "ham"))
                postgres_server.execute(end)
                raise ZeroDivisionError

        with pytest.raises(StoreError):
            loses()
        with pytest.raises(ZeroDivisionError):
            await loses_and_raises()
        assert (stock(store), receipts(store)) == ([], [])
        settled(store)


# Killed.

KILLED = """
import os, signal, sys
from sqlalchemy import text
from langgraph_peerctx.durability.receiver import Receiver
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.protocol.tickets import EffectTicket

url, mode, ticket = sys.argv[1:]
receiver = Receiver("inventory", store=EventStore(url))
elsewhere = mode == "elsewhere"
with receiver.receive(EffectTicket.model_validate_json(ticket), elsewhere=elsewhere) as receipt:
    assert receipt.is_first
    if not elsewhere:
        receipt.connection.execute(text("INSERT INTO stock VALUES ('ham')"))
        receipt.reply = "ham"
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(url: str, mode: str) -> None:
    """Receive in a process that is killed inside of the body."""
    child = [sys.executable, "-c", KILLED, url, mode, ticket().model_dump_json()]
    ended = subprocess.run(child, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def test_killed_between_open_and_done_nobody_can_tell(url: str) -> None:
    with opened(url) as store:
        killed(url, "elsewhere")
        assert receipts(store) == ["open"]
        assert verdict(store) == SettledKey("cannot_tell")
        with Receiver("inventory", store=store).receive(ticket(epoch=2), elsewhere=True) as receipt:
            assert receipt.is_open
            receipt.reply = "found out"
        assert verdict(store) == SettledKey("seen", "found out")


def test_killed_inside_of_the_transaction_nothing_was_received(url: str) -> None:
    with opened(url) as store:
        killed(url, "together")
        assert (stock(store), receipts(store)) == ([], [])
        assert verdict(store) == SettledKey("not_seen")
        receiver = Receiver("inventory", store=store)
        with pytest.raises(StaleOwnerError), receiver.receive(ticket()):
            pytest.fail("the body ran")
        with receiver.receive(ticket(epoch=2)) as receipt:
            assert receipt.is_first
            put(receipt, "ham")
        assert stock(store) == ["ham"]
