"""Running until somebody says that it is enough."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_until_told(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run until it is done; SIGTERM and SIGINT end it in an orderly way, and are no error."""
    asyncio.run(_until_told(work))


async def _until_told(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    loop, is_told = asyncio.get_running_loop(), False
    working = asyncio.create_task(work(), name="peerctx-command")

    def tell() -> None:
        nonlocal is_told
        if not is_told:  # a second signal must not disturb the orderly end
            is_told = True
            working.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, tell)
    try:
        await working
    except asyncio.CancelledError:
        if not is_told:
            raise
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
