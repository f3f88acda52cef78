"""Kafka through aiokafka: the only file that imports it.

aiokafka has sharp edges that everything here is shaped by (measured on 0.14): a send and a stop
stay pending for ever while the broker is away, whatever `request_timeout_ms` says; a stop on a
dead broker raises `CancelledError` into its caller and leaks tasks; a failed start leaks its
client; a broker that accepts and never answers holds `start()` for a whole timeout per bootstrap
entry; a deleted topic is silence. So every call has a deadline of ours, every client is ended by
`end_client`, and a subscription watches that fetches are answered and rebuilds its client if not.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import aiokafka
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.conn import create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    CorruptRecordException,
    IllegalSaslStateError,
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    ProducerClosed,
    RecordListTooLargeError,
    RecordTooLargeError,
    SaslAuthenticationFailed,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    UnsupportedCodecError,
    UnsupportedSaslMechanismError,
    for_code,
)
from aiokafka.helpers import create_ssl_context

from langgraph_peerctx.config import KafkaConfig
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    RecordRefusedError,
    SendOutcomeUnknownError,
    UnknownTopicError,
)
from langgraph_peerctx.messaging.client_ending import (
    CLOSE_TIMEOUT_SECONDS,
    Remains,
    end_client,
)
from langgraph_peerctx.messaging.client_logging import hold_the_clients_loggers
from langgraph_peerctx.messaging.kafka_subscription import (
    KafkaSubscription,
    Reader,
)
from langgraph_peerctx.messaging.transport import (
    Delivery,
    From,
    Headers,
    OnRecord,
    TopicSpec,
    TopicState,
)

_REFUSALS = (
    InvalidTopicError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)
"""What a broker says of one record: it is well, and so is the client."""

_logger = logging.getLogger(__name__)

FETCH_WAIT_SECONDS = 0.5
EMBEDDED_FETCH_WAIT_SECONDS = 0.01
"""The embedded broker never wakes a waiting fetch: each hop would cost the whole wait."""
UNKNOWN_TOPIC_RECHECK_SECONDS = 1.0
_CREATE_TOPICS = 19
"""The key of this request in Kafka's protocol."""


class KafkaTransport:
    """A `Transport` on a Kafka cluster: one producer, and one consumer a subscription.

    It belongs to the loop that started it.
    """

    def __init__(self, config: KafkaConfig, *, max_message_bytes: int = 262_144) -> None:
        self._config = config
        self._max_message_bytes = max_message_bytes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._producer: Any = None
        self._connecting = asyncio.Lock()
        self._subscriptions: set[KafkaSubscription] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._topics: set[str] = set()
        self._unknown_topics: dict[str, float] = {}
        self._listing = asyncio.Lock()
        self._listed_at = float("-inf")
        self._embedded = False

    @property
    def degraded(self) -> tuple[str, ...]:
        """Empty: where Kafka is asked for and not there, calls fail instead."""
        return ()

    @property
    def address(self) -> str:
        """The bootstrap servers."""
        return self._config.bootstrap_servers

    async def start(self) -> None:
        """Connect within the connect deadline; see `Transport.start`."""
        if self._closed:
            raise BrokerUnavailableError("this transport is closed: make a new one")
        hold_the_clients_loggers()
        self._loop = asyncio.get_running_loop()
        await self._connected_producer()

    async def close(self) -> None:
        """End everything within the close deadline; see `Transport.close`."""
        self._closed = True
        subscriptions, self._subscriptions = self._subscriptions, set()
        producer, self._producer = self._producer, None
        if producer is not None:
            self._end_in_background(producer.stop, _producer_remains(producer))
        for subscription in subscriptions:
            subscription.stop_reading()
        endings = [*self._endings, *(s.task for s in subscriptions)]
        if endings:
            await asyncio.wait(endings, timeout=CLOSE_TIMEOUT_SECONDS + 1)

    async def send(
        self, topic: str, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> Delivery:
        """Send a record to partition 0; see `Transport.send`."""
        producer: Any = None
        has_left = False
        try:
            async with asyncio.timeout(self._config.send_timeout_seconds):
                producer = await self._connected_producer()
                await self._check_topic(topic, producer)
                sent = await producer.send(
                    topic, value, key=key, partition=0, headers=list(headers)
                )
                has_left = True
                await sent
        except TimeoutError:
            self._topics.discard(topic)  # perhaps it is there no longer: see before the next send
            self._discard(producer)
            raise SendOutcomeUnknownError(
                f"{self.address} did not confirm a record on {topic} within "
                f"{self._config.send_timeout_seconds:g} s; it may still arrive"
            ) from None
        except _REFUSALS as error:
            raise RecordRefusedError(f"{self.address} refused a record: {error!r:.200}") from error
        except KafkaError as error:
            self._topics.discard(topic)
            self._discard(producer)
            if has_left:
                raise SendOutcomeUnknownError(
                    f"{self.address} did not confirm a record on {topic} ({error!r:.100}); "
                    "it may still arrive"
                ) from error
            raise BrokerUnavailableError(
                f"{self.address} took no record: {error!r:.200}"
            ) from error
        return "acknowledged"

    async def subscribe(
        self,
        topics: Collection[str],
        on_record: OnRecord,
        *,
        start: From | None = None,
        group_id: str | None = None,
    ) -> KafkaSubscription:
        """Read topics; see `Transport.subscribe`. Returns at once; the reading starts by itself."""
        self._check_usable()
        reader: Reader
        make: Callable[[], Awaitable[Any]]
        if group_id is None:
            reader, make = _AssigningReader(topics, start or From()), self._new_consumer
        else:
            reader, make = _GroupReader(topics), partial(self._new_group_consumer, group_id)
        subscription = KafkaSubscription(
            reader,
            make,
            _end_consumer,
            on_record,
            self._subscriptions.discard,
            connect_seconds=self._config.connect_timeout_seconds,
            client_errors=KafkaError,
            record_errors=(CorruptRecordException, RecordTooLargeError, UnsupportedCodecError),
        )
        self._subscriptions.add(subscription)
        return subscription

    async def ensure_topics(self, topics: Collection[TopicSpec]) -> None:
        """Make what is missing; see `Transport.ensure_topics`."""
        async with self._deadline("make topics"):
            producer = await self._connected_producer()
            known = await _all_topics(producer.client)
            missing = [topic for topic in topics if topic.name not in known]
            if missing and self._embedded:
                await _touch(producer.client, [topic.name for topic in missing])
            elif missing:
                await self._create(missing, copies=min(3, len(producer.client.cluster.brokers())))
            while not {topic.name for topic in topics} <= set(known):
                await asyncio.sleep(0.02)
                known = await _all_topics(producer.client)
        self._topics.update(topic.name for topic in topics)

    async def describe_topics(self, names: Collection[str]) -> dict[str, TopicState]:
        """Return what the broker has; see `Transport.describe_topics`."""
        async with self._deadline("describe topics"):
            producer = await self._connected_producer()
            known = await _all_topics(producer.client)
            there = [name for name in names if name in known]
            settings = {} if self._embedded or not there else await self._settings_of(there)
        return {
            name: TopicState(
                name=name, partitions=known.get(name, 0), settings=settings.get(name, {})
            )
            for name in names
        }

    def _check_usable(self) -> None:
        if self._closed:
            raise BrokerUnavailableError("this transport is closed: make a new one")
        if self._loop is not asyncio.get_running_loop():
            raise ConfigurationError(
                "a transport belongs to the event loop that started it: start it first, "
                "and use it there only"
            )

    @asynccontextmanager
    async def _deadline(self, doing: str) -> AsyncIterator[None]:
        """Bound a conversation, and translate how it may fail."""
        seconds = self._config.connect_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise BrokerUnavailableError(
                f"{self.address} did not {doing} within {seconds:g} s"
            ) from None
        except KafkaError as error:
            raise BrokerUnavailableError(
                f"{self.address} did not {doing}: {error!r:.200}"
            ) from error

    async def _connected_producer(self) -> Any:
        self._check_usable()
        async with self._connecting:
            if self._producer is None:
                producer = await self._started(
                    lambda server: aiokafka.AIOKafkaProducer(
                        acks="all",
                        max_request_size=self._max_message_bytes + 16_384,
                        **self._client_options(server),
                    ),
                    _producer_remains,
                )
                if self._closed:  # while it connected
                    await end_client(producer.stop, _producer_remains(producer))
                    self._check_usable()
                self._producer = producer
            return self._producer

    async def _new_consumer(self) -> Any:
        return await self._started(
            lambda server: aiokafka.AIOKafkaConsumer(
                auto_offset_reset="none", enable_auto_commit=False, **self._fetch_options(server)
            ),
            _consumer_remains,
        )

    async def _new_group_consumer(self, group_id: str) -> Any:
        # A request timeout at or below the group's rebalance delay re-joins for ever.
        options = {"request_timeout_ms": 40_000, "group_id": group_id, "enable_auto_commit": False}
        return await self._started(
            lambda server: aiokafka.AIOKafkaConsumer(**self._fetch_options(server) | options),
            _consumer_remains,
        )

    def _fetch_options(self, server: str) -> dict[str, Any]:
        wait = EMBEDDED_FETCH_WAIT_SECONDS if self._embedded else FETCH_WAIT_SECONDS
        return self._client_options(server) | {
            "fetch_max_wait_ms": int(wait * 1_000),
            "max_partition_fetch_bytes": 4 * self._max_message_bytes,
        }

    def _client_options(self, server: str) -> dict[str, Any]:
        config = self._config
        options: dict[str, Any] = {
            "bootstrap_servers": server,
            "client_id": "langgraph-peerctx",
            "request_timeout_ms": int(config.connect_timeout_seconds * 1_000),
            "security_protocol": config.security_protocol,
        }
        if config.security_protocol.endswith("SSL"):
            options["ssl_context"] = _ssl_context(config)
        if config.security_protocol.startswith("SASL"):
            password = config.sasl_password
            options |= {
                "sasl_mechanism": config.sasl_mechanism,
                "sasl_plain_username": config.sasl_username,
                "sasl_plain_password": password.get_secret_value() if password else None,
            }
        return options

    async def _started(
        self,
        make: Callable[[str], Any],
        remains: Callable[[Any], Remains],
        stop: str = "stop",
    ) -> Any:
        """Start a client within the connect deadline; a failed one is ended, or it would leak.

        `make` is given a server that answers.
        """
        deadline = time.monotonic() + self._config.connect_timeout_seconds
        server = await self._answering_server()
        client = make(server)
        # A start that is cancelled leaks its connection: it ends by itself, in the background.
        starting = asyncio.create_task(client.start(), name="peerctx-start-client")
        started = False
        try:
            await asyncio.wait({starting}, timeout=max(0.1, deadline - time.monotonic()))
            if not starting.done():
                raise BrokerUnavailableError(f"no Kafka broker at {server}: {self._no_answer()}")
            starting.result()
            started = True
        except KafkaError as error:
            raise BrokerUnavailableError(f"no Kafka broker at {server}: {error!r:.200}") from error
        finally:
            if not started:
                self._end_in_background(getattr(client, stop), remains(client), after=starting)
        return client

    async def _answering_server(self) -> str:
        """Return the bootstrap server that answers first, spoken to as a client would.

        aiokafka tries one after the other, waits a whole request's time for one that is silent, and
        logs an ERROR, without a reason in what it raises, for each that is not there.

        Raises:
            BrokerUnavailableError: If none does within the connect deadline.
            ConfigurationError: If none lets us in.
        """
        servers = self.address.split(",")
        greetings = [asyncio.create_task(self._greet(server)) for server in servers]
        refusal: ConfigurationError | None = None
        faults = dict.fromkeys(servers, self._no_answer())
        try:
            for greeting in asyncio.as_completed(
                greetings, timeout=self._config.connect_timeout_seconds
            ):
                try:
                    server, self._embedded = await greeting
                except _Unreached as error:
                    faults[error.server] = error.fault
                except ConfigurationError as error:
                    refusal = error
                else:
                    return server
        except TimeoutError:
            pass
        finally:
            for task in greetings:
                task.cancel()
            await asyncio.wait(greetings)
        if refusal is not None:
            raise refusal
        said = "; ".join(f"{server}: {fault}" for server, fault in faults.items())
        raise BrokerUnavailableError(f"no Kafka broker at {said}")

    def _no_answer(self) -> str:
        return f"no answer within {self._config.connect_timeout_seconds:g} s"

    async def _greet(self, server: str) -> tuple[str, bool]:
        """Connect and log in; return the server, and whether it is the embedded broker."""
        host, _, port = server.rpartition(":")
        options = self._client_options(server)
        del options["bootstrap_servers"]
        try:
            connection = await create_conn(host.strip("[]"), int(port), **options)
        except (
            AuthenticationFailedError,
            SaslAuthenticationFailed,
            UnsupportedSaslMechanismError,
            IllegalSaslStateError,
        ) as error:
            raise ConfigurationError(
                f"{server} refused the credentials ({type(error).__name__}): see "
                "KAFKA_SASL_MECHANISM, KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD"
            ) from error
        except TimeoutError:
            raise _Unreached(server, self._no_answer()) from None
        except (KafkaError, OSError) as error:
            if "CERTIFICATE" in repr(error).upper() or "SSL" in repr(error).upper():
                raise ConfigurationError(
                    f"{server} failed the TLS handshake: {error}: see KAFKA_SSL_CA_FILE, "
                    "KAFKA_SSL_CERT_FILE and KAFKA_SECURITY_PROTOCOL"
                ) from error
            said = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise _Unreached(server, said) from error
        # Every Apache Kafka can make topics; the embedded broker makes what is asked for.
        embedded = _CREATE_TOPICS not in connection._versions
        connection.close()
        return server, embedded

    async def _check_topic(self, topic: str, producer: Any) -> None:
        """A send must never create a topic, so it must be known before aiokafka asks for it."""
        if topic in self._topics:
            return
        asked_at = self._unknown_topics.get(topic, float("-inf"))
        if time.monotonic() - asked_at >= UNKNOWN_TOPIC_RECHECK_SECONDS:
            await self._list_topics(producer)
        if topic not in self._topics:
            self._unknown_topics = {topic: time.monotonic()} | dict(
                list(self._unknown_topics.items())[:255]
            )
            raise UnknownTopicError(
                f"there is no topic {topic}: make it with `peerctx topics --create`"
            )

    async def _list_topics(self, producer: Any) -> None:
        """Look what topics there are: one look at a time, shared by all who began to wait before.

        Whoever makes ids up must not have us list a large cluster's topics for each of them.
        """
        wanted_at = time.monotonic()
        async with self._listing:
            if self._listed_at < wanted_at:
                at = time.monotonic()
                self._topics = set(await _all_topics(producer.client))
                self._listed_at = at

    async def _create(self, topics: list[TopicSpec], *, copies: int) -> None:
        async with self._admin() as admin:
            answer = await admin.create_topics(
                [
                    NewTopic(t.name, t.partitions, copies, topic_configs=dict(t.settings))
                    for t in topics
                ]
            )
        for name, code, *message in answer.topic_errors:
            if code and for_code(code) is not TopicAlreadyExistsError:
                reason = message[0] if message and message[0] else for_code(code).__name__
                raise BrokerUnavailableError(
                    f"{self.address} does not let us make the topic {name}: {reason}; "
                    "have it made with what `peerctx topics` prints"
                )

    async def _settings_of(self, names: list[str]) -> dict[str, dict[str, str]]:
        async with self._admin() as admin:
            answers = await admin.describe_configs(
                [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
            )
        return {
            resource[3]: {entry[0]: entry[1] for entry in resource[4]}
            for answer in answers
            for resource in answer.resources
        }

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[Any]:
        admin = await self._started(
            lambda server: AIOKafkaAdminClient(**self._client_options(server)),
            _admin_remains,
            stop="close",
        )
        try:
            yield admin
        finally:
            self._end_in_background(admin.close, _admin_remains(admin))

    def _discard(self, producer: Any) -> None:
        """Give a producer up: what it still holds may be delivered, or not."""
        if producer is not None and producer is self._producer:
            self._producer = None
            self._end_in_background(producer.stop, _producer_remains(producer))

    def _end_in_background(
        self,
        stop: Callable[[], Awaitable[None]],
        remains: Remains,
        *,
        after: "asyncio.Task[None] | None" = None,
    ) -> None:
        task = asyncio.create_task(end_client(stop, remains, after), name="peerctx-end-client")
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)


class _Unreached(Exception):  # noqa: N818 - no error of anybody's, but one server of several
    """A bootstrap server with which there is no talking."""

    def __init__(self, server: str, fault: str) -> None:
        super().__init__(server, fault)
        self.server = server
        self.fault = fault


class _AssigningReader:
    """Partitions assigned by hand: no group, no three seconds of joining."""

    joining_seconds = 0.0

    def __init__(self, topics: Collection[str], start: From) -> None:
        self._topics = list(topics)
        self._start = start
        self.offsets: dict[tuple[str, int], int] = dict(start.offsets)
        self.ends: dict[tuple[str, int], int] = {}

    async def position(self, consumer: Any) -> None:
        """Assign every partition and seek, with nothing awaited in between: no fetch goes first."""
        counts = await _partition_counts(consumer, self._topics)
        partitions = [
            aiokafka.TopicPartition(topic, number)
            for topic, count in counts.items()
            for number in range(count)
        ]
        ends = await consumer.end_offsets(partitions)
        beginnings = await consumer.beginning_offsets(partitions)
        consumer.assign(partitions)
        self.ends = {(place.topic, place.partition): end for place, end in ends.items()}
        for partition in partitions:
            wanted = self.offsets.get(
                (partition.topic, partition.partition), ends[partition] - self._start.back
            )
            # Beyond the end: the topic was made anew, and all that it holds is new to us.
            offset = max(wanted if wanted <= ends[partition] else 0, beginnings[partition])
            consumer.seek(partition, offset)
            self.offsets[partition.topic, partition.partition] = offset

    async def handed_over(self, consumer: Any) -> None:
        """Nothing to commit."""

    def answers(self, consumer: Any) -> object:
        """Return something that changes with each answered fetch of each partition."""
        return tuple(consumer.last_poll_timestamp(p) for p in consumer.assignment())


class _Joined(aiokafka.ConsumerRebalanceListener):  # type: ignore[misc]  # it has no types
    """Tells when a group has taken us in; a member may be given no partition."""

    def __init__(self, offsets: dict[tuple[str, int], int]) -> None:
        self._offsets = offsets
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()

    def on_partitions_revoked(self, revoked: Collection[Any]) -> None:
        """Somebody else goes on from here: what we know of the place is worth nothing."""
        for partition in revoked:
            self._offsets.pop((partition.topic, partition.partition), None)

    def on_partitions_assigned(self, assigned: Collection[Any]) -> None:
        del assigned
        self._event.set()


class _GroupReader:
    """A consumer group, for users who want one: at least once, committed after handing over."""

    joining_seconds = 30.0

    def __init__(self, topics: Collection[str]) -> None:
        self._topics = list(topics)
        self.offsets: dict[tuple[str, int], int] = {}
        self.ends: dict[tuple[str, int], int] = {}  # a group goes on anywhere: not known

    async def position(self, consumer: Any) -> None:
        """Join; the first poll brings the assignment."""
        await _partition_counts(consumer, self._topics)
        joined = _Joined(self.offsets)
        consumer.subscribe(self._topics, listener=joined)
        await joined.wait()
        for partition in consumer.assignment():
            await consumer.position(partition)

    async def handed_over(self, consumer: Any) -> None:
        """Commit what the user's code has been given."""
        async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
            await consumer.commit()

    def answers(self, consumer: Any) -> object:
        """Return something that changes while the group goes on: a member may own nothing."""
        return (
            tuple(consumer.last_poll_timestamp(p) for p in consumer.assignment())
            or time.monotonic()
        )


# What a client leaves has no public names: the pin in pyproject.toml is for them.


async def _end_consumer(consumer: Any) -> None:
    await end_client(consumer.stop, _consumer_remains(consumer))


def _consumer_remains(consumer: Any) -> Remains:
    def remains() -> tuple[Callable[[], None], list[Any], Any]:
        fetcher, coordinator = consumer._fetcher, consumer._coordinator
        tasks = [*fetcher._pending_tasks, fetcher._fetch_task] if fetcher else []
        names = (
            "_reset_committed_task",
            "_coordination_task",
            "_heartbeat_task",
            "_commit_refresh_task",
        )
        tasks += [getattr(coordinator, name, None) for name in names] if coordinator else []
        return _nothing, tasks, consumer._client

    return remains


def _producer_remains(producer: Any) -> Remains:
    def release() -> None:
        kept = producer._message_accumulator
        batches = [*itertools.chain(*kept._batches.values()), *kept._pending_batches]
        kept.fail_all(ProducerClosed())
        for batch in batches:
            batch._drain_waiter.exception()  # else asyncio logs that nobody has looked at it

    def remains() -> tuple[Callable[[], None], list[Any], Any]:
        sender = producer._sender
        return (
            release,
            [sender.sender_task] if sender is not None else [],
            producer.client,
        )

    return remains


def _admin_remains(admin: Any) -> Remains:
    return lambda: (_nothing, [], admin._client)


def _nothing() -> None:
    """Nothing has to be released."""


async def _all_topics(client: Any) -> dict[str, int]:
    """Return topic -> number of partitions, of all topics: asking for one could create it."""
    cluster = await client.fetch_all_metadata()
    return {
        topic: len(cluster.partitions_for_topic(topic) or ())
        for topic in cluster.topics(exclude_internal_topics=False)
    }


async def _partition_counts(consumer: Any, topics: Collection[str]) -> dict[str, int]:
    """Return topic -> number of partitions.

    Raises:
        UnknownTopicError: If one does not exist.
    """
    known = await _all_topics(consumer._client)
    missing = [topic for topic in topics if topic not in known]
    if missing:
        raise UnknownTopicError(
            f"there is no topic {', '.join(missing)}: make it with `peerctx topics --create`"
        )
    return {topic: known[topic] for topic in topics}


async def _touch(client: Any, names: Iterable[str]) -> None:
    """Make topics on the embedded broker: it creates what is asked for, and has no controller."""
    for name in names:
        await client.add_topic(name)


def _ssl_context(config: KafkaConfig) -> Any:
    password = config.ssl_key_password
    try:
        return create_ssl_context(
            cafile=config.ssl_ca_file,
            certfile=config.ssl_cert_file,
            keyfile=config.ssl_key_file,
            password=password.get_secret_value() if password else None,
        )
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the TLS files cannot be used: {error}: see KAFKA_SSL_CA_FILE, KAFKA_SSL_CERT_FILE, "
            "KAFKA_SSL_KEY_FILE and KAFKA_SSL_KEY_PASSWORD"
        ) from error
