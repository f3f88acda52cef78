"""From a dead agent's thread to a workflow that goes on: the recovery graph, run once."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Self, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.types import Durability

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.isolation import in_empty_context
from langgraph_peerctx.durability.workflow import Workflow, compiled, thread_config
from langgraph_peerctx.gathering.gatherer import OnAnswer
from langgraph_peerctx.identifiers import check_id
from langgraph_peerctx.nodes.on_runtime import Update, Work
from langgraph_peerctx.nodes.peer_context_subgraph import Limits
from langgraph_peerctx.owned import unowned
from langgraph_peerctx.protocol.messages import InDoubtKey
from langgraph_peerctx.reconstruction.incident import IncidentRecord, OnStep
from langgraph_peerctx.reconstruction.recovery_graph import RecoveryPlan, RecoverySteps
from langgraph_peerctx.reconstruction.resume import RecoveryStatus
from langgraph_peerctx.reconstruction.sources import ContextRuntime
from langgraph_peerctx.runtime import PeerContextRuntime


class RecoveryResult(TypedDict):
    """How a recovery ended.

    Attributes:
        recovered: Whether the workflow was run and did not fail.
        status: `resumed` and `restarted` (from `initial_state`) ended; `already_finished`,
            `nothing_to_recover` and `needs_context` were not run; `waiting_for_human` is it now,
            whether it was run (`recovered`) or not; `not_approved` was not run because a human
            said no; `failed` raised again. More may come.
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
    source = _Borrowed(runtime) if runtime else _Opened(settings)
    steps = RecoverySteps(
        RecoveryPlan(
            workflow=unowned(compiled(workflow)),
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
            on_step=on_step,
            on_answer=on_answer,
        )
    )
    order = {
        "failed_agent_id": check_id(agent_id, "agent_id"),
        "thread_id": thread_config(config, thread_id)["configurable"]["thread_id"],
        "time_window_seconds": time_window_seconds,
        "in_doubt": [key.model_dump(mode="json") for key in in_doubt],
    }
    async with source:
        state = await in_empty_context(
            steps.graph().compile(name="recovery").ainvoke(order), name=f"recover {thread_id}"
        )
    result: RecoveryResult = state["result"]
    return {**result, "final_state": steps.final_state}


class _Borrowed:
    """A runtime of the caller's, on the caller's loop."""

    def __init__(self, runtime: ContextRuntime) -> None:
        self._runtime = runtime

    async def acall(self, work: Work) -> Update:
        return await work(self._runtime)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """It stays open."""


class _Opened(AsyncExitStack):
    """A runtime that is opened when it is first needed, and closed at the end."""

    def __init__(self, settings: PeerContextSettings) -> None:
        super().__init__()
        self._settings = settings
        self._runtime: PeerContextRuntime | None = None

    async def acall(self, work: Work) -> Update:
        if self._runtime is None:
            self._runtime = await self.enter_async_context(PeerContextRuntime(self._settings))
        return await work(self._runtime)
