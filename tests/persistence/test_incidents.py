"""One recoverer a failure, and one row that says how it went."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from persistence.test_runs import given, new, owner

from langgraph_peerctx.errors import ConfigurationError, ProtocolError
from langgraph_peerctx.persistence import schema
from langgraph_peerctx.persistence.incidents import ControlDatabase, Recovery, Settlement
from langgraph_peerctx.persistence.runs import LostRun


@pytest.fixture
def control(url: str) -> Iterator[ControlDatabase]:
    with ControlDatabase(url) as opened:
        yield opened


def lost(control: ControlDatabase, who: str = "a") -> LostRun:
    """Lose a run: its process is known to have died."""
    control.admit(new(), owner(who))
    (found,) = control.lost_runs([who])
    return found


def begin(control: ControlDatabase, found: LostRun, who: str = "r", **more: Any) -> Recovery | None:
    options: dict[str, Any] = {"died": True, "max_attempts": 3}
    return control.begin_recovery(found, owner(who), **(options | more))


def begun(control: ControlDatabase, found: LostRun, who: str = "r", **more: Any) -> Recovery:
    recovery = begin(control, found, who, **more)
    assert recovery is not None
    return recovery


DONE = Settlement(status="recovered", end_kind="returned", result={"status": "resumed"})
AGAIN = Settlement(status="open", end_kind="handed_over", error="boom", result={"why": "boom"})


def test_a_recovery_takes_thread_and_run_and_opens_an_incident(control: ControlDatabase) -> None:
    recovery = begun(control, lost(control))
    assert (recovery.lease.epoch, recovery.lease.owner_incarnation) == (2, "r")
    assert recovery.run.inputs == (given(),)
    incident = recovery.incident
    assert (incident.status, incident.attempts, incident.epoch) == ("recovering", 1, 2)
    assert (incident.dead_incarnation, incident.lost_epoch, incident.run_id) == ("a", 1, "r1")
    assert incident.recoverer_id == "process-r"
    run = control.run("r1")
    assert run is not None
    assert (run.epoch, run.owner_incarnation, run.is_open) == (2, "r", True)


def test_an_unexpired_lease_is_not_taken_without_a_death(control: ControlDatabase) -> None:
    found = lost(control)
    assert begin(control, found, died=False) is None
    assert control.all_incidents() == []


def test_the_second_recoverer_gets_nothing_and_changes_nothing(control: ControlDatabase) -> None:
    found = lost(control)
    begun(control, found)
    assert begin(control, found, "s") is None
    assert begin(control, found, "r") is None, "not even the first one again"
    assert begin(control, found, "r", holds=True) is None
    (incident,) = control.all_incidents()
    assert (incident.attempts, incident.recoverer_id) == (1, "process-r")


def test_a_settled_recovery_ends_run_lease_and_incident_at_once(control: ControlDatabase) -> None:
    recovery = begun(control, lost(control))
    assert control.settle(recovery, DONE)
    run, lease = control.run("r1"), control.lease_of("agent", "t")
    assert run is not None
    assert lease is not None
    assert (run.end_kind, lease.is_free) == ("returned", True)
    incident = control.incident_of("agent", "t")
    assert incident is not None
    assert (incident.status, incident.result) == ("recovered", {"status": "resumed"})
    assert control.lost_runs(["a", "r"]) == []


def test_a_settlement_whose_answer_was_lost_is_made_again(control: ControlDatabase) -> None:
    recovery = begun(control, lost(control))
    assert control.settle(recovery, DONE)
    assert control.settle(recovery, DONE)
    assert not control.settle(recovery, AGAIN)


@pytest.mark.parametrize("state", [b"\xff", {"deep": None}, {"text": "a\0b\ud800"}, float("nan")])
def test_whatever_a_state_holds_its_recovery_is_settled(
    control: ControlDatabase, state: Any
) -> None:
    if state == {"deep": None}:
        for _ in range(2_000):
            state = {"deep": state}
    recovery = begun(control, lost(control))
    how = Settlement(status="recovered", end_kind="returned", result={"final_state": state})
    assert control.settle(recovery, how)
    incident = control.incident_of("agent", "t")
    assert incident is not None
    assert incident.status == "recovered"


def test_our_own_claim_of_which_we_do_not_know_is_lost_when_it_has_expired(
    control: ControlDatabase,
) -> None:
    found = lost(control)
    assert begin(control, found, "r")
    (ours,) = control.lost_runs(["r"])
    assert begin(control, ours, "r") is None, "it has not expired"
    expire(control)
    (ours,) = control.lost_runs()
    again = begun(control, ours, "r", died=False)
    assert (again.lease.epoch, again.incident.attempts) == (3, 2)


def expire(control: ControlDatabase) -> None:
    table = schema.leases
    control._work(lambda c: c.execute(table.update().values(expires_at=0)))


def test_who_was_superseded_settles_nothing(control: ControlDatabase) -> None:
    recovery = begun(control, lost(control))
    (again,) = control.lost_runs(["r"])
    begun(control, again, "s")
    assert not control.settle(recovery, DONE)
    incident = control.incident_of("agent", "t")
    assert incident is not None
    assert (incident.status, incident.recoverer_id) == ("recovering", "process-s")


def test_a_recoverer_that_dies_costs_an_attempt_of_the_same_incident(
    control: ControlDatabase,
) -> None:
    """A workflow that kills whoever runs it must end somewhere."""
    found = lost(control)
    for number, who in enumerate(("r", "s", "u"), start=1):
        recovery = begun(control, found, who)
        assert recovery.incident.attempts == number
        (found,) = control.lost_runs([who])
    over = begun(control, found, "v")
    assert over.is_over
    assert (over.incident.status, over.incident.attempts) == ("dead_letter", 3)
    assert len(control.all_incidents()) == 1
    assert control.lost_runs(["v"]) == []
    lease = control.lease_of("agent", "t")
    assert lease is not None
    assert lease.is_free


def test_a_failed_attempt_waits_for_the_next(control: ControlDatabase) -> None:
    recovery = begun(control, lost(control))
    later = Settlement(status="open", end_kind="handed_over", retry_seconds=2.0, error="boom")
    assert control.settle(recovery, later)
    assert control.lost_runs() == []
    time.sleep(2.1)
    (found,) = control.lost_runs()
    assert found.owner_id is None
    again = begun(control, found, "s", died=False)
    assert (again.incident.incident_id, again.incident.attempts) == (
        recovery.incident.incident_id,
        2,
    )


def test_it_is_not_begun_before_its_time_whoever_knows_of_it(control: ControlDatabase) -> None:
    recovery = begun(control, lost(control))
    control.settle(recovery, Settlement(status="open", end_kind="handed_over", retry_seconds=60))
    found = LostRun(
        agent_id="agent", thread_id="t", run_id="r1", workflow=None, epoch=2,
        owner_id=None, owner_incarnation=None, seconds_left=-1,
    )  # fmt: skip
    assert begin(control, found, "s") is None


def test_an_outage_costs_no_attempt(control: ControlDatabase) -> None:
    recovery = begun(control, lost(control))
    control.settle(recovery, Settlement(status="open", end_kind="handed_over", counts=False))
    incident = control.incident_of("agent", "t")
    assert incident is not None
    assert incident.attempts == 0


def test_a_question_stops_detection_until_it_is_answered(control: ControlDatabase) -> None:
    recovery = begun(control, lost(control))
    asks = Settlement(
        status="waiting_for_human", end_kind="handed_over", question={"question": "resume?"}
    )
    control.settle(recovery, asks)
    assert control.lost_runs(["r"]) == []
    waiting = control.incident(recovery.incident.incident_id)
    assert waiting is not None
    assert (waiting.status, waiting.question) == ("waiting_for_human", {"question": "resume?"})
    with pytest.raises(ConfigurationError, match="neither a dead letter"):
        control.redrive(waiting.incident_id)

    with pytest.raises(ProtocolError):
        control.answer(waiting.incident_id, object())
    answered = control.answer(waiting.incident_id, True)  # noqa: FBT003 - the answer
    assert (answered.status, (answered.answer or {})["value"]) == ("open", True)
    (found,) = control.lost_runs()
    again = begun(control, found, "s", died=False)
    assert again.incident.answer == answered.answer
    with pytest.raises(ConfigurationError, match="not waiting for an answer: it is recovering"):
        control.answer(waiting.incident_id, True)  # noqa: FBT003 - the answer
    control.settle(again, DONE)
    done = control.incident(waiting.incident_id)
    assert done is not None
    assert (done.answer, done.question) == (None, None)


def test_a_dead_letter_can_be_redriven_with_all_its_attempts(control: ControlDatabase) -> None:
    recovery = begun(control, lost(control))
    control.settle(recovery, Settlement(status="dead_letter", end_kind="handed_over"))
    assert control.lost_runs() == []
    redriven = control.redrive(recovery.incident.incident_id)
    assert (redriven.status, redriven.attempts) == ("open", 0)
    assert [found.run_id for found in control.lost_runs()] == ["r1"]


def test_incidents_are_found_by_a_beginning_of_their_id(control: ControlDatabase) -> None:
    recovery = begun(control, lost(control))
    incident_id = recovery.incident.incident_id
    assert control.incident(incident_id) == recovery.incident
    assert control.incident(incident_id[:8]) == recovery.incident
    for unknown in ("zz", "%", "_" * len(incident_id)):
        assert control.incident(unknown) is None
        with pytest.raises(ConfigurationError, match="no incident"):
            control.redrive(unknown)


def test_what_nobody_here_can_recover_is_seen(control: ControlDatabase) -> None:
    found = lost(control)
    control.note(found, {"status": "unknown_workflow"}, again_seconds=2.0)
    assert control.lost_runs(["a"]) == [], "for a while it stands in nobody's way"
    (incident,) = control.all_incidents(status="open")
    assert (incident.attempts, incident.result) == (0, {"status": "unknown_workflow"})
    assert control.all_incidents(status="recovered") == []
    time.sleep(2.1)
    assert begun(control, found).incident.incident_id == incident.incident_id


def test_a_run_that_fails_a_second_time_is_a_second_incident(control: ControlDatabase) -> None:
    control.settle(begun(control, lost(control)), DONE)
    control.reopen(new(given=given(b"yes")), owner("b"))
    (found,) = control.lost_runs(["b"])
    begun(control, found, "s")
    assert [i.status for i in control.all_incidents()] == ["recovering", "recovered"]


def test_a_stale_finding_does_not_touch_what_came_since(control: ControlDatabase) -> None:
    """Between the look and the claim somebody else recovered it, and the next run began."""
    stale = lost(control)
    control.settle(begun(control, stale), DONE)
    control.admit(new("r2"), owner("r"))
    assert begin(control, stale, "r") is None
    assert begin(control, stale, "s") is None
    lease = control.lease_of("agent", "t")
    assert lease is not None
    assert (lease.run_id, lease.owner_incarnation, lease.epoch) == ("r2", "r", 3)


def test_of_twenty_recoverers_at_once_one_begins(url: str, control: ControlDatabase) -> None:
    found = lost(control)
    together = threading.Barrier(20)

    def recover(number: int) -> bool:
        together.wait(30)
        return begin(everybody[number % 4], found, f"life-{number}") is not None

    everybody = [ControlDatabase(url, timeout_seconds=20) for _ in range(4)]
    with ThreadPoolExecutor(20) as threads:
        assert sum(threads.map(recover, range(20))) == 1
    for each in everybody:
        each.close()
    (incident,) = control.all_incidents()
    assert incident.attempts == 1


def waiting_again(control: ControlDatabase) -> Recovery:
    """A recovery that waits for a human, and looks once more whether its peer is back."""
    asks = Settlement(
        status="waiting_for_human",
        end_kind="handed_over",
        question={"question": "first?", "question_id": "q1"},
        retry_seconds=0.0,
    )
    control.settle(begun(control, lost(control)), asks)
    (found,) = control.lost_runs()
    return begun(control, found, "s", died=False)


def asking(question_id: str) -> Settlement:
    return Settlement(
        status="waiting_for_human",
        end_kind="handed_over",
        question={"question": "again?", "question_id": question_id},
        retry_seconds=60.0,
    )


def test_who_waits_for_a_human_is_looked_at_again_by_itself(control: ControlDatabase) -> None:
    again = waiting_again(control)
    assert again.incident.question is not None
    assert [i.status for i in control.all_incidents(status="waiting_for_human")] == ["recovering"]
    control.settle(again, asking("q1"))
    assert control.lost_runs() == [], "not before its time"


def test_an_answer_that_comes_meanwhile_is_kept_for_its_question(control: ControlDatabase) -> None:
    again = waiting_again(control)
    control.answer(again.incident.incident_id, True)  # noqa: FBT003 - the answer
    control.settle(again, asking("q1"))
    found = control.incident(again.incident.incident_id)
    assert found is not None
    assert (found.status, found.answer) == ("open", {"value": True, "question_id": "q1"})


def test_an_answer_to_a_question_that_is_over_is_dropped(control: ControlDatabase) -> None:
    again = waiting_again(control)
    control.answer(again.incident.incident_id, True)  # noqa: FBT003 - the answer
    control.settle(again, asking("q2"))
    found = control.incident(again.incident.incident_id)
    assert found is not None
    assert (found.status, found.answer) == ("waiting_for_human", None)
    assert found.question == {"question": "again?", "question_id": "q2"}
