"""Renewing what a process holds, as long as it is alive and its loops turn."""

import asyncio
import logging

from langgraph_peerctx.durability.loop_watch import LoopWatch
from langgraph_peerctx.durability.ownership import Key, Ownership
from langgraph_peerctx.errors import StoreError

_logger = logging.getLogger(__name__)


class LeaseKeeper:
    """Renews all leases of a process once an interval; runs on the loop that starts it.

    Args:
        ownership: What is renewed.
        watch: Says whose loops are stuck: their threads are not renewed.
        interval_seconds: Between two renewals.
    """

    def __init__(self, ownership: Ownership, watch: LoopWatch, interval_seconds: float) -> None:
        self._ownership = ownership
        self._watch = watch
        self._interval = interval_seconds
        self._task: asyncio.Task[None] | None = None
        self._stuck: frozenset[Key] = frozenset()
        self._failing = False

    def start(self) -> None:
        """Begin; waits for nothing."""
        self._task = asyncio.create_task(self._keep(), name="peerctx-leases")

    async def close(self) -> None:
        """End. Safe to call twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            # Once an interval, however long a renewal takes; late, it does not hurry after.
            due = max(due + self._interval, loop.time())
            await asyncio.sleep(due - loop.time())
            self._watch.ask()
            try:
                await self._renew()
            except StoreError as error:
                if not self._failing:
                    _logger.warning("leases are not renewed, and will be lost: %s", error)
                self._failing = True
            except Exception:  # a service loop logs and goes on
                _logger.exception("leases are not renewed")

    async def _renew(self) -> None:
        ownership, stuck = self._ownership, self._watch.stuck()
        for _, thread_id in sorted(stuck - self._stuck):
            _logger.warning("the loop of %r does not turn: its run may be taken over", thread_id)
        self._stuck = stuck
        lost = await ownership.renew(but=stuck) if ownership.held else ()
        if self._failing:
            _logger.info("leases are renewed again")
        self._failing = False
        for thread_id in lost:
            _logger.warning("thread %r has another owner by now", thread_id)
        if ownership.owes:
            await ownership.leases.in_thread(ownership.pay)
