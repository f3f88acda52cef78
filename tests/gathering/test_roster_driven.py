"""Where the caller names nobody, those are expected who are there; a gather ends with the last."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBroker, FakeTransport

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.gathering.gatherer import Wanted
from langgraph_peerctx.messaging.agent_context_service import ContextResponder
from langgraph_peerctx.messaging.context_handler import ContextRequestHandler
from langgraph_peerctx.persistence.event_store import EventStore, record_interaction
from langgraph_peerctx.protocol.codec import decode, encode
from langgraph_peerctx.protocol.messages import ContextRequest, DeathNotice
from langgraph_peerctx.runtime import PeerContextRuntime

SENT_AT = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = PeerContextSettings(
    requester_id="tester",
    mock_mode="auto",
    heartbeat_interval_seconds=0.05,
    heartbeat_pause_seconds=0.45,
)
ABOUT = {"failed_agent_id": "product", "thread_id": "t"}


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with EventStore(f"sqlite:///{tmp_path}/events.db") as store:
        yield store


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


class Slow(ContextRequestHandler):
    """Answers when it is told to."""

    def __init__(self, agent_id: str, store: EventStore) -> None:
        super().__init__(agent_id, store=store)
        self.go = True

    def answer(self, request: Any) -> Any:
        while not self.go:
            time.sleep(0.005)
        return super().answer(request)


class Peer:
    def __init__(self, broker: FakeBroker, store: EventStore, name: str) -> None:
        self.transport = FakeTransport(broker)
        settings = SETTINGS.model_copy(update={"process_id": f"process-{name}"})
        self.responder = ContextResponder(settings, transport=self.transport)
        self.handler = Slow(name, store)

    async def start(self) -> None:
        await self.responder.host(self.handler)

    def kill(self) -> None:
        """Nothing comes from it any more: no beat, no word of leaving, no answer."""
        self.transport.silent = True


@pytest.fixture
async def peers(broker: FakeBroker, store: EventStore) -> AsyncIterator[dict[str, Peer]]:
    peers = {name: Peer(broker, store, name) for name in "abc"}
    for name, peer in peers.items():
        record_interaction(
            agent_id=name,
            from_agent="product",
            to_agent=name,
            thread_id="t",
            kind="order",
            interaction_id=f"order-{name}",
            store=store,
        )
        await peer.start()
    yield peers
    for peer in peers.values():
        peer.handler.go = True
        await peer.responder.stop()


@asynccontextmanager
async def asker(broker: FakeBroker, *, warm: bool = True) -> AsyncIterator[PeerContextRuntime]:
    async with PeerContextRuntime(SETTINGS, transport=FakeTransport(broker)) as runtime:
        await until(lambda: runtime.presence.roster.is_warm or not warm)
        yield runtime


async def until(true: Callable[[], Any], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


async def test_a_gather_ends_with_the_last_of_those_who_are_there(
    broker: FakeBroker, peers: dict[str, Peer]
) -> None:
    async with asker(broker) as runtime:
        peers["c"].handler.go = False
        gathering = asyncio.create_task(runtime.gather(**ABOUT, timeout_seconds=60))
        await asyncio.sleep(0.3)
        assert not gathering.done()
        peers["c"].handler.go = True
        context = await gathering
    assert context.elapsed_seconds < 20
    assert context.coverage.asked == ("process-a", "process-b", "process-c")
    assert context.coverage.answered == context.coverage.asked
    assert context.coverage.complete
    assert context.degraded == ()


@pytest.mark.usefixtures("peers")
async def test_a_roster_that_is_not_warm_is_not_relied_on(broker: FakeBroker) -> None:
    async with asker(broker, warm=False) as runtime:
        context = await runtime.gather(**ABOUT, timeout_seconds=1.0)
    assert len(context.facts) == 3
    assert not context.coverage.roster_known
    assert not context.coverage.complete


async def test_with_nobody_there_it_is_soon_over_and_nothing_is_complete(
    broker: FakeBroker,
) -> None:
    async with asker(broker) as runtime:
        interval = runtime.settings.heartbeat_interval_seconds
        context = await runtime.gather(**ABOUT, timeout_seconds=60)
    assert interval <= context.elapsed_seconds < 20
    assert not context.coverage.complete
    assert context.degraded == ("no peer answered",)


async def test_who_leaves_meanwhile_is_waited_for_no_more(
    broker: FakeBroker, peers: dict[str, Peer]
) -> None:
    async with asker(broker) as runtime:
        gathering = asyncio.create_task(runtime.gather(**ABOUT, timeout_seconds=60))
        peers["c"].handler.go = False
        await asyncio.sleep(0.05)
        peers["c"].transport.silent = False
        leaving = asyncio.create_task(peers["c"].responder.stop())
        context = await gathering
        peers["c"].handler.go = True
        await leaving
    assert context.elapsed_seconds < 20
    assert context.coverage.left == ("process-c",)
    assert context.coverage.silent == ()
    assert not context.coverage.complete
    assert context.degraded == ("gone before they answered: process-c",)


@pytest.mark.parametrize("how", ["silence", "notice"])
async def test_who_dies_meanwhile_is_waited_for_until_it_is_known(
    broker: FakeBroker, peers: dict[str, Peer], how: str
) -> None:
    async with asker(broker) as runtime:
        peers["c"].kill()
        gathering = asyncio.create_task(runtime.gather(**ABOUT, timeout_seconds=60))
        await asyncio.sleep(0.01)
        if how == "notice":
            notice = DeathNotice(
                sent_at=SENT_AT,
                process_id="process-c",
                incarnation=peers["c"].responder.incarnation,
                sentinel_id="sentinel",
                died_at=SENT_AT,
            )
            broker.store("agent.presence", encode(notice))
        context = await gathering
    assert context.elapsed_seconds < 20
    assert context.coverage.answered == ("process-a", "process-b")
    assert context.coverage.left == ("process-c",)
    assert not context.coverage.complete


async def test_who_comes_after_the_asking_is_extra(
    broker: FakeBroker, peers: dict[str, Peer], store: EventStore
) -> None:
    late = Peer(broker, store, "late")
    async with asker(broker) as runtime:
        peers["c"].handler.go = False
        gathering = asyncio.create_task(runtime.gather(**ABOUT, timeout_seconds=60))
        await asyncio.sleep(0.05)
        await late.start()
        await until(lambda: late.responder.counters["answered"])
        peers["c"].handler.go = True
        context = await gathering
        await late.responder.stop()
    assert context.coverage.extra == ("process-late",)
    assert context.coverage.complete


async def test_a_process_of_the_failed_agent_alone_is_not_expected(
    broker: FakeBroker, peers: dict[str, Peer], store: EventStore
) -> None:
    failed = Peer(broker, store, "product")
    await failed.start()
    async with asker(broker) as runtime:
        await until(lambda: len(runtime.presence.roster.present()) == 5)
        context = await runtime.gather(**ABOUT, timeout_seconds=60)
    await failed.responder.stop()
    assert context.coverage.asked == tuple(f"process-{name}" for name in sorted(peers))


async def test_steps_end_with_the_last_of_those_who_are_there(
    broker: FakeBroker, peers: dict[str, Peer]
) -> None:
    async with asker(broker) as runtime:
        request = runtime.request(**ABOUT)
        since = await runtime.steps.position(request)
        asked = await runtime.steps.ask(request, since)
        context = await runtime.steps.collect(request, since, asked, Wanted(), timeout_seconds=60)
    assert context.elapsed_seconds < 20
    assert context.coverage.asked == tuple(f"process-{name}" for name in peers)
    assert context.coverage.complete


@pytest.mark.parametrize("warm", [True, False])
async def test_a_successor_asks_those_who_are_there_and_have_not_answered(
    broker: FakeBroker, peers: dict[str, Peer], *, warm: bool
) -> None:
    peers["c"].transport.silent = True
    async with asker(broker) as first:
        request = first.request(**ABOUT)
        since = await first.steps.position(request)
        asked = await first.steps.ask(request, since)
        await until(lambda: peers["a"].responder.counters["answered"])
        await until(lambda: peers["b"].responder.counters["answered"])
    peers["c"].transport.silent = False
    await peers["c"].responder.stop()
    await peers["c"].start()

    async with asker(broker, warm=warm) as second:
        context = await second.steps.collect(
            request, since, asked, Wanted(), timeout_seconds=60 if warm else 1.0
        )
    told = {fact.interaction.interaction_id for fact in context.facts}
    assert {"order-a", "order-b"} <= told
    if warm:
        assert told == {"order-a", "order-b", "order-c"}
        assert context.coverage.complete
        assert context.elapsed_seconds < 20
        asked_again = decode(broker.topics["agent.context.request"][-1].value)
        assert isinstance(asked_again, ContextRequest)
        assert asked_again.addressees == ("process-c",)


async def test_whom_the_caller_names_is_who_counts(
    broker: FakeBroker, peers: dict[str, Peer]
) -> None:
    peers["c"].handler.go = False
    async with asker(broker) as runtime:
        context = await runtime.gather(**ABOUT, expect=["a", "b"], timeout_seconds=60)
    peers["c"].handler.go = True
    assert context.coverage.asked == ("a", "b")
    assert context.coverage.complete
