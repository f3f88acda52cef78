"""Runs the migrations on the connection that `upgrade.upgrade` hands over."""

from alembic import context

from langgraph_peerctx.persistence.migrations import VERSION_TABLE
from langgraph_peerctx.persistence.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transaction_per_migration=False,
)
context.run_migrations()
