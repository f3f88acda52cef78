"""How the agents work with each other: letters over the broker, and answers to them.

This is the team's own business, beside the package: an application has its own way. What matters
is that each agent records what passes, in its own event store, and that a letter that asks for
something carries the ticket of the effect.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from graphs.team.scenario import mail_topic
from langgraph_peerctx import EffectTicket, EventStore, StaleOwnerError, arecord_interaction
from langgraph_peerctx.messaging.transport import Record, Transport

ANSWER_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """One message between two agents.

    Attributes:
        answers: The letter that it answers, if it does.
        ticket: Names the effect that it asks for; an answer has none.
    """

    letter_id: str
    answers: str | None
    sender: str
    recipient: str
    thread_id: str
    kind: str
    payload: dict[str, Any]
    ticket: dict[str, Any]


class Mailbox:
    """One agent's letters, in and out.

    Args:
        agent_id: Whose mailbox.
        transport: Borrowed, started.
        store: The agent's own event store: everything in and out is recorded.
        handle: Does what a letter asks for, and returns what to answer; or refuses it, with
            `StaleOwnerError`.
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
            try:
                answer = _answer(letter, "done", await self._handle(letter))
            except StaleOwnerError as error:
                answer = _answer(letter, "refused", {"why": str(error)})
            await self._send(answer)

    async def ask(
        self, recipient: str, kind: str, payload: dict[str, Any], ticket: EffectTicket
    ) -> dict[str, Any]:
        """Send a letter and wait for the answer.

        Raises:
            TimeoutError: If there is none within 20 s.
            StaleOwnerError: If it is refused: the thread has another owner by now.
        """
        letter = Letter(
            letter_id=uuid4().hex,
            answers=None,
            sender=self._agent_id,
            recipient=recipient,
            thread_id=ticket.thread_id,
            kind=kind,
            payload=payload,
            ticket=ticket.as_field(),
        )
        answered: asyncio.Future[Letter] = asyncio.get_running_loop().create_future()
        self._waiting[letter.letter_id] = answered
        await self._send(letter)
        async with asyncio.timeout(ANSWER_SECONDS):
            answer = await answered
        await self._record(answer)
        if answer.kind == f"{kind}-refused":
            raise StaleOwnerError(answer.payload["why"])
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
        """Record a letter, and not under the effect's key: only a receipt says that it was done."""
        await arecord_interaction(
            agent_id=self._agent_id,
            from_agent=letter.sender,
            to_agent=letter.recipient,
            thread_id=letter.thread_id,
            kind=letter.kind,
            payload=letter.payload,
            interaction_id=letter.letter_id,
            store=self._store,
        )


def _answer(letter: Letter, end: str, payload: dict[str, Any]) -> Letter:
    return Letter(
        letter_id=uuid4().hex,
        answers=letter.letter_id,
        sender=letter.recipient,
        recipient=letter.sender,
        thread_id=letter.thread_id,
        kind=f"{letter.kind}-{end}",
        payload=payload,
        ticket={},
    )
