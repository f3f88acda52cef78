"""One trace from who asks to who answers, over a broker: its context travels in Kafka headers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from spans import Spans, id_of, links_of, parent_of, trace_of, tracing_on

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.gathering.gatherer import Wanted
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.messaging.agent_context_service import AgentContextService, ContextResponder
from langgraph_peerctx.messaging.embedded_broker import EmbeddedBroker
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.transport import From, Record
from langgraph_peerctx.persistence.event_store import EventStore, record_interaction
from langgraph_peerctx.protocol.codec import encode
from langgraph_peerctx.runtime import PeerContextRuntime
from langgraph_peerctx.tracing import span

ASK: dict[str, Any] = {"failed_agent_id": "product", "thread_id": "t", "run_id": "r"}


@pytest.fixture(params=["embedded", pytest.param("real", marks=pytest.mark.kafka)])
def servers(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "real":
        yield request.getfixturevalue("kafka").bootstrap_servers
        return
    with EmbeddedBroker() as broker:
        yield broker.bootstrap_servers


@pytest.fixture
def kafka_config(servers: str) -> KafkaConfig:
    """Topics of its own: others' questions are answered in others' traces."""
    name = uuid4().hex
    return KafkaConfig(
        bootstrap_servers=servers,
        context_request_topic=f"{name}.request",
        context_response_topic_prefix=f"{name}.response",
    )


@pytest.fixture
def spans() -> Iterator[Spans]:
    with tracing_on() as found:
        yield found


def settings_of(kafka_config: KafkaConfig, process: str) -> PeerContextSettings:
    return PeerContextSettings(
        kafka=kafka_config,
        mock_mode="never",
        requester_id="tracer",
        process_id=process,
    )


@asynccontextmanager
async def asker_and_peers(
    kafka_config: KafkaConfig, folder: Path, *names: str
) -> AsyncIterator[PeerContextRuntime]:
    """Processes' worth of runtimes: each has connections of its own, and shares nothing."""
    async with AsyncExitStack() as stack:
        for name in names:
            store = stack.enter_context(EventStore(f"sqlite:///{folder}/{name}.db"))
            record_interaction(
                agent_id=name,
                from_agent="product",
                to_agent=name,
                thread_id="t",
                kind="order",
                payload={"secret": "of the customer"},
                store=store,
            )
            responder = ContextResponder(settings_of(kafka_config, f"host-{name}"))
            service = AgentContextService(name, responder=responder, store=store)
            await stack.enter_async_context(service)
        runtime = PeerContextRuntime(settings_of(kafka_config, "asker"))
        yield await stack.enter_async_context(runtime)


def topics_of(kafka_config: KafkaConfig) -> tuple[str, str]:
    return kafka_config.context_request_topic, kafka_config.get_response_topic("tracer")


@asynccontextmanager
async def records_of(kafka_config: KafkaConfig) -> AsyncIterator[list[Record]]:
    """What goes over both topics meanwhile."""
    found: list[Record] = []
    transport = KafkaTransport(kafka_config)
    await transport.start()
    try:
        subscription = await transport.subscribe(
            topics_of(kafka_config), found.append, start=From()
        )
        await subscription.positioned()
        yield found
        await subscription.close()
    finally:
        await transport.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


async def in_one_go(runtime: PeerContextRuntime) -> PeerContext:
    return await runtime.gather(**ASK, expect=["one", "two"])


async def in_steps(runtime: PeerContextRuntime) -> PeerContext:
    request = runtime.request(**ASK)
    since = await runtime.steps.position(request)
    asked = await runtime.steps.ask(request, since, ["one", "two"])
    return await runtime.steps.collect(request, since, asked, Wanted(["one", "two"]))


@pytest.mark.parametrize("gather", [in_one_go, in_steps])
async def test_question_and_answers_are_one_trace(
    kafka_config: KafkaConfig, spans: Spans, tmp_path: Path, gather: Any
) -> None:
    async with asker_and_peers(kafka_config, tmp_path, "one", "two") as runtime:
        with span("whoever asks"):
            context = await gather(runtime)
    assert context.coverage.complete
    asking, answers = spans.one("peerctx.gather"), spans.named("peerctx.answer")
    assert parent_of(asking) == id_of(spans.one("whoever asks"))
    assert {trace_of(one) for one in spans.all()} == {trace_of(asking)}
    assert [parent_of(one) for one in answers] == [id_of(asking)] * 2
    assert sorted(links_of(asking)) == sorted(map(id_of, answers))
    told = dict(asking.attributes or {})
    assert told["peerctx.complete"] is True
    assert (told["peerctx.expected"], told["peerctx.answers"], told["peerctx.facts"]) == (2, 2, 2)
    for one in answers:
        said = dict(one.attributes or {})
        assert (said["peerctx.thread_id"], said["peerctx.run_id"]) == ("t", "r")
        assert (said["peerctx.agents"], said["peerctx.interactions"]) == (1, 1)
    assert "secret" not in repr([dict(one.attributes or {}) for one in spans.all()])


async def test_each_record_carries_the_span_of_who_sent_it(
    kafka_config: KafkaConfig, spans: Spans, tmp_path: Path
) -> None:
    async with (
        asker_and_peers(kafka_config, tmp_path, "one") as runtime,
        records_of(kafka_config) as records,
    ):
        await runtime.gather(**ASK, expect=["one"])
        await until(lambda: len(records) == 2)
    sent = {record.topic: record.header("traceparent") for record in records}
    names = ("peerctx.gather", "peerctx.answer")
    for topic, name in zip(topics_of(kafka_config), names, strict=True):
        one = spans.one(name)
        assert sent[topic] is not None
        assert sent[topic].startswith(f"00-{trace_of(one):032x}-{id_of(one):016x}-")


@pytest.mark.parametrize("header", [b"00-ab-cd-01", b"\xff\xfe", b"x" * 10_000])
async def test_a_malformed_header_is_answered_in_a_trace_of_its_own(
    kafka_config: KafkaConfig, spans: Spans, tmp_path: Path, header: bytes
) -> None:
    async with asker_and_peers(kafka_config, tmp_path, "one") as runtime:
        request = runtime.request(**ASK)
        slot = runtime.gatherer.open(request)
        with slot as got:
            headers = (("traceparent", header),)
            await runtime.transport.send(
                kafka_config.context_request_topic, encode(request), headers=headers
            )
            wanted = Wanted(["one"])
            await runtime.gatherer.collect(request, got, wanted, ask=nothing)
    assert wanted.responders == {"host-one"}
    assert parent_of(spans.one("peerctx.answer")) is None


async def nothing() -> None:
    """It was asked by hand."""


async def test_a_gather_is_ended_in_its_trace_when_its_steps_are_never_collected(
    kafka_config: KafkaConfig, spans: Spans, tmp_path: Path
) -> None:
    async with asker_and_peers(kafka_config, tmp_path) as runtime:
        request = runtime.request(**ASK)
        await runtime.steps.ask(request, await runtime.steps.position(request), ["nobody"])
        assert spans.named("peerctx.gather") == []
    assert spans.one("peerctx.gather")


async def test_where_nobody_traces_no_header_is_sent_and_answers_have_their_times(
    kafka_config: KafkaConfig, tmp_path: Path
) -> None:
    async with (
        asker_and_peers(kafka_config, tmp_path, "one", "two") as runtime,
        records_of(kafka_config) as records,
    ):
        context = await in_steps(runtime)
        await until(lambda: len(records) == 3)
    assert [record.header("traceparent") for record in records] == [None] * 3
    assert {one.responder_id for one in context.answers} == {"host-one", "host-two"}
    assert sorted([*context.answers], key=lambda one: one.at) == list(context.answers)
    assert {**context.answers[0].agents, **context.answers[1].agents} == {
        "one": "context",
        "two": "context",
    }
    assert PeerContext.from_json(context.as_json()) == context
