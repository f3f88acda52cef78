"""Consuming messages with handlers, or collecting them for a while."""

import asyncio
import inspect
import itertools
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError, ProtocolError
from langgraph_peerctx.messaging.mock_transport import create_transport
from langgraph_peerctx.messaging.transport import Record, Subscription, Transport
from langgraph_peerctx.protocol.codec import MESSAGE_TYPES, decode

_logger = logging.getLogger(__name__)

MessageDict: TypeAlias = dict[str, Any]
Handler: TypeAlias = Callable[[MessageDict], Awaitable[None] | None]

BUFFERED_MESSAGES = 10_000
BUFFERED_BYTES = 67_108_864


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A message that nobody has taken yet; `number` counts the arrivals."""

    number: int
    size: int
    body: MessageDict


class _Buffer:
    """Messages that nobody has taken yet, by type, in the order in which they came."""

    def __init__(self) -> None:
        self._by_type: dict[str, deque[_Waiting]] = {}
        self._numbers = itertools.count()
        self._count = self._bytes = 0

    def put(self, message_type: str, body: MessageDict, size: int) -> int:
        """Take a message in; return how many old ones had to go for it."""
        waiting = _Waiting(next(self._numbers), size, body)
        self._by_type.setdefault(message_type, deque()).append(waiting)
        self._count += 1
        self._bytes += size
        gone = 0
        while self._count > BUFFERED_MESSAGES or self._bytes > BUFFERED_BYTES:
            self.pop(self._by_type)
            gone += 1
        return gone

    def pop(self, message_types: Collection[str]) -> _Waiting | None:
        """Hand out the oldest message of one of these types."""
        queues = [queue for name in message_types if (queue := self._by_type.get(name))]
        if not queues:
            return None
        waiting = min(queues, key=lambda queue: queue[0].number).popleft()
        self._count -= 1
        self._bytes -= waiting.size
        return waiting

    def put_back(self, taken: Iterable[_Waiting]) -> None:
        """Take back what was handed out, at its place."""
        for waiting in sorted(taken, key=lambda w: w.number, reverse=True):
            self._by_type[waiting.body["message_type"]].appendleft(waiting)
            self._count += 1
            self._bytes += waiting.size


class KafkaMessageConsumer:
    """Reads topics from the moment it is entered; an async context manager.

    Each message goes to the handler of its type while `start_consuming` runs, and is also there
    for `collect_messages`. Records that are no valid message are counted by fault and skipped.

    Args:
        topics: What to read.
        group_id: A consumer group to join: its members share the messages, and go on where the
            group stood. By default there is none: everything sent from now on is read.
        settings: By default from the environment.
        transport: A started transport to borrow; by default one of its own, closed with it.

    Attributes:
        rejected: Records that were no valid message, by fault.
        dropped: Messages that nobody took before 10,000 newer ones, or 64 MiB of them, came.
        failed: Messages whose handler raised.
    """

    def __init__(
        self,
        topics: Collection[str],
        group_id: str | None = None,
        *,
        settings: PeerContextSettings | None = None,
        transport: Transport | None = None,
    ) -> None:
        if isinstance(topics, str) or not topics:
            raise ConfigurationError("topics must be a list of at least one topic's name")
        self.topics: list[str] = list(topics)
        self.group_id: str | None = group_id
        self.rejected: Counter[str] = Counter()
        self.dropped: int = 0
        self.failed: int = 0
        self._settings = settings or PeerContextSettings()
        self._borrowed = transport
        self._subscription: Subscription | None = None
        self._handlers: dict[str, Handler] = {}
        self._waiting = _Buffer()
        self._arrived = asyncio.Event()
        self._consuming: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()

    def register_handler(self, message_type: str, handler: Handler) -> None:
        """Have messages of one type handled, by a function or coroutine function of one dict.

        Raises:
            ConfigurationError: If there is no such type: the handler would never be called.
        """
        if message_type not in MESSAGE_TYPES:
            raise ConfigurationError(
                f"there is no message type {message_type!r}; "
                f"there are {', '.join(sorted(MESSAGE_TYPES))}"
            )
        self._handlers[message_type] = handler

    async def start(self) -> None:
        """Begin to read.

        Raises:
            BrokerUnavailableError: If there is no broker, and mock mode is `never`.
        """
        if self._subscription is not None:
            return
        async with AsyncExitStack() as stack:
            transport = self._borrowed
            if transport is None:
                transport = create_transport(self._settings)
                stack.push_async_callback(transport.close)
                await transport.start()
            subscription = await transport.subscribe(
                self.topics, self._take, group_id=self.group_id
            )
            stack.push_async_callback(subscription.close)
            await self._until_positioned(subscription)
            self._subscription = subscription
            self._stack = stack.pop_all()

    async def stop(self) -> None:
        """Stop reading and consuming. Safe to call twice, and from a handler."""
        self._subscription = None
        self._arrived.set()
        consuming, self._consuming = self._consuming, None
        if consuming is not None and consuming is not asyncio.current_task():
            consuming.cancel()
            await asyncio.wait({consuming})
        await self._stack.aclose()

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

    def start_consuming(self) -> "asyncio.Task[None]":
        """Hand messages to their handlers in the background, one after the other.

        Returns:
            The task; it runs until the consumer stops. Called again, the same one.

        Raises:
            ConfigurationError: If the consumer has not been entered.
        """
        if self._subscription is None:
            raise ConfigurationError("this consumer is not started: use it in an `async with`")
        if self._consuming is None or self._consuming.done():
            self._consuming = asyncio.create_task(self._consume(), name="peerctx-consume")
        return self._consuming

    async def collect_messages(
        self,
        timeout: float,  # noqa: ASYNC109 - the published name; a window, not a deadline
        message_type: str | None = None,
        *,
        max_messages: int | None = None,
    ) -> list[MessageDict]:
        """Return what has come since the consumer was entered, or comes within the window.

        Args:
            timeout: The window, in seconds. In mock mode nothing can come, and it is not waited
                for.
            message_type: Only messages of this type; others stay for a later call. By default all
                that no handler takes.
            max_messages: Return as soon as there are so many.

        Returns:
            Messages as plain JSON, in the order in which they came; each is handed out once. What a
            cancelled call had collected is there for the next one.
        """
        found: list[_Waiting] = []
        try:
            async with asyncio.timeout(timeout):
                while self._subscription is not None:
                    self._hand_out(found, message_type, max_messages)
                    enough = max_messages is not None and len(found) >= max_messages
                    if enough or self._in_vain():
                        break
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            self._hand_out(found, message_type, max_messages)
        except BaseException:
            self._waiting.put_back(found)
            raise
        return [waiting.body for waiting in found]

    def _in_vain(self) -> bool:
        return self._subscription is not None and (self._subscription.lost or "").startswith("mock")

    def _hand_out(
        self, found: list[_Waiting], message_type: str | None, max_messages: int | None
    ) -> None:
        handled = self._handlers.keys() if self._consuming is not None else set()
        message_types = MESSAGE_TYPES - handled if message_type is None else {message_type}
        while max_messages is None or len(found) < max_messages:
            waiting = self._waiting.pop(message_types)
            if waiting is None:
                return
            found.append(waiting)

    def _take(self, record: Record) -> None:
        """Take one record: never waits."""
        try:
            message = decode(record.value, max_bytes=self._settings.max_message_bytes)
        except ProtocolError as error:
            self.rejected[error.fault] += 1
            return
        size = len(record.value or b"")
        self.dropped += self._waiting.put(
            message.message_type, message.model_dump(mode="json"), size
        )
        self._arrived.set()

    async def _consume(self) -> None:
        while self._subscription is not None:
            waiting = self._waiting.pop(self._handlers)
            if waiting is None:
                self._arrived.clear()
                await self._arrived.wait()
            else:
                await self._handle(waiting.body)
                await asyncio.sleep(0)  # a flood must not keep the loop to itself

    async def _handle(self, message: MessageDict) -> None:
        try:
            outcome = self._handlers[message["message_type"]](message)
            if inspect.isawaitable(outcome):
                await outcome
        except Exception:  # a service loop logs and goes on to the next record
            self.failed += 1
            _logger.exception("the handler of %s failed", message["message_type"])

    async def _until_positioned(self, subscription: Subscription) -> None:
        # A group's first join takes about three seconds: the broker waits for more members.
        seconds = self._settings.kafka.connect_timeout_seconds + (10 if self.group_id else 0)
        try:
            async with asyncio.timeout(seconds):
                await subscription.positioned()
        except TimeoutError:
            _logger.warning("%s cannot be read yet: %s", self.topics, subscription.lost)
