"""Opening a database with the settings that durability and deadlines need."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Connection as SQLiteConnection
from sqlite3 import OperationalError as SQLiteError
from typing import Any, Literal

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.pool import ConnectionPoolEntry

from langgraph_peerctx.errors import ConfigurationError

Synchronous = Literal["NORMAL", "FULL"]

POOL_SIZE = 8
"""Connections of one store: more threads than these would only wait for each other."""

_EXPECTED = "expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
_SQLITE = ("sqlite", "sqlite+pysqlite")
_POSTGRESQL = ("postgresql", "postgresql+psycopg")
_SECRETS = ("password", "sslpassword")


def connect(
    url: str,
    *,
    timeout_seconds: float = 5.0,
    synchronous: Synchronous = "NORMAL",
    as_it_is: bool = False,
) -> Engine:
    """Return an engine for a database; nothing is opened yet.

    Every statement commits by itself; `writing` makes a transaction of several. The pool opens
    no more connections than `POOL_SIZE`.

    Args:
        url: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`.
        timeout_seconds: How long a lock, a connection or a statement may take.
        synchronous: SQLite only. `NORMAL` keeps every committed row through a killed process;
            `FULL` through a power loss too, for about 0.13 ms a commit.
        as_it_is: SQLite only. Neither make the file nor change its journal mode: to look at it.

    Raises:
        ConfigurationError: If the URL is none of these, or its driver is not installed.
    """
    address = _address(url)
    if address.drivername in _SQLITE:
        return _sqlite(address, timeout_seconds, synchronous, as_it_is=as_it_is)
    return _postgresql(address, timeout_seconds)


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One transaction that is going to write: on SQLite it takes the lock at its start.

    A transaction that reads first and writes then fails at once under contention, whatever the
    busy timeout.
    """
    begin = "BEGIN IMMEDIATE" if engine.dialect.name == "sqlite" else "BEGIN"
    with engine.begin() as connection:
        connection.exec_driver_sql(begin)
        yield connection


def name_of(engine: Engine) -> str:
    """Return the database's address without its secrets."""
    file = file_of(engine)
    if file is not None:
        return f"sqlite:///{file}"
    return engine.url.difference_update_query(_SECRETS).render_as_string(hide_password=True)


def file_of(engine: Engine) -> Path | None:
    """Return an SQLite database's file; None for a server."""
    name = engine.url.database
    if engine.dialect.name != "sqlite" or name is None:
        return None
    return Path(name.removeprefix("file:"))


def _address(url: str) -> URL:
    try:
        address = make_url(url)
        _see_that_a_system_can_take(address)
    except (ArgumentError, ValueError):
        raise ConfigurationError(f"the database URL is unreadable: {_EXPECTED}") from None
    if address.drivername in _POSTGRESQL:
        return address.set(drivername="postgresql+psycopg")
    if address.drivername in _SQLITE:
        return _sqlite_address(address)
    raise ConfigurationError(f"{address.drivername!r:.40} is no database of ours: {_EXPECTED}")


def _see_that_a_system_can_take(address: URL) -> None:
    for part in (address.database, address.host, address.username, address.password):
        if part is not None and b"\0" in part.encode():
            raise ValueError("NUL")


def _sqlite_address(address: URL) -> URL:
    name = (address.database or "").removeprefix("file:")
    if name in ("", ":memory:") or address.query.get("mode") == "memory":
        raise ConfigurationError(
            "an SQLite database in memory belongs to one connection and dies with it: name a file, "
            "sqlite:///FILE"
        )
    # A pooled connection that is opened after a chdir must open the same file.
    prefix = "file:" if address.query.get("uri") == "true" else ""
    return address.set(database=f"{prefix}{Path(name).absolute()}")


def _sqlite(
    address: URL, timeout_seconds: float, synchronous: Synchronous, *, as_it_is: bool
) -> Engine:
    if as_it_is and address.query.get("uri") != "true":
        address = address.set(database=f"file:{address.database}")
        address = address.update_query_dict({"uri": "true", "mode": "rw"})
    engine = _engine(address, timeout_seconds, connect_args={"timeout": timeout_seconds})
    if as_it_is:
        return engine

    @event.listens_for(engine, "connect", insert=True)
    def _prepare(connection: SQLiteConnection, _record: ConnectionPoolEntry) -> None:
        _write_ahead(connection, timeout_seconds)
        connection.execute(f"PRAGMA synchronous={synchronous}").close()

    return engine


def _write_ahead(connection: SQLiteConnection, timeout_seconds: float) -> None:
    """Switch the file to WAL: readers and the writer then do not wait for each other."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
        except SQLiteError as error:
            # The switch itself ignores the busy timeout when two processes open a new file.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _postgresql(address: URL, timeout_seconds: float) -> Engine:
    try:
        from langgraph_peerctx.persistence.postgresql import (  # noqa: PLC0415 - an optional extra
            connecting,
        )

        engine = _engine(address, timeout_seconds)
    except (ModuleNotFoundError, NoSuchModuleError):
        raise ConfigurationError(
            "PostgreSQL needs an extra: pip install 'langgraph-peerctx[postgres]'"
        ) from None
    event.listen(engine, "do_connect", connecting(timeout_seconds))
    return engine


def _engine(address: URL, timeout_seconds: float, **options: Any) -> Engine:
    try:
        return create_engine(
            address,
            isolation_level="AUTOCOMMIT",  # set once: at each checkout it costs more than a query
            pool_size=POOL_SIZE,
            max_overflow=0,
            pool_timeout=timeout_seconds,
            hide_parameters=True,  # what agents remember belongs into no traceback
            **options,
        )
    except ValueError as error:
        raise ConfigurationError(f"an option in the database URL is wrong: {error}") from None
