"""One process, one answer: the peer's side of the protocol."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBroker, FakeTransport

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    ProtocolError,
    StaleOwnerError,
    StoreError,
)
from langgraph_peerctx.messaging.agent_context_service import (
    WORKERS,
    AgentContextService,
    AgentContextServiceManager,
    ContextResponder,
    encode_to_fit,
    get_service_manager,
)
from langgraph_peerctx.messaging.context_handler import ContextRequestHandler
from langgraph_peerctx.persistence import event_store
from langgraph_peerctx.persistence.event_store import EventStore, record_interaction
from langgraph_peerctx.protocol.codec import decode, encode
from langgraph_peerctx.protocol.messages import (
    AgentAnswer,
    ContextRequest,
    ContextResponse,
    InDoubtAnswer,
    InDoubtKey,
    Interaction,
)
from langgraph_peerctx.protocol.tickets import EffectTicket

REQUESTS, REPLIES = "agent.context.request", "agent.context.response.asker"
SETTINGS = PeerContextSettings(process_id="process-1", mock_mode="always")

RESPONSE: dict[str, Any] = {
    "sent_at": datetime.now(UTC),
    "correlation_id": "c1",
    "responder_id": "process-2",
    "failed_agent_id": "product",
    "thread_id": "t",
    "agents": (),
}


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with EventStore(f"sqlite:///{tmp_path}/events.db") as store:
        yield store


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker(topics={REQUESTS: [], REPLIES: []})


@pytest.fixture
async def responder(broker: FakeBroker) -> AsyncIterator[ContextResponder]:
    responder = ContextResponder(SETTINGS, transport=FakeTransport(broker))
    yield responder
    await responder.stop()


def request(**changes: Any) -> ContextRequest:
    fields: dict[str, Any] = {
        "sent_at": datetime.now(UTC),
        "correlation_id": "c1",
        "requester_id": "asker",
        "failed_agent_id": "product",
        "thread_id": "t",
        "time_window_seconds": 3_600.0,
    }
    return ContextRequest(**(fields | changes))


def ask(broker: FakeBroker, **changes: Any) -> None:
    broker.store(REQUESTS, encode(request(**changes)))


async def answers(broker: FakeBroker, count: int = 1) -> list[ContextResponse]:
    """Wait for so many answers, and a moment longer for one too many."""
    async with asyncio.timeout(30):
        while len(broker.topics[REPLIES]) < count:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.02)
    read = [decode(record.value) for record in broker.topics[REPLIES]]
    assert len(read) == count
    return [message for message in read if isinstance(message, ContextResponse)]


async def nothing_happens(responder: ContextResponder, counter: str, count: int = 1) -> None:
    async with asyncio.timeout(30):
        while responder.counters[counter] < count:
            await asyncio.sleep(0.005)


def remember(store: EventStore, agent_id: str, number: int = 1, **changes: Any) -> Interaction:
    fields: dict[str, Any] = {
        "agent_id": agent_id,
        "from_agent": "product",
        "to_agent": agent_id,
        "thread_id": "t",
        "kind": "order",
        "payload": {"number": number},
        "interaction_id": f"{agent_id}-{number}",
        "store": store,
    }
    return record_interaction(**(fields | changes))


async def test_one_answer_lists_every_agent_of_the_process(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    remember(store, "marketing")
    async with (
        AgentContextService("marketing", responder=responder, store=store),
        AgentContextService("inventory", responder=responder, store=store),
    ):
        ask(broker)
        (answer,) = await answers(broker)
    assert answer.responder_id == "process-1"
    assert answer.correlation_id == "c1"
    assert {a.agent_id: a.status for a in answer.agents} == {
        "marketing": "context",
        "inventory": "nothing",
    }


async def test_the_answer_carries_what_is_needed_to_skip_it_unread(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    async with AgentContextService("marketing", responder=responder, store=store):
        ask(broker)
        await answers(broker)
    assert dict(broker.topics[REPLIES][0].headers) == {
        "message_type": b"PROVIDE_CONTEXT",
        "correlation_id": b"c1",
        "sender": b"process-1",
    }


async def test_the_failed_agent_is_no_peer_of_itself(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    async with AgentContextService("product", responder=responder, store=store):
        ask(broker)
        (answer,) = await answers(broker)
    assert answer.agents == ()


async def test_only_what_passed_with_the_failed_agent_in_the_thread_and_window_is_told(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    remember(store, "marketing", 1)
    remember(store, "marketing", 2, thread_id="another")
    remember(store, "marketing", 3, from_agent="inventory")
    remember(store, "marketing", 4, occurred_at=datetime.now(UTC) - timedelta(hours=2))
    remember(store, "marketing", 5, from_agent="marketing", to_agent="product")
    async with AgentContextService("marketing", responder=responder, store=store):
        ask(broker)
        (answer,) = await answers(broker)
    told = [i.interaction_id for i in answer.agents[0].interactions]
    assert told == ["marketing-5", "marketing-1"]


async def test_the_same_request_again_is_answered_once(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    async with AgentContextService("marketing", responder=responder, store=store):
        value = encode(request())
        for _ in range(1_000):
            broker.store(REQUESTS, value)
        await nothing_happens(responder, "repeated", 999)
        await answers(broker)


async def test_an_expired_request_is_not_answered(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    now = broker.now_ms()
    broker.now_ms = lambda: now - 61_000
    ask(broker)
    async with AgentContextService("marketing", responder=responder, store=store):
        await nothing_happens(responder, "expired")
    assert broker.topics[REPLIES] == []


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_clock_that_is_wrong_by_an_hour_silences_nobody(
    broker: FakeBroker, responder: ContextResponder, store: EventStore, hours: int
) -> None:
    now = broker.now_ms()
    broker.now_ms = lambda: now + hours * 3_600_000
    async with AgentContextService("marketing", responder=responder, store=store):
        ask(broker)
        await answers(broker)


async def test_a_request_from_just_before_the_start_is_answered(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    ask(broker)
    async with AgentContextService("marketing", responder=responder, store=store):
        await answers(broker)


async def test_answers_go_where_the_requester_reads_and_nowhere_else(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    broker.topics["__consumer_offsets"] = []
    async with AgentContextService("marketing", responder=responder, store=store):
        ask(broker, response_topic="__consumer_offsets")
        await answers(broker)
    assert broker.topics["__consumer_offsets"] == []
    assert responder.counters["foreign_response_topic"] == 1


async def test_a_topic_that_does_not_exist_is_not_made_and_counted(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    async with AgentContextService("marketing", responder=responder, store=store):
        ask(broker, requester_id="nobody")
        await nothing_happens(responder, "unknown_topic")
    assert "agent.context.response.nobody" not in broker.topics


async def test_poison_is_counted_by_its_fault_and_skipped(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    async with AgentContextService("marketing", responder=responder, store=store):
        for poison in (None, b"\xff", b"{", b"[" * 100_000, b"x" * 300_000, b"[]"):
            broker.store(REQUESTS, poison)
        broker.store(REQUESTS, encode(request()).replace(b'"asker"', b'"../x"'))
        broker.store(REQUESTS, encode(ContextResponse(**RESPONSE)))
        ask(broker)
        await answers(broker)
    rejected = {k: v for k, v in responder.counters.items() if k.startswith("rejected.")}
    assert rejected == {
        "rejected.empty": 1,
        "rejected.not_utf8": 1,
        "rejected.not_json": 1,
        "rejected.too_deep": 1,
        "rejected.too_large": 1,
        "rejected.not_an_object": 1,
        "rejected.field": 1,
        "rejected.message_type": 1,
    }


async def test_one_requester_that_floods_does_not_silence_another(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    async with AgentContextService("marketing", responder=responder, store=store):
        for number in range(1_000):
            ask(broker, requester_id="flooder", correlation_id=f"f{number}")
        ask(broker)
        (answer,) = await answers(broker)
    assert answer.correlation_id == "c1"
    assert responder.counters["throttled"] >= 700


async def test_in_doubt_keys_of_this_agent_are_always_answered(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=2)
    remember(store, "inventory", occurred_at=long_ago, effect_key="order-1")
    remember(store, "inventory", 2, from_agent="intruder", effect_key="order-2")
    keys = tuple(
        InDoubtKey(effect_key=key, peer_id=peer, epoch=1, intent_at=long_ago)
        for key, peer in (
            ("order-1", "inventory"),
            ("order-2", "inventory"),
            ("order-3", "inventory"),
            ("order-1", "somebody-else"),
        )
    )
    async with AgentContextService("inventory", responder=responder, store=store):
        ask(broker, in_doubt=keys, time_window_seconds=1.0, max_interactions=1)
        (answer,) = await answers(broker)
    assert {(a.effect_key, a.verdict) for a in answer.in_doubt} == {
        ("order-1", "seen"),
        ("order-2", "cannot_tell"),
        ("order-3", "cannot_tell"),
    }


# What is said of effects in doubt; `settle_key` itself is tested with the store.


def in_doubt(*keys: str, peer: str = "inventory", **changes: Any) -> dict[str, Any]:
    """Return what makes a request ask, as the new owner of the thread, about keys."""
    fields = {"peer_id": peer, "epoch": 1, "intent_at": datetime.now(UTC)} | changes
    return {"epoch": 2, "in_doubt": tuple(InDoubtKey(effect_key=k, **fields) for k in keys)}


def arrived(store: EventStore, key: str, reply: Any, agent: str = "inventory") -> None:
    names = {"sender_id": "product", "thread_id": "t", "run_id": "r"}
    ticket = EffectTicket(effect_key=key, name="reserve", epoch=1, **names)
    store.begin_receipt(agent, ticket)
    store.finish_receipt(agent, ticket, reply)


def told_of(handler: ContextRequestHandler, **asked: Any) -> list[tuple[str, str, Any]]:
    _, settled = handler.answer(request(**asked))
    assert all(answer.agent_id == handler.agent_id for answer in settled)
    return [(answer.effect_key, answer.verdict, answer.reply) for answer in settled]


async def test_an_agent_with_a_receiver_tells_what_arrived_and_what_never_will(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    store.declare_receiver("inventory")
    arrived(store, "came", {"reserved": 10})
    async with AgentContextService("inventory", responder=responder, store=store):
        ask(broker, **in_doubt("came", "lost"))
        (answer,) = await answers(broker)
    assert [(a.effect_key, a.verdict, a.reply) for a in answer.in_doubt] == [
        ("came", "seen", {"reserved": 10}),
        ("lost", "not_seen", None),
    ]
    with pytest.raises(StaleOwnerError):
        arrived(store, "lost", None)


def test_the_askers_epoch_the_intents_time_and_the_thread_decide(store: EventStore) -> None:
    since = store.declare_receiver("inventory")
    handler = ContextRequestHandler("inventory", store=store)
    arrived(store, "came", "reply")
    early = in_doubt("early", intent_at=since - timedelta(microseconds=1))
    assert told_of(handler, **early) == [("early", "cannot_tell", None)]
    assert told_of(handler, **(in_doubt("k") | {"epoch": 0})) == [("k", "cannot_tell", None)]
    for change, verdict in (
        ({"thread_id": "another"}, "cannot_tell"),
        ({"failed_agent_id": "another"}, "not_seen"),  # that one never sent it
    ):
        told = told_of(handler, **in_doubt("came"), **change)
        assert told == [("came", verdict, None)]
    assert told_of(handler, **in_doubt("came", peer="shipping")) == []
    assert told_of(handler, **in_doubt("came")) == [("came", "seen", "reply")]
    assert told_of(handler, **in_doubt("k")) == [("k", "not_seen", None)]


def test_an_agent_whose_clock_is_behind_denies_only_what_its_store_is_old_enough_for(
    store: EventStore,
) -> None:
    since = store.declare_receiver("inventory")
    handler = ContextRequestHandler("inventory", store=store)
    ahead = timedelta(hours=1)
    asked = {"sent_at": datetime.now(UTC) + ahead}
    before = in_doubt("before", intent_at=since + ahead / 2)  # as the asker's clock says it
    assert told_of(handler, **asked, **before) == [("before", "cannot_tell", None)]
    later = in_doubt("later", intent_at=since + ahead + timedelta(seconds=9))
    assert told_of(handler, **asked, **later) == [("later", "not_seen", None)]
    never = {"sent_at": datetime.max.replace(tzinfo=UTC)}
    assert told_of(handler, **never, **in_doubt("never")) == [("never", "cannot_tell", None)]
    behind = {"sent_at": datetime.now(UTC) - ahead}  # or long under way
    assert told_of(handler, **behind, **in_doubt("now")) == [("now", "not_seen", None)]


def test_an_agent_without_a_receiver_tells_what_it_recorded_and_denies_nothing(
    store: EventStore,
) -> None:
    store.declare_receiver("shipping")
    remember(store, "inventory", effect_key="came")
    handler = ContextRequestHandler("inventory", store=store)
    assert told_of(handler, **in_doubt("came", "lost")) == [
        ("came", "seen", None),
        ("lost", "cannot_tell", None),
    ]


def test_the_reply_to_an_effect_is_told_as_it_was_whatever_is_redacted(store: EventStore) -> None:
    """It becomes the effect's outcome."""
    arrived(store, "object", {"card": "4111", "reserved": 10})
    arrived(store, "list", ["ham"])

    def redact(payload: Any) -> Any:
        return dict.fromkeys(payload, "***")

    handler = ContextRequestHandler("inventory", store=store, redact=redact)
    assert told_of(handler, **in_doubt("object", "list")) == [
        ("object", "seen", {"card": "4111", "reserved": 10}),
        ("list", "seen", ["ham"]),
    ]
    answer, _ = handler.answer(request(time_window_seconds=60))
    assert {str(told.payload["reply"]) for told in answer.interactions} == {"***"}


def test_who_declines_settles_nothing_and_bars_nothing(store: EventStore) -> None:
    store.declare_receiver("inventory")
    handler = ContextRequestHandler("inventory", store=store, may_answer=lambda _request: False)
    assert told_of(handler, **in_doubt("k")) == []
    arrived(store, "k", "reply")


def test_a_store_that_fails_while_it_settles_costs_one_wait_and_not_the_answer(
    tmp_path: Path,
) -> None:
    with EventStore(f"sqlite:///{tmp_path}/busy.db", timeout_seconds=0.3) as store:
        store.declare_receiver("inventory")
        remember(store, "inventory")
        arrived(store, "came", "reply")
        handler = ContextRequestHandler("inventory", store=store)
        with store._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            before = time.monotonic()
            asked = in_doubt(*(f"k{number}" for number in range(30)), "came")
            answer, settled = handler.answer(request(**asked))
            connection.exec_driver_sql("ROLLBACK")
        assert time.monotonic() - before < 6, "thirty of them would wait nine seconds"
        assert answer.status == "context"
        assert [a.verdict for a in settled] == ["cannot_tell"] * 31


def test_replies_that_would_not_fit_into_an_answer_are_not_told(store: EventStore) -> None:
    store.declare_receiver("inventory")
    for number in range(4):
        arrived(store, f"k{number}", "x" * 50_000)
    arrived(store, "small", "reply")
    handler = ContextRequestHandler("inventory", store=store)
    told = told_of(handler, **in_doubt("k0", "k1", "k2", "k3", "small", "lost"))
    assert [verdict for _, verdict, _ in told] == [
        "seen", "seen", "cannot_tell", "cannot_tell", "seen", "not_seen",
    ]  # fmt: skip
    answer, settled = handler.answer(request(**in_doubt("k0", "k1", "k2", "k3")))
    whole = ContextResponse(**(RESPONSE | {"agents": (answer,), "in_doubt": settled}))
    cut = decode(encode_to_fit(whole, 262_144))
    assert isinstance(cut, ContextResponse)
    assert cut.in_doubt == settled


def test_without_keys_in_doubt_nothing_is_settled(tmp_path: Path) -> None:
    class Unasked(EventStore):
        def settle_key(self, *_names: Any, **_more: Any) -> Any:
            pytest.fail("the database was asked")

    with Unasked(f"sqlite:///{tmp_path}/unasked.db") as store:
        handler = ContextRequestHandler("inventory", store=store)
        assert told_of(handler) == []
        assert told_of(handler, **in_doubt("k", peer="shipping")) == []


async def test_a_store_that_fails_makes_the_answer_busy_with_a_reason(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    class Failing(ContextRequestHandler):
        def _told(self, request: ContextRequest) -> AgentAnswer:
            raise StoreError(f"no disk for {request.thread_id}")

    handler = Failing("inventory", store=store)
    key = InDoubtKey(
        effect_key="order-1", peer_id="inventory", epoch=0, intent_at=datetime.now(UTC)
    )
    async with AgentContextService("inventory", responder=responder, handler=handler):
        ask(broker, in_doubt=(key,))
        (answer,) = await answers(broker)
    assert answer.agents[0].status == "busy"
    assert answer.agents[0].reason == "the event store cannot be asked (StoreError)"
    assert [a.verdict for a in answer.in_doubt] == ["cannot_tell"]


async def test_a_closed_store_makes_every_agent_of_the_process_busy(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    async with (
        AgentContextService("marketing", responder=responder, store=store),
        AgentContextService("inventory", responder=responder, store=store),
    ):
        store.close()
        ask(broker)
        (answer,) = await answers(broker)
    assert [agent.status for agent in answer.agents] == ["busy", "busy"]
    assert all("StoreError" in (agent.reason or "") for agent in answer.agents)


async def test_a_handler_that_breaks_costs_one_answer_and_not_the_service(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    class Broken(ContextRequestHandler):
        def answer(self, request: ContextRequest) -> Any:
            if request.correlation_id == "c0":
                raise ZeroDivisionError
            return super().answer(request)

    handler = Broken("marketing", store=store)
    async with (
        AgentContextService("marketing", responder=responder, handler=handler),
        AgentContextService("inventory", responder=responder, store=store),
    ):
        ask(broker, correlation_id="c0")
        ask(broker)
        responses = {r.correlation_id: r for r in await answers(broker, 2)}
    statuses = {
        correlation_id: {answer.agent_id: answer.status for answer in response.agents}
        for correlation_id, response in responses.items()
    }
    assert statuses["c0"] == {"marketing": "busy", "inventory": "nothing"}
    assert statuses["c1"] == {"marketing": "nothing", "inventory": "nothing"}


@pytest.mark.parametrize("addressee", ["process-1", "marketing"])
async def test_a_request_with_addressees_is_answered_by_them_alone(
    broker: FakeBroker, responder: ContextResponder, store: EventStore, addressee: str
) -> None:
    async with AgentContextService("marketing", responder=responder, store=store):
        ask(broker, addressees=("inventory", "process-2"), correlation_id="c0")
        ask(broker, addressees=("inventory", addressee))
        (answer,) = await answers(broker)
    assert answer.correlation_id == "c1"
    assert responder.counters["not_addressed"] == 1


async def test_a_request_that_expires_while_it_waits_is_not_answered(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    class Slow(ContextRequestHandler):
        def answer(self, request: ContextRequest) -> Any:
            time.sleep(0.3)
            return super().answer(request)

    handler = Slow("marketing", store=store)
    async with AgentContextService("marketing", responder=responder, handler=handler):
        for number in range(WORKERS):
            ask(broker, correlation_id=f"c{number}")
        ask(broker, correlation_id="late", lifetime_seconds=0.2)
        await answers(broker, WORKERS)
        await nothing_happens(responder, "expired")


def fail(_given: Any) -> Any:
    raise ValueError("a secret")


@pytest.mark.parametrize(
    "policy", [{"redact": fail}, {"may_answer": fail}, {"redact": lambda _body: {"x": object()}}]
)
async def test_a_policy_that_fails_tells_nothing_and_keeps_no_other_agent_from_answering(
    broker: FakeBroker,
    responder: ContextResponder,
    store: EventStore,
    caplog: pytest.LogCaptureFixture,
    policy: dict[str, Any],
) -> None:
    for agent_id in ("marketing", "inventory"):
        record_interaction(
            agent_id=agent_id,
            from_agent="product",
            to_agent=agent_id,
            thread_id="t",
            kind="order",
            payload={"card": "4111"},
            store=store,
        )
    strict = ContextRequestHandler("marketing", store=store, **policy)
    async with (
        AgentContextService("marketing", responder=responder, handler=strict),
        AgentContextService("inventory", responder=responder, store=store),
    ):
        ask(broker)
        (response,) = await answers(broker)
    by_agent = {answer.agent_id: answer for answer in response.agents}
    assert by_agent["inventory"].status == "context"
    assert (by_agent["marketing"].status, by_agent["marketing"].interactions) == ("declined", ())
    assert "marketing does not answer" in caplog.text
    assert "secret" not in caplog.text


async def test_a_responder_that_does_not_run_says_so() -> None:
    assert ContextResponder(SETTINGS).degraded == ("the context service is not running",)


async def test_a_policy_may_decline(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    remember(store, "marketing")
    handler = ContextRequestHandler("marketing", store=store, may_answer=lambda _: False)
    async with AgentContextService("marketing", responder=responder, handler=handler):
        ask(broker)
        (answer,) = await answers(broker)
    assert (answer.agents[0].status, answer.agents[0].interactions) == ("declined", ())


async def test_only_allowed_keys_of_a_memory_are_told_and_all_is_redacted(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    remember(store, "marketing", payload={"card": "4711", "n": 1})
    store.remember("marketing", "product", {"mood": "good", "password": "secret"})
    handler = ContextRequestHandler(
        "marketing",
        store=store,
        memory_keys=["mood"],
        redact=lambda body: {k: v for k, v in body.items() if k != "card"},
    )
    async with AgentContextService("marketing", responder=responder, handler=handler):
        ask(broker)
        (answer,) = await answers(broker)
    assert answer.agents[0].memory_state == {"mood": "good"}
    assert answer.agents[0].interactions[0].payload == {"n": 1}


async def test_more_than_was_asked_for_is_cut_to_the_newest_and_said(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    for number in range(5):
        remember(store, "marketing", number)
    async with AgentContextService("marketing", responder=responder, store=store):
        ask(broker, max_interactions=3)
        (answer,) = await answers(broker)
    assert [i.payload["number"] for i in answer.agents[0].interactions] == [4, 3, 2]
    assert answer.agents[0].truncated


async def test_a_broker_that_takes_no_answer_does_not_end_the_service(
    broker: FakeBroker, store: EventStore
) -> None:
    transport = FakeTransport(broker)
    responder = ContextResponder(SETTINGS, transport=transport)
    async with AgentContextService("marketing", responder=responder, store=store):
        transport.send_fault = BrokerUnavailableError("gone")
        ask(broker)
        await nothing_happens(responder, "unanswered")
        transport.send_fault = None
        ask(broker)
        await answers(broker)


def big_response(count: int) -> ContextResponse:
    told = tuple(
        Interaction(
            interaction_id=f"i{n}",
            thread_id="t",
            from_agent="product",
            to_agent="marketing",
            kind="order",
            payload={"text": "x" * 900},
            occurred_at=datetime.now(UTC),
        )
        for n in range(count)
    )
    settled = InDoubtAnswer(effect_key="k", agent_id="marketing", verdict="seen", reply={"n": 1})
    answer = AgentAnswer(agent_id="marketing", status="context", interactions=told)
    return ContextResponse(
        sent_at=datetime.now(UTC),
        correlation_id="c",
        responder_id="p",
        failed_agent_id="product",
        thread_id="t",
        agents=(answer, AgentAnswer(agent_id="small", status="nothing")),
        in_doubt=(settled,),
    )


@pytest.mark.parametrize("max_bytes", [8_192, 20_000, 262_144])
def test_an_answer_is_cut_to_the_newest_that_fit_and_in_doubt_stays(max_bytes: int) -> None:
    whole = big_response(100)
    data = encode_to_fit(whole, max_bytes)
    cut = decode(data, max_bytes=max_bytes)
    assert isinstance(cut, ContextResponse)
    told = cut.agents[0].interactions
    assert told == whole.agents[0].interactions[: len(told)]
    assert cut.in_doubt == whole.in_doubt
    assert cut.agents[0].truncated == (len(told) < 100)
    assert not cut.agents[1].truncated
    assert len(told) > 0


async def test_agents_that_are_hosted_together_all_answer_what_was_asked_before(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    ask(broker)
    await responder.host(*(ContextRequestHandler(name, store=store) for name in "abc"))
    (answer,) = await answers(broker)
    assert [a.agent_id for a in answer.agents] == ["a", "b", "c"]


async def test_of_two_handlers_for_one_agent_the_later_answers_until_it_goes(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    first = ContextRequestHandler("a", store=store)
    later = ContextRequestHandler("a", store=store, may_answer=lambda _request: False)
    await responder.host(first)
    await responder.host(later)
    ask(broker, message_id="m1")
    await answers(broker)
    await responder.unhost(later)
    await responder.unhost(later)
    ask(broker, message_id="m2")
    told = await answers(broker, 2)
    assert [answer.agents[0].status for answer in told] == ["declined", "nothing"]
    await responder.unhost(first)
    assert not responder.is_running


async def test_a_start_that_fails_leaves_nobody_hosted(
    broker: FakeBroker, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise BrokerUnavailableError("gone")

    responder = ContextResponder(SETTINGS, transport=FakeTransport(broker))
    handler = ContextRequestHandler("a", store=store)
    with monkeypatch.context() as patch:
        patch.setattr(FakeTransport, "subscribe", fail)
        with pytest.raises(BrokerUnavailableError):
            await responder.host(handler)
    assert responder.agents == ()
    assert not responder.is_running
    await responder.host(handler)
    ask(broker)
    await answers(broker)
    await responder.stop()


async def test_services_of_one_process_share_its_responder(tmp_path: Path) -> None:
    settings = PeerContextSettings(
        mock_mode="always", database_url=f"sqlite:///{tmp_path}/events.db"
    )
    async with (
        AgentContextService("a", settings=settings) as first,
        AgentContextService("b", settings=settings) as second,
    ):
        assert first.responder is second.responder
        assert first.responder is not None
        assert first.responder.agents == ("a", "b")
        shared = first.responder
    assert not shared.is_running


async def test_a_service_can_be_stopped_twice_and_started_again(
    broker: FakeBroker, responder: ContextResponder, store: EventStore
) -> None:
    service = AgentContextService("marketing", responder=responder, store=store)
    await service.start()
    await service.start()
    assert service.is_running
    await service.stop()
    await service.stop()
    assert not service.is_running
    assert service.degraded == ("the context service is not running",)
    async with service:
        ask(broker)
        await answers(broker)


async def test_a_service_that_fails_to_start_leaves_nothing_behind(tmp_path: Path) -> None:
    settings = PeerContextSettings(mock_mode="always")
    manager = AgentContextServiceManager(settings)
    with pytest.raises(StoreError):
        await manager.register_agent(
            "a",
            settings=PeerContextSettings(database_url=f"sqlite:///{tmp_path}/missing/events.db"),
        )
    assert manager.get_service("a") is None


async def test_the_manager_starts_each_agent_once_and_stops_all(
    responder: ContextResponder, store: EventStore
) -> None:
    manager = AgentContextServiceManager()
    first = await manager.register_agent("a", responder=responder, store=store)
    assert await manager.register_agent("a", responder=responder, store=store) is first
    await manager.register_agent("b", responder=responder, store=store)
    assert responder.agents == ("a", "b")
    await manager.unregister_agent("b")
    await manager.unregister_agent("b")
    assert manager.get_service("b") is None
    await manager.stop_all()
    assert manager.get_service("a") is None
    assert not first.is_running
    assert not responder.is_running


async def test_registering_at_once_starts_an_agent_once(
    responder: ContextResponder, store: EventStore
) -> None:
    manager = AgentContextServiceManager()
    services = await asyncio.gather(
        *(manager.register_agent("a", responder=responder, store=store) for _ in range(5))
    )
    assert len(set(map(id, services))) == 1
    await asyncio.gather(*(services[0].start() for _ in range(5)))
    await manager.stop_all()
    assert not responder.is_running


async def test_agents_that_are_registered_at_once_share_one_responder(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"database_url": f"sqlite:///{tmp_path}/new.db"})
    manager = AgentContextServiceManager(settings)
    services = await asyncio.gather(*(manager.register_agent(name) for name in "abc"))
    assert len({id(service.responder) for service in services}) == 1
    assert services[0].responder is not None
    assert services[0].responder.agents == ("a", "b", "c")
    await manager.stop_all()


def test_a_loop_that_has_ended_leaves_no_service_behind(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"database_url": f"sqlite:///{tmp_path}/new.db"})
    manager = AgentContextServiceManager(settings)

    async def register() -> AgentContextService:
        service = await manager.register_agent("a")
        assert manager.get_service("a") is service
        return service

    first = asyncio.run(register())
    assert manager.get_service("a") is None
    second = asyncio.run(register())
    assert second is not first
    asyncio.run(manager.stop_all())


async def test_opening_a_store_blocks_no_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_in: list[int] = []

    class Slow(EventStore):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            opened_in.append(threading.get_ident())
            super().__init__(*arguments, **options)

    monkeypatch.setattr(event_store, "EventStore", Slow)
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    settings = PeerContextSettings(mock_mode="always")
    handlers = [None, ContextRequestHandler("b")]
    for agent_id, handler in zip("ab", handlers, strict=True):
        async with AgentContextService(agent_id, settings=settings, handler=handler):
            pass
        event_store.get_event_store().close()
    assert len(opened_in) == 2
    assert threading.get_ident() not in opened_in


def test_there_is_one_manager_a_process() -> None:
    assert get_service_manager() is get_service_manager()


def test_an_illegal_agent_id_is_refused_at_once() -> None:
    with pytest.raises(ProtocolError, match="agent_id"):
        AgentContextService("../x")


async def test_mock_mode_is_said(store: EventStore) -> None:
    async with AgentContextService("a", settings=SETTINGS, store=store) as service:
        assert service.is_running
        assert service.degraded[0].startswith("mock mode")
