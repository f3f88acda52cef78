"""Which threads are this process's, and until when it may believe so."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Self

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import StaleOwnerError
from langgraph_peerctx.identifiers import new_id
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.inspection import has_schema
from langgraph_peerctx.persistence.leases import Lease, Leases
from langgraph_peerctx.persistence.runs import EndKind, NewRun, Owner, RunInput

LOOK_SECONDS = 1.0
"""How often a process that owns nothing looks whether there is a control database by now."""
SAFE_SHARE = 2 / 3
"""Of its time to live a lease is used: then it is renewed before anything else is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A lease that this process holds.

    Attributes:
        lease: As the database returned it.
        good_until: By our own monotonic clock, counted from before the database was asked.
    """

    lease: Lease
    good_until: float

    @property
    def agent_id(self) -> str:
        """Whose thread it is."""
        return self.lease.agent_id

    @property
    def thread_id(self) -> str:
        """The thread."""
        return self.lease.thread_id

    @property
    def epoch(self) -> int:
        """Under which we write."""
        return self.lease.epoch


class Ownership:
    """The leases of one process; a `Fence` for its checkpointers. Safe to use from any thread.

    Args:
        leases: The control database.
        owner_id: This process.
        incarnation: This life of it.
        ttl_seconds: How long a lease lives without being renewed.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        leases: Leases,
        *,
        owner_id: str,
        incarnation: str,
        ttl_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases = leases
        self.owner: Owner = Owner(
            owner_id=owner_id, incarnation=incarnation, ttl_seconds=ttl_seconds
        )
        self._clock = clock
        self._held: dict[str, Held] = {}
        self._lost: dict[str, int] = {}
        self._owed: dict[str, Callable[[], object]] = {}
        self._lock = threading.Lock()
        self._lives = 0
        self.is_leaving: bool = False

    @property
    def held(self) -> tuple[Held, ...]:
        """What we hold, sorted by thread."""
        with self._lock:
            return tuple(self._held[thread_id] for thread_id in sorted(self._held))

    @property
    def leases(self) -> Leases:
        """Where the leases are."""
        return self._leases

    @property
    def control(self) -> ControlDatabase:
        """The control database, for runs and incidents."""
        assert isinstance(self._leases, ControlDatabase)  # noqa: S101 - a runtime gives it
        return self._leases

    async def claim(
        self,
        agent_id: str,
        thread_id: str,
        *,
        run_id: str | None = None,
        dead_incarnation: str | None = None,
    ) -> Held | None:
        """Take a thread; None if somebody else has it. See `Leases.claim`."""
        asked_at = self._clock()
        lease = await self._leases.aclaim(
            agent_id,
            thread_id,
            owner_id=self.owner.owner_id,
            incarnation=self.owner.incarnation,
            ttl_seconds=self.owner.ttl_seconds,
            run_id=run_id,
            dead_incarnation=dead_incarnation,
        )
        return None if lease is None else self.hold(lease, asked_at)

    def admit(self, run: NewRun) -> Held:
        """Begin a run; see `Runs.admit`."""
        asked_at = self._clock()
        return self.hold(self.control.admit(run, self.owner), asked_at)

    async def aadmit(self, run: NewRun) -> Held:
        """See `admit`."""
        asked_at = self._clock()
        return self.hold(await self.control.aadmit(run, self.owner), asked_at)

    def reopen(self, agent_id: str, thread_id: str, run_id: str, given: RunInput) -> Held:
        """Go on with a run; see `Runs.reopen`."""
        asked_at = self._clock()
        lease = self.control.reopen(agent_id, thread_id, run_id, given, self.owner)
        return self.hold(lease, asked_at)

    async def areopen(self, agent_id: str, thread_id: str, run_id: str, given: RunInput) -> Held:
        """See `reopen`."""
        asked_at = self._clock()
        lease = await self.control.areopen(agent_id, thread_id, run_id, given, self.owner)
        return self.hold(lease, asked_at)

    def end(self, held: Held, run_id: str, kind: EndKind, *, error: str | None = None) -> bool:
        """End a run and give its thread back; see `Runs.end`."""
        self.drop(held)
        return self.control.end(held.lease, run_id, kind, error=error)

    async def aend(
        self, held: Held, run_id: str, kind: EndKind, *, error: str | None = None
    ) -> bool:
        """See `end`."""
        self.drop(held)
        return await self.control.aend(held.lease, run_id, kind, error=error)

    @property
    def owed(self) -> frozenset[str]:
        """The threads whose end is not written down yet: they are renewed no more."""
        return frozenset(self._owed)

    def owe(self, thread_id: str, write: Callable[[], object]) -> None:
        """Write an end down as soon as the database answers; see `pay`.

        Args:
            thread_id: The thread.
            write: Writes it; blocks.
        """
        self._owed[thread_id] = write

    async def pay(self) -> None:
        """Write down what is owed.

        Raises:
            StoreError: If the database still does not answer.
        """
        for thread_id, write in list(self._owed.items()):
            await self._leases.in_thread(write)
            if self._owed.get(thread_id) is write:
                del self._owed[thread_id]

    def enter(self) -> None:
        """Begin a time at whose end the process leaves; counted."""
        self._lives += 1
        self.is_leaving = False

    def leave(self) -> None:
        """From the end of the last such time on, what is cancelled is handed over."""
        self._lives -= 1
        self.is_leaving = self._lives == 0

    async def hand_over(self) -> int:
        """Give everything back: whoever can, goes on with it at once. Return how many runs."""
        self.is_leaving = True
        with self._lock:
            self._held.clear()
        await self.pay()
        return await self.control.ahand_over(self.owner.incarnation)

    async def renew(self, *, but: Collection[str] = ()) -> tuple[str, ...]:
        """Renew all that we hold, with one statement; return the threads that we have lost.

        Args:
            but: Threads that are not to be renewed.
        """
        asked_at, before = self._clock(), self.held
        but = self.owed.union(but)
        renewed = await self._leases.arenew(
            self.owner.incarnation, ttl_seconds=self.owner.ttl_seconds, but=tuple(but)
        )
        return self._renewed(
            [held for held in before if held.thread_id not in but], renewed, asked_at
        )

    async def release(self, agent_id: str, thread_id: str) -> bool:
        """Give a thread back; tell whether it was still ours."""
        with self._lock:
            self._held.pop(thread_id, None)
        return await self._leases.arelease(agent_id, thread_id, incarnation=self.owner.incarnation)

    def hold(self, lease: Lease, asked_at: float | None = None) -> Held:
        """Hold a lease that the database gave us.

        Args:
            lease: The lease.
            asked_at: When we asked for it, by our clock; by default now.
        """
        since = self._clock() if asked_at is None else asked_at
        held = Held(lease=lease, good_until=since + self.owner.ttl_seconds * SAFE_SHARE)
        with self._lock:
            self._held[lease.thread_id] = held
            self._lost.pop(lease.thread_id, None)
        return held

    def drop(self, held: Held) -> None:
        """Hold a lease no longer; in the database it stays."""
        with self._lock:
            self._lost.pop(held.thread_id, None)
            if self._same(held):
                del self._held[held.thread_id]

    def may_write(self, thread_id: str) -> int | None:
        """See `Fence.may_write`."""
        held, asked_at = self._held.get(thread_id), self._clock()
        if held is not None and asked_at >= held.good_until:
            before = self.held
            renewed = self._leases.renew(
                self.owner.incarnation, ttl_seconds=self.owner.ttl_seconds, but=tuple(self.owed)
            )
            self._renewed(before, renewed, asked_at)
        return self.judge(thread_id, held, self._leases.leases_of_thread(thread_id))

    async def amay_write(self, thread_id: str) -> int | None:
        """See `Fence.amay_write`."""
        held = await self.aheld(thread_id)
        return self.judge(thread_id, held, await self._leases.aleases_of_thread(thread_id))

    async def aheld(self, thread_id: str) -> Held | None:
        """Return what we hold of a thread, and renew it first if it has become old."""
        held = self._held.get(thread_id)
        if held is not None and self._clock() >= held.good_until:
            await self.renew()
        return held

    async def aownership(self) -> Self:
        """Return this one: a fence that others stand on, too."""
        return self

    def epoch_of(self, thread_id: str) -> int:
        """See `Fence.epoch_of`."""
        return _highest(self._leases.leases_of_thread(thread_id))

    async def aepoch_of(self, thread_id: str) -> int:
        """See `Fence.aepoch_of`."""
        return _highest(await self._leases.aleases_of_thread(thread_id))

    def judge(self, thread_id: str, held: Held | None, found: Iterable[Lease]) -> int | None:
        """Compare what we hold with what the database says now.

        Returns:
            The epoch to write under; None for a thread that never had a lease.

        Raises:
            StaleOwnerError: If the thread is not ours.
        """
        leases = list(found)
        if held is None and not leases:
            return None
        if held is not None:
            for lease in leases:
                if (
                    lease.agent_id == held.agent_id
                    and lease.epoch == held.epoch
                    and lease.owner_incarnation == self.owner.incarnation
                ):
                    return held.epoch
        epoch = self._lost.get(thread_id) if held is None else held.epoch
        why = ": claim it first" if epoch is None else f" any more: we held epoch {epoch}"
        raise StaleOwnerError(f"thread {thread_id!r:.80} is not ours{why}")

    def _renewed(
        self, before: Iterable[Held], renewed: Iterable[Lease], asked_at: float
    ) -> tuple[str, ...]:
        """Take note of what was renewed, and return the threads that were not."""
        by_thread = {lease.thread_id: lease for lease in renewed}
        good_until = asked_at + self.owner.ttl_seconds * SAFE_SHARE
        lost = []
        with self._lock:
            for held in before:
                if not self._same(held):
                    continue  # ended, or begun anew, while the database was asked
                lease = by_thread.get(held.thread_id)
                if lease is not None and lease.epoch == held.epoch:
                    self._held[held.thread_id] = Held(lease=lease, good_until=good_until)
                else:
                    lost.append(held.thread_id)
                    del self._held[held.thread_id]
                    self._lost[held.thread_id] = held.epoch
        return tuple(sorted(lost))

    def _same(self, held: Held) -> bool:
        now = self._held.get(held.thread_id)
        return now is not None and now.epoch == held.epoch and now.agent_id == held.agent_id


def _highest(found: list[Lease]) -> int:
    return max((lease.epoch for lease in found), default=0)


class ProcessFence:
    """The fence of this process: whatever its runtime owns, and nothing without one.

    Safe to use from any thread. Without a runtime that owns threads, the settings' control database
    is read: a thread that never had a lease may be written by anybody.
    """

    def __init__(self) -> None:
        self._ownership: Ownership | None = None
        self._outside: Ownership | None = None
        self._pid = 0
        self._looked_at = 0.0
        self._lock = threading.Lock()

    def enter(self, ownership: Ownership) -> None:
        """Let this be the one that says what is ours."""
        self._ownership = ownership

    def leave(self, ownership: Ownership) -> None:
        """Take it back."""
        if self._ownership is ownership:
            self._ownership = None

    def may_write(self, thread_id: str) -> int | None:
        """See `Fence.may_write`."""
        fence = self._fence()
        return None if fence is None else fence.may_write(thread_id)

    async def amay_write(self, thread_id: str) -> int | None:
        """See `Fence.amay_write`."""
        fence = await self.aownership()
        return None if fence is None else await fence.amay_write(thread_id)

    def epoch_of(self, thread_id: str) -> int:
        """See `Fence.epoch_of`."""
        fence = self._fence()
        return 0 if fence is None else fence.epoch_of(thread_id)

    async def aepoch_of(self, thread_id: str) -> int:
        """See `Fence.aepoch_of`."""
        fence = await self.aownership()
        return 0 if fence is None else await fence.aepoch_of(thread_id)

    async def aownership(self) -> Ownership | None:
        """Return what says what is ours at the moment; None where no database does."""
        return self._ownership or await asyncio.to_thread(self._fence)

    def _fence(self) -> Ownership | None:
        if self._ownership is not None:
            return self._ownership
        with self._lock:
            if self._pid != os.getpid():
                self._pid, self._outside, self._looked_at = os.getpid(), None, 0.0
            if self._outside is None and time.monotonic() - self._looked_at > LOOK_SECONDS:
                self._looked_at = time.monotonic()
                self._outside = _without_runtime()
            return self._outside


def _without_runtime() -> Ownership | None:
    """Return what owns nothing and knows who does; None where no database says who."""
    settings = PeerContextSettings()
    if not has_schema(settings.control_url):
        return None
    leases = Leases(settings.control_url, timeout_seconds=settings.database_timeout_seconds)
    return Ownership(
        leases, owner_id="nobody", incarnation=new_id(), ttl_seconds=settings.lease_seconds
    )


process_fence: ProcessFence = ProcessFence()
"""What a `FencedCheckpointer` asks that was given no fence."""
