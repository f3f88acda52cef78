"""How long the loops that agents run on have not answered."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class _Watched:
    """The loop of one run.

    Attributes:
        longest_seconds: After so long it is stuck.
        asked_at: When it was asked something that it has not answered yet.
    """

    loop: asyncio.AbstractEventLoop
    longest_seconds: float
    asked_at: float | None = None


class LoopWatch:
    """Asks each loop on which a run is, whether it still turns. Safe to use from any thread.

    Args:
        clock: Seconds that only rise.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._watched: dict[tuple[str, str], _Watched] = {}
        self._lock = threading.Lock()

    def add(
        self, key: tuple[str, str], loop: asyncio.AbstractEventLoop, longest_seconds: float
    ) -> None:
        """Watch the loop on which a thread's run is.

        Args:
            key: The agent and the thread.
            loop: The loop.
            longest_seconds: If it does not turn for so long, it is stuck.
        """
        with self._lock:
            self._watched[key] = _Watched(loop=loop, longest_seconds=longest_seconds)

    def remove(self, key: tuple[str, str]) -> None:
        """Watch it no longer."""
        with self._lock:
            self._watched.pop(key, None)

    def ask(self) -> None:
        """Ask every loop that owes no answer."""
        with self._lock:
            idle = [watched for watched in self._watched.values() if watched.asked_at is None]
        for watched in idle:
            watched.asked_at = self._clock()
            try:
                watched.loop.call_soon_threadsafe(_answer, watched)
            except RuntimeError:  # it is closed, and will never answer
                continue

    def lag_seconds(self) -> float:
        """Return how long the slowest loop has owed its answer."""
        now = self._clock()
        with self._lock:
            return max((_lag(watched, now) for watched in self._watched.values()), default=0.0)

    def stuck(self) -> frozenset[tuple[str, str]]:
        """Return the agents and threads whose loops have not turned for too long."""
        now = self._clock()
        with self._lock:
            return frozenset(
                key
                for key, watched in self._watched.items()
                if _lag(watched, now) >= watched.longest_seconds
            )


def _answer(watched: _Watched) -> None:
    watched.asked_at = None


def _lag(watched: _Watched, now: float) -> float:
    asked_at = watched.asked_at
    return 0.0 if asked_at is None else max(0.0, now - asked_at)
