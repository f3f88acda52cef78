"""Who is there, by the heartbeats on the presence topic.

Order is the broker's: whatever stands later in the topic is later. Peers' clocks are never read.
Silence counts only while our own heartbeat comes back: if it does not, it is we who are cut off.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from langgraph_peerctx.errors import ProtocolError
from langgraph_peerctx.messaging.phi import THRESHOLD, Arrivals
from langgraph_peerctx.messaging.transport import Record
from langgraph_peerctx.protocol.codec import decode
from langgraph_peerctx.protocol.messages import DeathNotice, Heartbeat

_logger = logging.getLogger(__name__)

MAX_MEMBERS = 10_000
MAX_NOTICES = 1_000
"""About lives that were never heard; the oldest are dropped."""


@dataclass(slots=True, kw_only=True)
class Member:
    """One life of a process, as its last heartbeat told it.

    Attributes:
        beat: That heartbeat.
        arrivals: When its heartbeats came, by our clock.
        at_ms: When the last one came, by the broker's clock.
        has_left: Whether it said so.
        died_at: When a sentinel's word came that it ended without leaving, by our clock.
        died_ms: The same by the broker's clock.
    """

    beat: Heartbeat
    arrivals: Arrivals
    at_ms: int
    has_left: bool = False
    died_at: float | None = None
    died_ms: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """Process id and incarnation."""
        return self.beat.process_id, self.beat.incarnation

    def phi(self, now: float) -> float:
        """Return how suspicious its silence is; see `Arrivals`."""
        return self.arrivals.phi(now)

    @property
    def is_gone(self) -> bool:
        """Whether it is known to be: it said that it leaves, or a sentinel that it died."""
        return self.has_left or self.died_at is not None

    def is_present(self, now: float) -> bool:
        """Whether it beats, as far as anybody can tell."""
        return not self.is_gone and self.phi(now) < THRESHOLD


@dataclass(frozen=True, slots=True, kw_only=True)
class _Notice:
    """That a life ended of which no heartbeat was taken.

    Attributes:
        at: When the word came, by our clock.
        at_ms: The same by the broker's clock.
    """

    at: float
    at_ms: int


@dataclass(slots=True, kw_only=True)
class Roster:
    """Everybody whose heartbeats are heard.

    Attributes:
        incarnation: Our own; its heartbeats are how we know that we hear.
        interval_seconds: How often processes beat.
        pause_seconds: How long a beat may stay away before anybody thinks ill of it.
        clock: Seconds that only rise.
        counters: What was not taken, by reason: `rejected.<fault>`, `stale`, `false_notice`,
            `overrun`.
        on_notice: Is told of whoever was just said to have died, by process id and incarnation: it
            may be nobody's whom we ever heard. It must not raise, nor block.
        on_leave: Is told of whoever just left; must not raise, nor block.
    """

    incarnation: str
    interval_seconds: float
    pause_seconds: float
    clock: Callable[[], float] = time.monotonic
    counters: Counter[str] = field(default_factory=Counter)
    on_notice: Callable[[tuple[str, str]], None] | None = None
    on_leave: Callable[[Member], None] | None = None
    _members: dict[tuple[str, str], Member] = field(default_factory=dict)
    _notices: dict[tuple[str, str], _Notice] = field(default_factory=dict)
    _heard_at: float | None = None
    _hearing_since: float | None = None
    _caught_up: bool = False

    @property
    def is_warm(self) -> bool:
        """Whether it is known to be complete.

        So it is once our own heartbeat has come back and a pause has passed, in which everybody
        alive has been heard; and only as long as our own comes back.
        """
        now = self.clock()
        return (
            self._hearing_since is not None
            and self._is_hearing(now)
            and now - self._hearing_since >= self.pause_seconds
        )

    @property
    def is_hearing(self) -> bool:
        """Whether our own heartbeat came back lately; nobody's silence means anything without."""
        return self._is_hearing(self.clock())

    @property
    def heard_at(self) -> float | None:
        """When our own heartbeat came back last: until then we know that we heard."""
        return self._heard_at

    @property
    def members(self) -> tuple[Member, ...]:
        """Everybody who was heard and is not forgotten yet, sorted by process and incarnation."""
        return tuple(self._members[key] for key in sorted(self._members))

    def member(self, key: tuple[str, str]) -> Member | None:
        """Return one life of a process, by process id and incarnation; None if it is unknown."""
        return self._members.get(key)

    def dead(self) -> tuple[str, ...]:
        """Return the incarnations whose death notice stands, in no order; heard or never heard."""
        dead = [key for key, member in self._members.items() if member.died_at is not None]
        return tuple(incarnation for _, incarnation in (*dead, *self._notices))

    def died_at(self, key: tuple[str, str]) -> float | None:
        """Return when word came that one life ended, by our clock; None if no notice stands."""
        member, notice = self._members.get(key), self._notices.get(key)
        if member is not None:
            return member.died_at
        return None if notice is None else notice.at

    def present(self) -> tuple[Member, ...]:
        """Return those who beat; while we do not hear any more, also those who did until then."""
        now = self.clock()
        deaf = self._heard_at is not None and not self._is_hearing(now)
        return tuple(m for m in self.members if m.is_present(now) or (deaf and not m.is_gone))

    def is_present(self, key: tuple[str, str]) -> bool:
        """Tell whether one life of a process is there, as far as we can hear."""
        member, now = self._members.get(key), self.clock()
        if member is None or member.is_gone:
            return False
        return not self._is_hearing(now) or member.is_present(now)

    def take(self, record: Record) -> None:
        """Take one record of the presence topic: never raises, never waits."""
        try:
            message = decode(record.value)
        except ProtocolError as error:
            self.counters[f"rejected.{error.fault}"] += 1
            return
        if isinstance(message, Heartbeat):
            self._take_beat(message, record)
        elif isinstance(message, DeathNotice):
            self._take_notice(message, record)
        else:
            self.counters["rejected.message_type"] += 1

    def _take_beat(self, beat: Heartbeat, record: Record) -> None:
        now = self.clock()
        key = beat.process_id, beat.incarnation
        member = self._members.get(key)
        if member is not None and beat.sequence <= member.beat.sequence:
            self.counters["stale"] += 1
            return
        if not self._is_alive(key, record):
            return
        if member is None:
            if len(self._members) >= MAX_MEMBERS:
                self.counters["overrun"] += 1
                return
            arrivals = Arrivals(
                interval_seconds=self.interval_seconds, pause_seconds=self.pause_seconds
            )
            member = Member(beat=beat, arrivals=arrivals, at_ms=record.timestamp_ms)
            self._members[key] = member
        leaves = beat.leaving and not member.has_left
        member.beat, member.at_ms, member.has_left = beat, record.timestamp_ms, beat.leaving
        if record.was_there:
            member.arrivals.count_from(now)
        else:
            member.arrivals.beat(now)
        if not record.was_there and not self._caught_up:
            self._caught_up = True
            self._date_what_was_there(record.timestamp_ms, now)
        if beat.incarnation == self.incarnation:
            self._hear_ourselves(now)
        if leaves and self.on_leave is not None:
            self.on_leave(member)

    def _is_alive(self, key: tuple[str, str], record: Record) -> bool:
        """Tell whether a beat is of a living process; much later, it proves its notice false."""
        member, notice = self._members.get(key), self._notices.get(key)
        if member is not None and member.died_at is not None:
            died_ms = member.died_ms
        elif notice is not None:
            died_ms = notice.at_ms
        else:
            return True
        if (record.timestamp_ms - died_ms) / 1_000 <= self.interval_seconds:
            self.counters["stale"] += 1  # its last, on the way when it died
            return False
        self.counters["false_notice"] += 1
        _logger.warning("%s was said to be dead, and is not", key[0])
        self._notices.pop(key, None)
        if member is not None:
            member.died_at = None
        return True

    def _take_notice(self, notice: DeathNotice, record: Record) -> None:
        key, now = (notice.process_id, notice.incarnation), self.clock()
        member, is_news = self._members.get(key), self.died_at(key) is None
        if member is None:
            # It may have died before it could beat, or before what we read of the topic.
            self._keep(key, _Notice(at=now, at_ms=record.timestamp_ms))
        elif member.has_left:
            return
        else:
            member.died_at, member.died_ms = now, record.timestamp_ms
        if is_news and self.on_notice is not None:
            self.on_notice(key)

    def _keep(self, key: tuple[str, str], notice: _Notice) -> None:
        self._notices.pop(key, None)  # said again, it is the newest
        self._notices[key] = notice
        if len(self._notices) > MAX_NOTICES:
            del self._notices[next(iter(self._notices))]

    def _date_what_was_there(self, now_ms: int, now: float) -> None:
        """Say how long ago what we had found was stored: by the broker's clock, on both ends."""
        for member in self._members.values():
            member.arrivals.count_from(now - max(0.0, (now_ms - member.at_ms) / 1_000))

    def _hear_ourselves(self, now: float) -> None:
        if not self._is_hearing(now):
            # We could not hear until now: everybody's silence is ours.
            if self._heard_at is not None:
                for member in self._members.values():
                    member.arrivals.count_from(now)
            self._hearing_since = now
        self._heard_at = now
        self._forget_the_gone(now)

    def _is_hearing(self, now: float) -> bool:
        longest = self.pause_seconds + self.interval_seconds
        return self._heard_at is not None and now - self._heard_at <= longest

    def _forget_the_gone(self, now: float) -> None:
        """Drop those of whom nothing was heard for long; their threads are in the database.

        A notice about a life that was never heard is kept as long as a silent member is.
        """
        longest = 20 * (self.pause_seconds + self.interval_seconds)
        for key, member in list(self._members.items()):
            if member.arrivals.last is not None and now - member.arrivals.last > longest:
                del self._members[key]
        for key, notice in list(self._notices.items()):
            if now - notice.at > longest:
                del self._notices[key]
