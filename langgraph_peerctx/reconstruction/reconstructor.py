"""Reconstruct a failed agent's thread; `recover_and_resume_workflow_async` resumes it as well."""

from collections.abc import Sequence
from dataclasses import replace

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableConfig

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.workflow import Workflow, compiled, thread_config
from langgraph_peerctx.gathering.gatherer import OnAnswer
from langgraph_peerctx.identifiers import check_id
from langgraph_peerctx.protocol.messages import InDoubtKey
from langgraph_peerctx.reconstruction.checkpoint import CheckpointView, load_checkpoint
from langgraph_peerctx.reconstruction.evidence import (
    Reconstruction,
    reconstruct,
    with_inferred,
)
from langgraph_peerctx.reconstruction.gap_filling import Inference
from langgraph_peerctx.reconstruction.recovery import recover_and_resume_workflow_async
from langgraph_peerctx.reconstruction.result import RecoveryResult
from langgraph_peerctx.reconstruction.settling import keys_of, known_effects
from langgraph_peerctx.reconstruction.sources import (
    ContextRuntime,
    EvidenceQuery,
    collect_context,
    collect_own_events,
    open_sources,
)


class AgentReconstructor:
    """Puts together what is known of a failed agent's thread; it runs and writes nothing.

    Args:
        enable_peer_context: Whether to ask the peers.
        peer_context_timeout: The longest wait for their answers, in seconds.
        workflow: The agent's compiled workflow, to read the checkpoint through; without one the
            agent's own events and its peers are all there is, and the result says so.
        llm: Any chat model; it may fill state keys that have no value, and nothing else. What it
            filled stands under `inferred`, and is marked in `provenance`.
        infer: The state keys that it may fill; by default any, where there is no checkpoint.
        runtime: A running runtime to use; by default each reconstruction opens and closes one.
        settings: For the runtime that is opened; by default from the environment.
    """

    def __init__(
        self,
        enable_peer_context: bool = True,  # noqa: FBT001, FBT002 - published so
        peer_context_timeout: float = 5.0,
        *,
        workflow: Workflow | None = None,
        llm: BaseChatModel | None = None,
        infer: Sequence[str] = (),
        runtime: ContextRuntime | None = None,
        settings: PeerContextSettings | None = None,
    ) -> None:
        self.enable_peer_context = enable_peer_context
        self.peer_context_timeout = peer_context_timeout
        self._workflow = None if workflow is None else compiled(workflow)
        self._inference = Inference(llm=llm, keys=tuple(infer))
        if self._workflow is not None:
            self._inference.check(self._workflow)
        self._runtime = runtime
        self._settings = settings or (runtime.settings if runtime else PeerContextSettings())

    async def reconstruct_async(
        self,
        agent_id: str,
        thread_id: str,
        *,
        config: RunnableConfig | None = None,
        time_window_seconds: float | None = None,
        expect: Sequence[str] = (),
        min_responses: int | None = None,
        in_doubt: Sequence[InDoubtKey] = (),
        on_answer: OnAnswer | None = None,
    ) -> Reconstruction:
        """Read the checkpoint, ask the peers, and put the evidence together.

        Effects of the thread's newest run are shown as the control database knows them, and its
        peers are asked about those in doubt; nothing is settled by it.

        Args:
            agent_id: The failed agent.
            thread_id: The thread it worked on.
            config: What the workflow's checkpointer needs to find the thread, beside its id.
            time_window_seconds: How far back to look, in seconds; by default to the last
                checkpoint, and the settings' window further.
            expect: Agents or processes that should answer; once they have, the wait ends.
            min_responses: Fewer answers than this is an error.
            in_doubt: Effects of which nobody here knows whether they happened.
            on_answer: Is told of each peer's answer when it arrives.

        Raises:
            ConfigurationError: If an argument cannot be right.
            ProtocolError: If an id is one that peers would refuse.
            TooFewResponsesError: If fewer than `min_responses` answered in time.
            StoreError: If the checkpointer could not be read.
        """
        place = thread_config(config, thread_id)
        query = EvidenceQuery(
            agent_id=check_id(agent_id, "agent_id"),
            thread_id=thread_id,
            use_peer_context=self.enable_peer_context,
            peer_timeout_seconds=self.peer_context_timeout,
            time_window_seconds=time_window_seconds,
            expect=tuple(expect),
            min_responses=min_responses,
        )
        checkpoint = await self._load(place)
        ledger = await known_effects(self._settings, query.agent_id, thread_id)
        query = replace(query, in_doubt=(*in_doubt, *keys_of(ledger.effects)))
        query = query.reaching(
            checkpoint.created_at if checkpoint else None, self._settings.time_window_seconds
        )
        async with open_sources(
            use_peer_context=self.enable_peer_context,
            runtime=self._runtime,
            settings=self._settings,
        ) as sources:
            peers = await collect_context(sources, query, on_answer=on_answer)
            own = await collect_own_events(sources, query)
        own = replace(own, shortfalls=(*own.shortfalls, *ledger.shortfalls))
        found = reconstruct(
            query, checkpoint, own, peers, ledger.effects, doubts=ledger.doubts(checkpoint, peers)
        )
        if self._workflow is None or self._inference.llm is None:
            return found
        inferred = await self._inference.fill(
            self._workflow,
            found["state"],
            found["peer_context"],
            is_exact=checkpoint is not None and checkpoint.exists,
            settings=self._settings,
        )
        return with_inferred(found, inferred)

    async def _load(self, config: RunnableConfig) -> CheckpointView | None:
        if self._workflow is None:
            return None
        return await load_checkpoint(
            self._workflow, config, timeout_seconds=self._settings.database_timeout_seconds
        )


__all__ = [
    "AgentReconstructor",
    "Reconstruction",
    "RecoveryResult",
    "recover_and_resume_workflow_async",
]
