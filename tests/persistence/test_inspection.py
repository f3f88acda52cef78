"""What is said of a database, well or not: never an exception, always what to do."""

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from persistence.processes import order
from services.postgres import PostgresServer
from sqlalchemy import text

from langgraph_peerctx.persistence import inspection
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.persistence.inspection import DatabaseState, describe_database
from langgraph_peerctx.persistence.migrations import HEAD, VERSION_TABLE

SECRET = "hunter2"  # noqa: S105 - nobody's


def fault(url: str, *, timeout_seconds: float = 10.0) -> str:
    """Return the one problem that a database has."""
    state = describe_database(url, timeout_seconds=timeout_seconds)
    assert not state.healthy
    assert len(state.problems) == 1
    return state.problems[0]


@contextmanager
def bare(file: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        yield connection


def test_a_store_is_healthy_and_its_rows_are_counted(url: str) -> None:
    with EventStore(url) as store:
        store.append_many("product", [order(number) for number in range(7)])
        store.remember("product", "inventory", {"n": 1})

        state = describe_database(url)

    assert state.healthy
    assert (state.exists, state.reachable, state.at_head, state.writable) == (True,) * 4
    assert state.schema_version == HEAD
    assert state.wal is (True if url.startswith("sqlite") else None)
    assert state.rows["peerctx_interactions"] == 7
    assert state.rows["peerctx_memories"] == 1
    assert state.rows["peerctx_leases"] == 0


def test_many_rows_are_not_counted_to_the_end(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "COUNT_LIMIT", 5)
    with EventStore(url) as store:
        store.append_many("product", [order(number) for number in range(7)])

    assert describe_database(url).rows["peerctx_interactions"] == 5


def test_looking_at_an_empty_database_makes_nothing_in_it(url: str) -> None:
    first = describe_database(url)
    second = describe_database(url)

    assert first == second
    assert first.healthy
    assert first.schema_version is None
    assert not first.at_head
    assert first.rows == {}


def test_looking_changes_no_byte_of_a_file(file: Path) -> None:
    EventStore(f"sqlite:///{file}").close()
    with bare(file) as connection:
        connection.execute("PRAGMA user_version=7")
    before = file.read_bytes()

    assert describe_database(f"sqlite:///{file}").healthy
    assert file.read_bytes() == before


def test_a_file_that_is_not_there_is_not_made(file: Path) -> None:
    state = describe_database(f"sqlite:///{file}")

    assert state.healthy
    assert (state.exists, state.reachable) == (False, False)
    assert list(file.parent.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(file: Path) -> None:
    missing = file.parent / "missing"

    assert f"{missing} does not exist: make it" in fault(f"sqlite:///{missing}/events.db")
    assert not missing.exists()


def test_a_file_that_is_no_database_is_named_and_kept(file: Path) -> None:
    file.write_bytes(b"my diary, not yours\n" * 500)

    assert "no SQLite database" in fault(f"sqlite:///{file}")
    assert file.read_bytes() == b"my diary, not yours\n" * 500


def test_a_folder_in_place_of_a_file_is_a_fault(file: Path) -> None:
    file.mkdir()

    assert str(file) in fault(f"sqlite:///{file}")


def test_a_damaged_file_is_a_fault(file: Path) -> None:
    with EventStore(f"sqlite:///{file}") as store:
        store.append_many("product", [order(number) for number in range(500)])
    os.truncate(file, 8_192)

    assert "restore" in fault(f"sqlite:///{file}")


def test_a_file_that_may_only_be_read_is_a_fault(file: Path) -> None:
    EventStore(f"sqlite:///{file}").close()

    assert "may be written" in fault(f"sqlite:///file:{file}?mode=ro&uri=true")


def test_a_file_that_is_not_in_wal_mode_is_a_fault(file: Path) -> None:
    EventStore(f"sqlite:///{file}").close()
    with bare(file) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")

    assert "not in WAL mode" in fault(f"sqlite:///{file}")
    with bare(file) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_file_that_is_locked_is_told_within_the_timeout(file: Path) -> None:
    EventStore(f"sqlite:///{file}").close()
    with bare(file) as connection:
        connection.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        state = describe_database(f"sqlite:///{file}", timeout_seconds=0.3)

    assert time.monotonic() - started < 4
    assert state.reachable
    assert state.at_head
    assert "did not answer in time" in state.problems[0]


@pytest.mark.parametrize("version", ["9999", "abc"])
def test_a_schema_of_a_later_release_is_a_fault(url: str, version: str) -> None:
    with EventStore(url) as store, store._engine.connect() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '{version}'"))  # noqa: S608 - ours

    assert "install the release that made it" in fault(url)


def test_a_schema_that_is_incomplete_is_a_fault(url: str) -> None:
    with EventStore(url) as store, store._engine.connect() as connection:
        connection.exec_driver_sql("DROP TABLE peerctx_runs")

    assert "schema is incomplete" in fault(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "mysql://u:hunter2@h/d",
        "sqlite://",
        "sqlite:///:memory:",
        "postgresql+asyncpg://u:hunter2@h/d",
    ],
)
def test_an_address_of_none_of_ours_is_a_fault(url: str) -> None:
    assert "sqlite:///FILE" in fault(url)
    assert SECRET not in fault(url)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////tmp/a\0.db",
        "sqlite:////tmp/\ud800.db",
        "postgresql://u:p@\ud800/d",
        "postgresql://u:p%00@h/d",
        "postgresql://u:p@h:port/d",
    ],
)
def test_an_address_that_no_system_can_take_is_unreadable(url: str) -> None:
    assert "unreadable" in fault(url)


def test_an_option_of_a_wrong_kind_is_a_fault(file: Path) -> None:
    assert "an option in the database URL is wrong" in fault(f"sqlite:///{file}?timeout=abc")


def test_a_name_that_is_too_long_is_a_fault(file: Path) -> None:
    assert "too long" in fault(f"sqlite:///{file.with_name('x' * 300)}")


@pytest.mark.postgres
def test_a_wrong_password_is_told_and_not_shown(postgres_server: PostgresServer) -> None:
    said = fault(postgres_server.url(password=SECRET))

    assert "password" in said
    assert SECRET not in said
    assert postgres_server.password not in said


@pytest.mark.postgres
def test_a_database_that_was_not_created_is_told(postgres_server: PostgresServer) -> None:
    assert 'database "nowhere" does not exist' in fault(postgres_server.url("nowhere"))


def test_a_server_that_is_not_there_is_told() -> None:
    assert "see that the server runs" in fault("postgresql://u:hunter2@127.0.0.1:1/d")


@pytest.mark.postgres
def test_a_user_who_may_only_read_is_told(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    EventStore(postgres_url).close()
    database = postgres_url.rpartition("/")[2]
    postgres_server.execute(f"CREATE ROLE reader_{database} LOGIN PASSWORD '{SECRET}'")
    try:
        postgres_server.execute(
            f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader_{database}", database
        )
        state = describe_database(
            postgres_server.url(database, f"reader_{database}", password=SECRET)
        )
        assert state.at_head
        assert state.writable is False
        assert "grant INSERT" in state.problems[0]
    finally:
        postgres_server.execute(f"DROP OWNED BY reader_{database}", database)
        postgres_server.execute(f"DROP ROLE reader_{database}")


@pytest.mark.postgres
def test_a_server_that_says_nothing_is_told_within_the_timeout() -> None:
    with PostgresServer() as server:
        EventStore(server.url()).close()
        server.pause()
        started = time.monotonic()
        state = describe_database(server.url(), timeout_seconds=1)
        took = time.monotonic() - started
        server.stop(signal.SIGQUIT)

    assert took < 20
    assert not state.healthy


def test_states_are_compared_by_what_they_say() -> None:
    assert DatabaseState(name="x") == DatabaseState(name="x")
    with pytest.raises(AttributeError):
        DatabaseState().name = "y"  # type: ignore[misc]
