"""Starting and stopping the process's runtime with a graph, in each way that LangGraph has.

LangGraph's core has no hook for a graph's start and stop. What there is: the lifespan of the
application that serves it, an `async with` around it or around its making, and callbacks.
"""

import logging
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypedDict, Unpack, overload
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler

from langgraph_peerctx import background
from langgraph_peerctx.background import BackgroundRuntime
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.recorder import InteractionRecorder
from langgraph_peerctx.durability.recording import record_with, stop_recording_with
from langgraph_peerctx.durability.workflow import Workflow, compiled
from langgraph_peerctx.errors import ConfigurationError, PeerContextError
from langgraph_peerctx.identifiers import check_id
from langgraph_peerctx.owned import name_of
from langgraph_peerctx.reconstruction.recoverer import SupervisedWorkflow
from langgraph_peerctx.reconstruction.supervisor import RecoverySupervisor, see_that_it_is_shared

_logger = logging.getLogger(__name__)


class LifespanState(TypedDict):
    """What a Starlette lifespan hands to the application's requests."""

    peer_context: BackgroundRuntime


class Lifespan(TypedDict, total=False):
    """What `peer_context_lifespan` takes by name."""

    agents: Sequence[str]
    agent_id: str | None
    workflow: SupervisedWorkflow | Workflow | None
    workflows: Mapping[str, SupervisedWorkflow | Workflow]
    recorders: Sequence[InteractionRecorder]
    settings: PeerContextSettings | None


@overload
def peer_context_lifespan(
    app: None = None, **what: Unpack[Lifespan]
) -> AbstractAsyncContextManager[BackgroundRuntime]: ...


@overload
def peer_context_lifespan(
    app: object, **what: Unpack[Lifespan]
) -> AbstractAsyncContextManager[LifespanState]: ...


def peer_context_lifespan(
    app: object = None, **what: Unpack[Lifespan]
) -> AbstractAsyncContextManager[BackgroundRuntime] | AbstractAsyncContextManager[LifespanState]:
    """Run the process's runtime, and answer for these agents, as long as the block lasts.

    Counted: entered twice, it runs until both have left, and until every node that uses it is done.
    As a Starlette lifespan (`lifespan=peer_context_lifespan`, or `partial(..., agents=[...])`) it
    hands the runtime on as `request.state.peer_context`.

    With workflows it recovers their runs, too, in this process: see `RecoverySupervisor`. Without a
    control database that agents and recoverers share it says so, and recovers nobody. At its end,
    what is open here and cancelled is handed over: another process goes on with it at once.

    Args:
        app: The application, where it is a lifespan.
        agents: The agents of this process that answer their peers.
        agent_id: One more of them.
        workflow: A workflow whose runs are recovered, under its own name.
        workflows: The same, by the names under which their runs are admitted.
        recorders: Record the owned runs of their agents meanwhile, those that are recovered here
            too; closed by whoever made them.
        settings: By default those the runtime runs with, or the environment's.

    Raises, when it is entered:
        BrokerUnavailableError: If there is no broker, and mock mode is `never`.
        ConfigurationError: If the broker refuses the credentials, or the runtime runs with other
            settings.
        StoreError: If an agent's event store, or the control database, cannot be opened.
        ProtocolError: If an agent's id is illegal.
    """
    one = what.get("agent_id")
    names = [*what.get("agents", ()), *([] if one is None else [one])]
    agents = [check_id(name, "agents") for name in names]
    recorders = what.get("recorders", ())
    running = _running(agents, _by_name(what), recorders, what.get("settings"))
    return running if app is None else _as_state(running)


def _by_name(what: Lifespan) -> dict[str, SupervisedWorkflow]:
    one = what.get("workflow")
    found = dict(what.get("workflows", {}))
    if one is not None:
        graph = one.workflow if isinstance(one, SupervisedWorkflow) else compiled(one)
        found[name_of(graph, what.get("agent_id") or graph.get_name())] = one
    return {
        name: w if isinstance(w, SupervisedWorkflow) else SupervisedWorkflow(workflow=w)
        for name, w in found.items()
    }


@asynccontextmanager
async def _as_state(
    running: AbstractAsyncContextManager[BackgroundRuntime],
) -> AsyncIterator[LifespanState]:
    async with running as runtime:
        yield {"peer_context": runtime}


@asynccontextmanager
async def _running(
    agents: Sequence[str],
    workflows: Mapping[str, SupervisedWorkflow],
    recorders: Sequence[InteractionRecorder],
    settings: PeerContextSettings | None,
) -> AsyncIterator[BackgroundRuntime]:
    lease = background.lease(settings)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(lease.arelease)
        try:
            runtime = await lease.aruntime()
            await runtime.host(*agents)
            stack.push_async_callback(runtime.unhost, *agents)
            record_with(recorders)
            stack.callback(stop_recording_with, recorders)
            if workflows:
                await stack.enter_async_context(_supervising(runtime, workflows))
        except PeerContextError as error:
            _logger.error("peer context did not start: %s", error)  # noqa: TRY400 - it is raised
            raise
        yield runtime


@asynccontextmanager
async def _supervising(
    runtime: BackgroundRuntime, workflows: Mapping[str, SupervisedWorkflow]
) -> AsyncIterator[None]:
    """Recover these workflows' runs meanwhile; from its end on, who is cancelled is handed over."""
    ownership = await runtime.own()
    ownership.enter()
    async with AsyncExitStack() as stack:
        stack.callback(ownership.leave)
        try:
            see_that_it_is_shared(runtime.settings)
        except ConfigurationError as error:
            _logger.warning("%s", error)
        else:
            await stack.enter_async_context(RecoverySupervisor(workflows))
        yield


class PeerContextHook(BaseCallbackHandler):
    """Starts the process's runtime with a graph's first run: `graph.with_config(callbacks=[hook])`.

    The run waits for nothing: a node that needs the runtime waits for it. It runs on until `close`,
    or the end of the process. What keeps it from starting is logged, and tried again with the next
    run; a node that needs it raises it.

    Args:
        agents: The agents of this process that answer their peers.
        settings: By default those the runtime runs with, or the environment's.

    Raises:
        ProtocolError: If an agent's id is illegal.
    """

    # LangChain would run it on a loop of its own, and swallow what it raises.
    run_inline = True
    raise_error = True

    def __init__(
        self, agents: Sequence[str] = (), settings: PeerContextSettings | None = None
    ) -> None:
        self._agents = [check_id(name, "agents") for name in agents]
        self._settings = settings
        self._changing = threading.Lock()
        self._lease: background.Lease | None = None
        self._starting: threading.Thread | None = None
        self._hosts = False

    def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: Mapping[str, Any] | Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """Start the runtime with the root run; see `BaseCallbackHandler`.

        Raises:
            ConfigurationError: If the runtime runs with other settings, or the process was forked.
        """
        del serialized, inputs, run_id, kwargs
        if parent_run_id is None:
            self.start()

    def start(self) -> None:
        """Start the runtime, if it is not started; waits for nothing.

        Raises:
            ConfigurationError: If it runs with other settings, or the process was forked.
        """
        with self._changing:
            if self._lease is not None:
                return
            self._lease = background.lease(self._settings)
            self._starting = threading.Thread(
                target=self._host, args=(self._lease,), name="peerctx-hook", daemon=True
            )
            self._starting.start()

    def close(self) -> None:
        """Give the runtime back; it stops when nobody else uses it. Safe to call twice."""
        with self._changing:
            lease, self._lease = self._lease, None
            starting, self._starting = self._starting, None
        if starting is not None:
            starting.join()
        if lease is not None:
            self._unhost(lease)

    def _unhost(self, lease: background.Lease) -> None:
        hosts, self._hosts = self._hosts, False
        if hosts:
            lease.runtime().unhost_now(*self._agents)
        lease.release()

    def _host(self, lease: background.Lease) -> None:
        try:
            lease.runtime().host_now(*self._agents)
            self._hosts = True
        except PeerContextError as error:
            _logger.error("peer context did not start: %s", error)  # noqa: TRY400 - said in full
            with self._changing:
                if self._lease is lease:
                    self._lease = self._starting = None
            self._unhost(lease)
