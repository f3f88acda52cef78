"""Asks the peer that an effect names, from wherever the effect stands."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Protocol, TypeVar

from langgraph_peerctx.background import BackgroundRuntime
from langgraph_peerctx.durability.run_effects import About, running_loop
from langgraph_peerctx.errors import BrokerUnavailableError, ConfigurationError
from langgraph_peerctx.protocol.messages import WINDOW_LIMIT_SECONDS, InDoubtAnswer, InDoubtKey
from langgraph_peerctx.runtime import PeerContextRuntime

_logger = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[PeerContextRuntime], Awaitable[T]]

_LOOK_BACK_SECONDS = 1.0
"""Of what a peer remembers only what concerns the effect is asked for: since it was meant."""
_SPARE_SECONDS = 5.0
"""For what a question takes beside its window, on a loop that turns."""


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
        """See `Calls.call`.

        Raises:
            ConfigurationError: If it is called on the runtime's own loop, which would never turn.
            BrokerUnavailableError: If it takes some seconds more than the settings' window.
        """
        if running_loop() is self._loop:
            raise ConfigurationError(
                "a sync effect in an async node would block the loop on which its peer is asked: "
                "pass an async function to effect(...) there, and await it"
            )
        doing = asyncio.run_coroutine_threadsafe(self._do(work), self._loop)
        try:
            return doing.result(self._longest_seconds)
        except TimeoutError:
            raise self._stuck() from None
        finally:
            doing.cancel()  # where nobody waits for it any more

    async def acall(self, work: Work[T]) -> T:
        """See `Calls.acall`.

        Raises:
            BrokerUnavailableError: If it takes some seconds more than the settings' window, on
                another loop.
        """
        if running_loop() is self._loop:
            return await work(self._runtime)
        doing = asyncio.run_coroutine_threadsafe(self._do(work), self._loop)
        try:
            async with asyncio.timeout(self._longest_seconds):
                return await asyncio.wrap_future(doing)
        except TimeoutError:
            raise self._stuck() from None

    @property
    def _longest_seconds(self) -> float:
        return self._runtime.settings.timeout_seconds + _SPARE_SECONDS

    def _stuck(self) -> BrokerUnavailableError:
        return BrokerUnavailableError(
            f"nothing came of it within {self._longest_seconds:g} s: the loop of the runtime is "
            "blocked; see PYTHONASYNCIODEBUG"
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
        """Ask, and block until the peer has answered, or the settings' window is over.

        A peer has answered when each process has that is known to host it.

        Raises:
            ConfigurationError: If it would block the loop on which is asked.
        """
        try:
            return self._calls.call(partial(_ask, about, key))
        except BrokerUnavailableError as error:
            _warn(key, error)
            return None

    async def aask(self, about: About, key: InDoubtKey) -> InDoubtAnswer | None:
        """See `ask`."""
        try:
            return await self._calls.acall(partial(_ask, about, key))
        except BrokerUnavailableError as error:
            _warn(key, error)
            return None


async def _ask(about: About, key: InDoubtKey, runtime: PeerContextRuntime) -> InDoubtAnswer | None:
    context = await runtime.gather(
        failed_agent_id=about.agent_id,
        thread_id=about.thread_id,
        expect=[key.peer_id],
        time_window_seconds=_since(key),
        in_doubt=[key],
        run_id=about.run_id,
        epoch=about.epoch,
    )
    return context.word_on(key)


def _since(key: InDoubtKey) -> float:
    """Return how far to look back: those who remember the effect may contradict each other."""
    age = (datetime.now(UTC) - key.intent_at).total_seconds()
    return min(max(0.0, age) + _LOOK_BACK_SECONDS, WINDOW_LIMIT_SECONDS)


def _warn(key: InDoubtKey, error: BrokerUnavailableError) -> None:
    _logger.warning("%s cannot be asked about an effect: %s", key.peer_id, error)
