"""Database errors, translated once: which database, what happened, what to do about it."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from langgraph_peerctx.errors import StoreBusyError, StoreError
from langgraph_peerctx.persistence.engine import file_of, name_of

_PRIMARY = 0xFF
"""SQLite's extended error codes carry the primary one in their lowest byte."""

_BUSY: frozenset[int | str | None] = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        "57014",  # statement timeout
        "55P03",  # lock timeout
        "53300",  # too many connections
        "57P03",  # starting up or shutting down
        "40001",  # serialization failure
        "40P01",  # deadlock
    }
)
_ROOM = "see that there is room on the disk; earlier events are intact"
_INCOMPLETE = "its schema is incomplete: restore the database, or name another"
_UNREACHABLE = "see that the server runs and can be reached, and the user and password in the URL"
_REMEDIES: dict[int | str | None, str] = {
    sqlite3.SQLITE_CANTOPEN: "see that the folder {folder} exists and may be written",
    sqlite3.SQLITE_READONLY: "see that the file and its folder {folder} may be written",
    sqlite3.SQLITE_NOTADB: "the file is no SQLite database: name another one",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: restore it, nothing was written over it",
    sqlite3.SQLITE_FULL: _ROOM,
    sqlite3.SQLITE_IOERR: "see the disk: room, permissions, health",
    sqlite3.SQLITE_ERROR: _INCOMPLETE,
    "25006": "the server is read-only: name the primary",
    "42501": "grant this user the right to create and write tables",
    "42P01": _INCOMPLETE,
    "42P07": "tables of our names are there without our schema version: name another database",
    "53100": _ROOM,
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
    return _code(error) in _BUSY


def _remedy(engine: Engine, error: SQLAlchemyError) -> str:
    code, file = _code(error), file_of(engine)
    if code is None and isinstance(error, OperationalError):
        return _UNREACHABLE  # a connection that failed has no SQLSTATE
    remedy = _REMEDIES.get(code, "see `peerctx doctor`")
    return remedy.format(folder=file.parent if file else "")


def _code(error: SQLAlchemyError) -> int | str | None:
    """Return SQLite's primary error code, or PostgreSQL's SQLSTATE."""
    origin = error.orig if isinstance(error, DBAPIError) else None
    if isinstance(origin, sqlite3.Error):
        return getattr(origin, "sqlite_errorcode", 0) & _PRIMARY  # the module's own have none
    state: str | None = getattr(origin, "sqlstate", None)
    return state


def _said(error: SQLAlchemyError) -> str:
    text = str(error.orig if isinstance(error, DBAPIError) else error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
