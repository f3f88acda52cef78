"""The first schema: event store and control database."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "barred_keys",
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("sender_id", sa.Text(), nullable=False),
        sa.Column("effect_key", sa.Text(), nullable=False),
        sa.Column("below_epoch", sa.BigInteger(), nullable=False),
        sa.Column("barred_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("agent_id", "sender_id", "effect_key", name=op.f("pk_barred_keys")),
        comment="Effects that agent_id has promised to refuse from epochs below this one.",
    )
    op.create_table(
        "effects",
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Text(), nullable=False),
        sa.Column("effect_key", sa.Text(), nullable=False),
        sa.Column("peer_id", sa.Text(), nullable=True),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("intent_at", sa.BigInteger(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("done_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("scope IN ('run', 'thread')", name=op.f("ck_effects_scope")),
        sa.CheckConstraint(
            "status IN ('intent', 'done', 'not_done')", name=op.f("ck_effects_status")
        ),
        sa.PrimaryKeyConstraint(
            "agent_id", "thread_id", "run_id", "position", "effect_key", name=op.f("pk_effects")
        ),
        comment="Side effects: meant, and what came of them. An intent alone is in doubt.",
    )
    op.create_table(
        "incidents",
        sa.Column("incident_id", sa.Text(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("dead_incarnation", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("recoverer_id", sa.Text(), nullable=True),
        sa.Column("question", sa.Text(), nullable=True),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("result", sa.Text(), nullable=True),
        sa.Column("report", sa.Text(), nullable=True),
        sa.Column("opened_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("next_attempt_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint(
            "status IN ('open', 'recovering', 'waiting_for_human', 'recovered', 'dead_letter')",
            name=op.f("ck_incidents_status"),
        ),
        sa.PrimaryKeyConstraint("incident_id", name=op.f("pk_incidents")),
        sa.UniqueConstraint(
            "agent_id",
            "thread_id",
            "dead_incarnation",
            name=op.f("uq_incidents_agent_id_thread_id_dead_incarnation"),
        ),
        comment="One row a failure: attempts, dead letter, question to a human, result, report.",
    )
    op.create_index(
        "ix_incidents_status_next_attempt_at",
        "incidents",
        ["status", "next_attempt_at"],
        unique=False,
    )
    op.create_table(
        "interactions",
        sa.Column(
            "sequence",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("interaction_id", sa.Text(), nullable=False),
        sa.Column("counterpart_id", sa.Text(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("from_agent", sa.Text(), nullable=False),
        sa.Column("to_agent", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("occurred_at", sa.BigInteger(), nullable=False),
        sa.Column("recorded_at", sa.BigInteger(), nullable=False),
        sa.Column("effect_key", sa.Text(), nullable=True),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("checkpoint_id", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_interactions")),
        sa.UniqueConstraint(
            "agent_id", "interaction_id", name=op.f("uq_interactions_agent_id_interaction_id")
        ),
        comment="What passed between two agents, as agent_id remembers it.",
    )
    op.create_index(
        "ix_interactions_effect",
        "interactions",
        ["agent_id", "effect_key"],
        unique=False,
        sqlite_where=sa.text("effect_key IS NOT NULL"),
        postgresql_where=sa.text("effect_key IS NOT NULL"),
    )
    op.create_index(
        "ix_interactions_pair",
        "interactions",
        [
            "agent_id",
            "counterpart_id",
            "thread_id",
            sa.literal_column("occurred_at DESC"),
            sa.literal_column("sequence DESC"),
        ],
        unique=False,
    )
    op.create_index(
        "ix_interactions_thread",
        "interactions",
        [
            "agent_id",
            "thread_id",
            sa.literal_column("occurred_at DESC"),
            sa.literal_column("sequence DESC"),
        ],
        unique=False,
    )
    op.create_table(
        "leases",
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("owner_id", sa.Text(), nullable=True),
        sa.Column("owner_incarnation", sa.Text(), nullable=True),
        sa.Column("acquired_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("agent_id", "thread_id", name=op.f("pk_leases")),
        comment="Who may write a thread: one row a thread, its epoch rises with each owner.",
    )
    op.create_index("ix_leases_expires_at", "leases", ["expires_at"], unique=False)
    op.create_index("ix_leases_owner_incarnation", "leases", ["owner_incarnation"], unique=False)
    op.create_table(
        "memories",
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("counterpart_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("agent_id", "counterpart_id", name=op.f("pk_memories")),
        comment="What an agent chose to remember of another, beside the interactions.",
    )
    op.create_table(
        "receipts",
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("effect_key", sa.Text(), nullable=False),
        sa.Column("sender_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("reply", sa.Text(), nullable=True),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.Column("done_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("status IN ('open', 'done')", name=op.f("ck_receipts_status")),
        sa.PrimaryKeyConstraint("agent_id", "sender_id", "effect_key", name=op.f("pk_receipts")),
        comment="An effect that arrived at agent_id, recorded before it acts.",
    )
    op.create_table(
        "runs",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("workflow", sa.Text(), nullable=True),
        sa.Column("owner_incarnation", sa.Text(), nullable=True),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("input_type", sa.Text(), nullable=True),
        sa.Column("input", sa.LargeBinary(), nullable=True),
        sa.Column("config", sa.Text(), nullable=True),
        sa.Column("context_type", sa.Text(), nullable=True),
        sa.Column("context", sa.LargeBinary(), nullable=True),
        sa.Column("durability", sa.Text(), nullable=True),
        sa.Column("traceparent", sa.Text(), nullable=True),
        sa.Column("admitted_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.Column("end_kind", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "durability IN ('sync', 'async', 'exit')", name=op.f("ck_runs_durability")
        ),
        sa.CheckConstraint(
            "end_kind IN ('returned', 'raised', 'cancelled', 'handed_over')",
            name=op.f("ck_runs_end_kind"),
        ),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_runs")),
        comment="Every admitted input and how its run ended; a run without an end has crashed.",
    )
    op.create_index(
        "ix_runs_agent_id_thread_id_admitted_at",
        "runs",
        ["agent_id", "thread_id", "admitted_at"],
        unique=False,
    )
    op.create_index("ix_runs_owner_incarnation", "runs", ["owner_incarnation"], unique=False)
    op.create_table(
        "stores",
        sa.Column("store_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("store_id", name=op.f("pk_stores")),
        comment="When this store was made: it knows nothing of what was before.",
    )


def downgrade() -> None:
    """Drop every table."""
    op.drop_table("stores")
    op.drop_index("ix_runs_owner_incarnation", table_name="runs")
    op.drop_index("ix_runs_agent_id_thread_id_admitted_at", table_name="runs")
    op.drop_table("runs")
    op.drop_table("receipts")
    op.drop_table("memories")
    op.drop_index("ix_leases_owner_incarnation", table_name="leases")
    op.drop_index("ix_leases_expires_at", table_name="leases")
    op.drop_table("leases")
    op.drop_index("ix_interactions_thread", table_name="interactions")
    op.drop_index("ix_interactions_pair", table_name="interactions")
    op.drop_index(
        "ix_interactions_effect",
        table_name="interactions",
        sqlite_where=sa.text("effect_key IS NOT NULL"),
        postgresql_where=sa.text("effect_key IS NOT NULL"),
    )
    op.drop_table("interactions")
    op.drop_index("ix_incidents_status_next_attempt_at", table_name="incidents")
    op.drop_table("incidents")
    op.drop_table("effects")
    op.drop_table("barred_keys")
