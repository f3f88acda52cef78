"""The peer that answers: a background service of every running agent.

The responder is the process: however many agents it hosts, it reads the request topic once and
sends one answer a request, which lists each of them.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

from langgraph_peerctx import tracing
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    PeerContextError,
    ProtocolError,
    StoreError,
    UnknownTopicError,
)
from langgraph_peerctx.identifiers import check_id, new_id
from langgraph_peerctx.messaging.context_handler import ContextRequestHandler
from langgraph_peerctx.messaging.mock_transport import create_transport
from langgraph_peerctx.messaging.presence import Presence, Standing
from langgraph_peerctx.messaging.producer import headers_of
from langgraph_peerctx.messaging.topics import topics_for
from langgraph_peerctx.messaging.transport import From, Record, Subscription, Transport
from langgraph_peerctx.persistence.event_store import EventStore, aget_event_store
from langgraph_peerctx.protocol.codec import decode, encode
from langgraph_peerctx.protocol.messages import (
    AgentAnswer,
    ContextRequest,
    ContextResponse,
    InDoubtAnswer,
)

_logger = logging.getLogger(__name__)

LOOK_BACK_RECORDS = 1_000
"""A service that was away still answers what has not expired meanwhile."""
REMEMBERED_REQUESTS = 10_000
QUEUED_REQUESTS = 1_000
WORKERS = 4
REQUESTS_PER_SECOND = 50.0
BURST = 200.0
MAX_REQUESTERS = 256


_Queued = tuple[ContextRequest, float, str | None]
"""A request, when it expires, and the trace context that it carried."""


class ContextResponder:
    """One process's answers to context requests, for all agents that it hosts.

    Args:
        settings: Topics, limits, process id; by default from the environment.
        transport: A started transport to borrow; by default one of its own.
        presence: What says that the process is there; by default one of its own.

    Attributes:
        counters: What was taken and what was not, by reason: `answered`, `expired`, `repeated`,
            `throttled`, `overrun`, `not_addressed`, `unknown_topic`, `foreign_response_topic`,
            `unanswered`, `failed`, and `rejected.<fault>`.
    """

    def __init__(
        self,
        settings: PeerContextSettings | None = None,
        *,
        transport: Transport | None = None,
        presence: Presence | None = None,
    ) -> None:
        self.settings: PeerContextSettings = settings or PeerContextSettings()
        self.incarnation: str = presence.roster.incarnation if presence else new_id()
        self.counters: Counter[str] = Counter()
        self._borrowed = transport
        self._borrowed_presence = presence
        self._presence: Presence | None = None
        self._transport: Transport | None = None
        self._subscription: Subscription | None = None
        self._hosted: list[ContextRequestHandler] = []
        self._requests: asyncio.Queue[_Queued] = asyncio.Queue(QUEUED_REQUESTS)
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._buckets = _Buckets()
        self._stack = AsyncExitStack()
        self._changing = asyncio.Lock()

    @property
    def is_running(self) -> bool:
        """Whether it reads requests (in mock mode: would, if any could come)."""
        return self._subscription is not None

    @property
    def degraded(self) -> tuple[str, ...]:
        """Why requests may not reach it now; empty when all is well."""
        if self._transport is None or self._subscription is None:
            return ("the context service is not running",)
        lost = self._subscription.lost
        return self._transport.degraded or ((lost,) if lost else ())

    @property
    def agents(self) -> tuple[str, ...]:
        """The agents that it answers for, sorted."""
        return tuple(sorted(self._handlers))

    @property
    def _handlers(self) -> dict[str, ContextRequestHandler]:
        """Agent id -> what answers for it; of several, the latest."""
        return {handler.agent_id: handler for handler in self._hosted}

    async def host(self, *handlers: ContextRequestHandler) -> None:
        """Answer for these agents too; the first ones start the reading.

        It begins a thousand records before the topic's end, and each request is answered once, for
        the agents that are here when it is read: name all agents of a process in one call.

        Raises:
            BrokerUnavailableError: If there is no broker, and mock mode is `never`.
        """
        self._hosted.extend(handlers)
        try:
            async with self._changing:
                if self._subscription is None:
                    await self._start()
                elif self._presence is not None:
                    self._presence.beat_now()
        except BaseException:
            self._drop(handlers)
            raise

    async def unhost(self, *handlers: ContextRequestHandler) -> None:
        """Answer through these no longer; the last ones stop the reading. Safe to call twice."""
        self._drop(handlers)
        async with self._changing:
            if not self._hosted:
                await self._stop()
            elif self._presence is not None:
                self._presence.beat_now()

    async def stop(self) -> None:
        """Answer for nobody any more. Safe to call twice."""
        await self.unhost(*self._hosted)

    def _drop(self, handlers: Sequence[ContextRequestHandler]) -> None:
        for handler in handlers:
            if handler in self._hosted:
                self._hosted.remove(handler)

    async def _start(self) -> None:
        async with AsyncExitStack() as stack:
            stack.callback(setattr, self, "_transport", None)
            self._transport = transport = self._borrowed or create_transport(self.settings)
            if self._borrowed is None:
                stack.push_async_callback(transport.close)
                await transport.start()
            await transport.ensure_topics(topics_for(self.settings.kafka))
            for number in range(WORKERS):
                stack.push_async_callback(_ended, self._worker(number))
            subscription = await transport.subscribe(
                [self.settings.kafka.context_request_topic],
                self._take,
                start=From(back=LOOK_BACK_RECORDS),
            )
            stack.push_async_callback(subscription.close)
            await self._until_positioned(subscription)
            self._presence = await stack.enter_async_context(self._present(transport))
            self._subscription = subscription
            self._stack = stack.pop_all()

    async def _stop(self) -> None:
        self._subscription = self._presence = None
        await self._stack.aclose()

    @asynccontextmanager
    async def _present(self, transport: Transport) -> AsyncIterator[Presence]:
        """Let others know that we answer, and for whom; only once we can."""
        if (presence := self._borrowed_presence) is not None:
            presence.speak_for(lambda: self.agents)
            try:
                yield presence
            finally:
                presence.speak_for(tuple)
            return
        own = Presence(
            transport,
            self.settings,
            self.incarnation,
            standing=Standing(agents=lambda: self.agents),
            listens=False,
        )
        await own.start()
        try:
            yield own
        finally:
            await own.close()

    async def _until_positioned(self, subscription: Subscription) -> None:
        seconds = self.settings.kafka.connect_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                await subscription.positioned()
        except TimeoutError:
            _logger.warning("requests cannot be read yet: %s", subscription.lost)

    def _worker(self, number: int) -> "asyncio.Task[None]":
        return asyncio.create_task(self._work(), name=f"peerctx-responder-{number}")

    def _take(self, record: Record) -> None:
        """Take one record of the request topic: never waits."""
        request = self._valid(record)
        if request is None:
            return
        expires_at = _now() + request.lifetime_seconds - _age_of(record)
        if request.addressees and not self._is_meant(request.addressees):
            self.counters["not_addressed"] += 1
        elif not self._is_first(request.message_id):
            self.counters["repeated"] += 1
        elif expires_at < _now():
            self.counters["expired"] += 1
        elif not self._buckets.take(request.requester_id):
            self.counters["throttled"] += 1
        elif self._requests.full():
            self.counters["overrun"] += 1
        else:
            self._requests.put_nowait((request, expires_at, record.header("traceparent")))

    def _is_meant(self, addressees: tuple[str, ...]) -> bool:
        return not self._handlers.keys().isdisjoint(addressees) or (
            self.settings.process_id in addressees
        )

    def _valid(self, record: Record) -> ContextRequest | None:
        try:
            message = decode(record.value, max_bytes=self.settings.max_message_bytes)
        except ProtocolError as error:
            self.counters[f"rejected.{error.fault}"] += 1
            return None
        if isinstance(message, ContextRequest):
            return message
        self.counters["rejected.message_type"] += 1
        return None

    def _is_first(self, message_id: str) -> bool:
        if message_id in self._seen:
            return False
        self._seen[message_id] = None
        if len(self._seen) > REMEMBERED_REQUESTS:
            self._seen.popitem(last=False)
        return True

    async def _work(self) -> None:
        while True:
            request, expires_at, traceparent = await self._requests.get()
            try:
                with tracing.span("peerctx.answer", parent=traceparent, kind="server") as span:
                    await self._answer(request, expires_at, span)
            except Exception:  # a service loop logs and goes on to the next record
                self.counters["failed"] += 1
                _logger.exception("a request could not be answered")

    async def _answer(self, request: ContextRequest, expires_at: float, span: tracing.Span) -> None:
        span.set(
            agent_id=request.failed_agent_id,
            thread_id=request.thread_id,
            run_id=request.run_id,
            correlation_id=request.correlation_id,
            responder_id=self.settings.process_id,
        )
        if expires_at < _now():
            self.counters["expired"] += 1
            return
        topic = self.settings.kafka.get_response_topic(request.requester_id)
        if request.response_topic not in (None, topic):
            self.counters["foreign_response_topic"] += 1
            _logger.warning(
                "%s asks for answers on %.200r: ignored, they go to %s",
                request.requester_id,
                request.response_topic,
                topic,
            )
        handlers = [h for a, h in self._handlers.items() if a != request.failed_agent_id]
        answers = await self._ask(handlers, request)
        response = self._response(request, answers)
        told = sum(len(answer.interactions) for answer, _ in answers)
        span.set(agents=len(answers), interactions=told, in_doubt=len(response.in_doubt))
        data = encode_to_fit(response, self.settings.max_message_bytes)
        if self._transport is None:
            return
        headers = headers_of(response, traceparent=span.traceparent)
        try:
            delivery = await self._transport.send(topic, data, headers=headers)
        except UnknownTopicError:
            self.counters["unknown_topic"] += 1
        except BrokerUnavailableError as error:
            self.counters["unanswered"] += 1
            _logger.warning("an answer to %s was not sent: %s", request.requester_id, error)
        else:
            self.counters["answered" if delivery == "acknowledged" else "unanswered"] += 1

    async def _ask(
        self, handlers: list[ContextRequestHandler], request: ContextRequest
    ) -> list[tuple[AgentAnswer, tuple[InDoubtAnswer, ...]]]:
        """Ask every hosted agent, in one hop to a thread a store; one that fails is busy."""
        by_store: dict[EventStore, list[ContextRequestHandler]] = {}
        for handler in handlers:
            by_store.setdefault(handler.store, []).append(handler)
        asked = [_ask_one_store(store, some, request) for store, some in by_store.items()]
        return [answer for answers in await asyncio.gather(*asked) for answer in answers]

    def _response(
        self,
        request: ContextRequest,
        answers: list[tuple[AgentAnswer, tuple[InDoubtAnswer, ...]]],
    ) -> ContextResponse:
        return ContextResponse.model_construct(
            message_type="PROVIDE_CONTEXT",
            schema_version=1,
            message_id=new_id(),
            sent_at=datetime.now(UTC),
            correlation_id=request.correlation_id,
            responder_id=self.settings.process_id,
            incarnation=self.incarnation,
            failed_agent_id=request.failed_agent_id,
            thread_id=request.thread_id,
            run_id=request.run_id,
            epoch=request.epoch,
            attempt=request.attempt,
            agents=tuple(answer for answer, _ in answers),
            in_doubt=tuple(settled for _, all_settled in answers for settled in all_settled),
        )


def encode_to_fit(response: ContextResponse, max_bytes: int) -> bytes:
    """Return the response's bytes within a size; the oldest interactions go first.

    What was cut is said: the agent's answer is `truncated`. In-doubt answers are never cut.

    Raises:
        ProtocolError: If even the bare answer is too large.
    """
    try:
        return encode(response, max_bytes=max_bytes)
    except ProtocolError as error:
        if error.fault != "too_large":
            raise
    agents = tuple(_emptied(answer) for answer in response.agents)
    bare = response.model_copy(update={"agents": agents})
    room = max_bytes - len(bare.model_dump_json().encode()) - 1_024
    share = room // max(1, len(agents))
    cut = tuple(_cut(answer, share) for answer in response.agents)
    return encode(response.model_copy(update={"agents": cut}), max_bytes=max_bytes)


def _emptied(answer: AgentAnswer) -> AgentAnswer:
    return answer.model_copy(update={"interactions": (), "memory_state": {}, "truncated": True})


def _cut(answer: AgentAnswer, room: int) -> AgentAnswer:
    """Keep the memory if it fits, and then the newest interactions that do."""
    kept = []
    memory = answer.memory_state
    size = len(answer.model_copy(update={"interactions": ()}).model_dump_json().encode())
    if memory and size > room:
        memory, size = {}, 0
    for interaction in answer.interactions:
        size += len(interaction.model_dump_json().encode()) + 1
        if size > room:
            break
        kept.append(interaction)
    whole = len(kept) == len(answer.interactions) and memory == answer.memory_state
    return answer.model_copy(
        update={
            "interactions": tuple(kept),
            "memory_state": memory,
            "truncated": answer.truncated or not whole,
        }
    )


class _Buckets:
    """A token bucket a requester, so that one that floods does not silence the others."""

    def __init__(self) -> None:
        self._tokens: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, requester_id: str) -> bool:
        now = time.monotonic()
        tokens, since = self._tokens.pop(requester_id, (BURST, now))
        tokens = min(BURST, tokens + (now - since) * REQUESTS_PER_SECOND)
        self._tokens[requester_id] = (max(0.0, tokens - 1), now)
        if len(self._tokens) > MAX_REQUESTERS:
            self._tokens.popitem(last=False)
        return tokens >= 1


_Answer = tuple[AgentAnswer, tuple[InDoubtAnswer, ...]]


async def _ask_one_store(
    store: EventStore, handlers: list[ContextRequestHandler], request: ContextRequest
) -> list[_Answer]:
    try:
        return await store.in_thread(lambda: [_answer_of(h, request) for h in handlers])
    except StoreError as error:
        return [handler.busy(request, error) for handler in handlers]


def _answer_of(handler: ContextRequestHandler, request: ContextRequest) -> _Answer:
    try:
        return handler.answer(request)
    except Exception as error:  # a handler of the user's own may raise anything
        _logger.exception("%s cannot answer", handler.agent_id)
        return handler.busy(request, error)


def _now() -> float:
    return time.monotonic()


def _age_of(record: Record) -> float:
    """Return how long a record has waited for us; of one that has just come, no clock is asked.

    Ours may be wrong by an hour, and then every request would look expired.
    """
    return time.time() - record.timestamp_ms / 1_000 if record.was_there else 0.0


async def _ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait({task})


class AgentContextService:
    """Answers context requests for one agent while it is entered.

    Agents of one process share its responder: one reading, one answer a request.

    Args:
        agent_id: The agent.
        settings: By default from the environment.
        store: The agent's event store, borrowed; by default the settings'.
        transport: A started transport to borrow; the service then has a responder of its own.
        responder: A responder to join; by default the process's.
        handler: What answers; by default a `ContextRequestHandler` on the store.

    Raises:
        ProtocolError: If `agent_id` is no legal id.
    """

    def __init__(
        self,
        agent_id: str,
        *,
        settings: PeerContextSettings | None = None,
        store: EventStore | None = None,
        transport: Transport | None = None,
        responder: ContextResponder | None = None,
        handler: ContextRequestHandler | None = None,
    ) -> None:
        self.agent_id: str = check_id(agent_id, "agent_id")
        self._settings = settings
        self._store = store
        self._transport = transport
        self._given_responder = responder
        self._handler = handler
        self._responder: ContextResponder | None = None
        self._hosted: ContextRequestHandler | None = None
        self._changing = asyncio.Lock()

    @property
    def is_running(self) -> bool:
        """Whether requests are answered."""
        return self._responder is not None and self._responder.is_running

    @property
    def responder(self) -> ContextResponder | None:
        """The process's responder, while the service runs."""
        return self._responder

    @property
    def degraded(self) -> tuple[str, ...]:
        """Why requests may not reach this agent now; empty when all is well."""
        if self._responder is None:
            return ("the context service is not running",)
        return self._responder.degraded

    async def start(self) -> None:
        """Answer from now on. Safe to call twice.

        Raises:
            BrokerUnavailableError: If there is no broker, and mock mode is `never`.
            StoreError: If the event store cannot be opened.
        """
        async with self._changing:
            if self._responder is not None:
                return
            responder = self._given_responder or self._choose_responder()
            hosted = await ready_handler(
                self.agent_id, responder.settings, store=self._store, handler=self._handler
            )
            await responder.host(hosted)
            self._responder, self._hosted = responder, hosted

    async def stop(self) -> None:
        """Answer no longer. Safe to call twice."""
        async with self._changing:
            responder, self._responder = self._responder, None
            if responder is not None and self._hosted is not None:
                await responder.unhost(self._hosted)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    def _choose_responder(self) -> ContextResponder:
        settings = self._settings or PeerContextSettings()
        if self._transport is not None:
            return ContextResponder(settings, transport=self._transport)
        return _shared_responder(settings)


async def ready_handler(
    agent_id: str,
    settings: PeerContextSettings,
    *,
    store: EventStore | None = None,
    handler: ContextRequestHandler | None = None,
) -> ContextRequestHandler:
    """Return what answers for an agent, its event store opened and answering.

    Args:
        agent_id: The agent.
        settings: Which store, and how many interactions an answer may have.
        store: By default the settings'.
        handler: By default a `ContextRequestHandler` on the store.

    Raises:
        StoreError: If the event store cannot be opened.
    """
    if handler is None:
        handler = ContextRequestHandler(
            agent_id,
            store=store or await aget_event_store(settings.database_url),
            max_interactions=settings.max_interactions,
        )
    opened = await asyncio.to_thread(getattr, handler, "store")  # opening one may wait
    await opened.aping()
    return handler


_RESPONDERS: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, ContextResponder]] = (
    WeakKeyDictionary()
)


def _shared_responder(settings: PeerContextSettings) -> ContextResponder:
    """Return the process's responder on this loop: one a broker and process id."""
    shared = _RESPONDERS.setdefault(asyncio.get_running_loop(), {})
    key = settings.model_dump_json(include={"kafka", "process_id", "mock_mode"})
    return shared.setdefault(key, ContextResponder(settings))


class AgentContextServiceManager:
    """The services of all agents in this process.

    Args:
        settings: By default from the environment, when the first agent registers.
    """

    def __init__(self, settings: PeerContextSettings | None = None) -> None:
        self._settings = settings
        self._by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, _Registered] = (
            WeakKeyDictionary()
        )

    async def register_agent(self, agent_id: str, **options: Any) -> AgentContextService:
        """Start a service for an agent, or return the one that runs.

        Args:
            agent_id: The agent.
            **options: As `AgentContextService` takes them.

        Raises:
            PeerContextError: If the service does not start; nothing is left of it then.
        """
        registered = self._here()
        async with registered.locks[agent_id]:
            running = registered.services.get(agent_id)
            if running is not None and running.is_running:
                return running
            service = AgentContextService(agent_id, **{"settings": self._settings, **options})
            await service.start()
            registered.services[agent_id] = service
            return service

    async def unregister_agent(self, agent_id: str) -> None:
        """Stop an agent's service, if there is one on this loop."""
        registered = self._here()
        async with registered.locks[agent_id]:
            service = registered.services.pop(agent_id, None)
            if service is not None:
                await service.stop()

    def get_service(self, agent_id: str) -> AgentContextService | None:
        """Return an agent's service, or None.

        A service belongs to the event loop that started it: of a loop that has ended there is none.
        """
        for loop, registered in list(self._by_loop.items()):  # other threads may register
            if agent_id in registered.services and not loop.is_closed():
                return registered.services[agent_id]
        return None

    async def stop_all(self) -> None:
        """Stop every service on this loop; one that fails does not keep the others."""
        for agent_id in list(self._here().services):
            try:
                await self.unregister_agent(agent_id)
            except PeerContextError:
                _logger.exception("the service of %s did not stop well", agent_id)

    def _here(self) -> "_Registered":
        return self._by_loop.setdefault(asyncio.get_running_loop(), _Registered())


@dataclass(frozen=True, slots=True)
class _Registered:
    """One loop's services by agent, and what starting and stopping each waits for."""

    services: dict[str, AgentContextService] = field(default_factory=dict)
    locks: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))


_MANAGER = AgentContextServiceManager()


def get_service_manager() -> AgentContextServiceManager:
    """Return the manager of this process: always the same one."""
    return _MANAGER
