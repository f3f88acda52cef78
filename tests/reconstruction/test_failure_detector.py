"""Who is lost, and above all who is not: by silence and leases, and only while both can be told."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import pytest
from fakes import FakeBroker, FakeTransport
from hypothesis import given
from hypothesis import strategies as st

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError, StoreBusyError
from langgraph_peerctx.messaging.phi import THRESHOLD, Arrivals
from langgraph_peerctx.messaging.presence import Presence
from langgraph_peerctx.messaging.producer import publish
from langgraph_peerctx.messaging.roster import Member, Roster
from langgraph_peerctx.messaging.transport import Record
from langgraph_peerctx.persistence.runs import (
    Holder,
    LostRun,
    NewRun,
    Owner,
    Packed,
    RunInput,
    Runs,
)
from langgraph_peerctx.protocol.codec import encode
from langgraph_peerctx.protocol.messages import DeathNotice, Heartbeat
from langgraph_peerctx.reconstruction import failure_detector
from langgraph_peerctx.reconstruction.failure_detector import (
    AgentFailure,
    FailureDetector,
    ProcessState,
    View,
    judge,
    state_of,
)

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
# Interval 1, pause 3, silence 4, a lease's life 8, stuck 300, sweep 10.
SETTINGS = PeerContextSettings(mock_mode="always")
FAST = SETTINGS.model_copy(
    update={"heartbeat_interval_seconds": 0.02, "heartbeat_pause_seconds": 0.1}
)
LIFE = SETTINGS.lease_seconds


@dataclass
class Thread:
    """A row of the control database: an open run with its lease."""

    owner: str | None
    life: str | None
    expires_at: float
    epoch: int = 1


@dataclass
class FakeRows:
    """The control database: what `Runs` answers, and the faults that a test switches on."""

    clock: Callable[[], float]
    threads: dict[str, Thread] = field(default_factory=dict)
    fault: Exception | None = None
    hangs: bool = False
    on_answer: Callable[[], None] = lambda: None
    asked: int = 0
    at_once: int = 0
    most_at_once: int = 0

    async def alost_runs(self, dead: Sequence[str] = (), *, limit: int = 1_000) -> list[LostRun]:
        await self._answer()
        lost = [
            LostRun(
                agent_id="agent",
                thread_id=name,
                run_id=f"run-{name}",
                workflow="orders",
                epoch=thread.epoch,
                owner_id=thread.owner,
                owner_incarnation=thread.life,
                seconds_left=thread.expires_at - self.clock(),
            )
            for name, thread in self.threads.items()
            if thread.life is None or thread.expires_at < self.clock() or thread.life in dead
        ]
        self.on_answer()
        return lost[:limit]

    async def aholders(self) -> list[Holder]:
        await self._answer()
        expiries: dict[tuple[str, str], list[float]] = {}
        for thread in self.threads.values():
            if thread.owner is not None and thread.life is not None:
                expiries.setdefault((thread.owner, thread.life), []).append(thread.expires_at)
        return [
            Holder(
                owner_id=owner,
                owner_incarnation=life,
                runs=len(each),
                seconds_left=max(each) - self.clock(),
                agents=("agent",),
            )
            for (owner, life), each in expiries.items()
        ]

    async def _answer(self) -> None:
        self.asked += 1
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            await (asyncio.Event().wait() if self.hangs else asyncio.sleep(0))
        finally:
            self.at_once -= 1
        if self.fault is not None:
            raise self.fault


class World:
    """A presence topic, a control database, and a detector that is told when to look."""

    def __init__(self, settings: PeerContextSettings = SETTINGS) -> None:
        self.now = 1_000.0
        self.deaf = False
        self.broker_works = True
        self.lags: dict[str, float] = {}
        self.cut_off: set[str] = set()  # they beat, and do not reach the database
        self.sequences: dict[str, int] = {}
        self.roster = Roster(
            incarnation="us-1", interval_seconds=1, pause_seconds=3, clock=lambda: self.now
        )
        self.rows = FakeRows(clock=lambda: self.now)
        self.detector = FailureDetector(
            self.roster,
            self.rows,
            settings,
            is_deaf=lambda: self.deaf,
            clock=lambda: self.now,
        )
        self.failures: list[AgentFailure] = []
        self.detector.on_failure(self.failures.append)

    def own(self, *processes: str, life: str = "1") -> None:
        """Give each of them a run of the thread of the same name."""
        for name in processes:
            self.rows.threads[name] = Thread(name, f"{name}-{life}", self.now + LIFE)

    def beat(self, process: str, life: str = "1", **more: Any) -> None:
        sequence = self.sequences[process] = self.sequences.get(process, 0) + 1
        self.give(
            Heartbeat(
                sent_at=BEGAN,
                process_id=process,
                incarnation=f"{process}-{life}",
                sequence=sequence,
                loop_lag_seconds=self.lags.get(process, 0.0),
                **more,
            )
        )

    def die(self, process: str, life: str = "1") -> None:
        self.give(
            DeathNotice(
                sent_at=BEGAN,
                process_id=process,
                incarnation=f"{process}-{life}",
                sentinel_id="sentinel",
                died_at=BEGAN,
            )
        )

    def give(self, message: Any) -> None:
        self.roster.take(
            Record(
                topic="agent.presence", value=encode(message), timestamp_ms=int(1_000 * self.now)
            )
        )

    def renew(self, process: str) -> None:
        """A live owner goes on at an unchanged epoch, also when it comes back."""
        is_stuck = self.lags.get(process, 0.0) >= SETTINGS.stuck_seconds
        if self.rows.fault is None and process not in self.cut_off and not is_stuck:
            for thread in self.rows.threads.values():
                if thread.owner == process:
                    thread.expires_at = self.now + LIFE

    async def live(self, seconds: float, *processes: str) -> None:
        """Let time pass in which we and they beat and renew, and we look twice a second."""
        for step in range(int(2 * seconds)):
            self.now += 0.5
            if step % 2 and self.broker_works:
                for process in ("us", *processes):
                    self.beat(process)
            for process in processes:
                self.renew(process)
            await self.look()

    async def look(self) -> list[AgentFailure]:
        return await self.detector._look()

    async def state(self, process: str) -> ProcessState:
        return next(s for s in await self.detector.states() if s.process_id == process)

    @property
    def told(self) -> list[tuple[str, str]]:
        return [(failure.thread_id, failure.why) for failure in self.failures]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
async def settled(world: World) -> World:
    """Peers a and b, each with a run, and a detector for which time counts."""
    world.own("a", "b")
    await world.live(20, "a", "b")
    assert world.told == []
    return world


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.002)


# Who is lost


async def test_who_falls_silent_and_whose_lease_expires_is_lost(settled: World) -> None:
    fell_silent_at = settled.now
    await settled.live(7, "a")
    assert settled.told == [], "its lease has not expired"
    await settled.live(3, "a")
    assert settled.told == [("b", "silent")]
    (failure,) = settled.failures
    assert failure.silent_seconds is not None
    assert LIFE < failure.silent_seconds <= settled.now - fell_silent_at
    assert (failure.agent_id, failure.run_id, failure.workflow) == ("agent", "run-b", "orders")
    assert (failure.process_id, failure.incarnation, failure.epoch) == ("b", "b-1", 1)
    assert failure.by == "heartbeats"
    assert failure.noticed_at.tzinfo is UTC


async def test_a_silent_owner_whose_lease_is_renewed_is_never_lost(settled: World) -> None:
    for _ in range(120):
        await settled.live(1, "a")
        settled.renew("b")
    assert settled.told == []
    assert (await settled.state("b")).state == "unreachable"


async def test_whose_death_was_seen_is_lost_at_once_whatever_its_lease_says(settled: World) -> None:
    settled.die("b")
    await settled.look()
    assert settled.told == [("b", "died")]
    assert settled.failures[0].by == "sentinel"


async def test_a_failure_says_when_it_was_heard_last_and_when_it_was_known(settled: World) -> None:
    settled.die("b")
    settled.now += 0.25
    await settled.look()
    (failure,) = settled.failures
    assert failure.known_at is not None
    assert failure.last_seen_at is not None
    assert failure.silent_seconds is not None
    assert failure.noticed_at - failure.known_at == timedelta(seconds=0.25)
    heard = failure.noticed_at - failure.last_seen_at
    assert heard.total_seconds() == pytest.approx(failure.silent_seconds, abs=1e-5)


async def test_a_notice_that_was_proved_false_counts_no_more(settled: World) -> None:
    settled.rows.fault = StoreBusyError("wait")
    settled.die("b")
    await settled.live(3, "a", "b")
    settled.rows.fault = None
    await settled.live(20, "a", "b")
    assert settled.told == []


async def test_a_notice_that_is_proved_false_while_we_ask_counts_no_more(settled: World) -> None:
    settled.die("b")
    settled.now += 1.5
    settled.rows.on_answer = lambda: settled.beat("b")
    await settled.look()
    assert settled.told == []
    assert settled.detector.counters["held_back.leased"] == 1


async def test_a_notice_about_another_life_says_nothing(settled: World) -> None:
    settled.beat("b", "2")
    settled.die("b", "2")
    await settled.live(3, "a", "b")
    assert settled.told == []


async def test_a_death_before_the_first_heartbeat_is_lost_at_once_too(settled: World) -> None:
    """Its owner is known by its rows and its end alone."""
    settled.own("c")
    settled.die("c")
    settled.now += 0.25
    await settled.look()
    assert settled.told == [("c", "died")]
    (failure,) = settled.failures
    assert failure.by == "sentinel"
    assert (failure.silent_seconds, failure.last_seen_at) == (None, None)
    assert failure.known_at is not None
    assert failure.noticed_at - failure.known_at == timedelta(seconds=0.25)
    row = await settled.state("c")
    assert (row.state, row.phi, row.holds) == ("dead", None, 1)


async def test_a_death_before_the_first_heartbeat_that_is_proved_false_counts_no_more(
    settled: World,
) -> None:
    settled.own("c")
    settled.die("c")
    settled.now += 1.5
    settled.rows.on_answer = lambda: settled.beat("c")
    await settled.look()
    assert settled.told == []
    assert settled.detector.counters["held_back.leased"] == 1


async def test_a_notice_that_names_another_process_accuses_nobody(settled: World) -> None:
    settled.own("c")
    settled.give(
        DeathNotice(
            sent_at=BEGAN,
            process_id="d",
            incarnation="c-1",
            sentinel_id="sentinel",
            died_at=BEGAN,
        )
    )
    await settled.look()
    assert settled.told == []
    assert settled.detector.counters["held_back.leased"] == 1


async def test_what_was_given_back_is_lost_at_once(world: World) -> None:
    """At the very first look, deaf to everybody's heartbeats."""
    world.rows.threads["t"] = Thread(None, None, world.now)
    await world.look()
    assert world.told == [("t", "handed_over")]
    (failure,) = world.failures
    assert (failure.process_id, failure.incarnation, failure.silent_seconds) == (None, None, None)
    assert failure.by == "rows"


async def test_who_leaves_without_giving_back_is_lost_when_its_lease_expires(
    settled: World,
) -> None:
    settled.beat("b", leaving=True)
    await settled.live(7, "a")
    assert settled.told == []
    await settled.live(2, "a")
    assert settled.told == [("b", "silent")]


async def test_an_owner_that_nobody_ever_heard_is_lost_when_its_lease_expires(
    settled: World,
) -> None:
    settled.own("c")
    await settled.live(7, "a", "b")
    assert settled.told == []
    await settled.live(1, "a", "b")
    assert settled.told == [("c", "silent")]
    assert (settled.failures[0].by, settled.failures[0].silent_seconds) == ("rows", None)


async def test_who_is_stuck_is_lost_when_its_lease_expires(settled: World) -> None:
    settled.lags["b"] = SETTINGS.stuck_seconds
    await settled.live(7, "a", "b")
    assert settled.told == []
    assert (await settled.state("b")).state == "stuck"
    await settled.live(1, "a", "b")
    assert settled.told == [("b", "stuck")]
    assert settled.failures[0].by == "heartbeats"


async def test_who_beats_without_renewing_is_given_a_silence_more(settled: World) -> None:
    settled.cut_off.add("b")
    await settled.live(LIFE + 3.5, "a", "b")
    assert settled.told == []
    assert settled.detector.counters["held_back.beating"] == 1
    await settled.live(1, "a", "b")
    assert settled.told == [("b", "unrenewed")]
    assert settled.failures[0].by == "rows"


async def test_who_renews_again_in_time_is_not_lost(settled: World) -> None:
    settled.cut_off.add("b")
    await settled.live(LIFE + 3.5, "a", "b")
    settled.cut_off.clear()
    await settled.live(20, "a", "b")
    assert settled.told == []


# An outage is an outage, not a massacre


async def test_nothing_that_expired_counts_before_a_leases_life_has_passed(world: World) -> None:
    """Power was lost: all leases have expired, nobody beats, and only we are back."""
    world.own("a", "b", "c")
    world.now += 3_600
    while not world.roster.is_warm:
        await world.live(1)
    await world.live(LIFE - 1)
    assert world.told == []
    assert world.detector.counters["held_back.settling"] == 3
    await world.live(1.5)
    assert world.told == [("a", "silent"), ("b", "silent"), ("c", "silent")]


async def test_without_a_broker_nobody_is_lost_by_silence(world: World) -> None:
    world.own("a")
    world.rows.threads["t"] = Thread(None, None, world.now)
    world.broker_works = False
    await world.live(120)
    assert set(world.told) == {("t", "handed_over")}


@pytest.mark.parametrize("seconds", [1, 5, 8, 60])
async def test_while_the_database_is_away_everybody_lives_on(settled: World, seconds: int) -> None:
    settled.rows.fault = StoreBusyError("it restarts")
    await settled.live(seconds, "a", "b")
    settled.rows.fault = None
    await settled.look()  # before anybody could renew
    await settled.live(30, "a", "b")
    assert settled.told == []
    assert settled.detector.counters["outage.database"] == 1


@pytest.mark.parametrize("seconds", [1, 4, 5, 60])
async def test_while_the_broker_is_away_everybody_lives_on(settled: World, seconds: int) -> None:
    settled.broker_works = False
    await settled.live(seconds, "a", "b")
    settled.broker_works = True
    await settled.live(30, "a", "b")
    assert settled.told == []


async def test_who_seems_silent_only_since_we_heard_ourselves_last_is_not_silent(
    settled: World,
) -> None:
    """The broker goes away just before b's next beat; for b, the database went a little earlier."""
    settled.cut_off.add("b")
    await settled.live(LIFE, "a", "b")
    for seconds in (0.9, 2.0, 1.9):
        settled.now += seconds
        if seconds < 1:
            settled.beat("us")
        settled.rows.threads["b"].expires_at = settled.now - 1
        await settled.look()
    assert settled.roster.is_warm
    b = settled.roster.member(("b", "b-1"))
    assert b is not None
    assert b.phi(settled.now) >= THRESHOLD
    assert settled.told == []
    assert settled.detector.counters["held_back.beating"] == 1
    assert (await settled.state("b")).state == "suspected"


@pytest.mark.parametrize("outage", ["database", "broker"])
async def test_who_does_not_come_back_after_an_outage_is_lost_after_a_leases_life(
    settled: World, outage: str
) -> None:
    if outage == "database":
        settled.rows.fault = StoreBusyError("it restarts")
    else:
        settled.broker_works = False
    await settled.live(60, "a")
    settled.rows.fault, settled.broker_works = None, True
    await settled.live(7, "a")
    assert settled.told == []
    await settled.live(7, "a")
    assert settled.told == [("b", "silent")]


async def test_a_death_that_was_seen_counts_right_after_an_outage(settled: World) -> None:
    settled.rows.fault = StoreBusyError("it restarts")
    settled.die("b")
    await settled.live(20, "a")
    assert settled.told == []
    settled.rows.fault = None
    await settled.look()
    assert settled.told == [("b", "died")]


async def test_frozen_for_twenty_seconds_it_accuses_nobody(settled: World) -> None:
    """What the others did meanwhile lies in the topic, and is read after the first look."""
    for thread in settled.rows.threads.values():
        thread.expires_at = settled.now + 19  # they could not renew either for a moment
    settled.now += 20
    await settled.look()
    for process in ("us", "a", "b"):
        settled.beat(process)
    await settled.look()
    await settled.live(30, "a", "b")
    assert settled.told == []
    assert settled.detector.counters["outage.late"] == 1


async def test_frozen_while_it_asked_it_does_not_believe_the_answer(settled: World) -> None:
    settled.cut_off.add("b")
    await settled.live(LIFE + 2, "a", "b")

    def freeze() -> None:
        settled.now += 5
        for process in ("us", "a", "b"):  # what came meanwhile is read at once
            settled.beat(process)
        settled.rows.on_answer = lambda: None

    settled.rows.on_answer = freeze
    await settled.look()
    assert settled.detector.counters["outage.late"] == 1
    settled.cut_off.clear()
    await settled.live(30, "a", "b")
    assert settled.told == []


async def test_a_slow_answer_after_a_slow_tick_is_no_outage(settled: World) -> None:
    def take_time() -> None:
        settled.now += 3

    settled.now += 2
    settled.rows.on_answer = take_time
    await settled.look()
    assert settled.detector.counters["outage.late"] == 0


async def test_in_mock_mode_it_accuses_nobody_and_asks_nothing(settled: World) -> None:
    settled.deaf = True
    asked = settled.rows.asked
    settled.rows.threads["t"] = Thread(None, None, settled.now)
    settled.die("b")
    await settled.live(60)
    assert await settled.detector.sweep() == []
    assert settled.told == []
    assert settled.rows.asked == asked
    assert {state.state for state in await settled.detector.states()} == {"suspected"}
    settled.deaf = False
    await settled.look()
    assert ("t", "handed_over") in settled.told


async def test_mock_mode_that_begins_while_it_asks_keeps_it_from_accusing(settled: World) -> None:
    settled.die("b")
    settled.rows.on_answer = lambda: setattr(settled, "deaf", True)
    await settled.look()
    assert settled.told == []


async def test_a_database_that_does_not_answer_is_logged_once(
    settled: World, caplog: pytest.LogCaptureFixture
) -> None:
    settled.rows.fault = StoreBusyError("it restarts")
    await settled.live(10, "a", "b")
    assert [r.levelno for r in caplog.records if "it restarts" in r.message] == [logging.WARNING]


@given(st.data())
def test_who_beats_and_renews_whenever_it_can_is_never_lost(data: st.DataObject) -> None:
    """Whatever the outages of the database, of the broker and of ourselves."""
    outages = st.sampled_from(["none", "database", "broker", "both", "frozen"])
    times = st.lists(st.tuples(outages, st.integers(1, 40)), max_size=6)
    asyncio.run(_outages(World(), data.draw(times)))


async def _outages(world: World, times: list[tuple[str, int]]) -> None:
    world.own("a", "b")
    for outage, seconds in times:
        world.rows.fault = StoreBusyError("away") if outage in {"database", "both"} else None
        world.broker_works = outage not in {"broker", "both"}
        if outage == "frozen":
            world.now += seconds
            world.renew("a")
            world.renew("b")
        else:
            await world.live(seconds, "a", "b")
    world.rows.fault, world.broker_works = None, True
    await world.look()
    await world.live(20, "a", "b")
    assert world.told == []


@pytest.mark.no_cover  # each line is counted, and other tests reach them all
def test_a_million_heartbeats_with_pauses_up_to_three_seconds_accuse_nobody() -> None:
    """Fifty processes; half are late once in a hundred beats, half whenever they like."""
    chance = Random(11)
    accused = {"suspected": 0, "dead": 0}
    for process in range(50):
        late = 0.01 if process % 2 else 0.5
        for member, view in _silences(chance, late, beats=20_000):
            # Silence is the most suspicious just before its end. Whoever is down to his lease:
            held, _ = state_of(member, _holder(5.0), view)
            accused["suspected"] += held not in {"alive", "slow"}
            accused["dead"] += held == "dead"
            assert judge(_lost("b-1", 5.0), member, view) is None
    assert accused["suspected"] <= 1
    assert accused["dead"] == 0


def _silences(chance: Random, late: float, *, beats: int) -> Iterator[tuple[Member, View]]:
    """Beat, and yield each moment before the end of a silence beyond the acceptable pause."""
    member, now = _member(), 0.0
    for _ in range(beats):
        gap = 1 + chance.uniform(0, 3) if chance.random() < late else chance.gauss(1, 0.02)
        now += gap
        if gap > 3:  # up to the pause nothing is suspicious
            yield member, _view(now=now, heard_at=now)
        member.arrivals.beat(now)


# The rules themselves


def _member(*, beat_at: float | None = None, lag: float = 0.0, **more: Any) -> Member:
    arrivals = Arrivals(interval_seconds=1, pause_seconds=3)
    if beat_at is not None:
        arrivals.beat(beat_at)
    beat = Heartbeat(
        sent_at=BEGAN, process_id="b", incarnation="b-1", sequence=1, loop_lag_seconds=lag
    )
    return Member(beat=beat, arrivals=arrivals, at_ms=0, **more)


def _view(**more: Any) -> View:
    known: dict[str, Any] = {
        "now": 100.0,
        "heard_at": 100.0,
        "hears": True,
        "answers": True,
        "deaf": False,
        "settled_seconds": 50.0,
        "pause_seconds": 3.0,
        "silence_seconds": 4.0,
        "stuck_seconds": 300.0,
    }
    return View(**known | more)


def _lost(incarnation: str | None, seconds_left: float) -> LostRun:
    return LostRun(
        agent_id="agent",
        thread_id="t",
        run_id="r",
        workflow=None,
        epoch=1,
        owner_id=None if incarnation is None else "b",
        owner_incarnation=incarnation,
        seconds_left=seconds_left,
    )


def _holder(seconds_left: float) -> Holder:
    return Holder(
        owner_id="b", owner_incarnation="b-1", runs=1, seconds_left=seconds_left, agents=("agent",)
    )


BEATS: dict[str, Any] = {"beat_at": 99.5}
SILENT: dict[str, Any] = {"beat_at": 90.0}
UNHEARD: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("incarnation", "left", "member", "view", "why"),
    [
        (None, 0.0, None, {}, "handed_over"),
        (None, -9.0, None, {"settled_seconds": -1.0, "hears": False}, "handed_over"),
        (None, 0.0, None, {"deaf": True}, None),
        ("b-1", 7.0, BEATS | {"died_at": 99.9}, {}, "died"),
        ("b-1", -1.0, BEATS | {"died_at": 99.9}, {"settled_seconds": -1.0}, "died"),
        ("b-1", 7.0, BEATS | {"died_at": 99.9}, {"deaf": True}, None),
        ("b-1", 7.0, UNHEARD | {"died_at": 99.9}, {}, "died"),
        ("b-1", -1.0, UNHEARD | {"died_at": 99.9}, {"settled_seconds": -1.0}, "died"),
        ("b-1", 7.0, UNHEARD | {"died_at": 99.9}, {"deaf": True}, None),
        ("b-1", 7.0, SILENT, {}, None),
        ("b-1", 0.0, SILENT, {}, None),
        ("b-1", 7.0, None, {}, None),
        ("b-1", 7.0, BEATS | {"has_left": True}, {}, None),
        ("b-1", 7.0, BEATS | {"lag": 300.0}, {}, None),
        ("b-1", -0.1, SILENT, {}, "silent"),
        ("b-1", -0.1, SILENT, {"heard_at": 94.0}, None),
        ("b-1", -0.1, SILENT, {"settled_seconds": 0.0}, "silent"),
        ("b-1", -60.0, SILENT, {"settled_seconds": -0.1}, None),
        ("b-1", -0.1, None, {}, "silent"),
        ("b-1", -0.1, BEATS | {"has_left": True}, {}, "silent"),
        ("b-1", -0.1, BEATS | {"lag": 300.0}, {}, "stuck"),
        ("b-1", -0.1, BEATS | {"lag": 299.0}, {}, None),
        ("b-1", -60.0, BEATS | {"lag": 300.0}, {"settled_seconds": -0.1}, None),
        ("b-1", -3.9, BEATS, {}, None),
        ("b-1", -4.0, BEATS, {}, "unrenewed"),
        ("b-1", -60.0, BEATS, {"settled_seconds": 3.9}, None),
        ("b-1", -60.0, BEATS, {"settled_seconds": 4.0}, "unrenewed"),
    ],
)
def test_a_lost_run_is_judged_by(
    incarnation: str | None,
    left: float,
    member: dict[str, Any] | None,
    view: dict[str, Any],
    why: str | None,
) -> None:
    known = None if member is None or "beat_at" not in member else _member(**member)
    died_at = (member or {}).get("died_at")
    assert judge(_lost(incarnation, left), known, _view(**view), died_at=died_at) == why


@given(
    st.floats(0, 1e6),
    st.one_of(st.none(), st.floats(0, 100)),
    st.booleans(),
    st.floats(0, 1e4),
    st.floats(-1e6, 1e6),
)
def test_an_unexpired_lease_without_a_notice_is_never_judged_lost(
    left: float, beat_at: float | None, has_left: Any, lag: float, settled: float
) -> None:
    member = _member(beat_at=beat_at, has_left=has_left, lag=lag)
    assert judge(_lost("b-1", left), member, _view(settled_seconds=settled)) is None


@pytest.mark.parametrize(
    ("member", "left", "view", "state"),
    [
        (BEATS, None, {}, "alive"),
        (BEATS, -60.0, {}, "alive"),
        (BEATS, None, {"answers": False, "settled_seconds": -8.0}, "alive"),
        (BEATS, None, {"hears": False}, "alive"),
        (BEATS | {"lag": 3.0}, None, {}, "alive"),
        (BEATS | {"lag": 3.1}, None, {}, "slow"),
        ({"beat_at": 95.5}, None, {}, "slow"),
        (BEATS | {"lag": 300.0}, None, {}, "stuck"),
        (SILENT, 5.0, {}, "unreachable"),
        (SILENT, 5.0, {"settled_seconds": -1.0}, "unreachable"),
        (SILENT, 5.0, {"answers": False}, "suspected"),
        (SILENT, 5.0, {"hears": False}, "suspected"),
        (SILENT, 5.0, {"heard_at": 94.0}, "suspected"),
        (SILENT, -1.0, {"settled_seconds": -0.1}, "suspected"),
        (SILENT, None, {"settled_seconds": -0.1}, "suspected"),
        (SILENT, -1.0, {}, "dead"),
        (SILENT, None, {}, "dead"),
        (BEATS | {"died_at": 99.9}, 5.0, {}, "dead"),
        (UNHEARD | {"died_at": 99.9}, 5.0, {}, "dead"),
        (BEATS | {"has_left": True}, None, {}, "left"),
        (None, 5.0, {}, "unreachable"),
        (None, -1.0, {}, "dead"),
        (None, -1.0, {"hears": False}, "suspected"),
        (BEATS, None, {"deaf": True}, "suspected"),
    ],
)
def test_a_process_is(
    member: dict[str, Any] | None, left: float | None, view: dict[str, Any], state: str
) -> None:
    known = None if member is None or "beat_at" not in member else _member(**member)
    holder = None if left is None else _holder(left)
    died_at = (member or {}).get("died_at")
    found, why = state_of(known, holder, _view(**view), died_at=died_at)
    assert found == state
    assert why


# The table


async def test_the_table_shows_everybody_who_beats_or_holds_a_lease(settled: World) -> None:
    settled.own("z")
    settled.beat("c", agents=("x", "y"), open_runs=2, supervises=True, sentinel_id="s")
    table = await settled.detector.states()
    assert [(row.process_id, row.state) for row in table] == [
        ("a", "alive"),
        ("b", "alive"),
        ("c", "alive"),
        ("us", "alive"),
        ("z", "unreachable"),
    ]
    c, z = table[2], table[4]
    assert (c.agents, c.open_runs, c.supervises, c.sentinel_id) == (("x", "y"), 2, True, "s")
    assert (c.phi, c.last_heartbeat_seconds, c.holds) == (pytest.approx(0, abs=1e-6), 0, 0)
    assert (z.phi, z.last_heartbeat_seconds, z.holds) == (None, None, 1)
    assert table[0].holds == 1


async def test_the_agents_of_a_process_are_those_it_hosts_and_those_whose_runs_it_owns(
    settled: World,
) -> None:
    settled.own("c", "z")
    settled.beat("c", agents=("x", "agent", "a"))
    assert (await settled.state("c")).agents == ("a", "agent", "x")
    assert (await settled.state("z")).agents == ("agent",)


async def test_who_is_dead_and_holds_nothing_any_more_has_no_runs(settled: World) -> None:
    settled.own("c")
    settled.beat("c", open_runs=1)
    settled.die("c")
    row = await settled.state("c")
    assert (row.state, row.open_runs, row.holds) == ("dead", 1, 1)
    del settled.rows.threads["c"]
    row = await settled.state("c")
    assert (row.state, row.open_runs, row.holds) == ("dead", 0, 0)
    settled.rows.fault = StoreBusyError("away")
    row = await settled.state("c")
    assert (row.open_runs, row.holds) == (1, None), "nobody can tell"


async def test_a_database_that_fails_for_the_table_is_an_outage_too(settled: World) -> None:
    settled.rows.fault = StoreBusyError("away")
    settled.beat("c")
    for _ in range(2):
        settled.now += 3
        settled.beat("us")
    row = await settled.state("c")
    assert (row.state, row.holds) == ("suspected", None)
    assert settled.detector.counters["outage.database"] == 1


async def test_only_the_table_asks_who_holds_leases(settled: World) -> None:
    settled.rows.asked = 0
    await settled.look()
    assert settled.rows.asked == 1


# Once, and again with each sweep


async def test_a_failure_is_reported_once_and_again_with_each_sweep(settled: World) -> None:
    settled.die("b")
    await settled.live(9.5, "a")
    assert settled.told == [("b", "died")]
    await settled.live(1, "a")
    assert settled.told == [("b", "died")] * 2
    assert settled.detector.counters["reported.died"] == 2


async def test_a_sweep_by_hand_reports_all_that_is_lost(settled: World) -> None:
    settled.die("b")
    await settled.look()
    assert [f.thread_id for f in await settled.detector.sweep()] == ["b"]
    assert settled.told == [("b", "died")] * 2


async def test_a_failure_under_another_epoch_is_another_one(settled: World) -> None:
    settled.rows.threads["t"] = Thread(None, None, settled.now)
    await settled.look()
    settled.rows.threads["t"].epoch = 2
    await settled.look()
    assert [failure.epoch for failure in settled.failures] == [1, 2]


async def test_what_was_recovered_and_is_lost_again_is_reported_at_once(settled: World) -> None:
    settled.rows.threads["t"] = Thread(None, None, settled.now)
    await settled.look()
    waiting = settled.rows.threads.pop("t")  # for the time of its next attempt
    await settled.look()
    settled.rows.threads["t"] = waiting
    await settled.look()
    assert settled.told == [("t", "handed_over")] * 2


async def test_more_than_it_asks_for_is_counted(
    settled: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_detector, "LIMIT", 2)
    for name in ("t", "u", "v"):
        settled.rows.threads[name] = Thread(None, None, settled.now)
    await settled.look()
    assert [thread for thread, _ in settled.told] == ["t", "u"]
    assert settled.detector.counters["truncated"] == 1


# Telling


async def test_a_callback_that_raises_stops_no_other(
    settled: World, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[AgentFailure] = []

    def fail(_failure: AgentFailure) -> None:
        raise RuntimeError("no")

    settled.detector.on_failure(fail)
    end = settled.detector.on_failure(told.append)
    settled.die("b")
    await settled.look()
    assert len(told) == 1
    assert "a callback for failures failed" in caplog.text
    end()
    end()
    await settled.detector.sweep()
    assert len(told) == 1


async def test_failures_can_be_iterated_until_it_closes(settled: World) -> None:
    failures = settled.detector.failures()
    settled.die("b")
    await settled.look()
    assert (await anext(failures)).thread_id == "b"
    waiting = asyncio.ensure_future(anext(failures, None))
    await asyncio.sleep(0)
    await settled.detector.close()
    assert await waiting is None
    assert [failure async for failure in settled.detector.failures()] == []


async def test_a_reader_that_is_too_slow_loses_the_oldest(
    settled: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_detector, "QUEUE_SIZE", 2)
    failures = settled.detector.failures()
    for name in ("t", "u", "v"):
        settled.rows.threads[name] = Thread(None, None, settled.now)
    await settled.look()
    await settled.detector.close()
    assert [failure.thread_id async for failure in failures] == ["u", "v"]
    assert failures.dropped == settled.detector.counters["dropped"] == 1


async def test_a_reader_that_is_gone_is_forgotten(settled: World) -> None:
    failures = settled.detector.failures()
    assert len(settled.detector._readers) == 1
    del failures
    gc.collect()
    assert len(settled.detector._readers) == 0


# Its life


@pytest.fixture
async def running() -> AsyncIterator[World]:
    world = World(FAST)
    async with world.detector:
        yield world


async def test_it_looks_at_the_start_and_four_times_an_interval() -> None:
    """Seven looks, six quarters of an interval between them; a busy machine holds some up."""
    world, looks = World(SETTINGS.model_copy(update={"heartbeat_interval_seconds": 0.8})), []
    clock = asyncio.get_running_loop().time
    world.rows.on_answer = lambda: looks.append(clock())
    began = clock()
    async with world.detector:
        await until(lambda: len(looks) >= 7)
    assert looks[6] - began > 1.19
    assert median(after - before for before, after in pairwise(looks)) < 0.4


@pytest.mark.parametrize("how", ["die", "die unheard", "leave"])
async def test_it_looks_at_once_when_somebody_dies_or_leaves(how: str) -> None:
    world = World(SETTINGS.model_copy(update={"heartbeat_interval_seconds": 3_600.0}))
    world.own("b")
    if how != "die unheard":
        world.beat("b")
    async with world.detector:
        await until(lambda: world.rows.asked)
        if how != "leave":
            world.die("b")
        else:
            world.rows.threads["b"] = Thread(None, None, world.now)
            world.beat("b", leaving=True)
        await until(lambda: world.told)
    assert world.told == [("b", "handed_over" if how == "leave" else "died")]


async def test_a_notice_that_comes_while_it_asks_is_looked_at_next() -> None:
    world = World(SETTINGS.model_copy(update={"heartbeat_interval_seconds": 3_600.0}))
    world.own("b")
    world.beat("b")
    world.rows.on_answer = lambda: world.die("b")
    async with world.detector:
        await until(lambda: world.told)
    assert world.told == [("b", "died")]


async def test_it_never_looks_twice_at_once(running: World) -> None:
    await asyncio.gather(*(running.detector.sweep() for _ in range(10)))
    assert running.rows.most_at_once == 1


async def test_a_database_that_hangs_is_an_outage(running: World) -> None:
    running.rows.hangs = True
    await until(lambda: running.detector.counters["outage.database"])
    running.rows.hangs = False
    running.rows.threads["t"] = Thread(None, None, running.now)
    await until(lambda: running.told)


async def test_a_fault_that_nobody_expects_does_not_end_it(
    running: World, caplog: pytest.LogCaptureFixture
) -> None:
    running.rows.fault = ZeroDivisionError("a bug")
    await until(lambda: "a look at who is lost failed" in caplog.text)
    running.rows.fault = None
    running.rows.threads["t"] = Thread(None, None, running.now)
    await until(lambda: running.told)
    assert running.detector.counters["outage.database"] == 1


async def test_it_is_closed_twice_and_entered_once(world: World) -> None:
    async with world.detector:
        assert "peerctx-failure-detector" in {task.get_name() for task in asyncio.all_tasks()}
        with pytest.raises(ConfigurationError):
            await world.detector.__aenter__()
    await world.detector.close()
    assert world.roster.on_notice is None
    with pytest.raises(ConfigurationError):
        await world.detector.__aenter__()


async def test_it_closes_while_the_database_hangs(world: World) -> None:
    world.rows.hangs = True
    async with asyncio.timeout(SETTINGS.silence_seconds - 0.5), world.detector:
        await until(lambda: world.rows.asked)


async def test_a_close_that_is_cancelled_leaves_nothing_behind(world: World) -> None:
    await world.detector.__aenter__()
    await until(lambda: world.rows.asked)
    closing = asyncio.ensure_future(world.detector.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait({closing})
    await until(lambda: len(asyncio.all_tasks()) == 1)


# On real databases


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def runs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Runs]:
    url = f"sqlite:///{tmp_path}/control.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
    with Runs(url) as opened:
        yield opened


def _admit(runs: Runs, process: str, *, ttl_seconds: float) -> None:
    run = NewRun(
        run_id=f"run-{process}",
        agent_id="agent",
        thread_id=process,
        given=RunInput(value=Packed("json", b"{}")),
    )
    owner = Owner(owner_id=process, incarnation=f"{process}-1", ttl_seconds=ttl_seconds)
    runs.admit(run, owner)


async def test_a_notice_on_the_topic_becomes_a_failure_out_of_the_rows(runs: Runs) -> None:
    """And what another handed over, and nobody else's."""
    broker = FakeBroker(topics={"agent.presence": []})
    transport = FakeTransport(broker)
    # Before a pause has passed nobody is unreachable, however slow the machine is.
    patient = SETTINGS.model_copy(update={"heartbeat_pause_seconds": 60.0})
    presence, dying = Presence(transport, patient, "us"), _named("dying")
    for process in ("dying", "leaving", "living"):
        _admit(runs, process, ttl_seconds=60)
    runs.hand_over("leaving-1")
    peer = Presence(transport, dying, "dying-1", listens=False)
    await presence.start()
    await peer.start()
    await until(lambda: presence.roster.member(("dying", "dying-1")))
    async with FailureDetector(presence.roster, runs, patient) as detector:
        failures = detector.failures()
        first = await anext(failures)
        notice = DeathNotice(
            sent_at=BEGAN,
            process_id="dying",
            incarnation="dying-1",
            sentinel_id="s",
            died_at=BEGAN,
        )
        await publish(transport, "agent.presence", notice, max_bytes=10_000)
        second = await anext(failures)
        holding = {row.process_id: (row.state, row.holds) for row in await detector.states()}
    await peer.close()
    await presence.close()
    assert [(f.thread_id, f.why, f.epoch) for f in (first, second)] == [
        ("leaving", "handed_over", 1),
        ("dying", "died", 1),
    ]
    assert holding["dying"] == ("dead", 1)
    assert holding["living"] == ("suspected", 1)


async def test_who_is_silent_is_lost_when_the_databases_clock_says_so(
    runs: Runs, world: World
) -> None:
    _admit(runs, "gone", ttl_seconds=0.001)
    _admit(runs, "held", ttl_seconds=60)
    world.detector._rows = runs
    await asyncio.sleep(0.01)
    await world.live(5)
    assert world.told == []
    await world.live(8)
    assert world.told == [("gone", "silent")]
    assert (await world.state("held")).state == "unreachable"


def _named(process: str) -> PeerContextSettings:
    return SETTINGS.model_copy(update={"process_id": process})


async def test_that_recovery_is_on_hold_is_said_once_and_so_is_its_end(
    settled: World, caplog: pytest.LogCaptureFixture
) -> None:
    assert "on hold" not in caplog.text, "that nobody was heard at the start is no news"
    settled.broker_works = False
    await settled.live(20, "a", "b")
    settled.deaf = True
    await settled.live(5, "a", "b")
    settled.deaf, settled.broker_works = False, True
    await settled.live(10, "a", "b")
    said = [r.message for r in caplog.records if "recovery" in r.message]
    assert [words.partition(":")[0] for words in said] == [
        "recovery is on hold",
        "recovery goes on",
    ]


async def test_without_a_broker_at_the_start_it_is_on_hold_and_says_so(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.deaf = True
    await world.live(3)
    assert caplog.text.count("recovery is on hold: there is no broker") == 1
