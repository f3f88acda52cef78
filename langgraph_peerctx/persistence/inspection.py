"""Looking at a database without changing it: what `peerctx doctor` says of it."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Literal, NamedTuple

from sqlalchemy import Connection, Engine, func, select, text

from langgraph_peerctx.errors import PeerContextError, StoreBusyError
from langgraph_peerctx.persistence.engine import connect, file_of, name_of
from langgraph_peerctx.persistence.faults import translated
from langgraph_peerctx.persistence.migrations import HEAD
from langgraph_peerctx.persistence.runs import IS_OPEN
from langgraph_peerctx.persistence.schema import incidents, metadata, runs
from langgraph_peerctx.persistence.upgrade import schema_version

UNKNOWN_WORKFLOW = "unknown_workflow"
"""An incident's result where no supervisor that saw it knows its workflow."""
COUNT_LIMIT = 10_000
"""Rows are counted up to here: a doctor does not read ten million of them."""

_IS_READ_ONLY = text("SELECT current_setting('transaction_read_only') = 'on'")
_MAY = text("SELECT has_table_privilege(:table, :privilege)")
_CLOCK = text("SELECT extract(epoch from clock_timestamp())")


class Need(NamedTuple):
    """What a database's user must be allowed to do."""

    privilege: Literal["INSERT", "UPDATE"]
    table: str


EVENT_STORE_NEEDS: Final = (Need("INSERT", "peerctx_interactions"),)
CONTROL_NEEDS: Final = (
    *(
        Need(privilege, table)
        for table in ("peerctx_leases", "peerctx_runs", "peerctx_incidents")
        for privilege in ("INSERT", "UPDATE")
    ),
    Need("INSERT", "peerctx_run_inputs"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseState:
    """What was found at a database's address.

    Attributes:
        name: The address without its password; empty if it is unreadable.
        exists: Whether there is a database. A missing SQLite file is made when a store opens it.
        reachable: Whether it answered.
        schema_version: None where there is no schema yet; a store makes it when it opens.
        at_head: Whether the schema is this release's.
        writable: Whether a row could be written now; None if nobody could tell.
        wal: Whether an SQLite file is in WAL mode; None on a server.
        clock_ahead_seconds: A server's clock against ours; None for a file, which has none.
        rows: Rows by table; `COUNT_LIMIT` means so many or more.
        open_runs: Runs that have not ended, counted up to the same.
        incidents: How many by status.
        unsupervised: Of those that are open, how many because nobody supervises their workflow;
            counted up to the same.
        problems: What is wrong, and what to do about it: one sentence each.
    """

    name: str = ""
    exists: bool = True
    reachable: bool = False
    schema_version: str | None = None
    at_head: bool = False
    writable: bool | None = None
    wal: bool | None = None
    clock_ahead_seconds: float | None = field(default=None, compare=False)
    rows: Mapping[str, int] = field(default_factory=dict)
    open_runs: int = 0
    incidents: Mapping[str, int] = field(default_factory=dict)
    unsupervised: int = 0
    problems: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def describe_database(
    url: str, *, timeout_seconds: float = 5.0, needs: Sequence[Need] = EVENT_STORE_NEEDS
) -> DatabaseState:
    """Look at a database; nothing is made, changed or raised.

    Args:
        url: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`.
        timeout_seconds: How long each look may take.
        needs: What its user must be allowed to do; of a file everything is asked at once.
    """
    try:
        engine = connect(url, timeout_seconds=timeout_seconds, as_it_is=True)
    except PeerContextError as error:
        return DatabaseState(problems=(str(error),))
    try:
        return _missing_file(engine) or _look(engine, needs)
    finally:
        engine.dispose()


def has_schema(url: str, *, timeout_seconds: float = 5.0) -> bool:
    """Tell whether a store was ever opened at an address; nothing is made or changed.

    Args:
        url: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`.
        timeout_seconds: How long each look may take.

    Raises:
        ConfigurationError: If the URL is wrong, or a driver is missing.
        StoreError: If the database is there and cannot be read.
    """
    engine = connect(url, timeout_seconds=timeout_seconds, as_it_is=True)
    try:
        missing = _missing_file(engine)
        return missing is None and schema_version(engine) is not None
    finally:
        engine.dispose()


def _missing_file(engine: Engine) -> DatabaseState | None:
    file = file_of(engine)
    if file is None:
        return None
    missing = DatabaseState(name=name_of(engine), exists=False)
    try:
        if file.exists():
            return None
        if file.parent.is_dir():
            return missing
    except OSError as error:  # a name that is too long, a folder that may not be entered
        return _with_problem(missing, f"{file}: {error.strerror}: name another file")
    return _with_problem(missing, f"{file.parent} does not exist: make it, or name another file")


def _look(engine: Engine, needs: Sequence[Need]) -> DatabaseState:
    """Look at one thing after the other, up to the first that cannot be seen."""
    state = DatabaseState(name=name_of(engine))
    try:
        for look in (_at_version, _at_contents, partial(_at_writing, needs)):
            state = look(engine, state)
    except StoreBusyError as error:
        return replace(_with_problem(state, str(error)), reachable=True)
    except PeerContextError as error:
        return _with_problem(state, str(error))
    return state


def _at_version(engine: Engine, state: DatabaseState) -> DatabaseState:
    version = schema_version(engine)
    return replace(state, reachable=True, schema_version=version, at_head=version == HEAD)


def _at_contents(engine: Engine, state: DatabaseState) -> DatabaseState:
    with translated(engine), engine.connect() as connection:
        state = replace(state, wal=_wal(connection), clock_ahead_seconds=_clock(connection))
        if state.at_head:
            state = replace(
                state,
                rows=_rows(connection),
                open_runs=_open_runs(connection),
                incidents=_incidents(connection),
                unsupervised=_unsupervised(connection),
            )
    if state.wal is False and state.at_head:
        return _with_problem(state, f"{state.name} is not in WAL mode: open a store on it once")
    return state


def _at_writing(needs: Sequence[Need], engine: Engine, state: DatabaseState) -> DatabaseState:
    if engine.dialect.name == "sqlite":
        return replace(state, writable=_written_and_taken_back(engine))
    if not state.at_head:
        return state
    refused = _refused(engine, needs)
    state = replace(state, writable=not refused)
    if refused:
        problem = f"{state.name} is read-only for this user: grant {', '.join(refused)}"
        return _with_problem(state, problem)
    return state


def _with_problem(state: DatabaseState, problem: str) -> DatabaseState:
    return replace(state, problems=(*state.problems, problem))


def _wal(connection: Connection) -> bool | None:
    if connection.dialect.name != "sqlite":
        return None
    return connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def _rows(connection: Connection) -> dict[str, int]:
    counts = {}
    for table in metadata.sorted_tables:
        some = select(text("1")).select_from(table).limit(COUNT_LIMIT).subquery()
        counts[table.name] = connection.execute(select(func.count()).select_from(some)).scalar_one()
    return counts


def _open_runs(connection: Connection) -> int:
    some = select(text("1")).select_from(runs).where(IS_OPEN).limit(COUNT_LIMIT).subquery()
    return connection.execute(select(func.count()).select_from(some)).scalar_one()


def _incidents(connection: Connection) -> dict[str, int]:
    counting = select(incidents.c.status, func.count().label("number")).group_by(incidents.c.status)
    return {row.status: row.number for row in connection.execute(counting)}


def _unsupervised(connection: Connection) -> int:
    is_so = (incidents.c.status == "open") & incidents.c.result.contains(UNKNOWN_WORKFLOW)
    some = select(incidents.c.result).where(is_so).limit(COUNT_LIMIT)
    results = (json.loads(row.result) for row in connection.execute(some))
    return sum(result.get("status") == UNKNOWN_WORKFLOW for result in results)


def _clock(connection: Connection) -> float | None:
    if connection.dialect.name == "sqlite":
        return None
    asked = time.time()
    told = float(connection.execute(_CLOCK).scalar_one())
    return told - (asked + time.time()) / 2


def _refused(engine: Engine, needs: Sequence[Need]) -> list[str]:
    """Return what a server would not let us do."""
    with translated(engine), engine.connect() as connection:
        if connection.execute(_IS_READ_ONLY).scalar_one():
            return [f"{need.privilege} on {need.table}" for need in needs]
        return [
            f"{need.privilege} on {need.table}"
            for need in needs
            if not connection.execute(_MAY, need._asdict()).scalar_one()
        ]


def _written_and_taken_back(engine: Engine) -> Literal[True]:
    with translated(engine), engine.connect() as connection:
        # Of a file that may only be read, BEGIN IMMEDIATE alone makes a reading transaction.
        for statement in ("BEGIN IMMEDIATE", "PRAGMA user_version=0", "ROLLBACK"):
            connection.exec_driver_sql(statement)
    return True
