"""Publishing and consuming, on a broker in memory."""

import asyncio
from typing import Any

import pytest
from fakes import FakeBroker, FakeSubscription, FakeTransport

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError, ProtocolError
from langgraph_peerctx.messaging import consumer as consumer_module
from langgraph_peerctx.messaging.consumer import KafkaMessageConsumer
from langgraph_peerctx.messaging.mock_transport import MockTransport
from langgraph_peerctx.messaging.producer import KafkaMessageProducer

REQUESTS, REPLIES = "agent.context.request", "agent.context.response.asker"
ASK = {"requester_id": "asker", "failed_agent_id": "product", "thread_id": "t"}


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker(topics={REQUESTS: [], REPLIES: []})


@pytest.fixture
def transport(broker: FakeBroker) -> FakeTransport:
    return FakeTransport(broker)


async def test_what_is_published_says_what_it_is_in_its_headers(
    broker: FakeBroker, transport: FakeTransport
) -> None:
    async with KafkaMessageProducer(transport=transport) as producer:
        receipt = await producer.publish_context_request(**ASK, traceparent="00-ab-cd-01")
    (record,) = broker.topics[REQUESTS]
    assert dict(record.headers) == {
        "message_type": b"REQUEST_CONTEXT",
        "correlation_id": receipt.correlation_id.encode(),
        "sender": b"asker",
        "traceparent": b"00-ab-cd-01",
    }
    assert receipt.delivery == "acknowledged"
    assert receipt.topic == REQUESTS


async def test_collected_messages_are_handed_out_once_and_in_order(
    transport: FakeTransport,
) -> None:
    async with (
        KafkaMessageConsumer([REQUESTS, REPLIES], transport=transport) as consumer,
        KafkaMessageProducer(transport=transport) as producer,
    ):
        for number in range(3):
            await producer.publish_context_request(**ASK, attempt=number + 1)
        await producer.publish_context_response(
            response_topic=REPLIES,
            responder_id="marketing",
            failed_agent_id="product",
            thread_id="t",
        )
        answers = await consumer.collect_messages(
            timeout=5, message_type="PROVIDE_CONTEXT", max_messages=1
        )
        first = await consumer.collect_messages(timeout=5, max_messages=2)
        rest = await consumer.collect_messages(timeout=0.5)
    assert [m["agents"][0]["agent_id"] for m in answers] == ["marketing"]
    assert [m["attempt"] for m in first] == [1, 2]
    assert [m["attempt"] for m in rest] == [3]


async def test_handlers_get_their_messages_and_a_failing_one_is_counted(
    transport: FakeTransport,
) -> None:
    got: list[int] = []
    done = asyncio.Event()

    async def handle(message: dict[str, Any]) -> None:
        if message["attempt"] == 2:
            raise ValueError("cannot")
        got.append(message["attempt"])
        if message["attempt"] == 3:
            done.set()

    async with (
        KafkaMessageConsumer([REQUESTS], transport=transport) as consumer,
        KafkaMessageProducer(transport=transport) as producer,
    ):
        consumer.register_handler("REQUEST_CONTEXT", handle)
        task = consumer.start_consuming()
        assert consumer.start_consuming() is task
        for number in range(3):
            await producer.publish_context_request(**ASK, attempt=number + 1)
        async with asyncio.timeout(30):
            await done.wait()
    assert got == [1, 3]
    assert consumer.failed == 1
    assert task.done()


async def test_a_sync_handler_serves_too(transport: FakeTransport) -> None:
    got = asyncio.Event()
    async with (
        KafkaMessageConsumer([REQUESTS], transport=transport) as consumer,
        KafkaMessageProducer(transport=transport) as producer,
    ):
        consumer.register_handler("REQUEST_CONTEXT", lambda _: got.set())
        consumer.start_consuming()
        await producer.publish_context_request(**ASK)
        async with asyncio.timeout(30):
            await got.wait()


async def test_what_is_handled_is_not_kept_for_collecting_and_the_rest_is(
    transport: FakeTransport,
) -> None:
    handled: list[int] = []
    async with (
        KafkaMessageConsumer([REQUESTS, REPLIES], transport=transport) as consumer,
        KafkaMessageProducer(transport=transport) as producer,
    ):
        consumer.register_handler("REQUEST_CONTEXT", lambda m: handled.append(m["attempt"]))
        await producer.publish_context_request(**ASK, attempt=1)  # before: it waits
        consumer.start_consuming()
        await producer.publish_context_request(**ASK, attempt=2)
        await producer.publish_context_response(
            response_topic=REPLIES,
            responder_id="marketing",
            failed_agent_id="product",
            thread_id="t",
        )
        kept = await consumer.collect_messages(timeout=0.5)
    assert handled == [1, 2]
    assert [m["message_type"] for m in kept] == ["PROVIDE_CONTEXT"]


@pytest.mark.parametrize(("limit", "value"), [("MESSAGES", 3), ("BYTES", 1_500)])
async def test_what_nobody_takes_is_bounded_and_what_went_is_counted(
    transport: FakeTransport, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(consumer_module, f"BUFFERED_{limit}", value)
    async with (
        KafkaMessageConsumer([REQUESTS], transport=transport) as consumer,
        KafkaMessageProducer(transport=transport) as producer,
    ):
        for number in range(10):
            await producer.publish_context_request(**ASK, attempt=number + 1)
        kept = await consumer.collect_messages(timeout=0.1)
    assert len(kept) + consumer.dropped == 10
    assert [m["attempt"] for m in kept] == list(range(11 - len(kept), 11))
    assert 1 <= len(kept) <= 3


async def test_a_cancelled_collecting_loses_nothing(transport: FakeTransport) -> None:
    async with (
        KafkaMessageConsumer([REQUESTS], transport=transport) as consumer,
        KafkaMessageProducer(transport=transport) as producer,
    ):
        collecting = asyncio.create_task(consumer.collect_messages(timeout=60, max_messages=4))
        for number in range(3):
            await producer.publish_context_request(**ASK, attempt=number + 1)
        await asyncio.sleep(0.02)
        collecting.cancel()
        await asyncio.wait({collecting})
        again = await consumer.collect_messages(timeout=0.02)
    assert [m["attempt"] for m in again] == [1, 2, 3]


async def test_a_handler_may_stop_its_consumer(transport: FakeTransport) -> None:
    consumer = KafkaMessageConsumer([REQUESTS], transport=transport)
    ends: list[str] = []

    async def stop(_message: Any) -> None:
        await consumer.stop()
        ends.append("handled to its end")

    await consumer.start()
    consumer.register_handler("REQUEST_CONTEXT", stop)
    task = consumer.start_consuming()
    async with KafkaMessageProducer(transport=transport) as producer:
        await producer.publish_context_request(**ASK)
        async with asyncio.timeout(30):
            await task
    assert ends == ["handled to its end"]
    with pytest.raises(ConfigurationError, match="not started"):
        consumer.start_consuming()


async def test_a_start_that_is_cancelled_can_be_tried_again(
    transport: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_self: Any) -> None:
        await asyncio.Event().wait()

    consumer = KafkaMessageConsumer([REQUESTS], transport=transport)
    with monkeypatch.context() as patch:
        patch.setattr(FakeSubscription, "positioned", never)
        starting = asyncio.create_task(consumer.start())
        await asyncio.sleep(0.02)
        starting.cancel()
        await asyncio.wait({starting})
    assert transport.broker.readers == []
    async with consumer, KafkaMessageProducer(transport=transport) as producer:
        await producer.publish_context_request(**ASK)
        assert len(await consumer.collect_messages(timeout=5, max_messages=1)) == 1


async def test_poison_is_counted_by_its_fault_and_skipped(
    broker: FakeBroker, transport: FakeTransport
) -> None:
    async with (
        KafkaMessageConsumer([REQUESTS], transport=transport) as consumer,
        KafkaMessageProducer(transport=transport) as producer,
    ):
        for poison in (None, b"\xff", b"{}", b"[" * 100_000):
            broker.store(REQUESTS, poison)
        await producer.publish_context_request(**ASK)
        messages = await consumer.collect_messages(timeout=5, max_messages=1)
    assert len(messages) == 1
    assert consumer.rejected.total() == 4


async def test_in_mock_mode_nothing_is_collected_and_nothing_is_waited_for() -> None:
    transport = MockTransport("no broker")
    async with (
        KafkaMessageConsumer([REQUESTS], transport=transport) as consumer,
        KafkaMessageProducer(transport=transport) as producer,
    ):
        receipt = await producer.publish_context_request(**ASK)
        async with asyncio.timeout(20):
            assert await consumer.collect_messages(timeout=60) == []
    assert receipt.delivery == "mock"


@pytest.mark.parametrize("topics", ["one-topic", []])
def test_topics_must_be_a_list(topics: Any) -> None:
    with pytest.raises(ConfigurationError, match="list"):
        KafkaMessageConsumer(topics)


def test_a_handler_of_no_message_type_would_never_be_called() -> None:
    consumer = KafkaMessageConsumer([REQUESTS])
    with pytest.raises(ConfigurationError, match="there are AGENT_DIED"):
        consumer.register_handler("REQUEST", print)


async def test_not_started_it_says_so() -> None:
    with pytest.raises(ConfigurationError, match="async with"):
        KafkaMessageConsumer([REQUESTS]).start_consuming()
    with pytest.raises(ConfigurationError, match="async with"):
        await KafkaMessageProducer().publish_context_request(**ASK)


async def test_stopped_twice_and_started_again(transport: FakeTransport) -> None:
    consumer = KafkaMessageConsumer([REQUESTS], transport=transport)
    await consumer.start()
    await consumer.start()
    await consumer.stop()
    await consumer.stop()
    async with consumer, KafkaMessageProducer(transport=transport) as producer:
        await producer.publish_context_request(**ASK)
        assert len(await consumer.collect_messages(timeout=5, max_messages=1)) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"requester_id": "../x"},
        {"failed_agent_id": "a b"},
        {"thread_id": ""},
        {"thread_id": "a\nb"},
        {"time_window_seconds": -1},
        {"attempt": 0},
    ],
    ids=repr,
)
async def test_an_illegal_request_is_refused_and_nothing_is_sent(
    broker: FakeBroker, transport: FakeTransport, changes: dict[str, Any]
) -> None:
    async with KafkaMessageProducer(transport=transport) as producer:
        with pytest.raises(ProtocolError, match=next(iter(changes))):
            await producer.publish_context_request(**(ASK | changes))
    assert broker.topics[REQUESTS] == []


@pytest.mark.parametrize(
    "topic", ["__consumer_offsets", "agent.context.response", "agent.context.response.", "x.asker"]
)
async def test_an_answer_goes_to_a_response_topic_or_nowhere(
    transport: FakeTransport, topic: str
) -> None:
    async with KafkaMessageProducer(transport=transport) as producer:
        with pytest.raises(ProtocolError, match="no response topic"):
            await producer.publish_context_response(
                response_topic=topic, responder_id="m", failed_agent_id="p", thread_id="t"
            )


async def test_an_answer_of_plain_json_is_checked(transport: FakeTransport) -> None:
    told = {
        "interaction_id": "i",
        "thread_id": "t",
        "from_agent": "p",
        "to_agent": "m",
        "kind": "order",
        "occurred_at": "2026-01-01T00:00:00Z",
    }
    async with KafkaMessageProducer(transport=transport) as producer:
        answer = {"responder_id": "m", "failed_agent_id": "p", "thread_id": "t"}
        await producer.publish_context_response(
            response_topic=REPLIES, interactions=[told], **answer
        )
        with pytest.raises(ProtocolError, match="occurred_at"):
            await producer.publish_context_response(
                response_topic=REPLIES, interactions=[told | {"occurred_at": "soon"}], **answer
            )


async def test_with_settings_alone_it_makes_its_own_transport() -> None:
    settings = PeerContextSettings(mock_mode="always")
    async with (
        KafkaMessageProducer(settings) as producer,
        KafkaMessageConsumer([REQUESTS], settings=settings),
    ):
        assert (await producer.publish_context_request(**ASK)).delivery == "mock"
