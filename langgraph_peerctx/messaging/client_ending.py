"""Ending a Kafka client for good, whatever its own stop does.

aiokafka's stop stays pending for ever on a broker that is away, raises `CancelledError` into its
caller on a dead one, and leaks tasks.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

_logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_SECONDS = 4.0

Remains: TypeAlias = Callable[[], tuple[Callable[[], None], list[Any], Any]]
"""What a client leaves when its own stop fails: how to release who waits for it, its tasks, and
the owner of its connections."""


async def end_client(
    stop: Callable[[], Awaitable[None]],
    remains: Remains,
    after: "asyncio.Task[None] | None" = None,
) -> None:
    """Stop a client of aiokafka for good: within the deadline, whatever its own stop does.

    A start that is still under way is let end first.
    """
    if after is not None and not after.done():
        await asyncio.wait({after}, timeout=CLOSE_TIMEOUT_SECONDS / 2)
        after.cancel()
        await asyncio.wait({after}, timeout=CLOSE_TIMEOUT_SECONDS / 4)
    stopping = asyncio.ensure_future(stop())
    await asyncio.wait({stopping}, timeout=CLOSE_TIMEOUT_SECONDS / 2)
    release, tasks, client = remains()
    if not stopping.done():
        release()
    if client is not None:  # its connections first: tasks may wait for answers on them
        await _cut_short(asyncio.ensure_future(client.close()))
    await _cut_short(stopping, *tasks)


async def _cut_short(*tasks: "asyncio.Future[None] | None") -> None:
    """Wait a moment for tasks to end, then cancel them; what they raise is of no interest now."""
    waiting = {task for task in tasks if task is not None}
    for _ in range(2):
        pending = {task for task in waiting if not task.done()}
        if pending:
            await asyncio.wait(pending, timeout=CLOSE_TIMEOUT_SECONDS / 8)
        for task in pending:
            task.cancel()
    if pending := {task for task in waiting if not task.done()}:
        await asyncio.wait(pending, timeout=CLOSE_TIMEOUT_SECONDS / 8)
    for task in waiting:
        if task.done() and not task.cancelled() and task.exception() is not None:
            _logger.debug("a client's own stop failed: %r", task.exception())


async def shielded(ending: Awaitable[None]) -> None:
    """Await to the end even if the waiter is cancelled meanwhile; then it is cancelled."""
    task = asyncio.ensure_future(ending)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=2 * CLOSE_TIMEOUT_SECONDS)
        raise
