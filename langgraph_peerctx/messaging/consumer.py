"""Consuming messages with handlers, or collecting them for a while."""

import asyncio
import inspect
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack
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
        dropped: Messages that nobody collected before 10,000 newer ones came.
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
        self._collected: deque[MessageDict] = deque(maxlen=BUFFERED_MESSAGES)
        self._handled: asyncio.Queue[MessageDict] = asyncio.Queue(BUFFERED_MESSAGES)
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
            self._subscription = subscription
            await self._until_positioned(subscription)
            self._stack = stack.pop_all()

    async def stop(self) -> None:
        """Stop reading and consuming. Safe to call twice."""
        consuming, self._consuming = self._consuming, None
        if consuming is not None:
            consuming.cancel()
            await asyncio.wait({consuming})
        self._subscription = None
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
            message_type: Only messages of this type; others stay for a later call.
            max_messages: Return as soon as there are so many.

        Returns:
            Messages as plain JSON, in the order in which they came; each is handed out once.
        """
        found: list[MessageDict] = []
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
        return found

    def _in_vain(self) -> bool:
        return self._subscription is not None and (self._subscription.lost or "").startswith("mock")

    def _hand_out(
        self, found: list[MessageDict], message_type: str | None, max_messages: int | None
    ) -> None:
        for _ in range(len(self._collected)):
            message = self._collected.popleft()
            wanted = message_type is None or message["message_type"] == message_type
            if wanted and (max_messages is None or len(found) < max_messages):
                found.append(message)
            else:
                self._collected.append(message)

    def _take(self, record: Record) -> None:
        """Take one record: never waits."""
        try:
            message = decode(record.value, max_bytes=self._settings.max_message_bytes)
        except ProtocolError as error:
            self.rejected[error.fault] += 1
            return
        body = message.model_dump(mode="json")
        if len(self._collected) == BUFFERED_MESSAGES:
            self.dropped += 1
        self._collected.append(body)
        self._arrived.set()
        if message.message_type in self._handlers and not self._handled.full():
            self._handled.put_nowait(body)

    async def _consume(self) -> None:
        while True:
            message = await self._handled.get()
            handler = self._handlers.get(message["message_type"])
            if handler is None:
                continue
            try:
                outcome = handler(message)
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
