"""Who is there: by the order in the topic, by our own clock, and only while we hear ourselves."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from langgraph_peerctx.messaging.roster import Roster
from langgraph_peerctx.messaging.transport import Record
from langgraph_peerctx.protocol.codec import encode
from langgraph_peerctx.protocol.messages import ContextRequest, DeathNotice, Heartbeat

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class World:
    """A presence topic, its reader, and the clocks of both."""

    now: float = 1_000.0
    broker_ms: int = 1_767_225_600_000
    sequences: dict[tuple[str, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.roster = Roster(
            incarnation="us", interval_seconds=1, pause_seconds=3, clock=lambda: self.now
        )

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        self.broker_ms += int(1_000 * seconds)

    def beat(
        self, process: str = "p", life: str = "1", *, was_there: bool = False, **more: Any
    ) -> None:
        sequence = self.sequences[process, life] = self.sequences.get((process, life), 0) + 1
        fields = {"agents": (process,), "sequence": sequence} | more
        self.give(
            Heartbeat(sent_at=BEGAN, process_id=process, incarnation=life, **fields),
            was_there=was_there,
        )

    def give(self, message: Any, *, was_there: bool = False) -> None:
        self.roster.take(
            Record(
                topic="agent.presence",
                value=encode(message),
                timestamp_ms=self.broker_ms,
                was_there=was_there,
            )
        )

    def live(self, seconds: int, *processes: str) -> None:
        """Let so many seconds pass in which we and they beat."""
        for _ in range(seconds):
            self.pass_by(1)
            self.beat("us", "us", agents=())
            for process in processes:
                self.beat(process)

    def die(self, process: str = "p", life: str = "1") -> None:
        self.give(
            DeathNotice(
                sent_at=BEGAN,
                process_id=process,
                incarnation=life,
                sentinel_id="sentinel",
                died_at=BEGAN,
            )
        )

    @property
    def there(self) -> list[str]:
        return [member.beat.process_id for member in self.roster.present() if member.beat.agents]


@pytest.fixture
def world() -> World:
    return World()


def test_it_is_warm_a_pause_after_our_own_beat_came_back(world: World) -> None:
    world.beat("p")
    world.pass_by(100)
    assert not world.roster.is_warm
    world.beat("us", "us")
    assert not world.roster.is_warm
    world.live(3)
    assert world.roster.is_warm


def test_who_beats_is_there_and_who_falls_silent_is_not(world: World) -> None:
    world.live(10, "a", "b")
    assert world.there == ["a", "b"]
    world.live(3, "a")
    assert world.there == ["a", "b"], "a pause is acceptable"
    world.live(3, "a")
    assert world.there == ["a"]
    assert not world.roster.is_present(("b", "1"))
    world.beat("b")
    assert world.there == ["a", "b"]


def test_who_leaves_is_gone_at_once(world: World) -> None:
    world.live(5, "a", "b")
    world.beat("b", leaving=True)
    assert world.there == ["a"]
    assert not world.roster.is_present(("b", "1"))
    assert [m.has_left for m in world.roster.members if m.beat.process_id == "b"] == [True]


def test_a_new_life_of_a_process_is_another_member(world: World) -> None:
    world.live(5, "a")
    world.beat("a", "2")
    assert world.there == ["a", "a"]
    for _ in range(7):
        world.live(1)
        world.beat("a", "2")
    assert world.there == ["a"]
    assert world.roster.is_present(("a", "2"))


def test_an_outage_of_ours_is_nobodys_death(world: World) -> None:
    """Cut off for a minute: nobody is heard, we least of all."""
    world.live(10, "a")
    world.pass_by(60)
    assert not world.roster.is_warm
    assert not world.roster.is_hearing
    assert world.roster.is_present(("a", "1")), "we cannot hear"
    assert world.there == ["a"]
    world.beat("us", "us", agents=())
    assert world.there == ["a"], "everybody has a fresh start"
    assert not world.roster.is_warm
    world.live(4, "a")
    assert world.roster.is_warm
    assert world.there == ["a"]


def test_after_an_outage_who_does_not_come_back_is_gone_after_all(world: World) -> None:
    world.live(10, "a", "b")
    world.pass_by(60)
    world.live(6, "a")
    assert world.there == ["a"]


def test_what_was_there_before_us_is_as_old_as_the_broker_says(world: World) -> None:
    """Peers' own clocks, in `sent_at`, are years off throughout."""
    world.beat("old", was_there=True)
    world.pass_by(60)
    world.beat("fresh", was_there=True)
    world.pass_by(0.5)
    world.beat("us", "us", agents=())
    assert world.there == ["fresh"]


def test_many_old_beats_read_in_one_go_teach_nothing(world: World) -> None:
    for _ in range(30):
        world.broker_ms += 1_000
        world.beat("a", was_there=True)
    world.live(1, "a")
    world.pass_by(3.5)
    world.beat("us", "us", agents=())
    assert world.there == ["a"]


@pytest.mark.parametrize("minutes", [-60, 60])
def test_a_clock_that_jumps_changes_nothing(world: World, minutes: int) -> None:
    world.live(5, "a")
    sent_at = BEGAN + timedelta(minutes=minutes)
    world.give(
        Heartbeat(sent_at=sent_at, process_id="a", incarnation="1", sequence=99, agents=("a",))
    )
    assert world.there == ["a"]


def test_a_beat_that_is_older_than_the_last_is_not_taken(world: World) -> None:
    world.live(3, "a")
    world.beat("a", sequence=1, agents=("x",))
    assert world.roster.counters["stale"] == 1
    assert next(m for m in world.roster.members if m.beat.process_id == "a").beat.agents == ("a",)


def test_a_notice_that_was_proved_false_before_we_came_accuses_nobody(world: World) -> None:
    """All of it is read in one moment of ours: only the broker knows what was how much later."""
    for what in ("beat", "die", "beat", "beat"):
        world.broker_ms += 1_500
        if what == "beat":
            world.beat("a", was_there=True)
        else:
            world.die("a")
    assert world.roster.dead() == ()
    assert world.roster.counters["false_notice"] == 1


def test_a_notice_is_believed_and_a_beat_much_later_proves_it_false(world: World) -> None:
    world.live(5, "a")
    world.die("a")
    assert world.there == []
    world.pass_by(0.5)
    world.beat("a")
    assert world.there == [], "that one was on its way when it died"
    world.pass_by(1)
    world.beat("a")
    assert world.there == ["a"]
    assert world.roster.counters["false_notice"] == 1


def test_a_notice_about_one_life_says_nothing_about_the_next(world: World) -> None:
    world.live(3, "a")
    world.beat("a", "2")
    world.die("a", "1")
    world.die("nobody", "1")
    assert world.there == ["a"]


def test_a_death_and_a_leave_are_told_once_each(world: World) -> None:
    died: list[str] = []
    left: list[str] = []
    world.roster.on_notice = lambda key: died.append(key[0])
    world.roster.on_leave = lambda member: left.append(member.beat.process_id)
    world.live(3, "a", "b")
    for _ in range(2):
        world.die("a")
        world.beat("b", leaving=True)
    world.die("b")
    assert (died, left) == (["a"], ["b"])
    world.pass_by(2)
    world.beat("a")
    world.die("a")
    assert died == ["a", "a"], "the first was false"


def test_whose_death_notice_stands_is_dead(world: World) -> None:
    world.live(3, "a", "b")
    world.die("a")
    assert world.roster.dead() == ("1",)
    assert world.roster.died_at(("a", "1")) == world.now
    world.pass_by(2)
    world.beat("a")
    assert world.roster.dead() == ()
    assert world.roster.died_at(("a", "1")) is None


def test_a_notice_about_a_life_that_was_never_heard_is_kept_and_told_once(world: World) -> None:
    died: list[tuple[str, str]] = []
    world.roster.on_notice = died.append
    world.live(3)
    for _ in range(2):
        world.die("a")
    assert world.roster.dead() == ("1",)
    assert world.roster.died_at(("a", "1")) == world.now
    assert world.roster.died_at(("a", "2")) is None
    assert world.roster.member(("a", "1")) is None, "nothing is known of it but its end"
    assert died == [("a", "1")]


def test_a_first_beat_that_was_on_its_way_leaves_the_notice_standing(world: World) -> None:
    world.live(3)
    world.die("a")
    world.pass_by(1)
    world.beat("a")
    assert world.there == []
    assert world.roster.dead() == ("1",)
    assert world.roster.counters["stale"] == 1


def test_a_first_beat_much_later_proves_the_notice_false(world: World) -> None:
    world.live(3)
    world.die("a")
    world.pass_by(1.5)
    world.beat("a")
    assert world.there == ["a"]
    assert world.roster.dead() == ()
    assert world.roster.died_at(("a", "1")) is None
    assert world.roster.counters["false_notice"] == 1


def test_a_first_beat_is_compared_with_its_notice_by_the_brokers_clock(world: World) -> None:
    """Both were there before us, and are read in one moment of ours."""
    world.die("a")
    world.broker_ms += 1_500
    world.beat("a", was_there=True)
    assert world.roster.dead() == ()
    assert world.roster.counters["false_notice"] == 1


def test_a_first_beat_proves_a_notice_false_even_where_nobody_new_has_room(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langgraph_peerctx.messaging.roster.MAX_MEMBERS", 1)
    world.live(1)
    world.die("a")
    world.pass_by(1.5)
    world.beat("a")
    assert world.roster.dead() == ()
    assert world.roster.counters["overrun"] == 1


def test_a_notice_that_came_before_the_first_beat_says_nothing_about_the_next_life(
    world: World,
) -> None:
    world.live(3)
    world.die("a", "1")
    world.beat("a", "2")
    assert world.there == ["a"]
    assert world.roster.dead() == ("1",)


def test_of_notices_about_lives_that_were_never_heard_the_oldest_go_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langgraph_peerctx.messaging.roster.MAX_NOTICES", 2)
    world.die("a", "first")
    world.die("b", "second")
    world.die("a", "first")  # said again: it is the newest now
    world.die("c", "third")
    assert sorted(world.roster.dead()) == ["first", "third"]


def test_a_notice_about_a_life_that_is_never_heard_is_forgotten_as_a_silent_member_is(
    world: World,
) -> None:
    world.live(3)
    world.die("a")
    world.live(80)
    assert world.roster.dead() == ("1",)
    world.live(1)
    assert world.roster.dead() == ()


def test_a_member_is_found_by_process_and_incarnation(world: World) -> None:
    world.beat("a", "2")
    member = world.roster.member(("a", "2"))
    assert member is not None
    assert member.key == ("a", "2")
    assert world.roster.member(("a", "1")) is None


def test_it_tells_until_when_it_heard(world: World) -> None:
    assert world.roster.heard_at is None
    world.live(3)
    world.pass_by(2)
    world.beat("a")
    assert world.roster.heard_at == world.now - 2


def test_what_is_no_heartbeat_is_counted_and_harms_nobody(world: World) -> None:
    for value in (None, b"\xff", b"{}"):
        world.roster.take(Record(topic="agent.presence", value=value))
    world.give(
        ContextRequest(
            sent_at=BEGAN,
            correlation_id="c",
            requester_id="r",
            failed_agent_id="a",
            thread_id="t",
            time_window_seconds=1.0,
        )
    )
    assert world.roster.counters.total() == 4
    assert world.roster.members == ()


def test_members_are_bounded_and_the_long_gone_forgotten(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langgraph_peerctx.messaging.roster.MAX_MEMBERS", 3)
    world.live(2, "a", "b", "c")
    assert world.roster.counters["overrun"] == 2
    world.live(200)
    assert [m.beat.process_id for m in world.roster.members] == ["us"]
