"""The recovery as a graph: one node a step, under the step's name.

What a node has found out is in the recovery's own checkpoint before the next one begins. So a
recoverer that dies is taken up again by any other: it sees the answers that had arrived, asks only
the peers that are missing, reads the thread's head anew, and applies its update once.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import get_runtime
from langgraph.types import Durability, RetryPolicy, interrupt
from pydantic import Field
from typing_extensions import TypedDict  # pydantic makes schemas of this one only, up to 3.11

from langgraph_peerctx import background
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.admission import digest_of, of_admitted_run
from langgraph_peerctx.durability.run_config import but_its_own
from langgraph_peerctx.durability.workflow import (
    Workflow,
    check_initial_state,
    compiled,
    of_run,
    safest_durability,
    thread_config,
)
from langgraph_peerctx.errors import BrokerUnavailableError, PeerContextError
from langgraph_peerctx.gathering.gatherer import OnAnswer
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.identifiers import check_id, new_id
from langgraph_peerctx.nodes.on_runtime import OnRuntime, RuntimeSource, Update
from langgraph_peerctx.nodes.peer_context_subgraph import (
    CollectContext,
    Limits,
    PeerContextInput,
    Position,
    QuestionState,
    RequestContext,
)
from langgraph_peerctx.nodes.reading import seconds_in, text_in
from langgraph_peerctx.owned import unowned
from langgraph_peerctx.persistence.effect_ledger import Effect
from langgraph_peerctx.persistence.runs import Run
from langgraph_peerctx.protocol.looking import plain
from langgraph_peerctx.protocol.messages import WINDOW_LIMIT_SECONDS, InDoubtKey
from langgraph_peerctx.reconstruction.approval import Thresholds, is_approved, what_to_approve
from langgraph_peerctx.reconstruction.checkpoint import CheckpointView, load_checkpoint
from langgraph_peerctx.reconstruction.evidence import Reconstruction, reconstruct, with_inferred
from langgraph_peerctx.reconstruction.first_checkpoint import first_checkpoint_after
from langgraph_peerctx.reconstruction.gap_filling import Inference, filled
from langgraph_peerctx.reconstruction.incident import (
    OnStep,
    StepRecord,
    incident_record,
    tell,
    timed,
)
from langgraph_peerctx.reconstruction.lost_stores import (
    LostStores,
    Remembered,
    remembered,
    said_of,
    what_is_missing,
)
from langgraph_peerctx.reconstruction.report import Noticed
from langgraph_peerctx.reconstruction.resume import (
    Admitted,
    Decision,
    Delivery,
    Outcome,
    RecoveryStatus,
    conclude,
    decide,
    deliver_answer,
    deliver_at_head,
    deliver_at_start,
    project,
    resume_workflow,
)
from langgraph_peerctx.reconstruction.settling import (
    OwnedThread,
    answers_in,
    doubtful,
    effect_json,
    keys_of,
    question_of,
    what_to_settle,
    why_unknown,
    words_on,
)
from langgraph_peerctx.reconstruction.sources import (
    EvidenceQuery,
    OwnEvents,
    Sources,
    collect_own_events,
    existing_store,
    nobody_asked,
)

_logger = logging.getLogger(__name__)

_BROKER_RETRY = RetryPolicy(max_attempts=2, initial_interval=0.2, retry_on=BrokerUnavailableError)


class RecoveryInput(PeerContextInput, total=False):
    """Which workflow is to be recovered, and who is to be asked."""

    initial_state: Annotated[
        dict[str, Any] | None,
        Field(
            title="Initial state",
            description="What to begin with if the thread has no checkpoint.",
            examples=[{"product": "umbrella"}],
        ),
    ]
    in_doubt: Annotated[
        list[dict[str, Any]],
        Field(
            title="Effects in doubt",
            description="Effects of which nobody here knows whether they happened; see InDoubtKey.",
            examples=[[]],
        ),
    ]


class RecoveryOutput(TypedDict, total=False):
    """How the recovery ended."""

    result: Annotated[
        dict[str, Any] | None,
        Field(title="Result", description="As RecoveryResult, plain JSON; None before the end."),
    ]


class RecoveryState(RecoveryInput, QuestionState, RecoveryOutput, total=False):
    """The recovery's own state, plain JSON; no channel of it has a reducer.

    So it may stand inside another graph: a reducer that both share would double what it has.
    """

    incident_id: str
    started_at: str
    epoch: int
    doubts: list[str]
    run_id: str | None
    action: str
    checkpoint: dict[str, Any] | None
    reaches_checkpoint: bool
    gathered: dict[str, Any] | None
    noticed: dict[str, Any] | None
    evidence: dict[str, Any]
    approval: dict[str, Any]
    steps: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """What a recovery is made of, and no checkpoint can keep.

    Attributes:
        admitted: The run, where it was written down when it began: its input outranks
            `initial_state`.
        incident_id: The incident, where there is a row of it; by default a fresh one.
        before: Steps that were taken before the graph, the claim for instance.
        noticed: How the failure was noticed, and when.
        thread: The thread, where it is ours: its effects are settled, and done, under our lease.
        ended: The thread's last run, where it is not being recovered as an open one.
        lost: Begins a run anew of which no record is left; None if the caller owns nothing.
        run_id: Which run it was, where the caller knows.
        despite_silence: Whether it is begun although peers that may remember it say nothing.
        answers: What a human says of effects in doubt, by their keys.
        inference: A model that may fill what no evidence has.
        can_ask: Whether a human can be asked: an interrupt needs a checkpointer.
        source: Another runtime than the process's own.
        open_store: Another event store than the settings'.
        initial_state: What to begin with, where the state does not say.
    """

    workflow: Workflow
    admitted: Admitted | None = None
    incident_id: str | None = None
    before: tuple[StepRecord, ...] = ()
    noticed: Noticed | None = None
    thread: OwnedThread | None = None
    ended: Run | None = None
    lost: LostStores | None = None
    run_id: str | None = None
    despite_silence: bool = False
    answers: Mapping[str, Any] = field(default_factory=dict)
    inference: Inference = field(default_factory=Inference)
    can_ask: bool = True
    channel: str = "peer_context"
    context: Any = None
    config: RunnableConfig | None = None
    durability: Durability | None = None
    initial_state: Any = None
    use_peer_context: bool = True
    limits: Limits = field(default_factory=Limits)
    thresholds: Thresholds = field(default_factory=Thresholds)
    settings: PeerContextSettings | None = None
    source: RuntimeSource | None = None
    open_store: Callable[[], OwnEvents] | None = None
    on_step: OnStep | None = None
    on_answer: OnAnswer | None = None

    def settings_now(self) -> PeerContextSettings:
        """Return the settings that count at this moment."""
        return self.settings or background.settings_in_use() or PeerContextSettings()


def create_recovery_graph(
    workflow: Workflow,
    *,
    peer_context_channel: str = "peer_context",
    context: Any = None,
    config: RunnableConfig | None = None,
    durability: Durability | None = None,
    initial_state: Any = None,
    use_peer_context: bool = True,
    expect: Sequence[str] = (),
    timeout_seconds: float | None = None,
    min_responses: int | None = None,
    approve_below_coverage: float | None = None,
    approve_below_confidence: float | None = None,
    llm: BaseChatModel | None = None,
    infer: Sequence[str] = (),
    settings: PeerContextSettings | None = None,
    on_step: OnStep | None = None,
    on_answer: OnAnswer | None = None,
) -> StateGraph[Any, Any, Any, Any]:
    """Return the recovery of a workflow's threads as a graph, not compiled; for `ainvoke` only.

    `load_checkpoint`, `position`, `request_context`, `collect_context`, `reconstruct`, `settle`,
    `approve`, `resume_workflow`. Compile it with a checkpointer, and run it under a thread of its
    own with `durability="sync"`: then a recoverer that is killed anywhere is resumed with
    `ainvoke(None)`, in any process. The input names the dead agent and its thread; see
    `RecoveryInput`. The output is a `RecoveryResult`, plain JSON, under `result`.

    The caller sees to it that the agent is dead, and that one recoverer is at work.

    Args:
        workflow: The compiled workflow, with the checkpointer that the dead process wrote to.
        peer_context_channel: The state channel that receives the peers' facts.
        context: What the workflow's `context_schema` describes.
        config: Callbacks, tags, metadata, and configurable values for the workflow.
        durability: As in `recover_and_resume_workflow_async`.
        initial_state: What to begin with where there is no checkpoint and the input says nothing.
        use_peer_context: Whether to ask the peers.
        expect: Who should answer, where the input does not say.
        timeout_seconds: The longest wait, where the input does not say; by default the settings'.
        min_responses: Do not resume if fewer answered, where the input does not say.
        approve_below_coverage: Ask a human (`interrupt`) if a smaller share of those who were
            expected has answered, from 0 to 1; see `Thresholds`.
        approve_below_confidence: Ask a human if a smaller share of what was told is undisputed.
        llm: May fill what no evidence has; see `Inference`.
        infer: The state keys that it may fill.
        settings: For the runtime, if it does not run yet; by default from the environment.
        on_step: Is told of each step when it has ended.
        on_answer: Is told of each peer's answer when it arrives, on the runtime's loop.

    Raises:
        ConfigurationError: If an argument cannot be right.
    """
    plan = RecoveryPlan(
        workflow=unowned(compiled(workflow)),
        channel=peer_context_channel,
        context=context,
        config=config,
        durability=durability,
        initial_state=initial_state,
        use_peer_context=use_peer_context,
        limits=Limits(
            expect=tuple(expect), timeout_seconds=timeout_seconds, min_responses=min_responses
        ),
        thresholds=Thresholds(coverage=approve_below_coverage, confidence=approve_below_confidence),
        inference=Inference(llm=llm, keys=tuple(infer)),
        settings=settings,
        on_step=on_step,
        on_answer=on_answer,
    )
    return RecoverySteps(plan).graph()


class RecoverySteps:
    """The nodes of one recovery graph.

    Attributes:
        final_state: What the recovered workflow returned, as it is: the state keeps it as JSON.
        error: What it raised, if it did.
    """

    def __init__(self, plan: RecoveryPlan) -> None:
        plan.inference.check(plan.workflow)
        self.plan = plan
        self.final_state: Any = None
        self.error: Exception | None = None
        self._of_the_lost: tuple[str, ...] = ()
        settings, source = plan.settings, plan.source
        self._position = Position(settings, source, plan.thread.epoch if plan.thread else 0)
        self._request = RequestContext(plan.limits, settings, source)
        on_answer = plan.on_answer and partial(tell, plan.on_answer)
        self._collect = CollectContext(plan.limits, _gathered, settings, source, on_answer)

    def graph(self) -> StateGraph[Any, Any, Any, Any]:
        """Return the graph, not compiled."""
        builder = StateGraph(
            RecoveryState, input_schema=RecoveryInput, output_schema=RecoveryOutput
        )
        builder.add_node("load_checkpoint", self.load_checkpoint)
        for name, node in (
            ("position", self.position),
            ("request_context", self.request_context),
            ("collect_context", self.collect_context),
        ):
            builder.add_node(name, node, retry_policy=_BROKER_RETRY)
        builder.add_node("reconstruct", self.reconstruct)
        builder.add_node("settle", self.settle)
        builder.add_node("approve", self.approve)
        builder.add_node("resume_workflow", self.resume_workflow)
        builder.add_edge(START, "load_checkpoint")
        builder.add_conditional_edges(
            "load_checkpoint", self._whom_to_ask, ["position", "reconstruct", END]
        )
        for name, following in (
            ("position", "request_context"),
            ("request_context", "collect_context"),
        ):
            builder.add_conditional_edges(
                name, partial(_unless_gathered, following), [following, "reconstruct"]
            )
        builder.add_edge("collect_context", "reconstruct")
        builder.add_edge("reconstruct", "settle")
        builder.add_conditional_edges("settle", partial(_unless_ended, "approve"), ["approve", END])
        builder.add_conditional_edges(
            "approve", partial(_unless_ended, "resume_workflow"), ["resume_workflow", END]
        )
        builder.add_edge("resume_workflow", END)
        return builder

    async def load_checkpoint(self, state: RecoveryState) -> Update:
        """Read the thread's head, and decide what it needs."""
        agent_id = check_id(
            text_in(state, "failed_agent_id", "the agent that failed"), "failed_agent_id"
        )
        thread_id = text_in(state, "thread_id", "the thread to recover")
        check_initial_state(self.plan.workflow, self._initial_state(state))
        settings = self.plan.settings_now()
        begun: Update = {
            "incident_id": self.plan.incident_id or new_id(),
            "started_at": _beginning(self.plan.before),
            "failed_agent_id": agent_id,
            "thread_id": thread_id,
            "steps": [],
            "noticed": self.plan.noticed,
            "gathered": None,
            "result": None,
        }
        with self._step("load_checkpoint", begun) as step:
            view = await self._head(state)
            decision = self._decide(state, view)
            step.detail.update(view.as_json(), action=decision.action)
        query = EvidenceQuery(
            agent_id=agent_id,
            thread_id=thread_id,
            time_window_seconds=seconds_in(state, "time_window_seconds"),
        ).reaching(view.created_at, settings.time_window_seconds)
        if self.plan.lost is not None and decision.action == "restart":
            query = replace(query, time_window_seconds=WINDOW_LIMIT_SECONDS)  # it may be long ago
        run_id = self._run_id(view)
        effects = await self._effects(run_id)
        begun |= {
            "run_id": run_id,
            "in_doubt": [
                *(state.get("in_doubt") or ()),
                *(key.model_dump(mode="json") for key in keys_of(effects)),
            ],
            "action": decision.action,
            "checkpoint": view.as_json() if view.exists else None,
            "time_window_seconds": query.time_window_seconds,
            "reaches_checkpoint": query.reaches_checkpoint,
            "steps": [*self.plan.before, step.record],
        }
        if decision.action == "stop":
            begun["result"] = self._stopped(begun, view, decision)
        return begun

    async def position(self, state: RecoveryState, config: RunnableConfig) -> Update:
        """Note where the answers will be read from; nothing is sent."""
        return await self._with_peers(self._position, state, config)

    async def request_context(self, state: RecoveryState, config: RunnableConfig) -> Update:
        """Ask those peers of whom no answer is there yet."""
        return await self._with_peers(self._request, state, config)

    async def collect_context(self, state: RecoveryState, config: RunnableConfig) -> Update:
        """Collect what the peers remember."""
        return await self._with_peers(self._collect, state, config)

    async def reconstruct(self, state: RecoveryState) -> Update:
        """Put checkpoint, own events and peers together."""
        with self._step("reconstruct", state) as step:
            view = await self._head(state)
            query = self._query(state)
            own = await collect_own_events(self._own_events(), query)
            gathered = state.get("gathered")
            peers = None if gathered is None else PeerContext.from_json(gathered)
            effects = await self._effects(state.get("run_id"))
            if self.plan.thread is not None:
                for effect, word in words_on(effects, peers):
                    await self.plan.thread.settle(effect, word, "peer")
                effects = await self._effects(state.get("run_id"))
            doubts = self._doubted(state, effects)
            found = await self._infer(
                state, view, reconstruct(query, view, own, peers, effects, doubts=doubts)
            )
            evidence = dict(found)
            del evidence["state"]  # it is in the thread's own checkpoint
            step.detail.update(own_events=len(own.events), degraded=bool(evidence["degraded"]))
        return {
            "evidence": evidence,
            "doubts": [effect.key for effect in self._doubted(state, effects)],
            "epoch": self.plan.thread.epoch if self.plan.thread else 0,
            "steps": [*state["steps"], step.record],
        }

    async def _infer(
        self, state: RecoveryState, view: CheckpointView, found: Reconstruction
    ) -> Reconstruction:
        """Fill the gaps of what was found, where there is a model that may."""
        plan = self.plan
        if plan.inference.llm is None:
            return found
        known = view.values if view.exists else self._initial_state(state)
        inferred = await plan.inference.fill(
            plan.workflow,
            known if isinstance(known, Mapping) else {},
            found["peer_context"],
            is_exact=view.exists or plan.admitted is not None,
            but=(plan.channel,),
        )
        return with_inferred(found, inferred)

    async def settle(self, state: RecoveryState) -> Update:
        """Ask a human of which effects nobody could tell whether they happened.

        Taken up again, it asks the peers first: the one that knows may be back.
        """
        if missing := self._missing_witnesses(state):
            return {"result": await self._stopped_in_doubt(state, [missing])}
        thread, run_id = self.plan.thread, state.get("run_id")
        if thread is None or run_id is None:
            return {}
        by_human = [e for e in await self._effects(run_id) if e.source == "human"]
        for effect, said in answers_in(self.plan.answers, by_human, may_be_bare=False):
            await thread.amend(effect, said)
        if not state["doubts"]:
            return {}
        may_be_bare = len(state["doubts"]) == 1
        await self._answered(self.plan.answers, state, may_be_bare=may_be_bare)
        if thread.epoch != state["epoch"]:
            await thread.ask_again(await self._doubtful(state), run_id)
        unclear: object = None
        while open_ones := await self._doubtful(state):
            if not self.plan.can_ask or any(e.if_unknown == "fail" for e in open_ones):
                asked = self.plan.use_peer_context
                reasons = [f"{question_of(e)} {why_unknown(e, asked=asked)}" for e in open_ones]
                return {"result": await self._stopped_in_doubt(state, reasons)}
            answer = interrupt(
                what_to_settle(
                    open_ones,
                    asked=self.plan.use_peer_context,
                    consumed=state["evidence"]["consumed"],
                    unclear=unclear,
                )
            )
            unclear = answer
            await self._answered(answer, state, may_be_bare=may_be_bare)
        effects = [effect_json(effect) for effect in await self._effects(run_id)]
        return {"evidence": {**state["evidence"], "effects": effects}}

    async def _answered(self, answer: object, state: RecoveryState, *, may_be_bare: bool) -> None:
        """Write down what a human says of effects in doubt."""
        thread = self.plan.thread
        if thread is None or (not answer and answer is not False):
            return
        open_ones = await self._doubtful(state)
        for effect, settled in answers_in(answer, open_ones, may_be_bare=may_be_bare):
            await thread.settle(effect, settled, "human")

    def _missing_witnesses(self, state: RecoveryState) -> str | None:
        """Say what must be known before a run is begun anew of which no record is left."""
        plan, evidence = self.plan, state["evidence"]
        if plan.lost is None or state["action"] != "restart" or plan.despite_silence:
            return None
        known = self._remembered(state)
        if not plan.lost.concerns(known):
            return None
        return what_is_missing(known, evidence["coverage"], plan.limits.under(state).expect)

    def _remembered(self, state: RecoveryState) -> Remembered:
        facts, run_id = state["evidence"]["peer_context"], self.plan.run_id
        known = remembered(state["failed_agent_id"], facts, self._digest(state))
        if run_id is None:
            return known
        since = known.since or datetime.now(UTC)
        return replace(known, run_ids=(run_id,), is_sure=True, since=since)

    def _known(self, state: RecoveryState, view: CheckpointView, decision: Decision) -> Remembered:
        """Return what is known of a run without a record: a checkpoint names it."""
        known = self._remembered(state)
        if decision.action == "restart" or view.run_id is None:
            return known
        moments = [moment for moment in (known.since, view.created_at) if moment is not None]
        since = min(moments, default=None)
        return replace(known, run_ids=(view.run_id,), is_sure=True, since=since)

    def _digest(self, state: RecoveryState) -> str | None:
        given = self._initial_state(state)
        return None if given is None else digest_of(given)

    async def _stopped_in_doubt(
        self, state: RecoveryState, reasons: Sequence[str]
    ) -> dict[str, Any]:
        why = tuple(f"in_doubt: {reason}" for reason in reasons)
        stopped = Decision(action="stop", status="in_doubt", reasons=why)
        return self._stopped(state, await self._head(state), stopped)

    def _run_id(self, view: CheckpointView) -> str | None:
        """Return which run it is, as far as anybody here knows."""
        plan = self.plan
        if plan.admitted is not None:
            return plan.admitted.run_id
        if view.run_id is not None or plan.ended is None or plan.ended.end_kind == "returned":
            return view.run_id
        return plan.ended.run_id

    def _doubted_since(self, run_id: str) -> datetime | None:
        plan = self.plan
        if plan.admitted is not None:
            return plan.admitted.doubted_since
        is_it = plan.ended is not None and plan.ended.run_id == run_id
        return plan.ended.doubted_since if plan.ended is not None and is_it else None

    async def _doubtful(self, state: RecoveryState) -> list[Effect]:
        return self._doubted(state, await self._effects(state.get("run_id")))

    @staticmethod
    def _doubted(state: RecoveryState, effects: Sequence[Effect]) -> list[Effect]:
        return doubtful(
            effects,
            run_id=state.get("run_id") or "",
            after=_after(state),
            finished=_finished_nodes(state),
        )

    async def _effects(self, run_id: str | None) -> list[Effect]:
        return [] if self.plan.thread is None else await self.plan.thread.known(run_id)

    async def approve(self, state: RecoveryState) -> Update:
        """Ask a human, where coverage or confidence is below what the caller wants."""
        why = self.plan.thresholds.missed(state["evidence"])
        if not why:
            return {"approval": {"asked": False}}
        unclear: object = None
        while True:
            answer = interrupt(what_to_approve(state, self.plan.channel, why, unclear))
            approved = is_approved(answer)
            if approved is not None:
                break
            unclear = answer
        update: Update = {"approval": {"asked": True, "why": why, "approved": approved}}
        if not approved:
            reason = f"not_approved: a human said no, since {'; '.join(why)}"
            ended = Decision(action="stop", status="not_approved", reasons=(reason,))
            update["result"] = self._stopped(state, await self._head(state), ended)
        return update

    async def resume_workflow(self, state: RecoveryState) -> Update:
        """Read the head again, bring the facts in once, and let the workflow go on."""
        plan, evidence = self.plan, state["evidence"]
        before = await self._head(state)
        decision = self._decide(state, before)
        if decision.action == "stop":  # somebody else was here since
            return {"result": self._stopped(state, before, decision)}
        delivery = filled(
            plan.workflow,
            before,
            self._deliver(state, before, decision),
            evidence.get("inferred", {}),
            anew=decision.action == "restart",
        )
        durability = plan.durability or safest_durability(plan.workflow)
        with self._step("resume_workflow", state) as step:
            step.detail.update(durability=durability, channel=delivery.channel)
            outcome = await self._resumed(state, before, decision, delivery, durability)
            self.error = outcome.error
            error = None if outcome.error is None else type(outcome.error).__name__
            step.detail.update(error=error)
        with self._step("verify", state) as verified:
            after = await self._head_if_it_can_be_read(state)
            verified.detail.update(after.as_json() if after else {})
            first_at = await first_checkpoint_after(
                plan.workflow,
                self._place(state),
                before.checkpoint_id,
                timeout_seconds=plan.settings_now().database_timeout_seconds,
            )
        moments = {**state, "first_checkpoint_at": first_at}
        effects = await self._effects(state.get("run_id"))
        if effects:
            evidence = {**evidence, "effects": [effect_json(effect) for effect in effects]}
        ending = conclude(plan.workflow, decision, delivery, outcome, before=before, after=after)
        undelivered = delivery.shortfalls if plan.use_peer_context else ()
        shortfalls = [*evidence["reasons"], *undelivered, *ending.shortfalls, *self._of_the_lost]
        self._warn(state, shortfalls)
        self.final_state = ending.final_state
        steps = [*state["steps"], step.record, verified.record]
        return {
            "steps": steps,
            "result": {
                "recovered": ending.status not in ("failed", "in_doubt"),
                "status": ending.status,
                "peer_context_used": delivery.channel is not None,
                "degraded": bool(shortfalls),
                "reasons": [*shortfalls, *ending.reasons],
                "final_state": plain(ending.final_state),
                "incident": incident_record({**moments, "steps": steps}, ending.status, evidence),
            },
        }

    async def _resumed(
        self,
        state: RecoveryState,
        before: CheckpointView,
        decision: Decision,
        delivery: Delivery,
        durability: Durability | None,
    ) -> Outcome:
        """Run the workflow with its effects: those of a run that is ours, or is begun anew."""
        plan = self.plan
        place = but_its_own(self._place_of_run(state, before, decision), plan.workflow.config)
        known = self._known(state, before, decision)
        options: Any = {"context": plan.context, "durability": durability}
        is_named = decision.action == "restart" or before.run_id is not None
        lost = plan.lost if plan.admitted is None and is_named else None
        if lost is None or not lost.concerns(known):
            if plan.thread is not None:
                run_id = state.get("run_id") or new_id()
                since = self._doubted_since(run_id)
                effects = plan.thread.effects_of(
                    run_id, input_digest=self._digest(state), doubted_since=since
                )
                place = effects.go_along(of_run(place, run_id))
            return await resume_workflow(plan.workflow, place, delivery, **options)
        beginning = lost.begun(
            plan.workflow,
            place,
            known,
            agent_id=state["failed_agent_id"],
            initial_state=self._initial_state(state),
            input_digest=self._digest(state),
            **options,
        )
        async with beginning as begun:
            run_id = str((begun.place.get("metadata") or {}).get("run_id"))
            self._of_the_lost = (said_of(known, run_id),)
            outcome = await resume_workflow(begun.workflow, begun.place, delivery, **options)
            begun.error = outcome.error
            return outcome

    # What the nodes share

    def _whom_to_ask(self, state: RecoveryState) -> str:
        if state.get("result") is not None:
            return END
        return "position" if self.plan.use_peer_context else "reconstruct"

    async def _with_peers(
        self, node: OnRuntime, state: RecoveryState, config: RunnableConfig
    ) -> Update:
        """Take a step that needs a broker; where there is none, go on without the peers.

        Not with LangGraph's error handlers: one that passes an error on, as this would have to do
        with any other, leaves a thread that looks finished (langgraph 1.2.22).
        """
        with self._step(node.get_name(), state) as step:
            try:
                update = await node.ainvoke(state, config)
            except BrokerUnavailableError as error:
                if _attempt() < _BROKER_RETRY.max_attempts:
                    raise
                degraded = (f"no_broker: {error}",)
                update = _gathered(nobody_asked(self._query(state), degraded))
                step.detail.update(error=type(error).__name__)
            if (gathered := update.get("gathered")) is not None:
                step.detail.update(facts=len(gathered["facts"]))
        return {**update, "steps": [*state["steps"], step.record]}

    def _step(self, name: str, state: Mapping[str, Any]) -> Any:
        return timed(
            name,
            on_step=self.plan.on_step,
            incident_id=state["incident_id"],
            agent_id=state["failed_agent_id"],
            thread_id=state["thread_id"],
        )

    def _place(self, state: Mapping[str, Any]) -> RunnableConfig:
        return thread_config(self.plan.config, state["thread_id"])

    async def _head(self, state: Mapping[str, Any]) -> CheckpointView:
        timeout = self.plan.settings_now().database_timeout_seconds
        return await load_checkpoint(
            self.plan.workflow, self._place(state), timeout_seconds=timeout
        )

    async def _head_if_it_can_be_read(self, state: Mapping[str, Any]) -> CheckpointView | None:
        """The run counts, whatever keeps us from seeing its end."""
        try:
            return await self._head(state)
        except PeerContextError:
            _logger.warning(
                "the workflow was run, and its checkpoint cannot be read",
                exc_info=True,
                extra={"thread_id": state["thread_id"]},
            )
            return None

    def _place_of_run(
        self, state: Mapping[str, Any], view: CheckpointView, decision: Decision
    ) -> RunnableConfig:
        admitted, place = self.plan.admitted, self._place(state)
        if admitted is None:
            return of_run(place, view.run_id)
        if decision.action == "restart" and admitted.fork_of is not None:
            place["configurable"].update(admitted.fork_of)
        return of_admitted_run(place, admitted.run_id)

    def _initial_state(self, state: Mapping[str, Any]) -> Any:
        if self.plan.admitted is not None and not self.plan.admitted.inputs[0].is_redacted:
            return self.plan.admitted.inputs[0].value
        given = state.get("initial_state")
        return self.plan.initial_state if given is None else given

    def _decide(self, state: Mapping[str, Any], view: CheckpointView) -> Decision:
        return decide(
            self.plan.workflow,
            view,
            has_initial_state=self._initial_state(state) is not None,
            has_context=self.plan.context is not None,
            admitted=self.plan.admitted,
        )

    def _deliver(self, state: RecoveryState, view: CheckpointView, decision: Decision) -> Delivery:
        workflow, channel = self.plan.workflow, self.plan.channel
        facts = state["evidence"]["peer_context"]
        if decision.action == "restart":
            return deliver_at_start(workflow, self._initial_state(state), channel, facts)
        if decision.action == "answer" and self.plan.admitted is not None:
            given = self.plan.admitted.inputs[-1].value
            return deliver_answer(workflow, view, given, channel, facts)
        return deliver_at_head(workflow, view, channel, facts)

    def _query(self, state: RecoveryState) -> EvidenceQuery:
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

    def _own_events(self) -> Sources:
        settings = self.plan.settings_now()
        opened = self.plan.open_store or partial(existing_store, settings.database_url)
        return Sources(open_store=opened, settings=settings)

    def _stopped(
        self, state: Mapping[str, Any], view: CheckpointView, decision: Decision
    ) -> dict[str, Any]:
        status: RecoveryStatus = decision.status or "nothing_to_recover"
        self.final_state = project(self.plan.workflow, view)
        return {
            "recovered": False,
            "status": status,
            "peer_context_used": False,
            "degraded": False,
            "reasons": list(decision.reasons),
            "final_state": plain(self.final_state),
            "incident": incident_record(state, status, state.get("evidence")),
        }

    def _warn(self, state: Mapping[str, Any], shortfalls: Sequence[str]) -> None:
        if shortfalls:
            _logger.warning(
                "recovered without all that was asked for: %s",
                ", ".join(reason.partition(":")[0] for reason in shortfalls),
                extra={"incident_id": state["incident_id"], "thread_id": state["thread_id"]},
            )


def _unless_ended(following: str, state: RecoveryState) -> str:
    return END if state.get("result") is not None else following


def _unless_gathered(following: str, state: RecoveryState) -> str:
    return following if state.get("gathered") is None else "reconstruct"


def _after(state: Mapping[str, Any]) -> int | None:
    """Return the superstep after which the workflow goes on; None if it begins anew."""
    checkpoint = state.get("checkpoint")
    if checkpoint is None or state.get("action") == "restart":
        return None
    step: int | None = checkpoint["step"]
    return step


def _finished_nodes(state: Mapping[str, Any]) -> set[str]:
    """Return the nodes of the open superstep that have finished all their tasks."""
    tasks = (state.get("checkpoint") or {}).get("tasks", [])
    unfinished = {task["name"] for task in tasks if task["state"] != "finished"}
    return {task["name"] for task in tasks} - unfinished


def _beginning(before: Sequence[StepRecord]) -> str:
    return before[0]["started_at"] if before else datetime.now(UTC).isoformat()


def _attempt() -> int:
    """Return which attempt at this node LangGraph makes, from 1."""
    information = get_runtime().execution_info
    return 1 if information is None else information.node_attempt


def _gathered(context: PeerContext) -> Update:
    return {"gathered": context.as_json()}
