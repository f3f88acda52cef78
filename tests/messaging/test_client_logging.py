"""A broker that is away is said once in a while, not ten times a second."""

import logging

from langgraph_peerctx.messaging.client_logging import (
    QUIET_SECONDS,
    Sparingly,
    hold_the_clients_loggers,
)


def record(
    sentence: str, *, level: int = logging.WARNING, name: str = "aiokafka"
) -> logging.LogRecord:
    return logging.LogRecord(name, level, "file", 1, sentence, (1,), None)


def test_a_sentence_is_said_once_in_a_while() -> None:
    now = [0.0]
    sparingly = Sparingly(lambda: now[0])
    assert sparingly.filter(record("Unable connect to node with id %s"))
    assert not sparingly.filter(record("Unable connect to node with id %s"))
    assert sparingly.filter(record("Another %s"))
    assert sparingly.filter(record("Unable connect to node with id %s", name="aiokafka.conn"))
    now[0] = QUIET_SECONDS
    assert sparingly.filter(record("Unable connect to node with id %s"))
    assert all(sparingly.filter(record("news %s", level=logging.INFO)) for _ in range(3))


def test_every_logger_of_the_client_is_calmed_once() -> None:
    hold_the_clients_loggers()
    hold_the_clients_loggers()
    names = [n for n in logging.root.manager.loggerDict if n.startswith("aiokafka")]
    assert len(names) > 5
    for name in names:
        filters = [f for f in logging.getLogger(name).filters if isinstance(f, Sparingly)]
        assert len(filters) == 1, name
