"""One peer context runtime for the whole process, on a thread and a loop of its own.

Whoever needs it leases it: the first lease starts it, the last one that is given back stops it. It
can be used from any thread and any loop, since a graph's nodes run wherever LangGraph puts them.
"""

import asyncio
import atexit
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.loop_watch import LoopWatch
from langgraph_peerctx.durability.ownership import Ownership
from langgraph_peerctx.errors import ConfigurationError, PeerContextError
from langgraph_peerctx.messaging.agent_context_service import ContextResponder, ready_handler
from langgraph_peerctx.messaging.context_handler import ContextRequestHandler
from langgraph_peerctx.runtime import PeerContextRuntime

_logger = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[PeerContextRuntime], Awaitable[T]]

STOP_TIMEOUT_SECONDS = 15.0
"""Longer than transport and services need for closing, whatever the broker does."""


class BackgroundRuntime:
    """A runtime that runs, and how to use it from elsewhere; made by `lease`, not directly.

    Attributes:
        settings: What it runs with.
    """

    def __init__(self, settings: PeerContextSettings) -> None:
        self.settings: PeerContextSettings = settings
        self._pid = os.getpid()
        self._runtime = PeerContextRuntime(settings)
        self._responder: ContextResponder | None = None
        self._hosted: dict[str, tuple[ContextRequestHandler, int]] = {}
        self._hosting: asyncio.Lock = asyncio.Lock()  # belongs to the portal's loop
        self._stack = ExitStack()
        self._submitting = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def watch(self) -> LoopWatch:
        """What asks agents' loops whether they turn."""
        return self._runtime.watch

    @property
    def sentinel_id(self) -> str | None:
        """Who would see this process die, if anybody."""
        return self._runtime.sentinel_id

    async def own(self) -> Ownership:
        """Return what this process owns; see `PeerContextRuntime.own`."""
        return await self.acall(PeerContextRuntime.own)

    def own_now(self) -> Ownership:
        """Return what this process owns; blocks. See `PeerContextRuntime.own`."""
        return self.call(PeerContextRuntime.own)

    @property
    def degraded(self) -> tuple[str, ...]:
        """Why a gather would not be the whole truth now; empty when all is well."""
        return self._runtime.degraded

    @property
    def agents(self) -> tuple[str, ...]:
        """The agents that are hosted here, sorted."""
        return tuple(sorted(self._hosted))

    def call(self, work: Work[T]) -> T:
        """Do something with the runtime on its loop, and wait for it; from any other thread.

        Raises:
            ConfigurationError: If the runtime is stopped, or belongs to the process before a fork.
            Exception: Whatever the work raises.
        """
        doing = self._submitted(work)
        try:
            return doing.result()
        except BaseException:  # Ctrl-C for instance: nobody waits for it any more
            doing.cancel()
            raise

    async def acall(self, work: Work[T]) -> T:
        """Do something with the runtime on its loop, and wait for it on any loop.

        Cancelling the caller cancels the work. See `call`.
        """
        return await asyncio.wrap_future(self._submitted(work))

    async def host(self, *agents: str | ContextRequestHandler) -> None:
        """Answer peers for agents, from now on; counted, as `unhost` takes it back.

        A request is answered once, for the agents that are here then: name all in one call.

        Args:
            agents: Each as its id, answered for from the settings' store, or as its handler.

        Raises:
            ProtocolError: If an id is not legal.
            StoreError: If an event store cannot be opened.
            BrokerUnavailableError: If there is no broker, and mock mode is `never`.
        """
        await self.acall(partial(self._host, agents))

    def host_now(self, *agents: str | ContextRequestHandler) -> None:
        """Answer peers for agents; blocks until it does. See `host`."""
        self.call(partial(self._host, agents))

    async def unhost(self, *agent_ids: str) -> None:
        """Answer no longer for agents, if nobody else hosts them here."""
        await self.acall(partial(self._unhost, agent_ids))

    def unhost_now(self, *agent_ids: str) -> None:
        """Answer no longer for agents; blocks. See `unhost`."""
        self.call(partial(self._unhost, agent_ids))

    def start(self) -> None:
        """Start thread, loop and runtime; blocks until it runs.

        Raises:
            BrokerUnavailableError: If there is no broker, and mock mode is `never`.
            ConfigurationError: If the broker refuses the credentials.
        """
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal(name="peerctx-runtime"))
            portal.call(self._runtime.start)
            self._portal, self._loop = portal, portal.call(asyncio.get_running_loop)
            self._stack = stack.pop_all()

    def stop(self) -> None:
        """Stop services, runtime, loop and thread. Safe to call twice."""
        if os.getpid() != self._pid:
            return
        with self._submitting:
            portal, self._portal, self._loop = self._portal, None, None
        if portal is None:
            return
        with self._stack:
            portal.call(self._close)
            portal.call(portal.stop, True)  # noqa: FBT003 - what is still at work ends too

    def _submitted(self, work: Work[T]) -> Future[T]:
        if os.getpid() != self._pid:
            raise ConfigurationError(_FORKED)
        with self._submitting:  # what is submitted before the stop is begun before it, too
            if self._loop is None:
                raise ConfigurationError("the peer context runtime is stopped: lease it again")
            # The portal's own way costs 0.3 ms more.
            return asyncio.run_coroutine_threadsafe(_do(work, self._runtime), self._loop)

    async def _host(
        self, agents: Sequence[str | ContextRequestHandler], runtime: PeerContextRuntime
    ) -> None:
        async with self._hosting:
            new: dict[str, ContextRequestHandler] = {}
            names = [a if isinstance(a, str) else a.agent_id for a in agents]
            for name, agent in zip(names, agents, strict=True):
                if name not in self._hosted:
                    given = None if isinstance(agent, str) else agent
                    new[name] = await ready_handler(name, self.settings, handler=given)
            if self._responder is None:
                self._responder = ContextResponder(
                    self.settings, transport=runtime.transport, presence=runtime.presence
                )
            if new:
                await self._responder.host(*new.values())
            for name in names:
                handler, count = self._hosted.get(name) or (new[name], 0)
                self._hosted[name] = (handler, count + 1)

    async def _unhost(self, agent_ids: Sequence[str], _runtime: PeerContextRuntime) -> None:
        async with self._hosting:
            for agent_id in agent_ids:
                handler, count = self._hosted.pop(agent_id, (None, 0))
                if handler is not None and count > 1:
                    self._hosted[agent_id] = (handler, count - 1)
                elif handler is not None and self._responder is not None:
                    await self._responder.unhost(handler)

    async def _close(self) -> None:
        for close in (self._unhost_all, self._runtime.close):  # the second whatever the first does
            try:
                async with asyncio.timeout(STOP_TIMEOUT_SECONDS / 2):
                    await close()
            except (PeerContextError, TimeoutError):
                _logger.exception("the peer context runtime did not stop well")

    async def _unhost_all(self) -> None:
        async with self._hosting:
            if self._responder is not None:
                await self._responder.unhost(*(handler for handler, _ in self._hosted.values()))
            self._hosted.clear()


async def _do(work: Work[T], runtime: PeerContextRuntime) -> T:
    return await work(runtime)


_FORKED = (
    "this process was forked while the peer context runtime ran: its thread and connections belong "
    "to the parent. Start processes with 'spawn' or 'forkserver', or fork before it starts"
)


class _Shared:
    """What the leases of one time share."""

    def __init__(self, settings: PeerContextSettings) -> None:
        self.settings = settings
        self.users = 0
        self.started: Future[BackgroundRuntime] = Future()
        self.stopped: Future[None] = Future()

    def start(self) -> None:
        """Runs in a thread of its own: whoever leases must not wait for a broker on its loop."""
        runtime = BackgroundRuntime(self.settings)
        try:
            runtime.start()
        except BaseException as error:  # noqa: BLE001 - whoever waits for it gets it
            _process.forget(self)
            self.started.set_exception(error)
        else:
            self.started.set_result(runtime)

    def stop(self) -> None:
        try:
            self.started.result().stop()
        except Exception:  # nobody is left to be told
            _logger.debug("there was nothing to stop", exc_info=True)
        finally:
            self.stopped.set_result(None)


class Lease:
    """A share in the process's runtime; give it back with `release`."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared
        self._held = True
        self._pid = os.getpid()

    def runtime(self) -> BackgroundRuntime:
        """Return the runtime once it runs; blocks.

        Raises:
            BrokerUnavailableError: If there is no broker, and mock mode is `never`.
            ConfigurationError: If the broker refuses the credentials.
        """
        self._see_that_it_is_ours()
        return self._shared.started.result()

    async def aruntime(self) -> BackgroundRuntime:
        """Return the runtime once it runs; see `runtime`."""
        self._see_that_it_is_ours()
        if self._shared.started.done():  # as always but at first: another turn of the loop saved
            return self._shared.started.result()
        # Shielded: others wait for the same start.
        return await asyncio.shield(asyncio.wrap_future(self._shared.started))

    def release(self) -> None:
        """Give it back without waiting; the last one stops the runtime. Safe to call twice."""
        self._give_back()

    async def arelease(self) -> None:
        """Give it back; if it was the last one, wait until the runtime has stopped."""
        if self._give_back():
            await asyncio.shield(asyncio.wrap_future(self._shared.stopped))

    def _see_that_it_is_ours(self) -> None:
        if os.getpid() != self._pid:
            raise ConfigurationError(_FORKED)

    def _give_back(self) -> bool:
        held, self._held = self._held and os.getpid() == self._pid, False
        return held and _process.give_back(self._shared)


class _Process:
    """The one runtime of this process, if it runs."""

    def __init__(self, *, forked: bool = False) -> None:
        self._lock = threading.Lock()
        self._shared: _Shared | None = None
        self._kept: Lease | None = None
        self._forked = forked

    @property
    def settings(self) -> PeerContextSettings | None:
        shared = self._shared
        return None if shared is None else shared.settings

    def lease(self, settings: PeerContextSettings | None, *, keep: bool = False) -> Lease:
        with self._lock:
            if self._forked:
                raise ConfigurationError(_FORKED)
            if self._shared is None:
                self._shared = _Shared(settings or PeerContextSettings())
                _run(self._shared.start)
                if keep:
                    self._kept = Lease(self._shared)
                    self._shared.users += 1
            elif settings is not None:
                _see_that_they_agree(self._shared.settings, settings)
            self._shared.users += 1
            return Lease(self._shared)

    def give_back(self, shared: _Shared) -> bool:
        """Take a lease back; tell whether it was the last one."""
        with self._lock:
            shared.users -= 1
            if shared.users > 0:
                return False
            if self._shared is shared:
                self._shared = None
        _run(shared.stop)
        return True

    def forget(self, shared: _Shared) -> None:
        """Let the next lease try anew."""
        with self._lock:
            if self._shared is shared:
                self._shared = self._kept = None

    def drop_kept(self) -> None:
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None:
            kept.release()

    def end(self) -> None:
        """Stop what runs, whoever has a lease: the process ends, and starts no thread any more."""
        shared, self._shared = self._shared, None
        if shared is not None and shared.started.done():
            shared.stop()


_process = _Process()


def lease(settings: PeerContextSettings | None = None, *, keep: bool = False) -> Lease:
    """Take a share in the process's runtime, and start it if need be; waits for nothing.

    Args:
        settings: By default those it runs with, or the environment's.
        keep: If this starts it, let it run on until `stop_kept_runtime` or the end of the process,
            even when nobody has a lease: to start it anew for each use would cost about 0.1 s a
            time. What somebody else has started ends with them.

    Raises:
        ConfigurationError: If it runs with other settings, or this is a forked child of a process
            in which it ran.
    """
    return _process.lease(settings, keep=keep)


def settings_in_use() -> PeerContextSettings | None:
    """Return what the process's runtime runs with, or is being started with; None if it is not."""
    return _process.settings


def stop_kept_runtime() -> None:
    """Let a kept runtime stop as soon as nobody has a lease; see `lease`."""
    _process.drop_kept()


@atexit.register
def _end() -> None:
    _process.end()


def _after_fork() -> None:
    global _process  # noqa: PLW0603 - the parent's lock may be held by a thread that is not here
    _process = _Process(forked=_process.settings is not None)


os.register_at_fork(after_in_child=_after_fork)


def _run(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="peerctx-background", daemon=True).start()


def _see_that_they_agree(running: PeerContextSettings, wanted: PeerContextSettings) -> None:
    fields = type(running).model_fields
    differing = [name for name in fields if getattr(running, name) != getattr(wanted, name)]
    if differing:
        raise ConfigurationError(
            "the peer context runtime of this process runs with other settings "
            f"({', '.join(differing)}): a process has one, stop it first or agree on them"
        )
