"""Each process that hosts a peer is asked about an effect, and no loop is blocked for ever."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBroker, FakeTransport

from langgraph_peerctx import asking
from langgraph_peerctx.asking import EffectPeers, OnItsLoop, calls_of
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.run_effects import About
from langgraph_peerctx.errors import BrokerUnavailableError, ConfigurationError
from langgraph_peerctx.gathering.gatherer import Wanted
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.messaging.agent_context_service import ContextResponder
from langgraph_peerctx.messaging.context_handler import ContextRequestHandler
from langgraph_peerctx.messaging.roster import Roster
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.protocol.messages import (
    AgentAnswer,
    ContextResponse,
    InDoubtAnswer,
    InDoubtKey,
)
from langgraph_peerctx.protocol.tickets import EffectTicket
from langgraph_peerctx.runtime import PeerContextRuntime

SETTINGS = PeerContextSettings(
    requester_id="tester",
    mock_mode="auto",
    heartbeat_interval_seconds=0.05,
    heartbeat_pause_seconds=2,  # all beat on this loop, which a busy machine may hold up
    timeout_seconds=30,
)
PEER = "inventory-agent"
ABOUT = About(agent_id="product-agent", thread_id="t", run_id="r", epoch=2)


class Slow(ContextRequestHandler):
    """Answers when it is told to."""

    may_go: threading.Event

    def answer(self, request: Any) -> Any:
        assert self.may_go.wait(30)
        return super().answer(request)


@asynccontextmanager
async def hosted(
    broker: FakeBroker,
    folder: Path,
    name: str,
    transport: FakeTransport | None = None,
    **options: Any,
) -> AsyncIterator[tuple[EventStore, threading.Event]]:
    """One process that hosts the peer, with a store of its own."""
    settings = SETTINGS.model_copy(update={"process_id": f"process-{name}"})
    responder = ContextResponder(settings, transport=transport or FakeTransport(broker))
    with EventStore(f"sqlite:///{folder}/{name}.db") as store:
        store.declare_receiver(PEER)
        handler = Slow(PEER, store=store, **options)
        handler.may_go = threading.Event()
        await responder.host(handler)
        try:
            yield store, handler.may_go
        finally:
            handler.may_go.set()
            await responder.stop()


@asynccontextmanager
async def asker(
    broker: FakeBroker, hosts: int, transport: FakeTransport | None = None, **more: Any
) -> AsyncIterator[PeerContextRuntime]:
    settings = SETTINGS.model_copy(update=more)
    link = transport or FakeTransport(broker)
    async with PeerContextRuntime(settings, transport=link) as runtime:
        await until(lambda: sum(PEER in m.beat.agents for m in present(runtime)) == hosts)
        yield runtime


def present(runtime: PeerContextRuntime) -> Any:
    return runtime.presence.roster.present()


async def until(true: Callable[[], Any], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


def key() -> InDoubtKey:
    return InDoubtKey(effect_key="k", peer_id=PEER, epoch=1, intent_at=datetime.now(UTC))


def receive(store: EventStore, reply: Any) -> None:
    ticket = EffectTicket(
        effect_key="k", name="k", sender_id="product-agent", thread_id="t", run_id="r", epoch=1
    )
    store.begin_receipt(PEER, ticket)
    store.finish_receipt(PEER, ticket, reply)


@pytest.mark.parametrize("other_saw_it", [True, False])
async def test_every_process_that_hosts_the_peer_is_heard(
    tmp_path: Path, *, other_saw_it: bool
) -> None:
    broker = FakeBroker()
    async with AsyncExitStack() as stack:
        quick, quick_goes = await stack.enter_async_context(hosted(broker, tmp_path, "quick"))
        slow, slow_goes = await stack.enter_async_context(hosted(broker, tmp_path, "slow"))
        runtime = await stack.enter_async_context(asker(broker, 2))
        receive(slow, {"number": 7})
        if other_saw_it:
            receive(quick, {"number": 7})
        doing = asyncio.create_task(EffectPeers(calls_of(runtime)).aask(ABOUT, key()))
        quick_goes.set()
        done, _ = await asyncio.wait({doing}, timeout=0.3)
        assert not done, "the other one hosts it, too"
        slow_goes.set()
        started = time.monotonic()
        told = await doing
        assert time.monotonic() - started < 15, "nobody else is waited for"
    assert told is not None
    assert (told.verdict, told.reply) == (
        ("seen", {"number": 7}) if other_saw_it else ("cannot_tell", None)
    )


async def test_an_outage_of_ours_gives_nobody_up(tmp_path: Path) -> None:
    """A broker that is away for longer than a pause: it was we who heard nothing."""
    broker = FakeBroker()
    link = FakeTransport(broker)
    async with AsyncExitStack() as stack:
        quick, quick_goes = await stack.enter_async_context(hosted(broker, tmp_path, "quick", link))
        slow, slow_goes = await stack.enter_async_context(hosted(broker, tmp_path, "slow", link))
        asking = asker(broker, 2, link, heartbeat_pause_seconds=0.5)
        runtime = await stack.enter_async_context(asking)
        receive(quick, {"number": 7})
        receive(slow, {"number": 7})
        doing = asyncio.create_task(EffectPeers(calls_of(runtime)).aask(ABOUT, key()))
        quick_goes.set()
        done, _ = await asyncio.wait({doing}, timeout=0.3)
        assert not done
        link.send_fault = BrokerUnavailableError("it is away")
        done, _ = await asyncio.wait({doing}, timeout=3)
        assert not done, "the other one is waited for"
        link.send_fault = None
        await until(lambda: runtime.presence.roster.is_hearing)
        slow_goes.set()
        told = await doing
    assert told is not None
    assert (told.verdict, told.reply) == ("seen", {"number": 7})


async def gathered(runtime: PeerContextRuntime, **more: Any) -> PeerContext:
    """Ask as a recovery does, whose caller said who is enough."""
    return await runtime.gather(
        failed_agent_id=ABOUT.agent_id, thread_id="t", in_doubt=[key()], epoch=2, **more
    )


@pytest.mark.parametrize("enough", [{"expect": [PEER]}, {"min_responses": 1}])
@pytest.mark.parametrize("is_seen", [True, False])
async def test_a_gather_ends_not_before_all_that_host_a_peer_in_doubt_are_heard(
    tmp_path: Path, enough: Any, *, is_seen: bool
) -> None:
    broker = FakeBroker()
    async with AsyncExitStack() as stack:
        _, quick_goes = await stack.enter_async_context(hosted(broker, tmp_path, "quick"))
        slow, slow_goes = await stack.enter_async_context(hosted(broker, tmp_path, "slow"))
        runtime = await stack.enter_async_context(asker(broker, 2))
        if is_seen:
            receive(slow, {"number": 7})
        doing = asyncio.create_task(gathered(runtime, **enough))
        quick_goes.set()
        done, _ = await asyncio.wait({doing}, timeout=0.3)
        assert not done
        slow_goes.set()
        started = time.monotonic()
        context = await doing
        assert time.monotonic() - started < 15, "nobody else is waited for"
    told = context.word_on(key())
    assert told is not None
    assert told.verdict == ("cannot_tell" if is_seen else "not_seen")


@pytest.mark.parametrize("is_seen", [True, False])
async def test_of_a_peer_that_is_heard_in_part_only_what_it_has_seen_counts(
    tmp_path: Path, *, is_seen: bool
) -> None:
    broker = FakeBroker()
    async with AsyncExitStack() as stack:
        quick, quick_goes = await stack.enter_async_context(hosted(broker, tmp_path, "quick"))
        await stack.enter_async_context(hosted(broker, tmp_path, "slow"))
        runtime = await stack.enter_async_context(asker(broker, 2))
        if is_seen:
            receive(quick, {"number": 7})
        quick_goes.set()
        context = await gathered(runtime, expect=[PEER], timeout_seconds=2)
    assert context.unheard == {PEER: ("process-slow",)}
    kept = PeerContext.from_json(context.as_json())
    told = kept.word_on(key())
    if is_seen:
        assert told is not None
        assert told.reply == {"number": 7}
    else:
        assert [answer.verdict for answer in kept.in_doubt] == ["not_seen"]
        assert told is None, "what the other one has seen is not known"


def misses_a_card(payload: Any) -> Any:
    return {**payload, "card": payload["card"][-4:]}


@pytest.mark.parametrize(
    "declines",
    [{"redact": misses_a_card}, {"may_answer": lambda _: False}],
    ids=["redact", "may_answer"],
)
@pytest.mark.parametrize("beats", [True, False])
async def test_of_a_process_that_declines_it_is_not_known_what_it_has_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declines: Any, *, beats: bool
) -> None:
    broker = FakeBroker()
    async with AsyncExitStack() as stack:
        _, other_goes = await stack.enter_async_context(hosted(broker, tmp_path, "other"))
        has_it = hosted(broker, tmp_path, "has-it", **declines)
        declining, goes = await stack.enter_async_context(has_it)
        runtime = await stack.enter_async_context(asker(broker, 2))
        receive(declining, {"number": 7})
        if not beats:
            monkeypatch.setattr(Roster, "present", lambda _: [])
        other_goes.set()
        goes.set()
        started = time.monotonic()
        context = await gathered(runtime, expect=["process-other", "process-has-it"])
        told = await EffectPeers(calls_of(runtime)).aask(ABOUT, key()) if beats else None
        assert time.monotonic() - started < 15, "who declines has answered"
    assert context.coverage.declined == (PEER,)
    assert [answer.verdict for answer in context.in_doubt] == ["not_seen"]
    assert context.unheard == {PEER: ("process-has-it",)}
    assert context.word_on(key()) is None
    assert told is None


async def test_a_host_that_was_given_up_is_not_waited_for_again_and_not_forgotten() -> None:
    wanted = Wanted(["quick"])
    wanted.find_hosts({PEER: frozenset({"quick", "gone", "leaves"})}, are_all=False)
    wanted.give_up_hosts_but({"quick", "leaves"})
    wanted.find_hosts({PEER: frozenset({"quick", "leaves"})}, are_all=False)
    wanted.give_up_hosts_but({"quick"})
    wanted.find_hosts({PEER: frozenset({"quick", "gone"})}, are_all=True)
    wanted.give_up_hosts_but({"quick", "gone"})
    word = InDoubtAnswer(effect_key="k", agent_id=PEER, verdict="not_seen")
    wanted.take(says("quick", word))
    assert wanted.satisfied.is_set(), "who comes back was not there to be asked"
    assert wanted.unheard == {PEER: ("gone", "leaves")}


def says(process_id: str, word: InDoubtAnswer) -> ContextResponse:
    return ContextResponse(
        sent_at=datetime.now(UTC),
        correlation_id="c",
        responder_id=process_id,
        failed_agent_id=ABOUT.agent_id,
        thread_id="t",
        agents=(AgentAnswer(agent_id=PEER, status="nothing"),),
        in_doubt=(word,),
    )


async def test_whoever_has_just_come_asks_all_that_host_a_peer_too(tmp_path: Path) -> None:
    broker = FakeBroker()
    async with AsyncExitStack() as stack:
        _, quick_goes = await stack.enter_async_context(hosted(broker, tmp_path, "quick"))
        slow, slow_goes = await stack.enter_async_context(hosted(broker, tmp_path, "slow"))
        receive(slow, {"number": 7})
        runtime = PeerContextRuntime(SETTINGS, transport=FakeTransport(broker))
        await stack.enter_async_context(runtime)
        doing = asyncio.create_task(gathered(runtime, expect=[PEER]))
        quick_goes.set()
        done, _ = await asyncio.wait({doing}, timeout=0.3)
        assert not done
        slow_goes.set()
        context = await doing
    told = context.word_on(key())
    assert told is not None
    assert told.verdict == "cannot_tell"


async def test_without_a_heartbeat_of_our_own_nobody_is_waited_for_any_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = FakeBroker()
    async with AsyncExitStack() as stack:
        _, quick_goes = await stack.enter_async_context(hosted(broker, tmp_path, "quick"))
        runtime = await stack.enter_async_context(asker(broker, 1))
        monkeypatch.setattr(Roster, "heard_at", None)
        quick_goes.set()
        started = time.monotonic()
        context = await gathered(runtime, expect=[PEER], timeout_seconds=30)
        assert time.monotonic() - started < 15
    assert context.word_on(key()) is not None


async def test_a_host_that_dies_meanwhile_is_waited_for_no_more_and_not_forgotten(
    tmp_path: Path,
) -> None:
    broker = FakeBroker()
    mortal = FakeTransport(broker)
    async with AsyncExitStack() as stack:
        _, quick_goes = await stack.enter_async_context(hosted(broker, tmp_path, "quick"))
        await stack.enter_async_context(hosted(broker, tmp_path, "slow", mortal))
        runtime = await stack.enter_async_context(asker(broker, 2))
        doing = asyncio.create_task(gathered(runtime, expect=[PEER], timeout_seconds=60))
        quick_goes.set()
        done, _ = await asyncio.wait({doing}, timeout=0.3)
        assert not done
        mortal.silent = True  # as a killed process is
        async with asyncio.timeout(30):
            context = await doing
    assert context.unheard == {PEER: ("process-slow",)}
    assert context.word_on(key()) is None


async def test_a_peer_that_is_not_on_the_roster_is_expected_by_its_name() -> None:
    expected: list[Any] = []

    class Asked:
        settings = SETTINGS
        presence: Any = None

        async def gather(self, *, expect: Any, **_: Any) -> Any:
            expected.append(expect)
            raise BrokerUnavailableError("nobody there")

    async with PeerContextRuntime(SETTINGS, transport=FakeTransport(FakeBroker())) as runtime:
        asked: Any = Asked()
        asked.presence = runtime.presence
        assert await EffectPeers(calls_of(asked)).aask(ABOUT, key()) is None
    assert expected == [[PEER]]


async def test_who_would_block_the_loop_that_asks_is_told_so() -> None:
    runtime: Any = None
    peers = EffectPeers(OnItsLoop(runtime, asyncio.get_running_loop()))
    with pytest.raises(ConfigurationError, match="pass an async function"):
        peers.ask(ABOUT, key())


async def test_in_another_thread_it_is_asked_on_its_loop() -> None:
    says = InDoubtAnswer(effect_key="k", agent_id=PEER, verdict="not_seen")

    class Told:
        settings = SETTINGS

    async def work(_: Any) -> Any:
        return says

    runtime: Any = Told()
    calls = OnItsLoop(runtime, asyncio.get_running_loop())
    assert await asyncio.to_thread(calls.call, work) == says
    assert await asyncio.to_thread(lambda: asyncio.run(calls.acall(work))) == says


async def test_a_loop_that_is_blocked_is_waited_for_no_longer_than_it_may_take(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(asking, "_SPARE_SECONDS", 0.05)

    class Never:
        settings = SETTINGS.model_copy(update={"timeout_seconds": 0.05})

        @property
        def presence(self) -> Any:
            raise AssertionError("its loop does not turn")

    runtime: Any = Never()
    loop = asyncio.new_event_loop()
    peers = EffectPeers(OnItsLoop(runtime, loop))
    async with asyncio.timeout(5):
        assert await asyncio.to_thread(peers.ask, ABOUT, key()) is None
        assert await peers.aask(ABOUT, key()) is None
    assert "the loop of the runtime is blocked" in caplog.text
    await asyncio.to_thread(loop.run_until_complete, asyncio.sleep(0))
    loop.close()
