"""What the tests run in processes of its own: started once, forked from where nothing runs yet."""

import itertools
import os
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from typing import Any

from forking import CONTEXT

from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.protocol.messages import Interaction


def start(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = CONTEXT.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def order(number: int) -> Interaction:
    return Interaction(
        interaction_id=f"order-{number}",
        thread_id="t",
        from_agent="product",
        to_agent="inventory",
        kind="order",
        payload={"number": number, "filling": "x" * 500},
        occurred_at=datetime.now(UTC),
    )


def open_together(url: str, together: Barrier) -> None:
    """Open a new database at the same moment as others, and write into it."""
    together.wait(30)
    with EventStore(url) as store:
        store.append("product", order(os.getpid()))


def append_for_ever(url: str, acknowledged: Connection) -> None:
    """Append until killed, and tell of each number that was acknowledged."""
    with EventStore(url) as store:
        for number in itertools.count():
            store.append("product", order(number))
            acknowledged.send(number)
