"""What we need of a broker: six methods. Kafka, mock mode and the tests' fake are three of them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

Headers: TypeAlias = tuple[tuple[str, bytes], ...]
Offsets: TypeAlias = Mapping[tuple[str, int], int]
"""(topic, partition) -> the offset of the next record to read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record as the broker stored it.

    `timestamp_ms` is the broker's where the topic says LogAppendTime, else the producer's:
    milliseconds since 1970. `was_there` tells that it was stored before the reading was
    positioned; any other has just been stored, whatever the clocks say.
    """

    topic: str
    value: bytes | None
    headers: Headers = ()
    key: bytes | None = None
    partition: int = 0
    offset: int = 0
    timestamp_ms: int = 0
    was_there: bool = False

    def header(self, name: str) -> str | None:
        """Return the first header of this name as text, or None."""
        for key, value in self.headers:
            if key == name:
                return value.decode("utf-8", "replace")
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicSpec:
    """A topic as it should be: see `topics_for`."""

    name: str
    partitions: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicState:
    """A topic as the broker has it; `partitions` is 0 where there is none."""

    name: str
    partitions: int
    settings: Mapping[str, str] = field(default_factory=dict)


Delivery = Literal["acknowledged", "mock"]
"""How a send ended: the broker has it, or mock mode only logged it."""

OnRecord: TypeAlias = Callable[[Record], None]
"""Takes one record, at once and without waiting; runs on the loop of the transport."""


@dataclass(frozen=True, slots=True, kw_only=True)
class From:
    """Where a subscription starts, in each partition.

    `offsets` wins where it names a partition; else `back` records before the end (0: at the end).
    An offset beyond the end means the beginning: the topic was made anew since it was noted.
    """

    back: int = 0
    offsets: Offsets = field(default_factory=dict)


class Subscription(Protocol):
    """A standing reading of topics; records go to its `OnRecord`."""

    @property
    def offsets(self) -> Offsets:
        """The next record to read in each partition; empty before the first positioning."""
        ...

    @property
    def lost(self) -> str | None:
        """Why nothing can arrive at the moment (mock mode, broker gone, topic gone), or None."""
        ...

    async def positioned(self) -> None:
        """Wait until it is certain that whatever is sent from now on will be read.

        In mock mode it returns at once. The caller sets the deadline.
        """
        ...

    async def close(self) -> None:
        """Stop reading; afterwards `OnRecord` is not called again. Safe to call twice."""
        ...


class Transport(Protocol):
    """A connection to a broker; used on the loop that started it."""

    @property
    def degraded(self) -> tuple[str, ...]:
        """Why results that come about now are not the whole truth; empty when all is well."""
        ...

    async def start(self) -> None:
        """Connect, within the connect deadline.

        Raises:
            BrokerUnavailableError: If there is no broker, and mock mode is `never`.
            ConfigurationError: If the broker refuses the credentials.
        """
        ...

    async def send(
        self, topic: str, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> Delivery:
        """Send a record and wait for the broker's word, within the send deadline.

        Raises:
            SendOutcomeUnknownError: If the broker did not answer in time.
            BrokerUnavailableError: If it is not there, or the topic does not exist.
        """
        ...

    async def subscribe(
        self,
        topics: Collection[str],
        on_record: OnRecord,
        *,
        start: From | None = None,
        group_id: str | None = None,
    ) -> Subscription:
        """Read topics from now on (or from `start`), without a group unless one is named."""
        ...

    async def ensure_topics(self, topics: Collection[TopicSpec]) -> None:
        """Make the topics that are missing; those that exist are left as they are.

        Raises:
            BrokerUnavailableError: If the broker is not there, or does not let us.
        """
        ...

    async def describe_topics(self, names: Collection[str]) -> dict[str, TopicState]:
        """Return each named topic as the broker has it; never creates one.

        Raises:
            BrokerUnavailableError: If the broker is not there.
        """
        ...

    async def close(self) -> None:
        """Close everything within the close deadline, whatever the broker does. Safe twice."""
        ...
