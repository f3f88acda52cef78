"""From silence, death notices and the control database's rows to runs that somebody should recover.

A run is lost if its lease was given back, if its owner was seen to die, or if its owner is silent
**and** its lease has expired. Silence and expiry count only while we hear ourselves and the
database answers: an outage is an outage, not a massacre.
"""

import asyncio
import logging
import time
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Literal, Protocol, Self, TypeAlias, TypeVar

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError, PeerContextError
from langgraph_peerctx.messaging.phi import THRESHOLD
from langgraph_peerctx.messaging.roster import Member, Roster
from langgraph_peerctx.persistence.runs import Holder, LostRun

_logger = logging.getLogger(__name__)

T = TypeVar("T")

Why = Literal["died", "silent", "stuck", "unrenewed", "handed_over"]
"""`unrenewed`: it beats, and no longer reaches the database."""
State = Literal["alive", "slow", "suspected", "unreachable", "stuck", "dead", "left"]
By = Literal["sentinel", "heartbeats", "rows"]
OnFailure: TypeAlias = "Callable[[AgentFailure], None]"

LOOKS = 4
"""In an interval."""
LIMIT = 1_000
"""Lost runs in one look, the earliest first; the others follow as these are recovered."""
QUEUE_SIZE = 1_000
"""Failures that wait for one reader; a sweep brings again what was dropped."""
SLOW_PHI = 1.0
"""From here on a silence is longer than nine out of ten."""

_Outage = Literal["deaf", "late", "database", "heartbeats"]
_ON_HOLD: dict[_Outage, str] = {
    "deaf": "there is no broker, so that no death can be noticed; `peerctx recover` works by hand",
    "heartbeats": "our own heartbeat does not come back: the broker is away, or we are cut off",
}
_Key: TypeAlias = tuple[str, str, int, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentFailure:
    """A run that is lost.

    Attributes:
        epoch: Under which it was lost; a recoverer's is higher.
        process_id: Whose it was; None if it was given back.
        incarnation: That life of the process.
        silent_seconds: Since its last heartbeat; None if none is known.
        last_seen_at: When that came, by our clock; None if none is known.
        known_at: When it was known: when the death notice came, or when it was noticed.
        by: What told: a sentinel's notice, heartbeats, or the rows alone.
    """

    agent_id: str
    thread_id: str
    run_id: str
    workflow: str | None
    epoch: int
    process_id: str | None
    incarnation: str | None
    why: Why
    noticed_at: datetime
    silent_seconds: float | None
    by: By
    last_seen_at: datetime | None = None
    known_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """How one life of a process is, as a row of a table.

    Attributes:
        phi: How suspicious its silence is; None if no heartbeat is known.
        last_heartbeat_seconds: How long ago it came; None if none is known.
        agents: Those it hosts and those whose leases it has, sorted.
        holds: Its leases, expired or not; None if the database does not answer.
        why: The state's reason, for people.
    """

    process_id: str
    incarnation: str
    state: State
    why: str
    phi: float | None
    last_heartbeat_seconds: float | None
    agents: tuple[str, ...]
    open_runs: int
    loop_lag_seconds: float
    supervises: bool
    sentinel_id: str | None
    holds: int | None


class Rows(Protocol):
    """What is asked of the control database; see `Runs`."""

    async def alost_runs(self, dead: Sequence[str] = (), *, limit: int = 1_000) -> list[LostRun]:
        """Return open runs whose lease is free, has expired, or is one of these incarnations'."""
        ...

    async def aholders(self) -> list[Holder]:
        """Return who has leases, expired or not."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What can be known at one moment, and by what limits it is judged.

    Attributes:
        now: That moment, by our clock.
        heard_at: Until when we are known to have heard; silence beyond it may be ours.
        hears: Whether the roster is warm.
        answers: Whether the database answered.
        deaf: Whether we are in mock mode.
        settled_seconds: How long expired leases have counted; less than zero while they do not.
    """

    now: float
    heard_at: float
    hears: bool
    answers: bool
    deaf: bool
    settled_seconds: float
    pause_seconds: float
    silence_seconds: float
    stuck_seconds: float


def judge(
    lost: LostRun, member: Member | None, view: View, *, died_at: float | None = None
) -> Why | None:
    """Tell why a run needs another owner; None if it does not, or nobody can tell yet.

    Args:
        lost: What the database says of it.
        member: Its owner, if a heartbeat of that life is known.
        view: What else is known; the database has answered.
        died_at: When a notice came of its owner's death, if one stands: it may be all that is known
            of that life.
    """
    if view.deaf:
        return None
    if lost.owner_incarnation is None:
        return "handed_over"
    if died_at is not None:
        return "died"
    # What expired in an outage counts as expired since the end of everybody's fresh start.
    expired_seconds = min(-lost.seconds_left, view.settled_seconds)
    if lost.seconds_left >= 0 or expired_seconds < 0:
        return None
    return _judge_expired(expired_seconds, member, view)


def _judge_expired(expired_seconds: float, member: Member | None, view: View) -> Why | None:
    if member is None or member.has_left or member.phi(view.heard_at) >= THRESHOLD:
        return "silent"
    if member.beat.loop_lag_seconds >= view.stuck_seconds:
        return "stuck"
    # It may be about to renew. If it cannot, the fence keeps it from harming anybody.
    return "unrenewed" if expired_seconds >= view.silence_seconds else None


def state_of(
    member: Member | None, holder: Holder | None, view: View, *, died_at: float | None = None
) -> tuple[State, str]:
    """Tell how one life of a process is, and why, for people.

    Args:
        member: What its heartbeats say; None if none is known.
        holder: Its leases; None if it has none, or the database does not answer.
        view: What else is known.
        died_at: When a notice came of its death, if one stands; see `judge`.
    """
    if view.deaf:
        return "suspected", "we are in mock mode and hear nobody"
    if member is not None and member.has_left:
        return "left", "it said so"
    if died_at is not None:
        return "dead", "its sentinel saw it end"
    if member is not None and member.phi(view.now) < THRESHOLD:
        return _state_of_beating(member, view)
    if member is not None and member.phi(view.heard_at) < THRESHOLD:
        return "suspected", "silent, but so are we"
    return _state_of_silent(holder, view)


def _state_of_beating(member: Member, view: View) -> tuple[State, str]:
    lag_seconds = member.beat.loop_lag_seconds
    if lag_seconds >= view.stuck_seconds:
        return "stuck", f"its agents' loop has not answered for {lag_seconds:.0f} s"
    if lag_seconds > view.pause_seconds:
        return "slow", f"its agents' loop has not answered for {lag_seconds:.1f} s"
    if member.phi(view.now) >= SLOW_PHI:
        return "slow", "its heartbeat is late"
    return "alive", "it beats"


def _state_of_silent(holder: Holder | None, view: View) -> tuple[State, str]:
    if not view.hears:
        return "suspected", "silent, but our own heartbeat does not come back for long enough"
    if not view.answers:
        return "suspected", "silent, but the database does not say what it holds"
    if holder is not None and holder.seconds_left >= 0:
        return "unreachable", f"silent, but it holds a lease for {holder.seconds_left:.1f} s more"
    if view.settled_seconds < 0:
        return "suspected", "silent, but after an outage everybody has time to come back"
    return "dead", "silent, and it holds no lease" + ("" if holder is None else " any more")


class Failures(AsyncIterator[AgentFailure]):
    """Failures as they are noticed, for one reader; ends with the detector.

    Attributes:
        dropped: How many were dropped because the reader was too slow.
    """

    def __init__(self, *, ended: bool) -> None:
        self.dropped: int = 0
        self._waiting: deque[AgentFailure] = deque()
        self._changed = asyncio.Event()
        self._ended = ended

    async def __anext__(self) -> AgentFailure:
        while not self._waiting:
            if self._ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._waiting.popleft()

    def put(self, failure: AgentFailure) -> bool:
        """Add one; tell whether there was room, or the oldest had to go."""
        has_room = len(self._waiting) < QUEUE_SIZE
        if not has_room:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(failure)
        self._changed.set()
        return has_room

    def end(self) -> None:
        """Let the reader have what is there, and no more."""
        self._ended = True
        self._changed.set()


class FailureDetector:
    """Looks four times an interval at who is lost, and at once when a death notice arrives.

    It belongs to one loop, that on which the roster is fed. Nothing counts by time until a lease's
    life has passed since it began.

    Args:
        roster: Borrowed; its hooks are ours while we run.
        rows: The control database; borrowed.
        settings: Interval, pause, sweep and the other times.
        is_deaf: Tells whether we are in mock mode.
        clock: Seconds that only rise; the roster's.

    Attributes:
        counters: `reported.<why>`; `held_back.<reason>`, each run once a reason: `leased` (a notice
            that was proved false meanwhile), `settling` (after a start or an outage), `beating`
            (its lease has only just expired); `outage.<of what>`; `truncated` looks; `dropped` for
            slow readers.
    """

    def __init__(
        self,
        roster: Roster,
        rows: Rows,
        settings: PeerContextSettings,
        *,
        is_deaf: Callable[[], bool] = bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._roster = roster
        self._rows = rows
        self._settings = settings
        self._is_deaf = is_deaf
        self._clock = clock
        self._seen_at: float | None = None
        self._well_since: float | None = None
        self._outage: _Outage | None = None
        self._on_hold = False
        self._reported: dict[_Key, float] = {}
        self._held_back: dict[_Key, str] = {}
        self._callbacks: dict[object, OnFailure] = {}
        self._readers: weakref.WeakSet[Failures] = weakref.WeakSet()
        self._looking = asyncio.Lock()
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        if self._closed or self._task is not None:
            raise ConfigurationError("a failure detector is entered once: make another one")
        self._roster.on_notice = self._roster.on_leave = self._look_soon
        self._task = asyncio.create_task(self._look_on(), name="peerctx-failure-detector")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop looking, and end what `failures` returned. Safe to call twice."""
        self._closed = True
        for reader in list(self._readers):
            reader.end()
        task, self._task = self._task, None
        if task is None:
            return
        self._roster.on_notice = self._roster.on_leave = None
        task.cancel()
        await asyncio.wait({task})

    def on_failure(self, callback: OnFailure) -> Callable[[], None]:
        """Call this with each failure, on the loop; it must not block.

        Returns:
            What ends that; safe to call twice.
        """
        key = object()
        self._callbacks[key] = callback

        def end() -> None:
            self._callbacks.pop(key, None)

        return end

    def failures(self) -> Failures:
        """Return an iterator over the failures from now on; forgotten when nobody keeps it."""
        reader = Failures(ended=self._closed)
        self._readers.add(reader)
        return reader

    async def sweep(self) -> list[AgentFailure]:
        """Report all that is lost now, reported before or not.

        Returns:
            The same; empty if the database does not answer, or we are in mock mode.
        """
        return await self._look(again=True)

    async def states(self) -> list[ProcessState]:
        """Return how everybody is who beats or has a lease, sorted by process and incarnation."""
        holders = await self._answer(self._rows.aholders())
        held = {(h.owner_id, h.owner_incarnation): h for h in holders or ()}
        members = {member.key: member for member in self._roster.members}
        view = self._view(answers=holders is not None)
        return [
            _row(key, members.get(key), held.get(key), view, self._roster.died_at(key))
            for key in sorted({*held, *members})
        ]

    # Looking

    async def _look_on(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self._look()
            except Exception:  # a service loop logs and goes on
                self._fall_ill("database")
                _logger.exception("a look at who is lost failed")
            try:
                async with asyncio.timeout(self._settings.heartbeat_interval_seconds / LOOKS):
                    await self._woken.wait()
            except TimeoutError:
                pass

    def _look_soon(self, _who: Member | tuple[str, str]) -> None:
        self._woken.set()

    async def _look(self, *, again: bool = False) -> list[AgentFailure]:
        async with self._looking:
            lost = await self._lost()
            failures = [] if lost is None else self._news(lost, again=again)
            for failure in failures:
                self._tell(failure)
            return failures

    async def _lost(self) -> list[LostRun] | None:
        """Ask the database, and see whether time counts; None if nobody may be accused."""
        self._see_that_we_were_awake()
        if self._is_deaf():
            self._fall_ill("deaf")
            return None
        lost = await self._answer(self._rows.alost_runs(self._roster.dead(), limit=LIMIT))
        self._see_that_we_were_awake()  # frozen meanwhile, we hold an old answer
        if lost is None:
            return None
        if not self._roster.is_warm:
            self._fall_ill("heartbeats")
        elif self._well_since is None:
            if self._on_hold:
                _logger.warning("recovery goes on: deaths are noticed again")
            self._on_hold = False
            self._outage, self._well_since = None, self._clock()
        return lost

    async def _answer(self, asking: Awaitable[list[T]]) -> list[T] | None:
        try:
            async with asyncio.timeout(self._settings.silence_seconds):
                return await asking
        except (PeerContextError, TimeoutError) as error:
            if self._outage != "database":
                _logger.warning("nobody is taken for dead until the database answers: %s", error)
            self._fall_ill("database")
            return None

    def _see_that_we_were_awake(self) -> None:
        now, before = self._clock(), self._seen_at
        self._seen_at = now
        longest = self._settings.heartbeat_interval_seconds / LOOKS + self._settings.silence_seconds
        if before is not None and now - before > longest:
            self._fall_ill("late")

    def _fall_ill(self, outage: _Outage) -> None:
        """Give everybody a fresh lease's life, from when all is well again."""
        if self._outage != outage:
            self.counters[f"outage.{outage}"] += 1
            self._say_that_it_is_on_hold(outage)
        self._outage, self._well_since = outage, None

    def _say_that_it_is_on_hold(self, outage: _Outage) -> None:
        """Say it once; at the start nobody has been heard yet, and that is no news."""
        is_news = outage == "deaf" or self._well_since is not None
        if outage in _ON_HOLD and is_news and not self._on_hold:
            self._on_hold = True
            _logger.warning("recovery is on hold: %s", _ON_HOLD[outage])

    def _view(self, *, answers: bool) -> View:
        now, heard_at, settings = self._clock(), self._roster.heard_at, self._settings
        well_seconds = 0.0 if self._well_since is None else now - self._well_since
        return View(
            now=now,
            heard_at=now if heard_at is None else heard_at,
            hears=self._roster.is_warm,
            answers=answers,
            deaf=self._is_deaf(),
            settled_seconds=well_seconds - settings.lease_seconds,
            pause_seconds=settings.heartbeat_pause_seconds,
            silence_seconds=settings.silence_seconds,
            stuck_seconds=settings.stuck_seconds,
        )

    # Reporting

    def _news(self, lost: Sequence[LostRun], *, again: bool) -> list[AgentFailure]:
        """Return what is to be reported, and remember it as long as it is lost."""
        view = self._view(answers=True)
        if len(lost) >= LIMIT:
            self.counters["truncated"] += 1
        keys = {_key(run) for run in lost}
        self._reported = {key: at for key, at in self._reported.items() if key in keys}
        self._held_back = {key: why for key, why in self._held_back.items() if key in keys}
        news: list[AgentFailure] = []
        for run in lost:
            member, died_at = self._owner(run)
            why = judge(run, member, view, died_at=died_at)
            if why is None:
                self._hold_back(run, view)
            elif again or self._is_due(run, view.now):
                self._reported[_key(run)] = view.now
                news.append(_failure(run, member, why, died_at, view.now))
        return news

    def _owner(self, run: LostRun) -> tuple[Member | None, float | None]:
        """Return what is known of a run's owner: its heartbeats, and when its death was told."""
        if run.owner_id is None or run.owner_incarnation is None:
            return None, None
        key = run.owner_id, run.owner_incarnation
        return self._roster.member(key), self._roster.died_at(key)

    def _is_due(self, run: LostRun, now: float) -> bool:
        reported_at = self._reported.get(_key(run))
        return reported_at is None or now - reported_at >= self._settings.sweep_seconds

    def _hold_back(self, run: LostRun, view: View) -> None:
        if run.seconds_left >= 0:
            reason = "leased"
        else:
            reason = "beating" if view.settled_seconds >= 0 else "settling"
        if self._held_back.get(_key(run)) != reason:
            self._held_back[_key(run)] = reason
            self.counters[f"held_back.{reason}"] += 1

    def _tell(self, failure: AgentFailure) -> None:
        self.counters[f"reported.{failure.why}"] += 1
        _logger.info(
            "run %.200r is lost: %s",
            failure.run_id,
            failure.why,
            extra={
                "agent_id": failure.agent_id,
                "thread_id": failure.thread_id,
                "process_id": failure.process_id,
            },
        )
        for callback in list(self._callbacks.values()):
            try:
                callback(failure)
            except Exception:  # one listener's fault is not the others'
                _logger.exception("a callback for failures failed")
        for reader in list(self._readers):
            self.counters["dropped"] += not reader.put(failure)


def _key(run: LostRun) -> _Key:
    return run.agent_id, run.thread_id, run.epoch, run.owner_incarnation


def _failure(
    run: LostRun, member: Member | None, why: Why, died_at: float | None, now: float
) -> AgentFailure:
    noticed_at, silent_seconds = datetime.now(UTC), _silent_seconds(member, now)
    known_seconds = 0.0 if died_at is None else max(0.0, now - died_at)
    return AgentFailure(
        agent_id=run.agent_id,
        thread_id=run.thread_id,
        run_id=run.run_id,
        workflow=run.workflow,
        epoch=run.epoch,
        process_id=run.owner_id,
        incarnation=run.owner_incarnation,
        why=why,
        noticed_at=noticed_at,
        silent_seconds=silent_seconds,
        by=_by(why, member),
        last_seen_at=None if silent_seconds is None else noticed_at - _seconds(silent_seconds),
        known_at=noticed_at - _seconds(known_seconds),
    )


def _seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


def _by(why: Why, member: Member | None) -> By:
    if why == "died":
        return "sentinel"
    return "heartbeats" if member is not None and why in {"silent", "stuck"} else "rows"


def _silent_seconds(member: Member | None, now: float) -> float | None:
    last = None if member is None else member.arrivals.last
    return None if last is None else max(0.0, now - last)


def _row(
    key: tuple[str, str],
    member: Member | None,
    holder: Holder | None,
    view: View,
    died_at: float | None,
) -> ProcessState:
    state, why = state_of(member, holder, view, died_at=died_at)
    beat = None if member is None else member.beat
    holds = 0 if holder is None else holder.runs
    hosted = () if beat is None else beat.agents
    owned = () if holder is None else holder.agents
    # What its last heartbeat said of its runs is over when it is.
    is_over = state in {"dead", "left"} and view.answers and holder is None
    return ProcessState(
        process_id=key[0],
        incarnation=key[1],
        state=state,
        why=why,
        phi=None if member is None else member.phi(view.now),
        last_heartbeat_seconds=_silent_seconds(member, view.now),
        agents=tuple(sorted({*hosted, *owned})),
        open_runs=0 if beat is None or is_over else beat.open_runs,
        loop_lag_seconds=0.0 if beat is None else beat.loop_lag_seconds,
        supervises=beat is not None and beat.supervises,
        sentinel_id=None if beat is None else beat.sentinel_id,
        holds=holds if view.answers else None,
    )
