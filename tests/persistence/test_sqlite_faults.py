"""What can go wrong with a file, and that nothing is lost by it."""

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from persistence.processes import order
from sqlalchemy import event, text

from langgraph_peerctx.errors import StoreBusyError, StoreError
from langgraph_peerctx.persistence.event_store import EventStore


@pytest.fixture
def url(file: Path) -> str:
    return f"sqlite:///{file}"


@pytest.fixture
def impatient(url: str) -> Iterator[EventStore]:
    with EventStore(url, timeout_seconds=0.3) as store:
        yield store


@contextmanager
def locked(file: Path) -> Iterator[sqlite3.Connection]:
    """Another writer in the middle of its transaction."""
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield other
        other.execute("ROLLBACK")


def numbers(store: EventStore) -> list[Any]:
    return [found.payload["number"] for found in store.interactions_of("product", thread_id="t")]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"the folder {tmp_path}/none exists"):
        EventStore(f"sqlite:///{tmp_path}/none/events.db")


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open"):
        EventStore(f"sqlite:///{tmp_path}")


def test_a_file_of_something_else_is_left_as_it_is(file: Path, url: str) -> None:
    content = b"minutes of the meeting\n" * 200
    file.write_bytes(content)
    with pytest.raises(StoreError, match="no SQLite database: name another"):
        EventStore(url)
    assert file.read_bytes() == content


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_reported_and_not_written_over(
    file: Path, url: str, kept: float
) -> None:
    with EventStore(url) as store:
        store.append_many("product", [order(n) for n in range(300)])
    content = file.read_bytes()[: int(file.stat().st_size * kept)]
    file.write_bytes(content)

    def use() -> None:
        with EventStore(url) as store:
            for number in range(300, 400):
                store.append("product", order(number))
            numbers(store)

    with pytest.raises(StoreError, match="restore"):
        use()
    assert file.read_bytes()[100:4096] == content[100:4096]


def test_a_damaged_page_is_an_error_and_no_answer(file: Path, url: str) -> None:
    with EventStore(url) as store:
        store.append_many("product", [order(n) for n in range(300)])
    content = bytearray(file.read_bytes())
    half = len(content) // 2
    content[half:] = b"\xa5" * (len(content) - half)
    file.write_bytes(content)
    with pytest.raises(StoreError, match="damaged: restore it"), EventStore(url) as store:
        numbers(store)


def test_a_file_that_may_only_be_read_says_so(file: Path, url: str) -> None:
    with EventStore(url) as store:
        store.append("product", order(1))
    with EventStore(f"sqlite:///file:{file}?mode=ro&uri=true") as store:
        assert numbers(store) == [1]
        with pytest.raises(StoreError, match=f"{file}.*may be written"):
            store.append("product", order(2))


def test_a_table_that_is_gone_is_not_made_anew(url: str) -> None:
    with EventStore(url) as store, store._engine.connect() as connection:
        connection.execute(text("DROP TABLE peerctx_memories"))
    with EventStore(url) as store, pytest.raises(StoreError, match="schema is incomplete"):
        store.memory_of("product", "inventory")


@pytest.mark.parametrize("use", [numbers, lambda store: store.append("product", order(2))])
def test_a_file_that_was_deleted_while_open_is_noticed(file: Path, url: str, use: Any) -> None:
    with EventStore(url) as store:
        store.append("product", order(1))
        file.unlink()
        with pytest.raises(StoreError, match="deleted or replaced"):
            use(store)
        assert not file.exists()


def test_a_file_that_was_replaced_while_open_is_noticed(
    tmp_path: Path, file: Path, url: str
) -> None:
    EventStore(f"sqlite:///{tmp_path}/other.db").close()
    with EventStore(url) as store:
        (tmp_path / "other.db").rename(file)
        with pytest.raises(StoreError, match="deleted or replaced"):
            store.append("product", order(1))


def test_an_emptied_file_is_a_new_store_that_knows_its_age(file: Path, url: str) -> None:
    with EventStore(url) as store:
        born = store.created_at()
    file.write_bytes(b"")
    with EventStore(url) as store:
        assert store.created_at() > born


def test_a_locked_file_is_waited_for_and_no_longer_than_the_timeout(
    file: Path, impatient: EventStore
) -> None:
    impatient.append("product", order(1))
    with locked(file):
        started = time.monotonic()
        with pytest.raises(StoreBusyError, match="try again"):
            impatient.append("product", order(2))
        with pytest.raises(StoreBusyError, match="try again"):
            impatient.append_many("product", [order(3)])
        assert 0.5 < time.monotonic() - started < 15
        assert numbers(impatient) == [1]  # reading goes on beside the writer
    impatient.append("product", order(2))
    assert numbers(impatient) == [2, 1]


async def test_a_locked_file_does_not_block_the_loop(file: Path, url: str) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    with EventStore(url, timeout_seconds=1.0) as store, locked(file):
        ticking = asyncio.create_task(tick())
        started = time.monotonic()
        with pytest.raises(StoreBusyError):
            await store.aappend("product", order(1))
        took = time.monotonic() - started
        ticking.cancel()
    assert took > 0.9
    assert ticks > 10, "a loop that is blocked does not turn at all"


async def test_cancelling_is_not_swallowed_and_leaves_the_store_usable(
    file: Path, impatient: EventStore
) -> None:
    with locked(file):
        waiting = asyncio.create_task(impatient.aappend("product", order(1)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await impatient.aappend("product", order(1))
    await impatient.aappend("product", order(2))
    assert 2 in numbers(impatient)


async def test_closing_cancels_nobody_who_waits(file: Path, impatient: EventStore) -> None:
    with locked(file):
        waiting = [impatient.aappend("product", order(number)) for number in range(20)]
        answers = asyncio.gather(*waiting, return_exceptions=True)
        while not impatient._engine.pool.checkedout():  # type: ignore[attr-defined]
            await asyncio.sleep(0)  # until one of them waits for the file
        impatient.close()
        assert {type(answer) for answer in await answers} == {StoreBusyError, StoreError}


async def test_more_callers_than_connections_take_turns(url: str) -> None:
    with EventStore(url) as store:
        events = [order(number) for number in range(100)]
        stored = await asyncio.gather(*(store.aappend("product", event) for event in events))
        assert sorted(numbers(store)) == list(range(100))
        assert len({interaction.sequence for interaction in stored}) == 100


def test_a_full_disk_is_reported_and_everything_earlier_is_intact(url: str) -> None:
    with EventStore(url) as store:
        store.append_many("product", [order(n) for n in range(50)])
        store._engine.pool.dispose()
        full = [True]

        @event.listens_for(store._engine, "checkout")
        def _limit(connection: Any, _record: Any, _proxy: Any) -> None:
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count={pages + 1 if full[0] else 2**30}")

        with pytest.raises(StoreError, match="room on the disk"):
            store.append_many("product", [order(n) for n in range(50, 1_000)])
        assert len(store.interactions_of("product", thread_id="t")) == 50
        full[0] = False
        assert store.append_many("product", [order(n) for n in range(100)]) == 50
