"""One standing reading of the response topic a process; answers go to the gather that waits.

It is positioned once, when it starts: a look-up behind a waiting fetch costs hundreds of
milliseconds, and a reader that positions itself after the request left misses fast peers. The
topic is shared by all processes of one requester id, so most of what comes may be for others: the
correlation id in the header decides, before anything is parsed.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from langgraph_peerctx.errors import ConfigurationError, ProtocolError
from langgraph_peerctx.messaging.transport import From, Offsets, Record, Subscription, Transport
from langgraph_peerctx.protocol.codec import decode
from langgraph_peerctx.protocol.messages import ContextRequest, ContextResponse
from langgraph_peerctx.tracing import valid_traceparent

_logger = logging.getLogger(__name__)

REMEMBERED_CORRELATIONS = 1_000
"""How many ended gathers are remembered, so that late answers are counted as such."""


@dataclass(slots=True, kw_only=True)
class Slot:
    """What one waiting gather has got so far.

    Attributes:
        request: The question.
        responses: Responder id and incarnation -> its first answer.
        responders: Who has answered.
        size_bytes: Bytes of the answers that were taken.
        duplicate: Answers of a responder that had answered.
        contradicted: Responders whose second answer was another one.
        dropped: Answers that were not taken because of a limit.
        rejected: Records under this correlation id that are no valid answer, by fault.
        came_at: When each of `responses` was read, by our clock.
        traceparents: The trace contexts that they carried, as they came.
    """

    request: ContextRequest
    max_responders: int
    max_total_bytes: int
    on_response: Callable[[ContextResponse], None]
    responses: dict[tuple[str, str], ContextResponse] = field(default_factory=dict)
    responders: set[str] = field(default_factory=set)
    size_bytes: int = 0
    duplicate: int = 0
    contradicted: set[str] = field(default_factory=set)
    dropped: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    came_at: dict[tuple[str, str], datetime] = field(default_factory=dict)
    traceparents: list[str] = field(default_factory=list)


class ReplyInbox:
    """Answers in, to whom they belong.

    Args:
        transport: Borrowed, started.
        topic: The response topic.
        max_message_bytes: Larger records are refused unread.
    """

    def __init__(self, transport: Transport, topic: str, *, max_message_bytes: int) -> None:
        self._transport = transport
        self._topic = topic
        self._max_message_bytes = max_message_bytes
        self._subscription: Subscription | None = None
        self._slots: dict[str, Slot] = {}
        self._ended: OrderedDict[str, int] = OrderedDict()
        self.counters: Counter[str] = Counter()

    async def start(self, *, timeout_seconds: float, since: Offsets | None = None) -> None:
        """Read from the topic's end on; returns once positioned, or when the time is up.

        Not being positioned in time is no error: `lost` says why, and the reading goes on trying.

        Args:
            timeout_seconds: The longest wait for that.
            since: Where to begin instead of at the end; a partition that is not named: its end.
        """
        self._subscription = await self._transport.subscribe(
            [self._topic], self.take, start=From(offsets=since or {})
        )
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._subscription.positioned()
        except TimeoutError:
            _logger.warning("the reply topic %s cannot be read yet: %s", self._topic, self.lost)

    async def close(self) -> None:
        """Stop reading. Safe to call twice."""
        if self._subscription is not None:
            await self._subscription.close()

    @property
    def lost(self) -> str | None:
        """Why no answer can arrive now, or None."""
        return "not started" if self._subscription is None else self._subscription.lost

    async def positioned(self) -> None:
        """Wait until whatever is answered from now on will be read; the caller has a deadline."""
        if self._subscription is not None:
            await self._subscription.positioned()

    @property
    def offsets(self) -> Offsets:
        """The next record to read in each partition: what a later reader would start from."""
        return {} if self._subscription is None else self._subscription.offsets

    @contextmanager
    def expect(
        self,
        request: ContextRequest,
        on_response: Callable[[ContextResponse], None],
        *,
        max_responders: int = 256,
        max_total_bytes: int = 8_388_608,
    ) -> Iterator[Slot]:
        """Take answers to a question for as long as the block lasts.

        `on_response` is called with each responder's first answer, on the loop.

        Raises:
            ConfigurationError: If somebody waits for answers under its correlation id already.
        """
        correlation_id = request.correlation_id
        if correlation_id in self._slots:
            raise ConfigurationError(
                f"answers to {correlation_id!r:.80} are waited for already: take a fresh id"
            )
        slot = Slot(
            request=request,
            max_responders=max_responders,
            max_total_bytes=max_total_bytes,
            on_response=on_response,
        )
        self._slots[correlation_id] = slot
        try:
            yield slot
        finally:
            del self._slots[correlation_id]
            self._ended[correlation_id] = 0
            while len(self._ended) > REMEMBERED_CORRELATIONS:
                self._ended.popitem(last=False)

    def late(self, correlation_id: str) -> int:
        """Return how many answers came after the end of a gather, as far as it is remembered."""
        return self._ended.get(correlation_id, 0)

    def take(self, record: Record) -> None:
        """Take one record of the response topic: never raises, never waits."""
        correlation_id = record.header("correlation_id")
        if correlation_id is None:
            self._take_without_header(record)
            return
        slot = self._slots.get(correlation_id)
        if slot is None:
            self._count_orphan(correlation_id)
        else:
            self._read_into(slot, record)

    def _take_without_header(self, record: Record) -> None:
        """Others may not know our headers: parse, within the limits, while somebody waits."""
        if not self._slots:
            self.counters["unexpected"] += 1
            return
        response = self._decode(record, self.counters)
        if response is None:
            return
        slot = self._slots.get(response.correlation_id)
        if slot is None:
            self._count_orphan(response.correlation_id)
        else:
            self._accept(slot, response, record)

    def _count_orphan(self, correlation_id: str) -> None:
        if correlation_id in self._ended:
            self._ended[correlation_id] += 1
            self.counters["late"] += 1
        else:
            self.counters["unexpected"] += 1

    def _read_into(self, slot: Slot, record: Record) -> None:
        sender, size = record.header("sender"), len(record.value or b"")
        if sender not in slot.responders and not self._has_room(slot, size):
            slot.dropped += 1
            return
        # A responder that floods costs so many parses and no more.
        if sender in slot.responders and slot.duplicate >= slot.max_responders:
            slot.duplicate += 1
            return
        response = self._decode(record, slot.rejected)
        if response is not None:
            self._accept(slot, response, record)

    def _accept(self, slot: Slot, response: ContextResponse, record: Record) -> None:
        size = len(record.value or b"")
        if fault := _misfit(slot.request, response):
            slot.rejected[fault] += 1
            return
        # Two processes of one name, or one before and after a restart, are two that answer.
        responder = response.responder_id, response.incarnation or ""
        known = slot.responses.get(responder)
        if known is not None:
            slot.duplicate += 1
            if known.agents != response.agents or known.in_doubt != response.in_doubt:
                slot.contradicted.add(response.responder_id)
            return
        if not self._has_room(slot, size):
            slot.dropped += 1
            return
        slot.responses[responder] = response
        slot.came_at[responder] = datetime.now(UTC)
        traceparent = valid_traceparent(record.header("traceparent"))
        if traceparent is not None:
            slot.traceparents.append(traceparent)
        slot.responders.add(response.responder_id)
        slot.size_bytes += size
        slot.on_response(response)

    @staticmethod
    def _has_room(slot: Slot, size: int) -> bool:
        return (
            len(slot.responses) < slot.max_responders
            and slot.size_bytes + size <= slot.max_total_bytes
        )

    def _decode(self, record: Record, rejected: Counter[str]) -> ContextResponse | None:
        try:
            message = decode(record.value, max_bytes=self._max_message_bytes)
        except ProtocolError as error:
            rejected[error.fault] += 1
            return None
        if isinstance(message, ContextResponse):
            return message
        rejected["message_type"] += 1
        return None


def _misfit(request: ContextRequest, response: ContextResponse) -> str | None:
    """Say in what an answer does not fit the question; None if it does."""
    if response.correlation_id != request.correlation_id:
        return "correlation"
    about = response.failed_agent_id, response.thread_id
    return "question" if about != (request.failed_agent_id, request.thread_id) else None
