"""Bringing a database's schema to this release."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, text

from langgraph_peerctx.errors import StoreError
from langgraph_peerctx.persistence.engine import name_of, writing
from langgraph_peerctx.persistence.faults import translated
from langgraph_peerctx.persistence.migrations import HEAD, VERSION_TABLE

_LOCK = text("SELECT pg_advisory_xact_lock(7033721004116885555)")
"""Around migrations on PostgreSQL: any number that nobody else uses."""
TIMEOUT_SECONDS = 600.0
"""How long an upgrade, or waiting for another process's, may take on PostgreSQL: an index over ten
million rows is no query."""

_VERSION = text(f"SELECT version_num FROM {VERSION_TABLE}")  # noqa: S608 - a constant


def upgrade(engine: Engine) -> None:
    """Bring a database's schema to this release, all or nothing.

    Any number of processes and threads may do it at once: one does the work, the others wait.

    Raises:
        StoreError: If the schema is none that this release knows, or the database fails.
    """
    if schema_version(engine) == HEAD:
        return
    with translated(engine), writing(engine) as connection, _alone(connection):
        if _known_version(connection) != HEAD:
            _migrate(connection)


def schema_version(engine: Engine) -> str | None:
    """Return the schema's version, or None where there is no schema yet.

    Raises:
        StoreError: If it is none that this release knows, or the database fails.
    """
    with translated(engine), engine.connect() as connection:
        return _known_version(connection)


def _known_version(connection: Connection) -> str | None:
    if not connection.dialect.has_table(connection, VERSION_TABLE):
        return None
    version: str | None = connection.execute(_VERSION).scalar()
    if version is not None and version > HEAD:
        raise StoreError(
            f"{name_of(connection.engine)} has schema {version!r:.40}, this release knows {HEAD}: "
            "install the release that made it"
        )
    return version


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Let nobody else upgrade this database, and take the time that it needs.

    On SQLite the transaction itself is the lock.
    """
    if connection.dialect.name != "postgresql":
        yield
        return
    from langgraph_peerctx.persistence.postgresql import patience  # noqa: PLC0415 - an extra

    with patience(connection, TIMEOUT_SECONDS):
        connection.execute(_LOCK)
        yield


_in_this_process = threading.Lock()
"""Alembic hands connection and script to a migration through globals of the process."""


def _unlock_in_a_forked_child() -> None:
    global _in_this_process  # noqa: PLW0603 - a thread that the child does not have may hold it
    _in_this_process = threading.Lock()


os.register_at_fork(after_in_child=_unlock_in_a_forked_child)


def _migrate(connection: Connection) -> None:
    # 100 ms that only a new database costs.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    config = Config(attributes={"connection": connection})
    folder = Path(__file__).with_name("migrations")
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    try:
        with _in_this_process:
            command.upgrade(config, "head")
    except CommandError as error:
        raise StoreError(
            f"{name_of(connection.engine)}: {error}: restore the database, or name another"
        ) from error
