"""Freezing a process at a named place of its own: it stops itself, and is thawed from outside."""

import signal
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from chaos import trading
from langgraph.checkpoint.base import id as checkpoint_ids
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from langgraph_peerctx.durability.fenced_checkpointer import FencedCheckpointer
from langgraph_peerctx.durability.ownership import Ownership

PLACES = ("anywhere", "between check and write", "inside the transaction", "before a renewal")
AHEAD_SECONDS = 5.0


class Freezing:
    """Stops this process at a place, once; the clock of its checkpoints may be ahead."""

    def __init__(self, place: str, after: int, *, ahead: bool) -> None:
        self._place = place
        self._left = after
        self._ahead = ahead

    def __call__(self, _orders: object) -> None:
        """Arm this process; runs in it, before anything else."""
        if self._ahead:
            behind = SimpleNamespace(time_ns=_ahead)
            checkpoint_ids.time = behind  # type: ignore[attr-defined]
        if self._place == "between check and write":
            # On a shared PostgreSQL the check is a part of the transaction.
            _before(FencedCheckpointer, "aput", self._pass)
            _after(Ownership, "judge", self._pass)
        elif self._place == "inside the transaction":
            for saver in (AsyncSqliteSaver, AsyncPostgresSaver):
                _after_async(saver, "aput", self._pass)
        elif self._place == "before a renewal":
            _before(Ownership, "renew", self._pass)

    def _pass(self) -> None:
        self._left -= 1
        if self._left == 0:
            stop_here()


class Holding:
    """Stops this process at a place of its effect, however often it is thawed, until it is let go.

    Args:
        place: Where.
        gate: A file: when it is there, the process goes on.
    """

    def __init__(self, place: trading.Place, gate: Path) -> None:
        self._place = place
        self._gate = gate

    def __call__(self, _orders: object) -> None:
        """Arm this process; runs in it, before anything else."""
        trading.passing = self._pass

    def let_go(self) -> None:
        """Let the process go on when it is thawed next; called from outside."""
        self._gate.touch()

    def _pass(self, place: trading.Place) -> None:
        while place == self._place and not self._gate.exists():
            stop_here()
            time.sleep(0.01)  # only here: other threads may have a commit to finish


def stop_here() -> None:
    """Stop this process at this very place.

    Sent to the process, another thread would take the signal, and this one would go on meanwhile.
    """
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def _ahead() -> int:
    return time.time_ns() + int(AHEAD_SECONDS * 1e9)


def _before(kind: type[Any], name: str, pass_by: Callable[[], None]) -> None:
    method = getattr(kind, name)

    async def late(self: Any, *arguments: Any, **options: Any) -> Any:
        pass_by()
        return await method(self, *arguments, **options)

    setattr(kind, name, late)


def _after(kind: type[Any], name: str, pass_by: Callable[[], None]) -> None:
    method = getattr(kind, name)

    def slow(self: Any, *arguments: Any, **options: Any) -> Any:
        found = method(self, *arguments, **options)
        pass_by()
        return found

    setattr(kind, name, slow)


def _after_async(kind: type[Any], name: str, pass_by: Callable[[], None]) -> None:
    method: Callable[..., Awaitable[Any]] = getattr(kind, name)

    async def slow(self: Any, *arguments: Any, **options: Any) -> Any:
        found = await method(self, *arguments, **options)
        pass_by()
        return found

    setattr(kind, name, slow)
