"""The thread that is being recovered: its head, its run, its effects, what it is to be given."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypedDict

from langchain_core.runnables import RunnableConfig

from langgraph_peerctx.durability.admission import digest_of, is_redacted, of_admitted_run
from langgraph_peerctx.durability.workflow import of_run, thread_config
from langgraph_peerctx.errors import PeerContextError
from langgraph_peerctx.persistence.effect_ledger import Effect
from langgraph_peerctx.protocol.messages import InDoubtKey
from langgraph_peerctx.reconstruction.checkpoint import CheckpointView, load_checkpoint
from langgraph_peerctx.reconstruction.lost_stores import Remembered, remembered
from langgraph_peerctx.reconstruction.recovery_plan import RecoveryPlan, RecoveryState
from langgraph_peerctx.reconstruction.resume import (
    Decision,
    Delivery,
    decide,
    deliver_answer,
    deliver_at_head,
    deliver_at_start,
)
from langgraph_peerctx.reconstruction.settling import doubtful, is_ahead
from langgraph_peerctx.reconstruction.sources import EvidenceQuery, Sources, existing_store

_logger = logging.getLogger(__name__)


class _FromHere(TypedDict):
    """Where the workflow goes on; see `settling.is_ahead`."""

    run_id: str
    after: int | None
    finished: set[str]


class RecoveredThread:
    """A thread as the plan of its recovery, and the recovery's state, tell of it."""

    def __init__(self, plan: RecoveryPlan) -> None:
        self.plan = plan

    def remembered(self, state: RecoveryState) -> Remembered:
        """Return what peers hold of the run."""
        facts, run_id = state["evidence"]["peer_context"], self.plan.run_id
        known = remembered(state["failed_agent_id"], facts, self.digest(state))
        if run_id is None:
            return known
        since = known.since or datetime.now(UTC)
        return replace(known, run_ids=(run_id,), is_sure=True, since=since)

    def known(self, state: RecoveryState, view: CheckpointView, decision: Decision) -> Remembered:
        """Return what is known of a run without a record: a checkpoint names it."""
        known = self.remembered(state)
        if decision.action == "restart" or view.run_id is None:
            return known
        moments = [moment for moment in (known.since, view.created_at) if moment is not None]
        since = min(moments, default=None)
        return replace(known, run_ids=(view.run_id,), is_sure=True, since=since)

    def digest(self, state: RecoveryState) -> str | None:
        """Return what tells the run from others by what it was given; of a redacted one nothing."""
        admitted, ended = self.plan.admitted, self.plan.ended
        if (admitted and admitted.inputs[0].is_redacted) or (ended and is_redacted(ended)):
            return None
        given = self.initial_state(state)
        return None if given is None else digest_of(given)

    def run_id(self, view: CheckpointView) -> str | None:
        """Return which run it is, as far as anybody here knows."""
        plan = self.plan
        if plan.admitted is not None:
            return plan.admitted.run_id
        if view.run_id is not None or plan.ended is None or plan.ended.end_kind == "returned":
            return view.run_id
        return plan.ended.run_id

    def doubted_since(self, run_id: str) -> datetime | None:
        """Return since when the ledger does not know all of a run's effects."""
        plan = self.plan
        if plan.admitted is not None:
            return plan.admitted.doubted_since
        is_it = plan.ended is not None and plan.ended.run_id == run_id
        return plan.ended.doubted_since if plan.ended is not None and is_it else None

    async def doubtful(self, state: RecoveryState) -> list[Effect]:
        """Return the effects that a human must be asked about, as they are known now."""
        return self.doubted(state, await self.effects(state.get("run_id")))

    @staticmethod
    def doubted(state: RecoveryState, effects: Sequence[Effect]) -> list[Effect]:
        """Return of effects those that a human must be asked about."""
        return doubtful(effects, **_from_here(state))

    @staticmethod
    def is_ahead(state: RecoveryState, effect: Effect) -> bool:
        """Tell whether the workflow may come to an effect, once more or for the first time."""
        return is_ahead(effect, **_from_here(state))

    async def effects(self, run_id: str | None) -> list[Effect]:
        """Return a run's effects; none where the thread is not ours."""
        return [] if self.plan.thread is None else await self.plan.thread.known(run_id)

    def place(self, state: Mapping[str, Any]) -> RunnableConfig:
        """Return where the thread is."""
        return thread_config(self.plan.config, state["thread_id"])

    async def head(self, state: Mapping[str, Any]) -> CheckpointView:
        """Read the thread's newest checkpoint."""
        timeout = self.plan.settings_now().database_timeout_seconds
        return await load_checkpoint(self.plan.workflow, self.place(state), timeout_seconds=timeout)

    async def head_if_it_can_be_read(self, state: Mapping[str, Any]) -> CheckpointView | None:
        """The run counts, whatever keeps us from seeing its end."""
        try:
            return await self.head(state)
        except PeerContextError:
            _logger.warning(
                "the workflow was run, and its checkpoint cannot be read",
                exc_info=True,
                extra={"thread_id": state["thread_id"]},
            )
            return None

    def place_of_run(
        self, state: Mapping[str, Any], view: CheckpointView, decision: Decision
    ) -> RunnableConfig:
        """Return where the thread is, in the name of the lost run."""
        admitted, place = self.plan.admitted, self.place(state)
        if admitted is None:
            return of_run(place, view.run_id)
        if decision.action == "restart" and admitted.fork_of is not None:
            place["configurable"].update(admitted.fork_of)
        return of_admitted_run(place, admitted.run_id)

    def initial_state(self, state: Mapping[str, Any]) -> Any:
        """Return what the run began with: as it was admitted, or as the caller says."""
        if self.plan.admitted is not None and not self.plan.admitted.inputs[0].is_redacted:
            return self.plan.admitted.inputs[0].value
        given = state.get("initial_state")
        return self.plan.initial_state if given is None else given

    def decide(self, state: Mapping[str, Any], view: CheckpointView) -> Decision:
        """Decide what a head needs."""
        return decide(
            self.plan.workflow,
            view,
            has_initial_state=self.initial_state(state) is not None,
            has_context=self.plan.context is not None,
            admitted=self.plan.admitted,
        )

    def deliver(self, state: RecoveryState, view: CheckpointView, decision: Decision) -> Delivery:
        """Return what the workflow is to be given."""
        workflow, channel = self.plan.workflow, self.plan.channel
        facts = state["evidence"]["peer_context"]
        if decision.action == "restart":
            return deliver_at_start(workflow, self.initial_state(state), channel, facts)
        if decision.action == "answer" and self.plan.admitted is not None:
            given = self.plan.admitted.inputs[-1].value
            return deliver_answer(workflow, view, given, channel, facts)
        return deliver_at_head(workflow, view, channel, facts)

    def query(self, state: RecoveryState) -> EvidenceQuery:
        """Return what the peers and our own events are asked."""
        limits = self.plan.limits.under(state)
        return EvidenceQuery(
            agent_id=state["failed_agent_id"],
            thread_id=state["thread_id"],
            use_peer_context=self.plan.use_peer_context,
            time_window_seconds=state["time_window_seconds"],
            reaches_checkpoint=state["reaches_checkpoint"],
            expect=limits.expect,
            min_responses=limits.min_responses,
            in_doubt=tuple(
                InDoubtKey.model_validate(key, strict=False) for key in state.get("in_doubt") or ()
            ),
            run_id=state.get("run_id"),
        )

    def own_events(self) -> Sources:
        """Return where the agent's own events are."""
        settings = self.plan.settings_now()
        opened = self.plan.open_store or partial(existing_store, settings.database_url)
        return Sources(open_store=opened, settings=settings)


def _after(state: Mapping[str, Any]) -> int | None:
    """Return the superstep after which the workflow goes on; None if it begins anew."""
    checkpoint = state.get("checkpoint")
    if checkpoint is None or state.get("action") == "restart":
        return None
    step: int | None = checkpoint["step"]
    return step


def _from_here(state: RecoveryState) -> _FromHere:
    return {
        "run_id": state.get("run_id") or "",
        "after": _after(state),
        "finished": _finished(state),
    }


def _finished(state: Mapping[str, Any]) -> set[str]:
    """Return what has finished in the open superstep: nodes with all their tasks, and `Send`s.

    LangGraph names the tasks of `Send`s first, in the order of their index (1.2.22).
    """
    tasks = (state.get("checkpoint") or {}).get("tasks", [])
    unfinished = {task["name"] for task in tasks if task["state"] != "finished"}
    sent = {f"{t['name']}[{i}]" for i, t in enumerate(tasks) if t["state"] == "finished"}
    return {task["name"] for task in tasks} - unfinished | sent
