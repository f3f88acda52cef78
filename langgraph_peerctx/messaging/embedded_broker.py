"""A Kafka-protocol broker inside this process: for demos, notebooks and fast tests.

It is confluent-kafka's mock cluster: a real protocol on a real port, from a wheel, without Java.
It keeps nothing when the process ends, knows no ACLs, has no controller, and never wakes a waiting
fetch. It proves nothing about latency, durability or restarts; for those, use Apache Kafka.
"""

import logging
from collections.abc import Collection
from types import TracebackType
from typing import Any, Self

from langgraph_peerctx.errors import BrokerUnavailableError, ConfigurationError

_logger = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 10.0


class EmbeddedBroker:
    """A broker that lives as long as the `with` block, reachable by any process of this host.

    Args:
        topics: Topics to make at the start. Others appear when they are first asked for.

    Attributes:
        bootstrap_servers: Its address, while it lives.

    Raises:
        ConfigurationError: If the extra `embedded` is not installed.
        BrokerUnavailableError: If it does not start within 10 s.
    """

    def __init__(self, topics: Collection[str] = ()) -> None:
        self._topics = list(topics)
        self._cluster: Any = None
        self.bootstrap_servers: str = ""

    def __enter__(self) -> Self:
        try:
            from confluent_kafka import KafkaException, Producer  # noqa: PLC0415 - an extra
        except ImportError:
            raise ConfigurationError(
                "the embedded broker needs an extra: pip install 'langgraph-peerctx[embedded]'"
            ) from None
        try:
            self._cluster = Producer({"test.mock.num.brokers": 1, "log_level": 0})
            brokers = self._cluster.list_topics(timeout=START_TIMEOUT_SECONDS).brokers.values()
            self.bootstrap_servers = ",".join(f"{b.host}:{b.port}" for b in brokers)
            for topic in self._topics:  # asking for a topic makes it
                self._cluster.list_topics(topic, timeout=START_TIMEOUT_SECONDS)
        except KafkaException as error:
            self._cluster = None
            raise BrokerUnavailableError(f"the embedded broker did not start: {error}") from error
        _logger.info(
            "embedded broker at %s: for demos and tests, nothing is kept", self.bootstrap_servers
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cluster = None
        self.bootstrap_servers = ""
