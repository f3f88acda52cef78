"""How an effect that was in doubt is settled, who takes effects by their keys, and lost ledgers."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what settling needs."""
    op.create_table(
        "peerctx_receivers",
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("since", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("agent_id", name="pk_peerctx_receivers"),
        comment="Agents that take effects by their keys alone: what has no receipt did not arrive.",
    )
    for name in ("if_unknown", "source", "unknown_to"):
        op.add_column("peerctx_effects", sa.Column(name, sa.Text(), nullable=True))
    for name in ("has_check", "retried"):
        op.add_column(
            "peerctx_effects",
            sa.Column(name, sa.Integer(), nullable=False, server_default=sa.text("0")),
        )
    op.add_column("peerctx_effects", sa.Column("unknown_at", sa.BigInteger(), nullable=True))
    op.add_column("peerctx_runs", sa.Column("doubted_since", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    """Take it back."""
    op.drop_column("peerctx_runs", "doubted_since")
    for name in ("unknown_at", "retried", "has_check", "unknown_to", "source", "if_unknown"):
        op.drop_column("peerctx_effects", name)
    op.drop_table("peerctx_receivers")
