"""From a dead agent's thread to a workflow that goes on."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.types import Durability

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import PeerContextError
from langgraph_peerctx.gathering.gatherer import OnAnswer
from langgraph_peerctx.identifiers import check_id
from langgraph_peerctx.protocol.messages import InDoubtKey, Json
from langgraph_peerctx.reconstruction.checkpoint import CheckpointView, load_checkpoint
from langgraph_peerctx.reconstruction.evidence import Reconstruction, reconstruct
from langgraph_peerctx.reconstruction.incident import Incident, IncidentRecord, OnStep
from langgraph_peerctx.reconstruction.resume import (
    Decision,
    Delivery,
    Ending,
    Outcome,
    RecoveryStatus,
    conclude,
    decide,
    deliver_at_head,
    deliver_at_start,
    project,
    resume_workflow,
)
from langgraph_peerctx.reconstruction.sources import (
    ContextRuntime,
    EvidenceQuery,
    collect_context,
    collect_own_events,
    open_sources,
)
from langgraph_peerctx.reconstruction.workflow import (
    Workflow,
    check_initial_state,
    compiled,
    of_run,
    safest_durability,
    thread_config,
)

_logger = logging.getLogger(__name__)


class RecoveryResult(TypedDict):
    """How a recovery ended.

    Attributes:
        recovered: Whether the workflow was run and did not fail.
        status: `resumed` and `restarted` (from `initial_state`) ended; `already_finished`,
            `nothing_to_recover` and `needs_context` were not run; `waiting_for_human` is it now,
            whether it was run (`recovered`) or not; `failed` raised again. More may come.
        peer_context_used: Whether what peers know has reached the workflow's state.
        degraded: Whether the recovery had to do without something that it should have had.
        reasons: What that was, and why the status is what it is; each begins with a word and a
            colon, as `no_channel: ...`.
        final_state: What the workflow returns, as it stands now.
        incident: The record of this recovery, plain JSON.
    """

    recovered: bool
    status: RecoveryStatus
    peer_context_used: bool
    degraded: bool
    reasons: list[str]
    final_state: Any
    incident: IncidentRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryOrder:
    """One recovery as it was ordered, checked."""

    workflow: Workflow
    config: RunnableConfig
    query: EvidenceQuery
    initial_state: Any
    context: Any
    channel: str
    durability: Durability | None
    settings: PeerContextSettings
    runtime: ContextRuntime | None
    on_answer: OnAnswer | None


async def recover_and_resume_workflow_async(
    *,
    workflow: Workflow,
    agent_id: str,
    thread_id: str,
    initial_state: Any = None,
    use_peer_context: bool = True,
    peer_context_timeout: float = 5.0,
    context: Any = None,
    config: RunnableConfig | None = None,
    peer_context_channel: str = "peer_context",
    time_window_seconds: float | None = None,
    expect: Sequence[str] = (),
    min_responses: int | None = None,
    in_doubt: Sequence[InDoubtKey] = (),
    durability: Durability | None = None,
    runtime: ContextRuntime | None = None,
    settings: PeerContextSettings | None = None,
    on_step: OnStep | None = None,
    on_answer: OnAnswer | None = None,
) -> RecoveryResult:
    """Resume a dead agent's workflow where it stopped, with what its peers know of it.

    The caller sees to it that the agent is dead: LangGraph lets two processes run one thread, and
    then each remaining effect happens twice. Safe to call again after a recovery that died itself.

    Args:
        workflow: The compiled workflow, with the checkpointer that the dead process wrote to.
        agent_id: The agent whose workflow it is.
        thread_id: The thread to resume.
        initial_state: What to begin with if the thread has no checkpoint.
        use_peer_context: Whether to ask the peers.
        peer_context_timeout: The longest wait for their answers, in seconds.
        context: What the workflow's `context_schema` describes; not kept in checkpoints.
        config: Callbacks, tags, metadata, and configurable values that the nodes read; those are
            not kept in checkpoints either.
        peer_context_channel: The state channel that receives the peers' facts.
        time_window_seconds: How far back own events and peers are asked, in seconds; by default
            to the last checkpoint, and the settings' window further.
        expect: Agents or processes that should answer; once they have, the wait ends.
        min_responses: Do not resume if fewer answered.
        in_doubt: Effects of which nobody here knows whether they happened.
        durability: By default `sync`, or `async` where LangGraph cannot run the workflow so:
            in a subgraph compiled with `checkpointer=False`.
        runtime: A running runtime to use; by default one is opened and closed.
        settings: For the runtime that is opened; by default from the environment.
        on_step: Is told of each step when it has ended.
        on_answer: Is told of each peer's answer when it arrives.

    Raises:
        ConfigurationError: If an argument cannot be right; nothing was run.
        ProtocolError: If an id is one that peers would refuse; nothing was run.
        UnknownChannelError: If `initial_state` has keys that the workflow does not take.
        TooFewResponsesError: If fewer than `min_responses` answered; nothing was run.
        StoreError: If the checkpointer could not be read; nothing was run.
        RecoveryError: If the thread cannot be read as this workflow's; nothing was run.
    """
    settings = settings or (runtime.settings if runtime else PeerContextSettings())
    order = RecoveryOrder(
        workflow=compiled(workflow),
        config=thread_config(config, thread_id),
        query=EvidenceQuery(
            agent_id=check_id(agent_id, "agent_id"),
            thread_id=thread_id,
            use_peer_context=use_peer_context,
            peer_timeout_seconds=peer_context_timeout,
            time_window_seconds=time_window_seconds,
            expect=tuple(expect),
            min_responses=min_responses,
            in_doubt=tuple(in_doubt),
        ),
        initial_state=initial_state,
        context=context,
        channel=peer_context_channel,
        durability=durability or safest_durability(workflow),
        settings=settings,
        runtime=runtime,
        on_answer=on_answer,
    )
    check_initial_state(workflow, initial_state)
    incident = Incident(agent_id=agent_id, thread_id=thread_id, on_step=on_step)
    view, decision = await _load(order, incident)
    if decision.action == "stop":
        return _stopped(order, incident, view, decision)
    evidence = await _reconstruct(order, incident, view)
    delivery = _deliver(order, view, decision, evidence)
    outcome = await _resume(order, incident, view, delivery)
    after = await _look_again(order, incident)
    ending = conclude(
        order.workflow,
        decision,
        delivery,
        outcome,
        before=view,
        after=after,
    )
    return _concluded(order, incident, evidence, delivery, ending)


async def _load(order: RecoveryOrder, incident: Incident) -> tuple[CheckpointView, Decision]:
    with incident.step("load_checkpoint") as detail:
        view = await load_checkpoint(
            order.workflow, order.config, timeout_seconds=order.settings.database_timeout_seconds
        )
        decision = decide(
            order.workflow,
            view,
            has_initial_state=order.initial_state is not None,
            has_context=order.context is not None,
        )
        incident.run_id = view.run_id
        detail.update(view.as_json(), action=decision.action)
    return view, decision


async def _reconstruct(
    order: RecoveryOrder, incident: Incident, view: CheckpointView
) -> Reconstruction:
    query = replace(order.query, run_id=view.run_id).reaching(
        view.created_at, order.settings.time_window_seconds
    )
    async with open_sources(
        use_peer_context=query.use_peer_context,
        runtime=order.runtime,
        settings=order.settings,
    ) as sources:
        with incident.step("collect_context") as detail:
            peers = await collect_context(sources, query, on_answer=order.on_answer)
            detail.update(facts=len(peers.facts) if peers else 0, asked=peers is not None)
        with incident.step("reconstruct") as detail:
            own = await collect_own_events(sources, query)
            evidence = reconstruct(query, view, own, peers)
            detail.update(own_events=len(own.events), degraded=evidence["degraded"])
    return evidence


def _deliver(
    order: RecoveryOrder, view: CheckpointView, decision: Decision, evidence: Reconstruction
) -> Delivery:
    facts = evidence["peer_context"]
    if decision.action == "restart":
        return deliver_at_start(order.workflow, order.initial_state, order.channel, facts)
    return deliver_at_head(order.workflow, view, order.channel, facts)


async def _resume(
    order: RecoveryOrder, incident: Incident, view: CheckpointView, delivery: Delivery
) -> Outcome:
    with incident.step("resume_workflow") as detail:
        detail.update(durability=order.durability, channel=delivery.channel)
        outcome = await resume_workflow(
            order.workflow,
            of_run(order.config, view.run_id),
            delivery,
            context=order.context,
            durability=order.durability,
        )
        detail.update(error=None if outcome.error is None else type(outcome.error).__name__)
    return outcome


async def _look_again(order: RecoveryOrder, incident: Incident) -> CheckpointView | None:
    """Return the thread as it is now, or None if the checkpointer does not say."""
    with incident.step("verify") as detail:
        try:
            view = await load_checkpoint(
                order.workflow,
                order.config,
                timeout_seconds=order.settings.database_timeout_seconds,
            )
        except PeerContextError:  # the run counts, whatever keeps us from seeing its end
            _logger.warning(
                "the workflow was run, and its checkpoint cannot be read",
                exc_info=True,
                extra={"thread_id": order.query.thread_id},
            )
            return None
        detail.update(view.as_json())
    return view


def _stopped(
    order: RecoveryOrder, incident: Incident, view: CheckpointView, decision: Decision
) -> RecoveryResult:
    status = decision.status or "nothing_to_recover"
    return RecoveryResult(
        recovered=False,
        status=status,
        peer_context_used=False,
        degraded=False,
        reasons=list(decision.reasons),
        final_state=project(order.workflow, view),
        incident=_record(incident, status, view.as_json() if view.exists else None, None),
    )


def _concluded(
    order: RecoveryOrder,
    incident: Incident,
    evidence: Reconstruction,
    delivery: Delivery,
    ending: Ending,
) -> RecoveryResult:
    # Whoever did not want the peers asked does not miss a channel for their facts.
    undelivered = delivery.shortfalls if order.query.use_peer_context else ()
    shortfalls = [*evidence["reasons"], *undelivered, *ending.shortfalls]
    if shortfalls:
        _logger.warning(
            "recovered without all that was asked for: %s",
            ", ".join(reason.partition(":")[0] for reason in shortfalls),
            extra={"incident_id": incident.incident_id, "thread_id": incident.thread_id},
        )
    return RecoveryResult(
        recovered=ending.status != "failed",
        status=ending.status,
        peer_context_used=delivery.channel is not None,
        degraded=bool(shortfalls),
        reasons=[*shortfalls, *ending.reasons],
        final_state=ending.final_state,
        incident=_record(incident, ending.status, evidence["checkpoint"], evidence),
    )


def _record(
    incident: Incident,
    status: RecoveryStatus,
    checkpoint: Json | None,
    evidence: Reconstruction | None,
) -> IncidentRecord:
    return incident.record(
        status=status,
        checkpoint=checkpoint,
        coverage=evidence["coverage"] if evidence else None,
        conflicts=evidence["conflicts"] if evidence else [],
        in_doubt=evidence["in_doubt"] if evidence else [],
        provenance=evidence["provenance"] if evidence else [],
    )
