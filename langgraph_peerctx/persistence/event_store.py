"""What an agent remembers: interactions with others, in its own database."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio.to_thread
from pydantic import ValidationError
from pydantic_core import from_json, to_json
from sqlalchemy import Row, Select, bindparam, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ProtocolError, StoreBusyError
from langgraph_peerctx.identifiers import check_id, new_id
from langgraph_peerctx.persistence.engine import (
    Forked,
    Synchronous,
    connect,
    migrate,
    name_of,
    translated,
    writing,
)
from langgraph_peerctx.persistence.schema import interactions, memories, stores
from langgraph_peerctx.protocol.json_values import plain_object, plain_text
from langgraph_peerctx.protocol.messages import Interaction, Json

T = TypeVar("T")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EVER = (-(2**62), 2**62)
_FIELDS = (
    "interaction_id",
    "thread_id",
    "from_agent",
    "to_agent",
    "kind",
    "payload",
    "occurred_at",
    "sequence",
    "effect_key",
    "run_id",
    "checkpoint_id",
)
_KEPT = set(_FIELDS)
_TOLD = select(*(interactions.c[name] for name in _FIELDS)).where(
    interactions.c.agent_id == bindparam("agent_id")
)
_NEWEST_FIRST = (
    _TOLD.where(
        interactions.c.thread_id == bindparam("thread_id"),
        interactions.c.occurred_at.between(bindparam("since"), bindparam("until")),
    )
    .order_by(interactions.c.occurred_at.desc(), interactions.c.sequence.desc())
    .limit(bindparam("limit"))
)
_WITH = _NEWEST_FIRST.where(interactions.c.counterpart_id == bindparam("counterpart_id"))
_OF = _NEWEST_FIRST
_BY_ID = _TOLD.where(interactions.c.interaction_id == bindparam("interaction_id"))
_BY_EFFECT = _TOLD.where(interactions.c.effect_key == bindparam("effect_key")).order_by(
    interactions.c.sequence.desc()
)
_MEMORY = select(memories.c.state).where(
    memories.c.agent_id == bindparam("agent_id"),
    memories.c.counterpart_id == bindparam("counterpart_id"),
)


class EventStore:
    """Interactions and memory of the agents that own this database; safe to use from any thread.

    Each method has an async twin with `a` in front, which works in a thread and gives up after the
    timeout. Opening brings the schema to this release.

    Args:
        url: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`.
        timeout_seconds: How long a lock, a connection or a statement may take.
        synchronous: SQLite only: see `engine.connect`.

    Raises:
        ConfigurationError: If the URL is wrong, or a driver is missing.
        StoreError: If the database cannot be opened; the message says what to do.
    """

    def __init__(
        self, url: str, *, timeout_seconds: float = 5.0, synchronous: Synchronous = "NORMAL"
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._fork = Forked()
        self._engine = connect(url, timeout_seconds=timeout_seconds, synchronous=synchronous)
        self._reader = connect(
            url, timeout_seconds=timeout_seconds, synchronous=synchronous, reading=True
        )
        dialect = sqlite if self._engine.dialect.name == "sqlite" else postgresql
        self._insert = dialect.insert(interactions).on_conflict_do_nothing()
        upsert = dialect.insert(memories)
        self._upsert_memory = upsert.on_conflict_do_update(
            index_elements=["agent_id", "counterpart_id"],
            set_={"state": upsert.excluded.state, "updated_at": upsert.excluded.updated_at},
        )
        self._register = dialect.insert(stores)
        try:
            migrate(self._engine)
            self._note_birth()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The database's address, without its password."""
        return name_of(self._engine)

    def append(self, agent_id: str, interaction: Interaction) -> Interaction:
        """Record one interaction; it is durable when this returns.

        Args:
            agent_id: Whose memory it becomes; one of the two parties.
            interaction: Its id is the idempotency key: the same id again changes nothing.

        Returns:
            What is stored, with its sequence: of a repeated id, what was stored first.

        Raises:
            ProtocolError: If the agent is no party to it, or the payload is no plain JSON.
            StoreBusyError: If the database did not answer in time; nothing was recorded.
            StoreError: If the database failed.
        """
        row = _row(agent_id, interaction)
        self._fork.check()
        with translated(self._engine), writing(self._engine) as connection:
            connection.execute(self._insert, row)
            found = connection.execute(
                _BY_ID, {"agent_id": agent_id, "interaction_id": interaction.interaction_id}
            ).one()
        return _interaction(found)

    def append_many(self, agent_id: str, items: Iterable[Interaction]) -> int:
        """Record interactions in one transaction, all or none; see `append`.

        Returns:
            How many were new.
        """
        rows = [_row(agent_id, interaction) for interaction in items]
        if not rows:
            return 0
        self._fork.check()
        with translated(self._engine), writing(self._engine) as connection:
            return connection.execute(self._insert, rows).rowcount

    def interactions_with(
        self,
        agent_id: str,
        counterpart_id: str,
        *,
        thread_id: str,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 200,
    ) -> list[Interaction]:
        """Return what passed between two agents in a thread, newest first.

        Args:
            agent_id: Whose memory.
            counterpart_id: The other party.
            thread_id: The thread.
            since: Not earlier than this.
            until: Not later than this.
            limit: At most so many.

        Raises:
            StoreBusyError: If the database did not answer in time.
            StoreError: If it failed.
        """
        pair = {"agent_id": agent_id, "counterpart_id": counterpart_id}
        return self._find(_WITH, pair | _window(thread_id, since, until, limit))

    def interactions_of(
        self,
        agent_id: str,
        *,
        thread_id: str,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 200,
    ) -> list[Interaction]:
        """Return everything that an agent remembers of a thread, newest first.

        See `interactions_with`.
        """
        return self._find(_OF, {"agent_id": agent_id} | _window(thread_id, since, until, limit))

    def by_effect_key(self, agent_id: str, effect_key: str) -> list[Interaction]:
        """Return what an agent recorded under an effect's key, last recorded first."""
        return self._find(_BY_EFFECT, {"agent_id": agent_id, "effect_key": effect_key})

    def remember(self, agent_id: str, counterpart_id: str, state: Mapping[str, Any]) -> None:
        """Keep what one agent wants to remember of another; it replaces what was there.

        Raises:
            ProtocolError: If an id is illegal, or the state is no plain JSON.
            StoreError: If the database failed.
        """
        row = {
            "agent_id": check_id(agent_id, "agent_id"),
            "counterpart_id": check_id(counterpart_id, "counterpart_id"),
            "state": to_json(plain_object(state, name="state")).decode(),
            "updated_at": time.time_ns() // 1_000,
        }
        self._fork.check()
        with translated(self._engine), writing(self._engine) as connection:
            connection.execute(self._upsert_memory, row)

    def memory_of(self, agent_id: str, counterpart_id: str) -> Json:
        """Return what one agent remembers of another; empty if nothing.

        Raises:
            StoreError: If the database failed.
        """
        pair = {"agent_id": agent_id, "counterpart_id": counterpart_id}
        rows = self._rows(_MEMORY, pair)
        return from_json(rows[0][0]) if rows else {}

    def created_at(self) -> datetime:
        """Return when this store was made: of what was before, it cannot tell."""
        return _moment(self._rows(select(func.min(stores.c.created_at)), {})[0][0])

    def ping(self) -> None:
        """See that the database answers.

        Raises:
            StoreError: If it does not.
        """
        self._rows(select(1), {})

    def close(self) -> None:
        """Close every connection. Safe to call twice."""
        self._reader.dispose()
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do blocking work in a thread, and stop waiting for it after the timeout.

        Raises:
            StoreBusyError: If it takes longer; the thread is left to end by itself.
        """
        # A database waits out its own timeout first, and says better what it waited for.
        try:
            async with asyncio.timeout(self._timeout_seconds + 1):
                return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)
        except TimeoutError:
            raise StoreBusyError(
                f"{self.name} did not answer within {self._timeout_seconds:g} s"
            ) from None

    async def aappend(self, agent_id: str, interaction: Interaction) -> Interaction:
        """See `append`."""
        return await self.in_thread(partial(self.append, agent_id, interaction))

    async def aappend_many(self, agent_id: str, items: Iterable[Interaction]) -> int:
        """See `append_many`."""
        return await self.in_thread(partial(self.append_many, agent_id, list(items)))

    async def ainteractions_with(
        self, agent_id: str, counterpart_id: str, **window: Any
    ) -> list[Interaction]:
        """See `interactions_with`."""
        return await self.in_thread(
            partial(self.interactions_with, agent_id, counterpart_id, **window)
        )

    async def ainteractions_of(self, agent_id: str, **window: Any) -> list[Interaction]:
        """See `interactions_of`."""
        return await self.in_thread(partial(self.interactions_of, agent_id, **window))

    async def aby_effect_key(self, agent_id: str, effect_key: str) -> list[Interaction]:
        """See `by_effect_key`."""
        return await self.in_thread(partial(self.by_effect_key, agent_id, effect_key))

    async def aremember(self, agent_id: str, counterpart_id: str, state: Mapping[str, Any]) -> None:
        """See `remember`."""
        await self.in_thread(partial(self.remember, agent_id, counterpart_id, state))

    async def amemory_of(self, agent_id: str, counterpart_id: str) -> Json:
        """See `memory_of`."""
        return await self.in_thread(partial(self.memory_of, agent_id, counterpart_id))

    async def aping(self) -> None:
        """See `ping`."""
        await self.in_thread(self.ping)

    def _find(self, statement: Select[Any], parameters: dict[str, Any]) -> list[Interaction]:
        return [_interaction(row) for row in self._rows(statement, parameters)]

    def _rows(self, statement: Select[Any], parameters: dict[str, Any]) -> list[Row[Any]]:
        self._fork.check()
        with translated(self._engine):
            try:
                return self._read(statement, parameters)
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                return self._read(statement, parameters)  # a pooled connection was terminated

    def _read(self, statement: Select[Any], parameters: dict[str, Any]) -> list[Row[Any]]:
        with self._reader.connect() as connection:
            return list(connection.execute(statement, parameters))

    def _note_birth(self) -> None:
        if self._rows(select(stores.c.store_id).limit(1), {}):
            return
        row = {"store_id": new_id(), "created_at": time.time_ns() // 1_000}
        with translated(self._engine), writing(self._engine) as connection:
            connection.execute(self._register, row)


_SHARED: dict[tuple[int, str], EventStore] = {}
_SHARING = threading.Lock()


def get_event_store(url: str | None = None) -> EventStore:
    """Return this process's store at an address, opened when first asked for.

    It stays open as long as the process: do not close it.

    Args:
        url: By default the environment's `PEER_CONTEXT_DATABASE_URL`.

    Raises:
        ConfigurationError: If the URL is wrong, or a driver is missing.
        StoreError: If the database cannot be opened.
    """
    settings = PeerContextSettings()
    key = os.getpid(), url or settings.database_url
    with _SHARING:
        if key not in _SHARED:
            _SHARED[key] = EventStore(key[1], timeout_seconds=settings.database_timeout_seconds)
        return _SHARED[key]


def record_interaction(
    *,
    agent_id: str,
    from_agent: str,
    to_agent: str,
    thread_id: str,
    kind: str,
    payload: Mapping[str, Any] | None = None,
    interaction_id: str | None = None,
    occurred_at: datetime | None = None,
    effect_key: str | None = None,
    run_id: str | None = None,
    checkpoint_id: str | None = None,
    store: EventStore | None = None,
) -> Interaction:
    """Record what passed between two agents; it is durable when this returns.

    Args:
        agent_id: Whose memory it becomes; one of the two parties.
        from_agent: Who acted.
        to_agent: On whom.
        thread_id: In which thread.
        kind: What it was, in a word: `message`, `order`, `reply`, ...
        payload: Plain JSON.
        interaction_id: The idempotency key; by default a fresh one. Name it where the same
            interaction may be recorded again: by a retry, or by the other party.
        occurred_at: When it happened, with a time zone; by default now.
        effect_key: The side effect that it belongs to.
        run_id: The run that it belongs to.
        checkpoint_id: The checkpoint that the run stood at.
        store: By default the environment's.

    Returns:
        What is stored, with its sequence.

    Raises:
        ProtocolError: If a value is illegal; it names it.
        StoreError: If the database failed; nothing was recorded.
    """
    try:
        interaction = Interaction(
            interaction_id=interaction_id or new_id(),
            thread_id=thread_id,
            from_agent=from_agent,
            to_agent=to_agent,
            kind=kind,
            payload=plain_object(payload or {}),
            occurred_at=occurred_at or datetime.now(UTC),
            effect_key=effect_key,
            run_id=run_id,
            checkpoint_id=checkpoint_id,
        )
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(str(step) for step in fault["loc"])
        raise ProtocolError("field", f"{path}: {fault['msg']}"[:400]) from None
    return (store or get_event_store()).append(agent_id, interaction)


async def arecord_interaction(*, store: EventStore | None = None, **fields: Any) -> Interaction:
    """Record what passed between two agents, without blocking the loop; see the sync twin."""
    where = await anyio.to_thread.run_sync(get_event_store) if store is None else store
    return await where.in_thread(partial(record_interaction, store=where, **fields))


def _row(agent_id: str, interaction: Interaction) -> dict[str, Any]:
    """Return the row of an interaction, made such that both databases keep the same."""
    check_id(agent_id, "agent_id")
    parties = (interaction.from_agent, interaction.to_agent)
    if agent_id not in parties:
        raise ProtocolError(
            "field",
            f"{agent_id} is no party to the interaction from {parties[0]} to {parties[1]}: "
            "an agent records what it took part in",
        )
    counterpart_id = parties[1] if parties[0] == agent_id else parties[0]
    return {
        "agent_id": agent_id,
        "interaction_id": plain_text(interaction.interaction_id),
        "counterpart_id": counterpart_id,
        "thread_id": plain_text(interaction.thread_id),
        "from_agent": interaction.from_agent,
        "to_agent": interaction.to_agent,
        "kind": interaction.kind,
        "payload": to_json(plain_object(interaction.payload)).decode(),
        "occurred_at": _microseconds(interaction.occurred_at),
        "recorded_at": time.time_ns() // 1_000,
        "effect_key": _text_or_none(interaction.effect_key),
        "run_id": _text_or_none(interaction.run_id),
        "checkpoint_id": _text_or_none(interaction.checkpoint_id),
    }


def _text_or_none(text: str | None) -> str | None:
    return None if text is None else plain_text(text)


def _interaction(row: Row[Any]) -> Interaction:
    """Return the interaction in a row, without validating again what was when it came in."""
    fields = dict(zip(_FIELDS, row, strict=True))
    fields["payload"] = from_json(fields["payload"])
    fields["occurred_at"] = _moment(fields["occurred_at"])
    return Interaction.model_construct(_KEPT, **fields)


def _window(
    thread_id: str, since: datetime | None, until: datetime | None, limit: int
) -> dict[str, Any]:
    return {
        "thread_id": thread_id,
        "since": _EVER[0] if since is None else _microseconds(since),
        "until": _EVER[1] if until is None else _microseconds(until),
        "limit": limit,
    }


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _moment(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
