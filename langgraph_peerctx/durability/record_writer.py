"""Facts on their way into an event store: a bounded queue, and one thread that empties it."""

import atexit
import logging
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from langgraph_peerctx.errors import PeerContextError, ProtocolError, StoreBusyError, StoreError
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.protocol.messages import Interaction

_logger = logging.getLogger(__name__)

SAID_AGAIN_SECONDS = 10.0
"""So long a failing store is not complained about again."""
RETRY_SECONDS = 1.0
"""Where nothing asks for it, a failed write is tried again after so long."""
IDLE_SECONDS = 5.0
"""A thread with nothing to do ends after so long; the next fact starts another."""
MOST_AT_ONCE = 1_000
"""Facts in one transaction."""
FACT_BYTES = 400
"""What a fact takes beside its payload."""
CLOSING_SECONDS = 2.0


@dataclass(slots=True, eq=False)
class Source:
    """The run that facts come from, as far as the writer needs to know it.

    Attributes:
        run_id: Its id.
        thread_id: Its thread.
        is_overflow_said: Whether it was said that something of it was dropped.
    """

    run_id: str
    thread_id: str
    is_overflow_said: bool = False


@dataclass(slots=True, eq=False, kw_only=True)
class Fact:
    """Something that happened, before it is an `Interaction`.

    Attributes:
        source: In which run.
        place: Where in the run, and at which attempt.
        kind: What it was.
        number: Which of several of its kind there; 0 if there can be but one.
        from_agent: Who acted.
        to_agent: On whom.
        payload: Copies of what is to be stored.
        is_whole: Whether the copies are everything.
        size_bytes: About how large they are.
        may_be_dropped: Whether it is the first to go where there is no room.
        interaction: What is stored, once it is made.
    """

    source: Source
    place: Any
    kind: str
    number: int = 0
    from_agent: str
    to_agent: str
    payload: dict[str, Any]
    is_whole: bool = True
    size_bytes: int = 0
    may_be_dropped: bool = False
    occurred_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    interaction: Interaction | None = None


@dataclass(slots=True, eq=False)
class _Entry:
    """A fact that becomes a memory of one agent."""

    fact: Fact
    agent_id: str
    number: int

    @property
    def size_bytes(self) -> int:
        return self.fact.size_bytes + FACT_BYTES


class RecordWriter:
    """Writes facts into a store from a thread of its own. Safe to use from any thread.

    A forked child begins with an empty queue: what is in it is its parent's to write.

    Args:
        store: Returns the store; called before each write.
        render: Makes a fact an interaction; may ask the store.
        counters: Counts `stored`, `dropped`, `unstorable` and `failed_writes`.
        batch_seconds: How long facts wait for others.
        max_facts: More than so many do not wait.
        max_bytes: Neither do larger ones together.
    """

    def __init__(
        self,
        store: Callable[[], EventStore],
        render: Callable[[EventStore, Fact], Interaction],
        *,
        counters: Counter[str],
        batch_seconds: float,
        max_facts: int,
        max_bytes: int,
    ) -> None:
        self._store = store
        self._render = render
        self._counters = counters
        self._batch_seconds = batch_seconds
        self._max_facts = max_facts
        self._max_bytes = max_bytes
        self._said_at: float | None = None
        self.begin_anew()
        _WRITERS.add(self)

    def begin_anew(self) -> None:
        """Forget everything, as a forked child must: no thread of its parent's lives on in it."""
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[_Entry] = deque()
        self._bytes = 0
        self._droppable = 0
        self._thread: threading.Thread | None = None
        self._hurried = self._closing = False
        self._last = self._settled = 0
        self._failures = 0
        self.error: PeerContextError | None = None

    def put(self, fact: Fact, agents: Iterable[str]) -> None:
        """Have a fact remembered by these agents; waits for nothing."""
        with self._changed:
            is_first = not self._queue
            for agent_id in agents:
                self._last += 1
                self._append(_Entry(fact, agent_id, self._last))
            self._start()
            if is_first:  # or else the thread knows already
                self._changed.notify_all()

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until what was put before is stored; return whether it is.

        It gives up as soon as a write has failed.
        """
        with self._changed:
            last, failures = self._last, self._failures
            if self._settled >= last:
                return True
            self._hurried = True
            self._start()
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._settled >= last or self._failures > failures, timeout_seconds
            )
            return self._settled >= last

    def raise_fault(self) -> None:
        """Raise why the last flush did not store everything.

        Raises:
            StoreError: If the store failed, or did not answer in time.
        """
        raise self.error or StoreBusyError("the event store did not answer in time: try again")

    def close(self, timeout_seconds: float = CLOSING_SECONDS) -> bool:
        """Store what is left, as far as the store takes it; return whether it did.

        The thread ends; what is put afterwards starts another. Safe to call twice.
        """
        is_stored = self.flush(timeout_seconds)
        with self._changed:
            thread, self._closing = self._thread, self._thread is not None
            self._changed.notify_all()
            left = len(self._queue)
        if thread is not None:
            thread.join(timeout_seconds)
        if not is_stored:
            _logger.warning("closed with %d events that are not stored", left)
        return is_stored

    def _start(self) -> None:
        """See that the thread runs; it may have died of what a hook or a log handler raised."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(target=self._serve, name="peerctx-recorder", daemon=True)
        self._thread.start()

    def _append(self, entry: _Entry) -> None:
        self._queue.append(entry)
        self._bytes += entry.size_bytes
        self._droppable += entry.fact.may_be_dropped
        self._make_room()

    def _make_room(self) -> None:
        while len(self._queue) > self._max_facts or self._bytes > self._max_bytes:
            entry = self._taken_out()
            self._bytes -= entry.size_bytes
            self._droppable -= entry.fact.may_be_dropped
            self._counters["dropped"] += 1
            source = entry.fact.source
            if not source.is_overflow_said:
                source.is_overflow_said = True
                _logger.warning(
                    "events of run %.200r are dropped: they come faster than they are stored",
                    source.run_id,
                )

    def _taken_out(self) -> _Entry:
        if self._droppable:
            for place, entry in enumerate(self._queue):
                if entry.fact.may_be_dropped:
                    del self._queue[place]
                    return entry
        return self._queue.popleft()

    def _serve(self) -> None:
        while (batch := self._next()) is not None:
            error = None
            try:
                error = self._written(batch)
            except Exception as unexpected:  # a service loop goes on, and says so
                # Its text may hold what nobody has redacted.
                error = StoreError(f"an unexpected {type(unexpected).__name__}")
                _logger.debug("events are not recorded", exc_info=True)
            self._settle(batch, error)

    def _next(self) -> list[_Entry] | None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._queue or self._closing, IDLE_SECONDS) or (
                self._closing and (not self._queue or self.error is not None)
            ):
                self._thread, self._closing = None, False
                return None
            pause = self._batch_seconds if self.error is None else RETRY_SECONDS
            self._changed.wait_for(lambda: self._hurried or self._closing, pause)
            self._hurried = False
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), MOST_AT_ONCE))]
            self._bytes -= sum(entry.size_bytes for entry in batch)
            self._droppable -= sum(entry.fact.may_be_dropped for entry in batch)
            return batch

    def _settle(self, batch: list[_Entry], error: PeerContextError | None) -> None:
        """Take note of what was written: whatever is left in `batch` was not."""
        with self._changed:
            self.error = error
            if error is not None:
                self._counters["failed_writes"] += 1
                self._failures += 1
                self._queue.extendleft(reversed(batch))
                self._bytes += sum(entry.size_bytes for entry in batch)
                self._droppable += sum(entry.fact.may_be_dropped for entry in batch)
                self._make_room()
            self._settled = self._queue[0].number - 1 if self._queue else self._last
            self._hurried = self._hurried or (error is None and bool(self._queue))
            self._changed.notify_all()
        if error is not None:
            self._complain(error)

    def _written(self, batch: list[_Entry]) -> PeerContextError | None:
        """Write a batch and take out of it what is settled; return what kept it from more."""
        try:
            store = self._store()
            made = [(entry, self._made(store, entry)) for entry in batch]
            for agent_id in dict.fromkeys(entry.agent_id for entry in batch):
                items = [i for entry, i in made if entry.agent_id == agent_id and i is not None]
                self._counters["stored"] += _appended(store, agent_id, items, self._counters)
                batch[:] = [entry for entry in batch if entry.agent_id != agent_id]
        except PeerContextError as error:
            return error
        return None

    def _made(self, store: EventStore, entry: _Entry) -> Interaction | None:
        fact = entry.fact
        if fact.interaction is None:
            try:
                fact.interaction = self._render(store, fact)
            except PeerContextError:  # the store's: it will be tried again
                raise
            except BaseException as error:  # noqa: BLE001 - it must keep no other out, nor end us
                self._counters["unstorable"] += 1
                _logger.warning("a %s is not recorded: %s", fact.kind, type(error).__name__)
        return fact.interaction

    def _complain(self, error: PeerContextError) -> None:
        now = time.monotonic()
        if self._said_at is None or now - self._said_at >= SAID_AGAIN_SECONDS:
            self._said_at = now
            _logger.warning("events are not recorded, and will be tried again: %s", error)


def _appended(
    store: EventStore, agent_id: str, items: list[Interaction], counters: Counter[str]
) -> int:
    try:
        store.append_many(agent_id, items)
    except ProtocolError as error:
        if len(items) == 1:
            counters["unstorable"] += 1
            _logger.warning("a %s is not recorded: %s", items[0].kind, error)
            return 0
        # All or none: one that cannot be stored must not keep the others out.
        return sum(_appended(store, agent_id, [item], counters) for item in items)
    return len(items)


_WRITERS: "weakref.WeakSet[RecordWriter]" = weakref.WeakSet()


def _begin_anew_in_a_forked_child() -> None:
    for writer in list(_WRITERS):
        writer.begin_anew()


os.register_at_fork(after_in_child=_begin_anew_in_a_forked_child)


@atexit.register  # after the event store's, and so before it
def _write_what_is_left() -> None:
    for writer in list(_WRITERS):
        writer.close()
