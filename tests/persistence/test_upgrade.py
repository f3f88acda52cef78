"""The schema: what the migrations make is what the code expects, whoever makes it."""

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from persistence.processes import CONTEXT, open_together, order, start
from sqlalchemy import CheckConstraint, Engine, LargeBinary, Text, inspect, text
from sqlalchemy.exc import IntegrityError

from langgraph_peerctx.errors import StoreError
from langgraph_peerctx.identifiers import RECORD_ID_LIMIT
from langgraph_peerctx.persistence import schema
from langgraph_peerctx.persistence.engine import connect, writing
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.persistence.migrations import HEAD, VERSION_TABLE
from langgraph_peerctx.persistence.upgrade import schema_version, upgrade

_IDENTIFIERS = {"counterpart_id", "sender_id", "peer_id", "owner_id", "recoverer_id"}


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = connect(url)
    yield engine
    engine.dispose()


def test_the_migrations_make_what_the_schema_says(engine: Engine) -> None:
    upgrade(engine)
    options = {"version_table": VERSION_TABLE, "compare_type": True}
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, schema.metadata) == []
        names = set(inspect(connection).get_table_names())
    assert names == {*schema.metadata.tables, VERSION_TABLE}


def test_every_constraint_of_the_schema_is_in_the_database(engine: Engine) -> None:
    upgrade(engine)
    looked = inspect(engine)
    for table in schema.metadata.tables.values():
        expected = {str(c.name) for c in table.constraints if isinstance(c, CheckConstraint)}
        assert {c["name"] for c in looked.get_check_constraints(table.name)} == expected


@pytest.mark.parametrize(
    ("table", "row", "column"),
    [
        (
            "receipts",
            {
                "agent_id": "a",
                "effect_key": "e",
                "sender_id": "s",
                "thread_id": "t",
                "epoch": 1,
                "status": "open",
                "received_at": 1,
            },
            "status",
        ),
        (
            "runs",
            {
                "run_id": "r",
                "agent_id": "a",
                "thread_id": "t",
                "epoch": 1,
                "admitted_at": 1,
                "end_kind": "returned",
                "durability": "sync",
            },
            "end_kind",
        ),
        (
            "effects",
            {
                "agent_id": "a",
                "thread_id": "t",
                "run_id": "r",
                "effect_id": "0",
                "position": "p",
                "effect_key": "e",
                "scope": "run",
                "status": "intent",
                "epoch": 1,
                "attempt": 1,
                "intent_at": 1,
            },
            "status",
        ),
        (
            "incidents",
            {
                "incident_id": "i",
                "agent_id": "a",
                "thread_id": "t",
                "dead_incarnation": "d",
                "lost_epoch": 1,
                "status": "open",
                "attempts": 0,
                "epoch": 1,
                "opened_at": 1,
                "updated_at": 1,
            },
            "status",
        ),
    ],
)
def test_a_word_outside_a_closed_set_is_refused(
    engine: Engine, table: str, row: dict[str, Any], column: str
) -> None:
    upgrade(engine)
    statement = schema.metadata.tables[f"peerctx_{table}"].insert()
    with pytest.raises(IntegrityError, match=f"ck_peerctx_{table}_{column}"), writing(engine) as c:
        c.execute(statement, row | {column: "somehow"})
    with writing(engine) as connection:
        connection.execute(statement, row)


def test_a_failure_is_recorded_once_for_each_death(engine: Engine) -> None:
    upgrade(engine)
    row = {
        "agent_id": "a",
        "thread_id": "t",
        "dead_incarnation": "d",
        "lost_epoch": 1,
        "status": "open",
        "attempts": 0,
        "epoch": 1,
        "opened_at": 1,
        "updated_at": 1,
    }
    with writing(engine) as connection:
        connection.execute(schema.incidents.insert(), row | {"incident_id": "1"})
    with pytest.raises(IntegrityError), writing(engine) as connection:
        connection.execute(schema.incidents.insert(), row | {"incident_id": "2"})
    with writing(engine) as connection:
        connection.execute(schema.incidents.insert(), row | {"incident_id": "3", "lost_epoch": 2})


def test_the_longest_ids_fit_every_index(engine: Engine) -> None:
    """PostgreSQL refuses an index row beyond 2,704 bytes, and says so only when it is written."""
    upgrade(engine)
    # Four bytes a character, and such that PostgreSQL's compression gains nothing.
    longest = "".join(
        map(chr, random.Random(1).choices(range(0x20000, 0x2A000), k=RECORD_ID_LIMIT))
    )
    agent = "a" * 64
    for table in schema.metadata.tables.values():
        row: dict[str, Any] = {}
        allowed = {"status": "open", "scope": "run"}
        if table is schema.effects:
            allowed["status"] = "intent"
        for column in table.columns:
            if isinstance(column.type, LargeBinary):
                row[column.name] = b""
            elif isinstance(column.type, Text):
                is_agent = column.name.endswith("agent_id") or column.name in _IDENTIFIERS
                row[column.name] = agent if is_agent else longest
            elif not column.primary_key or column.name == "number":
                row[column.name] = 1
        row |= {name: value for name, value in allowed.items() if name in row}
        row |= {name: None for name in ("end_kind", "durability") if name in row}
        with writing(engine) as connection:
            connection.execute(table.insert(), row)


def test_an_upgrade_that_fails_half_way_leaves_nothing(engine: Engine) -> None:
    with writing(engine) as connection:
        connection.execute(text("CREATE TABLE peerctx_incidents (one INTEGER)"))
    with pytest.raises(StoreError, match="already exists"):
        upgrade(engine)
    assert inspect(engine).get_table_names() == ["peerctx_incidents"]
    with writing(engine) as connection:
        connection.execute(text("DROP TABLE peerctx_incidents"))
    upgrade(engine)
    assert schema_version(engine) == HEAD


def test_a_downgrade_takes_every_table_away(engine: Engine) -> None:
    upgrade(engine)
    config = Config()
    config.set_main_option("script_location", "langgraph_peerctx:persistence/migrations")
    with writing(engine) as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert inspect(engine).get_table_names() == [VERSION_TABLE]
    upgrade(engine)
    assert schema_version(engine) == HEAD


@pytest.mark.parametrize(
    ("version", "said"), [("9999", "install the release that made it"), ("0000", "restore")]
)
def test_a_schema_that_this_release_does_not_know_is_refused(
    engine: Engine, url: str, version: str, said: str
) -> None:
    upgrade(engine)
    with writing(engine) as connection:
        connection.execute(
            text(f"UPDATE {VERSION_TABLE} SET version_num = :version"),  # noqa: S608 - a constant
            {"version": version},
        )
    with pytest.raises(StoreError, match=said):
        EventStore(url)


def test_eight_processes_may_open_a_new_database_at_once(url: str) -> None:
    together = CONTEXT.Barrier(8)
    processes = [start(open_together, url, together) for _ in range(8)]
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0] * 8
    with EventStore(url) as store:
        assert len(store.interactions_of("product", thread_id="t")) == 8
        with store._engine.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM peerctx_stores")).scalar() == 1


def test_four_threads_may_open_a_new_database_each_at_once(tmp_path: Path) -> None:
    for attempt in range(3):
        together = threading.Barrier(4)

        def open_and_write(number: int, together: threading.Barrier = together) -> int:
            file = tmp_path / f"{attempt}-{number}.db"  # noqa: B023 - the threads end in this turn
            together.wait(30)
            with EventStore(f"sqlite:///{file}") as store:
                store.append("product", order(number))
                return len(store.interactions_of("product", thread_id="t"))

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(open_and_write, range(4))) == [1, 1, 1, 1]


def test_an_existing_database_is_opened_without_alembic(url: str) -> None:
    EventStore(url).close()
    script = (
        "import sys; from langgraph_peerctx.persistence.event_store import EventStore;"
        "EventStore(sys.argv[1]).close(); assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, url], check=True, timeout=60)
