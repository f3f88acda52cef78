"""Where evidence comes from beside the checkpoint: the agent's own store, and its peers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Protocol, Self

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import BrokerUnavailableError, StoreError
from langgraph_peerctx.gathering.gatherer import OnAnswer
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.identifiers import new_id
from langgraph_peerctx.nodes.on_runtime import NodeRuntime
from langgraph_peerctx.persistence.event_store import get_event_store
from langgraph_peerctx.persistence.inspection import has_schema
from langgraph_peerctx.protocol.messages import WINDOW_LIMIT_SECONDS, InDoubtKey, Interaction
from langgraph_peerctx.runtime import PeerContextRuntime


class OwnEvents(Protocol):
    """What we need of an event store."""

    async def ainteractions_of(
        self,
        agent_id: str,
        *,
        thread_id: str,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 200,
    ) -> list[Interaction]:
        """Return an agent's own events of a thread, newest first."""
        ...


class ContextRuntime(NodeRuntime, Protocol):
    """What we need of a runtime; `PeerContextRuntime` is the one for production."""

    @property
    def settings(self) -> PeerContextSettings:
        """The settings it was built with."""
        ...

    @property
    def store(self) -> OwnEvents:
        """The agent's own event store."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceQuery:
    """What is asked of own store and peers.

    Attributes:
        use_peer_context: Whether peers are asked at all.
        peer_timeout_seconds: The longest wait for the peers' answers.
        time_window_seconds: How far back to look; None is as far as `reaching` finds it needs to.
        reaches_checkpoint: Whether that goes back to the thread's last checkpoint.
        expect: Agents or processes that should answer; once they have, the wait ends.
        min_responses: Fewer answers than this is an error.
        in_doubt: Effects of which nobody here knows whether they happened.
    """

    agent_id: str
    thread_id: str
    use_peer_context: bool = True
    peer_timeout_seconds: float = 5.0
    time_window_seconds: float | None = None
    expect: tuple[str, ...] = ()
    min_responses: int | None = None
    in_doubt: tuple[InDoubtKey, ...] = ()
    run_id: str | None = None
    reaches_checkpoint: bool = True

    def reaching(self, checkpoint_at: datetime | None, usual_seconds: float) -> Self:
        """Return this query with a time window that suits the thread.

        An agent that died long ago is asked about as it was then: unless the caller set a window,
        it goes back to the last checkpoint, and from there the usual window further.

        Args:
            checkpoint_at: When the thread's last checkpoint was written, if it has one.
            usual_seconds: The settings' window.
        """
        age = _seconds_since(checkpoint_at) if checkpoint_at else 0.0
        wanted = self.time_window_seconds or max(0.0, age) + usual_seconds
        window = min(wanted, WINDOW_LIMIT_SECONDS)
        return replace(self, time_window_seconds=window, reaches_checkpoint=age <= window)


def _seconds_since(moment: datetime) -> float:
    return (datetime.now(UTC) - moment).total_seconds()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What a recovery may ask.

    Attributes:
        open_store: Returns the agent's own store; may wait for a database, so not for a loop.
        runtime: None where peers are not asked, or there is no broker.
        shortfalls: What should be here and is not.
    """

    open_store: Callable[[], OwnEvents]
    settings: PeerContextSettings
    runtime: ContextRuntime | None = None
    shortfalls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnHistory:
    """The failed agent's own events of the thread, newest first."""

    events: tuple[Interaction, ...] = ()
    shortfalls: tuple[str, ...] = ()


@asynccontextmanager
async def open_sources(
    *,
    use_peer_context: bool,
    runtime: ContextRuntime | None = None,
    settings: PeerContextSettings | None = None,
) -> AsyncIterator[Sources]:
    """Open what is needed and close it again; a runtime that is given is borrowed.

    A broker that is not there costs the peers' part, not the recovery.
    """
    if runtime is not None:
        yield _of_runtime(runtime)
        return
    settings = settings or PeerContextSettings()
    unreached = Sources(
        open_store=partial(existing_store, settings.database_url), settings=settings
    )
    if not use_peer_context:
        yield unreached
        return
    async with AsyncExitStack() as stack:
        try:
            own = await stack.enter_async_context(PeerContextRuntime(settings))
        except BrokerUnavailableError as error:
            sources = replace(unreached, shortfalls=(f"no_broker: {error}",))
        else:
            sources = replace(unreached, runtime=own, shortfalls=())
        yield sources


def existing_store(url: str) -> OwnEvents:
    """Open the store that is there: an empty one that we made would look as if it knew."""
    if not has_schema(url):
        raise StoreError(
            "there is no event store at the address: either the agent has recorded nothing of its "
            "own (see InteractionRecorder), or another one was meant: name it "
            "with PEER_CONTEXT_DATABASE_URL"
        )
    return get_event_store(url)


def _of_runtime(runtime: ContextRuntime) -> Sources:
    return Sources(open_store=lambda: runtime.store, settings=runtime.settings, runtime=runtime)


async def collect_context(
    sources: Sources, query: EvidenceQuery, *, on_answer: OnAnswer | None = None
) -> PeerContext | None:
    """Ask the peers; None if they are not to be asked.

    Raises:
        TooFewResponsesError: If fewer than the query's `min_responses` answered.
    """
    if not query.use_peer_context:
        return None
    if sources.runtime is None:
        return nobody_asked(query, sources.shortfalls)
    try:
        return await sources.runtime.gather(
            failed_agent_id=query.agent_id,
            thread_id=query.thread_id,
            timeout_seconds=query.peer_timeout_seconds,
            expect=query.expect,
            min_responses=query.min_responses,
            time_window_seconds=query.time_window_seconds,
            in_doubt=query.in_doubt,
            run_id=query.run_id,
            on_answer=on_answer,
        )
    except BrokerUnavailableError as error:
        return nobody_asked(query, (f"no_broker: {error}",))


async def collect_own_events(sources: Sources, query: EvidenceQuery) -> OwnHistory:
    """Read what the failed agent itself recorded of this thread; a broken store costs only that."""
    window = query.time_window_seconds or sources.settings.time_window_seconds
    limit = sources.settings.max_interactions
    try:
        store = await asyncio.to_thread(sources.open_store)
        events = await store.ainteractions_of(
            query.agent_id,
            thread_id=query.thread_id,
            since=datetime.now(UTC) - timedelta(seconds=window),
            limit=limit + 1,
        )
    except StoreError as error:
        return OwnHistory(shortfalls=(f"no_own_events: {error}",))
    cut = (f"own_events_cut: only the newest {limit} are here; see PEER_CONTEXT_MAX_INTERACTIONS",)
    return OwnHistory(events=tuple(events[:limit]), shortfalls=cut if len(events) > limit else ())


def nobody_asked(query: EvidenceQuery, degraded: tuple[str, ...]) -> PeerContext:
    """Return what is known where nobody could be asked."""
    return PeerContext(
        correlation_id=new_id(),
        failed_agent_id=query.agent_id,
        thread_id=query.thread_id,
        gathered_at=datetime.now(UTC),
        degraded=degraded,
    )
