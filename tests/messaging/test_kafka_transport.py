"""The transport on a real Apache Kafka: what is acknowledged arrives, and nothing hangs."""

import asyncio
import contextlib
import gc
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiokafka
import pytest
from aiokafka.record._crecords import default_records
from services.kafka import KafkaServer, free_ports
from services.proxy import Proxy

from langgraph_peerctx.config import KafkaConfig
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    RecordRefusedError,
    SendOutcomeUnknownError,
    UnknownTopicError,
)
from langgraph_peerctx.messaging import kafka_transport
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.transport import From, Record, Subscription, TopicSpec

pytestmark = pytest.mark.kafka


class Arrivals:
    """Takes records, and lets a test wait for so many."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._more = asyncio.Event()

    def __call__(self, record: Record) -> None:
        self.records.append(record)
        self._more.set()

    @property
    def values(self) -> list[bytes | None]:
        return [record.value for record in self.records]

    async def wait_for(self, count: int, seconds: float = 40) -> None:
        async with asyncio.timeout(seconds):
            while len(self.records) < count:
                self._more.clear()
                await self._more.wait()


@contextlib.asynccontextmanager
async def transport_on(address: str, **settings: float) -> AsyncIterator[KafkaTransport]:
    options = {"connect_timeout_seconds": 5.0, "send_timeout_seconds": 20.0} | settings
    transport = KafkaTransport(KafkaConfig(bootstrap_servers=address, **options))
    await transport.start()
    try:
        yield transport
    finally:
        await transport.close()


async def fresh_topic(transport: KafkaTransport) -> str:
    name = f"test.{uuid4().hex}"
    await transport.ensure_topics([TopicSpec(name=name)])
    return name


async def send_compressed(
    kafka: KafkaServer, topic: str, codec: str, values: list[bytes], partition: int = 0
) -> None:
    """Send records as a producer that is not ours would: compressed, in one batch."""
    producer = aiokafka.AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers, compression_type=codec, linger_ms=50
    )
    await producer.start()
    try:
        await asyncio.gather(
            *[await producer.send(topic, value, partition=partition) for value in values]
        )
    finally:
        await producer.stop()


async def until_lost(subscription: Subscription, *, lost: bool, seconds: float = 40) -> None:
    async with asyncio.timeout(seconds):
        while (subscription.lost is not None) != lost:
            await asyncio.sleep(0.05)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(scope="module")
def shaky(kafka: KafkaServer) -> Iterator[KafkaServer]:
    """A broker that a test may kill, pause and restart; one listener is behind a proxy."""
    assert kafka.bootstrap_servers
    (proxied,) = free_ports(1)
    server = KafkaServer(
        listeners={"PROXIED": "PLAINTEXT"}, advertised={"PROXIED": f"127.0.0.1:{proxied}"}
    )
    with server:
        yield server


@pytest.fixture
async def steady(shaky: KafkaServer) -> AsyncIterator[KafkaServer]:
    """The shaky broker, in good health before and after."""
    yield shaky
    shaky.resume()
    if not shaky.is_running:
        shaky.start()


async def test_what_is_sent_after_positioning_arrives_whole(kafka: KafkaServer) -> None:
    async with transport_on(kafka.bootstrap_servers) as transport:
        topic = await fresh_topic(transport)
        await transport.send(topic, b"before")
        arrivals = Arrivals()
        subscription = await transport.subscribe([topic], arrivals)
        await subscription.positioned()
        assert subscription.offsets == {(topic, 0): 1}
        delivery = await transport.send(topic, b"value", key=b"key", headers=(("name", b"x"),))
        await arrivals.wait_for(1)
        (record,) = arrivals.records
    assert delivery == "acknowledged"
    assert (record.value, record.key, record.header("name")) == (b"value", b"key", "x")
    assert (record.topic, record.partition, record.offset) == (topic, 0, 1)
    assert abs(record.timestamp_ms / 1_000 - time.time()) < 60


async def test_a_reading_may_start_before_the_end_or_at_an_offset(kafka: KafkaServer) -> None:
    async with transport_on(kafka.bootstrap_servers) as transport:
        topic = await fresh_topic(transport)
        for number in range(5):
            await transport.send(topic, b"%d" % number)
        back, at, beyond, long_gone = (Arrivals() for _ in range(4))
        readings = [
            await transport.subscribe([topic], back, start=From(back=2)),
            await transport.subscribe([topic], at, start=From(offsets={(topic, 0): 1})),
            await transport.subscribe([topic], beyond, start=From(offsets={(topic, 0): 999})),
            await transport.subscribe([topic], long_gone, start=From(back=1_000)),
        ]
        await asyncio.gather(*(reading.positioned() for reading in readings))
        await transport.send(topic, b"5")
        await asyncio.gather(
            back.wait_for(3), at.wait_for(5), beyond.wait_for(6), long_gone.wait_for(6)
        )
    assert back.values == [b"3", b"4", b"5"]
    assert at.values == [b"1", b"2", b"3", b"4", b"5"]
    everything = [b"0", b"1", b"2", b"3", b"4", b"5"]
    assert beyond.values == everything, "the topic was made anew since that offset was noted"
    assert long_gone.values == everything


async def test_a_topic_that_does_not_exist_is_neither_sent_to_nor_made(kafka: KafkaServer) -> None:
    async with transport_on(kafka.bootstrap_servers) as transport:
        with pytest.raises(UnknownTopicError, match="peerctx topics --create"):
            await transport.send("not.there", b"x")
        state = await transport.describe_topics(["not.there"])
    assert state["not.there"].partitions == 0


async def test_a_topic_made_after_it_was_missing_is_found(kafka: KafkaServer) -> None:
    name = f"test.{uuid4().hex}"
    async with (
        transport_on(kafka.bootstrap_servers) as transport,
        transport_on(kafka.bootstrap_servers) as another,
    ):
        with pytest.raises(UnknownTopicError):
            await transport.send(name, b"x")
        arrivals = Arrivals()
        subscription = await transport.subscribe([name], arrivals)
        await until_lost(subscription, lost=True)
        await another.ensure_topics([TopicSpec(name=name)])
        await until_lost(subscription, lost=False)
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(UnknownTopicError):
                    await transport.send(name, b"x")
                    break
                await asyncio.sleep(0.1)
        await arrivals.wait_for(1)


async def test_topics_are_made_with_their_settings_and_left_alone_where_they_are(
    kafka: KafkaServer,
) -> None:
    name = f"test.{uuid4().hex}"
    async with transport_on(kafka.bootstrap_servers) as transport:
        await transport.ensure_topics([TopicSpec(name=name, settings={"retention.ms": "60000"})])
        await transport.ensure_topics([TopicSpec(name=name, settings={"retention.ms": "1"})])
        state = (await transport.describe_topics([name]))[name]
    assert state.partitions == 1
    assert state.settings["retention.ms"] == "60000"


async def test_two_processes_may_make_the_same_topics_at_once(kafka: KafkaServer) -> None:
    topics = [TopicSpec(name=f"test.{uuid4().hex}") for _ in range(3)]
    async with (
        transport_on(kafka.bootstrap_servers) as one,
        transport_on(kafka.bootstrap_servers) as other,
    ):
        await asyncio.gather(*(t.ensure_topics(topics) for t in (one, other)))


async def test_a_setting_that_the_broker_refuses_is_a_clear_error(kafka: KafkaServer) -> None:
    topic = TopicSpec(name=f"test.{uuid4().hex}", settings={"retention.ms": "soon"})
    async with transport_on(kafka.bootstrap_servers) as transport:
        with pytest.raises(BrokerUnavailableError, match="does not let us make the topic"):
            await transport.ensure_topics([topic])


async def test_a_record_that_cannot_be_taken_does_not_end_the_reading(kafka: KafkaServer) -> None:
    arrivals = Arrivals()

    def choke(record: Record) -> None:
        if record.value == b"poison":
            raise ValueError("cannot swallow this")
        arrivals(record)

    async with transport_on(kafka.bootstrap_servers) as transport:
        topic = await fresh_topic(transport)
        subscription = await transport.subscribe([topic], choke)
        await subscription.positioned()
        for value in (b"1", b"poison", b"2"):
            await transport.send(topic, value)
        await arrivals.wait_for(2)
    assert arrivals.values == [b"1", b"2"]


async def test_a_group_shares_the_records_and_goes_on_where_it_stood(kafka: KafkaServer) -> None:
    group = f"group-{uuid4().hex}"
    async with transport_on(kafka.bootstrap_servers) as transport:
        topic = await fresh_topic(transport)
        first = Arrivals()
        subscription = await transport.subscribe([topic], first, group_id=group)
        async with asyncio.timeout(40):
            await subscription.positioned()
        await transport.send(topic, b"1")
        await first.wait_for(1)
        await subscription.close()
        await transport.send(topic, b"2")
        second = Arrivals()
        await transport.subscribe([topic], second, group_id=group)
        await second.wait_for(1)
    assert second.values == [b"2"]


async def test_nobody_there_is_said_at_once_with_the_address() -> None:
    (port,) = free_ports(1)
    transport = KafkaTransport(
        KafkaConfig(bootstrap_servers=f"127.0.0.1:{port}", connect_timeout_seconds=60.0)
    )
    started = time.monotonic()
    with pytest.raises(BrokerUnavailableError, match=f"no Kafka broker at 127.0.0.1:{port}"):
        await transport.start()
    assert time.monotonic() - started < 20
    await transport.close()


async def test_somebody_who_accepts_and_never_answers_costs_no_more_than_the_deadline() -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(15)]
        servers = ",".join(f"127.0.0.1:{s.getsockname()[1]}" for s in silent)
        transport = KafkaTransport(
            KafkaConfig(bootstrap_servers=servers, connect_timeout_seconds=1.0)
        )
        started = time.monotonic()
        with pytest.raises(BrokerUnavailableError, match="no answer within 1 s"):
            await transport.start()
        assert time.monotonic() - started < 10, "one after the other they would cost more"
        await transport.close()
        assert time.monotonic() - started < 20


async def test_two_dead_addresses_of_three_do_not_matter(kafka: KafkaServer) -> None:
    dead = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    async with transport_on(f"{dead},{kafka.bootstrap_servers}") as transport:
        await fresh_topic(transport)


async def test_servers_that_accept_and_never_answer_cost_the_one_that_does_no_time(
    kafka: KafkaServer,
) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        servers = ",".join(f"127.0.0.1:{s.getsockname()[1]}" for s in silent)
        started = time.monotonic()
        async with transport_on(
            f"{servers},{kafka.bootstrap_servers}", connect_timeout_seconds=30.0
        ) as transport:
            await fresh_topic(transport)
            assert time.monotonic() - started < 20


async def test_all_of_the_send_deadline_is_the_records_however_many_servers_are_named(
    steady: KafkaServer,
) -> None:
    servers = ",".join([steady.bootstrap_servers] * 4)
    async with transport_on(servers, send_timeout_seconds=8.0) as transport:
        topic = await fresh_topic(transport)
        await transport.send(topic, b"1")
        steady.pause()
        sending = asyncio.create_task(transport.send(topic, b"2"))
        await asyncio.sleep(2.1)  # more than a fourth of the deadline
        steady.resume()
        assert await sending == "acknowledged"


@pytest.mark.parametrize("codec", ["gzip", "lz4", "snappy", "zstd"])
async def test_records_that_others_have_compressed_are_read(kafka: KafkaServer, codec: str) -> None:
    async with transport_on(kafka.bootstrap_servers) as transport:
        topic, arrivals = await fresh_topic(transport), Arrivals()
        await (await transport.subscribe([topic], arrivals)).positioned()
        await send_compressed(kafka, topic, codec, [b"1" * 500, b"2" * 500])
        await arrivals.wait_for(2)
    assert arrivals.values == [b"1" * 500, b"2" * 500]


@pytest.mark.parametrize("group_id", [None, "readers"])
async def test_a_record_that_nobody_can_unpack_is_left_and_those_behind_it_are_read(
    kafka: KafkaServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    group_id: str | None,
) -> None:
    def unpack(_packed: bytes) -> bytes:
        raise ValueError("not lz4")

    monkeypatch.setattr(default_records, "lz4_decode", unpack)
    async with transport_on(kafka.bootstrap_servers) as transport:
        topic, arrivals = f"test.{uuid4().hex}", Arrivals()
        await transport.ensure_topics([TopicSpec(name=topic, partitions=2)])
        group = f"{group_id}.{topic}" if group_id else None
        await (await transport.subscribe([topic], arrivals, group_id=group)).positioned()
        await transport.send(topic, b"before")
        for partition in (0, 1):
            await send_compressed(kafka, topic, "lz4", [b"1" * 500, b"2" * 500], partition)
        await transport.send(topic, b"behind")
        await arrivals.wait_for(6)
    assert sorted(map(str, arrivals.values)) == [*["None"] * 4, "b'before'", "b'behind'"]
    assert caplog.text.count("cannot be read, and is left: ValueError('not lz4')") == 4


async def test_made_up_topics_cost_one_look_at_a_time(
    kafka: KafkaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    look = kafka_transport._all_topics

    async def slow_look(client: Any) -> dict[str, int]:
        nonlocal looks
        looks += 1
        await asyncio.sleep(0.1)
        return await look(client)

    async with transport_on(kafka.bootstrap_servers) as transport:
        monkeypatch.setattr(kafka_transport, "_all_topics", slow_look)
        sends = [transport.send(f"made-up-{number}", b"x") for number in range(50)]
        outcomes = await asyncio.gather(*sends, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {UnknownTopicError}
    assert looks <= 2


async def test_a_group_member_without_a_partition_is_ready_all_the_same(
    kafka: KafkaServer,
) -> None:
    async with transport_on(kafka.bootstrap_servers) as transport:
        topic, arrivals = await fresh_topic(transport), Arrivals()
        both = [
            await transport.subscribe([topic], arrivals, group_id=f"group.{topic}")
            for _ in range(2)
        ]
        async with asyncio.timeout(40):
            await asyncio.gather(*(subscription.positioned() for subscription in both))
        assert [subscription.lost for subscription in both] == [None, None]
        await transport.send(topic, b"x")
        await arrivals.wait_for(1)


async def test_started_and_cancelled_at_any_moment_it_leaves_nothing(kafka: KafkaServer) -> None:
    for milliseconds in (0, 1, 2, 4, 8, 16):
        transport = KafkaTransport(KafkaConfig(bootstrap_servers=kafka.bootstrap_servers))
        starting = asyncio.create_task(transport.start())
        await asyncio.sleep(milliseconds / 1_000)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await transport.close()


async def test_a_record_that_the_broker_refuses_costs_that_record_alone(kafka: KafkaServer) -> None:
    async with transport_on(kafka.bootstrap_servers) as transport:
        narrow, topic = f"test.{uuid4().hex}", await fresh_topic(transport)
        await transport.ensure_topics(
            [TopicSpec(name=narrow, settings={"max.message.bytes": "1000"})]
        )
        waiting = asyncio.create_task(transport.send(topic, b"x"))
        with pytest.raises(RecordRefusedError, match="MessageSizeTooLarge"):
            await transport.send(narrow, b"x" * 5_000)
        assert await waiting == "acknowledged"
        assert await transport.send(narrow, b"x") == "acknowledged"


async def test_closed_while_it_connects_it_leaves_nothing(kafka: KafkaServer) -> None:
    for milliseconds in (1, 5, 15, 30):
        transport = KafkaTransport(KafkaConfig(bootstrap_servers=kafka.bootstrap_servers))
        starting = asyncio.create_task(transport.start())
        await asyncio.sleep(milliseconds / 1_000)
        await transport.close()
        (outcome,) = await asyncio.gather(starting, return_exceptions=True)
        assert outcome is None or "closed" in str(outcome)


async def test_closed_twice_and_used_afterwards_it_says_so(kafka: KafkaServer) -> None:
    async with transport_on(kafka.bootstrap_servers) as transport:
        topic = await fresh_topic(transport)
        subscription = await transport.subscribe([topic], Arrivals())
        await subscription.close()
        await subscription.close()
    await transport.close()
    with pytest.raises(BrokerUnavailableError, match="closed"):
        await transport.send(topic, b"x")
    with pytest.raises(BrokerUnavailableError, match="closed"):
        await transport.start()


async def test_on_another_loop_it_says_so(kafka: KafkaServer) -> None:
    async with transport_on(kafka.bootstrap_servers) as transport:

        def elsewhere() -> None:
            asyncio.run(transport.send("x", b"x"))

        with pytest.raises(ConfigurationError, match="belongs to the event loop"):
            await asyncio.to_thread(elsewhere)


async def test_a_send_to_a_frozen_broker_ends_at_its_deadline_unknown(
    steady: KafkaServer,
) -> None:
    async with transport_on(steady.bootstrap_servers, send_timeout_seconds=4.0) as transport:
        topic = await fresh_topic(transport)
        arrivals = Arrivals()
        subscription = await transport.subscribe([topic], arrivals)
        await subscription.positioned()
        await transport.send(topic, b"before")
        steady.pause()
        started = time.monotonic()
        with pytest.raises(SendOutcomeUnknownError, match="may still arrive"):
            await transport.send(topic, b"perhaps")
        assert time.monotonic() - started < 20
        await until_lost(subscription, lost=True)
        steady.resume()
        await until_lost(subscription, lost=False)
        await transport.send(topic, b"after")
        async with asyncio.timeout(40):
            while b"after" not in arrivals.values:
                await asyncio.sleep(0.05)
    assert arrivals.values[0] == b"before"


async def closed_while_it_sends(steady: KafkaServer, fault: Callable[[], None]) -> None:
    """Close a transport whose broker is gone, with a send under way that is given 15 seconds."""
    config = KafkaConfig(bootstrap_servers=steady.bootstrap_servers, send_timeout_seconds=15.0)
    transport = KafkaTransport(config)
    await transport.start()
    topic = await fresh_topic(transport)
    subscription = await transport.subscribe([topic], Arrivals())
    await subscription.positioned()
    fault()
    sending = asyncio.create_task(transport.send(topic, b"x"))
    await asyncio.wait({sending}, timeout=0.3)
    assert not sending.done(), "it is under way"
    started = time.monotonic()
    await transport.close()
    assert time.monotonic() - started < 12, "it does not wait for the send"
    done, _ = await asyncio.wait({sending}, timeout=30)
    assert done
    sending.exception()


async def test_close_on_a_killed_broker_is_quick_and_leaves_nothing(steady: KafkaServer) -> None:
    before = open_files()
    await closed_while_it_sends(steady, steady.kill)
    steady.start()
    assert open_files() <= before + 1


async def test_close_on_a_frozen_broker_is_quick_and_says_nothing(
    steady: KafkaServer, caplog: pytest.LogCaptureFixture
) -> None:
    await closed_while_it_sends(steady, steady.pause)
    gc.collect()
    await asyncio.sleep(0)
    assert "never retrieved" not in caplog.text


async def test_a_restart_loses_nothing_that_was_acknowledged(steady: KafkaServer) -> None:
    async with transport_on(steady.bootstrap_servers) as transport:
        topic = await fresh_topic(transport)
        arrivals = Arrivals()
        subscription = await transport.subscribe([topic], arrivals)
        await subscription.positioned()
        acknowledged = []
        for number in range(3):
            value = b"before %d" % number
            await transport.send(topic, value)
            acknowledged.append(value)
        steady.kill()
        await asyncio.to_thread(steady.start)
        async with asyncio.timeout(40):
            while len(acknowledged) < 6:
                value = b"after %d" % len(acknowledged)
                with contextlib.suppress(BrokerUnavailableError):
                    await transport.send(topic, value)
                    acknowledged.append(value)
        await until_lost(subscription, lost=False)
        async with asyncio.timeout(40):
            while not set(acknowledged) <= set(arrivals.values):
                await asyncio.sleep(0.05)
    assert len(arrivals.values) == len({r.offset for r in arrivals.records})


@pytest.mark.parametrize("delay_seconds", [0.05, 0.5])
async def test_a_slow_link_loses_nothing_that_is_sent_after_positioning(
    steady: KafkaServer, delay_seconds: float
) -> None:
    port = int(steady.advertised["PROXIED"].rpartition(":")[2])
    async with (
        Proxy(steady.address("PROXIED"), port=port) as proxy,
        transport_on(steady.bootstrap_servers) as near,
        transport_on(proxy.address, connect_timeout_seconds=30.0, send_timeout_seconds=30.0) as far,
    ):
        topic = await fresh_topic(near)
        proxy.delay_seconds = delay_seconds
        arrivals = Arrivals()
        subscription = await far.subscribe([topic], arrivals)
        async with asyncio.timeout(40):
            await subscription.positioned()
        for number in range(8):
            await near.send(topic, b"%d" % number)
        await arrivals.wait_for(8)
        proxy.delay_seconds = 0.0
    assert arrivals.values == [b"%d" % number for number in range(8)]


async def test_a_vanished_peer_is_noticed_and_come_back_to(steady: KafkaServer) -> None:
    port = int(steady.advertised["PROXIED"].rpartition(":")[2])
    async with (
        Proxy(steady.address("PROXIED"), port=port) as proxy,
        transport_on(steady.bootstrap_servers) as near,
        transport_on(proxy.address) as far,
    ):
        topic = await fresh_topic(near)
        arrivals = Arrivals()
        subscription = await far.subscribe([topic], arrivals)
        await subscription.positioned()
        proxy.frozen = True
        await until_lost(subscription, lost=True)
        await near.send(topic, b"missed meanwhile")
        proxy.frozen = False
        proxy.reset()
        await until_lost(subscription, lost=False)
        await arrivals.wait_for(1)
    assert arrivals.values == [b"missed meanwhile"]
