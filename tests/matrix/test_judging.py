"""What the matrix would say of a run, and which kills it makes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from matrix.cells import Cell, all_cells, drawn
from matrix.judging import Ending, How, Kill, Uninterrupted, Verdict, judged
from matrix.places import Passed
from matrix.trading import System
from matrix.workflows import EFFECT_KINDS, KINDS, WORKFLOWS, Kind, Place, places_of

PLAIN = Uninterrupted(log=["reserve: done", "book: done"], applied={"reserve": 1, "book": 1})
BOTH = Counter({"reserve": 1, "book": 1})
CALLED = ["between intent and call: reserve"]
KNOWN = [*CALLED, "after the outcome: reserve"]


AFTER_PLAN = Place(kind="after a node", name="after plan", of="plan")


def cell(peer: str = "alive", store: str = "kept", place: Place = AFTER_PLAN) -> Cell:
    return replace(drawn(1, 1)[0], workflow="line", place=place, peer=peer, store=store)


def kill(
    how: How,
    applied: Counter[str] = BOTH,
    *,
    of: Cell | None = None,
    system: System = "peers",
    passed: list[str] = KNOWN,
    log: list[str] = PLAIN.log,
    said: str = "",
    then: Sequence[str] = ("before book",),
    asked_meanwhile: bool = False,
) -> Kill:
    trace = [
        *(Passed(who="agent", at=float(n), place=place) for n, place in enumerate(passed)),
        Passed(who="agent", at=10.0, place="killed"),
        *(Passed(who="supervisor", at=11.0, place=place) for place in then),
    ]
    ending = Ending(
        how=how,
        known_at=10.5,
        ended_at=12.0,
        log=log,
        said=said,
        asked_meanwhile=asked_meanwhile,
    )
    return judged(of or cell(), system, ending, applied=applied, trace=trace, plain=PLAIN)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (kill("ended"), "as uninterrupted"),
        (kill("ended", log=["book: done"]), "ended differently"),
        (kill("ended", Counter({"reserve": 1})), "an effect lost"),
        (kill("ended", Counter({"reserve": 2, "book": 1})), "an effect repeated"),
        (kill("refused", Counter({"reserve": 2}), of=cell("gone")), "an effect repeated"),
        (kill("failed"), "failed"),
        (kill("refused"), "failed"),
        (kill("refused", of=cell("down")), "failed"),
        (kill("refused", Counter(), of=cell("gone")), "waits for its peer"),
        (kill("refused", Counter(), of=cell("gone"), passed=CALLED), "in doubt, not said"),
        (kill("asked", of=cell("gone"), passed=CALLED), "unknowable, surfaced"),
        (kill("asked", of=cell("gone")), "surfaced without need"),
        (kill("asked", passed=CALLED), "surfaced without need"),
        (kill("asked", system="no peers", passed=CALLED), "unknowable, surfaced"),
        (kill("asked", system="no peers"), "surfaced without need"),
    ],
)
def test_a_kill_is_judged_by_what_the_peer_applied_and_a_human_was_asked(
    found: Kill, verdict: Verdict
) -> None:
    assert found.verdict == verdict


LOST = cell("gone", "lost")
ONE = Counter({"reserve": 1})


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (kill("asked", ONE, of=LOST, then=()), "unknowable, surfaced"),
        (kill("asked", ONE, of=LOST, then=["before plan"]), "begun anew"),
        (kill("refused", ONE, of=LOST, then=["between intent and call: book"]), "begun anew"),
        (kill("refused", BOTH, of=LOST, then=()), "begun anew"),
        (kill("refused", Counter({"reserve": 2}), of=LOST), "an effect repeated"),
        (
            kill("asked", ONE, of=LOST, system="no peers", then=["before plan"]),
            "unknowable, surfaced",
        ),
        (kill("refused", ONE, of=LOST, system="langgraph", then=CALLED), "begun anew"),
        (kill("ended", of=cell("alive", "lost"), then=["before plan"]), "as uninterrupted"),
        (kill("refused", ONE, of=cell("gone"), then=["before book"]), "waits for its peer"),
    ],
)
def test_a_run_that_only_a_gone_peer_knew_of_must_not_be_begun_again(
    found: Kill, verdict: Verdict
) -> None:
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("of", "verdict"),
    [
        (cell("alive"), "surfaced without need"),
        (cell("alive", "lost"), "as uninterrupted"),
        (cell("down"), "as uninterrupted"),
        (cell("down", "lost"), "as uninterrupted"),
    ],
)
def test_a_question_that_a_peer_has_answered_itself_was_needless_if_it_was_there(
    of: Cell, verdict: Verdict
) -> None:
    assert kill("ended", of=of, asked_meanwhile=True).verdict == verdict
    assert kill("ended", of=of).verdict == "as uninterrupted"


@pytest.mark.parametrize(
    ("system", "said", "is_right"),
    [
        ("peers", "in_doubt: inventory-agent may remember it", True),
        ("peers", "Did 'reserve' reach it?", True),
        ("peers", "Did 'book' reach it?", False),
        ("peers", "Did 'nonsense' reach it?", False),
        ("no peers", "Did 'book' happen?", True),
        ("no peers", "Did 'nonsense' happen?", False),
        ("no peers", "InDoubtError", False),
    ],
)
def test_with_its_stores_lost_a_question_names_only_what_may_have_been_begun(
    system: System, said: str, *, is_right: bool
) -> None:
    begun = ["before the intent: reserve", *CALLED]
    found = kill("asked", ONE, of=LOST, system=system, passed=begun, said=said, then=())
    assert (found.notes == []) == is_right


def test_the_successor_is_seen_at_its_first_place() -> None:
    assert kill("ended").resumed_at == 11.0


def test_a_question_about_what_was_not_in_doubt_is_noted() -> None:
    right = kill("asked", of=cell("gone"), passed=CALLED, said="Did 'reserve' reach it?")
    wrong = kill("asked", of=cell("gone"), passed=CALLED, said="Did 'book' reach it?")
    assert right.notes == []
    assert wrong.notes == ["a human was asked of ['book'], and in doubt were ['reserve']"]


@pytest.mark.parametrize("kind", EFFECT_KINDS)
def test_where_the_agent_died_it_is_known_what_is_in_doubt(kind: Kind) -> None:
    place = Place(kind=kind, name=f"{kind}: reserve", of="reserve")
    passed = [f"{earlier}: reserve" for earlier in EFFECT_KINDS[: EFFECT_KINDS.index(kind) + 1]]
    is_left = kind in {"between intent and call", "between call and outcome"}
    assert kill("refused", of=cell("gone", place=place), passed=passed).in_doubt == (
        ["reserve"] if is_left else []
    )


def test_of_a_branch_that_was_about_to_write_a_human_may_be_asked_or_not() -> None:
    begun = [*CALLED, "before the intent: book"]
    for said in ("Did 'reserve' reach it?", "Did 'reserve' reach it? Did 'book' reach it?"):
        assert kill("asked", of=cell("gone"), passed=begun, said=said).notes == []
    only = kill("asked", of=cell("gone"), passed=begun, said="Did 'book' reach it?")
    assert len(only.notes) == 1


def test_kills_are_drawn_evenly_and_the_same_again_for_a_seed() -> None:
    cells = drawn(270, seed=7)
    assert cells == drawn(270, seed=7)
    assert cells != drawn(270, seed=8)
    for name in ("workflow", "durability", "peer", "store"):
        counts = Counter(getattr(cell, name) for cell in cells)
        assert len(set(counts.values())) == 1, counts
    kinds = Counter(cell.place.kind for cell in cells)
    assert set(kinds) == set(KINDS)
    assert max(kinds.values()) - min(kinds.values()) <= 12


def test_every_place_of_every_workflow_has_a_name_of_its_own() -> None:
    for workflow in WORKFLOWS:
        names = [place.name for place in places_of(workflow)]
        assert len(set(names)) == len(names)
    assert all_cells() > 2_000
