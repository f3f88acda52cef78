"""What aiokafka may log: no payloads, and not the same sentence hundreds of times a minute."""

import logging
import time
from collections.abc import Callable

QUIET_SECONDS = 60.0
"""A broker that is away makes a client say so ten times a second."""


class Sparingly(logging.Filter):
    """Lets each sentence of a logger through once in a while; its numbers may differ.

    Args:
        clock: Seconds that only rise.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._said_at: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to let a record through; see `logging.Filter`."""
        if record.levelno < logging.WARNING:
            return True
        sentence, now = (record.name, str(record.msg)), self._clock()
        if now - self._said_at.get(sentence, -QUIET_SECONDS) < QUIET_SECONDS:
            return False
        self._said_at[sentence] = now
        return True


_sparingly = Sparingly()


def hold_the_clients_loggers() -> None:
    """Calm aiokafka's loggers. Safe to call again."""
    root = logging.getLogger("aiokafka")
    if root.getEffectiveLevel() < logging.INFO:
        root.setLevel(logging.INFO)  # at DEBUG it logs the values of messages
    names = [name for name in logging.root.manager.loggerDict if name.startswith("aiokafka.")]
    for name in ("aiokafka", *names):  # a filter is not inherited
        logging.getLogger(name).addFilter(_sparingly)
