"""Runs that are owned: admitted before they begin, fenced while they run, ended in writing.

Whoever dies in one has left behind what another process needs to go on with it.
"""

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from typing import Any, ClassVar

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from langgraph.checkpoint.base import BaseCheckpointSaver

from langgraph_peerctx import background
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.admission import Redact, fenced
from langgraph_peerctx.durability.fenced_checkpointer import FencedCheckpointer
from langgraph_peerctx.durability.ownership import AgentFence
from langgraph_peerctx.durability.recorder import InteractionRecorder
from langgraph_peerctx.durability.workflow import Workflow, compiled, thread_config
from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.identifiers import check_id
from langgraph_peerctx.owned_run import Terms, begun, begun_now, thread_of

_logger = logging.getLogger(__name__)

_UNNAMED = "LangGraph"
_INSIDE = "__pregel_read"
"""In the config of whatever LangGraph runs inside a node."""


class OwnedRun:
    """A thread whose runs are owned; made by `owned`."""

    def __init__(self, workflow: Workflow, thread_id: str) -> None:
        self.workflow: Workflow = workflow
        self.thread_id: str = thread_id

    async def ainvoke(
        self,
        input: Any,  # noqa: A002 - LangGraph's name
        config: RunnableConfig | None = None,
        **options: Any,
    ) -> Any:
        """Run the workflow; see LangGraph's `ainvoke`, and `own_runs` for what is added."""
        return await self.workflow.ainvoke(input, thread_config(config, self.thread_id), **options)

    async def astream(
        self,
        input: Any,  # noqa: A002 - LangGraph's name
        config: RunnableConfig | None = None,
        **options: Any,
    ) -> AsyncIterator[Any]:
        """Run the workflow and yield what it streams; see `ainvoke`."""
        place = thread_config(config, self.thread_id)
        running: Any = self.workflow.astream(input, place, **options)
        async with aclosing(running) as chunks:
            async for chunk in chunks:
                yield chunk


@asynccontextmanager
async def owned(
    workflow: Workflow,
    *,
    agent_id: str,
    thread_id: str,
    name: str | None = None,
    recorder: InteractionRecorder | None = None,
    redact: Redact | None = None,
    settings: PeerContextSettings | None = None,
) -> AsyncIterator[OwnedRun]:
    """Run a workflow so that its runs can be recovered, and nobody else writes meanwhile.

    The process's runtime runs at least as long as the block. See `own_runs`.

    Args:
        workflow: The compiled workflow, with a checkpointer that recoverers can reach.
        agent_id: Whose workflow it is.
        thread_id: The thread.
        name: Under which supervisors know the workflow; by default its own, or, if it was given
            none, its agent's.
        recorder: Records what happens in the runs; see `own_runs`.
        redact: What to store of an input; see `own_runs`.
        settings: For the runtime, if it does not run yet; by default from the environment.

    Raises:
        ConfigurationError: If an argument cannot be right.
        ProtocolError: If the agent's id is illegal.
        StoreError: If the control database cannot be opened.
        BrokerUnavailableError: If there is no broker, and mock mode is `never`.
    """
    owning = own_runs(
        workflow,
        agent_id=agent_id,
        name=name,
        recorder=recorder,
        redact=redact,
        settings=settings,
    )
    thread_config(None, thread_id)
    lease = background.lease(settings)
    try:
        await (await lease.aruntime()).own()
        yield OwnedRun(owning, thread_id)
    finally:
        await lease.arelease()


def own_runs(
    workflow: Workflow,
    *,
    agent_id: str,
    name: str | None = None,
    recorder: InteractionRecorder | None = None,
    redact: Redact | None = None,
    settings: PeerContextSettings | None = None,
) -> Workflow:
    """Return the workflow such that each of its root runs is owned, whoever begins it.

    A run gets a run id, the lease of its thread, and a record with its input, context and config,
    in one write before its first step; what it writes is refused once another process has taken the
    thread over; and its end is written down. What goes on with a run (`Command(resume=...)`, or
    None) belongs to it. Inside another graph it is an ordinary subgraph.

    By default it runs with `durability="sync"`: anything else loses finished steps in a crash.

    Args:
        workflow: The compiled workflow, with its checkpointer.
        agent_id: Whose workflow it is.
        name: Under which supervisors know it; by default its own, or, if it was given none, its
            agent's.
        recorder: Records what happens in the runs; by default the one that
            `peer_context_lifespan(recorders=...)` names for the agent, if any.
        redact: Returns what may be stored of an input, and must not change what it is given: a
            fresh input, or the `Command` that answers. A run whose input is stored otherwise than
            it was cannot be begun again from it: killed before its first checkpoint it is not
            recoverable, and the recovery says so. Of an error only the type is stored then, of a
            recovery how it ended. A recorder has a `redact` hook of its own.
        settings: For the process's runtime, if it does not run yet.

    Raises, when it runs:
        ThreadBusyError: If another process is at work on the thread, or an earlier run has not
            ended.
        StaleOwnerError: If another process has taken it over meanwhile.
        ConfigurationError: If the input cannot be stored, `redact` failed, or no thread is named.
        StoreError: If the control database failed, or the checkpointer did not say in time where
            the thread stands; nothing was run.
    """
    plain = compiled(workflow)
    if isinstance(plain, _Owning):
        raise ConfigurationError("this workflow's runs are owned already")
    terms = Terms(
        agent_id=check_id(agent_id, "agent_id"),
        name=name or name_of(plain, agent_id),
        recorder=recorder,
        redact=redact,
        settings=settings,
    )
    owning: Workflow = _owning_class(type(plain), terms)(**_attributes(plain))
    return owning


def name_of(workflow: Workflow, agent_id: str) -> str:
    """Return under which name a workflow is known: its own, or else its agent's.

    Every graph that was given no name has the same one: that would be anybody's.
    """
    own = workflow.get_name()
    return agent_id if own == _UNNAMED else own


def unowned(workflow: Workflow) -> Workflow:
    """Return the workflow as it was before `own_runs`; any other as it is.

    A recoverer claims the thread itself: its resume must not be a run that asks to be admitted.
    """
    if not isinstance(workflow, _Owning):
        return workflow
    _, kind = type(workflow).__bases__
    return _plain(kind, workflow)


def redact_of(workflow: Workflow) -> Redact | None:
    """Return what a workflow's owner said is to be stored of an input; None if nobody did."""
    return workflow.owned_under.redact if isinstance(workflow, _Owning) else None


class _Owning:
    """Marks the classes that `_owning_class` makes."""

    owned_under: ClassVar[Terms]


def _attributes(workflow: Workflow) -> dict[str, Any]:
    return {k: v for k, v in workflow.__dict__.items() if k != "__orig_class__"}


def _plain(kind: type[Any], workflow: Workflow) -> Workflow:
    """Return the workflow as it was before its runs were owned, with its own checkpointer."""
    attributes = _attributes(workflow)
    saver = attributes["checkpointer"]
    if isinstance(saver, FencedCheckpointer):
        attributes["checkpointer"] = saver.bare
    plain: Workflow = kind(**attributes)
    return plain


def _owning_class(kind: type[Any], terms: Terms) -> type[Any]:
    """Return a subclass whose `stream` and `astream`, through which all else goes, are owned.

    What it reads is behind the fence, too, and so is what `update_state` writes: a thread looks the
    same to everybody.
    """

    def stream(
        self: Any,
        input: Any,  # noqa: A002 - LangGraph's name
        config: RunnableConfig | None = None,
        **options: Any,
    ) -> Iterator[Any]:
        plain = _plain(kind, self)
        if _is_inside(config):
            yield from plain.stream(input, config, **options)
            return
        with begun_now(plain, terms, input, config, options) as (workflow, place, chosen):
            yield from workflow.stream(input, place, **chosen)

    async def astream(
        self: Any,
        input: Any,  # noqa: A002 - LangGraph's name
        config: RunnableConfig | None = None,
        **options: Any,
    ) -> AsyncIterator[Any]:
        plain = _plain(kind, self)
        async with AsyncExitStack() as stack:
            workflow, place, chosen = plain, config, options
            if not _is_inside(config):
                admitted = begun(plain, terms, input, config, options)
                workflow, place, chosen = await stack.enter_async_context(admitted)
            # A stream that is broken off is closed here and now, or its end would be written late.
            running: Any = workflow.astream(input, place, **chosen)
            async for chunk in await stack.enter_async_context(aclosing(running)):
                yield chunk

    def bulk_update_state(self: Any, config: RunnableConfig, supersteps: Any) -> RunnableConfig:
        plain = _plain(kind, self)
        lease = background.lease(terms.settings, keep=True)
        try:
            ownership = lease.runtime().own_now()
            held = ownership.take(terms.agent_id, thread_of(config))
            try:
                behind = fenced(plain, AgentFence(terms.agent_id, ownership))
                return behind.bulk_update_state(config, supersteps)
            finally:
                ownership.give(held)
        finally:
            lease.release()

    async def abulk_update_state(
        self: Any, config: RunnableConfig, supersteps: Any
    ) -> RunnableConfig:
        plain = _plain(kind, self)
        lease = background.lease(terms.settings, keep=True)
        try:
            ownership = await (await lease.aruntime()).own()
            in_thread, thread_id = ownership.leases.in_thread, thread_of(config)
            take = partial(ownership.take, terms.agent_id, thread_id)
            held = await in_thread(take, undo=ownership.drop)
            try:
                behind = fenced(plain, AgentFence(terms.agent_id, ownership))
                return await behind.abulk_update_state(config, supersteps)
            finally:
                await in_thread(partial(ownership.give, held))
        finally:
            lease.release()

    methods = {
        "stream": stream,
        "astream": astream,
        "bulk_update_state": bulk_update_state,
        "abulk_update_state": abulk_update_state,
        "checkpointer": _fenced_checkpointer(AgentFence(terms.agent_id)),
        "owned_under": terms,
    }
    return type(kind.__name__, (_Owning, kind), methods)


def _fenced_checkpointer(fence: AgentFence) -> property:
    """Return what keeps a workflow's checkpointer behind a fence, whoever sets it."""

    def get(self: Any) -> Any:
        return self.__dict__.get("checkpointer")

    def put(self: Any, saver: Any) -> None:
        if isinstance(saver, BaseCheckpointSaver) and not isinstance(saver, FencedCheckpointer):
            saver = FencedCheckpointer(saver, fence)
        self.__dict__["checkpointer"] = saver

    return property(get, put)


def _is_inside(config: RunnableConfig | None) -> bool:
    """Tell whether a run is a part of another graph's."""
    return _INSIDE in (ensure_config(config).get("configurable") or {})
