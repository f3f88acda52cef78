"""Which threads are this process's, and until when it may believe so."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from langgraph_peerctx.errors import StaleOwnerError
from langgraph_peerctx.persistence.leases import Lease, Leases

SAFE_SHARE = 2 / 3
"""Of its time to live a lease is used: by then it is renewed, or nothing is written any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A lease that this process holds.

    Attributes:
        good_until: By our own monotonic clock, counted from before the database was asked.
    """

    agent_id: str
    thread_id: str
    epoch: int
    good_until: float


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
        self._owner_id = owner_id
        self._incarnation = incarnation
        self._ttl = ttl_seconds
        self._clock = clock
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()

    @property
    def held(self) -> tuple[Held, ...]:
        """What we hold, sorted by thread."""
        return tuple(self._held[thread_id] for thread_id in sorted(self._held))

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
            owner_id=self._owner_id,
            incarnation=self._incarnation,
            ttl_seconds=self._ttl,
            run_id=run_id,
            dead_incarnation=dead_incarnation,
        )
        return None if lease is None else self._hold(lease, asked_at)

    async def renew(self) -> tuple[str, ...]:
        """Renew all that we hold, with one statement; return the threads that we have lost."""
        asked_at = self._clock()
        before = dict(self._held)
        renewed = {
            lease.thread_id: lease
            for lease in await self._leases.arenew(self._incarnation, ttl_seconds=self._ttl)
        }
        lost = []
        for thread_id, held in before.items():
            lease = renewed.get(thread_id)
            if lease is not None and lease.epoch == held.epoch:
                self._hold(lease, asked_at)
            else:
                lost.append(thread_id)
                with self._lock:
                    self._held.pop(thread_id, None)
        return tuple(sorted(lost))

    async def release(self, agent_id: str, thread_id: str) -> bool:
        """Give a thread back; tell whether it was still ours."""
        with self._lock:
            self._held.pop(thread_id, None)
        return await self._leases.arelease(agent_id, thread_id, incarnation=self._incarnation)

    def may_write(self, thread_id: str) -> int | None:
        """See `Fence.may_write`."""
        held = self._good(thread_id)
        return self._judge(thread_id, held, self._leases.leases_of_thread(thread_id))

    async def amay_write(self, thread_id: str) -> int | None:
        """See `Fence.amay_write`."""
        held = self._good(thread_id)
        return self._judge(thread_id, held, await self._leases.aleases_of_thread(thread_id))

    def epoch_of(self, thread_id: str) -> int:
        """See `Fence.epoch_of`."""
        return _highest(self._leases.leases_of_thread(thread_id))

    async def aepoch_of(self, thread_id: str) -> int:
        """See `Fence.aepoch_of`."""
        return _highest(await self._leases.aleases_of_thread(thread_id))

    def _hold(self, lease: Lease, asked_at: float) -> Held:
        held = Held(
            agent_id=lease.agent_id,
            thread_id=lease.thread_id,
            epoch=lease.epoch,
            good_until=asked_at + self._ttl * SAFE_SHARE,
        )
        with self._lock:
            self._held[lease.thread_id] = held
        return held

    def _good(self, thread_id: str) -> Held | None:
        """Return our lease, unless there is none.

        Raises:
            StaleOwnerError: If it is so old that it may have been taken.
        """
        held = self._held.get(thread_id)
        if held is not None and self._clock() >= held.good_until:
            raise StaleOwnerError(
                f"the lease of thread {thread_id!r:.80} was not renewed in time: "
                "nothing is written until it is"
            )
        return held

    def _judge(self, thread_id: str, held: Held | None, found: list[Lease]) -> int | None:
        """Compare what we hold with what the database says now."""
        if held is None and not found:
            return None
        if held is not None:
            for lease in found:
                if (
                    lease.agent_id == held.agent_id
                    and lease.epoch == held.epoch
                    and lease.owner_incarnation == self._incarnation
                ):
                    return held.epoch
        raise StaleOwnerError(
            f"thread {thread_id!r:.80} is not ours"
            + (f" any more: we held epoch {held.epoch}" if held else ": claim it first")
        )


def _highest(found: list[Lease]) -> int:
    return max((lease.epoch for lease in found), default=0)
