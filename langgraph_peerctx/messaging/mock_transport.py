"""Mock mode: operations succeed, nothing is sent, nothing arrives, and it is said aloud.

It covers development and tests without a broker. It must never be mistaken for an answer: one
WARNING names the broker, and `degraded` gives the reason for as long as it lasts.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    PeerContextError,
    RecordRefusedError,
    SendOutcomeUnknownError,
)
from langgraph_peerctx.messaging.transport import (
    Delivery,
    From,
    Headers,
    Offsets,
    OnRecord,
    Subscription,
    TopicSpec,
    TopicState,
    Transport,
)

try:
    from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
except ImportError:  # aiokafka is missing or broken: mock mode serves
    KafkaTransport = None  # type: ignore[assignment, misc]  # asked for below

_logger = logging.getLogger(__name__)

PROBE_SECONDS = 2.0
"""How often a broker that is away is looked for."""


def create_transport(settings: PeerContextSettings) -> Transport:
    """Return the transport that the settings ask for, not started yet.

    `never`: Kafka, or an error. `always`: mock mode. `auto`: Kafka, and mock mode while there is
    none.

    Raises:
        BrokerUnavailableError: If aiokafka is not installed, and mock mode is `never`.
    """
    if settings.mock_mode == "always":
        return MockTransport("mock mode was asked for (PEER_CONTEXT_MOCK_MODE=always)")
    if KafkaTransport is None:
        if settings.mock_mode == "never":
            raise BrokerUnavailableError("aiokafka is not installed: pip install aiokafka")
        return MockTransport("aiokafka is not installed")
    kafka = KafkaTransport(settings.kafka, max_message_bytes=settings.max_message_bytes)
    return kafka if settings.mock_mode == "never" else AutoTransport(kafka, kafka.address)


class MockTransport:
    """A `Transport` that goes nowhere.

    Args:
        reason: Why, for the warning and for `degraded`.
    """

    def __init__(self, reason: str) -> None:
        self._reason = reason

    @property
    def degraded(self) -> tuple[str, ...]:
        """The one reason."""
        return (f"mock mode: {self._reason}",)

    async def start(self) -> None:
        """Say aloud that nothing will be sent."""
        _logger.warning("mock mode: nothing is sent, nothing is received: %s", self._reason)

    async def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | None = None,  # noqa: ARG002 - the interface
        headers: Headers = (),  # noqa: ARG002 - the interface
    ) -> Delivery:
        """Log the sending."""
        _logger.info("mock mode: %d bytes for %s are not sent", len(value), topic)
        return "mock"

    async def subscribe(
        self,
        topics: Collection[str],  # noqa: ARG002 - the interface
        on_record: OnRecord,  # noqa: ARG002 - the interface
        *,
        start: From | None = None,  # noqa: ARG002 - the interface
        group_id: str | None = None,  # noqa: ARG002 - the interface
    ) -> "MockSubscription":
        """Return a subscription to which nothing ever comes."""
        return MockSubscription(self.degraded[0])

    async def ensure_topics(self, topics: Collection[TopicSpec]) -> None:
        """Make nothing."""

    async def describe_topics(self, names: Collection[str]) -> dict[str, TopicState]:
        """Return every topic as missing."""
        return {name: TopicState(name=name, partitions=0) for name in names}

    async def close(self) -> None:
        """Close nothing."""


class MockSubscription:
    """A subscription to which nothing ever comes."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    @property
    def offsets(self) -> Offsets:
        """None are known."""
        return {}

    @property
    def lost(self) -> str | None:
        """Always lost."""
        return self._reason

    async def positioned(self) -> None:
        """Return at once: there is no position to wait for."""

    async def close(self) -> None:
        """Close nothing."""


class AutoTransport:
    """Kafka while it is there, mock mode while it is not.

    Wrong credentials are no absence: they are raised. Mock mode is left by itself when the broker
    answers again; standing subscriptions are live then, without anybody doing anything.

    Args:
        kafka: What is used while it can be; owned, and closed with this.
        address: The broker, for the warning.
        pause: Waits so many seconds between two probes.
    """

    def __init__(
        self,
        kafka: Transport,
        address: str,
        *,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._kafka = kafka
        self._address = address
        self._pause = pause
        self._mock: MockTransport | None = None
        self._mocked = asyncio.Event()
        self._probing: asyncio.Task[None] | None = None
        self._closed = False
        self._owed: dict[str, TopicSpec] = {}

    @property
    def degraded(self) -> tuple[str, ...]:
        """The reason while mock mode lasts, else Kafka's own."""
        return self._mock.degraded if self._mock else self._kafka.degraded

    async def start(self) -> None:
        """Connect, or go into mock mode; see `Transport.start`."""
        try:
            await self._kafka.start()
        except BrokerUnavailableError as error:
            await self._enter_mock_mode(error)

    async def send(
        self, topic: str, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> Delivery:
        """Send, or log; see `Transport.send`. A broker that vanishes starts mock mode."""
        if self._mock is None or self._closed:
            try:
                return await self._kafka.send(topic, value, key=key, headers=headers)
            except (RecordRefusedError, SendOutcomeUnknownError):
                raise  # the broker is there; or the record may have arrived, and is not only logged
            except BrokerUnavailableError as error:
                await self._enter_mock_mode(error)
        return await self._current.send(topic, value, key=key, headers=headers)

    async def subscribe(
        self,
        topics: Collection[str],
        on_record: OnRecord,
        *,
        start: From | None = None,
        group_id: str | None = None,
    ) -> "AutoSubscription":
        """Read topics, now or once the broker is there; see `Transport.subscribe`."""
        inner = await self._kafka.subscribe(topics, on_record, start=start, group_id=group_id)
        return AutoSubscription(self, inner)

    async def ensure_topics(self, topics: Collection[TopicSpec]) -> None:
        """See `Transport.ensure_topics`; in mock mode, they are made when the broker is there."""
        if self._mock is not None:
            self._owed.update((topic.name, topic) for topic in topics)
        await self._current.ensure_topics(topics)

    async def describe_topics(self, names: Collection[str]) -> dict[str, TopicState]:
        """See `Transport.describe_topics`; none in mock mode."""
        return await self._current.describe_topics(names)

    async def close(self) -> None:
        """See `Transport.close`."""
        self._closed = True
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait({self._probing})
        await self._kafka.close()

    async def in_mock_mode(self) -> None:
        """Wait until mock mode is on."""
        await self._mocked.wait()

    @property
    def _current(self) -> Transport:
        return self._mock or self._kafka

    async def _enter_mock_mode(self, error: BrokerUnavailableError) -> None:
        if self._closed:
            raise error
        if self._mock is not None:
            return
        self._mock = MockTransport(f"Kafka at {self._address} is unavailable: {error}")
        self._mocked.set()
        await self._mock.start()
        self._probing = asyncio.create_task(self._probe(), name="peerctx-probe")

    async def _probe(self) -> None:
        while self._mock is not None:
            await self._pause(PROBE_SECONDS)
            try:
                await self._kafka.start()
                await self._make_what_is_owed()
            except PeerContextError as error:
                _logger.info("still in mock mode: %s", error)
            except Exception:  # a service loop logs and goes on
                _logger.exception("still in mock mode")
            else:
                self._mock = None
                self._mocked.clear()
                _logger.warning("Kafka at %s is there again: mock mode is left", self._address)

    async def _make_what_is_owed(self) -> None:
        try:
            await self._kafka.ensure_topics(list(self._owed.values()))
        except BrokerUnavailableError as error:  # we may not: they may be there all the same
            _logger.warning("the topics are not ready: %s", error)
        else:
            self._owed.clear()


class AutoSubscription:
    """A subscription that is Kafka's, and says so when it is in vain."""

    def __init__(self, transport: AutoTransport, inner: Subscription) -> None:
        self._transport = transport
        self._inner = inner

    @property
    def offsets(self) -> Offsets:
        """See `Subscription.offsets`."""
        return self._inner.offsets

    @property
    def lost(self) -> str | None:
        """See `Subscription.lost`."""
        reasons = self._transport.degraded
        return reasons[0] if reasons else self._inner.lost

    async def positioned(self) -> None:
        """See `Subscription.positioned`."""
        waits = [
            asyncio.ensure_future(self._inner.positioned()),
            asyncio.ensure_future(self._transport.in_mock_mode()),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)

    async def close(self) -> None:
        """See `Subscription.close`."""
        await self._inner.close()
