"""What an agent remembers: interactions with others, in its own database."""

import atexit
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, NotRequired, Required, TypedDict, TypeVar, Unpack

from pydantic import ValidationError
from pydantic_core import from_json
from sqlalchemy import Connection, Select, bindparam, func, select

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import (
    ConfigurationError,
    ProtocolError,
    StoreError,
)
from langgraph_peerctx.identifiers import check_id, new_id
from langgraph_peerctx.persistence.database import open_in_thread
from langgraph_peerctx.persistence.engine import Synchronous
from langgraph_peerctx.persistence.receipts import Receipts
from langgraph_peerctx.persistence.rows import (
    EARLIEST,
    FIELDS,
    LATEST,
    interactions_in,
    json_text,
    microseconds,
    moment_at,
    now,
    row_of,
    stored,
)
from langgraph_peerctx.persistence.schema import interactions, memories, stores
from langgraph_peerctx.protocol.json_values import plain_object
from langgraph_peerctx.protocol.messages import Interaction, Json

T = TypeVar("T")

LIMIT = 200
"""How many interactions a query returns when nobody says."""

_TOLD = select(*(interactions.c[name] for name in FIELDS)).where(
    interactions.c.agent_id == bindparam("agent_id")
)
_OF = (
    _TOLD.where(
        interactions.c.thread_id == bindparam("thread_id"),
        interactions.c.occurred_at.between(bindparam("since"), bindparam("until")),
    )
    .order_by(interactions.c.occurred_at.desc(), interactions.c.sequence.desc())
    .limit(bindparam("limit"))
)
_WITH = _OF.where(interactions.c.counterpart_id == bindparam("counterpart_id"))
_BY_ID = _TOLD.where(interactions.c.interaction_id == bindparam("interaction_id"))
_BY_EFFECT = _TOLD.where(interactions.c.effect_key == bindparam("effect_key")).order_by(
    interactions.c.sequence.desc()
)
_MEMORY = select(memories.c.state).where(
    memories.c.agent_id == bindparam("agent_id"),
    memories.c.counterpart_id == bindparam("counterpart_id"),
)
_BIRTH = select(func.min(stores.c.created_at))
_PING = select(1)


class Window(TypedDict, total=False):
    """Which of a thread's interactions are asked for; see `EventStore.interactions_with`."""

    thread_id: Required[str]
    since: datetime | None
    until: datetime | None
    limit: int


class EventStore(Receipts):
    """Interactions, memory and receipts of the agents that own this database.

    Safe to use from any thread. What concerns interactions and memory has async twins with `a` in
    front, which work in a thread and stop waiting a second after the timeout.

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
        super().__init__(url, timeout_seconds=timeout_seconds, synchronous=synchronous)
        once = self._insert_into(interactions).on_conflict_do_nothing()
        self._insert = once.returning(interactions.c.sequence)
        # Rows go to PostgreSQL in statements of many: unasked, nobody adds up their counts.
        self._insert_many = once.execution_options(preserve_rowcount=True)
        memory = self._insert_into(memories)
        self._remember = memory.on_conflict_do_update(
            index_elements=["agent_id", "counterpart_id"],
            set_={"state": memory.excluded.state, "updated_at": memory.excluded.updated_at},
        )

    def append(self, agent_id: str, interaction: Interaction) -> Interaction:
        """Record one interaction; it is durable when this returns.

        Args:
            agent_id: Whose memory it becomes; one of the two parties.
            interaction: Its id is the idempotency key: the same id again changes nothing.

        Returns:
            What is stored, with its sequence: of a repeated id, what was stored first.

        Raises:
            ProtocolError: If the agent is no party to it, or the payload is no plain JSON.
            StoreBusyError: If the database did not answer in time. A server that fell silent may
                still have recorded it: append it again.
            StoreError: If the database failed.
        """
        row = row_of(agent_id, interaction)
        key = {"agent_id": agent_id, "interaction_id": row["interaction_id"]}

        def work(connection: Connection) -> Interaction:
            sequence = connection.execute(self._insert, row).scalar_one_or_none()
            if sequence is not None:
                return stored(row, sequence)
            return interactions_in([connection.execute(_BY_ID, key).one()])[0]

        return self._work(work)

    def append_many(self, agent_id: str, items: Iterable[Interaction]) -> int:
        """Record interactions in one transaction, all or none; see `append`.

        Returns:
            How many were new.
        """
        rows = [row_of(agent_id, interaction) for interaction in items]

        def work(connection: Connection) -> int:
            return connection.execute(self._insert_many, rows).rowcount

        return self._work(work, transaction=True) if rows else 0

    def interactions_with(
        self,
        agent_id: str,
        counterpart_id: str,
        *,
        thread_id: str,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = LIMIT,
    ) -> list[Interaction]:
        """Return what passed between two agents in a thread, newest first.

        Args:
            agent_id: Whose memory.
            counterpart_id: The other party.
            thread_id: The thread.
            since: Not earlier than this.
            until: Not later than this.
            limit: At most so many; at least 1.

        Raises:
            ConfigurationError: If `limit` is less, or a moment has no time zone.
            StoreBusyError: If the database did not answer in time.
            StoreError: If it failed.
        """
        window = _window(thread_id, since, until, limit)
        return self._find(_WITH, agent_id=agent_id, counterpart_id=counterpart_id, **window)

    def interactions_of(
        self,
        agent_id: str,
        *,
        thread_id: str,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = LIMIT,
    ) -> list[Interaction]:
        """Return everything that an agent remembers of a thread, newest first.

        See `interactions_with`.
        """
        window = _window(thread_id, since, until, limit)
        return self._find(_OF, agent_id=agent_id, **window)

    def by_effect_key(self, agent_id: str, effect_key: str) -> list[Interaction]:
        """Return what an agent recorded under an effect's key, last recorded first."""
        return self._find(_BY_EFFECT, agent_id=agent_id, effect_key=effect_key)

    def remember(self, agent_id: str, counterpart_id: str, state: Mapping[str, Any]) -> None:
        """Keep what one agent wants to remember of another; it replaces what was there.

        Raises:
            ProtocolError: If an id is illegal, or the state is no plain JSON.
            StoreError: If the database failed.
        """
        row = {
            "agent_id": check_id(agent_id, "agent_id"),
            "counterpart_id": check_id(counterpart_id, "counterpart_id"),
            "state": json_text(state, name="state"),
            "updated_at": now(),
        }
        self._work(lambda connection: connection.execute(self._remember, row))

    def memory_of(self, agent_id: str, counterpart_id: str) -> Json:
        """Return what one agent remembers of another; empty if nothing.

        Raises:
            StoreError: If the database failed.
        """
        rows = self._rows(_MEMORY, agent_id=agent_id, counterpart_id=counterpart_id)
        return self._read(lambda: from_json(rows[0][0])) if rows else {}

    def created_at(self) -> datetime:
        """Return when this store was made: of what was before, it cannot tell.

        Raises:
            StoreError: If the database failed.
        """
        return moment_at(self._rows(_BIRTH)[0][0])

    async def aappend(self, agent_id: str, interaction: Interaction) -> Interaction:
        """See `append`."""
        return await self.in_thread(partial(self.append, agent_id, interaction))

    async def aappend_many(self, agent_id: str, items: Iterable[Interaction]) -> int:
        """See `append_many`."""
        return await self.in_thread(partial(self.append_many, agent_id, list(items)))

    async def ainteractions_with(
        self, agent_id: str, counterpart_id: str, **window: Unpack[Window]
    ) -> list[Interaction]:
        """See `interactions_with`."""
        work = partial(self.interactions_with, agent_id, counterpart_id, **window)
        return await self.in_thread(work)

    async def ainteractions_of(self, agent_id: str, **window: Unpack[Window]) -> list[Interaction]:
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

    async def acreated_at(self) -> datetime:
        """See `created_at`."""
        return await self.in_thread(self.created_at)

    def _find(self, statement: Select[Any], **parameters: Any) -> list[Interaction]:
        rows = self._rows(statement, **parameters)
        return self._read(lambda: interactions_in(rows))

    def _read(self, parse: Callable[[], T]) -> T:
        try:
            return parse()
        except ValueError as error:
            raise StoreError(f"{self.name} holds a row that is no JSON: restore it") from error


_SHARED: dict[tuple[int, str], EventStore] = {}
"""By process too: a forked child keeps its parent's stores as they are, and opens its own."""
_sharing = threading.Lock()


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
    with _sharing:
        store = _SHARED.get(key)
        if store is None or store.closed:
            store = EventStore(key[1], timeout_seconds=settings.database_timeout_seconds)
            _SHARED[key] = store
        return store


async def aget_event_store(url: str | None = None) -> EventStore:
    """Return this process's store at an address, without blocking the loop.

    See `get_event_store`.

    Raises:
        StoreBusyError: If opening it takes longer than `OPENING_TIMEOUT_SECONDS`.
    """
    return await open_in_thread(get_event_store, url)


def _unlock_in_a_forked_child() -> None:
    global _sharing  # noqa: PLW0603 - a thread that the child does not have may hold it
    _sharing = threading.Lock()


os.register_at_fork(after_in_child=_unlock_in_a_forked_child)


@atexit.register
def _close_shared() -> None:
    for store in _SHARED.values():
        store.close()


class InteractionFields(TypedDict):
    """What `record_interaction` takes."""

    agent_id: str
    from_agent: str
    to_agent: str
    thread_id: str
    kind: str
    payload: NotRequired[Mapping[str, Any] | None]
    interaction_id: NotRequired[str | None]
    occurred_at: NotRequired[datetime | None]
    effect_key: NotRequired[str | None]
    run_id: NotRequired[str | None]
    checkpoint_id: NotRequired[str | None]


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
        StoreError: If the database failed; see `EventStore.append`.
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


async def arecord_interaction(
    *, store: EventStore | None = None, **fields: Unpack[InteractionFields]
) -> Interaction:
    """Record what passed between two agents, without blocking the loop.

    See `record_interaction`.
    """
    where = await aget_event_store() if store is None else store
    return await where.in_thread(partial(record_interaction, store=where, **fields))


def _window(
    thread_id: str, since: datetime | None, until: datetime | None, limit: int
) -> dict[str, Any]:
    if limit < 1:
        raise ConfigurationError(f"limit={limit}: ask for at least 1")
    return {
        "thread_id": thread_id,
        "since": EARLIEST if since is None else microseconds(since),
        "until": LATEST if until is None else microseconds(until),
        "limit": min(limit, LATEST),
    }
