"""Named places that a workflow passes, each written down; at one of them a process ends itself.

A place is written down in one file a kill, by all processes that work on its thread, so that it can
be read afterwards where the agent was, and when its successor began.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

KILLED = "killed"


@dataclass(frozen=True, kw_only=True)
class Deadly:
    """Where a process ends itself, and who ends with it.

    Attributes:
        case: Of which workflow run.
        place: Named as it is passed.
        others: Processes that end in the same moment: a peer that shares the agent's fate.
    """

    case: str
    place: str
    others: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Passed:
    """One place, as it was written down."""

    who: str
    at: float
    place: str


class _Here:
    who = "nobody"
    folder = Path()
    deadly: Deadly | None = None


def begin(who: str, folder: str, deadly: Deadly | None = None) -> None:
    """Say who this process is, where it writes, and where it dies, if it does."""
    _Here.who, _Here.folder, _Here.deadly = who, Path(folder), deadly


def at(case: str, place: str) -> None:
    """Pass a place; end here, with SIGKILL, if it was so ordered."""
    _write(case, place)
    deadly = _Here.deadly
    if deadly is not None and (deadly.case, deadly.place) == (case, place):
        for pid in deadly.others:
            os.kill(pid, signal.SIGKILL)
        _write(case, KILLED)
        os.kill(os.getpid(), signal.SIGKILL)


def passed(folder: Path, case: str) -> list[Passed]:
    """Return what was written down of a run, in order."""
    file = folder / case
    if not file.exists():
        return []
    lines = [line.split(" ", 2) for line in file.read_text().splitlines()]
    return [Passed(who=who, at=float(moment), place=place) for who, moment, place in lines]


def _write(case: str, place: str) -> None:
    """Append one line in one go: others may append to the same file."""
    file = os.open(_Here.folder / case, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, f"{_Here.who} {time.time():.6f} {place}\n".encode())
    finally:
        os.close(file)
