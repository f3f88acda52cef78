"""Looking at a database without changing it: what `peerctx doctor` says of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from sqlalchemy import Connection, Engine, func, select, text

from langgraph_peerctx.errors import PeerContextError, StoreBusyError
from langgraph_peerctx.persistence.engine import connect, file_of, name_of
from langgraph_peerctx.persistence.faults import translated
from langgraph_peerctx.persistence.migrations import HEAD
from langgraph_peerctx.persistence.schema import metadata
from langgraph_peerctx.persistence.upgrade import schema_version

COUNT_LIMIT = 10_000
"""Rows are counted up to here: a doctor does not read ten million of them."""

_MAY_WRITE = text(
    "SELECT current_setting('transaction_read_only') = 'off'"
    " AND has_table_privilege('peerctx_interactions', 'INSERT')"
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
        rows: Rows by table; `COUNT_LIMIT` means so many or more.
        problems: What is wrong, and what to do about it: one sentence each.
    """

    name: str = ""
    exists: bool = True
    reachable: bool = False
    schema_version: str | None = None
    at_head: bool = False
    writable: bool | None = None
    wal: bool | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def describe_database(url: str, *, timeout_seconds: float = 5.0) -> DatabaseState:
    """Look at a database; nothing is made, changed or raised.

    Args:
        url: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`.
        timeout_seconds: How long each look may take.
    """
    try:
        engine = connect(url, timeout_seconds=timeout_seconds, as_it_is=True)
    except PeerContextError as error:
        return DatabaseState(problems=(str(error),))
    try:
        return _missing_file(engine) or _look(engine)
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


def _look(engine: Engine) -> DatabaseState:
    """Look at one thing after the other, up to the first that cannot be seen."""
    state = DatabaseState(name=name_of(engine))
    try:
        for look in (_at_version, _at_contents, _at_writing):
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
        rows = _rows(connection) if state.at_head else {}
        state = replace(state, rows=rows, wal=_wal(connection))
    if state.wal is False and state.at_head:
        return _with_problem(state, f"{state.name} is not in WAL mode: open a store on it once")
    return state


def _at_writing(engine: Engine, state: DatabaseState) -> DatabaseState:
    state = replace(state, writable=_writable(engine, state))
    if state.writable is False:
        return _with_problem(state, f"{state.name} is read-only for this user: grant INSERT")
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


def _writable(engine: Engine, state: DatabaseState) -> bool | None:
    """Tell whether a row could be written; on SQLite by writing, and taking it back.

    Raises:
        StoreError: If SQLite says why not.
    """
    if engine.dialect.name == "sqlite":
        return _written_and_taken_back(engine)
    if not state.at_head:
        return None
    with translated(engine), engine.connect() as connection:
        return bool(connection.execute(_MAY_WRITE).scalar_one())


def _written_and_taken_back(engine: Engine) -> Literal[True]:
    with translated(engine), engine.connect() as connection:
        # Of a file that may only be read, BEGIN IMMEDIATE alone makes a reading transaction.
        for statement in ("BEGIN IMMEDIATE", "PRAGMA user_version=0", "ROLLBACK"):
            connection.exec_driver_sql(statement)
    return True
