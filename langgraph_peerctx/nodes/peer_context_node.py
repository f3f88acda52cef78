"""A node that asks the peers: `graph.add_node("peer_context", PeerContextNode())`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.types import RetryPolicy

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import BrokerUnavailableError, StoreBusyError, TooFewResponsesError
from langgraph_peerctx.gathering.gatherer import switched_off
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.nodes.on_runtime import NodeRuntime, OnRuntime, Update, Work
from langgraph_peerctx.nodes.progress import Progress, progress_here
from langgraph_peerctx.nodes.reading import seconds_in, text_in, thread_in


def peer_context_retry_policy(max_attempts: int = 3) -> RetryPolicy:
    """Return a policy that retries what may be better next time: broker, database, silent peers.

    A wrong setting or an illegal id is not tried again.
    """
    return RetryPolicy(
        max_attempts=max_attempts,
        retry_on=(BrokerUnavailableError, StoreBusyError, TooFewResponsesError),
    )


class PeerContextNode(OnRuntime):
    """Asks the peers what they remember of a failed agent, and writes it into the state.

    It uses the process's background runtime, and starts it if need be. It reads the state and
    writes two keys of it, plain JSON: the facts (event id -> fact; see `PeerContextState`) and a
    report (see `PeerContext.as_report`). Each step goes to the custom stream, under `peer_context`.

    Killed, it asks anew when its graph is resumed. Where that is too dear, use
    `create_peer_context_subgraph`, which goes on where it was.

    Args:
        failed_agent_key: The state key that names the failed agent.
        thread_key: The state key that names the thread; without it, the graph's own thread.
        window_key: The state key that says how far back peers look, in seconds; without it, the
            settings' window.
        output_channel: The state key that receives the facts.
        report_channel: The state key that receives the report; one that the state lacks is left
            out by LangGraph.
        expect: Agents or processes that should answer; once they have, the wait ends.
        timeout_seconds: The longest wait for answers; by default the settings'.
        min_responses: Fewer answers than this are an error.
        settings: For the runtime, if it does not run yet; by default from the environment.

    Raises, when it runs:
        ConfigurationError: If the state does not say whom or what thread it is about.
        ProtocolError: If an id is illegal.
        TooFewResponsesError: If fewer than `min_responses` answered.
        BrokerUnavailableError: If there is no broker, and mock mode is `never`.
    """

    def __init__(
        self,
        *,
        failed_agent_key: str = "failed_agent_id",
        thread_key: str = "thread_id",
        window_key: str = "time_window_seconds",
        output_channel: str = "peer_context",
        report_channel: str = "peer_context_report",
        expect: Sequence[str] = (),
        timeout_seconds: float | None = None,
        min_responses: int | None = None,
        settings: PeerContextSettings | None = None,
    ) -> None:
        super().__init__("peer_context", settings)
        self._keys = (failed_agent_key, thread_key, window_key)
        self._channels = (output_channel, report_channel)
        self._expect = tuple(expect)
        self._timeout_seconds = timeout_seconds
        self._min_responses = min_responses

    def work(self, state: Any, config: RunnableConfig) -> Work:
        """See `OnRuntime.work`."""
        failed_agent_id, thread_id = self._whom(state, config)
        return partial(
            self._gather,
            progress=progress_here(),
            failed_agent_id=failed_agent_id,
            thread_id=thread_id,
            time_window_seconds=seconds_in(state, self._keys[2]),
        )

    def without(self, state: Any, config: RunnableConfig) -> Update:
        """See `OnRuntime.without`."""
        return self._update(progress_here(), switched_off(*self._whom(state, config)))

    async def _gather(self, runtime: NodeRuntime, *, progress: Progress, **question: Any) -> Update:
        progress.asking(question["failed_agent_id"], question["thread_id"], self._expect)
        context = await runtime.gather(
            **question,
            expect=self._expect,
            timeout_seconds=self._timeout_seconds,
            min_responses=self._min_responses,
            on_sent=progress.sent,
            on_answer=progress.answer,
        )
        return self._update(progress, context)

    def _whom(self, state: object, config: RunnableConfig) -> tuple[str, str]:
        agent_key, thread_key, _ = self._keys
        agent_id = text_in(state, agent_key, "the agent that failed")
        return agent_id, thread_in(state, thread_key, config)

    def _update(self, progress: Progress, context: PeerContext) -> Update:
        progress.covered(context)
        facts, report = self._channels
        return {facts: context.as_channel(), report: context.as_report()}
