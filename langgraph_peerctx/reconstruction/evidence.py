"""Put checkpoint, own events and peers together; the better evidence stands."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from pydantic_core import to_jsonable_python

from langgraph_peerctx.gathering.peer_context import Conflict, PeerContext
from langgraph_peerctx.nodes.state import EVIDENCE_RANKS, merge_peer_context
from langgraph_peerctx.persistence.effect_ledger import Effect
from langgraph_peerctx.protocol.messages import Interaction, Json
from langgraph_peerctx.reconstruction.checkpoint import CheckpointView
from langgraph_peerctx.reconstruction.inference import Inferred
from langgraph_peerctx.reconstruction.settling import effect_json
from langgraph_peerctx.reconstruction.sources import EvidenceQuery, OwnHistory


class Reconstruction(TypedDict):
    """What is known of a failed agent's thread, and where each piece comes from.

    Everything but `state` is plain JSON.

    Attributes:
        checkpoint: The checkpoint's id, time, status and tasks, or None without one.
        state: The values as LangGraph restores them.
        own_events: What the agent recorded itself, newest first.
        peer_agents_queried: The agents that answered, sorted.
        peer_context: Event id -> fact, oldest first; each fact has `source` and `occurred_at`.
        peer_context_used: Whether any peer told anything.
        coverage: Who was asked and what became of it; None if nobody was.
        conflicts: Events that those who remember them remember differently.
        in_doubt: What the named peers said of the effects that were asked about.
        effects: The run's effects, in the order they were meant: what is known of each, from whom.
        consumed: What peers took from the agent after its last checkpoint: a resume goes back
            behind it.
        inferred: What a language model filled in, where nothing else had a value; plain JSON.
        provenance: For each restored fact its source, rank, event id and time.
        degraded: Whether something is missing that should be here; `reasons` says what.
    """

    agent_id: str
    thread_id: str
    checkpoint: Json | None
    state: dict[str, Any]
    own_events: list[Json]
    peer_agents_queried: list[str]
    peer_context: Json
    peer_context_used: bool
    coverage: Json | None
    conflicts: list[Json]
    in_doubt: list[Json]
    effects: list[Json]
    consumed: list[Json]
    inferred: Json
    provenance: list[Json]
    degraded: bool
    reasons: list[str]


def reconstruct(
    query: EvidenceQuery,
    checkpoint: CheckpointView | None,
    own: OwnHistory,
    peers: PeerContext | None,
    effects: Sequence[Effect] = (),
    *,
    doubts: Sequence[Effect] = (),
) -> Reconstruction:
    """Put the evidence together; pure.

    Ranks: the checkpoint over the agent's own events over its peers. What a peer says of an event
    that the agent recorded itself does not replace the agent's own record; where the two differ, it
    is reported as a conflict.
    """
    own_facts = {event.interaction_id: _own_fact(query.agent_id, event) for event in own.events}
    told = peers.as_channel() if peers else {}
    known = merge_peer_context(own_facts, told)
    reasons = [
        *own.shortfalls,
        *(peers.degraded if peers else ()),
        *_missing(checkpoint),
        *_out_of_sight(query),
        *_unsettled(query, peers, effects, doubts),
    ]
    return Reconstruction(
        agent_id=query.agent_id,
        thread_id=query.thread_id,
        checkpoint=checkpoint.as_json() if checkpoint and checkpoint.exists else None,
        state=dict(checkpoint.values) if checkpoint else {},
        own_events=[event.model_dump(mode="json") for event in own.events],
        peer_agents_queried=_answerers(peers) if peers else [],
        peer_context={event_id: known[event_id] for event_id in told},
        peer_context_used=bool(told),
        coverage=peers.coverage.as_json() if peers else None,
        conflicts=_conflicts(query, own, peers),
        in_doubt=[answer.model_dump(mode="json") for answer in peers.in_doubt] if peers else [],
        effects=[effect_json(effect) for effect in effects],
        consumed=_consumed(query.agent_id, checkpoint, peers),
        inferred={},
        provenance=[
            *_restored(checkpoint),
            *_done(effects),
            *(_origin(*item) for item in known.items()),
        ],
        degraded=bool(reasons),
        reasons=reasons,
    )


def with_inferred(found: Reconstruction, inferred: Inferred) -> Reconstruction:
    """Return a reconstruction with what a model inferred of it, marked as such; pure."""
    reasons = [*found["reasons"], *inferred.reasons]
    return {
        **found,
        "inferred": to_jsonable_python(dict(inferred.values), serialize_unknown=True),
        "provenance": [*found["provenance"], *inferred.provenance],
        "reasons": reasons,
        "degraded": bool(reasons),
    }


def _own_fact(agent_id: str, event: Interaction) -> Json:
    body = event.model_dump(mode="json", exclude={"sequence"})
    return {"source": "own", "told_by": [agent_id], **body}


def _missing(checkpoint: CheckpointView | None) -> list[str]:
    if checkpoint is None:
        return ["no_workflow: without one there is no checkpoint to read"]
    if not checkpoint.has_checkpointer:
        return ["no_checkpointer: the workflow was compiled without one, so its state is lost"]
    if not checkpoint.exists:
        return ["no_checkpoint: the thread left none before its process died"]
    return []


def _out_of_sight(query: EvidenceQuery) -> list[str]:
    if query.reaches_checkpoint:
        return []
    window = f"time_window_seconds={query.time_window_seconds:g}"
    return [f"window: the last checkpoint is older than {window}: what was known then is not here"]


def _unsettled(
    query: EvidenceQuery,
    peers: PeerContext | None,
    effects: Sequence[Effect],
    doubts: Sequence[Effect],
) -> list[str]:
    """Say which effects stay in doubt; only the peer that a key names settles it."""
    ours = {effect.key for effect in effects}
    told = {
        (answer.effect_key, answer.agent_id)
        for answer in (peers.in_doubt if peers else ())
        if answer.verdict != "cannot_tell"
    }
    keys = [effect.key for effect in doubts]
    keys += [
        key.effect_key
        for key in query.in_doubt
        if key.effect_key not in ours and (key.effect_key, key.peer_id) not in told
    ]
    if not keys:
        return []
    return [f"in_doubt: nobody could tell whether it happened: {', '.join(keys)[:200]!r}"]


def _answerers(peers: PeerContext) -> list[str]:
    coverage = peers.coverage
    told = {agent_id for fact in peers.facts for agent_id in fact.told_by}
    told.update(peers.memory, coverage.empty, coverage.declined, coverage.busy, coverage.truncated)
    return sorted(told)


def _conflicts(query: EvidenceQuery, own: OwnHistory, peers: PeerContext | None) -> list[Json]:
    """Return where peers contradict each other, or the agent's own record."""
    if peers is None:
        return []
    recorded = {event.interaction_id: event for event in own.events}
    with_own = [
        Conflict(
            interaction_id=fact.interaction.interaction_id,
            versions={
                query.agent_id: recorded[fact.interaction.interaction_id],
                **dict.fromkeys(fact.told_by, fact.interaction),
            },
        )
        for fact in peers.facts
        if _differs(recorded.get(fact.interaction.interaction_id), fact.interaction)
    ]
    return [conflict.as_json() for conflict in (*peers.conflicts, *with_own)]


def _differs(own: Interaction | None, told: Interaction) -> bool:
    # Each store counts for itself, and who writes a checkpoint knows its id while a peer does not.
    ours_alone = {"sequence", "run_id", "checkpoint_id"}
    return own is not None and (
        own.model_dump(exclude=ours_alone) != told.model_dump(exclude=ours_alone)
    )


def _restored(checkpoint: CheckpointView | None) -> Iterable[Json]:
    """Yield the origin of each restored state key."""
    if checkpoint is None or checkpoint.created_at is None:
        return
    for key in sorted(checkpoint.values):
        yield {
            "fact": f"state.{key}",
            "source": "checkpoint",
            "rank": EVIDENCE_RANKS["checkpoint"],
            "event_id": checkpoint.checkpoint_id,
            "occurred_at": checkpoint.created_at.isoformat(),
        }


def _done(effects: Sequence[Effect]) -> Iterable[Json]:
    """Yield the origin of each outcome that is known."""
    for effect in effects:
        if effect.status == "intent" or effect.done_at is None:
            continue
        source = {"own": "own", "peer": "peer"}.get(effect.source or "own", effect.source)
        yield {
            "fact": f"effect.{effect.name}",
            "source": source,
            "rank": EVIDENCE_RANKS.get(str(source), EVIDENCE_RANKS["own"]),
            "event_id": effect.key,
            "occurred_at": effect.done_at.isoformat(),
        }


def _consumed(
    agent_id: str, checkpoint: CheckpointView | None, peers: PeerContext | None
) -> list[Json]:
    """Return what peers have from the agent that its checkpoint does not know of yet."""
    since = None if checkpoint is None else checkpoint.created_at
    facts = () if peers is None else peers.facts
    return [
        {
            "peer": fact.interaction.to_agent,
            "interaction_id": fact.interaction.interaction_id,
            "kind": fact.interaction.kind,
            "occurred_at": fact.interaction.occurred_at.isoformat(),
        }
        for fact in facts
        if fact.interaction.from_agent == agent_id
        and (since is None or fact.interaction.occurred_at > since)
    ]


def _origin(event_id: str, fact: Mapping[str, Any]) -> Json:
    return {
        "fact": f"event.{event_id}",
        "source": fact["source"],
        "rank": EVIDENCE_RANKS[fact["source"]],
        "event_id": event_id,
        "occurred_at": fact["occurred_at"],
        "told_by": fact["told_by"],
    }
