"""A checkpoint's write in one transaction with its lease, where one PostgreSQL holds both.

A process can be frozen between a check and a write. Here the lease's row is locked until the write
is committed: who takes the thread over waits for that, or until the server has ended the session of
a writer that says nothing. The connections are our own: a saver's carries everybody's statements.

The only module outside of `persistence` that needs psycopg: it is imported when there is a saver
that has it.
"""

import asyncio
import copy
import os
import secrets
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import psycopg
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from psycopg import AsyncClientCursor, AsyncConnection, AsyncPipeline
from psycopg.pq import TransactionStatus
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool

from langgraph_peerctx.durability.ownership import Held
from langgraph_peerctx.errors import StoreBusyError, StoreError
from langgraph_peerctx.persistence.leases import Lease, Leases
from langgraph_peerctx.protocol.json_values import plain_text

T = TypeVar("T")

IDLE_SECONDS = 1.5
"""How long a writer that says nothing keeps the lease's row locked."""
BUSY_SECONDS = 4.0
"""How long one that works may: less than a claim waits for the row by default."""
DEADLINE_SECONDS = 10.0
"""How long we wait for a server that says nothing."""
CONNECTIONS = 8
"""More threads than these wait for each other; a bare saver writes one after the other."""

_HAS_TRANSACTION_TIMEOUT = 170_000
_ENDED = ("FATAL", "PANIC")
_ENDED_BEFORE_A_COMMIT = ("25P03", "25P04")
"""The two timeouts end a session that waits for its client's next word."""
_LOCK = """
BEGIN ISOLATION LEVEL READ COMMITTED;
SELECT agent_id, thread_id, run_id, epoch, owner_id, owner_incarnation,
  (expires_at / 1000000.0 - extract(epoch FROM clock_timestamp()))::float8 AS seconds_left
FROM peerctx_leases WHERE thread_id = %s FOR SHARE
"""
_LOOK = """
SELECT pg_try_advisory_xact_lock(%s) AS was_free, pg_backend_pid() AS pid,
  current_user::text AS role,
  to_regclass('checkpoints')::oid::bigint AS checkpoints,
  to_regclass('checkpoint_blobs')::oid::bigint AS blobs,
  to_regclass('checkpoint_writes')::oid::bigint AS writes,
  to_regclass('peerctx_leases')::oid::bigint AS leases,
  has_table_privilege(to_regclass('peerctx_leases'), 'SELECT')
    AND has_table_privilege(to_regclass('peerctx_leases'), 'UPDATE') AS may_lock
"""
_THE_SAME = ("role", "checkpoints", "blobs", "writes", "leases", "may_lock")

Write = Callable[[AsyncPostgresSaver, int | None], Awaitable[T]]
"""Writes through a saver, under an epoch."""


class Connection(AsyncConnection[DictRow]):
    """A connection whose client counts as idle, in a transaction, after a pipeline too.

    Attributes:
        lingers: Whether anything may be waited for between a pipeline's end and the commit. If not,
            to say that we are idle takes as long as to commit.
    """

    lingers: bool = True

    @asynccontextmanager
    async def pipeline(self) -> AsyncIterator[AsyncPipeline]:
        """See psycopg's, which ends with a flush: the server's clock stands still from there."""
        async with super().pipeline() as pipeline:
            yield pipeline
        if self.lingers and self.info.transaction_status is TransactionStatus.INTRANS:
            await self.execute("")


class Owning(Protocol):
    """Says what is ours: an `Ownership`, or one as an agent sees it."""

    @property
    def leases(self) -> Leases:
        """Where the leases are."""
        ...

    async def aheld(self, thread_id: str) -> Held | None:
        """Return what we hold of a thread, and renew it first if it has become old."""
        ...

    def judge(self, thread_id: str, held: Held | None, found: list[Lease]) -> int | None:
        """Return the epoch to write under."""
        ...


class OwnedFence(Protocol):
    """A fence that stands on what is owned."""

    async def aownership(self) -> Owning | None:
        """Return it; None if there is none at the moment."""
        ...


class SharedTransactions:
    """A saver's writes, each in one transaction with the thread's lease.

    Its connections are opened when they are needed, and closed by `aclose`, or when this object
    goes; nothing runs in the background. Made and used on the saver's loop.

    Args:
        saver: What wants to write.
        fence: Who may.
    """

    def __init__(self, saver: AsyncPostgresSaver, fence: OwnedFence) -> None:
        self._loop = saver.loop
        self._fence = fence
        self._open: _Connections | None = None

    async def ownership(self, saver: AsyncPostgresSaver) -> Owning | None:
        """Return who judges; None if saver and leases are not known to share a database."""
        if asyncio.get_running_loop() is not self._loop:
            return None
        ownership = await self._fence.aownership()
        if ownership is None:
            return None
        if self._open is None or self._open.leases is not ownership.leases:
            self._open = _Connections(ownership.leases)
        return ownership if await self._open.are_shared_with(saver) else None

    async def write(
        self, saver: AsyncPostgresSaver, ownership: Owning, thread_id: str, write: Write[T]
    ) -> T:
        """Lock the lease, judge it, write and commit; once more if the connection was lost.

        Raises:
            StaleOwnerError: If the thread is not ours; nothing was written.
            StoreError: If the server said nothing, or is another one by now.
            psycopg.Error: As the saver does.
        """
        assert self._open is not None  # noqa: S101 - `ownership` comes first
        # Before its row is locked: a renewal would wait for us.
        held = await ownership.aheld(thread_id)

        async def fenced(connection: Connection, found: list[Lease]) -> T:
            return await write(_on(saver, connection), ownership.judge(thread_id, held, found))

        return await self._open.write(saver, thread_id, fenced)

    def wait_for(self, written: Coroutine[Any, Any, T]) -> T:
        """Wait, in another thread than the loop's, as the saver's own synchronous methods do."""
        return asyncio.run_coroutine_threadsafe(written, self._loop).result()

    async def aclose(self) -> None:
        """Close what is not in use; a later write opens connections anew. Safe to call twice."""
        if self._open is not None:
            self._open.close()


class _Connections:
    """Connections that are proven to be in the leases' database."""

    def __init__(self, leases: Leases) -> None:
        self.leases = leases
        self._are_shared: bool | None = None
        self._looking = asyncio.Lock()
        self._room = asyncio.Semaphore(CONNECTIONS)
        self._turns = weakref.WeakValueDictionary[str, asyncio.Lock]()
        self._idle: list[Connection] = []
        weakref.finalize(self, _close_all, self._idle, os.getpid())

    async def are_shared_with(self, saver: AsyncPostgresSaver) -> bool:
        """Look once, and keep the first connection."""
        if self._are_shared is None:
            async with self._looking:
                if self._are_shared is None:
                    first = await self._opened(saver)
                    self._idle.extend([] if first is None else [first])
                    self._are_shared = first is not None
        return self._are_shared

    async def write(
        self,
        saver: AsyncPostgresSaver,
        thread_id: str,
        work: Callable[[Connection, list[Lease]], Awaitable[T]],
    ) -> T:
        # One at a time of a thread: who wants to renew the lease or take it gets in between.
        turn = self._turns.setdefault(thread_id, asyncio.Lock())
        async with turn, self._room:
            transaction = _Transaction(await self._connection(saver))
            try:
                result = await transaction.run(thread_id, work)
            except psycopg.Error as error:
                if not transaction.was_lost_uncommitted(error):
                    raise
                self.close()  # a server that was restarted ended the others too
                transaction = _Transaction(await self._connection(saver))
                result = await transaction.run(thread_id, work)
            self._idle.append(transaction.connection)
            return result

    def close(self) -> None:
        _close_all(self._idle, os.getpid())

    async def _connection(self, saver: AsyncPostgresSaver) -> Connection:
        if self._idle:
            return self._idle.pop()
        opened = await self._opened(saver)
        if opened is None:
            raise StoreError(
                "the checkpoints are not in the database of the leases any more: "
                "see where both addresses lead"
            )
        return opened

    async def _opened(self, saver: AsyncPostgresSaver) -> Connection | None:
        """Return a new connection; None if it would not be where the leases are."""
        if self.leases.name.startswith("sqlite"):
            return None
        async with _deadline("connecting"):
            connection = await _connected_like(saver)
            if connection is None:
                return None
            try:
                if await _is_beside(connection, saver, self.leases):
                    return connection
            except BaseException:
                await connection.close()
                raise
            await connection.close()
            return None


class _Transaction:
    """One transaction on a connection that is closed if anything goes wrong."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._commits = False

    async def run(
        self, thread_id: str, work: Callable[[Connection, list[Lease]], Awaitable[T]]
    ) -> T:
        try:
            async with _deadline("writing a checkpoint"):
                result = await work(self.connection, await self._locked(thread_id))
                self._commits = True
                await self.connection.execute("COMMIT")
                return result
        except BaseException:
            await self.connection.close()  # the server rolls back
            raise

    def was_lost_uncommitted(self, error: psycopg.Error) -> bool:
        if error.sqlstate in _ENDED_BEFORE_A_COMMIT:
            return True
        if error.sqlstate is None:
            ended = isinstance(error, psycopg.OperationalError)  # nobody was there to say it
        else:
            ended = error.diag.severity_nonlocalized in _ENDED
        return ended and not self._commits

    async def _locked(self, thread_id: str) -> list[Lease]:
        # With its parameter in the text, it is one message for two statements.
        async with AsyncClientCursor(self.connection, row_factory=dict_row) as cursor:
            await cursor.execute(_LOCK, (plain_text(thread_id),), prepare=False)
            cursor.nextset()
            return [Lease(**row) for row in await cursor.fetchall()]


def _on(saver: AsyncPostgresSaver, connection: Connection) -> AsyncPostgresSaver:
    """Return a saver like this one on another connection, as LangGraph itself clones them."""
    clone = copy.copy(saver)
    clone.conn, clone.pipe, clone.lock = connection, None, asyncio.Lock()
    connection.lingers = type(saver) is not AsyncPostgresSaver  # whose writes end with a pipeline
    return clone


async def _connected_like(saver: AsyncPostgresSaver) -> Connection | None:
    """Return a connection like the saver's; None if the saver's is none that we can have, too."""
    async with _borrowed(saver) as theirs:
        if theirs is None:
            return None
        info = theirs.info
        # Behind a pooler, a session's settings would be somebody else's.
        if info.backend_pid != (await _look(theirs, _nonce()))["pid"]:
            return None
        parameters: dict[str, Any] = {"application_name": "peerctx-fence", **info.get_parameters()}
        parameters["options"] = f"{parameters.get('options', '')} {_limits(info.server_version)}"
        return await Connection.connect(
            **parameters,
            password=info.password or None,
            autocommit=True,
            prepare_threshold=0,
            row_factory=dict_row,
            context=theirs,
        )


def _limits(server_version: int) -> str:
    busy = int(BUSY_SECONDS * 1_000)
    limits = {
        "idle_in_transaction_session_timeout": int(IDLE_SECONDS * 1_000),
        "lock_timeout": busy,
        "statement_timeout": busy,
        "tcp_keepalives_idle": 1,  # a host that is gone is neither idle nor in a statement
        "tcp_keepalives_interval": 1,
        "tcp_keepalives_count": 3,
    }
    if server_version >= _HAS_TRANSACTION_TIMEOUT:
        # Nor is a process that was frozen half-way through sending.
        limits["transaction_timeout"] = busy
    return " ".join(f"-c {name}={value}" for name, value in limits.items())


async def _is_beside(connection: Connection, saver: AsyncPostgresSaver, leases: Leases) -> bool:
    """Tell whether connection, saver and leases are in one database, and mean the same tables.

    We take a lock that nobody else can know of: who finds it taken, is where we are.
    """
    nonce = _nonce()
    async with connection.transaction():
        ours = await _look(connection, nonce)
        async with _borrowed(saver) as borrowed:
            theirs = ours if borrowed is None else await _look(borrowed, nonce)
        lease_table = await leases.atable_beside(nonce)
    return (
        ours["was_free"]
        and not theirs["was_free"]
        and ours["pid"] == connection.info.backend_pid
        and all(ours[name] and ours[name] == theirs[name] for name in _THE_SAME)
        and ours["leases"] == lease_table
    )


async def _look(connection: AsyncConnection[Any], nonce: int) -> DictRow:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(_LOOK, (nonce,))
        found = await cursor.fetchone()
    assert found is not None  # noqa: S101 - it has no condition
    return found


def _nonce() -> int:
    return secrets.randbits(62)


@asynccontextmanager
async def _borrowed(saver: AsyncPostgresSaver) -> AsyncIterator[AsyncConnection[Any] | None]:
    """Borrow the saver's connection; None if its transactions are its user's."""
    if isinstance(saver.conn, AsyncConnectionPool):
        async with saver.conn.connection() as connection:
            yield connection
    elif saver.conn.autocommit:
        async with saver.lock:
            yield saver.conn
    else:
        yield None


@asynccontextmanager
async def _deadline(doing: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            yield
    except TimeoutError:
        raise StoreBusyError(
            f"PostgreSQL said nothing for {DEADLINE_SECONDS:g} s while we were {doing}; "
            "whether it did it is unknown: see that the server runs and can be reached"
        ) from None


def _close_all(connections: list[Connection], pid: int) -> None:
    """Close connections, from wherever: no loop has to run. A forked child closes nothing."""
    while connections:
        connection = connections.pop()
        if os.getpid() == pid:
            connection.pgconn.finish()


__all__ = ["OwnedFence", "SharedTransactions"]
