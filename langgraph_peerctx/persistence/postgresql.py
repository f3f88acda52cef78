"""What we ask of psycopg beyond its defaults: the only module that imports it."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import psycopg
from psycopg.errors import QueryCanceled
from sqlalchemy import Connection

T = TypeVar("T")

_LEAST_CONNECT_SECONDS = 2
"""What libpq makes of anything shorter."""


IDLE_MILLISECONDS = 2_000
"""How long a transaction may wait for its client's next word: a frozen one's locks are in the way
of whoever takes its threads over."""
_GRACE_SECONDS = 0.5
"""Beyond the server's own timeout: the server says better what it waited for."""


class DeadlineConnection(psycopg.Connection[Any]):
    """A connection that gives up on a server which is there and says nothing.

    `statement_timeout` is kept by the server: a frozen one keeps nothing, and TCP still
    acknowledges for it.
    """

    patience_seconds: float = 5.0

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **options: Any) -> T:
        """Wait for the server, and close the connection if it says nothing in time."""
        return super().wait(self._until_deadline(gen), *args, **options)

    def _until_deadline(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        deadline = time.monotonic() + self.patience_seconds
        try:
            state = next(gen)
            while True:
                # psycopg comes by every 0.1 s, with or without news.
                state = gen.send((yield state))
                if time.monotonic() > deadline:
                    break
        except StopIteration as done:
            result: T = done.value
            return result
        self.pgconn.finish()
        raise QueryCanceled(f"the server said nothing for {self.patience_seconds:g} s")

    @classmethod
    def patient(cls, seconds: float, *arguments: Any, **parameters: Any) -> Self:
        """Connect; see `psycopg.connect`."""
        connection = cls.connect(*arguments, **parameters)
        connection.patience_seconds = seconds
        return connection


@contextmanager
def patience(connection: Connection, seconds: float) -> Iterator[None]:
    """Give the statements of the open transaction so much time, whatever the connection's."""
    driver = connection.connection.dbapi_connection
    assert isinstance(driver, DeadlineConnection)  # noqa: S101 - `connecting` made it
    milliseconds = int(seconds * 1_000)
    connection.exec_driver_sql(f"SET LOCAL statement_timeout = {milliseconds}")
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = {milliseconds}")
    before, driver.patience_seconds = driver.patience_seconds, seconds + _GRACE_SECONDS
    try:
        yield
    finally:
        driver.patience_seconds = before


def connecting(timeout_seconds: float) -> Callable[..., DeadlineConnection]:
    """Return what makes SQLAlchemy's connections, as its `do_connect` event wants it."""
    milliseconds = int(timeout_seconds * 1_000)
    limits = (
        f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds} "
        f"-c idle_in_transaction_session_timeout={IDLE_MILLISECONDS}"
    )
    deadlines = {
        "connect_timeout": max(_LEAST_CONNECT_SECONDS, int(timeout_seconds)),
        "tcp_user_timeout": milliseconds,
    }

    def connect(
        _dialect: object, _record: object, arguments: list[Any], parameters: dict[str, Any]
    ) -> DeadlineConnection:
        # The user's own options, a search_path for instance, stay.
        options = f"{parameters.get('options', '')} {limits}".strip()
        return DeadlineConnection.patient(
            timeout_seconds + _GRACE_SECONDS,
            *arguments,
            **(parameters | deadlines | {"options": options}),
        )

    return connect
