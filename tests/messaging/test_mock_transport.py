"""Mock mode: nothing is sent, nothing fails, and it is said aloud until the broker is back."""

import asyncio
import logging

import pytest
from fakes import FakeBroker, FakeTransport

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    RecordRefusedError,
    SendOutcomeUnknownError,
    UnknownTopicError,
)
from langgraph_peerctx.messaging import mock_transport
from langgraph_peerctx.messaging.embedded_broker import EmbeddedBroker
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.mock_transport import (
    AutoTransport,
    MockTransport,
    create_transport,
)
from langgraph_peerctx.messaging.transport import Record, TopicSpec


class Absent(FakeTransport):
    """A transport whose broker is away until a test brings it back."""

    def __init__(self, broker: FakeBroker) -> None:
        super().__init__(broker)
        self.fault: Exception | None = BrokerUnavailableError("nobody there")

    async def start(self) -> None:
        await super().start()
        if self.fault is not None:
            raise self.fault


class Pause:
    """A pause between probes that ends when the test says so."""

    def __init__(self) -> None:
        self._turn = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        assert seconds == mock_transport.PROBE_SECONDS
        self._turn.clear()
        await self._turn.wait()

    async def end(self) -> None:
        self._turn.set()
        for _ in range(5):
            await asyncio.sleep(0)


async def test_mock_mode_sends_nothing_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    transport = MockTransport("no broker at h:1")
    await transport.start()
    assert await transport.send("topic", b"x") == "mock"
    subscription = await transport.subscribe(["topic"], pytest.fail)
    await subscription.positioned()
    assert subscription.offsets == {}
    assert subscription.lost == "mock mode: no broker at h:1"
    assert transport.degraded == ("mock mode: no broker at h:1",)
    assert (await transport.describe_topics(["t"]))["t"].partitions == 0
    await transport.ensure_topics([TopicSpec(name="t")])
    await subscription.close()
    await transport.close()
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert [r.getMessage() for r in warnings] == [
        "mock mode: nothing is sent, nothing is received: no broker at h:1"
    ]


async def test_an_absent_broker_means_mock_mode_until_it_is_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker, pause, arrived = FakeBroker(topics={"t": []}), Pause(), list[Record]()
    kafka = Absent(broker)
    transport = AutoTransport(kafka, "h:1", pause=pause)
    await transport.start()
    assert "Kafka at h:1 is unavailable: nobody there" in transport.degraded[0]
    subscription = await transport.subscribe(["t"], arrived.append)
    await subscription.positioned()
    assert await transport.send("t", b"lost") == "mock"
    await pause.end()
    assert transport.degraded
    kafka.fault = None
    await pause.end()
    assert transport.degraded == ()
    assert subscription.lost is None
    assert await transport.send("t", b"x") == "acknowledged"
    await asyncio.sleep(0)
    assert [record.value for record in arrived] == [b"x"]
    await transport.close()
    assert kafka.closed == 1
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 2
    assert said[1] == "Kafka at h:1 is there again: mock mode is left"


@pytest.mark.parametrize("fault", [RecordRefusedError("too large"), SendOutcomeUnknownError("?")])
async def test_what_is_no_absence_is_raised_and_starts_no_mock_mode(fault: Exception) -> None:
    """Of an unknown outcome nobody may say that it was only logged: an answer may come."""
    kafka = FakeTransport(FakeBroker(topics={"t": []}))
    transport = AutoTransport(kafka, "h:1", pause=Pause())
    await transport.start()
    kafka.send_fault = fault
    with pytest.raises(type(fault)):
        await transport.send("t", b"x")
    assert transport.degraded == ()
    await transport.close()


async def test_a_broker_that_vanishes_starts_mock_mode() -> None:
    kafka, pause = FakeTransport(FakeBroker(topics={"t": []})), Pause()
    transport = AutoTransport(kafka, "h:1", pause=pause)
    await transport.start()
    assert transport.degraded == ()
    kafka.send_fault = BrokerUnavailableError("gone")
    assert await transport.send("t", b"x") == "mock"
    assert transport.degraded
    await transport.close()


@pytest.mark.parametrize("in_mock_mode", [False, True])
async def test_closed_it_looks_for_no_broker_any_more(*, in_mock_mode: bool) -> None:
    kafka = FakeTransport(FakeBroker(topics={"t": []}))
    transport = AutoTransport(kafka, "h:1", pause=Pause())
    kafka.send_fault = BrokerUnavailableError("this transport is closed")
    if in_mock_mode:
        assert await transport.send("t", b"x") == "mock"
    before = asyncio.all_tasks()
    await transport.close()
    with pytest.raises(BrokerUnavailableError, match="closed"):
        await transport.send("t", b"x")
    assert asyncio.all_tasks() <= before


async def test_a_missing_topic_is_no_absent_broker() -> None:
    transport = AutoTransport(FakeTransport(FakeBroker()), "h:1")
    await transport.start()
    with pytest.raises(UnknownTopicError):
        await transport.send("nope", b"x")
    assert transport.degraded == ()
    await transport.close()


async def test_wrong_credentials_are_no_absent_broker() -> None:
    kafka = Absent(FakeBroker())
    kafka.fault = ConfigurationError("wrong password")
    transport = AutoTransport(kafka, "h:1")
    with pytest.raises(ConfigurationError, match="wrong password"):
        await transport.start()
    await transport.close()


def test_the_mode_chooses_the_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(mode: str) -> type:
        return type(create_transport(PeerContextSettings(mock_mode=mode)))

    assert made("always") is MockTransport
    assert made("never") is KafkaTransport
    assert made("auto") is AutoTransport
    monkeypatch.setattr(mock_transport, "KafkaTransport", None)
    assert made("auto") is MockTransport
    with pytest.raises(BrokerUnavailableError, match="pip install aiokafka"):
        made("never")


async def test_topics_that_were_asked_for_in_mock_mode_are_made_when_the_broker_is_there() -> None:
    broker, pause = FakeBroker(), Pause()
    kafka = Absent(broker)
    transport = AutoTransport(kafka, "h:1", pause=pause)
    await transport.start()
    await transport.ensure_topics([TopicSpec(name="t")])
    assert broker.topics == {}
    await asyncio.sleep(0)
    kafka.fault = None
    await pause.end()
    assert transport.degraded == ()
    assert list(broker.topics) == ["t"]
    await transport.close()


async def test_the_embedded_broker_carries_records_between_clients() -> None:
    arrived: list[bytes | None] = []
    got = asyncio.Event()

    def take(record: Record) -> None:
        arrived.append(record.value)
        got.set()

    with EmbeddedBroker(["first"]) as broker:
        config = KafkaConfig(bootstrap_servers=broker.bootstrap_servers)
        one, other = KafkaTransport(config), KafkaTransport(config)
        await one.start()
        await other.start()
        await one.ensure_topics([TopicSpec(name="second")])
        subscription = await other.subscribe(["first", "second"], take)
        await subscription.positioned()
        for topic in ("first", "second"):
            got.clear()
            assert await one.send(topic, topic.encode()) == "acknowledged"
            async with asyncio.timeout(30):
                await got.wait()
        with pytest.raises(UnknownTopicError):
            await one.send("third", b"x")
        await one.close()
        await other.close()
    assert arrived == [b"first", b"second"]


def test_without_its_extra_the_embedded_broker_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "confluent_kafka", None)
    with (
        pytest.raises(ConfigurationError, match=r"langgraph-peerctx\[embedded\]"),
        EmbeddedBroker(),
    ):
        pass
