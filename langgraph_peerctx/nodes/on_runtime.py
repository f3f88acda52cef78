"""A node whose work is done by the process's runtime, wherever LangGraph runs the node."""

from abc import abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig

from langgraph_peerctx import background
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.runtime import PeerContextRuntime

Update = dict[str, Any]
"""What a node writes: state key -> value, plain JSON."""
Work = Callable[[PeerContextRuntime], Awaitable[Update]]


class OnRuntime(Runnable[Any, Update]):
    """Leases the process's runtime for each run, starts it if need be, and lets it run on.

    Args:
        name: What the node is called in traces.
        settings: For the runtime, if it does not run yet; by default from the environment.
    """

    def __init__(self, name: str, settings: PeerContextSettings | None = None) -> None:
        self.name = name
        self._settings = settings

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
        lease = background.lease(settings, keep=True)
        try:
            return await (await lease.aruntime()).acall(work)
        finally:
            lease.release()

    def _settings_now(self) -> PeerContextSettings:
        return self._settings or background.settings_in_use() or PeerContextSettings()
