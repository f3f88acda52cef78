"""A broker in memory, and a transport on it: what Kafka promises, at once and in order."""

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from langgraph_peerctx.errors import UnknownTopicError
from langgraph_peerctx.messaging.transport import (
    Delivery,
    From,
    Headers,
    Offsets,
    OnRecord,
    Record,
    TopicSpec,
    TopicState,
)


@dataclass
class FakeBroker:
    """Topics of one partition; `now_ms` is the broker's clock."""

    topics: dict[str, list[Record]] = field(default_factory=dict)
    readers: "list[FakeSubscription]" = field(default_factory=list)
    now_ms: Callable[[], int] = lambda: int(time.time() * 1_000)

    def store(self, topic: str, value: bytes | None, headers: Headers = ()) -> Record:
        """Store a record and hand it to every reader of the topic."""
        records = self.topics[topic]
        record = Record(
            topic=topic,
            value=value,
            headers=headers,
            offset=len(records),
            timestamp_ms=self.now_ms(),
        )
        records.append(record)
        for reader in list(self.readers):
            reader.wake(topic)
        return record


class FakeTransport:
    """A `Transport` on a `FakeBroker`, with faults that a test can switch on.

    `send_fault` is raised by the next sends; `silent` keeps sends pending for ever.
    """

    def __init__(self, broker: FakeBroker) -> None:
        self.broker = broker
        self.reasons: tuple[str, ...] = ()
        self.send_fault: Exception | None = None
        self.silent = False
        self.started = self.closed = 0

    @property
    def degraded(self) -> tuple[str, ...]:
        return self.reasons

    async def start(self) -> None:
        self.started += 1

    async def send(
        self, topic: str, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> Delivery:
        del key
        if self.silent:
            await asyncio.Event().wait()
        if self.send_fault is not None:
            raise self.send_fault
        if topic not in self.broker.topics:
            raise UnknownTopicError(f"there is no topic {topic}")
        self.broker.store(topic, value, headers)
        return "acknowledged"

    async def subscribe(
        self,
        topics: Collection[str],
        on_record: OnRecord,
        *,
        start: From | None = None,
        group_id: str | None = None,
    ) -> "FakeSubscription":
        del group_id
        return FakeSubscription(self.broker, topics, on_record, start or From())

    async def ensure_topics(self, topics: Collection[TopicSpec]) -> None:
        for topic in topics:
            self.broker.topics.setdefault(topic.name, [])

    async def describe_topics(self, names: Collection[str]) -> dict[str, TopicState]:
        return {
            name: TopicState(name=name, partitions=int(name in self.broker.topics))
            for name in names
        }

    async def close(self) -> None:
        self.closed += 1


class FakeSubscription:
    """Hands records over one loop turn after they are stored, as a fetch would."""

    def __init__(
        self, broker: FakeBroker, topics: Collection[str], on_record: OnRecord, start: From
    ) -> None:
        self._broker = broker
        self._on_record = on_record
        self._loop = asyncio.get_running_loop()
        self.lost: str | None = None
        self._next = {
            (topic, 0): start.offsets.get(
                (topic, 0), max(0, len(broker.topics.get(topic, [])) - start.back)
            )
            for topic in topics
        }
        self._there = {topic: len(broker.topics.get(topic, [])) for topic in topics}
        broker.readers.append(self)
        for topic in topics:
            self.wake(topic)

    @property
    def offsets(self) -> Offsets:
        return dict(self._next)

    def wake(self, topic: str) -> None:
        if (topic, 0) in self._next:
            self._loop.call_soon(self._read, topic)

    async def positioned(self) -> None:
        return

    async def close(self) -> None:
        if self in self._broker.readers:
            self._broker.readers.remove(self)

    def _read(self, topic: str) -> None:
        if self not in self._broker.readers:
            return
        records = self._broker.topics.get(topic, [])
        while self._next[topic, 0] < len(records):
            record = records[self._next[topic, 0]]
            self._next[topic, 0] += 1
            self._on_record(replace(record, was_there=record.offset < self._there[topic]))
