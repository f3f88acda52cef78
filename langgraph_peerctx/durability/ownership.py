"""Which threads are this process's, and until when it may believe so."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Self, TypeAlias

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import StaleOwnerError, StoreError, ThreadBusyError
from langgraph_peerctx.identifiers import new_id
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.inspection import has_schema
from langgraph_peerctx.persistence.leases import Lease, Leases
from langgraph_peerctx.persistence.runs import EndKind, NewRun, Owner

_logger = logging.getLogger(__name__)

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
    def key(self) -> tuple[str, str]:
        """Agent and thread."""
        return self.lease.agent_id, self.lease.thread_id

    @property
    def epoch(self) -> int:
        """Under which we write."""
        return self.lease.epoch


Key: TypeAlias = tuple[str, str]
"""An agent and one of its threads."""


class Ownership:
    """The leases of one process. Safe to use from any thread.

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
        self._held: dict[Key, Held] = {}
        self._lost: dict[Key, int] = {}
        self._owed: dict[Key, Callable[[], object]] = {}
        self._changing: set[Key] = set()
        self._lock = threading.Lock()
        self._lives = 0
        self.is_leaving: bool = False

    @property
    def held(self) -> tuple[Held, ...]:
        """What we hold, sorted by agent and thread."""
        with self._lock:
            return tuple(self._held[key] for key in sorted(self._held))

    def holds(self, agent_id: str, thread_id: str) -> bool:
        """Tell whether a thread is ours, as far as we know."""
        return (agent_id, thread_id) in self._held

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

    def admit(self, run: NewRun, *, goes_on: bool = False) -> Held:
        """Begin a run, or go on with one; see `Runs.admit` and `Runs.reopen`.

        Raises:
            ThreadBusyError: If anybody is at work on the thread, or a run of it is open.
            StoreError: If the database failed; what may have been written is taken back later.
        """
        begin = self.control.reopen if goes_on else self.control.admit
        with self._alone((run.agent_id, run.thread_id)):
            asked_at = self._clock()
            try:
                return self.hold(begin(run, self.owner), asked_at)
            except StoreError:
                self._doubt(run)
                raise

    async def aadmit(self, run: NewRun, *, goes_on: bool = False) -> Held:
        """See `admit`; what is written when nobody waits for it any more is taken back."""

        def undo(held: Held) -> None:
            self.drop(held)
            self._doubt(run)

        return await self._leases.in_thread(partial(self.admit, run, goes_on=goes_on), undo=undo)

    def take(self, agent_id: str, thread_id: str) -> Held:
        """Take a thread to write to it outside of a run; give it back with `give`.

        Raises:
            ThreadBusyError: If anybody is at work on the thread, or a run of it is open.
            StoreError: If the database failed.
        """
        with self._alone((agent_id, thread_id)):
            asked_at = self._clock()
            return self.hold(self.control.take(agent_id, thread_id, self.owner), asked_at)

    def give(self, held: Held) -> bool:
        """Give a thread back; tell whether it was still ours."""
        with self._lock:  # who took it before it is given back, would lose it
            self._changing.add(held.key)
        try:
            self.drop(held)
            return self._leases.release(
                held.agent_id, held.thread_id, incarnation=self.owner.incarnation
            )
        finally:
            self._changing.discard(held.key)

    def end(self, held: Held, run_id: str, kind: EndKind, *, error: str | None = None) -> bool:
        """End a run and give its thread back; see `Runs.end`."""
        self.drop(held)
        return self.control.end(held.lease, run_id, kind, error=error)

    @property
    def owes(self) -> bool:
        """Whether an end is still to be written down."""
        return bool(self._owed)

    def owe(self, agent_id: str, thread_id: str, write: Callable[[], object]) -> None:
        """Write an end down as soon as the database answers; see `pay`.

        Args:
            agent_id: The agent.
            thread_id: Its thread.
            write: Writes it; blocks.
        """
        self._owed[agent_id, thread_id] = write

    def pay(self) -> None:
        """Write down what is owed, as far as the database lets us; blocks."""
        for key in list(self._owed):
            try:
                self._pay(key)
            except StoreError as error:
                _logger.info("the end of a run on %r is still owed: %s", key[1], error)
            except Exception:  # one that cannot be written must not keep the others from it
                _logger.exception("the end of a run on %r is given up", key[1])
                self._owed.pop(key, None)

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
        await self._leases.in_thread(self.pay)
        return await self.control.ahand_over(self.owner.incarnation)

    async def renew(self, *, but: Collection[Key] = ()) -> tuple[str, ...]:
        """Renew all that we hold, with one statement; return the threads that we have lost.

        Args:
            but: What is not to be renewed.
        """
        asked_at, before = self._clock(), [h for h in self.held if h.key not in but]
        renewed = await self._leases.arenew(
            self.owner.incarnation,
            [held.key for held in before],
            ttl_seconds=self.owner.ttl_seconds,
        )
        return self._renewed(before, renewed, asked_at)

    async def release(self, agent_id: str, thread_id: str) -> bool:
        """Give a thread back; tell whether it was still ours."""
        with self._lock:
            self._held.pop((agent_id, thread_id), None)
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
            self._held[held.key] = held
            self._lost.pop(held.key, None)
        return held

    def drop(self, held: Held) -> None:
        """Hold a lease no longer; in the database it stays."""
        with self._lock:
            self._lost.pop(held.key, None)
            if self._same(held):
                del self._held[held.key]

    # What a fence asks; without an agent it is whose thread we hold.

    def may_write(self, thread_id: str, agent_id: str | None = None) -> int | None:
        """See `Fence.may_write`."""
        held, asked_at = self._held_of(thread_id, agent_id), self._clock()
        if held is not None and asked_at >= held.good_until:
            before = self.held
            renewed = self._leases.renew(
                self.owner.incarnation,
                [held.key for held in before],
                ttl_seconds=self.owner.ttl_seconds,
            )
            self._renewed(before, renewed, asked_at)
        return self.judge(thread_id, held, self._leases.leases_of_thread(thread_id), agent_id)

    async def amay_write(self, thread_id: str, agent_id: str | None = None) -> int | None:
        """See `Fence.amay_write`."""
        held = await self.aheld(thread_id, agent_id)
        found = await self._leases.aleases_of_thread(thread_id)
        return self.judge(thread_id, held, found, agent_id)

    async def aheld(self, thread_id: str, agent_id: str | None = None) -> Held | None:
        """Return what we hold of a thread, and renew it first if it has become old."""
        held = self._held_of(thread_id, agent_id)
        if held is not None and self._clock() >= held.good_until:
            await self.renew()
        return held

    async def aownership(self) -> Self:
        """Return this one: a fence that others stand on, too."""
        return self

    def epoch_of(self, thread_id: str, agent_id: str | None = None) -> int:
        """See `Fence.epoch_of`."""
        return _highest(self._leases.leases_of_thread(thread_id), agent_id)

    async def aepoch_of(self, thread_id: str, agent_id: str | None = None) -> int:
        """See `Fence.aepoch_of`."""
        return _highest(await self._leases.aleases_of_thread(thread_id), agent_id)

    def judge(
        self,
        thread_id: str,
        held: Held | None,
        found: Iterable[Lease],
        agent_id: str | None = None,
    ) -> int | None:
        """Compare what we hold with what the database says now.

        Returns:
            The epoch to write under; None for a thread that never had a lease.

        Raises:
            StaleOwnerError: If the thread is not ours.
        """
        leases = [lease for lease in found if agent_id in (None, lease.agent_id)]
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
        lost = (e for key, e in list(self._lost.items()) if _is_of(key, thread_id, agent_id))
        epoch = next(lost, None) if held is None else held.epoch
        why = (
            ": it has an owner, run it as owned"
            if epoch is None
            else f" any more: we held epoch {epoch}, and another process has taken it over since; "
            "see `peerctx incidents list`"
        )
        raise StaleOwnerError(f"thread {thread_id!r:.80} is not ours{why}")

    @contextmanager
    def _alone(self, key: Key) -> Iterator[None]:
        """Let nobody else in here take a thread meanwhile; what is owed of it is paid first.

        To the database, two of one process are the same.
        """
        with self._lock:
            is_busy = key in self._held or key in self._changing
            if not is_busy:
                self._changing.add(key)
        if is_busy:
            raise ThreadBusyError(
                f"thread {key[1]!r:.80} of {key[0]} is at work in this process: wait until its run "
                "has ended"
            )
        try:
            self._pay(key)
            yield
        finally:
            self._changing.discard(key)

    def _pay(self, key: Key) -> None:
        write = self._owed.get(key)
        if write is None:
            return
        write()
        if self._owed.get(key) is write:
            del self._owed[key]

    def _doubt(self, run: NewRun) -> None:
        """Take an admission back later: nobody knows whether it was written, nobody acts on it."""
        take_back = partial(
            self.control.withdraw,
            run.agent_id,
            run.thread_id,
            run.run_id,
            self.owner.incarnation,
        )
        self.owe(run.agent_id, run.thread_id, take_back)

    def _held_of(self, thread_id: str, agent_id: str | None) -> Held | None:
        if agent_id is not None:
            return self._held.get((agent_id, thread_id))
        with self._lock:
            return next((held for held in self._held.values() if held.thread_id == thread_id), None)

    def _renewed(
        self, before: Iterable[Held], renewed: Iterable[Lease], asked_at: float
    ) -> tuple[str, ...]:
        """Take note of what was renewed, and return the threads that were not."""
        by_key = {(lease.agent_id, lease.thread_id): lease for lease in renewed}
        good_until = asked_at + self.owner.ttl_seconds * SAFE_SHARE
        lost = []
        with self._lock:
            for held in before:
                if not self._same(held):
                    continue  # ended, or begun anew, while the database was asked
                lease = by_key.get(held.key)
                if lease is not None and lease.epoch == held.epoch:
                    self._held[held.key] = Held(lease=lease, good_until=good_until)
                else:
                    lost.append(held.thread_id)
                    del self._held[held.key]
                    self._lost[held.key] = held.epoch
        return tuple(sorted(lost))

    def _same(self, held: Held) -> bool:
        now = self._held.get(held.key)
        return now is not None and now.epoch == held.epoch


def _is_of(key: Key, thread_id: str, agent_id: str | None) -> bool:
    return key[1] == thread_id and agent_id in (None, key[0])


def _highest(found: list[Lease], agent_id: str | None) -> int:
    ours = (lease.epoch for lease in found if agent_id in (None, lease.agent_id))
    return max(ours, default=0)


class AgentFence:
    """A fence for one agent's threads: another agent's, of the same name, are not its business.

    Args:
        agent_id: The agent.
        ownership: Says what is ours; by default whatever this process owns.
    """

    def __init__(self, agent_id: str, ownership: Ownership | None = None) -> None:
        self._agent_id = agent_id
        self._ownership = ownership

    def may_write(self, thread_id: str) -> int | None:
        """See `Fence.may_write`."""
        owns = self._ownership or process_fence.ownership()
        return None if owns is None else owns.may_write(thread_id, self._agent_id)

    async def amay_write(self, thread_id: str) -> int | None:
        """See `Fence.amay_write`."""
        owns = self._ownership or await process_fence.aownership()
        return None if owns is None else await owns.amay_write(thread_id, self._agent_id)

    def epoch_of(self, thread_id: str) -> int:
        """See `Fence.epoch_of`."""
        owns = self._ownership or process_fence.ownership()
        return 0 if owns is None else owns.epoch_of(thread_id, self._agent_id)

    async def aepoch_of(self, thread_id: str) -> int:
        """See `Fence.aepoch_of`."""
        owns = self._ownership or await process_fence.aownership()
        return 0 if owns is None else await owns.aepoch_of(thread_id, self._agent_id)

    async def aownership(self) -> "OfAgent | None":
        """Return what a write and its lease can share a transaction through; see there."""
        owns = self._ownership or await process_fence.aownership()
        return None if owns is None else OfAgent(owns, self._agent_id)


class OfAgent:
    """An ownership as one agent sees it."""

    def __init__(self, ownership: Ownership, agent_id: str) -> None:
        self._ownership = ownership
        self._agent_id = agent_id

    @property
    def leases(self) -> Leases:
        """Where the leases are."""
        return self._ownership.leases

    async def aheld(self, thread_id: str) -> Held | None:
        """See `Ownership.aheld`."""
        return await self._ownership.aheld(thread_id, self._agent_id)

    def judge(self, thread_id: str, held: Held | None, found: Iterable[Lease]) -> int | None:
        """See `Ownership.judge`."""
        return self._ownership.judge(thread_id, held, found, self._agent_id)


class ProcessFence:
    """The fence of this process: whatever its runtime owns, and nothing without one.

    Safe to use from any thread. Without a runtime that owns threads, the settings' control database
    is read: a thread that never had a lease may be written by anybody.
    """

    def __init__(self) -> None:
        self._owners: tuple[Ownership, ...] = ()
        self._outside: Ownership | None = None
        self._pid = 0
        self._looked_at = 0.0
        self._lock = threading.Lock()

    def enter(self, ownership: Ownership) -> None:
        """Let this be the one that says what is ours, until it leaves, or another one enters."""
        self._owners = (*self._owners, ownership)

    def leave(self, ownership: Ownership) -> None:
        """Take it back."""
        self._owners = tuple(owner for owner in self._owners if owner is not ownership)

    def may_write(self, thread_id: str) -> int | None:
        """See `Fence.may_write`."""
        owns = self.ownership(thread_id)
        return None if owns is None else owns.may_write(thread_id)

    async def amay_write(self, thread_id: str) -> int | None:
        """See `Fence.amay_write`."""
        owns = await self.aownership(thread_id)
        return None if owns is None else await owns.amay_write(thread_id)

    def epoch_of(self, thread_id: str) -> int:
        """See `Fence.epoch_of`."""
        owns = self.ownership(thread_id)
        return 0 if owns is None else owns.epoch_of(thread_id)

    async def aepoch_of(self, thread_id: str) -> int:
        """See `Fence.aepoch_of`."""
        owns = await self.aownership(thread_id)
        return 0 if owns is None else await owns.aepoch_of(thread_id)

    async def aownership(self, thread_id: str | None = None) -> Ownership | None:
        """Return what says what is ours at the moment; None where no database does."""
        return self._inside(thread_id) or await asyncio.to_thread(self.ownership)

    def ownership(self, thread_id: str | None = None) -> Ownership | None:
        """See `aownership`; may look for a database."""
        inside = self._inside(thread_id)
        if inside is not None:
            return inside
        with self._lock:
            if self._pid != os.getpid():
                self._pid, self._outside, self._looked_at = os.getpid(), None, 0.0
            if self._outside is None and time.monotonic() - self._looked_at > LOOK_SECONDS:
                self._looked_at = time.monotonic()
                self._outside = _without_runtime()
            return self._outside

    def _inside(self, thread_id: str | None) -> Ownership | None:
        """Return the runtime's that holds the thread, or the one that came last."""
        owners = self._owners
        holding = (o for o in owners if any(held.thread_id == thread_id for held in o.held))
        return next(holding, owners[-1] if owners else None)


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
