"""The recovery as a graph: one node a step, under the step's name.

What a node has found out is in the recovery's own checkpoint before the next one begins. So a
recoverer that dies is taken up again by any other: it sees the answers that had arrived, asks only
the peers that are missing, reads the thread's head anew, and applies its update once.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import get_runtime
from langgraph.types import Durability, RetryPolicy, interrupt

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.effects import Settled
from langgraph_peerctx.durability.run_config import but_its_own
from langgraph_peerctx.durability.workflow import (
    Workflow,
    check_initial_state,
    compiled,
    of_run,
    safest_durability,
)
from langgraph_peerctx.errors import BrokerUnavailableError, ConfigurationError
from langgraph_peerctx.gathering.gatherer import OnAnswer
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.identifiers import check_id, new_id
from langgraph_peerctx.nodes.on_runtime import OnRuntime, Update
from langgraph_peerctx.nodes.peer_context_subgraph import (
    CollectContext,
    Limits,
    Position,
    RequestContext,
)
from langgraph_peerctx.nodes.reading import seconds_in, text_in
from langgraph_peerctx.owned import unowned
from langgraph_peerctx.protocol.looking import plain
from langgraph_peerctx.protocol.messages import WINDOW_LIMIT_SECONDS
from langgraph_peerctx.reconstruction.approval import Thresholds, is_approved, what_to_approve
from langgraph_peerctx.reconstruction.checkpoint import CheckpointView
from langgraph_peerctx.reconstruction.evidence import Reconstruction, reconstruct, with_inferred
from langgraph_peerctx.reconstruction.first_checkpoint import first_checkpoint_after
from langgraph_peerctx.reconstruction.gap_filling import Inference, filled
from langgraph_peerctx.reconstruction.human_answers import (
    answer_of,
    is_said,
    lines_on,
    named,
    read_answer,
    too_late,
    what_to_settle,
)
from langgraph_peerctx.reconstruction.incident import (
    OnStep,
    StepRecord,
    incident_record,
    tell,
    timed,
)
from langgraph_peerctx.reconstruction.lost_stores import Begun, said_of, what_is_missing
from langgraph_peerctx.reconstruction.recovered_thread import RecoveredThread
from langgraph_peerctx.reconstruction.recovery_plan import (
    RecoveryInput,
    RecoveryOutput,
    RecoveryPlan,
    RecoveryState,
)
from langgraph_peerctx.reconstruction.resume import (
    Decision,
    Delivery,
    Outcome,
    RecoveryStatus,
    conclude,
    project,
    resume_workflow,
)
from langgraph_peerctx.reconstruction.settling import OwnedThread, effect_json, keys_of, words_on
from langgraph_peerctx.reconstruction.sources import EvidenceQuery, collect_own_events, nobody_asked

_logger = logging.getLogger(__name__)

_BROKER_RETRY = RetryPolicy(max_attempts=2, initial_interval=0.2, retry_on=BrokerUnavailableError)


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
        begun: The run, where one of which no record was left was begun anew.
    """

    def __init__(self, plan: RecoveryPlan) -> None:
        plan.inference.check(plan.workflow)
        self.plan = plan
        self._thread = RecoveredThread(plan)
        self.final_state: Any = None
        self.error: Exception | None = None
        self.begun: Begun | None = None
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
        check_initial_state(self.plan.workflow, self._thread.initial_state(state))
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
            view = await self._thread.head(state)
            decision = self._thread.decide(state, view)
            step.detail.update(view.as_json(), action=decision.action)
        query = EvidenceQuery(
            agent_id=agent_id,
            thread_id=thread_id,
            time_window_seconds=seconds_in(state, "time_window_seconds"),
        ).reaching(view.created_at, settings.time_window_seconds)
        if self.plan.lost is not None and decision.action == "restart":
            query = replace(query, time_window_seconds=WINDOW_LIMIT_SECONDS)  # it may be long ago
        run_id = self._thread.run_id(view)
        effects = await self._thread.effects(run_id)
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
            view = await self._thread.head(state)
            query = self._thread.query(state)
            own = await collect_own_events(self._thread.own_events(), query)
            gathered = state.get("gathered")
            peers = None if gathered is None else PeerContext.from_json(gathered)
            effects = await self._thread.effects(state.get("run_id"))
            if self.plan.thread is not None:
                for effect, word in words_on(effects, peers):
                    await self.plan.thread.settle(effect, word, "peer")
                effects = await self._thread.effects(state.get("run_id"))
            # What is in doubt now is for `settle`, after which nothing is.
            found = await self._infer(state, view, reconstruct(query, view, own, peers, effects))
            evidence = dict(found)
            del evidence["state"]  # it is in the thread's own checkpoint
            step.detail.update(own_events=len(own.events), degraded=bool(evidence["degraded"]))
        return {
            "evidence": evidence,
            "doubts": [effect.key for effect in self._thread.doubted(state, effects)],
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
        known = view.values if view.exists else self._thread.initial_state(state)
        inferred = await plan.inference.fill(
            plan.workflow,
            known if isinstance(known, Mapping) else {},
            found["peer_context"],
            is_exact=view.exists or plan.admitted is not None,
            but=(plan.channel,),
            settings=plan.settings_now(),
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
        late, unclear, refused = await self._heard(thread, state)
        if thread.epoch != state["epoch"]:
            await thread.ask_again(await self._thread.doubtful(state), run_id)
        asked = self.plan.use_peer_context
        while open_ones := await self._thread.doubtful(state):
            known = await self._thread.effects(run_id)
            if not self.plan.can_ask or any(e.if_unknown == "fail" for e in open_ones):
                if refused is not None:
                    raise refused
                lines = lines_on(open_ones, known, asked=asked)
                result = await self._stopped_in_doubt(state, lines)
                return {"result": {**result, "reasons": [*late, *result["reasons"]]}}
            # What it returns was said to a question before this one, and has been used.
            interrupt(
                what_to_settle(
                    open_ones,
                    among=known,
                    asked=asked,
                    consumed=state["evidence"]["consumed"],
                    too_late=late,
                    unclear=unclear,
                )
            )
        if refused is not None:
            raise refused
        evidence = state["evidence"]
        effects = [effect_json(effect) for effect in await self._thread.effects(run_id)]
        reasons = [*evidence["reasons"], *late]
        return {"evidence": {**evidence, "effects": effects, "reasons": reasons}}

    async def _heard(
        self, thread: OwnedThread, state: RecoveryState
    ) -> tuple[list[str], object, ConfigurationError | None]:
        """Use what a human says of effects: to the incident's question, and by hand.

        Returns:
            What came too late, what is no answer, and why what was said by hand is none.
        """
        known = await self._thread.effects(state.get("run_id"))
        incident = await thread.incident(state["incident_id"]) if self.plan.can_ask else None
        given = None if incident is None or incident.answer is None else incident.answer["value"]
        late, unclear, by_hand = list[str](), None, self.plan.answers
        if given is not None and given != by_hand:  # by hand it is both, and read as such
            try:
                said = answer_of(incident, self._thread.doubted(state, known), known)
                late += await self._answered(thread, said, state)
            except ConfigurationError:
                unclear = given
        if by_hand:
            try:
                said = read_answer(by_hand, named(known), may_be_bare=False)
                late += await self._answered(thread, said, state)
            except ConfigurationError as refused:
                return late, by_hand, refused
        return late, unclear, None

    async def _answered(
        self, thread: OwnedThread, said: Mapping[str, Settled], state: RecoveryState
    ) -> list[str]:
        """Write down what a human says of effects; return what came too late, and why."""
        late = []
        for effect in await self._thread.effects(state.get("run_id")):
            told = said.get(effect.key)
            if told is None or is_said(effect, told):
                continue
            why = too_late(effect, is_ahead=self._thread.is_ahead(state, effect))
            if why is not None:
                late.append(why)
            elif effect.status == "intent":
                await thread.settle(effect, told, "human")
            else:
                await thread.amend(effect, told)
        return late

    def _missing_witnesses(self, state: RecoveryState) -> str | None:
        """Say what must be known before a run is begun anew of which no record is left."""
        plan, evidence = self.plan, state["evidence"]
        if plan.lost is None or state["action"] != "restart" or plan.despite_silence:
            return None
        known = self._thread.remembered(state)
        if not plan.lost.concerns(known):
            return None
        return what_is_missing(known, evidence["coverage"], plan.limits.under(state).expect)

    async def _stopped_in_doubt(
        self, state: RecoveryState, reasons: Sequence[str]
    ) -> dict[str, Any]:
        why = tuple(f"in_doubt: {reason}" for reason in reasons)
        stopped = Decision(action="stop", status="in_doubt", reasons=why)
        return self._stopped(state, await self._thread.head(state), stopped)

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
            update["result"] = self._stopped(state, await self._thread.head(state), ended)
        return update

    async def resume_workflow(self, state: RecoveryState) -> Update:
        """Read the head again, bring the facts in once, and let the workflow go on."""
        plan, evidence = self.plan, state["evidence"]
        before = await self._thread.head(state)
        decision = self._thread.decide(state, before)
        if decision.action == "stop":  # somebody else was here since
            return {"result": self._stopped(state, before, decision)}
        delivery = filled(
            plan.workflow,
            before,
            self._thread.deliver(state, before, decision),
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
            after = await self._thread.head_if_it_can_be_read(state)
            verified.detail.update(after.as_json() if after else {})
            first_at = await first_checkpoint_after(
                plan.workflow,
                self._thread.place(state),
                before.checkpoint_id,
                timeout_seconds=plan.settings_now().database_timeout_seconds,
            )
        run_id, thread = state.get("run_id"), plan.thread
        if self.begun is not None:
            run_id, thread = self.begun.run_id, self.begun.thread
        moments = {**state, "run_id": run_id, "first_checkpoint_at": first_at}
        effects = [] if thread is None else await thread.known(run_id)
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
        place = but_its_own(
            self._thread.place_of_run(state, before, decision), plan.workflow.config
        )
        known = self._thread.known(state, before, decision)
        options: Any = {"context": plan.context, "durability": durability}
        is_named = decision.action == "restart" or before.run_id is not None
        lost = plan.lost if plan.admitted is None and is_named else None
        if lost is None or not lost.concerns(known):
            if plan.thread is not None:
                run_id = state.get("run_id") or new_id()
                since = self._thread.doubted_since(run_id)
                effects = plan.thread.effects_of(
                    run_id, input_digest=self._thread.digest(state), doubted_since=since
                )
                place = effects.go_along(of_run(place, run_id))
            return await resume_workflow(plan.workflow, place, delivery, **options)
        beginning = lost.begun(
            plan.workflow,
            place,
            known,
            agent_id=state["failed_agent_id"],
            initial_state=self._thread.initial_state(state),
            input_digest=self._thread.digest(state),
            **options,
        )
        async with beginning as begun:
            self.begun = begun
            self._of_the_lost = (said_of(known, begun.run_id),)
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
                update = _gathered(nobody_asked(self._thread.query(state), degraded))
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


def _beginning(before: Sequence[StepRecord]) -> str:
    return before[0]["started_at"] if before else datetime.now(UTC).isoformat()


def _attempt() -> int:
    """Return which attempt at this node LangGraph makes, from 1."""
    information = get_runtime().execution_info
    return 1 if information is None else information.node_attempt


def _gathered(context: PeerContext) -> Update:
    return {"gathered": context.as_json()}
