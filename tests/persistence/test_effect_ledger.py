"""Effects on both databases: meant under a lease, concluded once, settled by whoever knows."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from langgraph_peerctx.errors import StaleOwnerError
from langgraph_peerctx.persistence.effect_ledger import NewEffect, Standing, unsettled
from langgraph_peerctx.persistence.incidents import ControlDatabase

NEW = NewEffect(
    agent_id="agent",
    thread_id="t",
    run_id="r1",
    position="order@1",
    name="order",
    peer_id="inventory-agent",
)


@pytest.fixture
def control(url: str) -> Iterator[ControlDatabase]:
    with ControlDatabase(url) as opened:
        yield opened


def claimed(control: ControlDatabase, incarnation: str = "one", dead: str | None = None) -> Any:
    lease = control.claim(
        NEW.agent_id,
        NEW.thread_id,
        owner_id="process",
        incarnation=incarnation,
        ttl_seconds=60,
        dead_incarnation=dead,
    )
    assert lease is not None
    return {"epoch": lease.epoch, "incarnation": incarnation}


def test_an_intent_is_written_once_and_found_again_in_doubt(control: ControlDatabase) -> None:
    ours = claimed(control)
    begun = control.intend(NEW, **ours)
    assert begun.has_begun
    assert (begun.effect.status, begun.effect.attempt) == ("intent", 1)
    assert abs(begun.effect.intent_at - datetime.now(UTC)) < timedelta(seconds=30)
    again = control.intend(NEW, **ours)
    assert again == Standing(effect=begun.effect, has_begun=False)
    assert control.effect(NEW) == begun.effect


def test_an_outcome_is_returned_as_it_was(control: ControlDatabase) -> None:
    ours = claimed(control)
    for number, outcome in enumerate([None, 0, False, "", {"a": [1, "ä"]}, [], 1.5]):
        new = replace(NEW, name=f"order-{number}")
        control.conclude(control.intend(new, **ours).effect, outcome)
        found = control.intend(new, **ours)
        assert (found.has_begun, found.effect.status) == (False, "done")
        assert found.effect.outcome == outcome
        assert type(found.effect.outcome) is type(outcome)
        assert found.effect.source == "own"


def test_nothing_is_meant_without_the_lease(control: ControlDatabase) -> None:
    with pytest.raises(StaleOwnerError):
        control.intend(NEW, epoch=1, incarnation="one")
    ours = claimed(control)
    for other in ({**ours, "epoch": 2}, {**ours, "incarnation": "two"}):
        with pytest.raises(StaleOwnerError, match="was not begun"):
            control.intend(NEW, **other)
    assert control.effect(NEW) is None
    successor = claimed(control, "two", dead="one")
    with pytest.raises(StaleOwnerError):
        control.intend(NEW, **ours)
    assert control.intend(NEW, **successor).has_begun


def test_what_was_not_done_is_meant_again(control: ControlDatabase) -> None:
    ours = claimed(control)
    first = control.intend(NEW, **ours).effect
    control.refute(first)
    second = control.intend(NEW, **ours)
    assert (second.has_begun, second.effect.attempt) == (True, 2)
    control.conclude(first, "late")  # of the attempt before
    assert unsettled([control.effect(NEW)]) == [second.effect]  # type: ignore[list-item]


def test_an_attempt_that_does_not_count_is_followed_by_one_more_and_by_no_other(
    control: ControlDatabase,
) -> None:
    ours = claimed(control)
    control.intend(NEW, **ours)
    assert control.intend(NEW, over=1, **ours).effect.attempt == 2
    assert not control.intend(NEW, over=1, **ours).has_begun


def test_what_we_know_of_a_second_attempt_is_no_word_on_a_first_in_doubt(
    control: ControlDatabase,
) -> None:
    ours = claimed(control)
    control.intend(NEW, **ours)
    second = control.intend(NEW, over=1, **ours).effect
    assert second.is_retried
    assert control.refute(second) == second, "the first may have happened"
    assert not control.intend(NEW, **ours).has_begun
    third = control.intend(NEW, over=2, **ours).effect
    assert third.is_retried
    # Its peer's word is on all of them.
    assert control.settle_effect(third, "not_seen", "peer").status == "not_done"
    fourth = control.intend(NEW, **ours).effect
    assert not fourth.is_retried
    assert control.refute(fourth).status == "not_done"


def test_who_could_not_tell_is_known(control: ControlDatabase) -> None:
    ours = claimed(control)
    first = control.intend(NEW, **ours).effect
    assert first.unknown_to is None
    assert control.settle_effect(first, "cannot_tell", "peer").unknown_to == "peer"
    assert control.settle_effect(first, "cannot_tell", "check").unknown_to == "check"
    again = control.settle_effect(first, "cannot_tell", "peer")
    assert again.unknown_to == "check", "who has looked in vain, has"
    assert control.intend(NEW, **ours).effect == again
    second = control.intend(NEW, over=1, **ours).effect
    assert (second.unknown_at, second.unknown_to) == (None, None)


def test_the_terms_of_what_is_in_doubt_are_brought_up_to_date(control: ControlDatabase) -> None:
    ours = claimed(control)
    bare = replace(NEW, peer_id=None, if_unknown="retry")
    first = control.intend(bare, **ours).effect
    found = control.intend(replace(NEW, if_unknown="fail", has_check=True), **ours)
    assert not found.has_begun
    assert found.effect == replace(first, peer_id=NEW.peer_id, if_unknown="fail", has_check=True)
    assert control.effect(NEW) == found.effect
    # Only whom it was sent to can tell.
    moved = control.intend(replace(NEW, peer_id="another-agent"), **ours).effect
    assert (moved.peer_id, moved.if_unknown) == (NEW.peer_id, "ask")
    control.conclude(first, "done")
    assert control.intend(bare, **ours).effect.if_unknown == "ask", "that is over"


def test_whoever_settles_first_settles_it(control: ControlDatabase) -> None:
    ours = claimed(control)
    first = control.intend(NEW, **ours).effect
    unknown = control.settle_effect(first, "cannot_tell", "peer")
    assert (unknown.status, unknown.unknown_at is not None) == ("intent", True)
    seen = control.settle_effect(unknown, "seen", "peer", {"number": 1})
    assert (seen.status, seen.source, seen.outcome) == ("done", "peer", {"number": 1})
    assert control.settle_effect(first, "not_seen", "human") == seen
    control.conclude(first, "mine")
    assert control.effect(NEW) == seen


def test_a_doubted_ledger_begins_nothing_that_it_does_not_know(control: ControlDatabase) -> None:
    ours, since = claimed(control), datetime(2026, 3, 4, 5, tzinfo=UTC)
    found = control.intend(NEW, doubted_since=since, **ours)
    assert (found.has_begun, found.effect.status) == (False, "intent")
    assert found.effect.intent_at == since
    control.settle_effect(found.effect, "not_seen", "peer")
    assert control.intend(NEW, doubted_since=since, **ours).has_begun


def test_of_any_number_at_once_one_begins(control: ControlDatabase) -> None:
    ours = claimed(control)
    with ThreadPoolExecutor(6) as threads:
        for number in range(20):
            new = replace(NEW, name=f"order-{number}")
            doing = [threads.submit(control.intend, new, **ours) for _ in range(6)]
            assert sum(done.result().has_begun for done in doing) == 1


def test_a_run_has_its_own_effects_and_those_of_its_thread(control: ControlDatabase) -> None:
    ours = claimed(control)
    control.intend(NEW, **ours)
    control.intend(replace(NEW, run_id="r2"), **ours)
    shared = replace(NEW, name="shared", scope="thread")
    control.intend(shared, **ours)
    assert not control.intend(replace(shared, run_id="r2", position="n@9"), **ours).has_begun
    names = sorted(effect.name for effect in control.effects_of("agent", "t", "r2"))
    assert names == ["order", "shared"]
    assert control.effects_of("agent", "another", "r1") == []


def test_what_is_in_doubt_in_a_thread_is_of_the_run_that_came_to_it_last(
    control: ControlDatabase,
) -> None:
    ours, shared = claimed(control), replace(NEW, scope="thread")
    later = replace(shared, run_id="r2", position="n@9")
    first = control.intend(shared, **ours).effect
    assert control.intend(later, **ours).effect == replace(first, run_id="r2", position="n@9")
    assert control.effects_of("agent", "t", "r2") == [control.effect(shared)]
    again = control.intend(replace(shared, run_id="r3", position="n@3"), over=1, **ours).effect
    assert (again.run_id, again.position, again.key) == ("r3", "n@3", first.key)
    # Whether a human can put it right depends on where the run comes to it.
    told = control.settle_effect(again, "seen", "human")
    assert control.intend(later, **ours).effect == replace(told, run_id="r2", position="n@9")
    control.amend(told, "not_seen")
    done = control.intend(later, **ours).effect
    control.conclude(done, 1)
    assert control.intend(shared, **ours).effect.run_id == "r2", "whose it was is on record"


def test_a_human_is_put_right_and_nobody_else(control: ControlDatabase) -> None:
    ours = claimed(control)
    first = control.intend(NEW, **ours).effect
    human = control.settle_effect(first, "seen", "human", 1)
    control.amend(human, "seen", 2)
    assert control.effect(NEW).outcome == 2  # type: ignore[union-attr]
    control.amend(human, "not_seen")
    second = control.intend(NEW, **ours).effect
    control.amend(human, "seen", 3)
    assert control.effect(NEW) == second, "another attempt has begun"


def test_keys_differ_wherever_place_or_name_do_and_nowhere_else() -> None:
    others = [
        replace(NEW, name="order2"),
        replace(NEW, position="order@2"),
        replace(NEW, run_id="r2"),
        replace(NEW, thread_id="t2"),
        replace(NEW, scope="thread"),
        replace(NEW, run_id="r1order@1", position=""),
    ]
    keys = {new.key for new in [NEW, *others]}
    assert len(keys) == 1 + len(others)
    assert NEW.key == replace(NEW, if_unknown="retry", has_check=True, peer_id=None).key
    assert NEW.key.startswith("order@")
