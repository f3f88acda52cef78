"""Bringing a database's schema to this release."""

from pathlib import Path

from sqlalchemy import Connection, Engine, text

from langgraph_peerctx.errors import StoreError
from langgraph_peerctx.persistence.engine import name_of, writing
from langgraph_peerctx.persistence.faults import translated
from langgraph_peerctx.persistence.migrations import HEAD, VERSION_TABLE

_LOCK = text("SELECT pg_advisory_xact_lock(7033721004116885555)")
"""Around migrations on PostgreSQL: any number that nobody else uses."""
_VERSION = text(f"SELECT version_num FROM {VERSION_TABLE}")  # noqa: S608 - a constant


def upgrade(engine: Engine) -> None:
    """Bring a database's schema to this release, all or nothing.

    Any number of processes may do it at once: one does the work, the others wait for it.

    Raises:
        StoreError: If the schema is none that this release knows, or the database fails.
    """
    if schema_version(engine) == HEAD:
        return
    with translated(engine), writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(_LOCK)
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


def _migrate(connection: Connection) -> None:
    # 100 ms that only a new database costs.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    config = Config(attributes={"connection": connection})
    folder = Path(__file__).with_name("migrations")
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise StoreError(
            f"{name_of(connection.engine)}: {error}: restore the database, or name another"
        ) from error
