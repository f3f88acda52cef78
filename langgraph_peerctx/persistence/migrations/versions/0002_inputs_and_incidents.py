"""Where a thread stood when an input came, and incidents by run."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what tells whether an answer was used, and finds a run's incident."""
    op.add_column("peerctx_run_inputs", sa.Column("checkpoint_id", sa.Text(), nullable=True))
    op.create_index(
        "ix_peerctx_incidents_run", "peerctx_incidents", ["agent_id", "thread_id", "run_id"]
    )


def downgrade() -> None:
    """Take both back."""
    op.drop_index("ix_peerctx_incidents_run", "peerctx_incidents")
    op.drop_column("peerctx_run_inputs", "checkpoint_id")
