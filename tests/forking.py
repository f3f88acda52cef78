"""Child processes, forked from one that has imported everything: starting another costs little."""

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Coroutine
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "langgraph_peerctx",
        "langgraph_peerctx.reconstruction.supervisor",
        "langgraph.checkpoint.sqlite.aio",
        "langgraph.checkpoint.postgres.aio",
        "aiokafka",
        "alembic.command",
        "alembic.config",
    ]
)


Main = Callable[..., Coroutine[Any, Any, None]]


def exit_code_of(main: Main, *arguments: Any) -> int:
    """Run a coroutine function in a child with this process's variables, and wait for its end."""
    process = CONTEXT.Process(target=_run, args=(dict(os.environ), main, *arguments), daemon=True)
    process.start()
    process.join(60)
    ended = process.exitcode
    process.kill()
    process.join()
    assert ended is not None, "it does not end by itself"
    return ended


def _run(variables: dict[str, str], main: Main, *arguments: Any) -> None:
    os.environ.clear()
    os.environ.update(variables)
    asyncio.run(main(*arguments))
