"""A reading that heals itself."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from langgraph_peerctx.errors import BrokerUnavailableError, PeerContextError
from langgraph_peerctx.messaging.client_ending import CLOSE_TIMEOUT_SECONDS, shielded
from langgraph_peerctx.messaging.transport import Offsets, OnRecord, Record

_logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
STALE_AFTER_SECONDS = 3.0
"""A fetch is answered at least every half second; six missed answers are an outage.

Where the connect deadline is longer, links are slow, and it counts instead.
"""
RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0)
TRIES_TO_READ_A_RECORD = 3
"""A record that cannot be read so often is passed by; else it would stop its reader for ever."""


class Reader(Protocol):
    """How a consumer is positioned, and what shows that its fetches are answered."""

    joining_seconds: float
    """How long positioning may take beside the connect deadline."""
    offsets: dict[tuple[str, int], int]
    """The next record to read in each partition."""
    ends: dict[tuple[str, int], int]
    """Where each partition ended when it was positioned."""

    async def position(self, consumer: Any) -> None:
        """Assign and seek."""
        ...

    async def handed_over(self, consumer: Any) -> None:
        """Be told that everything fetched so far was handed over."""
        ...

    def answers(self, consumer: Any) -> object:
        """Return something that changes with each answered fetch."""
        ...


class KafkaSubscription:
    """A reading that heals itself: when fetches are no longer answered, its client is rebuilt.

    The age of the last answered fetch is the health signal: aiokafka says nothing of a broker
    that went away, came back, or deleted the topic, but each answer moves
    `last_poll_timestamp`.
    """

    def __init__(
        self,
        reader: Reader,
        make_consumer: Callable[[], Awaitable[Any]],
        end_consumer: Callable[[Any], Awaitable[None]],
        on_record: OnRecord,
        forget: Callable[["KafkaSubscription"], None],
        *,
        connect_seconds: float,
        client_errors: type[Exception],
        record_errors: tuple[type[Exception], ...],
    ) -> None:
        self._stale_seconds = max(STALE_AFTER_SECONDS, connect_seconds)
        self._expected = (PeerContextError, client_errors, OSError, TimeoutError)
        self._client_errors = client_errors
        self._record_errors = record_errors
        self._failures: dict[tuple[str, int], tuple[int, int]] = {}  # by place: offset, how often
        self._position_seconds = 3 * connect_seconds + reader.joining_seconds
        self._reader = reader
        self._make_consumer = make_consumer
        self._end_consumer = end_consumer
        self._on_record = on_record
        self._forget = forget
        self._stopping = asyncio.Event()
        self._positioned = asyncio.Event()
        self._lost: str | None = "not connected yet"
        self.task: asyncio.Task[None] = asyncio.create_task(
            self._read(), name="peerctx-subscription"
        )

    @property
    def offsets(self) -> Offsets:
        """See `Subscription.offsets`."""
        return dict(self._reader.offsets)

    @property
    def lost(self) -> str | None:
        """See `Subscription.lost`."""
        return self._lost

    async def positioned(self) -> None:
        """See `Subscription.positioned`."""
        await self._positioned.wait()

    def stop_reading(self) -> None:
        """Ask the reading to end; `close` waits for it."""
        self._stopping.set()

    async def close(self) -> None:
        """See `Subscription.close`."""
        self.stop_reading()
        self._forget(self)
        await asyncio.wait({self.task}, timeout=CLOSE_TIMEOUT_SECONDS + 1)

    async def _read(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                await self._read_until_it_fails()
                failures = 0
            except self._expected as error:
                if self._lost is None:
                    failures = 0
                self._lost = str(error) or type(error).__name__
                _logger.info("reading was interrupted, trying again: %.200s", self._lost)
            except Exception as error:  # a service loop logs and goes on
                self._lost = f"{type(error).__name__}: {error}"
                _logger.exception("reading failed, trying again")
            else:
                continue
            await _wait_for(self._stopping, RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
            failures += 1

    async def _read_until_it_fails(self) -> None:
        consumer = await self._make_consumer()
        try:
            async with asyncio.timeout(self._position_seconds):
                await self._reader.position(consumer)
            self._lost = None
            self._positioned.set()
            await self._pump(consumer)
        finally:
            await shielded(self._end_consumer(consumer))

    async def _pump(self, consumer: Any) -> None:
        answered_at, last = time.monotonic(), None
        while not self._stopping.is_set():
            # Never cancelled from outside: that would leak a waiter each time.
            try:
                batches = await consumer.getmany(timeout_ms=int(POLL_SECONDS * 1_000))
            except Exception as error:
                if not self._is_the_records(error):
                    raise
                batches = await self._past_what_is_unreadable(consumer)
            for partition, records in batches.items():
                for record in records:
                    self._hand_over(partition, record)
            if batches:
                await self._reader.handed_over(consumer)
                await asyncio.sleep(0)  # a flood must not keep the loop to itself
            now, answers = time.monotonic(), self._reader.answers(consumer)
            if batches or answers != last:
                answered_at, last = now, answers
            elif now - answered_at > self._stale_seconds:
                raise BrokerUnavailableError(
                    f"no fetch was answered for {self._stale_seconds:g} s: "
                    "the broker or the topic is gone"
                )

    def _is_the_records(self, error: Exception) -> bool:
        """Tell whether a record is at fault: its size, its checksum, or how it is compressed."""
        # What a decompressor raises is no error of the client's.
        return isinstance(error, self._record_errors) or not isinstance(error, self._client_errors)

    async def _past_what_is_unreadable(self, consumer: Any) -> dict[Any, list[Any]]:
        """Read each partition by itself; where that fails too often, pass one record by."""
        batches: dict[Any, list[Any]] = {}
        partitions = sorted(consumer.assignment())
        for partition in partitions:  # what the others had brought went with the failure
            if (offset := self._reader.offsets.get(tuple(partition))) is not None:
                consumer.seek(partition, offset)
        for partition in partitions:
            try:
                batches |= await consumer.getmany(partition, timeout_ms=int(POLL_SECONDS * 1_000))
            except Exception as error:
                if not self._is_the_records(error):
                    raise
                await self._count_failure(consumer, partition, error)
        return batches

    async def _count_failure(self, consumer: Any, partition: Any, error: Exception) -> None:
        topic, number = place = tuple(partition)
        offset = self._reader.offsets.get(place)
        if offset is None:
            offset = await consumer.position(partition)
        failed_at, failures = self._failures.get(place, (offset, 0))
        failures = failures + 1 if failed_at == offset else 1
        self._failures[place] = offset, failures
        if failures == TRIES_TO_READ_A_RECORD:
            _logger.warning("record %d of %s cannot be read, and is left: %r", offset, topic, error)
            self._give(Record(topic=topic, value=None, partition=number, offset=offset))
            consumer.seek(partition, offset + 1)

    def _hand_over(self, partition: Any, record: Any) -> None:
        self._give(
            Record(
                topic=record.topic,
                value=record.value,
                headers=tuple(record.headers),
                key=record.key,
                partition=record.partition,
                offset=record.offset,
                timestamp_ms=record.timestamp,
                was_there=record.offset < self._reader.ends.get(tuple(partition), 0),
            )
        )

    def _give(self, record: Record) -> None:
        self._reader.offsets[record.topic, record.partition] = record.offset + 1
        try:
            self._on_record(record)
        except Exception:  # a service loop logs and goes on to the next record
            _logger.exception("a record on %s could not be taken", record.topic)


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiting}, timeout=seconds)
    finally:
        waiting.cancel()
