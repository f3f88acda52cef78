"""How a launch places an order with a peer, and the peer, which takes each by its key.

An order is one line of JSON over TCP, and so is its answer.
"""

import asyncio
import json
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import text

from langgraph_peerctx import EffectTicket, Receiver, current_effect
from langgraph_peerctx.errors import StaleOwnerError
from langgraph_peerctx.persistence.receipts import Transaction

PEER = "inventory"

Place = Literal["between intent and call", "between call and outcome"]
passing: Callable[[Place], object] = str
"""Called at each place of an effect: a process may be stopped there."""

CALL_SECONDS = 20.0
_MAKE = text("CREATE TABLE IF NOT EXISTS applied (thread TEXT NOT NULL, epoch INTEGER NOT NULL)")
_APPLY = text("INSERT INTO applied (thread, epoch) VALUES (:thread, :epoch)")


async def place_order(port: int) -> str:
    """Send an order under the ticket of its effect, and return what the peer says.

    It blocks the loop, so that a process which is thawed here sends it whatever it learns
    meanwhile of its lease: nothing of it can be cancelled.

    Raises:
        StaleOwnerError: If the peer refuses it.
    """
    passing("between intent and call")
    said = _exchange(port, json.dumps(current_effect().as_field()).encode())
    passing("between call and outcome")
    if "refused" in said:
        raise StaleOwnerError(said["refused"])
    return str(said["reply"])


def _exchange(port: int, order: bytes) -> dict[str, Any]:
    with socket.create_connection(("127.0.0.1", port), timeout=CALL_SECONDS) as connection:
        connection.sendall(order + b"\n")
        with connection.makefile("rb") as lines:
            said: dict[str, Any] = json.loads(lines.readline())
            return said


class Taker:
    """Takes orders, each key once, and tells what became of each that arrived."""

    def __init__(self, receiver: Receiver, tell: Callable[..., None]) -> None:
        self._receiver = receiver
        self._tell = tell

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take one order, and answer it."""
        with closing(writer):
            ticket = EffectTicket.from_field(json.loads(await reader.readline()))
            writer.write(json.dumps(await self._taken(ticket)).encode() + b"\n")
            await writer.drain()

    async def _taken(self, ticket: EffectTicket) -> dict[str, str]:
        def apply(connection: Transaction) -> None:
            connection.execute(_MAKE)
            connection.execute(_APPLY, {"thread": ticket.thread_id, "epoch": ticket.epoch})

        try:
            async with self._receiver.areceive(ticket) as receipt:
                if receipt.is_first:
                    await receipt.work(apply)
                    receipt.reply = f"taken under {ticket.epoch}"
        except StaleOwnerError as error:
            self._tell("refused", ticket.thread_id, ticket.epoch)
            return {"refused": str(error)}
        self._tell("first" if receipt.is_first else "repeated", ticket.thread_id, ticket.epoch)
        return {"reply": receipt.reply}


def applied(store: Path, thread_id: str) -> list[int]:
    """Return under which epochs a thread's order was applied, each time that it was."""
    with closing(sqlite3.connect(store, timeout=20)) as connection:
        rows = connection.execute("SELECT epoch FROM applied WHERE thread = ?", (thread_id,))
        return [epoch for (epoch,) in rows]


def barred(store: Path, effect_key: str) -> int | None:
    """Return below which epoch a key is refused for good; None if it is not."""
    with closing(sqlite3.connect(store, timeout=20)) as connection:
        statement = "SELECT below_epoch FROM peerctx_barred_keys WHERE effect_key = ?"
        found = connection.execute(statement, (effect_key,)).fetchone()
        return None if found is None else int(found[0])
