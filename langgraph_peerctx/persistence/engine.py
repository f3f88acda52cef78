"""Opening a database: the right settings, the right schema, and errors that say what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DBAPIError,
    NoSuchModuleError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from langgraph_peerctx.errors import ConfigurationError, StoreBusyError, StoreError
from langgraph_peerctx.persistence.migrations import HEAD, VERSION_TABLE

Synchronous = Literal["NORMAL", "FULL"]

_MIGRATION_LOCK = 7_033_721_004_116_885_555
"""The key of PostgreSQL's advisory lock around migrations: any number that nobody else uses."""
_BUSY = ("locked", "busy", "statement timeout", "lock timeout", "too many clients")


def connect(
    url: str,
    *,
    timeout_seconds: float = 5.0,
    synchronous: Synchronous = "NORMAL",
    reading: bool = False,
) -> Engine:
    """Return an engine for a database; nothing is opened yet.

    Args:
        url: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`.
        timeout_seconds: How long a lock, a connection or a statement may take.
        synchronous: SQLite only. `NORMAL` keeps every committed row through a killed process;
            `FULL` through a power loss too, for about 0.13 ms a commit.
        reading: For single statements that only read: no transaction is opened around them, which
            makes a small query three times as fast.

    Raises:
        ConfigurationError: If the URL is none of these, or its driver is not installed.
    """
    address = _address(url)
    if address.get_backend_name() == "sqlite":
        return _sqlite(address, timeout_seconds, synchronous, _mode(reading=reading))
    return _postgresql(address, timeout_seconds, _mode(reading=reading))


def migrate(engine: Engine) -> None:
    """Bring a database's schema to this release; any number of processes may do it at once.

    Raises:
        StoreError: If the schema is a later release's, or the database fails.
    """
    with translated(engine), engine.connect() as connection:
        if _version(connection) == HEAD:
            return
    with translated(engine), writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        if _version(connection) != HEAD:
            _upgrade(connection)


def schema_version(engine: Engine) -> str | None:
    """Return the schema's version, or None where there is no schema yet."""
    with translated(engine), engine.connect() as connection:
        return _version(connection)


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One transaction that is going to write: on SQLite it takes the lock at its start.

    A transaction that reads first and writes then fails at once under contention, whatever the
    busy timeout.
    """
    with engine.execution_options(peerctx_writes=True).begin() as connection:
        yield connection


@contextmanager
def translated(engine: Engine) -> Iterator[None]:
    """Turn the driver's errors into `StoreError`s that name the database and the remedy."""
    try:
        yield
    except PoolTimeoutError as error:
        raise StoreBusyError(f"{name_of(engine)}: every connection is in use") from error
    except SQLAlchemyError as error:
        raise _store_error(engine, error) from error


def name_of(engine: Engine) -> str:
    """Return the database's address without its password."""
    return engine.url.render_as_string(hide_password=True)


def _mode(*, reading: bool) -> dict[str, Any]:
    # An engine of its own: setting the isolation level at each checkout costs more than the query.
    return {"isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None} if reading else {}


def _address(url: str) -> URL:
    try:
        address = make_url(url)
    except ArgumentError:
        raise ConfigurationError(
            "the database URL is unreadable: expected sqlite:///FILE or "
            "postgresql://USER:PASSWORD@HOST/NAME"
        ) from None
    if address.drivername in ("postgresql", "postgres"):
        return address.set(drivername="postgresql+psycopg")
    if address.drivername == "sqlite" and address.database in (None, "", ":memory:"):
        raise ConfigurationError(
            "an SQLite database in memory belongs to one connection and dies with it: name a file, "
            "sqlite:///FILE"
        )
    return address


def _sqlite(
    address: URL, timeout_seconds: float, synchronous: Synchronous, mode: dict[str, Any]
) -> Engine:
    engine = create_engine(
        address, connect_args={"timeout": timeout_seconds}, pool_timeout=timeout_seconds, **mode
    )

    @event.listens_for(engine, "connect", insert=True)
    def _prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are ours: the driver's begin too late
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute(f"PRAGMA synchronous={synchronous}")
        cursor.close()

    if not mode:

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            writes = connection.get_execution_options().get("peerctx_writes", False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(address: URL, timeout_seconds: float, mode: dict[str, Any]) -> Engine:
    milliseconds = int(timeout_seconds * 1_000)
    try:
        return create_engine(
            address,
            pool_pre_ping=True,
            pool_timeout=timeout_seconds,
            connect_args={
                "connect_timeout": max(2, int(timeout_seconds)),
                "options": f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}",
                "tcp_user_timeout": milliseconds,
            },
            **mode,
        )
    except (ModuleNotFoundError, NoSuchModuleError):
        raise ConfigurationError(
            "PostgreSQL needs an extra: pip install 'langgraph-peerctx[postgres]'"
        ) from None


def _version(connection: Connection) -> str | None:
    if not connection.dialect.has_table(connection, VERSION_TABLE):
        return None
    version = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608 - a constant
    if version is not None and version > HEAD:
        raise StoreError(
            f"{name_of(connection.engine)} has schema {version}, this release knows {HEAD}: "
            "install the release that made it"
        )
    return version


def _upgrade(connection: Connection) -> None:
    from alembic import command  # noqa: PLC0415 - 100 ms that only a new database costs
    from alembic.config import Config  # noqa: PLC0415 - the same

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    command.upgrade(config, "head")


def _store_error(engine: Engine, error: SQLAlchemyError) -> StoreError:
    said = str(error.orig if isinstance(error, DBAPIError) else error).strip()
    reason = said.splitlines()[0][:200] if said else type(error).__name__
    where = name_of(engine)
    lowered = said.lower()
    if any(word in lowered for word in _BUSY):
        return StoreBusyError(f"{where} did not answer in time ({reason}): try again")
    if isinstance(error, DBAPIError) and isinstance(error, DatabaseError):
        return StoreError(f"{where}: {reason}: {_remedy(engine, lowered)}")
    return StoreError(f"{where}: {reason}")


def _remedy(engine: Engine, said: str) -> str:
    remedies = {
        "unable to open": f"see that the folder {_folder(engine)} exists and may be written",
        "readonly": "see that the file and its folder may be written",
        "not a database": "this file is something else: name another one",
        "malformed": "the file is damaged: restore it, nothing was changed",
        "disk": "see that there is room",
        "full": "see that there is room",
        "password": "see the user and the password in the URL",
        "connect": "see that the server runs and can be reached",
    }
    for word, remedy in remedies.items():
        if word in said:
            return remedy
    return "see `peerctx doctor`"


def _folder(engine: Engine) -> str:
    return str(Path(engine.url.database or ".").absolute().parent)


class Forked:
    """Refuses to go on in a forked child: SQLite files and sockets must not cross a fork."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def check(self) -> None:
        """Raise in a child.

        Raises:
            StoreError: If this process is not the one that opened the database.
        """
        if os.getpid() != self._pid:
            raise StoreError(
                "this store was opened before the process forked: open a new one in the child"
            )
