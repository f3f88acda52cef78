"""How the three systems place an order with a peer; and the peer, with a ledger of what it applied.

An order is one line of JSON over TCP, and so is its answer: a peer that is not there refuses the
connection, and then nothing was sent.
"""

import asyncio
import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

from matrix.places import at
from sqlalchemy import text

from langgraph_peerctx import EventStore, Receiver, current_effect, effect
from langgraph_peerctx.protocol.tickets import EffectTicket

System = Literal["langgraph", "no peers", "peers"]
SYSTEMS: tuple[System, ...] = ("langgraph", "no peers", "peers")
TITLES: dict[System, str] = {
    "langgraph": "LangGraph alone",
    "no peers": "owned runs and effects, no peers",
    "peers": "owned runs, effects, peers",
}
Trade = Callable[[Any, str], Awaitable[str]]
"""Places an order that the state's case needs, and returns what the peer says."""

CALL_SECONDS = 20.0
_NOT_SENT = (ConnectionRefusedError,)
_MAKE = 'CREATE TABLE IF NOT EXISTS applied ("case" TEXT NOT NULL, "order" TEXT NOT NULL)'
_APPLY = 'INSERT INTO applied ("case", "order") VALUES (:case, :order)'


def trade_of(system: System) -> Trade:
    """Return how a system places its orders."""
    return {"langgraph": _plainly, "no peers": _remembered, "peers": _received}[system]


async def _plainly(state: Any, order: str) -> str:
    """Call, as one does."""
    case = state["case"]
    at(case, f"before the intent: {order}")
    said = await _send(case, state["port"], order)
    at(case, f"after the outcome: {order}")
    return said


async def _remembered(state: Any, order: str) -> str:
    """Call once: what came of it is kept; nobody can be asked."""
    case = state["case"]
    at(case, f"before the intent: {order}")
    said: str = await effect(order, _send, case, state["port"], order, not_done_on=_NOT_SENT)
    at(case, f"after the outcome: {order}")
    return said


async def _received(state: Any, order: str) -> str:
    """Call once; the peer keeps receipts, and is asked if it is not known what came of it."""
    case = state["case"]
    at(case, f"before the intent: {order}")
    said: str = await effect(
        order,
        _send_with_ticket,
        case,
        state["port"],
        order,
        peer=state["peer"],
        not_done_on=_NOT_SENT,
    )
    at(case, f"after the outcome: {order}")
    return said


async def _send_with_ticket(case: str, port: int, order: str) -> str:
    return await _send(case, port, order, **current_effect().as_field())


async def _send(case: str, port: int, order: str, **more: Any) -> str:
    at(case, f"between intent and call: {order}")
    async with asyncio.timeout(CALL_SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with closing(writer):
            writer.write(json.dumps({"case": case, "order": order, **more}).encode() + b"\n")
            line = await reader.readline()
    if not line:
        raise ConnectionResetError("the peer went away before it answered")
    said: str = json.loads(line)["said"]
    at(case, f"between call and outcome: {order}")
    return said


class Ledger:
    """What one peer has applied, each time that it did, whoever ordered it and under which key."""

    def __init__(self, file: Path) -> None:
        self._file = file
        with closing(self._opened()) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(_MAKE)

    def apply(self, case: str, order: str) -> None:
        with closing(self._opened()) as connection:
            connection.execute(_APPLY, {"case": case, "order": order})

    def applied(self, case: str) -> Counter[str]:
        """Count how often each order of a case was applied."""
        with closing(self._opened()) as connection:
            rows = connection.execute('SELECT "order" FROM applied WHERE "case" = ?', (case,))
            return Counter(order for (order,) in rows)

    def _opened(self) -> sqlite3.Connection:
        return sqlite3.connect(self._file, timeout=20, isolation_level=None)


Handle = Callable[[dict[str, Any]], Awaitable[str]]


def handler_of(file: Path, receiver: str | None, store: EventStore | None) -> Handle:
    """Return what applies an order: each time it comes, or each key once."""
    ledger = Ledger(file)

    async def apply(asked: dict[str, Any]) -> str:
        await asyncio.to_thread(ledger.apply, asked["case"], asked["order"])
        return _said(asked)

    if receiver is None or store is None:
        return apply
    receiving = Receiver(receiver, store=store)

    async def receive(asked: dict[str, Any]) -> str:
        async with receiving.areceive(EffectTicket.from_field(asked)) as receipt:
            if receipt.is_first:
                order = {"case": asked["case"], "order": asked["order"]}
                await receipt.work(lambda connection: connection.execute(text(_APPLY), order))
                receipt.reply = _said(asked)
        said: str = receipt.reply
        return said

    return receive


def _said(asked: dict[str, Any]) -> str:
    return f"{asked['order']}: done"


@asynccontextmanager
async def serving(port: int, handle: Handle) -> AsyncIterator[None]:
    """Take orders as long as the block lasts."""
    server = await asyncio.start_server(partial(_serve, handle), "127.0.0.1", port)
    try:
        yield
    finally:
        server.close()


async def _serve(
    handle: Handle, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    with closing(writer), contextlib.suppress(ConnectionError):
        asked = json.loads(await reader.readline())
        writer.write(json.dumps({"said": await handle(asked)}).encode() + b"\n")
        await writer.drain()
