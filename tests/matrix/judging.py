"""What is said of one kill: from the peers' ledger, the stored state, and what was surfaced."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from matrix.cells import Cell
from matrix.places import Passed
from matrix.trading import System
from matrix.workflows import EFFECT_KINDS, ORDERS, Kind

_CALL: Kind = "between intent and call"
_NAMED = re.compile(r"Did '([^']*)'")
How = Literal["ended", "asked", "refused", "failed"]
Verdict = Literal[
    "as uninterrupted",
    "unknowable, surfaced",
    "waits for its peer",
    "surfaced without need",
    "in doubt, not said",
    "begun anew",
    "failed",
    "ended differently",
    "an effect lost",
    "an effect repeated",
]
VERDICTS: dict[Verdict, str] = {
    "as uninterrupted": "ended with the same state and the same orders as an uninterrupted run",
    "unknowable, surfaced": "an effect in doubt that nobody could tell of was put to a human",
    "waits for its peer": "the peer is gone, nothing is in doubt: the run failed, and stands still",
    "surfaced without need": (
        "a human was asked, if only for a time, of what was not in doubt, or of what a peer that "
        "was there could have told"
    ),
    "in doubt, not said": "the run failed on a gone peer, and an effect in doubt was not mentioned",
    "begun anew": "began again although nobody was left who could tell what it had done",
    "failed": "the run neither ended nor was anything surfaced",
    "ended differently": "ended, with another state",
    "an effect lost": "ended, and an order was never applied",
    "an effect repeated": "an order was applied twice or more",
}
GOOD: tuple[Verdict, ...] = ("as uninterrupted", "unknowable, surfaced", "waits for its peer")


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run ended after the kill, whoever brought it there.

    Attributes:
        how: `asked`: a human is asked of an effect in doubt; `refused`: the peer is not there.
        known_at: When somebody knew of the death, on the wall's clock, in seconds.
        ended_at: When it had ended, or stood still.
        log: What is stored.
        said: What was surfaced, or why it failed.
        attempts: How many recoveries were begun.
        asked_meanwhile: Whether it waited for a human for a time, and went on by itself.
    """

    how: How
    known_at: float
    ended_at: float
    log: list[str] | None = None
    said: str = ""
    attempts: int = 1
    asked_meanwhile: bool = False


@dataclass(frozen=True, kw_only=True)
class Uninterrupted:
    """What a workflow does when nobody disturbs it."""

    log: list[str]
    applied: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill of one system, and what came of it.

    Attributes:
        in_doubt: Orders that the agent left with an intent and no outcome.
        lost: Orders that the run should have placed and has not; only if it ended.
        repeated: Orders that were applied more than once.
    """

    cell: Cell
    system: System
    verdict: Verdict
    ending: Ending
    applied: Mapping[str, int]
    in_doubt: list[str]
    lost: list[str]
    repeated: list[str]
    killed_at: float
    resumed_at: float | None
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def judged(
    cell: Cell,
    system: System,
    ending: Ending,
    *,
    applied: Counter[str],
    trace: Sequence[Passed],
    plain: Uninterrupted,
) -> Kill:
    """Judge one kill; pure."""
    doubt = doubted(cell, trace)
    repeated = sorted(order for order, times in applied.items() if times > 1)
    missing = sorted(set(plain.applied) - set(applied))
    killed_at = next(passed.at for passed in trace if passed.place == "killed")
    later = (passed.at for passed in trace if passed.who != "agent")
    is_anew = _is_begun_anew(cell, system, applied, trace)
    return Kill(
        cell=cell,
        system=system,
        verdict=_verdict(cell, system, ending, doubt, repeated, missing, plain, is_anew=is_anew),
        ending=ending,
        applied=dict(applied),
        in_doubt=doubt.surely,
        lost=missing if ending.how == "ended" else [],
        repeated=repeated,
        killed_at=killed_at,
        resumed_at=next(later, None),
        notes=_notes(cell, system, ending, doubt, trace),
    )


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """Which orders the agent left with an intent and no outcome, in order.

    Attributes:
        surely: It was between the two when it died.
        maybe: It was about to write one of the two down, in a parallel branch.
    """

    surely: list[str]
    maybe: list[str]


def doubted(cell: Cell, trace: Sequence[Passed]) -> Doubt:
    """Read in an agent's trace what it left in doubt; pure.

    With its stores the intents are lost, too: then nobody is left who could name what is in doubt.
    """
    if cell.store == "lost":
        return Doubt(surely=[], maybe=[])
    last = {}
    for passed in trace:
        kind, _, order = passed.place.partition(": ")
        if passed.who == "agent" and order:
            last[order] = kind
    if cell.place.of in last and cell.place.kind in EFFECT_KINDS:  # it died here, and at once
        died = {"before the intent": "after the outcome"}.get(cell.place.kind, cell.place.kind)
        sure = {"between call and outcome": "between intent and call"}
        last[cell.place.of] = sure.get(died, died)
    return Doubt(
        surely=sorted(o for o, kind in last.items() if kind == "between intent and call"),
        maybe=sorted(
            o for o, k in last.items() if k in {"before the intent", "between call and outcome"}
        ),
    )


def _verdict(
    cell: Cell,
    system: System,
    ending: Ending,
    doubt: Doubt,
    repeated: list[str],
    missing: list[str],
    plain: Uninterrupted,
    *,
    is_anew: bool,
) -> Verdict:
    if repeated:
        return "an effect repeated"
    if is_anew:
        return "begun anew"
    if ending.how == "ended":
        return _how_ended(cell, ending, missing, plain)
    if ending.how == "asked":
        return (
            "unknowable, surfaced"
            if _unknowable(cell, system, doubt)
            else ("surfaced without need")
        )
    if ending.how == "refused" and cell.peer == "gone":
        return "in doubt, not said" if doubt.surely else "waits for its peer"
    return "failed"


def _how_ended(cell: Cell, ending: Ending, missing: list[str], plain: Uninterrupted) -> Verdict:
    if missing:
        return "an effect lost"
    if ending.log != plain.log:
        return "ended differently"
    return "surfaced without need" if _is_needless(cell, ending) else "as uninterrupted"


def _unknowable(cell: Cell, system: System, doubt: Doubt) -> bool:
    """Tell whether nobody is left who could tell: the peer is gone, or none was named.

    Where the stores are lost, all that the run was to do is in doubt: who comes later cannot know
    that it was not begun.
    """
    nobody = system == "no peers" or cell.peer == "gone"
    return nobody and (bool(doubt.surely or doubt.maybe) or cell.store == "lost")


def _is_needless(cell: Cell, ending: Ending) -> bool:
    """Tell whether a human was asked although the peer was there all the time, and the intents."""
    return ending.asked_meanwhile and (cell.peer, cell.store) == ("alive", "kept")


def _is_begun_anew(
    cell: Cell, system: System, applied: Mapping[str, int], trace: Sequence[Passed]
) -> bool:
    """Tell whether a run was begun again of which only a peer that is gone could know.

    Where there is nobody to be heard, nodes may run up to the first order: there a human is asked.
    """
    if (cell.peer, cell.store) != ("gone", "lost"):
        return False
    later = [passed for passed in trace if passed.who != "agent"]
    anew = bool(later) if system == "peers" else bool(_orders_at(_CALL, later))
    return anew or not set(applied) <= _orders_at(_CALL, _of_agent(trace))


def _orders_at(kind: Kind, trace: Sequence[Passed]) -> set[str]:
    """Return the orders that were seen at one kind of place."""
    places = [passed.place.partition(": ") for passed in trace]
    return {order for found, _, order in places if found == kind}


def _of_agent(trace: Sequence[Passed]) -> list[Passed]:
    return [passed for passed in trace if passed.who == "agent"]


def _notes(
    cell: Cell, system: System, ending: Ending, doubt: Doubt, trace: Sequence[Passed]
) -> list[str]:
    """Say where a human was asked of anything but what was in doubt."""
    if ending.how != "asked" or system == "langgraph":
        return []
    named = set(_NAMED.findall(ending.said))
    if cell.store == "kept":
        might = {*doubt.surely, *doubt.maybe}
        is_right = set(doubt.surely) <= named <= might
    elif system == "peers":  # its peer is to be heard before any effect is come to
        might = _orders_at("before the intent", _of_agent(trace))
        is_right = named <= might
    else:  # nobody is left who knows how far it came: the first that is come to is asked about
        might = set(ORDERS[cell.workflow])
        is_right = bool(named) and named <= might
    if is_right:
        return []
    return [f"a human was asked of {sorted(named)}, and in doubt were {sorted(might)}"]
