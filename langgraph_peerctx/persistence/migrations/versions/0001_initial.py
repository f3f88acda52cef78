"""The first schema: event store and control database. `schema.py` says what each table is for."""

import time
import uuid
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make every table, and note when."""
    _stores()
    _interactions()
    _memories()
    _receipts()
    _barred_keys()
    _leases()
    _runs()
    _run_inputs()
    _effects()
    _incidents()


def downgrade() -> None:
    """Drop every table; its indexes go with it."""
    for name in (
        "incidents",
        "effects",
        "run_inputs",
        "runs",
        "leases",
        "barred_keys",
        "receipts",
        "memories",
        "interactions",
        "stores",
    ):
        op.drop_table(f"peerctx_{name}")


def _stores() -> None:
    table = op.create_table(
        "peerctx_stores",
        _text("store_id"),
        _number("created_at"),
        sa.PrimaryKeyConstraint("store_id", name="pk_peerctx_stores"),
        comment="When this store was made: it knows nothing of what was before.",
    )
    born = {"store_id": uuid.uuid4().hex, "created_at": time.time_ns() // 1_000}
    op.bulk_insert(table, [born])


def _interactions() -> None:
    op.create_table(
        "peerctx_interactions",
        sa.Column("sequence", _ROW_NUMBER, autoincrement=True, nullable=False),
        _text("agent_id"),
        _text("interaction_id"),
        _text("counterpart_id"),
        _text("thread_id"),
        _text("from_agent"),
        _text("to_agent"),
        _text("kind"),
        _text("payload"),
        _number("occurred_at"),
        _number("recorded_at"),
        _text("effect_key", nullable=True),
        _text("run_id", nullable=True),
        _text("checkpoint_id", nullable=True),
        sa.PrimaryKeyConstraint("sequence", name="pk_peerctx_interactions"),
        sa.UniqueConstraint(
            "agent_id", "interaction_id", name="uq_peerctx_interactions_agent_id_interaction_id"
        ),
        comment="What passed between two agents, as agent_id remembers it.",
    )
    op.create_index(
        "ix_peerctx_interactions_pair",
        "peerctx_interactions",
        ["agent_id", "counterpart_id", "thread_id", "occurred_at", "sequence"],
    )
    op.create_index(
        "ix_peerctx_interactions_thread",
        "peerctx_interactions",
        ["agent_id", "thread_id", "occurred_at", "sequence"],
    )
    op.create_index(
        "ix_peerctx_interactions_effect",
        "peerctx_interactions",
        ["agent_id", "effect_key"],
        **_where("effect_key IS NOT NULL"),
    )


def _memories() -> None:
    op.create_table(
        "peerctx_memories",
        _text("agent_id"),
        _text("counterpart_id"),
        _text("state"),
        _number("updated_at"),
        sa.PrimaryKeyConstraint("agent_id", "counterpart_id", name="pk_peerctx_memories"),
        comment="What an agent chose to remember of another, beside the interactions.",
    )


def _receipts() -> None:
    op.create_table(
        "peerctx_receipts",
        _text("agent_id"),
        _text("effect_key"),
        _text("sender_id"),
        _text("thread_id"),
        _text("run_id", nullable=True),
        _number("epoch"),
        _text("status"),
        _text("reply", nullable=True),
        _number("received_at"),
        _number("done_at", nullable=True),
        sa.PrimaryKeyConstraint("agent_id", "sender_id", "effect_key", name="pk_peerctx_receipts"),
        sa.CheckConstraint("status IN ('open', 'done')", name=op.f("ck_peerctx_receipts_status")),
        comment="An effect that arrived at agent_id, recorded before it acts.",
    )
    op.create_index(
        "ix_peerctx_receipts_thread",
        "peerctx_receipts",
        ["agent_id", "sender_id", "thread_id", "epoch"],
    )


def _barred_keys() -> None:
    op.create_table(
        "peerctx_barred_keys",
        _text("agent_id"),
        _text("sender_id"),
        _text("effect_key"),
        _text("thread_id"),
        _number("below_epoch"),
        _number("barred_at"),
        sa.PrimaryKeyConstraint(
            "agent_id", "sender_id", "effect_key", name="pk_peerctx_barred_keys"
        ),
        comment="Effects that agent_id has promised to refuse from epochs below this one.",
    )
    op.create_index(
        "ix_peerctx_barred_keys_thread",
        "peerctx_barred_keys",
        ["agent_id", "sender_id", "thread_id"],
    )


def _leases() -> None:
    op.create_table(
        "peerctx_leases",
        _text("agent_id"),
        _text("thread_id"),
        _text("run_id", nullable=True),
        _number("epoch"),
        _text("owner_id", nullable=True),
        _text("owner_incarnation", nullable=True),
        _number("acquired_at"),
        _number("expires_at"),
        sa.PrimaryKeyConstraint("agent_id", "thread_id", name="pk_peerctx_leases"),
        comment="Who may write a thread: one row a thread, its epoch rises with each owner.",
    )
    op.create_index("ix_peerctx_leases_thread", "peerctx_leases", ["thread_id"])
    op.create_index("ix_peerctx_leases_owner_incarnation", "peerctx_leases", ["owner_incarnation"])
    op.create_index("ix_peerctx_leases_expires_at", "peerctx_leases", ["expires_at"])


def _runs() -> None:
    op.create_table(
        "peerctx_runs",
        _text("run_id"),
        _text("agent_id"),
        _text("thread_id"),
        _text("workflow", nullable=True),
        _text("owner_incarnation", nullable=True),
        _number("epoch"),
        _text("config_type", nullable=True),
        _bytes("config", nullable=True),
        _text("context_type", nullable=True),
        _bytes("context", nullable=True),
        _text("durability", nullable=True),
        _text("traceparent", nullable=True),
        _number("admitted_at"),
        _number("ended_at", nullable=True),
        _text("end_kind", nullable=True),
        _text("error", nullable=True),
        sa.PrimaryKeyConstraint("run_id", name="pk_peerctx_runs"),
        sa.CheckConstraint(
            "end_kind IN ('returned', 'raised', 'cancelled', 'handed_over')",
            name=op.f("ck_peerctx_runs_end_kind"),
        ),
        sa.CheckConstraint(
            "durability IN ('sync', 'async', 'exit')", name=op.f("ck_peerctx_runs_durability")
        ),
        comment="Every admitted run and how it ended; one without an end has crashed.",
    )
    op.create_index(
        "ix_peerctx_runs_thread", "peerctx_runs", ["agent_id", "thread_id", "admitted_at"]
    )
    op.create_index("ix_peerctx_runs_owner_incarnation", "peerctx_runs", ["owner_incarnation"])
    op.create_index(
        "ix_peerctx_runs_open",
        "peerctx_runs",
        ["admitted_at"],
        **_where("ended_at IS NULL OR end_kind = 'handed_over'"),
    )


def _run_inputs() -> None:
    op.create_table(
        "peerctx_run_inputs",
        _text("run_id"),
        sa.Column("number", sa.Integer(), nullable=False),
        _text("input_type"),
        _bytes("input"),
        _number("admitted_at"),
        sa.PrimaryKeyConstraint("run_id", "number", name="pk_peerctx_run_inputs"),
        comment="What a run was given, in order: its input first, then each answer of a human.",
    )


def _effects() -> None:
    op.create_table(
        "peerctx_effects",
        _text("agent_id"),
        _text("effect_id"),
        _text("thread_id"),
        _text("run_id"),
        _text("position"),
        _text("effect_key"),
        _text("peer_id", nullable=True),
        _text("scope"),
        _text("status"),
        _number("epoch"),
        sa.Column("attempt", sa.Integer(), nullable=False),
        _number("intent_at"),
        _text("outcome", nullable=True),
        _number("done_at", nullable=True),
        sa.PrimaryKeyConstraint("agent_id", "effect_id", name="pk_peerctx_effects"),
        sa.CheckConstraint("scope IN ('run', 'thread')", name=op.f("ck_peerctx_effects_scope")),
        sa.CheckConstraint(
            "status IN ('intent', 'done', 'not_done')", name=op.f("ck_peerctx_effects_status")
        ),
        comment="Side effects: meant, and what came of them. An intent alone is in doubt.",
    )
    op.create_index(
        "ix_peerctx_effects_run", "peerctx_effects", ["agent_id", "thread_id", "run_id"]
    )


def _incidents() -> None:
    op.create_table(
        "peerctx_incidents",
        _text("incident_id"),
        _text("agent_id"),
        _text("thread_id"),
        _text("dead_incarnation"),
        _number("lost_epoch"),
        _text("run_id", nullable=True),
        _text("status"),
        sa.Column("attempts", sa.Integer(), nullable=False),
        _number("epoch"),
        _text("recoverer_id", nullable=True),
        _text("question", nullable=True),
        _text("answer", nullable=True),
        _text("result", nullable=True),
        _text("report", nullable=True),
        _number("opened_at"),
        _number("updated_at"),
        _number("next_attempt_at", nullable=True),
        sa.PrimaryKeyConstraint("incident_id", name="pk_peerctx_incidents"),
        sa.UniqueConstraint(
            "agent_id",
            "thread_id",
            "dead_incarnation",
            "lost_epoch",
            name="uq_peerctx_incidents_death",
        ),
        sa.CheckConstraint(
            "status IN ('open', 'recovering', 'waiting_for_human', 'recovered', 'dead_letter')",
            name=op.f("ck_peerctx_incidents_status"),
        ),
        comment="One row a failure: attempts, dead letter, question to a human, result, report.",
    )
    op.create_index("ix_peerctx_incidents_due", "peerctx_incidents", ["status", "next_attempt_at"])


def _text(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=nullable)


def _number(name: str, *, nullable: bool = False) -> sa.Column[int]:
    """Return a column for a moment or an epoch."""
    return sa.Column(name, sa.BigInteger(), nullable=nullable)


def _bytes(name: str, *, nullable: bool = False) -> sa.Column[bytes]:
    return sa.Column(name, sa.LargeBinary(), nullable=nullable)


def _where(condition: str) -> dict[str, Any]:
    """Return what makes an index a partial one."""
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}
