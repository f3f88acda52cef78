"""How the agents work with each other: letters over the broker, and answers to them.

This is the team's own business, beside the package: an application has its own way. What matters
is that each agent records what passes, in its own event store.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from graphs.team.scenario import mail_topic
from langgraph_peerctx import EventStore, arecord_interaction
from langgraph_peerctx.messaging.transport import Record, Transport

ANSWER_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """One message between two agents; `effect_key` names the side effect that it asks for."""

    letter_id: str
    answers: str | None
    sender: str
    recipient: str
    thread_id: str
    kind: str
    effect_key: str
    payload: dict[str, Any]


class Mailbox:
    """One agent's letters, in and out.

    Args:
        agent_id: Whose mailbox.
        transport: Borrowed, started.
        store: The agent's own event store: everything in and out is recorded.
        handle: Does what a letter asks for, and returns what to answer.
    """

    def __init__(
        self,
        agent_id: str,
        transport: Transport,
        store: EventStore,
        handle: Callable[[Letter], Awaitable[dict[str, Any]]] | None = None,
    ) -> None:
        self._agent_id = agent_id
        self._transport = transport
        self._store = store
        self._handle = handle
        self._waiting: dict[str, asyncio.Future[Letter]] = {}
        self._letters: asyncio.Queue[Letter] = asyncio.Queue()

    async def open(self) -> None:
        """Read mail from now on."""
        reading = await self._transport.subscribe([mail_topic(self._agent_id)], self._take)
        await reading.positioned()

    async def serve(self) -> None:
        """Do what letters ask for, one after the other, for ever."""
        assert self._handle is not None  # noqa: S101 - a mailbox that serves has a handler
        while True:
            letter = await self._letters.get()
            await self._record(letter)
            payload = await self._handle(letter)
            await self._send(_answer(letter, payload))

    async def ask(
        self, recipient: str, kind: str, *, thread_id: str, effect_key: str, **payload: Any
    ) -> dict[str, Any]:
        """Send a letter and wait for the answer.

        Raises:
            TimeoutError: If there is none within 20 s.
        """
        letter = Letter(
            letter_id=uuid4().hex,
            answers=None,
            sender=self._agent_id,
            recipient=recipient,
            thread_id=thread_id,
            kind=kind,
            effect_key=effect_key,
            payload=payload,
        )
        answered: asyncio.Future[Letter] = asyncio.get_running_loop().create_future()
        self._waiting[letter.letter_id] = answered
        await self._send(letter)
        async with asyncio.timeout(ANSWER_SECONDS):
            answer = await answered
        await self._record(answer)
        return answer.payload

    def _take(self, record: Record) -> None:
        letter = Letter(**json.loads(record.value or b"{}"))
        waiting = self._waiting.pop(letter.answers or "", None)
        if waiting is not None and not waiting.done():
            waiting.set_result(letter)
        elif letter.answers is None:
            self._letters.put_nowait(letter)

    async def _send(self, letter: Letter) -> None:
        """Record first: what left is then known to have left, whatever happens next."""
        await self._record(letter)
        body = {name: getattr(letter, name) for name in Letter.__slots__}
        await self._transport.send(mail_topic(letter.recipient), json.dumps(body).encode())

    async def _record(self, letter: Letter) -> None:
        await arecord_interaction(
            agent_id=self._agent_id,
            from_agent=letter.sender,
            to_agent=letter.recipient,
            thread_id=letter.thread_id,
            kind=letter.kind,
            payload=letter.payload,
            interaction_id=letter.letter_id,
            effect_key=letter.effect_key,
            store=self._store,
        )


def _answer(letter: Letter, payload: dict[str, Any]) -> Letter:
    return Letter(
        letter_id=uuid4().hex,
        answers=letter.letter_id,
        sender=letter.recipient,
        recipient=letter.sender,
        thread_id=letter.thread_id,
        kind=f"{letter.kind}-done",
        effect_key=letter.effect_key,
        payload=payload,
    )
