"""Run a coroutine as if nothing stood around it."""

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, TypeVar

from langgraph_peerctx.tracing import carried_into

T = TypeVar("T")


async def in_empty_context(coroutine: Coroutine[Any, Any, T], *, name: str) -> T:
    """Await a coroutine in an empty `contextvars.Context`.

    LangGraph hands a node's configuration on through context variables. A workflow that is
    recovered from inside another graph's node would inherit the outer one's checkpointer, thread
    id and callbacks. The current span goes along, if there is one. Cancelling the caller cancels
    the coroutine and waits for its end.

    Args:
        coroutine: What to run.
        name: The task's name, for whoever looks at running tasks.
    """
    loop = asyncio.get_running_loop()
    return await loop.create_task(coroutine, name=name, context=carried_into(Context()))
