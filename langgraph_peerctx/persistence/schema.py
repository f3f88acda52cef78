"""Every table, for SQLite and PostgreSQL alike.

Names begin with `peerctx_`, since a team's database may have runs and stores of its own. Moments
are integers, microseconds since 1970 UTC: both databases keep them exactly and order them fast.
JSON is text: both return what was written. The event store and the control database have one
schema and one migration history, so that either address may name either, or both the same.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata: MetaData = MetaData(
    naming_convention={
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_ROW_NUMBER = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows by itself only where the key is an INTEGER."""

_IN_TIME = ("occurred_at", "sequence")
"""The end of an index that is read backwards: newest first."""


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


# The event store: each agent's own memory.

stores: Table = Table(
    "peerctx_stores",
    metadata,
    Column("store_id", Text, primary_key=True),
    Column("created_at", BigInteger, nullable=False),
    comment="When this store was made: it knows nothing of what was before.",
)

interactions: Table = Table(
    "peerctx_interactions",
    metadata,
    Column("sequence", _ROW_NUMBER, primary_key=True, autoincrement=True),
    Column("agent_id", Text, nullable=False),
    Column("interaction_id", Text, nullable=False),
    Column("counterpart_id", Text, nullable=False),
    Column("thread_id", Text, nullable=False),
    Column("from_agent", Text, nullable=False),
    Column("to_agent", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("payload", Text, nullable=False),
    Column("occurred_at", BigInteger, nullable=False),
    Column("recorded_at", BigInteger, nullable=False),
    Column("effect_key", Text),
    Column("run_id", Text),
    Column("checkpoint_id", Text),
    UniqueConstraint("agent_id", "interaction_id"),
    Index("ix_peerctx_interactions_pair", "agent_id", "counterpart_id", "thread_id", *_IN_TIME),
    Index("ix_peerctx_interactions_thread", "agent_id", "thread_id", *_IN_TIME),
    Index(
        "ix_peerctx_interactions_effect",
        "agent_id",
        "effect_key",
        **_where("effect_key IS NOT NULL"),
    ),
    comment="What passed between two agents, as agent_id remembers it.",
)

memories: Table = Table(
    "peerctx_memories",
    metadata,
    Column("agent_id", Text, nullable=False),
    Column("counterpart_id", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("agent_id", "counterpart_id"),
    comment="What an agent chose to remember of another, beside the interactions.",
)

receipts: Table = Table(
    "peerctx_receipts",
    metadata,
    Column("agent_id", Text, nullable=False),
    Column("effect_key", Text, nullable=False),
    Column("sender_id", Text, nullable=False),
    Column("thread_id", Text, nullable=False),
    Column("run_id", Text),
    Column("epoch", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    Column("reply", Text),
    Column("received_at", BigInteger, nullable=False),
    Column("done_at", BigInteger),
    PrimaryKeyConstraint("agent_id", "sender_id", "effect_key"),
    Index("ix_peerctx_receipts_thread", "agent_id", "sender_id", "thread_id", "epoch"),
    CheckConstraint("status IN ('open', 'done')", name="status"),
    comment="An effect that arrived at agent_id, recorded before it acts.",
)

barred_keys: Table = Table(
    "peerctx_barred_keys",
    metadata,
    Column("agent_id", Text, nullable=False),
    Column("sender_id", Text, nullable=False),
    Column("effect_key", Text, nullable=False),
    Column("thread_id", Text, nullable=False),
    Column("below_epoch", BigInteger, nullable=False),
    Column("barred_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("agent_id", "sender_id", "effect_key"),
    Index("ix_peerctx_barred_keys_thread", "agent_id", "sender_id", "thread_id"),
    comment="Effects that agent_id has promised to refuse from epochs below this one.",
)

receivers: Table = Table(
    "peerctx_receivers",
    metadata,
    Column("agent_id", Text, nullable=False),
    Column("since", BigInteger, nullable=False),
    PrimaryKeyConstraint("agent_id"),
    comment="Agents that take effects by their keys alone: what has no receipt did not arrive.",
)

# The control database: shared with the recoverers.

leases: Table = Table(
    "peerctx_leases",
    metadata,
    Column("agent_id", Text, nullable=False),
    Column("thread_id", Text, nullable=False),
    Column("run_id", Text),
    Column("epoch", BigInteger, nullable=False),
    Column("owner_id", Text),
    Column("owner_incarnation", Text),
    Column("acquired_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("agent_id", "thread_id"),
    Index("ix_peerctx_leases_thread", "thread_id"),  # a checkpointer knows no agent
    Index("ix_peerctx_leases_owner_incarnation", "owner_incarnation"),
    Index("ix_peerctx_leases_expires_at", "expires_at"),
    comment="Who may write a thread: one row a thread, its epoch rises with each owner.",
)

runs: Table = Table(
    "peerctx_runs",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("agent_id", Text, nullable=False),
    Column("thread_id", Text, nullable=False),
    Column("workflow", Text),
    Column("owner_incarnation", Text),
    Column("epoch", BigInteger, nullable=False),
    # LangGraph's serializer returns a type and bytes.
    Column("config_type", Text),
    Column("config", LargeBinary),
    Column("context_type", Text),
    Column("context", LargeBinary),
    Column("durability", Text),
    Column("traceparent", Text),
    Column("admitted_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Column("end_kind", Text),
    Column("error", Text),
    # The record of an earlier begin is lost: since then, what is not in the ledger is in doubt.
    Column("doubted_since", BigInteger),
    CheckConstraint(
        "end_kind IN ('returned', 'raised', 'cancelled', 'handed_over')", name="end_kind"
    ),
    CheckConstraint("durability IN ('sync', 'async', 'exit')", name="durability"),
    Index("ix_peerctx_runs_thread", "agent_id", "thread_id", "admitted_at"),
    Index("ix_peerctx_runs_owner_incarnation", "owner_incarnation"),
    # A run that was handed over waits for its next owner: it is as open as one that crashed.
    Index(
        "ix_peerctx_runs_open",
        "admitted_at",
        **_where("ended_at IS NULL OR end_kind = 'handed_over'"),
    ),
    comment="Every admitted run and how it ended; one without an end has crashed.",
)

run_inputs: Table = Table(
    "peerctx_run_inputs",
    metadata,
    Column("run_id", Text, nullable=False),
    Column("number", Integer, nullable=False),
    Column("input_type", Text, nullable=False),
    Column("input", LargeBinary, nullable=False),
    Column("admitted_at", BigInteger, nullable=False),
    Column("checkpoint_id", Text),  # where the thread stood when it came
    PrimaryKeyConstraint("run_id", "number"),
    comment="What a run was given, in order: its input first, then each answer of a human.",
)

effects: Table = Table(
    "peerctx_effects",
    metadata,
    Column("agent_id", Text, nullable=False),
    # SHA-256 of thread, run, position and key: together they may be too long for an index.
    Column("effect_id", Text, nullable=False),
    Column("thread_id", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("position", Text, nullable=False),
    Column("effect_key", Text, nullable=False),
    Column("peer_id", Text),
    Column("scope", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("intent_at", BigInteger, nullable=False),
    Column("outcome", Text),
    Column("done_at", BigInteger),
    Column("if_unknown", Text),
    Column("source", Text),  # who says what came of it
    Column("has_check", Integer, nullable=False, server_default=text("0")),
    Column("unknown_at", BigInteger),  # when nobody could tell
    Column("unknown_to", Text),  # who could not
    # An attempt in doubt was followed by this one all the same: its doubt is not over with it.
    Column("retried", Integer, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("agent_id", "effect_id"),
    CheckConstraint("scope IN ('run', 'thread')", name="scope"),
    CheckConstraint("status IN ('intent', 'done', 'not_done')", name="status"),
    Index("ix_peerctx_effects_run", "agent_id", "thread_id", "run_id"),
    comment="Side effects: meant, and what came of them. An intent alone is in doubt.",
)

incidents: Table = Table(
    "peerctx_incidents",
    metadata,
    Column("incident_id", Text, primary_key=True),
    Column("agent_id", Text, nullable=False),
    Column("thread_id", Text, nullable=False),
    Column("dead_incarnation", Text, nullable=False),
    Column("lost_epoch", BigInteger, nullable=False),
    Column("run_id", Text),
    Column("status", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("recoverer_id", Text),
    Column("question", Text),
    Column("answer", Text),
    Column("result", Text),
    Column("report", Text),
    Column("opened_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("next_attempt_at", BigInteger),
    # An incarnation that lives on may lose a thread more than once, each time under its own epoch.
    UniqueConstraint(
        "agent_id", "thread_id", "dead_incarnation", "lost_epoch", name="uq_peerctx_incidents_death"
    ),
    CheckConstraint(
        "status IN ('open', 'recovering', 'waiting_for_human', 'recovered', 'dead_letter')",
        name="status",
    ),
    Index("ix_peerctx_incidents_due", "status", "next_attempt_at"),
    Index("ix_peerctx_incidents_run", "agent_id", "thread_id", "run_id"),
    comment="One row a failure: attempts, dead letter, question to a human, result, report.",
)
