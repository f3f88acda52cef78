"""One recovery under a claim: the thread is taken, the recovery graph runs, the end is written.

Claiming stands outside the graph, at its every start and resume: a stand-in that inherited an epoch
from a checkpoint would write under a superseded one.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.serde.types import INTERRUPT
from langgraph.types import Command, Durability

from langgraph_peerctx.asking import calls_of
from langgraph_peerctx.background import BackgroundRuntime
from langgraph_peerctx.durability.admission import (
    config_of,
    context_of,
    fenced,
    input_of,
    is_redacted,
    stopping_as,
)
from langgraph_peerctx.durability.fenced_checkpointer import FencedCheckpointer
from langgraph_peerctx.durability.isolation import in_empty_context
from langgraph_peerctx.durability.ownership import AgentFence, Held, Ownership
from langgraph_peerctx.durability.recording import recorded, recorder_of
from langgraph_peerctx.durability.workflow import Workflow, checkpointer_of, compiled
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    CheckpointerError,
    InDoubtError,
    PeerContextError,
    StaleOwnerError,
    StoreError,
)
from langgraph_peerctx.gathering.gatherer import OnAnswer
from langgraph_peerctx.nodes.on_runtime import RuntimeSource
from langgraph_peerctx.nodes.peer_context_subgraph import Limits
from langgraph_peerctx.owned import unowned
from langgraph_peerctx.persistence.incidents import Incident, Recovery, Settlement
from langgraph_peerctx.persistence.runs import LostRun, Run
from langgraph_peerctx.protocol.looking import plain
from langgraph_peerctx.reconstruction.approval import Thresholds
from langgraph_peerctx.reconstruction.gap_filling import Inference
from langgraph_peerctx.reconstruction.human_answers import is_about_effects, named, read_answer
from langgraph_peerctx.reconstruction.incident import (
    IncidentRecord,
    OnStep,
    StepRecord,
    incident_record,
    recovery_span,
    tell,
    timed,
)
from langgraph_peerctx.reconstruction.recovery_graph import RecoverySteps
from langgraph_peerctx.reconstruction.recovery_plan import RecoveryPlan
from langgraph_peerctx.reconstruction.report import Noticed
from langgraph_peerctx.reconstruction.result import RecoveryResult
from langgraph_peerctx.reconstruction.resume import Admitted, Given
from langgraph_peerctx.reconstruction.settling import OwnedThread
from langgraph_peerctx.reconstruction.sources import OwnEvents
from langgraph_peerctx.reconstruction.standing import as_it_stands, kept, result_without, storable
from langgraph_peerctx.runtime import PeerContextRuntime

_logger = logging.getLogger(__name__)

ContextFactory: TypeAlias = Callable[[Run], Any | Awaitable[Any]]

RECOVERY_THREAD = "peerctx-recovery-"
"""Before an incident's id: the thread of its recovery graph, beside the workflow's own threads."""
FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 60.0
_FORK = ("checkpoint_id", "checkpoint_ns", "checkpoint_map")
"""What names the checkpoint from which a run forked."""
_NEEDS_A_PERSON = frozenset({"needs_context", "nothing_to_recover", "not_approved"})
"""What another attempt would not change."""
_OUTAGES = (StoreError, BrokerUnavailableError, StaleOwnerError)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedWorkflow:
    """A workflow whose runs are recovered, and how.

    Attributes:
        workflow: Compiled, with the checkpointer that its agents write to.
        context_factory: Makes the context of a run anew; by default what the run has kept of it.
        config: Callbacks, tags, metadata and configurable values, under what the run has kept.
        peer_context_channel: The state channel that receives the peers' facts.
        use_peer_context: Whether to ask the peers.
        expect: Who should answer; by default those who are there.
        timeout_seconds: The longest wait for the peers; by default the settings'.
        min_responses: Do not resume if fewer answered.
        approve_below_coverage: Ask a human if less has answered, from 0 to 1; see `Thresholds`.
        approve_below_confidence: Ask a human if less of what was told is undisputed.
        llm: May fill what no evidence has; see `Inference`.
        infer: The state keys that it may fill.
        durability: By default `sync`; `async` where a run was begun with less than `sync`, since
            LangGraph may not be able to run the workflow so.
    """

    workflow: Workflow
    context_factory: ContextFactory | None = None
    config: RunnableConfig | None = None
    peer_context_channel: str = "peer_context"
    use_peer_context: bool = True
    expect: tuple[str, ...] = ()
    timeout_seconds: float | None = None
    min_responses: int | None = None
    approve_below_coverage: float | None = None
    approve_below_confidence: float | None = None
    llm: BaseChatModel | None = None
    infer: tuple[str, ...] = ()
    durability: Durability | None = None
    thresholds: Thresholds = field(init=False)
    inference: Inference = field(init=False)

    def __post_init__(self) -> None:
        # The recoverer claims the thread itself: what it resumes must not ask to be admitted.
        object.__setattr__(self, "workflow", unowned(compiled(self.workflow)))
        thresholds = Thresholds(
            coverage=self.approve_below_coverage, confidence=self.approve_below_confidence
        )
        object.__setattr__(self, "thresholds", thresholds)
        inference = Inference(llm=self.llm, keys=self.infer)
        inference.check(self.workflow)
        object.__setattr__(self, "inference", inference)


class Recoverer:
    """Recovers lost runs, on the loop of whoever asks; claims and leases are the process's.

    Args:
        runtime: The process's runtime.
        ownership: What the process owns.
        source: Another runtime than the process's own, for asking the peers.
        open_store: Another event store than the settings'.
        order: What the recovery graph is asked beside agent and thread; see `RecoveryInput`.
        initial_state: What to begin with where a run's own input was redacted.
        answers: What a human says of effects in doubt, by their keys.
        on_step: Is told of each step when it has ended.
        on_answer: Is told of each peer's answer when it arrives.
    """

    def __init__(
        self,
        runtime: BackgroundRuntime | PeerContextRuntime,
        ownership: Ownership,
        *,
        source: RuntimeSource | None = None,
        open_store: Callable[[], OwnEvents] | None = None,
        order: Mapping[str, Any] | None = None,
        initial_state: Any = None,
        answers: Mapping[str, Any] | None = None,
        on_step: OnStep | None = None,
        on_answer: OnAnswer | None = None,
    ) -> None:
        self._runtime = runtime
        self._ownership = ownership
        self._source = source
        self._open_store = open_store
        self._order = dict(order or {})
        self._initial_state = initial_state
        self._answers = dict(answers or {})
        self._on_step = on_step
        self._on_answer = on_answer

    async def recover(
        self,
        lost: LostRun,
        supervised: SupervisedWorkflow,
        *,
        died: bool = False,
        noticed: Noticed | None = None,
    ) -> RecoveryResult | None:
        """Take a lost run over and bring it to its end.

        Args:
            lost: The run.
            supervised: Its workflow.
            died: Whether its owner is known to be dead.
            noticed: How and when that was noticed.

        Returns:
            How it ended; None if somebody else has it, or it is not the time.

        Raises:
            StoreError: If the control database failed before the claim.
        """
        ownership, asked_at = self._ownership, time.monotonic()
        with timed(
            "claim", is_traced=False, agent_id=lost.agent_id, thread_id=lost.thread_id
        ) as claim:  # its span follows: it is the recovery's, if it is ours
            recovery = await self._begun(lost, died=died)
            claim.detail.update(epoch=None if recovery is None else recovery.lease.epoch)
        if recovery is None:
            return None
        if recovery.is_over:
            _logger.error(
                "%s of %s has had all its attempts: it is a dead letter",
                lost.thread_id,
                lost.agent_id,
                extra={"incident_id": recovery.incident.incident_id},
            )
            return result_without(recovery.incident, "dead_letter", "dead_letter: no attempt left")
        held = ownership.hold(recovery.lease, asked_at)
        self._runtime.watch.add(
            held.key, asyncio.get_running_loop(), self._runtime.settings.stuck_seconds
        )
        try:
            with recovery_span(recovery, claim.record) as span:
                settlement, result = await self._attempt(
                    recovery, supervised, held, claim.record, noticed
                )
                span.set(status=result["status"], degraded=result["degraded"])
        except BaseException:
            await self._settle(recovery, _handed_over("the recoverer leaves"))
            raise
        finally:
            self._runtime.watch.remove(held.key)
            ownership.drop(held)
        if not await self._settle(recovery, settlement):
            return None
        return result

    async def _begun(self, lost: LostRun, *, died: bool) -> Recovery | None:
        """Claim a lost run; a claim of which nobody hears any more is given back."""
        control = self._ownership.control

        def undo(recovery: Recovery | None) -> None:
            if recovery is not None and not recovery.is_over:
                self._owe(recovery, _handed_over("nobody waited for the claim"))

        begin = partial(
            control.begin_recovery,
            lost,
            self._ownership.owner,
            died=died,
            holds=self._ownership.holds(lost.agent_id, lost.thread_id),
            max_attempts=self._runtime.settings.max_attempts,
        )
        return await control.in_thread(begin, undo=undo)

    async def recover_thread(
        self, agent_id: str, thread_id: str, supervised: SupervisedWorkflow
    ) -> RecoveryResult:
        """Recover a thread if it needs it, and say what is with it otherwise.

        Raises:
            ConfigurationError: If `answers` are none; nothing was run.
            StoreError: If the control database failed.
        """
        control = self._ownership.control
        await control.in_thread(partial(self._move_on, agent_id, thread_id))
        lost = await control.aopen_run(agent_id, thread_id)
        result = None if lost is None else await self.recover(lost, supervised)
        if result is not None:
            return result
        incident = await control.aincident_of(agent_id, thread_id)
        lost = await control.aopen_run(agent_id, thread_id)
        leases = await control.aleases_of_thread(thread_id)
        others = [lease.agent_id for lease in leases if lease.agent_id != agent_id]
        return as_it_stands(agent_id, thread_id, lost, incident, others)

    def _move_on(self, agent_id: str, thread_id: str) -> None:
        """Use what the caller knows and nobody knew before: answers, or an input."""
        control = self._ownership.control
        incident = control.incident_of(agent_id, thread_id)
        if incident is None or incident.status == "recovered":
            return
        if self._answers:  # one that is none is refused before anything is claimed
            effects = control.effects_of(agent_id, thread_id, incident.run_id or "")
            read_answer(self._answers, named(effects), may_be_bare=False)
        asks = incident.question is not None and is_about_effects(incident.question)
        if incident.status == "waiting_for_human" and asks and self._answers:
            control.answer(incident.incident_id, self._answers, question=incident.question)
        elif (incident.status in ("open", "dead_letter") and self._answers) or (
            incident.status == "dead_letter" and self._initial_state is not None
        ):
            control.redrive(incident.incident_id)

    async def _attempt(
        self,
        recovery: Recovery,
        supervised: SupervisedWorkflow,
        held: Held,
        claim: StepRecord | None,
        noticed: Noticed | None,
    ) -> tuple[Settlement, RecoveryResult]:
        """Run the recovery graph, and say what is to be written down."""
        incident = recovery.incident
        try:
            if self._on_step is not None and claim is not None:
                tell(self._on_step, claim)
            plan = await self._plan(recovery, supervised, held)
            before = () if claim is None else (claim,)
            steps = RecoverySteps(replace(plan, before=before, noticed=noticed))
            state = await self._run(recovery, supervised, steps)
        except PeerContextError as error:
            _logger.warning("the recovery of %s failed: %s", incident.thread_id, error)
            return self._failed(recovery, error, None, is_outage=isinstance(error, _OUTAGES))
        except Exception as error:
            _logger.exception("the recovery of %s failed", incident.thread_id)
            return self._failed(recovery, error, None, is_outage=False)
        if state.get(INTERRUPT):
            question = plain(state[INTERRUPT][0].value)
            report = incident_record(state, "waiting_for_human", state.get("evidence"))
            return self._waiting(incident, question, report)
        result: RecoveryResult = state["result"]
        settlement = _settlement(result)
        if result["status"] == "in_doubt":
            return self._in_doubt(recovery, steps.error, result)
        if result["status"] == "failed":
            # A node may raise anything; only what stands under the run is an outage.
            is_outage = isinstance(steps.error, CheckpointerError | StaleOwnerError)
            settlement, result = self._failed(recovery, steps.error, result, is_outage=is_outage)
        return settlement, {**result, "final_state": steps.final_state}

    def _waiting(
        self, incident: Incident, question: Mapping[str, Any], report: IncidentRecord
    ) -> tuple[Settlement, RecoveryResult]:
        """Wait for a human; of effects in doubt the peer that knows is asked again meanwhile."""
        settlement = Settlement(
            status="waiting_for_human",
            end_kind="handed_over",
            question=question,
            report=plain(report),
            counts=False,
            retry_seconds=_patience(incident) if is_about_effects(question) else None,
        )
        reason = f"waiting_for_human: {incident.incident_id[:8]} asks: {question.get('question')}"
        result = result_without(incident, "waiting_for_human", reason[:400])
        return settlement, {**result, "incident": report}

    @staticmethod
    def _in_doubt(
        recovery: Recovery, error: Exception | None, result: RecoveryResult
    ) -> tuple[Settlement, RecoveryResult]:
        """Say what becomes of a run whose effects nobody could tell of."""
        if isinstance(error, InDoubtError) and not error.is_final:
            # It came up in the workflow itself: the next attempt asks before it runs.
            later = _patience(recovery.incident)
            again = replace(_handed_over(str(error)), result=kept(result), retry_seconds=later)
            return again, result
        return replace(_settlement(result), status="dead_letter", end_kind="handed_over"), result

    async def _plan(
        self, recovery: Recovery, supervised: SupervisedWorkflow, held: Held
    ) -> RecoveryPlan:
        run = recovery.run
        fence = AgentFence(run.agent_id, self._ownership)
        workflow = stopping_as(fenced(supervised.workflow, fence), run)
        said = config_of(workflow, run)
        configurable = said.get("configurable", {})
        fork_of = {name: configurable.pop(name) for name in _FORK if name in configurable}
        return RecoveryPlan(
            workflow=workflow,
            admitted=Admitted(
                run_id=run.run_id,
                inputs=tuple(
                    Given(
                        value=input_of(workflow, run, number),
                        checkpoint_id=given.checkpoint_id,
                        is_redacted=is_redacted(run, number),
                    )
                    for number, given in enumerate(run.inputs)
                ),
                fork_of=fork_of if "checkpoint_id" in fork_of else None,
                doubted_since=run.doubted_since,
            ),
            thread=OwnedThread(
                ownership=self._ownership,
                held=held,
                calls=calls_of(self._runtime) if supervised.use_peer_context else None,
            ),
            initial_state=self._initial_state,
            answers=self._answers,
            can_ask=checkpointer_of(workflow) is not None,
            inference=supervised.inference,
            incident_id=recovery.incident.incident_id,
            channel=supervised.peer_context_channel,
            context=await _context(workflow, run, supervised.context_factory),
            config=recorded(_merged(supervised.config, said), recorder_of(run.agent_id)),
            durability=supervised.durability or _durability_of(run),
            use_peer_context=supervised.use_peer_context,
            limits=Limits(
                expect=supervised.expect,
                timeout_seconds=supervised.timeout_seconds,
                min_responses=supervised.min_responses,
            ),
            thresholds=supervised.thresholds,
            settings=self._runtime.settings,
            source=self._source,
            open_store=self._open_store,
            on_step=self._on_step,
            on_answer=self._on_answer,
        )

    async def _run(
        self, recovery: Recovery, supervised: SupervisedWorkflow, steps: RecoverySteps
    ) -> dict[str, Any]:
        """Begin the recovery graph, or go on where an earlier recoverer left it."""
        incident, saver = recovery.incident, checkpointer_of(supervised.workflow)
        order = {
            **self._order,
            "failed_agent_id": incident.agent_id,
            "thread_id": incident.thread_id,
        }
        if saver is None:
            app = steps.graph().compile(name="recovery")
            begun: dict[str, Any] = await in_empty_context(
                app.ainvoke(order), name=f"recover {incident.thread_id}"
            )
            return begun
        app = steps.graph().compile(checkpointer=self._beside(saver, recovery), name="recovery")
        place: RunnableConfig = {
            "configurable": {"thread_id": f"{RECOVERY_THREAD}{incident.incident_id}"}
        }
        snapshot = await app.aget_state(place)
        if snapshot.tasks:
            state = await self._invoked(app, _answer_to(snapshot.interrupts, incident), place)
        else:
            state = await self._invoked(app, order, place)
            answer = _answer_to(state.get(INTERRUPT, ()), incident)
            if answer is not None:  # it was given to an attempt before
                state = await self._invoked(app, answer, place)
        if state.get(INTERRUPT):  # what it knows so far belongs to the question
            return {**(await app.aget_state(place)).values, INTERRUPT: state[INTERRUPT]}
        return state

    async def _invoked(self, app: Any, given: Any, place: RunnableConfig) -> dict[str, Any]:
        state: dict[str, Any] = await in_empty_context(
            app.ainvoke(given, place, durability="sync"),
            name=f"recover {place['configurable']['thread_id']}",
        )
        return state

    def _beside(
        self, saver: BaseCheckpointSaver[Any], recovery: Recovery
    ) -> BaseCheckpointSaver[Any]:
        """Return the saver for the recovery's own thread: one lease fences both."""
        bare = saver.bare if isinstance(saver, FencedCheckpointer) else saver
        fence = AgentFence(recovery.lease.agent_id, self._ownership)
        return FencedCheckpointer(bare, _OfThread(fence, recovery.lease.thread_id))

    def _failed(
        self,
        recovery: Recovery,
        error: Exception | None,
        result: RecoveryResult | None,
        *,
        is_outage: bool,
    ) -> tuple[Settlement, RecoveryResult]:
        """Put the next attempt off, or the incident aside."""
        incident = recovery.incident
        said = f"failed: {type(error).__name__}: {str(error)[:300]}"
        found = result or result_without(incident, "failed", said)
        is_last = not is_outage and incident.attempts >= self._runtime.settings.max_attempts
        settlement = replace(
            _handed_over(said),
            status="dead_letter" if is_last else "open",
            result=kept(found),
            report=plain(found["incident"]),
            counts=not is_outage,
            retry_seconds=_patience(incident),
        )
        return settlement, found

    async def _settle(self, recovery: Recovery, settlement: Settlement) -> bool:
        """Write the end down, whoever is cancelled meanwhile; tell whether it was ours to write."""
        settlement = storable(recovery.run, settlement)  # whichever way it is written down
        write = partial(self._settled, recovery, settlement)
        settling = asyncio.ensure_future(self._ownership.control.in_thread(write))
        try:
            is_ours = await asyncio.shield(settling)
        except asyncio.CancelledError:
            await asyncio.wait({settling})
            raise
        except StoreError:  # it did not get a thread, or takes too long
            self._owe(recovery, settlement)
            return True
        if not is_ours:
            _logger.warning("the recovery of %s was taken over", recovery.incident.thread_id)
        return is_ours

    def _settled(self, recovery: Recovery, settlement: Settlement) -> bool:
        try:
            return self._ownership.control.settle(recovery, settlement)
        except StoreError as error:
            _logger.warning("the end of a recovery is not written down yet: %s", error)
            self._owe(recovery, settlement)
            return True  # it ended here; whoever takes it up again finds it so

    def _owe(self, recovery: Recovery, settlement: Settlement) -> None:
        lease, control = recovery.lease, self._ownership.control
        write = partial(control.settle, recovery, settlement)
        self._ownership.owe(lease.agent_id, lease.thread_id, write)


class _OfThread:
    """A fence that lets a thread be written under another one's lease."""

    def __init__(self, fence: AgentFence, thread_id: str) -> None:
        self._fence = fence
        self._thread_id = thread_id

    def may_write(self, thread_id: str) -> int | None:
        del thread_id
        return self._fence.may_write(self._thread_id)

    async def amay_write(self, thread_id: str) -> int | None:
        del thread_id
        return await self._fence.amay_write(self._thread_id)

    def epoch_of(self, thread_id: str) -> int:
        del thread_id
        return self._fence.epoch_of(self._thread_id)

    async def aepoch_of(self, thread_id: str) -> int:
        del thread_id
        return await self._fence.aepoch_of(self._thread_id)


def _answer_to(asking: Sequence[Any], incident: Incident) -> Command[Any] | None:
    """Return what a human has answered to exactly this question; None if it is another one."""
    given = incident.answer
    if given is None or not asking or not isinstance(asking[0].value, Mapping):
        return None
    if given.get("question_id") != asking[0].value.get("question_id"):
        return None
    return Command(resume=given["value"])


def _patience(incident: Incident) -> float:
    """Return how long the next attempt waits: longer each time, whether or not it counts."""
    tries = incident.epoch - incident.lost_epoch
    return min(FIRST_RETRY_SECONDS * 2.0 ** min(tries - 1, 10), LONGEST_RETRY_SECONDS)


def _durability_of(run: Run) -> Durability | None:
    """Return `async` for a run that was not begun with `sync`: maybe it cannot be run so."""
    return "async" if run.durability in ("async", "exit") else None


async def _context(workflow: Workflow, run: Run, factory: ContextFactory | None) -> Any:
    if factory is None:
        return context_of(workflow, run)
    made = factory(run)
    return await made if inspect.isawaitable(made) else made


def _merged(ours: RunnableConfig | None, kept: RunnableConfig) -> RunnableConfig:
    """Return what the run has kept over what the supervisor says."""
    own = ours or {}
    merged: RunnableConfig = {**own, **kept}
    merged["configurable"] = {**own.get("configurable", {}), **kept.get("configurable", {})}
    merged["metadata"] = {**own.get("metadata", {}), **kept.get("metadata", {})}
    return merged


def _settlement(result: RecoveryResult) -> Settlement:
    needs_a_person = result["status"] in _NEEDS_A_PERSON
    return Settlement(
        status="dead_letter" if needs_a_person else "recovered",
        end_kind="handed_over" if needs_a_person else "returned",
        result=kept(result),
        report=plain(result["incident"]),
    )


def _handed_over(why: str) -> Settlement:
    return Settlement(status="open", end_kind="handed_over", error=why, counts=False)
