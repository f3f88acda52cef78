"""Database errors, translated once: which database, what happened, what to do about it."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from langgraph_peerctx.errors import StoreBusyError, StoreError
from langgraph_peerctx.persistence.engine import file_of, name_of

_ROOM = "see that there is room on the disk: earlier events are intact"
_INCOMPLETE = "its schema is incomplete: restore the database, or name another"
_REACH = "see that the server runs and can be reached, and the user and password in the URL"

_SQLITE_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_SQLITE_REMEDIES = {
    sqlite3.SQLITE_CANTOPEN: "see that the folder {folder} exists and may be written",
    sqlite3.SQLITE_READONLY: "see that the file and its folder {folder} may be written",
    sqlite3.SQLITE_NOTADB: "the file is no SQLite database: name another one",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: restore it, nothing was written over it",
    sqlite3.SQLITE_FULL: _ROOM,
    sqlite3.SQLITE_IOERR: "see the disk: room, permissions, health",
    sqlite3.SQLITE_ERROR: _INCOMPLETE,
}
_POSTGRESQL_BUSY = (
    "57014",  # statement timeout
    "55P03",  # lock timeout
    "53300",  # too many connections
    "57P03",  # starting up or shutting down
    "40001",  # serialization failure
    "40P01",  # deadlock
)
_POSTGRESQL_REMEDIES = {
    "25006": "the server is read-only: name the primary",
    "42501": "grant this user the right to create and write tables",
    "42P01": _INCOMPLETE,
    "42P07": "tables of this name are there without our schema version: name another database",
    "53100": _ROOM,
    "3D000": "create the database",
    None: _REACH,
}


@contextmanager
def translated(engine: Engine) -> Iterator[None]:
    """Turn what SQLAlchemy raises into `StoreError`s that name the database and the remedy."""
    try:
        yield
    except SQLAlchemyError as error:
        raise store_error(engine, error) from error


def store_error(engine: Engine, error: SQLAlchemyError) -> StoreError:
    """Return an error of ours for one of SQLAlchemy's."""
    where = name_of(engine)
    if isinstance(error, PoolTimeoutError):
        return StoreBusyError(f"{where}: every connection is in use: try again")
    if is_busy(error):
        return StoreBusyError(f"{where} did not answer in time ({_said(error)}): try again")
    return StoreError(f"{where}: {_said(error)}: {_remedy(engine, error)}")


def is_busy(error: SQLAlchemyError) -> bool:
    """Tell whether the database is there and well, and only too slow for us."""
    code = _code(error)
    return code in _POSTGRESQL_BUSY or code in _SQLITE_BUSY


def _remedy(engine: Engine, error: SQLAlchemyError) -> str:
    code = _code(error)
    if not isinstance(error, DBAPIError):
        return "see `peerctx doctor`"
    file = file_of(engine)
    if file is None:
        return _POSTGRESQL_REMEDIES.get(None if code is None else str(code), "see `peerctx doctor`")
    remedy = _SQLITE_REMEDIES.get(code if isinstance(code, int) else 0, "see `peerctx doctor`")
    return remedy.format(folder=file.parent)


def _code(error: SQLAlchemyError) -> int | str | None:
    """Return SQLite's primary error code, or PostgreSQL's SQLSTATE."""
    origin = error.orig if isinstance(error, DBAPIError) else None
    if isinstance(origin, sqlite3.Error):
        return getattr(origin, "sqlite_errorcode", 0) & 0xFF  # errors of the module have none
    state: str | None = getattr(origin, "sqlstate", None)
    return state


def _said(error: SQLAlchemyError) -> str:
    text = str(error.orig if isinstance(error, DBAPIError) else error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
