"""One owner a thread, on SQLite and on PostgreSQL, by the database's clock."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langgraph_peerctx.errors import ConfigurationError, ProtocolError
from langgraph_peerctx.persistence import leases as leases_module
from langgraph_peerctx.persistence.leases import Leases


@pytest.fixture
def leases(url: str) -> Iterator[Leases]:
    with Leases(url) as opened:
        yield opened


def claim(leases: Leases, who: str, thread: str = "t", ttl: float = 60, **more: Any) -> Any:
    return leases.claim(
        "agent", thread, owner_id=f"process-{who}", incarnation=who, ttl_seconds=ttl, **more
    )


def test_the_first_owner_has_epoch_one_and_nobody_else_gets_it(leases: Leases) -> None:
    lease = claim(leases, "a", run_id="run-1")
    assert (lease.epoch, lease.owner_id, lease.owner_incarnation) == (1, "process-a", "a")
    assert lease.run_id == "run-1"
    assert 50 < lease.seconds_left <= 60
    assert not lease.is_free
    assert claim(leases, "b") is None
    found = leases.lease_of("agent", "t")
    assert found is not None
    assert (found.owner_incarnation, found.epoch) == ("a", 1)


def test_claimed_again_by_its_owner_it_keeps_its_epoch(leases: Leases) -> None:
    """A claim whose answer was lost is made again."""
    assert claim(leases, "a", ttl=1).epoch == 1
    again = claim(leases, "a", run_id="run-2")
    assert (again.epoch, again.run_id) == (1, "run-2")
    assert again.seconds_left > 50


def test_what_was_given_back_is_free_and_the_epoch_rises(leases: Leases) -> None:
    claim(leases, "a")
    assert leases.release("agent", "t", incarnation="a")
    assert not leases.release("agent", "t", incarnation="a")
    found = leases.lease_of("agent", "t")
    assert found is not None
    assert found.is_free
    assert found.owner_id is None
    assert claim(leases, "b").epoch == 2
    assert not leases.release("agent", "t", incarnation="a"), "it is another's by now"


def test_what_has_expired_is_free(leases: Leases) -> None:
    claim(leases, "a")
    assert [lease.owner_incarnation for lease in leases.expired_leases()] == []
    claim(leases, "a", ttl=0.05)
    time.sleep(0.1)
    assert [lease.owner_incarnation for lease in leases.expired_leases()] == ["a"]
    assert claim(leases, "b").epoch == 2
    assert leases.expired_leases() == []


def test_an_owner_that_comes_back_to_its_expired_lease_goes_on(leases: Leases) -> None:
    claim(leases, "a", ttl=0.05)
    time.sleep(0.1)
    (renewed,) = leases.renew("a", [("agent", "t")], ttl_seconds=60)
    assert (renewed.epoch, renewed.is_free) == (1, False)
    assert claim(leases, "b") is None


def test_an_unexpired_lease_is_taken_only_from_the_incarnation_that_died(leases: Leases) -> None:
    claim(leases, "a")
    assert claim(leases, "b", dead_incarnation="another") is None
    taken = claim(leases, "b", dead_incarnation="a")
    assert (taken.epoch, taken.owner_incarnation) == (2, "b")
    assert claim(leases, "c", dead_incarnation="a") is None, "it has changed hands"


def test_all_that_one_process_owns_is_renewed_at_once_and_nothing_else(leases: Leases) -> None:
    for number in range(5):
        claim(leases, "a", f"t{number}", ttl=1)
    claim(leases, "b", "other", ttl=1)
    claim(leases, "c", "t4", dead_incarnation="a")
    asked = [("agent", thread) for thread in ("t0", "t1", "t2", "t4", "other", "nobody's")]
    renewed = leases.renew("a", asked, ttl_seconds=60)
    assert {lease.thread_id for lease in renewed} == {"t0", "t1", "t2"}
    assert leases.lease_of("agent", "t3").seconds_left < 1, "nobody asked for it"  # type: ignore[union-attr]
    assert all(lease.seconds_left > 50 for lease in renewed)
    (other,) = leases.leases_owned_by("b")
    assert other.seconds_left < 1
    assert len(leases.leases_owned_by("a")) == 4


def test_of_twenty_who_claim_at_once_one_succeeds(url: str, leases: Leases) -> None:
    del leases  # the schema is there
    everybody = [Leases(url, timeout_seconds=20) for _ in range(4)]
    with ThreadPoolExecutor(20) as threads:
        for thread in ("x", "y", "z"):
            won = list(
                threads.map(lambda n, t=thread: claim(everybody[n % 4], f"life-{n}", t), range(20))
            )
            assert sum(lease is not None for lease in won) == 1
    for each in everybody:
        each.close()


def test_of_twenty_who_take_from_the_dead_one_succeeds(url: str, leases: Leases) -> None:
    claim(leases, "dead")
    everybody = [Leases(url, timeout_seconds=20) for _ in range(4)]
    with ThreadPoolExecutor(20) as threads:
        won = list(
            threads.map(
                lambda n: claim(everybody[n % 4], f"life-{n}", dead_incarnation="dead"), range(20)
            )
        )
    assert [lease.epoch for lease in won if lease is not None] == [2]
    for each in everybody:
        each.close()


def test_our_own_clock_decides_nothing(leases: Leases, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(leases, "a")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    monkeypatch.setattr(time, "time_ns", lambda: 4 * 10**18)
    assert claim(leases, "b") is None
    assert leases.expired_leases() == []


def test_a_checkpointer_finds_leases_by_thread_alone(leases: Leases) -> None:
    claim(leases, "a")
    leases.claim("other", "t", owner_id="p", incarnation="b", ttl_seconds=60)
    assert [lease.agent_id for lease in leases.leases_of_thread("t")] == ["agent", "other"]
    assert leases.leases_of_thread("nobody's") == []
    assert leases.lease_of("agent", "nobody's") is None


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"ttl_seconds": 0}, ConfigurationError),
        ({"ttl_seconds": float("nan")}, ConfigurationError),
        ({"ttl_seconds": 1e9}, ConfigurationError),
        ({"owner_id": "../x"}, ProtocolError),
    ],
)
def test_what_cannot_be_right_is_refused(
    leases: Leases, changes: dict[str, Any], error: type[Exception]
) -> None:
    fields: dict[str, Any] = {"owner_id": "p", "incarnation": "a", "ttl_seconds": 1.0}
    with pytest.raises(error):
        leases.claim("agent", "t", **(fields | changes))
    assert leases.lease_of("agent", "t") is None


async def test_the_async_twins_do_the_same(leases: Leases) -> None:
    lease = await leases.aclaim("agent", "t", owner_id="p", incarnation="a", ttl_seconds=60.0)
    assert lease is not None
    assert await leases.arenew("a", [("agent", "t")], ttl_seconds=60)
    assert await leases.alease_of("agent", "t")
    assert await leases.aleases_of_thread("t")
    assert await leases.aleases_owned_by("a")
    assert await leases.aexpired_leases() == []
    assert await leases.arelease("agent", "t", incarnation="a")


WHAT = st.lists(
    st.tuples(
        st.sampled_from(["claim", "take", "renew", "release", "expire"]),
        st.sampled_from("abc"),
        st.sampled_from("abc"),
    ),
    max_size=25,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WHAT)
def test_an_epoch_never_falls_and_rises_with_each_new_owner(
    leases: Leases, steps: list[tuple[str, str, str]]
) -> None:
    """Whatever happens, in whatever order; `owner` and `free` are what we think of it."""
    thread = uuid4()  # examples share a database
    owner, free, epoch = None, True, 0
    for what, who, other in steps:
        if what in {"claim", "take"}:
            dead = other if what == "take" else None
            lease = claim(leases, who, str(thread), dead_incarnation=dead)
            may = free or owner in (who, dead)
            assert (lease is not None) == may
            if lease is not None:
                epoch += owner != who
                owner, free = who, False
                assert lease.epoch == epoch
        elif what == "renew":
            mine = leases.renew(who, [("agent", str(thread))], ttl_seconds=60)
            assert bool(mine) == (owner == who)
            free = free and owner != who
        elif what == "release":
            assert leases.release("agent", str(thread), incarnation=who) == (owner == who)
            if owner == who:
                owner, free = None, True
        elif owner is not None:  # time passes
            expire(leases, str(thread))
            free = True


def expire(leases: Leases, thread: str) -> None:
    table = leases_module.leases
    leases._work(
        lambda c: c.execute(table.update().where(table.c.thread_id == thread).values(expires_at=0))
    )
