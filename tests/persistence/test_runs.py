"""A run is admitted with its lease and its input in one write, and ends in one."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from langgraph_peerctx.errors import ThreadBusyError
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.runs import NewRun, Owner, Packed, RunInput


@pytest.fixture
def control(url: str) -> Iterator[ControlDatabase]:
    with ControlDatabase(url) as opened:
        yield opened


def owner(who: str, ttl: float = 60) -> Owner:
    return Owner(owner_id=f"process-{who}", incarnation=who, ttl_seconds=ttl)


def given(data: bytes = b"input", at: str | None = None) -> RunInput:
    return RunInput(value=Packed("msgpack", data), checkpoint_id=at)


def new(run_id: str = "r1", thread: str = "t", **more: Any) -> NewRun:
    fields: dict[str, Any] = {"workflow": "launch", "durability": "sync", "given": given()}
    fields["agent_id"] = "agent"
    return NewRun(run_id=run_id, thread_id=thread, **(fields | more))


def test_a_run_is_admitted_with_all_that_it_was_given(control: ControlDatabase) -> None:
    config, context = Packed("msgpack", b"config"), Packed("null", b"")
    lease = control.admit(new(config=config, context=context, given=given(b"x", "c1")), owner("a"))
    assert (lease.epoch, lease.owner_incarnation, lease.run_id) == (1, "a", "r1")
    run = control.run("r1")
    assert run is not None
    assert (run.agent_id, run.thread_id, run.workflow, run.durability) == (
        "agent", "t", "launch", "sync",
    )  # fmt: skip
    assert (run.epoch, run.owner_incarnation, run.is_open) == (1, "a", True)
    assert (run.config, run.context) == (config, context)
    assert run.inputs == (given(b"x", "c1"),)
    assert control.newest_run("agent", "t") == run
    assert control.run("another") is None


def test_an_admission_whose_answer_was_lost_is_made_again(control: ControlDatabase) -> None:
    first = control.admit(new(), owner("a"))
    again = control.admit(new(), owner("a"))
    assert (again.epoch, again.run_id) == (first.epoch, "r1")
    run = control.run("r1")
    assert run is not None
    assert len(run.inputs) == 1


def test_what_is_refused_leaves_nothing(control: ControlDatabase) -> None:
    control.admit(new(), owner("a"))
    for who in ("a", "b"):
        with pytest.raises(ThreadBusyError):
            control.admit(new("r2"), owner(who))
    assert control.run("r2") is None
    lease = control.lease_of("agent", "t")
    assert lease is not None
    assert (lease.run_id, lease.epoch) == ("r1", 1)


def test_a_run_that_crashed_must_be_recovered_before_another_begins(
    control: ControlDatabase,
) -> None:
    control.admit(new(), owner("a", ttl=0.01))
    time.sleep(0.05)
    with pytest.raises(ThreadBusyError, match=r"has not ended.*peerctx recover agent t"):
        control.admit(new("r2"), owner("b"))
    with pytest.raises(ThreadBusyError, match="has not ended"):
        control.reopen(new(), owner("b"))
    lease = control.lease_of("agent", "t")
    assert lease is not None
    assert lease.owner_incarnation == "a", "the lease is as it was, and can still be found"


def test_an_end_gives_the_thread_back(control: ControlDatabase) -> None:
    lease = control.admit(new(), owner("a"))
    assert control.end(lease, "r1", "raised", error="boom " * 1_000)
    assert control.end(lease, "r1", "raised"), "told again, it is still true"
    assert not control.end(lease, "r1", "returned")
    run = control.run("r1")
    assert run is not None
    assert (run.end_kind, run.is_open, len(run.error or "")) == ("raised", False, 2_000)
    assert control.admit(new("r2"), owner("b")).epoch == 2


def test_who_was_superseded_ends_nothing(control: ControlDatabase) -> None:
    lease = control.admit(new(), owner("a"))
    control.claim("agent", "t", owner_id="p", incarnation="b", ttl_seconds=60, dead_incarnation="a")
    assert not control.end(lease, "r1", "returned")
    run = control.run("r1")
    assert run is not None
    assert run.is_open


def test_an_answer_goes_on_with_the_run_that_asked(control: ControlDatabase) -> None:
    lease = control.admit(new(), owner("a"))
    control.end(lease, "r1", "returned")
    answer = new(given=given(b"yes", "c7"), config=Packed("msgpack", b"the answer's"))
    again = control.reopen(answer, owner("b"))
    assert again.epoch == 2
    run = control.run("r1")
    assert run is not None
    assert (run.is_open, run.epoch, run.owner_incarnation) == (True, 2, "b")
    assert run.inputs == (given(), given(b"yes", "c7"))
    assert run.config == Packed("msgpack", b"the answer's")
    for who in ("a", "b"):  # nor the same process once more
        with pytest.raises(ThreadBusyError):
            control.reopen(answer, owner(who))


def test_what_is_handed_over_waits_for_its_next_owner(control: ControlDatabase) -> None:
    control.admit(new("r1", "t1"), owner("a"))
    control.admit(new("r2", "t2"), owner("a"))
    ended = control.admit(new("r3", "t3"), owner("a"))
    control.end(ended, "r3", "returned")
    control.admit(new("r4", "t4"), owner("b"))
    assert control.lost_runs() == []
    assert control.hand_over("a") == 2
    assert [(lost.run_id, lost.owner_id) for lost in control.lost_runs()] == [
        ("r1", None),
        ("r2", None),
    ]
    assert control.hand_over("a") == 0


def test_only_open_runs_are_lost(control: ControlDatabase) -> None:
    control.admit(new("r1", "t1"), owner("a", ttl=0.01))
    control.admit(new("r2", "t2"), owner("b"))
    ended = control.admit(new("r3", "t3"), owner("c", ttl=0.01))
    control.end(ended, "r3", "returned")
    time.sleep(0.05)
    (lost,) = control.lost_runs()
    assert (lost.run_id, lost.owner_id, lost.owner_incarnation) == ("r1", "process-a", "a")
    assert (lost.epoch, lost.workflow, lost.agent_id) == (1, "launch", "agent")
    assert lost.seconds_left < 0
    both = control.lost_runs(["b", "c"])
    assert [lost.run_id for lost in both] == ["r1", "r2"]
    assert both[1].seconds_left > 50
    assert [lost.run_id for lost in control.lost_runs(limit=1)] == ["r1"]


async def test_the_async_twins_do_the_same(control: ControlDatabase) -> None:
    lease = await control.aadmit(new(), owner("a"))
    assert await control.arun("r1") == await control.anewest_run("agent", "t")
    assert control.end(lease, "r1", "returned")
    again = control.reopen(new(), owner("a"))
    assert [holder.owner_incarnation for holder in await control.aholders()] == ["a"]
    assert again.epoch == 2
    assert await control.ahand_over("a") == 1
    assert [lost.run_id for lost in await control.alost_runs()] == ["r1"]


def test_an_admission_that_was_not_heard_of_is_taken_back(control: ControlDatabase) -> None:
    control.admit(new(), owner("a"))
    assert control.withdraw("agent", "t", "r1", "a")
    assert not control.withdraw("agent", "t", "r1", "a")
    run = control.run("r1")
    assert run is not None
    assert (run.end_kind, len(run.inputs)) == ("cancelled", 1)
    control.reopen(new(given=given(b"yes", "c7")), owner("a"))
    assert control.withdraw("agent", "t", "r1", "a")
    run = control.run("r1")
    assert run is not None
    assert (run.end_kind, run.inputs) == ("cancelled", (given(),)), "it will be given again"
    control.admit(new("r2"), owner("b"))
    assert not control.withdraw("agent", "t", "r2", "a"), "that one is another's"


def test_a_thread_is_taken_for_a_write_only_while_nothing_is_open(
    control: ControlDatabase,
) -> None:
    lease = control.take("agent", "t", owner("a"))
    with pytest.raises(ThreadBusyError):
        control.admit(new(), owner("b"))
    control.release("agent", "t", incarnation="a")
    assert control.admit(new(), owner("b")).epoch == lease.epoch + 1
    with pytest.raises(ThreadBusyError):
        control.take("agent", "t", owner("b"))


def test_who_holds_how_much_is_told(control: ControlDatabase) -> None:
    control.admit(new("r1", "t1"), owner("a", ttl=10))
    control.admit(new("r2", "t2"), owner("a", ttl=60))
    (holder,) = control.holders()
    assert (holder.owner_id, holder.owner_incarnation, holder.runs) == ("process-a", "a", 2)
    assert 50 < holder.seconds_left <= 60
    assert holder.agents == ("agent",)
    for agent in ("z", "B"):
        control.admit(new(f"run-of-{agent}", agent_id=agent), owner("a", ttl=10))
    control.admit(new("r3", "t3"), owner("b", ttl=10))
    assert [(h.owner_id, h.runs, h.agents) for h in control.holders()] == [
        ("process-a", 4, ("B", "agent", "z")),
        ("process-b", 1, ("agent",)),
    ]


async def test_open_runs_are_counted(control: ControlDatabase) -> None:
    lease = control.admit(new("r1", "t1"), owner("a"))
    control.admit(new("r2", "t2"), owner("b"))
    control.hand_over("b")
    assert await control.acount_open() == 2
    assert control.end(lease, "r1", "returned")
    assert control.count_open() == 1


def test_a_clock_that_steps_back_does_not_change_which_run_is_the_newest(
    control: ControlDatabase,
) -> None:
    control.end(control.admit(new("r1"), owner("a")), "r1", "returned")
    with control._engine.begin() as connection:
        later = "UPDATE peerctx_runs SET admitted_at = admitted_at + 3600000000"
        connection.exec_driver_sql(later)
    lease = control.admit(new("r2"), owner("a"))
    newest = control.newest_run("agent", "t")
    assert newest is not None
    assert (newest.run_id, newest.epoch) == ("r2", lease.epoch)


def test_a_run_id_of_another_is_not_taken_and_its_run_stays_as_it_was(
    control: ControlDatabase,
) -> None:
    control.admit(new("victim", "t9", agent_id="billing"), owner("a"))
    before = control.run("victim")
    for thread, agent in (("t", "agent"), ("t9", "agent"), ("t", "billing")):
        for begin in (control.admit, control.reopen):
            with pytest.raises(ThreadBusyError, match="the run id 'victim' is another's"):
                begin(new("victim", thread, agent_id=agent, given=given(b"evil")), owner("b"))
        assert control.lease_of(agent, thread) is None, "nothing was written"
    lease = control.admit(new("mine"), owner("b"))
    assert before is not None
    assert lease.epoch == before.epoch
    control.end(lease, "victim", "returned")
    assert control.run("victim") == before
    control.admit(new("another", "t2"), owner("b"))
    assert not control.withdraw("agent", "t2", "victim", "b")
    assert control.run("victim") == before


def test_a_run_that_is_begun_anew_under_its_id_is_open_again(control: ControlDatabase) -> None:
    control.end(control.admit(new(), owner("a")), "r1", "raised")
    lease = control.admit(new(), owner("b"))
    run = control.run("r1")
    assert run is not None
    assert (run.is_open, run.epoch, run.owner_incarnation) == (True, 2, "b")
    assert control.end(lease, "r1", "returned")
    assert control.run("r1").end_kind == "returned"  # type: ignore[union-attr]


def test_of_twenty_admissions_at_once_one_succeeds(url: str, control: ControlDatabase) -> None:
    del control
    together = threading.Barrier(20)

    def admit(number: int) -> bool:
        together.wait(30)
        try:
            everybody[number % 4].admit(new(f"r{number}"), owner(f"life-{number}"))
        except ThreadBusyError:
            return False
        return True

    everybody = [ControlDatabase(url, timeout_seconds=20) for _ in range(4)]
    with ThreadPoolExecutor(20) as threads:
        won = list(threads.map(admit, range(20)))
    assert sum(won) == 1
    for each in everybody:
        each.close()
