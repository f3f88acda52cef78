"""From a dead agent's thread to a workflow that goes on: the recovery graph, run once."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableConfig
from langgraph.types import Durability

from langgraph_peerctx import tracing
from langgraph_peerctx.asking import Calls, calls_of
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.admission import Redact, fenced
from langgraph_peerctx.durability.isolation import in_empty_context
from langgraph_peerctx.durability.ownership import AgentFence, Ownership
from langgraph_peerctx.durability.workflow import Workflow, compiled, thread_config
from langgraph_peerctx.errors import ConfigurationError, StoreBusyError, StoreError
from langgraph_peerctx.gathering.gatherer import OnAnswer
from langgraph_peerctx.identifiers import check_id
from langgraph_peerctx.nodes.on_runtime import Update, Work
from langgraph_peerctx.nodes.peer_context_subgraph import Limits
from langgraph_peerctx.owned import redact_of, unowned
from langgraph_peerctx.persistence.database import open_in_thread
from langgraph_peerctx.persistence.incidents import ControlDatabase, Settlement
from langgraph_peerctx.persistence.inspection import has_schema
from langgraph_peerctx.protocol.looking import plain
from langgraph_peerctx.protocol.messages import InDoubtKey
from langgraph_peerctx.reconstruction.gap_filling import Inference
from langgraph_peerctx.reconstruction.incident import OnStep
from langgraph_peerctx.reconstruction.lost_stores import LostStores
from langgraph_peerctx.reconstruction.recoverer import Recoverer, SupervisedWorkflow
from langgraph_peerctx.reconstruction.recovery_graph import RecoverySteps
from langgraph_peerctx.reconstruction.recovery_plan import RecoveryPlan
from langgraph_peerctx.reconstruction.result import RecoveryResult
from langgraph_peerctx.reconstruction.settling import OwnedThread
from langgraph_peerctx.reconstruction.sources import ContextRuntime
from langgraph_peerctx.reconstruction.standing import (
    as_it_stands,
    kept,
    storable,
    without_values,
)
from langgraph_peerctx.runtime import PeerContextRuntime


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
    answers: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    despite_silence: bool = False,
    llm: BaseChatModel | None = None,
    infer: Sequence[str] = (),
    durability: Durability | None = None,
    runtime: ContextRuntime | None = None,
    settings: PeerContextSettings | None = None,
    on_step: OnStep | None = None,
    on_answer: OnAnswer | None = None,
) -> RecoveryResult:
    """Resume a dead agent's workflow where it stopped, with what its peers know of it.

    A run that was owned is claimed first, whatever `initial_state` says: of any number of callers
    one recovers it, and nobody does while its process holds its lease. Of any other run the caller
    sees to it that its agent is dead: LangGraph lets two processes run one thread, and then each
    remaining effect happens twice. Safe to call again after a recovery that died itself.

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
        in_doubt: Effects of which nobody here knows whether they happened; those of an owned run
            are known anyway.
        answers: What a human says of effects that are `in_doubt`, by their keys: true, false, or
            `{"happened": true, "reply": ...}`.
        run_id: Which run it was, where no record of it is left and peers remember several.
        despite_silence: Begin a run anew of which no record is left, although peers that may
            remember it say nothing: what they have done for it may be done again. Otherwise it is
            `in_doubt` until they are heard.
        llm: Any chat model; it may fill what neither a checkpoint nor the run's record nor
            `initial_state` has, and nothing else: see `Inference`. What it filled is marked.
        infer: The state keys that it may fill; by default any that has no value, where the run is
            begun anew from `initial_state`.
        durability: By default `sync`, or `async` where LangGraph cannot run the workflow so, in a
            subgraph compiled with `checkpointer=False`, or an owned run was begun with less.
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
    if not isinstance(answers, Mapping | None):
        raise ConfigurationError(
            f"answers={answers!r:.80}: expected a dict from each effect's key to what became of it"
        )
    settings = settings or (runtime.settings if runtime else PeerContextSettings())
    source = _Borrowed(runtime) if runtime else _Opened(settings)
    given = compiled(workflow)
    redact = redact_of(given)
    plan = RecoveryPlan(
        workflow=unowned(given),
        channel=peer_context_channel,
        context=context,
        config=config,
        durability=durability,
        initial_state=initial_state,
        use_peer_context=use_peer_context,
        limits=Limits(
            expect=tuple(expect),
            timeout_seconds=peer_context_timeout,
            min_responses=min_responses,
        ),
        settings=settings,
        source=source,
        open_store=partial(getattr, runtime, "store") if runtime else None,
        can_ask=False,
        answers=dict(answers or {}),
        run_id=run_id,
        despite_silence=despite_silence,
        inference=Inference(llm=llm, keys=tuple(infer)),
        on_step=on_step,
        on_answer=on_answer,
    )
    order = {
        "failed_agent_id": check_id(agent_id, "agent_id"),
        "thread_id": thread_config(config, thread_id)["configurable"]["thread_id"],
        "time_window_seconds": time_window_seconds,
        "in_doubt": [key.model_dump(mode="json") for key in in_doubt],
    }
    standing = await standing_of(settings, agent_id, thread_id)
    if answers and standing == "unknown":
        raise ConfigurationError(
            f"answers={dict(answers)!r:.80}: no record is left of a run of {agent_id!r} in thread "
            f"{thread_id!r}, so no effect of it is known yet: recover without answers=, and answer "
            "what it asks"
        )
    async with source:
        if standing == "unknown":
            steps = RecoverySteps(replace(plan, lost=_lost_stores(source, plan, redact)))
            result = await _recovered(steps, order)
            if steps.begun is not None:
                end = _end(result)
                end = end if redact is None else without_values(end)
                result = await _kept(steps.begun.thread, end, result)
            return result
        owning = await source.owning()
        ownership = await owning.own()
        if standing == "open":
            recoverer = Recoverer(
                owning,
                ownership,
                source=source,
                open_store=plan.open_store,
                order=order,
                initial_state=initial_state,
                answers=answers,
                on_step=on_step,
                on_answer=on_answer,
            )
            return await recoverer.recover_thread(agent_id, thread_id, supervised_as(plan))
        calls = calls_of(owning) if use_peer_context else None
        return await _recovered_under_a_lease(plan, order, ownership, calls)


async def _recovered(steps: RecoverySteps, order: Mapping[str, Any]) -> RecoveryResult:
    """Run the recovery graph once, without a checkpointer."""
    agent_id, thread_id = order["failed_agent_id"], order["thread_id"]
    with tracing.span("peerctx.recovery", agent_id=agent_id, thread_id=thread_id) as span:
        state = await in_empty_context(
            steps.graph().compile(name="recovery").ainvoke(order), name=f"recover {thread_id}"
        )
        result: RecoveryResult = state["result"]
        span.set(status=result["status"], degraded=result["degraded"])
    return {**result, "final_state": steps.final_state}


async def _recovered_under_a_lease(
    plan: RecoveryPlan, order: Mapping[str, Any], ownership: Ownership, calls: Calls | None
) -> RecoveryResult:
    """Recover a thread whose last run has ended: nobody is to write meanwhile."""
    agent_id, thread_id = order["failed_agent_id"], order["thread_id"]
    held = await ownership.claim(agent_id, thread_id)
    if held is None:
        lost = await ownership.control.aopen_run(agent_id, thread_id)
        incident = await ownership.control.aincident_of(agent_id, thread_id)
        return as_it_stands(agent_id, thread_id, lost, incident)
    try:
        behind = fenced(plan.workflow, AgentFence(agent_id, ownership))
        thread = OwnedThread(ownership=ownership, held=held, calls=calls)
        ended = await ownership.control.anewest_run(agent_id, thread_id)
        plan = replace(plan, workflow=behind, thread=thread, ended=ended)
        result = await _recovered(RecoverySteps(plan), order)
        end = _end(result)
        return await _kept(thread, end if ended is None else storable(ended, end), result)
    finally:
        await ownership.release(agent_id, thread_id)


def _end(result: RecoveryResult) -> Settlement:
    """Return the end of a recovery that brought a run on, with all that is known."""
    report = plain(result["incident"])
    return Settlement(status="recovered", end_kind="returned", result=kept(result), report=report)


async def _kept(thread: OwnedThread, end: Settlement, result: RecoveryResult) -> RecoveryResult:
    """Keep the record of a recovery that brought a run on, and return the result.

    The run counts, whatever becomes of its record; where that is lost, the result says so.

    Args:
        thread: Whose it was, under our lease.
        end: What is to be stored of its end.
        result: How it ended.
    """
    if not result["recovered"]:
        return result
    ownership = thread.ownership
    keep = partial(
        ownership.control.keep_recovery,
        thread.held.lease,
        result["incident"]["run_id"],
        recoverer_id=ownership.owner.owner_id,
        result=end.result or {},
        report=end.report or {},
    )
    try:
        await ownership.control.in_thread(keep)
    except StoreError as error:
        _logger.warning("the record of a recovery cannot be kept: %s", error)
        reasons = [*result["reasons"], f"not_kept: {error}"]
        return {**result, "degraded": True, "reasons": reasons}
    return result


_logger = logging.getLogger(__name__)

_Standing = Literal["unknown", "open", "ended"]


async def standing_of(settings: PeerContextSettings, agent_id: str, thread_id: str) -> _Standing:
    """Tell what the control database knows of a thread; none is made by looking.

    Raises:
        StoreError: If one was named, and it cannot be read.
    """

    def look() -> _Standing:
        if not has_schema(settings.control_url, timeout_seconds=settings.database_timeout_seconds):
            return "unknown"
        with ControlDatabase(
            settings.control_url, timeout_seconds=settings.database_timeout_seconds
        ) as control:
            if control.open_run(agent_id, thread_id) is not None:
                return "open"
            return "ended" if control.lease_of(agent_id, thread_id) is not None else "unknown"

    try:
        return await open_in_thread(look)
    except StoreError as error:
        may_be_back = isinstance(error, StoreBusyError) or not settings.control_url.startswith(
            "sqlite"
        )
        if settings.control_database_url is not None or may_be_back:
            raise
        # By default it is the event store, and that one's fault costs its events only.
        _logger.warning("whether the run is owned is not known: %s", error)
        return "unknown"


def supervised_as(plan: RecoveryPlan) -> SupervisedWorkflow:
    """Return how a plan's workflow is recovered where its run was written down."""
    return SupervisedWorkflow(
        workflow=plan.workflow,
        context_factory=None if plan.context is None else lambda _run: plan.context,
        config=plan.config,
        peer_context_channel=plan.channel,
        use_peer_context=plan.use_peer_context,
        expect=plan.limits.expect,
        timeout_seconds=plan.limits.timeout_seconds,
        min_responses=plan.limits.min_responses,
        llm=plan.inference.llm,
        infer=plan.inference.keys,
        durability=plan.durability,
    )


def _lost_stores(
    source: "_Borrowed | _Opened", plan: RecoveryPlan, redact: Redact | None
) -> LostStores | None:
    """Return what begins a run anew of which no record is left; None where nothing can be owned."""
    settings = plan.settings_now()
    if not source.can_own:
        return None
    return LostStores(
        owning=source.owning,
        asks_peers=plan.use_peer_context,
        is_configured=settings.control_database_url is not None,
        is_another=plan.despite_silence,
        redact=redact,
    )


class _Borrowed:
    """A runtime of the caller's, on the caller's loop."""

    def __init__(self, runtime: ContextRuntime) -> None:
        self._runtime = runtime
        self.can_own: bool = isinstance(runtime, PeerContextRuntime)

    async def acall(self, work: Work) -> Update:
        return await work(self._runtime)

    async def owning(self) -> PeerContextRuntime:
        if not isinstance(self._runtime, PeerContextRuntime):
            raise ConfigurationError("the thread's run is owned: its recovery needs a real runtime")
        return self._runtime

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """It stays open."""


class _Opened(AsyncExitStack):
    """A runtime that is opened when it is first needed, and closed at the end."""

    can_own: bool = True

    def __init__(self, settings: PeerContextSettings) -> None:
        super().__init__()
        self._settings = settings
        self._runtime: PeerContextRuntime | None = None

    async def acall(self, work: Work) -> Update:
        return await work(await self.owning())

    async def owning(self) -> PeerContextRuntime:
        if self._runtime is None:
            self._runtime = await self.enter_async_context(PeerContextRuntime(self._settings))
        return self._runtime
