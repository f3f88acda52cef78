"""A peer's side of a side effect: it is done once, however often it arrives.

Who receives by key can also tell, when it is asked later, that an effect never arrived, and never
will from an owner that has been superseded.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from datetime import datetime
from functools import partial
from typing import Any, Self, TypeVar

from pydantic import JsonValue

from langgraph_peerctx.errors import ConfigurationError, InDoubtError, StoreBusyError, StoreError
from langgraph_peerctx.identifiers import check_id
from langgraph_peerctx.persistence.event_store import (
    EventStore,
    aget_event_store,
    get_event_store,
)
from langgraph_peerctx.persistence.receipts import Begun, Receiving, Transaction, plain_reply
from langgraph_peerctx.protocol.tickets import EffectTicket

T = TypeVar("T")


class Receiver:
    """Takes an agent's side effects by their keys.

    To make one declares, durably and once for all, that the agent takes effects by their keys
    *only*: every way in must go through it, since what has no receipt did not arrive. So make it
    where the agent starts, before the first effect is sent: of what was sent before, it can never
    tell that it did not arrive. That is one short write which blocks; `acreate` does not.

    Args:
        agent_id: The agent that receives.
        store: Its event store, borrowed; by default the environment's. To survive a power loss too,
            open an SQLite store with `synchronous="FULL"`.

    Attributes:
        since: When it was declared first.

    Raises:
        ProtocolError: If `agent_id` is no legal id.
        StoreError: If the store cannot be opened or written.
    """

    def __init__(self, agent_id: str, *, store: EventStore | None = None) -> None:
        self.agent_id: str = check_id(agent_id, "agent_id")
        self.store: EventStore = get_event_store() if store is None else store
        self.since: datetime = self.store.declare_receiver(self.agent_id)

    @classmethod
    async def acreate(cls, agent_id: str, *, store: EventStore | None = None) -> Self:
        """Return a receiver, made without blocking the loop."""
        opened = await aget_event_store() if store is None else store
        return await opened.in_thread(partial(cls, agent_id, store=opened))

    @contextmanager
    def receive(self, ticket: EffectTicket, *, elsewhere: bool = False) -> Iterator["Receipt"]:
        """Receive an effect: the body does it if it is the first time, and sets the reply.

        Receipt, reply and what the body does through `receipt.connection` are one transaction: if
        the body raises, nothing was received. While it is open others wait, on SQLite all that
        write; another connection of the body's own (`record_interaction` too) would wait for
        itself. PostgreSQL ends a transaction that says nothing for 2 seconds. It blocks; see
        `areceive`.

        Args:
            ticket: What came with the call.
            elsewhere: The effect is not in this database. The receipt is then committed as open
                before the body, and as done after it; a body that raises, or is killed, leaves it
                open: nobody can tell any more, and the next attempt `is_open`.

        Raises:
            ProtocolError: If the ticket is of the agent itself, its key came with another thread or
                run before, or the reply is no plain JSON.
            StaleOwnerError: If the sender's thread has another owner by now: tell it, do nothing.
            InDoubtError: If the body ended without a reply although the receipt is open.
            StoreBusyError: If the database did not answer in time.
            StoreError: If it failed. If it failed to commit, ask by receiving again.
        """
        steps = self.store.receiving(self.agent_id, ticket, elsewhere=elsewhere)
        state = _State(steps.begin())
        try:
            yield Receipt(ticket, state, steps)
            state.conclude(steps.end(state.to_keep(ticket)))
        except BaseException:
            steps.undo()
            raise
        finally:
            state.is_over = True

    @asynccontextmanager
    async def areceive(
        self, ticket: EffectTicket, *, elsewhere: bool = False
    ) -> AsyncIterator["AsyncReceipt"]:
        """Receive an effect without blocking the loop; see `receive`.

        The body works in the transaction with `await receipt.work(lambda connection: ...)`.
        Cancelled, it is rolled back; cancelled while it commits, it may have been committed.
        """
        store = self.store
        steps = store.receiving(self.agent_id, ticket, elsewhere=elsewhere)
        # Its own thread: all others may be waiting for what only this transaction's end frees.
        thread = ThreadPoolExecutor(1, thread_name_prefix="peerctx-receipt")
        turn: AbstractAsyncContextManager[None] = nullcontext() if elsewhere else store.turn()
        async with turn:
            try:
                state = _State(await _begin(store, thread, steps, elsewhere=elsewhere))
                try:
                    yield AsyncReceipt(ticket, state, steps, partial(_step, store, thread))
                    end = partial(steps.end, state.to_keep(ticket))
                    state.conclude(await store.in_one_thread(thread, end))
                except BaseException:
                    with suppress(StoreBusyError):  # the database rolls back what is left to it
                        await store.in_one_thread(thread, steps.undo)
                    raise
                finally:
                    state.is_over = True
            finally:
                thread.shutdown(wait=False)


class Received:
    """What a ticket turned out to be.

    Attributes:
        ticket: What came with the call.
    """

    def __init__(self, ticket: EffectTicket, state: "_State", steps: Receiving) -> None:
        self.ticket: EffectTicket = ticket
        self._state = state
        self._steps = steps

    @property
    def is_first(self) -> bool:
        """Whether the effect is to be done now."""
        return self._state.begun.arrival == "first"

    @property
    def is_open(self) -> bool:
        """Whether an earlier attempt began elsewhere, and nobody knows how it ended.

        Find out, do what is left to do, and set `reply`; or raise, and it stays open.
        """
        return self._state.begun.arrival == "open"

    @property
    def reply(self) -> Any:
        """What the sender is answered; of an effect that was done before, what it was then.

        It is set to plain JSON, by default None. After the body it is what is kept.
        """
        return self._state.reply

    @reply.setter
    def reply(self, reply: Any) -> None:
        self._state.answer(reply)


class Receipt(Received):
    """A receipt, as `Receiver.receive` gives it."""

    @property
    def connection(self) -> Transaction:
        """SQLAlchemy's connection to the store, in the receipt's transaction: do not end it."""
        return self._steps.connection


class AsyncReceipt(Received):
    """A receipt, as `Receiver.areceive` gives it."""

    def __init__(
        self,
        ticket: EffectTicket,
        state: "_State",
        steps: Receiving,
        step: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        super().__init__(ticket, state, steps)
        self._step = step

    async def work(self, work: Callable[[Transaction], T]) -> T:
        """Do blocking work in the receipt's transaction, in its thread.

        Args:
            work: Is given SQLAlchemy's connection to the store. It must not end the transaction,
                and returns rows rather than a result that would be read on the loop.

        Raises:
            ConfigurationError: If the effect is done elsewhere.
            StoreBusyError: If it takes a second longer than the store's timeout.
            StoreError: If the receipt is over.
        """
        if self._state.is_over:
            raise StoreError("this receipt is over: work inside of `async with`")
        connection = self._steps.connection
        result: T = await self._step(lambda: work(connection))
        return result


class _State:
    """What a receipt began as, and its reply."""

    def __init__(self, begun: Begun) -> None:
        self.begun = begun
        self.reply = begun.reply
        self.is_over = False
        self._is_answered = False

    def answer(self, reply: object) -> None:
        """Take what the body replies."""
        if self.is_over or self.begun.arrival == "repeated":
            raise ConfigurationError(
                "the reply of an effect that is done stands: set it inside of the body, where the "
                "receipt is first or open"
            )
        self.reply = plain_reply(reply)
        self._is_answered = True

    def to_keep(self, ticket: EffectTicket) -> JsonValue:
        """Return the body's reply."""
        if self.begun.arrival == "open" and not self._is_answered:
            raise InDoubtError(
                f"an earlier attempt at {ticket.name!r:.80} of {ticket.sender_id} began, and "
                "nobody knows how it ended: where the receipt is open, look whether it was done, "
                "do it if not, and set its reply"
            )
        return self.reply

    def conclude(self, kept: JsonValue) -> None:
        """Take over what is kept: another attempt may have ended before."""
        self.reply = kept


async def _begin(
    store: EventStore, thread: ThreadPoolExecutor, steps: Receiving, *, elsewhere: bool
) -> Begun:
    if elsewhere:
        return await store.in_thread(steps.begin)  # the body may be long: it keeps no thread
    try:
        return await store.in_one_thread(thread, steps.begin)
    except BaseException:
        thread.submit(steps.undo)  # it may begin yet, when nobody waits any more
        raise


async def _step(store: EventStore, thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await store.in_one_thread(thread, work)
