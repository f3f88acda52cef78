"""Side effects that arrived at an agent, each under its key: first, again, or never to come.

To receive a key and to settle it exclude each other, in all processes of one database: on SQLite by
the lock of a transaction that begins by writing, on PostgreSQL by a lock on the key's hash.
"""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from contextvars import copy_context
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from pydantic import JsonValue
from pydantic_core import from_json, to_json
from sqlalchemy import Connection, Row, bindparam, func, select, update
from sqlalchemy.exc import SQLAlchemyError

from langgraph_peerctx.errors import (
    ConfigurationError,
    ProtocolError,
    StaleOwnerError,
    StoreBusyError,
    StoreError,
)
from langgraph_peerctx.identifiers import RECORD_ID_LIMIT, check_id
from langgraph_peerctx.persistence.database import Database
from langgraph_peerctx.persistence.engine import POOL_SIZE, Synchronous, writing
from langgraph_peerctx.persistence.faults import translated
from langgraph_peerctx.persistence.rows import microseconds, moment_at, now, row_of
from langgraph_peerctx.persistence.schema import (
    barred_keys,
    interactions,
    receipts,
    receivers,
    stores,
)
from langgraph_peerctx.protocol.json_values import MAX_PAYLOAD_DEPTH, plain, plain_text
from langgraph_peerctx.protocol.messages import Interaction, Verdict
from langgraph_peerctx.protocol.tickets import EffectTicket

T = TypeVar("T")

Arrival = Literal["first", "repeated", "open"]
"""`open`: an earlier attempt began, and nobody knows how it ended."""
Transaction: TypeAlias = Connection
"""SQLAlchemy's connection, inside a transaction that is not its user's to end."""

REPLY_LIMIT_BYTES = 65_536
"""A reply is told in an answer, which has 262,144 bytes for everything."""
RECEIPTS_AT_ONCE = POOL_SIZE // 2
"""Open transactions of one store: the other connections are for those who ask."""
KIND = "effect"
"""Of the interaction that a receipt leaves in the agent's memory."""

_KEY = ("agent_id", "sender_id", "effect_key")


def _under_its_key(table: Any) -> Any:
    return [table.c[name] == bindparam(name) for name in _KEY]


_RECEIPT = select(receipts).where(*_under_its_key(receipts))
_NEWEST_EPOCHS = select(
    select(barred_keys.c.below_epoch).where(*_under_its_key(barred_keys)).scalar_subquery(),
    select(func.max(receipts.c.epoch))
    .where(
        receipts.c.agent_id == bindparam("agent_id"),
        receipts.c.sender_id == bindparam("sender_id"),
        receipts.c.thread_id == bindparam("thread_id"),
    )
    .scalar_subquery(),
)
_REMEMBERED = (
    select(
        interactions.c.from_agent,
        interactions.c.to_agent,
        interactions.c.thread_id,
        interactions.c.payload,
    )
    .where(
        interactions.c.agent_id == bindparam("agent_id"),
        interactions.c.counterpart_id == bindparam("sender_id"),
        interactions.c.effect_key == bindparam("effect_key"),
    )
    .order_by(interactions.c.sequence.desc())
)
_SINCE = select(receivers.c.since).where(receivers.c.agent_id == bindparam("agent_id"))
_BIRTH = select(func.min(stores.c.created_at)).scalar_subquery()
_KNOWS_FROM: Any = select(receivers.c.since, _BIRTH).where(
    receivers.c.agent_id == bindparam("agent_id")
)


class Begun(NamedTuple):
    """What a receipt began as; `reply` is what was replied the first time."""

    arrival: Arrival
    reply: JsonValue = None


class SettledKey(NamedTuple):
    """What an agent can say of a key; `reply` is what it replied, if it was `seen`."""

    verdict: Verdict
    reply: JsonValue = None


class Joint(NamedTuple):
    """A receipt whose transaction is open; `open` ends it, and commits unless an error ends it."""

    connection: Transaction
    open: ExitStack
    begun: Begun


class Receipts(Database):
    """The receipts of the agents that own this database; safe to use from any thread.

    See `Database` for its arguments.
    """

    def __init__(
        self, url: str, *, timeout_seconds: float = 5.0, synchronous: Synchronous = "NORMAL"
    ) -> None:
        super().__init__(url, timeout_seconds=timeout_seconds, synchronous=synchronous)
        # On SQLite one writes at a time: who waits here is woken, and does not poll the file.
        self._at_once = 1 if self._is_sqlite else RECEIPTS_AT_ONCE
        self._permits = threading.BoundedSemaphore(self._at_once)
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            WeakKeyDictionary()
        )
        self._insert_receipt = self._insert_into(receipts)
        self._remember_receipt = self._insert_into(interactions).on_conflict_do_nothing()
        self._declare = self._insert_into(receivers).on_conflict_do_nothing()
        bar = self._insert_into(barred_keys)
        self._bar = bar.on_conflict_do_update(
            index_elements=_KEY,
            set_={"below_epoch": bar.excluded.below_epoch, "barred_at": bar.excluded.barred_at},
            where=barred_keys.c.below_epoch < bar.excluded.below_epoch,
        )

    def declare_receiver(self, agent_id: str) -> datetime:
        """Write down that an agent takes effects by their keys alone, from now on.

        Safe to repeat: the first time stands.

        Returns:
            Since when.

        Raises:
            ProtocolError: If the id is not legal.
            StoreError: If the database failed.
        """
        row = {"agent_id": check_id(agent_id, "agent_id"), "since": now()}

        def work(connection: Connection) -> int:
            connection.execute(self._declare, row)
            since: int = connection.execute(_SINCE, {"agent_id": agent_id}).scalar_one()
            return since

        return moment_at(self._work(work, transaction=True))

    def receiver_since(self, agent_id: str) -> datetime | None:
        """Return since when an agent takes effects by their keys alone; None if it does not.

        Raises:
            StoreError: If the database failed.
        """
        rows = self._rows(_SINCE, agent_id=agent_id)
        return moment_at(rows[0][0]) if rows else None

    def begin_receipt(self, agent_id: str, ticket: EffectTicket) -> Begun:
        """Write down that an effect has arrived and is about to be done; committed at once.

        Raises:
            ProtocolError: If the ticket is no other agent's, or its key came with another thread
                or run.
            StaleOwnerError: If its thread was taken over from whoever sent it; nothing is written.
            StoreError: If the database failed. Whether it is written may then be unknown.
        """
        # A second try would find the first one's receipt, and take it for an earlier attempt's.
        work = partial(self._begin, agent_id=agent_id, ticket=ticket)
        return self._work(work, transaction=True, again=False)

    def finish_receipt(self, agent_id: str, ticket: EffectTicket, reply: object) -> JsonValue:
        """Write down that an effect is done, and remember it as an interaction.

        Returns:
            The reply that is kept: if somebody has finished it before, theirs.

        Raises:
            ProtocolError: If the reply is no plain JSON, or too large.
            StoreError: If the database failed.
        """
        kept = plain_reply(reply)
        work = partial(self._finish, agent_id=agent_id, ticket=ticket, reply=kept)
        return self._work(work, transaction=True)

    def open_receipt(self, agent_id: str, ticket: EffectTicket) -> Joint:
        """Begin a receipt in a transaction that stays open, for what the agent does.

        Raises:
            ProtocolError: See `begin_receipt`.
            StaleOwnerError: See there.
            StoreError: If the database failed; nothing is written.
        """
        self._opened.check()
        with translated(self._engine), ExitStack() as opening:
            opening.enter_context(self._permit())
            connection = opening.enter_context(writing(self._engine))
            begun = self._begin(connection, agent_id, ticket)
            return Joint(connection, opening.pop_all(), begun)

    def close_receipt(
        self, joint: Joint, agent_id: str, ticket: EffectTicket, reply: JsonValue
    ) -> JsonValue:
        """Finish a receipt, and commit its transaction; see `finish_receipt`."""
        with translated(self._engine), joint.open:
            if joint.begun.arrival == "repeated":
                return joint.begun.reply
            return self._finish(joint.connection, agent_id, ticket, reply)

    def receiving(
        self, agent_id: str, ticket: EffectTicket, *, elsewhere: bool = False
    ) -> "Receiving":
        """Return the steps of one receipt; nothing is done yet.

        Args:
            agent_id: At whom it arrived.
            ticket: What arrived.
            elsewhere: It is done elsewhere, and not in a transaction of this database.
        """
        return (Apart if elsewhere else Together)(self, agent_id, ticket)

    def settle_key(
        self,
        agent_id: str,
        sender_id: str,
        thread_id: str,
        effect_key: str,
        *,
        intent_at: datetime,
        epoch: int,
    ) -> SettledKey:
        """Say whether an effect arrived at an agent; if not, refuse it to older owners for good.

        Args:
            agent_id: Who may have received it.
            sender_id: Who may have sent it.
            thread_id: In which thread. Of a key of another one nothing is told.
            effect_key: Its key.
            intent_at: When it was meant: of what was before it knew, an agent cannot tell.
            epoch: Under which the asker owns the thread.

        Returns:
            `not_seen` only if the key is now barred, durably, below `epoch`, and a ticket of this
            epoch would be taken.

        Raises:
            StoreError: If the database failed.
        """
        named = (agent_id, plain_text(sender_id), plain_text(effect_key))
        key = dict(zip(_KEY, named, strict=True)) | {"thread_id": plain_text(thread_id)}
        knows_all = self._knew_all_by(agent_id, intent_at)
        may_deny = knows_all and epoch > 0

        def work(connection: Connection) -> SettledKey:
            if may_deny:
                self._exclude_others(connection, key)
            found = self._received(connection, key) or self._remembered(
                connection, key, keeps_receipts=knows_all
            )
            if found is not None:
                return found
            if not may_deny or _newest_epoch(connection, key) > epoch:
                return SettledKey("cannot_tell")
            connection.execute(self._bar, key | {"below_epoch": epoch, "barred_at": now()})
            return SettledKey("not_seen")

        # Who can deny nothing needs no lock, and answers while others write.
        return self._work(work, transaction=may_deny)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until a transaction may be opened on this loop, without a thread.

        Raises:
            StoreBusyError: If that takes longer than the timeout.
        """
        loop = asyncio.get_running_loop()
        turns = self._turns.setdefault(loop, asyncio.Semaphore(self._at_once))
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await turns.acquire()
        except TimeoutError:
            raise self._too_many() from None
        try:
            yield
        finally:
            turns.release()

    async def in_one_thread(self, thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        """Do blocking work in a given thread, and wait for it with a deadline.

        It is done even if nobody waits for it any more, before what is asked of the thread later.

        Raises:
            StoreBusyError: If it takes a second longer than the timeout.
        """
        call = partial(copy_context().run, work)
        try:
            async with asyncio.timeout(self._timeout_seconds + 1):
                return await asyncio.shield(
                    asyncio.get_running_loop().run_in_executor(thread, call)
                )
        except TimeoutError:
            raise StoreBusyError(
                f"{self.name} did not answer within {self._timeout_seconds + 1:g} s: try again"
            ) from None

    @contextmanager
    def _permit(self) -> Iterator[None]:
        if not self._permits.acquire(timeout=self._timeout_seconds):
            raise self._too_many()
        try:
            yield
        finally:
            self._permits.release()

    def _too_many(self) -> StoreBusyError:
        return StoreBusyError(
            f"{self.name} did not answer in time: as many effects as it can ({self._at_once}) are "
            "being received: try again"
        )

    def _exclude_others(self, connection: Connection, key: dict[str, str]) -> None:
        """Wait until nobody else is at this key, until the end of the transaction."""
        if self._is_sqlite:
            return  # the transaction itself is the lock
        named = to_json([key[name] for name in _KEY])
        number = int.from_bytes(hashlib.sha256(named).digest()[:8], "big", signed=True)
        # What the one before us wrote must be seen, whatever isolation the server's default is.
        connection.exec_driver_sql(
            "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; "
            f"SELECT pg_advisory_xact_lock({number})"
        )

    def _begin(self, connection: Connection, agent_id: str, ticket: EffectTicket) -> Begun:
        key = _key_of(agent_id, ticket)
        self._exclude_others(connection, key)
        found = connection.execute(_RECEIPT, key).first()
        if found is not None:
            _see_that_it_is_the_same(found, ticket)
        newest = _newest_epoch(connection, key)
        if newest > ticket.epoch:
            raise StaleOwnerError(
                f"{agent_id} refuses {ticket.name!r:.80} of {ticket.sender_id} (key "
                f"{ticket.effect_key!r:.300}): it comes under epoch {ticket.epoch}, and under "
                f"epoch {newest} its thread has another owner: do not repeat it, that owner does "
                "what is still to be done"
            )
        if found is None:
            at = {"run_id": plain_text(ticket.run_id), "received_at": now()}
            row = key | at | {"epoch": ticket.epoch, "status": "open"}
            connection.execute(self._insert_receipt, row)
            return Begun("first")
        if found.epoch < ticket.epoch:
            newer = update(receipts).where(*[receipts.c[n] == key[n] for n in _KEY])
            connection.execute(newer.values(epoch=ticket.epoch))
        return Begun("open") if found.status == "open" else Begun("repeated", self._reply_in(found))

    def _finish(
        self, connection: Connection, agent_id: str, ticket: EffectTicket, reply: JsonValue
    ) -> JsonValue:
        key = _key_of(agent_id, ticket)
        done = connection.execute(
            update(receipts)
            .where(*[receipts.c[name] == key[name] for name in _KEY], receipts.c.status == "open")
            .values(status="done", reply=to_json(reply).decode(), done_at=now())
        )
        if done.rowcount == 0:
            return self._reply_in(connection.execute(_RECEIPT, key).one())
        row = row_of(agent_id, _interaction_of(agent_id, ticket, reply))
        connection.execute(self._remember_receipt, row)
        return reply

    def _knew_all_by(self, agent_id: str, moment: datetime) -> bool:
        """Tell whether everything that has arrived since a moment has a receipt here."""
        rows = self._rows(_KNOWS_FROM, agent_id=agent_id)
        return bool(rows) and max(rows[0]) <= microseconds(moment)

    def _received(self, connection: Connection, key: dict[str, str]) -> SettledKey | None:
        found = connection.execute(_RECEIPT, key).first()
        if found is None:
            return None
        if found.status == "open" or found.thread_id != key["thread_id"]:
            return SettledKey("cannot_tell")
        return SettledKey("seen", self._reply_in(found))

    def _remembered(
        self, connection: Connection, key: dict[str, str], *, keeps_receipts: bool
    ) -> SettledKey | None:
        """Say what follows from interactions that were recorded under the key.

        Who keeps receipts may have recorded that an order came, and died before doing it.
        """
        rows = connection.execute(_REMEMBERED, key).all()
        told = [row for row in rows if row.thread_id == key["thread_id"]]
        way = (key["sender_id"], key["agent_id"])
        replies = [row.payload for row in told if (row.to_agent, row.from_agent) == way]
        if any((row.from_agent, row.to_agent) == way for row in told):
            if keeps_receipts and not replies:
                return None
            return SettledKey("seen", self._parsed(replies[0] if replies else "null"))
        # A reply alone, or another thread's interaction, proves nothing and cannot be denied.
        return SettledKey("cannot_tell") if rows else None

    def _reply_in(self, receipt: Row[Any]) -> JsonValue:
        return self._parsed(receipt.reply)

    def _parsed(self, text: str) -> JsonValue:
        try:
            value: JsonValue = from_json(text)
        except (TypeError, ValueError) as error:
            raise StoreError(f"{self.name} holds a row that is no JSON: restore it") from error
        return value


class Receiving:
    """The steps of one receipt; each blocks. In any thread, and one at a time.

    Args:
        store: Where it is kept.
        agent_id: At whom it arrived.
        ticket: What arrived.
    """

    def __init__(self, store: Receipts, agent_id: str, ticket: EffectTicket) -> None:
        self._store = store
        self._agent_id = agent_id
        self._ticket = ticket
        self._begun = Begun("open")

    @property
    def connection(self) -> Transaction:
        """The open transaction.

        Raises:
            ConfigurationError: If there is none.
        """
        raise ConfigurationError(
            "an effect that is done elsewhere has no transaction here: do without, or receive it "
            "without elsewhere=True"
        )

    def begin(self) -> Begun:
        """Say what the ticket is; see `Receipts.begin_receipt`."""
        raise NotImplementedError

    def end(self, reply: JsonValue) -> JsonValue:
        """Keep the reply, unless there is one, and return the one that is kept."""
        raise NotImplementedError

    def undo(self) -> None:
        """Take back what can be. Safe to call at any time, and again."""
        raise NotImplementedError


class Apart(Receiving):
    """A receipt that is committed as open before the effect is done, and as done after it."""

    def begin(self) -> Begun:
        """See `Receiving`."""
        self._begun = self._store.begin_receipt(self._agent_id, self._ticket)
        return self._begun

    def end(self, reply: JsonValue) -> JsonValue:
        """See `Receiving`."""
        if self._begun.arrival == "repeated":
            return self._begun.reply
        return self._store.finish_receipt(self._agent_id, self._ticket, reply)

    def undo(self) -> None:
        """See `Receiving`: nobody knows how far it came, and it stays open."""


class Together(Receiving):
    """A receipt in one transaction with what the agent does."""

    def __init__(self, store: Receipts, agent_id: str, ticket: EffectTicket) -> None:
        super().__init__(store, agent_id, ticket)
        self._open = ExitStack()
        self._connection: Connection | None = None

    @property
    def connection(self) -> Transaction:
        """See `Receiving`."""
        assert self._connection is not None  # noqa: S101 - begun first
        return self._connection

    def begin(self) -> Begun:
        """See `Receiving`."""
        joint = self._store.open_receipt(self._agent_id, self._ticket)
        self._connection, self._open, self._begun = joint
        return self._begun

    def end(self, reply: JsonValue) -> JsonValue:
        """See `Receiving`."""
        joint = Joint(self.connection, self._open, self._begun)
        return self._store.close_receipt(joint, self._agent_id, self._ticket, reply)

    def undo(self) -> None:
        """See `Receiving`."""
        # Of a lost connection the database itself rolls back what was not committed.
        with suppress(SQLAlchemyError), self._open:
            if self._connection is not None:
                self._connection.rollback()


def plain_reply(reply: object) -> JsonValue:
    """Return a reply as it is kept.

    Raises:
        ProtocolError: If it is no plain JSON, or too large.
    """
    # It stands one level deep in an interaction's payload.
    kept = plain(reply, name="reply", depth=MAX_PAYLOAD_DEPTH - 1)
    size = len(to_json(kept))
    if size > REPLY_LIMIT_BYTES:
        raise ProtocolError(
            "too_large",
            f"the reply has {size} bytes, {REPLY_LIMIT_BYTES} are allowed: keep what is large "
            "elsewhere, and reply where",
        )
    return kept


def _key_of(agent_id: str, ticket: EffectTicket) -> dict[str, str]:
    if ticket.sender_id == agent_id:
        raise ProtocolError("field", f"the ticket's sender_id is {agent_id} itself, its receiver")
    return {
        "agent_id": agent_id,
        "sender_id": ticket.sender_id,
        "effect_key": plain_text(ticket.effect_key),
        "thread_id": plain_text(ticket.thread_id),
    }


def _newest_epoch(connection: Connection, key: dict[str, str]) -> int:
    """Return the epoch below which an effect is refused."""
    return max(epoch or 0 for epoch in connection.execute(_NEWEST_EPOCHS, key).one())


def _see_that_it_is_the_same(found: Row[Any], ticket: EffectTicket) -> None:
    came = {"thread_id": plain_text(ticket.thread_id), "run_id": plain_text(ticket.run_id)}
    for name, value in came.items():
        first = getattr(found, name)
        if value != first:
            raise ProtocolError(
                "field",
                f"the effect key {ticket.effect_key!r:.300} of {ticket.sender_id} came with {name} "
                f"{first!r:.80} before, and comes with {value!r:.80}: give each effect its own key",
            )


def _interaction_of(agent_id: str, ticket: EffectTicket, reply: JsonValue) -> Interaction:
    # Two senders may have the same key, and one agent hears from both.
    name = f"{KIND}:{ticket.sender_id}:{ticket.effect_key}"
    if len(name) > RECORD_ID_LIMIT:
        name = f"{KIND}:{hashlib.sha256(plain_text(name).encode()).hexdigest()}"
    return Interaction(
        interaction_id=name,
        thread_id=ticket.thread_id,
        from_agent=ticket.sender_id,
        to_agent=agent_id,
        kind=KIND,
        payload={
            "name": ticket.name,
            "epoch": ticket.epoch,
            "input_digest": ticket.input_digest,
            "reply": reply,
        },
        occurred_at=datetime.now(UTC),
        effect_key=ticket.effect_key,
        run_id=ticket.run_id,
    )
