"""One process's connection to its peers: what asks, what it owns, and what it needs for that."""

import asyncio
import logging
from collections.abc import Collection, Iterable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self, Unpack

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.lease_keeper import LeaseKeeper
from langgraph_peerctx.durability.loop_watch import LoopWatch
from langgraph_peerctx.durability.ownership import Ownership, process_fence
from langgraph_peerctx.errors import BrokerUnavailableError, ConfigurationError, StoreError
from langgraph_peerctx.gathering.gatherer import Enough, Gatherer, OnAnswer, OnSent, Question
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.gathering.steps import GatherSteps
from langgraph_peerctx.identifiers import new_id
from langgraph_peerctx.messaging.mock_transport import create_transport
from langgraph_peerctx.messaging.presence import Presence
from langgraph_peerctx.messaging.reply_inbox import ReplyInbox
from langgraph_peerctx.messaging.sentinel_client import SentinelClient
from langgraph_peerctx.messaging.topics import topics_for
from langgraph_peerctx.messaging.transport import Transport
from langgraph_peerctx.persistence.database import open_in_thread
from langgraph_peerctx.persistence.event_store import EventStore, get_event_store
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.protocol.messages import ContextRequest, InDoubtKey

_logger = logging.getLogger(__name__)


class PeerContextRuntime:
    """Transport, reply inbox, gatherer and event store of one process, on the loop that enters it.

    The inbox is positioned once, while it starts, so that a gather needs no look-up. Enter it once
    and gather often: an async context manager.

    Args:
        settings: By default from the environment.
        transport: A started transport to borrow; by default one of its own, closed with it.
        store: The own event store, borrowed; by default the settings'.
    """

    def __init__(
        self,
        settings: PeerContextSettings | None = None,
        *,
        transport: Transport | None = None,
        store: EventStore | None = None,
    ) -> None:
        self.settings: PeerContextSettings = settings or PeerContextSettings()
        self._transport = transport
        self._borrowed = transport is not None
        self._store = store
        self._gatherer: Gatherer | None = None
        self._steps: GatherSteps | None = None
        self._presence: Presence | None = None
        self._ownership: Ownership | None = None
        self._owning: asyncio.Lock = asyncio.Lock()
        self.watch: LoopWatch = LoopWatch()
        self._stack = AsyncExitStack()

    @property
    def store(self) -> EventStore:
        """The process's own event store, opened when first asked for."""
        if self._store is None:
            self._store = get_event_store(self.settings.database_url)
        return self._store

    @property
    def transport(self) -> Transport:
        """The transport, while the runtime runs.

        Raises:
            ConfigurationError: If it does not run.
        """
        if self._transport is None:
            raise ConfigurationError("this runtime is not started: use it in an `async with`")
        return self._transport

    @property
    def gatherer(self) -> Gatherer:
        """What asks the peers, while the runtime runs.

        Raises:
            ConfigurationError: If it does not run.
        """
        if self._gatherer is None:
            raise ConfigurationError("this runtime is not started: use it in an `async with`")
        return self._gatherer

    def request(self, **question: Unpack[Question]) -> ContextRequest:
        """Return a question with the settings' defaults; nothing is sent. See `Gatherer.request`.

        Raises:
            ConfigurationError: If the runtime does not run.
            ProtocolError: If an id is illegal or a value out of its range.
        """
        return self.gatherer.request(**question)

    @property
    def steps(self) -> GatherSteps:
        """What asks the peers in steps that may be taken by different processes.

        Raises:
            ConfigurationError: If the runtime does not run.
        """
        if self._steps is None:
            raise ConfigurationError("this runtime is not started: use it in an `async with`")
        return self._steps

    @property
    def presence(self) -> Presence:
        """Our heartbeats, and everybody's, while the runtime runs.

        Raises:
            ConfigurationError: If it does not run.
        """
        if self._presence is None:
            raise ConfigurationError("this runtime is not started: use it in an `async with`")
        return self._presence

    @property
    def sentinel_id(self) -> str | None:
        """Who would see this process die, if anybody."""
        return None if self._presence is None else self._presence.standing.sentinel_id

    async def own(self) -> Ownership:
        """Return what this process owns; opens the control database when first asked.

        From then on leases are renewed, and the host's sentinel sees us die.

        Raises:
            ConfigurationError: If the runtime does not run.
            StoreError: If the control database cannot be opened.
        """
        async with self._owning:
            if self._ownership is None:
                self._ownership = await self._begin_to_own(self.presence)
            return self._ownership

    async def _begin_to_own(self, presence: Presence) -> Ownership:
        settings = self.settings
        if not settings.has_shared_control:
            _logger.warning(
                "nobody else can recover what is run here: PEER_CONTEXT_CONTROL_DATABASE_URL names "
                "no database that is shared"
            )
        control = await open_in_thread(
            ControlDatabase,
            settings.control_url,
            timeout_seconds=settings.database_timeout_seconds,
        )
        ownership = Ownership(
            control,
            owner_id=settings.process_id,
            incarnation=presence.roster.incarnation,
            ttl_seconds=settings.lease_seconds,
        )
        client = SentinelClient(
            settings, presence.roster.incarnation, on_change=presence.watched_by
        )
        keeper = LeaseKeeper(ownership, self.watch, settings.heartbeat_interval_seconds)
        stack = self._stack  # left from its end: what is open is handed over before we are gone
        stack.callback(control.close)
        stack.callback(process_fence.leave, ownership)
        stack.push_async_callback(client.close)
        stack.push_async_callback(keeper.close)
        stack.push_async_callback(self._hand_over, ownership)
        process_fence.enter(ownership)
        presence.standing.open_runs = lambda: len(ownership.held)
        presence.standing.loop_lag_seconds = self.watch.lag_seconds
        keeper.start()
        await client.start()
        return ownership

    async def _hand_over(self, ownership: Ownership) -> None:
        """Let whoever can go on with what is open here."""
        try:
            count = await ownership.hand_over()
        except StoreError as error:
            _logger.warning("what is open here waits until its leases expire: %s", error)
        else:
            if count:
                _logger.info("%d open runs are handed over", count)

    @property
    def degraded(self) -> tuple[str, ...]:
        """Why a gather would not be the whole truth now; empty when all is well."""
        return self.transport.degraded

    async def start(self) -> None:
        """Connect, see to the topics, and position the inbox.

        Raises:
            BrokerUnavailableError: If there is no broker, and mock mode is `never`.
            ConfigurationError: If the broker refuses the credentials.
        """
        if self._gatherer is not None:
            return
        settings = self.settings
        async with AsyncExitStack() as stack:
            transport = self._transport if self._borrowed else create_transport(settings)
            assert transport is not None  # noqa: S101 - borrowed or made
            if not self._borrowed:
                stack.push_async_callback(transport.close)
                await transport.start()
            await self._see_to_topics(transport)
            inbox = ReplyInbox(
                transport,
                settings.kafka.get_response_topic(settings.requester_id),
                max_message_bytes=settings.max_message_bytes,
            )
            stack.push_async_callback(inbox.close)
            await inbox.start(timeout_seconds=settings.kafka.connect_timeout_seconds)
            presence = Presence(transport, settings, new_id())
            await presence.start()
            stack.push_async_callback(presence.close)
            self._transport, self._presence = transport, presence
            self._gatherer = Gatherer(transport, inbox, settings, presence.roster)
            self._steps = GatherSteps(self._gatherer, transport, inbox, settings)
            stack.push_async_callback(self._steps.close)
            self._stack = stack.pop_all()

    async def _see_to_topics(self, transport: Transport) -> None:
        """Make the topics that asking needs; where we may not, they may be there later."""
        settings = self.settings
        needed = topics_for(
            settings.kafka,
            [settings.requester_id],
            max_message_bytes=settings.max_message_bytes,
        )
        try:
            await transport.ensure_topics(needed)
        except BrokerUnavailableError as error:
            if settings.mock_mode == "never":
                raise
            _logger.warning("the topics are not ready: %s", error)

    async def close(self) -> None:
        """Close what is its own; what is being gathered ends, and says so. Safe to call twice."""
        if self._gatherer is not None:
            self._gatherer.close()
        self._gatherer = self._steps = self._presence = None
        async with self._owning:
            self._ownership = None
        await self._stack.aclose()
        if not self._borrowed:
            self._transport = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def gather(
        self,
        *,
        failed_agent_id: str,
        thread_id: str,
        timeout_seconds: float | None = None,
        expect: Collection[str] = (),
        min_responses: int | None = None,
        enough: Enough | None = None,
        time_window_seconds: float | None = None,
        in_doubt: Iterable[InDoubtKey] = (),
        run_id: str | None = None,
        epoch: int = 0,
        attempt: int = 1,
        correlation_id: str | None = None,
        on_sent: OnSent | None = None,
        on_answer: OnAnswer | None = None,
    ) -> PeerContext:
        """Ask the peers what they remember of an agent in a thread; see `Gatherer.gather`.

        Args:
            failed_agent_id: Whom the question is about.
            thread_id: In which thread.
            timeout_seconds: The window, in seconds; by default the settings'.
            expect: Who should answer, as agent ids or process ids: the gather ends with the last.
            min_responses: Stop at so many answers; fewer are an error.
            enough: Stop when this is true of the answers so far.
            time_window_seconds: How far back the peers look, in seconds; by default the settings'.
            in_doubt: Effects to be settled.
            run_id: The run that died, where it is known.
            epoch: The asker's epoch.
            attempt: Which attempt at this recovery.
            correlation_id: What the answers carry; by default a fresh one.
            on_sent: Called when the broker has the question, on the loop.
            on_answer: Called with each answer as it comes, on the loop.

        Raises:
            ConfigurationError: If the runtime does not run.
            ProtocolError: If an id is illegal or a value out of its range.
            TooFewResponsesError: If fewer than `min_responses` answered in time.
            BrokerUnavailableError: If there is no broker and mock mode is `never`.
        """
        gatherer = self.gatherer
        request = gatherer.request(
            failed_agent_id=failed_agent_id,
            thread_id=thread_id,
            time_window_seconds=time_window_seconds,
            run_id=run_id,
            epoch=epoch,
            attempt=attempt,
            in_doubt=in_doubt,
            correlation_id=correlation_id,
        )
        return await gatherer.gather(
            request,
            timeout_seconds=timeout_seconds,
            expect=expect,
            min_responses=min_responses,
            enough=enough,
            on_sent=on_sent,
            on_answer=on_answer,
        )
