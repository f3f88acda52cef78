"""A gather on a real Kafka that is killed, frozen, restarted, slow or never there."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from services.kafka import KafkaServer, free_ports
from services.proxy import Proxy

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.errors import BrokerUnavailableError
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.messaging.agent_context_service import AgentContextService, ContextResponder
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.topics import topics_for
from langgraph_peerctx.messaging.transport import From, Record
from langgraph_peerctx.persistence.event_store import EventStore, record_interaction
from langgraph_peerctx.protocol.codec import encode
from langgraph_peerctx.protocol.messages import ContextRequest
from langgraph_peerctx.runtime import PeerContextRuntime

pytestmark = pytest.mark.kafka

GRACE_SECONDS = 4.0
"""For a busy machine; what would be waited for beyond the window takes longer."""


def settings_on(address: str, process: str = "asker", **changes: Any) -> PeerContextSettings:
    kafka = KafkaConfig(
        bootstrap_servers=address, **{k: changes.pop(k) for k in list(changes) if "_timeout" in k}
    )
    fields = {"kafka": kafka, "mock_mode": "auto", "requester_id": "tests", "process_id": process}
    return PeerContextSettings(**(fields | changes))


@contextlib.asynccontextmanager
async def peers(address: str, folder: Path, count: int = 3) -> AsyncIterator[list[str]]:
    """Peers with a responder and a store each, all on this loop."""
    names = [f"peer-{number}" for number in range(count)]
    async with contextlib.AsyncExitStack() as stack:
        for name in names:
            store = stack.enter_context(EventStore(f"sqlite:///{folder}/{name}.db"))
            record_interaction(
                agent_id=name,
                from_agent="product",
                to_agent=name,
                thread_id="t",
                kind="order",
                payload={"to": name},
                store=store,
            )
            responder = ContextResponder(settings_on(address, name))
            service = AgentContextService(name, responder=responder, store=store)
            await stack.enter_async_context(service)
        yield names


async def ask(
    runtime: PeerContextRuntime, expect: list[str], window: float = 5.0, **more: Any
) -> PeerContext:
    """Gather, and see that the window is kept."""
    started = time.monotonic()
    context = await runtime.gather(
        failed_agent_id="product", thread_id="t", expect=expect, timeout_seconds=window, **more
    )
    assert time.monotonic() - started <= window + GRACE_SECONDS
    return context


async def until_complete(runtime: PeerContextRuntime, names: list[str]) -> PeerContext:
    async with asyncio.timeout(40):
        while True:
            context = await ask(runtime, names, window=1.0)
            if context.coverage.complete:
                return context


@pytest.fixture(scope="module")
def shaky(kafka: KafkaServer) -> Iterator[KafkaServer]:
    assert kafka.bootstrap_servers
    (proxied,) = free_ports(1)
    with KafkaServer(
        listeners={"PROXIED": "PLAINTEXT"}, advertised={"PROXIED": f"127.0.0.1:{proxied}"}
    ) as server:
        yield server


@pytest.fixture
def steady(shaky: KafkaServer) -> Iterator[KafkaServer]:
    yield shaky
    shaky.resume()
    if not shaky.is_running:
        shaky.start()


async def test_every_peer_is_heard_and_named(kafka: KafkaServer, tmp_path: Path) -> None:
    address = kafka.bootstrap_servers
    async with (
        peers(address, tmp_path) as names,
        PeerContextRuntime(settings_on(address)) as runtime,
    ):
        context = await ask(runtime, names)
    assert context.coverage.complete
    assert context.degraded == ()
    assert [fact.told_by for fact in context.facts] == [(name,) for name in names]


async def test_two_gathers_at_once_and_two_requesters_do_not_mix(
    kafka: KafkaServer, tmp_path: Path
) -> None:
    address = kafka.bootstrap_servers
    async with (
        peers(address, tmp_path) as names,
        PeerContextRuntime(settings_on(address)) as one,
        PeerContextRuntime(settings_on(address, requester_id="others")) as other,
    ):
        contexts = await asyncio.gather(*(ask(r, names) for r in (one, one, other)))
    assert all(context.coverage.complete for context in contexts)
    assert all(len(context.facts) == 3 for context in contexts)
    assert all(context.coverage.duplicate == 0 for context in contexts)


ASKER = """
import asyncio, json, sys
from langgraph_peerctx import KafkaConfig, PeerContextRuntime, PeerContextSettings

async def main(address, names):
    settings = PeerContextSettings(
        kafka=KafkaConfig(bootstrap_servers=address), mock_mode="never", requester_id="tests"
    )
    async with PeerContextRuntime(settings) as runtime:
        for _ in range(20):
            context = await runtime.gather(failed_agent_id="product", thread_id="t", expect=names)
            print(json.dumps([context.coverage.complete, len(context.facts)]))

asyncio.run(main(sys.argv[1], sys.argv[2].split(",")))
"""


async def test_two_processes_of_one_requester_id_each_get_their_own(
    kafka: KafkaServer, tmp_path: Path
) -> None:
    address = kafka.bootstrap_servers
    async with peers(address, tmp_path) as names:
        askers = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", ASKER, address, ",".join(names)),
                stdout=subprocess.PIPE,
            )
            for _ in range(2)
        ]
        async with asyncio.timeout(60):
            outputs = await asyncio.gather(*(asker.communicate() for asker in askers))
    for output, _ in outputs:
        assert [json.loads(line) for line in output.splitlines()] == [[True, 3]] * 20


async def test_malformed_records_in_both_topics_harm_nobody(
    kafka: KafkaServer, tmp_path: Path
) -> None:
    address = kafka.bootstrap_servers
    poison = [b"", b"\xff", b"{", b"[" * 50_000, b"{}", b'{"message_type": "REQUEST_CONTEXT"}']
    async with (
        peers(address, tmp_path) as names,
        PeerContextRuntime(settings_on(address)) as runtime,
    ):

        async def spoil() -> None:
            for topic in ("agent.context.request", "agent.context.response.tests"):
                for value in poison:
                    await runtime.transport.send(topic, value)

        _, context = await asyncio.gather(spoil(), ask(runtime, names))
        assert (await ask(runtime, names)).coverage.complete
    assert context.coverage.complete


async def test_a_request_for_a_topic_that_does_not_exist_makes_none(
    kafka: KafkaServer, tmp_path: Path
) -> None:
    address = kafka.bootstrap_servers
    stranger = f"stranger-{uuid4().hex[:8]}"
    request = ContextRequest(
        sent_at=datetime.now(UTC),
        correlation_id="c",
        requester_id=stranger,
        failed_agent_id="product",
        thread_id="t",
        time_window_seconds=60.0,
        response_topic="__consumer_offsets",
    )
    async with (
        peers(address, tmp_path) as names,
        PeerContextRuntime(settings_on(address)) as runtime,
    ):
        await runtime.transport.send("agent.context.request", encode(request))
        assert (await ask(runtime, names)).coverage.complete
        topics = await runtime.transport.describe_topics([f"agent.context.response.{stranger}"])
    assert [state.partitions for state in topics.values()] == [0]


async def test_never_there_the_window_is_kept_and_it_is_said() -> None:
    (port,) = free_ports(1)
    async with PeerContextRuntime(settings_on(f"127.0.0.1:{port}")) as runtime:
        context = await ask(runtime, ["a"], window=1.0)
    assert context.degraded[0].startswith("mock mode: Kafka at")
    assert not context.coverage.complete
    strict = settings_on(f"127.0.0.1:{port}", mock_mode="never")
    with pytest.raises(BrokerUnavailableError):
        await PeerContextRuntime(strict).start()


async def test_a_fresh_broker_that_comes_late_is_used_without_anybody_doing_anything(
    kafka: KafkaServer, tmp_path: Path
) -> None:
    assert kafka.is_running
    late, ending = KafkaServer(), contextlib.AsyncExitStack()
    ending.callback(late.__exit__)
    async with (
        ending,
        peers(late.bootstrap_servers, tmp_path) as names,
        PeerContextRuntime(settings_on(late.bootstrap_servers)) as runtime,
    ):
        assert (await ask(runtime, names, window=1.0)).degraded
        await asyncio.to_thread(late.start)
        context = await until_complete(runtime, names)
    assert context.degraded == ()
    assert len(context.facts) == 3


async def test_a_broker_that_accepts_and_never_answers_means_mock_mode() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        settings = settings_on(address, connect_timeout_seconds=1.0)
        started = time.monotonic()
        async with PeerContextRuntime(settings) as runtime:
            assert time.monotonic() - started < 8
            context = await ask(runtime, ["a"], window=1.0)
    assert context.degraded[0].startswith("mock mode: Kafka at")


async def test_a_frozen_broker_costs_no_more_than_the_window(
    steady: KafkaServer, tmp_path: Path
) -> None:
    address = steady.bootstrap_servers
    async with (
        peers(address, tmp_path) as names,
        PeerContextRuntime(settings_on(address, send_timeout_seconds=10.0)) as runtime,
    ):
        assert (await ask(runtime, names)).coverage.complete
        steady.pause()
        for window in (0.5, 3.0):
            context = await ask(runtime, names, window=window)
            assert context.facts == ()
            assert context.degraded
            assert not context.coverage.complete
        steady.resume()
        assert (await until_complete(runtime, names)).degraded == ()


async def test_a_broker_killed_while_collecting_costs_no_more_than_the_window(
    steady: KafkaServer, tmp_path: Path
) -> None:
    address = steady.bootstrap_servers
    async with (
        peers(address, tmp_path) as names,
        PeerContextRuntime(settings_on(address)) as runtime,
    ):
        came = asyncio.Semaphore(0)
        collecting = asyncio.create_task(
            ask(runtime, [*names, "nobody"], window=5.0, on_answer=lambda _: came.release())
        )
        for _ in names:
            await came.acquire()
        steady.kill()
        context = await collecting
        assert context.coverage.silent == ("nobody",)
        assert len(context.facts) == 3
        during = await ask(runtime, names, window=1.0)
        assert during.degraded
        await asyncio.to_thread(steady.start)
        assert (await until_complete(runtime, names)).degraded == ()


@pytest.mark.parametrize("delay_seconds", [0.05, 0.2, 2.0])
async def test_on_a_slow_link_every_answer_that_came_in_time_is_in(
    steady: KafkaServer, tmp_path: Path, delay_seconds: float
) -> None:
    port = int(steady.advertised["PROXIED"].rpartition(":")[2])
    async with (
        peers(steady.bootstrap_servers, tmp_path) as names,
        Proxy(steady.address("PROXIED"), port=port) as proxy,
        PeerContextRuntime(
            settings_on(proxy.address, connect_timeout_seconds=30.0, send_timeout_seconds=30.0)
        ) as runtime,
    ):
        await runtime.gather(failed_agent_id="product", thread_id="t", expect=names)
        proxy.delay_seconds = delay_seconds
        window = 5 * delay_seconds + 5.0
        context = await ask(runtime, names, window=window)
        proxy.delay_seconds = 0.0
    assert context.coverage.complete
    assert len(context.facts) == 3


async def test_a_flood_on_the_response_topic_does_not_hold_up_an_honest_answer(
    kafka: KafkaServer, tmp_path: Path
) -> None:
    address = kafka.bootstrap_servers
    async with (
        peers(address, tmp_path) as names,
        PeerContextRuntime(settings_on(address)) as runtime,
    ):
        flooder = KafkaTransport(KafkaConfig(bootstrap_servers=address))
        await flooder.start()

        async def flood() -> None:
            headers = (("correlation_id", b"somebody-elses"), ("sender", b"flooder"))
            for _ in range(25):
                await asyncio.gather(
                    *(
                        flooder.send("agent.context.response.tests", b"x", headers=headers)
                        for _ in range(1_000)
                    )
                )

        flooding = asyncio.create_task(flood())
        contexts = [await ask(runtime, names) for _ in range(5)]
        await flooding
        assert (await until_complete(runtime, names)).degraded == ()
        assert runtime.gatherer._inbox.counters["unexpected"] > 1_000
        await flooder.close()
    assert all(context.facts for context in contexts)


async def test_a_service_that_was_away_answers_what_has_not_expired(
    kafka: KafkaServer, tmp_path: Path
) -> None:
    address = kafka.bootstrap_servers
    transport = KafkaTransport(KafkaConfig(bootstrap_servers=address))
    await transport.start()
    requester = f"away-{uuid4().hex[:8]}"
    await transport.ensure_topics(topics_for(transport._config, [requester]))
    got = asyncio.Event()
    answers: list[Record] = []

    def take(record: Record) -> None:
        answers.append(record)
        got.set()

    topic = f"agent.context.response.{requester}"
    subscription = await transport.subscribe([topic], take, start=From())
    await subscription.positioned()
    request = ContextRequest(
        sent_at=datetime.now(UTC),
        correlation_id="c",
        requester_id=requester,
        failed_agent_id="product",
        thread_id="t",
        time_window_seconds=60.0,
    )
    await transport.send("agent.context.request", encode(request))
    async with peers(address, tmp_path, count=1), asyncio.timeout(40):
        await got.wait()
    assert len(answers) == 1
    await transport.close()
