"""Which addresses are taken, how a database is opened, and what a transaction is."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from services.postgres import PostgresServer
from sqlalchemy import Engine, text

from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.persistence.engine import connect, name_of, writing
from langgraph_peerctx.persistence.event_store import EventStore


@pytest.fixture
def opened() -> Any:
    """Engines that are closed at the end."""
    engines: list[Engine] = []

    def open_one(url: str, **options: Any) -> Engine:
        engines.append(connect(url, **options))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.dispose()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "unreadable"),
        ("nonsense", "unreadable"),
        ("postgresql://user@host:port/name", "unreadable"),
        ("mysql://user:hidden@host/name", "'mysql' is no database of ours"),
        ("postgresql+asyncpg://user:hidden@host/name", "no database of ours"),
        ("sqlite+aiosqlite:///file", "no database of ours"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///file::memory:?uri=true", "in memory"),
        ("sqlite:///file:name?mode=memory&uri=true", "in memory"),
    ],
)
def test_an_address_of_none_of_ours_is_refused_without_its_password(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as refused:
        connect(url)
    assert "hidden" not in str(refused.value)


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "langgraph_peerctx.persistence.postgresql", raising=False)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigurationError, match=r"langgraph-peerctx\[postgres\]"):
        connect("postgresql://user@host/name")


def test_sqlite_alone_needs_no_psycopg(tmp_path: Path) -> None:
    script = (
        "import sys; from langgraph_peerctx.persistence.event_store import EventStore;"
        "EventStore(sys.argv[1]).close(); assert 'psycopg' not in sys.modules"
    )
    url = f"sqlite:///{tmp_path}/events.db"
    subprocess.run([sys.executable, "-c", script, url], check=True, timeout=60)


def test_a_name_shows_no_password(opened: Callable[..., Engine]) -> None:
    name = name_of(
        opened("postgresql://user:hidden@host:5433/name?password=hidden&sslmode=require")
    )
    assert name == "postgresql+psycopg://user:***@host:5433/name?sslmode=require"


def test_a_relative_file_stays_the_same_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with EventStore("sqlite:///events.db") as store:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        store._engine.pool.dispose()
        store.ping()
        assert store.name == f"sqlite:///{tmp_path}/events.db"
    assert not (tmp_path / "elsewhere" / "events.db").exists()


@pytest.mark.parametrize("name", ["a b.db", "100%.db", "ünï.db", "a?b.db", "a#b.db"])
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "100% of it"
    folder.mkdir()
    url = f"sqlite:///{folder}/{name}".replace("?", "%3F")
    with EventStore(url) as store:
        store.remember("product", "inventory", {"stock": 1})
    with EventStore(url) as again:
        assert again.memory_of("product", "inventory") == {"stock": 1}


@pytest.mark.parametrize(("synchronous", "number"), [("NORMAL", 1), ("FULL", 2)])
def test_sqlite_writes_ahead_and_waits_for_the_disk_as_asked(
    opened: Callable[..., Engine], file: Path, synchronous: Any, number: int
) -> None:
    engine = opened(f"sqlite:///{file}", synchronous=synchronous, timeout_seconds=1.5)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == number
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 1_500


def test_a_transaction_is_kept_whole_or_not_at_all(opened: Callable[..., Engine], url: str) -> None:
    engine = opened(url)
    with writing(engine) as connection:
        connection.execute(text("CREATE TABLE numbers (number INTEGER)"))

    def insert_two() -> None:
        with writing(engine) as connection:
            connection.execute(text("INSERT INTO numbers VALUES (1)"))
            connection.execute(text("INSERT INTO nowhere VALUES (2)"))

    with pytest.raises(Exception, match="nowhere"):
        insert_two()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM numbers")).scalar() == 0
        connection.execute(text("INSERT INTO numbers VALUES (3)"))
    with engine.connect() as connection:
        assert connection.execute(text("SELECT number FROM numbers")).scalars().all() == [3]


@pytest.mark.postgres
def test_the_options_in_an_address_stay_beside_ours(
    opened: Callable[..., Engine], postgres_url: str
) -> None:
    engine = opened(
        f"{postgres_url}?options=-csearch_path%3Dteam -capplication_name%3Dshop",
        timeout_seconds=2.5,
    )
    with engine.connect() as connection:
        shown = {
            name: connection.execute(text(f"SHOW {name}")).scalar()
            for name in ("search_path", "application_name", "statement_timeout", "lock_timeout")
        }
    assert shown == {
        "search_path": "team",
        "application_name": "shop",
        "statement_timeout": "2500ms",
        "lock_timeout": "2500ms",
    }


@pytest.mark.postgres
def test_a_schema_of_the_teams_own_is_respected(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    database = postgres_url.rpartition("/")[2]
    postgres_server.execute("CREATE SCHEMA team", database)
    with EventStore(f"{postgres_url}?options=-csearch_path%3Dteam") as store:
        store.remember("product", "inventory", {"stock": 1})
    found = postgres_server.execute("SELECT count(*) FROM team.peerctx_memories", database)
    assert found == [(1,)]
