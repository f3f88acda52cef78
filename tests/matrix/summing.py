"""What a run adds up to: counts by verdict, and times."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from matrix.judging import VERDICTS
from matrix.trading import SYSTEMS


def summary(found: dict[str, Any]) -> str:
    """Return a run's counts and times, for a terminal."""
    lines = [f"{len(found['kills'])} kills in {found['seconds']} s, seed {found['seed']}"]
    for system in SYSTEMS:
        kills = of_system(found, system)
        counts = verdicts(kills)
        lines.append(f"{system}: " + ", ".join(f"{n} {v}" for v, n in counts.items() if n))
        for name, row in times(kills).items():
            lines.append(f"  {name}: " + ", ".join(f"{k} {v:.0f} ms" for k, v in row.items()))
    return "\n".join(lines)


def of_system(found: dict[str, Any], system: str) -> list[dict[str, Any]]:
    return [kill for kill in found["kills"] if kill["system"] == system]


def verdicts(kills: list[dict[str, Any]]) -> dict[str, int]:
    """Return how many kills ended in each way, in the order of the verdicts."""
    counts = Counter(kill["verdict"] for kill in kills)
    return {verdict: counts[verdict] for verdict in VERDICTS}


def times(kills: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return milliseconds from the kill to known, resumed and ended, where all was there.

    Only kills whose peer stayed alive and whose stores were kept: elsewhere the time is that of
    waiting for what is not there.
    """
    ended = [
        kill
        for kill in kills
        if kill["verdict"] == "as uninterrupted"
        and (kill["cell"]["peer"], kill["cell"]["store"]) == ("alive", "kept")
    ]
    stages: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "known": lambda kill: kill["ending"]["known_at"],
        "resumed": lambda kill: kill["resumed_at"],
        "ended": lambda kill: kill["ending"]["ended_at"],
    }
    rows = {}
    for name, moment in stages.items():
        taken = sorted(
            1_000 * (at - kill["killed_at"]) for kill in ended if (at := moment(kill)) is not None
        )
        if taken:
            rows[name] = {
                "p50": taken[len(taken) // 2],
                "p90": taken[int(len(taken) * 0.9)],
                "max": taken[-1],
            }
    return rows
