"""What must hold of an open database before it is used again."""

import os

from sqlalchemy import Engine, event
from sqlalchemy.pool import ConnectionPoolEntry

from langgraph_peerctx.errors import StoreError
from langgraph_peerctx.persistence.engine import file_of, name_of


class Opened:
    """An open database, owned by the process that opened it and bound to the file it opened.

    A connection must not cross a fork. An SQLite file that was deleted or replaced is still
    written to, by connections that nobody will ever read.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.closed: bool = False
        self._pid = os.getpid()
        self._file = file_of(engine)
        self._identity = self._look()
        event.listen(engine, "checkin", self._close_late)

    def check(self) -> None:
        """See that the database may be used.

        Raises:
            StoreError: If it was closed, this is a forked child, or the file is another one.
        """
        if os.getpid() != self._pid:
            raise StoreError(
                f"{name_of(self.engine)} was opened before this process was forked: "
                "open a new store in the child"
            )
        if self.closed:
            raise StoreError(f"{name_of(self.engine)} is closed: open a new store")
        if self._file is not None and self._look() != self._identity:
            raise StoreError(
                f"{name_of(self.engine)} was deleted or replaced while it was open: "
                "restore the file and open a new store"
            )

    def close(self) -> None:
        """Close every connection. Safe to call twice; in a forked child it closes nothing."""
        self.closed = True
        if os.getpid() == self._pid:
            self.engine.dispose()

    def _close_late(self, _connection: object, record: ConnectionPoolEntry) -> None:
        """Close a connection that comes back after `close`, from a thread that was given up."""
        if self.closed:
            record.invalidate()

    def _look(self) -> tuple[int, int] | None:
        if self._file is None:
            return None
        try:
            found = os.stat(self._file)  # noqa: PTH116 - on the way of every query: half the time
        except OSError:
            return None
        return found.st_dev, found.st_ino
