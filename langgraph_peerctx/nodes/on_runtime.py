"""A node whose work is done by the process's runtime, wherever LangGraph runs the node."""

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Protocol, Unpack

from langchain_core.runnables import Runnable, RunnableConfig

from langgraph_peerctx import background
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.gathering.gatherer import OnAnswer, OnSent, Question, Wanted
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.gathering.steps import Asked
from langgraph_peerctx.messaging.transport import Offsets
from langgraph_peerctx.protocol.messages import ContextRequest, InDoubtKey

Update = dict[str, Any]
"""What a node writes: state key -> value, plain JSON."""


class Steps(Protocol):
    """A gather in steps; `GatherSteps` is the one for production."""

    async def position(self, request: ContextRequest) -> Offsets:
        """Note where the answers will be read from."""
        ...

    async def ask(
        self,
        request: ContextRequest,
        since: Offsets,
        expect: Collection[str] = (),
        *,
        timeout_seconds: float | None = None,
    ) -> Asked:
        """Send the question to those that have not answered."""
        ...

    async def collect(
        self,
        request: ContextRequest,
        since: Offsets,
        asked: Asked,
        wanted: Wanted,
        *,
        timeout_seconds: float | None = None,
    ) -> PeerContext:
        """Wait for the answers."""
        ...


class NodeRuntime(Protocol):
    """What nodes need of a runtime; `PeerContextRuntime` is the one for production."""

    @property
    def steps(self) -> Steps:
        """What asks in steps."""
        ...

    def request(self, **question: Unpack[Question]) -> ContextRequest:
        """Return the question, with the settings' defaults; nothing is sent."""
        ...

    async def gather(
        self,
        *,
        failed_agent_id: str,
        thread_id: str,
        timeout_seconds: float | None = None,
        expect: Sequence[str] = (),
        min_responses: int | None = None,
        time_window_seconds: float | None = None,
        in_doubt: Sequence[InDoubtKey] = (),
        run_id: str | None = None,
        on_sent: OnSent | None = None,
        on_answer: OnAnswer | None = None,
    ) -> PeerContext:
        """Ask the peers in one go; ends with the window at the latest."""
        ...


Work = Callable[[NodeRuntime], Awaitable[Update]]


class RuntimeSource(Protocol):
    """Where a node that is not to use the process's runtime gets one."""

    async def acall(self, work: Work) -> Update:
        """Do the work with it."""
        ...


class OnRuntime(Runnable[Any, Update]):
    """Leases the process's runtime for each run, starts it if need be, and lets it run on.

    Args:
        name: What the node is called in traces.
        settings: For the runtime, if it does not run yet; by default from the environment.
        source: Another runtime to use, for async runs only.
    """

    def __init__(
        self,
        name: str,
        settings: PeerContextSettings | None = None,
        source: RuntimeSource | None = None,
    ) -> None:
        self.name = name
        self._settings = settings
        self._source = source

    @abstractmethod
    def work(self, state: Any, config: RunnableConfig) -> Work:
        """Return what is to be done on the runtime's loop; called in the node's own context.

        Raises:
            PeerContextError: If the state is not as it should be.
        """

    @abstractmethod
    def without(self, state: Any, config: RunnableConfig) -> Update:
        """Return what the node writes where peer context is switched off."""

    def invoke(
        self,
        input: Any,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Update:
        """Do the work, and block until it is done; see the class for what it raises."""
        del kwargs
        settings = self._settings_now()
        if not settings.enabled:
            return self.without(input, config or {})
        if self._source is not None:
            raise ConfigurationError("a recovery runs in async code: use ainvoke")
        work = self.work(input, config or {})
        lease = background.lease(settings, keep=True)
        try:
            return lease.runtime().call(work)
        finally:
            lease.release()

    async def ainvoke(
        self,
        input: Any,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Update:
        """Do the work, from any loop; see `invoke`."""
        del kwargs
        settings = self._settings_now()
        if not settings.enabled:
            return self.without(input, config or {})
        work = self.work(input, config or {})
        if self._source is not None:
            return await self._source.acall(work)
        lease = background.lease(settings, keep=True)
        try:
            return await (await lease.aruntime()).acall(work)
        finally:
            lease.release()

    def _settings_now(self) -> PeerContextSettings:
        return self._settings or background.settings_in_use() or PeerContextSettings()
