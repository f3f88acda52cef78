"""What can go wrong with a server, and that nothing is lost by it."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing

import psycopg
import pytest
from persistence.processes import order
from services.postgres import PostgresServer

from langgraph_peerctx.errors import StoreBusyError, StoreError
from langgraph_peerctx.persistence.engine import POOL_SIZE
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.persistence.postgresql import DeadlineConnection
from langgraph_peerctx.persistence.upgrade import _LOCK

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def own_server(postgres_server: PostgresServer) -> Iterator[PostgresServer]:  # noqa: ARG001 - it says whether there is PostgreSQL
    """A server that these tests may stop; each leaves it running."""
    with PostgresServer({"fsync": "off"}) as server:
        yield server


@pytest.fixture
def own_url(own_server: PostgresServer) -> Iterator[str]:
    with own_server.database() as url:
        yield url


@pytest.fixture
def impatient(own_url: str) -> Iterator[EventStore]:
    with EventStore(own_url, timeout_seconds=1.0) as store:
        yield store


def numbers(store: EventStore) -> list[object]:
    return [found.payload["number"] for found in store.interactions_of("product", thread_id="t")]


def end_connections_of(server: PostgresServer, url: str) -> None:
    database = url.rpartition("/")[2]
    server.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "  # noqa: S608 - our own name
        f"WHERE datname = '{database}' AND pid <> pg_backend_pid()"
    )


def test_a_wrong_password_is_said_and_not_shown(postgres_server: PostgresServer) -> None:
    with pytest.raises(StoreError, match="user and password in the URL") as refused:
        EventStore(postgres_server.url(password="hidden"))  # noqa: S106 - the fault
    assert "hidden" not in str(refused.value)
    assert postgres_server.password not in str(refused.value)


def test_a_database_that_is_not_there_is_named(postgres_server: PostgresServer) -> None:
    with pytest.raises(StoreError, match='"nowhere" does not exist'):
        EventStore(postgres_server.url("nowhere"))


def test_an_upgrade_may_take_longer_than_a_query(postgres_url: str) -> None:
    """Here another process's holds it up for three times the deadline of a statement."""
    with (
        psycopg.connect(postgres_url) as another,
        ThreadPoolExecutor(1) as pool,
    ):
        another.execute(_LOCK.text)
        opening = pool.submit(EventStore, postgres_url, timeout_seconds=1.0)
        wait([opening], timeout=3.0)
        assert not opening.done()
        another.rollback()
        with opening.result(60) as store:
            assert numbers(store) == []
            with store._engine.connect() as connection:
                limits = connection.exec_driver_sql("SHOW statement_timeout").scalar()
                driver = connection.connection.dbapi_connection
    assert limits == "1s"
    assert isinstance(driver, DeadlineConnection)
    assert driver.patience_seconds == 1.5


def test_terminated_connections_are_replaced(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    with EventStore(postgres_url) as store:
        store.append("product", order(1))
        end_connections_of(postgres_server, postgres_url)
        store.append("product", order(2))
        end_connections_of(postgres_server, postgres_url)
        assert store.append_many("product", [order(2), order(3)]) == 1
        end_connections_of(postgres_server, postgres_url)
        assert numbers(store) == [3, 2, 1]
        end_connections_of(postgres_server, postgres_url)
        store.remember("product", "inventory", {"stock": 1})
        assert store.memory_of("product", "inventory") == {"stock": 1}


def test_a_connection_that_ends_inside_a_transaction_is_tried_again_from_its_start(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    with (
        EventStore(postgres_url, timeout_seconds=30) as store,
        ThreadPoolExecutor(1) as threads,
    ):
        with closing(psycopg.connect(postgres_url)) as other:
            other.execute("LOCK TABLE peerctx_interactions")
            appending = threads.submit(store.append_many, "product", [order(1), order(2)])
            wait_for_its_lock(postgres_server)
            postgres_server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = "
                "'Lock'"
            )
            wait_for_its_lock(postgres_server)
            assert not appending.done()
        assert appending.result(60) == 2
        assert numbers(store) == [2, 1]


def wait_for_its_lock(server: PostgresServer) -> None:
    deadline = time.monotonic() + 20
    while not server.execute(
        "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND state = 'active'"
    ):
        assert time.monotonic() < deadline


def test_a_server_that_was_ended_at_once_lost_nothing_and_is_found_again(
    own_server: PostgresServer, own_url: str
) -> None:
    with EventStore(own_url) as store:
        stored = store.append("product", order(1))
        own_server.stop(signal.SIGQUIT)
        try:
            with pytest.raises(StoreError, match="runs and can be reached"):
                store.append("product", order(2))
            with pytest.raises(StoreError, match="runs and can be reached"):
                numbers(store)
        finally:
            own_server.start()
        assert store.append("product", order(1)) == stored
        store.append("product", order(2))
        assert numbers(store) == [2, 1]


def test_a_frozen_server_is_given_up_after_the_timeout(
    own_server: PostgresServer, impatient: EventStore
) -> None:
    """Its sockets are open and acknowledge: no timeout of the server's or of TCP's ends this."""
    impatient.append("product", order(1))
    started = time.monotonic()
    own_server.pause()
    try:
        with pytest.raises(StoreBusyError, match="said nothing"):
            impatient.append("product", order(2))
        assert time.monotonic() - started < 20
    finally:
        own_server.resume()
    impatient.append("product", order(2))
    assert numbers(impatient) == [2, 1]


async def test_a_frozen_server_does_not_block_the_loop(
    own_server: PostgresServer, impatient: EventStore
) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    impatient.append("product", order(1))
    own_server.pause()
    ticking = asyncio.create_task(tick())
    try:
        started = time.monotonic()
        asked = [impatient.ainteractions_of("product", thread_id="t") for _ in range(20)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert time.monotonic() - started < 20
        assert {type(answer) for answer in answers} == {StoreBusyError}
        assert ticks > 20
    finally:
        ticking.cancel()
        own_server.resume()
    assert len(await impatient.ainteractions_of("product", thread_id="t")) == 1


def test_a_process_ends_though_its_server_is_frozen(
    own_server: PostgresServer, own_url: str
) -> None:
    script = """
import asyncio, sys
from langgraph_peerctx.errors import StoreBusyError
from langgraph_peerctx.persistence.event_store import EventStore

async def main():
    store = EventStore(sys.argv[1], timeout_seconds=1.0)
    print("opened", flush=True)
    sys.stdin.readline()
    try:
        await store.aping()
    except StoreBusyError:
        print("gave up", flush=True)

asyncio.run(main())
"""
    command = [sys.executable, "-c", script, own_url]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "opened\n"
        own_server.pause()
        try:
            said, _ = process.communicate("\n", timeout=60)
        finally:
            own_server.resume()
    assert said == "gave up\n"
    assert process.returncode == 0


def test_a_lock_is_waited_for_and_no_longer_than_the_timeout(
    own_url: str, impatient: EventStore
) -> None:
    with closing(psycopg.connect(own_url)) as other:
        other.execute("LOCK TABLE peerctx_interactions")
        with pytest.raises(StoreBusyError, match=r"timeout.*try again"):
            impatient.append("product", order(1))
        with pytest.raises(StoreBusyError, match=r"timeout.*try again"):
            numbers(impatient)
        other.rollback()
    assert numbers(impatient) == []


def test_connections_that_are_all_in_use_are_said_to_be(impatient: EventStore) -> None:
    taken = [impatient._engine.connect() for _ in range(POOL_SIZE)]
    try:
        with pytest.raises(StoreBusyError, match="every connection is in use"):
            impatient.ping()
    finally:
        for connection in taken:
            connection.close()
    impatient.ping()


def test_a_server_that_may_only_be_read_says_so(own_url: str, impatient: EventStore) -> None:
    database = own_url.rpartition("/")[2]
    with closing(psycopg.connect(own_url, autocommit=True)) as other:
        other.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on".encode())
    impatient._engine.pool.dispose()
    with pytest.raises(StoreError, match="name the primary"):
        impatient.append("product", order(1))
    assert numbers(impatient) == []


def test_a_user_without_rights_is_told_to_ask_for_them(
    own_server: PostgresServer, own_url: str
) -> None:
    database = own_url.rpartition("/")[2]
    own_server.execute("DROP ROLE IF EXISTS guest")
    own_server.execute("CREATE ROLE guest LOGIN PASSWORD 'guest'")
    with pytest.raises(StoreError, match="grant this user"):
        EventStore(own_server.url(database, "guest", password="guest"))  # noqa: S106 - a test's
