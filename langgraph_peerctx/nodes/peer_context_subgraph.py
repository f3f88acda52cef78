"""A gather whose steps are nodes: killed between or inside them, it goes on where it was.

Correlation id and reading position are in the checkpoint **before** the question leaves. So a
process that resumes the graph sees the answers that had arrived, and asks only those that are
missing.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Annotated, Any

from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from pydantic import Field
from typing_extensions import TypedDict  # pydantic makes schemas of this one only, up to 3.11

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.gathering.gatherer import OnAnswer, Wanted, switched_off
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.gathering.steps import Asked
from langgraph_peerctx.messaging.transport import Offsets
from langgraph_peerctx.nodes.on_runtime import NodeRuntime, OnRuntime, RuntimeSource, Update, Work
from langgraph_peerctx.nodes.progress import Progress, progress_here
from langgraph_peerctx.nodes.reading import (
    count_in,
    seconds_in,
    text_in,
    texts_in,
    thread_in,
    value_in,
)
from langgraph_peerctx.protocol.messages import ContextRequest, ContextResponse, InDoubtKey


class PeerContextInput(TypedDict, total=False):
    """What the peers are asked."""

    failed_agent_id: Annotated[
        str,
        Field(
            title="Failed agent",
            description="The agent that peers are asked about.",
            examples=["product-agent-1"],
        ),
    ]
    thread_id: Annotated[
        str,
        Field(
            title="Thread",
            description="The thread it worked on; by default this graph's own.",
            examples=["launch-42"],
        ),
    ]
    time_window_seconds: Annotated[
        float,
        Field(
            title="Time window (seconds)",
            description="How far back peers look; by default PEER_CONTEXT_TIME_WINDOW_SECONDS.",
            examples=[3600],
        ),
    ]
    expect: Annotated[
        list[str],
        Field(
            title="Expected answers",
            description="Agents or processes that should answer; the wait ends with the last.",
            examples=[["inventory-agent-1", "marketing-agent-1"]],
        ),
    ]
    timeout_seconds: Annotated[
        float,
        Field(
            title="Timeout (seconds)",
            description="The longest wait for answers; by default PEER_CONTEXT_TIMEOUT_SECONDS.",
            examples=[5],
        ),
    ]
    min_responses: Annotated[
        int,
        Field(
            title="Least answers",
            description="Fewer answering processes than this are an error.",
            examples=[1],
        ),
    ]


class PeerContextOutput(TypedDict, total=False):
    """What they told, and how much of the truth it is."""

    peer_context: Annotated[
        dict[str, Any],
        Field(title="Peer context", description="Event id -> fact, each with source and time."),
    ]
    peer_context_report: Annotated[
        dict[str, Any],
        Field(title="Report", description="Coverage, and why the answer is degraded, if it is."),
    ]


class QuestionState(TypedDict, total=False):
    """What stands between the steps, plain JSON."""

    question: Annotated[
        dict[str, Any],
        Field(title="Question", description="The request, and where its answers are read from."),
    ]
    asked: Annotated[
        dict[str, Any],
        Field(title="Asked", description="When the question left, or why it could not."),
    ]


class _State(PeerContextInput, QuestionState, PeerContextOutput, total=False):
    """The subgraph's own: it shares no reducer with the graph around it, which would double it."""


def create_peer_context_subgraph(
    *,
    expect: Sequence[str] = (),
    timeout_seconds: float | None = None,
    min_responses: int | None = None,
    settings: PeerContextSettings | None = None,
) -> StateGraph[Any, Any, Any, Any]:
    """Return a graph of `position`, `request_context` and `collect_context`, not compiled.

    Compile it without a checkpointer and add it as a node: under its parent's checkpointer it
    survives a crash. Compiled with `checkpointer=True` it does too, and remembers its last answer
    between visits. With `checkpointer=False` it begins anew: as safe as `PeerContextNode`.

    Args:
        expect: Agents or processes that should answer, where the state does not say.
        timeout_seconds: The longest wait, where the state does not say; by default the settings'.
        min_responses: Fewer answers are an error, where the state does not say.
        settings: For the runtime, if it does not run yet; by default from the environment.
    """
    limits = Limits(
        expect=tuple(expect), timeout_seconds=timeout_seconds, min_responses=min_responses
    )
    builder = StateGraph(_State, input_schema=PeerContextInput, output_schema=PeerContextOutput)
    builder.add_node("position", Position(settings))
    builder.add_node("request_context", RequestContext(limits, settings))
    builder.add_node("collect_context", CollectContext(limits, told, settings))
    builder.add_edge(START, "position")
    builder.add_edge("position", "request_context")
    builder.add_edge("request_context", "collect_context")
    builder.add_edge("collect_context", END)
    return builder


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Whom to wait for, and how long; see `create_peer_context_subgraph`."""

    expect: tuple[str, ...] = ()
    timeout_seconds: float | None = None
    min_responses: int | None = None

    def under(self, state: object) -> "Limits":
        """Return what counts where a state has its own word.

        Raises:
            ConfigurationError: If it is of the wrong kind.
        """
        least = count_in(state, "min_responses")
        return Limits(
            expect=texts_in(state, "expect") or self.expect,
            timeout_seconds=seconds_in(state, "timeout_seconds") or self.timeout_seconds,
            min_responses=self.min_responses if least is None else least,
        )


def told(context: PeerContext) -> Update:
    """Return facts and report, as the output schema has them."""
    return {"peer_context": context.as_channel(), "peer_context_report": context.as_report()}


class Position(OnRuntime):
    """Notes where the answers will be read from; nothing is sent."""

    def __init__(
        self,
        settings: PeerContextSettings | None = None,
        source: RuntimeSource | None = None,
        epoch: int = 0,
    ) -> None:
        super().__init__("position", settings, source)
        self._epoch = epoch

    def work(self, state: Any, config: RunnableConfig) -> Work:
        """See `OnRuntime.work`."""
        return partial(
            _position,
            failed_agent_id=text_in(state, "failed_agent_id", "the agent that failed"),
            thread_id=thread_in(state, "thread_id", config),
            time_window_seconds=seconds_in(state, "time_window_seconds"),
            run_id=value_in(state, "run_id"),
            epoch=self._epoch,
            in_doubt=_in_doubt_in(state),
        )

    def without(self, state: Any, config: RunnableConfig) -> Update:
        """See `OnRuntime.without`."""
        text_in(state, "failed_agent_id", "the agent that failed")
        thread_in(state, "thread_id", config)
        return {"question": {}}


class RequestContext(OnRuntime):
    """Sends the question to those of whom no answer is there yet."""

    def __init__(
        self,
        limits: Limits,
        settings: PeerContextSettings | None = None,
        source: RuntimeSource | None = None,
    ) -> None:
        super().__init__("request_context", settings, source)
        self._limits = limits

    def work(self, state: Any, config: RunnableConfig) -> Work:
        """See `OnRuntime.work`."""
        del config
        request, since = _question_in(state)
        return partial(
            _request,
            request=request,
            since=since,
            limits=self._limits.under(state),
            progress=progress_here(),
        )

    def without(self, state: Any, config: RunnableConfig) -> Update:
        """See `OnRuntime.without`."""
        del state, config
        return {"asked": {}}


class CollectContext(OnRuntime):
    """Waits for the answers, from the noted position on."""

    def __init__(
        self,
        limits: Limits,
        write: Callable[[PeerContext], Update],
        settings: PeerContextSettings | None = None,
        source: RuntimeSource | None = None,
        on_answer: OnAnswer | None = None,
    ) -> None:
        super().__init__("collect_context", settings, source)
        self._on_answer = on_answer
        self._limits = limits
        self._write = write

    def work(self, state: Any, config: RunnableConfig) -> Work:
        """See `OnRuntime.work`."""
        del config
        return partial(
            self._collect,
            question=_question_in(state),
            asked=_asked_in(state),
            limits=self._limits.under(state),
            progress=progress_here(),
        )

    def without(self, state: Any, config: RunnableConfig) -> Update:
        """See `OnRuntime.without`."""
        agent_id = text_in(state, "failed_agent_id", "the agent that failed")
        return self._write(switched_off(agent_id, thread_in(state, "thread_id", config)))

    async def _collect(
        self,
        runtime: NodeRuntime,
        *,
        question: tuple[ContextRequest, Offsets],
        asked: Asked,
        limits: Limits,
        progress: Progress,
    ) -> Update:
        def heard(response: ContextResponse) -> None:
            progress.answer(response)
            if self._on_answer is not None:
                self._on_answer(response)

        context = await runtime.steps.collect(
            *question,
            asked,
            Wanted(limits.expect, limits.min_responses, on_answer=heard),
            timeout_seconds=limits.timeout_seconds,
        )
        progress.covered(context)
        return self._write(context)


async def _position(runtime: NodeRuntime, **about: Any) -> Update:
    request = runtime.request(**about)
    offsets = await runtime.steps.position(request)
    since = [[topic, partition, offset] for (topic, partition), offset in offsets.items()]
    return {"question": {"request": request.model_dump(mode="json"), "since": since}}


async def _request(
    runtime: NodeRuntime,
    *,
    request: ContextRequest,
    since: Offsets,
    limits: Limits,
    progress: Progress,
) -> Update:
    progress.asking(request.failed_agent_id, request.thread_id, limits.expect)
    asked = await runtime.steps.ask(
        request, since, limits.expect, timeout_seconds=limits.timeout_seconds
    )
    if asked.trouble is None:
        progress.sent()
    told = {"at": asked.at.isoformat(), "trouble": asked.trouble, "is_certain": asked.is_certain}
    return {"asked": told}


def _in_doubt_in(state: object) -> tuple[InDoubtKey, ...]:
    keys = value_in(state, "in_doubt") or ()
    try:
        return tuple(InDoubtKey.model_validate_json(json.dumps(key)) for key in keys)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"state['in_doubt'] should be a list of keys: {error}") from None


def _question_in(state: object) -> tuple[ContextRequest, Offsets]:
    question = value_in(state, "question")
    try:
        request = ContextRequest.model_validate_json(json.dumps(question["request"]))
        since = {(topic, partition): offset for topic, partition, offset in question["since"]}
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigurationError(
            f"state['question'] should be what `position` wrote: {error!r:.200}"
        ) from None
    return request, since


def _asked_in(state: object) -> Asked:
    asked = value_in(state, "asked")
    try:
        return Asked(
            at=datetime.fromisoformat(asked["at"]),
            trouble=asked["trouble"],
            is_certain=asked["is_certain"],
        )
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigurationError(
            f"state['asked'] should be what `request_context` wrote: {error!r:.200}"
        ) from None
