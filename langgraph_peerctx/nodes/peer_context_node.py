"""A node that asks the peers: `graph.add_node("peer_context", PeerContextNode())`."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.types import RetryPolicy

from langgraph_peerctx import background
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    StoreBusyError,
    TooFewResponsesError,
)
from langgraph_peerctx.gathering.gatherer import switched_off
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.nodes.progress import Progress, progress_here
from langgraph_peerctx.runtime import PeerContextRuntime


def peer_context_retry_policy(max_attempts: int = 3) -> RetryPolicy:
    """Return a policy that retries what may be better next time: broker, database, silent peers.

    A wrong setting or an illegal id is not tried again.
    """
    return RetryPolicy(
        max_attempts=max_attempts,
        retry_on=(BrokerUnavailableError, StoreBusyError, TooFewResponsesError),
    )


class _Question(TypedDict):
    progress: Progress
    failed_agent_id: str
    thread_id: str
    time_window_seconds: float | None
    timeout_seconds: float | None
    expect: Sequence[str]
    min_responses: int | None


class PeerContextNode(Runnable[Any, dict[str, Any]]):
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
        self.name = "peer_context"
        self._keys = (failed_agent_key, thread_key, window_key)
        self._output_channel = output_channel
        self._report_channel = report_channel
        self._expect = tuple(expect)
        self._timeout_seconds = timeout_seconds
        self._min_responses = min_responses
        self._settings = settings

    def invoke(
        self,
        input: Any,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Ask, on the background runtime's loop; blocks.

        Raises:
            ConfigurationError: If the state does not say whom or what thread it is about.
            ProtocolError: If an id is illegal.
            TooFewResponsesError: If fewer than `min_responses` answered.
            BrokerUnavailableError: If there is no broker, and mock mode is `never`.
        """
        del kwargs
        question = self._question(input, config)
        lease = self._lease()
        if lease is None:
            return self._update(_unasked(question))
        try:
            return self._update(lease.runtime().call(partial(_gather, **question)))
        finally:
            lease.release()

    async def ainvoke(
        self,
        input: Any,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Ask, on the background runtime's loop, from any loop; see `invoke`."""
        del kwargs
        question = self._question(input, config)
        lease = self._lease()
        if lease is None:
            return self._update(_unasked(question))
        try:
            runtime = await lease.aruntime()
            return self._update(await runtime.acall(partial(_gather, **question)))
        finally:
            lease.release()

    def _question(self, state: object, config: RunnableConfig | None) -> _Question:
        agent_key, thread_key, window_key = self._keys
        return _Question(
            progress=progress_here(),
            failed_agent_id=text_in(state, agent_key, "the agent that failed"),
            thread_id=thread_in(state, thread_key, config),
            time_window_seconds=seconds_in(state, window_key),
            timeout_seconds=self._timeout_seconds,
            expect=self._expect,
            min_responses=self._min_responses,
        )

    def _lease(self) -> background.Lease | None:
        """Lease the runtime; None if peer context is switched off: then it is not started."""
        settings = self._settings or background.settings_in_use() or PeerContextSettings()
        return background.lease(settings, keep=True) if settings.enabled else None

    def _update(self, context: PeerContext) -> dict[str, Any]:
        return {
            self._output_channel: context.as_channel(),
            self._report_channel: context.as_report(),
        }


async def _gather(
    runtime: PeerContextRuntime, *, progress: Progress, **question: Any
) -> PeerContext:
    progress.asking(question["failed_agent_id"], question["thread_id"], question["expect"])
    context = await runtime.gather(on_sent=progress.sent, on_answer=progress.answer, **question)
    progress.covered(context)
    return context


def _unasked(question: _Question) -> PeerContext:
    context = switched_off(question["failed_agent_id"], question["thread_id"])
    question["progress"].covered(context)
    return context


def value_in(state: object, key: str) -> Any:
    """Return what a state has under a key: a mapping, a model or a dataclass; None if nothing."""
    return state.get(key) if isinstance(state, Mapping) else getattr(state, key, None)


def text_in(state: object, key: str, meaning: str) -> str:
    """Return a text of the state.

    Raises:
        ConfigurationError: If it is not there, or no text.
    """
    value = value_in(state, key)
    if isinstance(value, str) and value:
        return value
    said = f"it is {value!r:.80}" if value is not None else "the state has no such key"
    raise ConfigurationError(f"state[{key!r}] should name {meaning}: {said}")


def seconds_in(state: object, key: str) -> float | None:
    """Return a number of seconds of the state, or None if it says nothing.

    Raises:
        ConfigurationError: If it is no positive number.
    """
    value = value_in(state, key)
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ConfigurationError(f"state[{key!r}]={value!r:.80} should be a positive number of seconds")


def thread_in(state: object, key: str, config: RunnableConfig | None) -> str:
    """Return the thread that a state names, or the one that the graph runs on.

    Raises:
        ConfigurationError: If neither does.
    """
    if value_in(state, key) is not None:
        return text_in(state, key, "the thread")
    own = (config or {}).get("configurable", {}).get("thread_id")
    if own is not None:
        return str(own)
    raise ConfigurationError(
        f"which thread is it about? Put it into state[{key!r}], or run the graph with a thread_id"
    )
