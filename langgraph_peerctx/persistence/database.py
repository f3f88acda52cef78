"""An open database of ours: its connections, its threads, and how work on it fails."""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from sqlalchemy import Connection, Row, Select, Table, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError

from langgraph_peerctx.errors import StoreBusyError, StoreError
from langgraph_peerctx.persistence.engine import POOL_SIZE, Synchronous, connect, name_of, writing
from langgraph_peerctx.persistence.faults import is_busy, translated
from langgraph_peerctx.persistence.opened import Opened
from langgraph_peerctx.persistence.upgrade import upgrade
from langgraph_peerctx.protocol.json_values import plain_text

_logger = logging.getLogger(__name__)

T = TypeVar("T")

OPENING_TIMEOUT_SECONDS = 30.0
"""Longer than a query: a new database is brought to this release first, by us or by others."""

_PING = select(1)


class Database:
    """An SQLite file or a PostgreSQL database with our schema; safe to use from any thread.

    Opening brings the schema to this release.

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
        self._engine = connect(url, timeout_seconds=timeout_seconds, synchronous=synchronous)
        try:
            upgrade(self._engine)
        except BaseException:
            self._engine.dispose()
            raise
        self._opened = Opened(self._engine)
        self._threads = ThreadPoolExecutor(POOL_SIZE, thread_name_prefix="peerctx-store")

    @property
    def _is_sqlite(self) -> bool:
        """Whether it is an SQLite file."""
        return self._engine.dialect.name == "sqlite"

    def _insert_into(self, table: Table) -> Any:
        """Return an insert that knows `on_conflict_do_nothing` and `on_conflict_do_update`."""
        return (sqlite if self._is_sqlite else postgresql).insert(table)

    @property
    def name(self) -> str:
        """The database's address, without its password."""
        return name_of(self._engine)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._opened.closed

    def ping(self) -> None:
        """See that the database answers.

        Raises:
            StoreError: If it does not.
        """
        self._rows(_PING)

    def close(self) -> None:
        """Close every connection. Safe to call twice.

        What works in a thread may finish; what still waits for one finds the store closed.
        """
        self._opened.close()
        self._threads.shutdown(wait=False)  # to cancel would look as if the caller had been

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def in_thread(
        self, work: Callable[[], T], *, undo: Callable[[T], object] | None = None
    ) -> T:
        """Do blocking work with this store in one of its threads, and wait for it with a deadline.

        Args:
            work: What is to be done.
            undo: Is given what came of it if nobody waits for it any more: the caller was
                cancelled, or the time was over. It runs in any thread and must not block.

        Raises:
            StoreBusyError: If it takes a second longer than the timeout; its outcome is unknown.
            StoreError: If the store was closed.
        """
        self._opened.check()  # in a forked child there are no threads to do it
        baton = _Baton(work, undo)
        call = partial(copy_context().run, baton.run)
        # A database waits out its own timeout first, and says better what it waited for.
        try:
            async with asyncio.timeout(self._timeout_seconds + 1):
                return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except TimeoutError:
            baton.leave()
            raise StoreBusyError(
                f"{self.name} did not answer within {self._timeout_seconds + 1:g} s: try again"
            ) from None
        except BaseException:
            baton.leave()
            raise

    def later(self, work: Callable[[], object]) -> None:
        """Do blocking work in one of this store's threads; nobody waits for it."""

        def tried() -> None:
            try:
                work()
            except StoreError as error:
                _logger.info("%s: what nobody waited for failed: %s", self.name, error)

        self._threads.submit(tried)

    async def aping(self) -> None:
        """See `ping`."""
        await self.in_thread(self.ping)

    def _rows(self, statement: Select[Any], **parameters: Any) -> Sequence[Row[Any]]:
        # What could not be stored is asked for as what was stored in its place.
        asked = {k: plain_text(v) if isinstance(v, str) else v for k, v in parameters.items()}
        return self._work(lambda connection: connection.execute(statement, asked).all())

    def _work(
        self, work: Callable[[Connection], T], *, transaction: bool = False, again: bool = True
    ) -> T:
        """Do work; if it is idempotent (`again`), once more if the connection was lost under it."""
        self._opened.check()
        with translated(self._engine):
            try:
                return self._attempt(work, transaction=transaction)
            except DBAPIError as error:
                if not again or not error.connection_invalidated or is_busy(error):
                    raise
            return self._attempt(work, transaction=transaction)

    def _attempt(self, work: Callable[[Connection], T], *, transaction: bool) -> T:
        with writing(self._engine) if transaction else self._engine.connect() as connection:
            return work(connection)


class _Baton(Generic[T]):
    """Hands what came of work from its thread to who waits for it, or undoes it."""

    def __init__(self, work: Callable[[], T], undo: Callable[[T], object] | None) -> None:
        self._work = work
        self._undo = undo
        self._lock = threading.Lock()
        self._is_alone = False
        self._results: list[T] = []

    def run(self) -> T:
        """Do the work; in its thread."""
        result = self._work()
        with self._lock:
            self._results.append(result)
            is_alone = self._is_alone
        if is_alone:
            self._undo_all()
        return result

    def leave(self) -> None:
        """Wait no longer."""
        with self._lock:
            self._is_alone = True
        self._undo_all()

    def _undo_all(self) -> None:
        while True:
            with self._lock:
                if not self._results:
                    return
                result = self._results.pop()
            if self._undo is not None:
                self._undo(result)


async def open_in_thread(open_: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Open a database without blocking the loop.

    Raises:
        StoreBusyError: If it takes longer than `OPENING_TIMEOUT_SECONDS`.
        StoreError: If it cannot be opened.
    """
    try:
        async with asyncio.timeout(OPENING_TIMEOUT_SECONDS):
            return await asyncio.to_thread(open_, *arguments, **options)
    except TimeoutError:
        raise StoreBusyError(
            f"the database was not open within {OPENING_TIMEOUT_SECONDS:g} s: try again"
        ) from None
