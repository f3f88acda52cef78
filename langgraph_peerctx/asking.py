"""Asks the peer that an effect names, from wherever the effect stands."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeVar

from langgraph_peerctx.background import BackgroundRuntime
from langgraph_peerctx.durability.run_effects import About
from langgraph_peerctx.errors import BrokerUnavailableError
from langgraph_peerctx.protocol.messages import ContextResponse, InDoubtAnswer, InDoubtKey
from langgraph_peerctx.runtime import PeerContextRuntime

_logger = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[PeerContextRuntime], Awaitable[T]]

_LOOK_BACK_SECONDS = 1.0
"""What a peer remembers beside the effect is not asked for; its word on it has no window."""


class Calls(Protocol):
    """A runtime that can be used from elsewhere: `BackgroundRuntime` is one."""

    def call(self, work: Work[T]) -> T:
        """Do something with it, and wait; from any thread but its own."""
        ...

    async def acall(self, work: Work[T]) -> T:
        """Do something with it, from any loop."""
        ...


class OnItsLoop:
    """A runtime of the caller's own loop, for nodes that LangGraph puts into threads."""

    def __init__(self, runtime: PeerContextRuntime, loop: asyncio.AbstractEventLoop) -> None:
        self._runtime = runtime
        self._loop = loop

    def call(self, work: Work[T]) -> T:
        """See `Calls.call`."""
        return asyncio.run_coroutine_threadsafe(self._do(work), self._loop).result()

    async def acall(self, work: Work[T]) -> T:
        """See `Calls.acall`."""
        if asyncio.get_running_loop() is self._loop:
            return await work(self._runtime)
        return await asyncio.wrap_future(
            asyncio.run_coroutine_threadsafe(self._do(work), self._loop)
        )

    async def _do(self, work: Work[T]) -> T:
        return await work(self._runtime)


def calls_of(runtime: BackgroundRuntime | PeerContextRuntime) -> Calls:
    """Return how a runtime is used from a node; on its own loop, if it has none in a thread."""
    if isinstance(runtime, BackgroundRuntime):
        return runtime
    return OnItsLoop(runtime, asyncio.get_running_loop())


class EffectPeers:
    """Asks over Kafka; see `durability.run_effects.Peers`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def ask(self, about: About, key: InDoubtKey) -> InDoubtAnswer | None:
        """Ask, and block until the peer has answered, or the settings' window is over."""
        return self._calls.call(partial(_ask, about, key))

    async def aask(self, about: About, key: InDoubtKey) -> InDoubtAnswer | None:
        """See `ask`."""
        return await self._calls.acall(partial(_ask, about, key))


async def _ask(about: About, key: InDoubtKey, runtime: PeerContextRuntime) -> InDoubtAnswer | None:
    def has_told(answers: list[ContextResponse]) -> bool:
        return any(told.agent_id == key.peer_id for a in answers for told in a.in_doubt)

    try:
        context = await runtime.gather(
            failed_agent_id=about.agent_id,
            thread_id=about.thread_id,
            expect=[key.peer_id],
            enough=lambda answers: has_told([*answers]),
            time_window_seconds=_LOOK_BACK_SECONDS,
            in_doubt=[key],
            run_id=about.run_id,
            epoch=about.epoch,
        )
    except BrokerUnavailableError as error:
        _logger.warning("%s cannot be asked about an effect: %s", key.peer_id, error)
        return None
    return context.word_on(key)
