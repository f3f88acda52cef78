"""A gather ends when it should, takes only what is its own, and says what is missing."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fakes import FakeBroker, FakeSubscription, FakeTransport
from gathering.fake_peers import REPLIES, REQUESTS, SETTINGS, answer_to, peers, reply

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    ProtocolError,
    SendOutcomeUnknownError,
    TooFewResponsesError,
)
from langgraph_peerctx.messaging.mock_transport import MockTransport
from langgraph_peerctx.messaging.producer import headers_of
from langgraph_peerctx.protocol.codec import decode, encode
from langgraph_peerctx.protocol.messages import (
    AgentAnswer,
    ContextRequest,
)
from langgraph_peerctx.runtime import PeerContextRuntime

WINDOW_SECONDS = 0.5
"""Of those gathers that are to wait it out; whoever ends before is given a minute."""


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
async def runtime(broker: FakeBroker) -> AsyncIterator[PeerContextRuntime]:
    async with PeerContextRuntime(SETTINGS, transport=FakeTransport(broker)) as runtime:
        yield runtime


async def gather(runtime: PeerContextRuntime, **options: Any) -> Any:
    fields = {"failed_agent_id": "product", "thread_id": "t", "timeout_seconds": WINDOW_SECONDS}
    return await runtime.gather(**(fields | options))


async def test_two_gathers_under_one_id_are_refused(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    del broker
    first = asyncio.create_task(gather(runtime, correlation_id="c", timeout_seconds=60))
    await asyncio.sleep(0.01)
    with pytest.raises(ConfigurationError, match="fresh id"):
        await gather(runtime, correlation_id="c")
    await runtime.close()
    await first


async def test_what_the_callers_predicate_raises_is_raised_to_the_caller(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def fail(_responses: Any) -> bool:
        raise ZeroDivisionError

    async with peers(broker, lambda request: reply(broker, answer_to(request, "a"))):
        with pytest.raises(ZeroDivisionError):
            await gather(runtime, enough=fail, timeout_seconds=60)


async def test_a_gather_ends_with_the_last_of_those_expected(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def respond(request: ContextRequest) -> None:
        for process in ("a", "b"):
            reply(broker, answer_to(request, process))

    async with peers(broker, respond):
        started = time.monotonic()
        context = await gather(runtime, expect=["a", "b"], timeout_seconds=60)
    assert time.monotonic() - started < 20
    assert sorted(f.interaction.interaction_id for f in context.facts) == ["a-1", "b-1"]
    assert context.coverage.complete
    assert context.degraded == ()


async def test_an_agent_has_answered_when_its_process_has(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def respond(request: ContextRequest) -> None:
        answers = tuple(AgentAnswer(agent_id=a, status="nothing") for a in ("x", "y"))
        reply(broker, answer_to(request, "process-1", agents=answers))

    async with peers(broker, respond):
        context = await gather(runtime, expect=["x", "y"], timeout_seconds=60)
    assert context.coverage.answered == ("x", "y")
    assert context.coverage.empty == ("x", "y")
    assert context.coverage.complete


async def test_who_is_silent_is_named_and_the_gather_is_not_complete(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    async with peers(broker, lambda request: reply(broker, answer_to(request, "a"))):
        context = await gather(runtime, expect=["a", "b"])
    assert context.coverage.silent == ("b",)
    assert not context.coverage.complete
    assert context.degraded == ("silent: b",)
    assert WINDOW_SECONDS <= context.elapsed_seconds < 20


async def test_without_anybody_expected_the_window_is_waited_out_and_nothing_is_complete(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    async with peers(broker, lambda request: reply(broker, answer_to(request, "a"))):
        context = await gather(runtime)
    assert context.elapsed_seconds >= WINDOW_SECONDS
    assert context.coverage.answered == ("a",)
    assert not context.coverage.complete
    assert not context.coverage.roster_known


async def test_nobody_there_is_said(runtime: PeerContextRuntime) -> None:
    context = await gather(runtime)
    assert context.degraded == ("no peer answered",)
    assert context.as_channel() == {}


async def test_an_answer_that_nobody_expected_is_extra(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def respond(request: ContextRequest) -> None:
        reply(broker, answer_to(request, "stranger"))
        reply(broker, answer_to(request, "a"))

    async with peers(broker, respond):
        context = await gather(runtime, expect=["a"], timeout_seconds=60)
    assert context.coverage.extra == ("stranger",)
    assert context.coverage.complete


async def test_min_responses_ends_the_gather_early(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def respond(request: ContextRequest) -> None:
        for process in ("a", "b", "c"):
            reply(broker, answer_to(request, process))

    async with peers(broker, respond):
        context = await gather(runtime, min_responses=2, timeout_seconds=60)
    assert context.elapsed_seconds < 20
    assert len(context.coverage.answered) >= 2


async def test_fewer_than_min_responses_is_an_error(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    async with peers(broker, lambda request: reply(broker, answer_to(request, "a"))):
        with pytest.raises(TooFewResponsesError, match="1 of at least 2 peers"):
            await gather(runtime, min_responses=2)


async def test_a_predicate_may_end_the_gather(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    seen: list[str] = []

    def respond(request: ContextRequest) -> None:
        for process in ("a", "b", "c"):
            reply(broker, answer_to(request, process))

    async with peers(broker, respond):
        context = await gather(
            runtime,
            enough=lambda answers: answers[-1].responder_id == "b",
            on_answer=lambda answer: seen.append(answer.responder_id),
            timeout_seconds=60,
        )
    assert context.elapsed_seconds < 20
    assert seen[:2] == ["a", "b"]


async def test_answers_to_another_gather_are_not_taken(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def respond(request: ContextRequest) -> None:
        reply(broker, answer_to(request, "a", correlation_id="somebody-elses"))

    async with peers(broker, respond):
        context = await gather(runtime)
    assert context.facts == ()
    assert runtime.gatherer._inbox.counters["unexpected"] == 1


async def test_three_gathers_at_once_each_get_exactly_their_own(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    requests: list[ContextRequest] = []

    def respond(request: ContextRequest) -> None:
        requests.append(request)
        if len(requests) == 3:  # interleaved, in an order of their own
            for process in ("a", "b"):
                for asked in reversed(requests):
                    name = f"{process}-{asked.thread_id}"
                    reply(broker, answer_to(asked, name))

    async with peers(broker, respond):
        threads = ["t1", "t2", "t3"]
        contexts = await asyncio.gather(
            *(
                gather(runtime, thread_id=t, expect=[f"a-{t}", f"b-{t}"], timeout_seconds=60)
                for t in threads
            )
        )
    for thread, context in zip(threads, contexts, strict=True):
        told = sorted(f.interaction.interaction_id for f in context.facts)
        assert told == [f"a-{thread}-1", f"b-{thread}-1"]


async def test_a_second_answer_of_one_process_is_counted_and_the_first_is_kept(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def respond(request: ContextRequest) -> None:
        first = answer_to(request, "a")
        other = AgentAnswer(agent_id="a", status="nothing")
        reply(broker, first)
        reply(broker, first)
        reply(broker, answer_to(request, "a", agents=(other,)))

    async with peers(broker, respond):
        context = await gather(runtime)
    assert context.coverage.duplicate == 2
    assert len(context.facts) == 1
    assert "told in two ways: a" in context.degraded


async def test_two_lives_of_one_process_are_two_that_answer(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def respond(request: ContextRequest) -> None:
        for life in ("before", "after"):
            told = answer_to(request, "a").agents[0].interactions[0]
            own = told.model_copy(update={"interaction_id": life})
            answer = AgentAnswer(agent_id="a", status="context", interactions=(own,))
            reply(broker, answer_to(request, "a", incarnation=life, agents=(answer,)))

    async with peers(broker, respond):
        context = await gather(runtime)
        with pytest.raises(TooFewResponsesError):
            await gather(runtime, min_responses=2)
    assert {fact.interaction.interaction_id for fact in context.facts} == {"before", "after"}
    assert context.coverage.duplicate == 0
    assert context.coverage.answered == ("a",)
    assert context.degraded == ()


async def test_an_agent_that_two_processes_remember_differently_is_not_complete(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def respond(request: ContextRequest) -> None:
        for process in ("one", "two"):
            answer = AgentAnswer(agent_id="a", status="context", memory_state={"from": process})
            reply(broker, answer_to(request, process, agents=(answer,)))

    async with peers(broker, respond):
        context = await gather(runtime, expect=["one", "two"], timeout_seconds=60)
    assert context.memory == {"a": {"from": "one"}}
    assert context.coverage.contradicted == ("a",)
    assert not context.coverage.complete
    assert context.degraded == ("told in two ways: a",)


@pytest.mark.parametrize("other", [{"failed_agent_id": "x"}, {"thread_id": "x"}])
async def test_an_answer_to_another_question_is_refused(
    broker: FakeBroker, runtime: PeerContextRuntime, other: dict[str, str]
) -> None:
    async with peers(broker, lambda request: reply(broker, answer_to(request, "a", **other))):
        context = await gather(runtime)
    assert context.facts == ()
    assert "1 answers could not be read (question)" in context.degraded


async def test_nothing_is_asked_before_the_answers_can_be_read(
    broker: FakeBroker, runtime: PeerContextRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = asyncio.Event()

    async def positioned(_self: Any) -> None:
        await ready.wait()

    monkeypatch.setattr(FakeSubscription, "positioned", positioned)
    async with peers(broker, lambda request: reply(broker, answer_to(request, "a"))):
        gathering = asyncio.create_task(gather(runtime, expect=["a"], timeout_seconds=60))
        await asyncio.sleep(0.02)
        assert broker.topics[REQUESTS] == []
        ready.set()
        assert (await gathering).coverage.complete
        ready.clear()
        context = await gather(runtime, expect=["a"], timeout_seconds=0.05)
    assert len(broker.topics[REQUESTS]) == 1
    assert "the broker did not confirm the request in time" in context.degraded


async def test_what_is_being_gathered_ends_with_its_runtime_and_says_so(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    async with peers(broker, lambda request: reply(broker, answer_to(request, "a"))):
        gathering = asyncio.create_task(gather(runtime, timeout_seconds=60))
        await asyncio.sleep(0.02)
        started = time.monotonic()
        await runtime.close()
        context = await gathering
    assert time.monotonic() - started < 20
    assert len(context.facts) == 1
    assert "the runtime was closed while answers were awaited" in context.degraded


async def test_a_flood_of_one_process_costs_neither_memory_nor_the_others_answer(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def respond(request: ContextRequest) -> None:
        flood = answer_to(request, "flooder")
        value, headers = encode(flood), headers_of(flood)
        for _ in range(100_000):
            broker.store(REPLIES, value, headers)
        reply(broker, answer_to(request, "honest"))

    async with peers(broker, respond):
        context = await gather(runtime, expect=["honest", "flooder"], timeout_seconds=60)
    assert context.coverage.answered == ("flooder", "honest")
    assert context.coverage.duplicate == 99_999
    assert len(context.facts) == 2


async def test_a_flood_of_many_processes_is_bounded(broker: FakeBroker) -> None:
    settings = PeerContextSettings(requester_id="tester", max_responders=10)

    def respond(request: ContextRequest) -> None:
        for number in range(500):
            reply(broker, answer_to(request, f"p{number}"))

    async with (
        PeerContextRuntime(settings, transport=FakeTransport(broker)) as runtime,
        peers(broker, respond),
    ):
        context = await gather(runtime)
    assert len(context.coverage.answered) == 10
    assert context.coverage.dropped == 490
    assert "490 answers were over the limits" in context.degraded


async def test_bytes_in_all_are_bounded(broker: FakeBroker) -> None:
    settings = PeerContextSettings(requester_id="tester", max_total_bytes=5_000)

    def respond(request: ContextRequest) -> None:
        for number in range(20):
            big = AgentAnswer(agent_id="x", status="context", memory_state={"x": "y" * 1_500})
            reply(broker, answer_to(request, f"p{number}", agents=(big,)))

    async with (
        PeerContextRuntime(settings, transport=FakeTransport(broker)) as runtime,
        peers(broker, respond),
    ):
        context = await gather(runtime)
    assert len(context.coverage.answered) == 2
    assert context.coverage.dropped == 18


async def test_what_cannot_be_read_is_said_and_harms_nobody(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def respond(request: ContextRequest) -> None:
        good = answer_to(request, "a")
        for poison in (None, b"", b"{", b"[" * 100_000, encode(good).replace(b"1", b"\xff")):
            broker.store(REPLIES, poison, headers_of(good))
        broker.store(REPLIES, encode(request), headers_of(good))
        reply(broker, good)

    async with peers(broker, respond):
        context = await gather(runtime, expect=["a"], timeout_seconds=60)
    assert len(context.facts) == 1
    (said,) = context.degraded
    assert said.startswith("6 answers could not be read (")


async def test_an_answer_without_headers_is_taken(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def respond(request: ContextRequest) -> None:
        broker.store(REPLIES, encode(answer_to(request, "a")))

    async with peers(broker, respond):
        context = await gather(runtime, expect=["a"], timeout_seconds=60)
    assert context.coverage.complete


async def test_a_header_that_lies_about_the_correlation_is_refused(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def respond(request: ContextRequest) -> None:
        honest = answer_to(request, "a")
        foreign = answer_to(request, "a", correlation_id="another")
        broker.store(REPLIES, encode(foreign), headers_of(honest))

    async with peers(broker, respond):
        context = await gather(runtime)
    assert context.facts == ()
    assert "1 answers could not be read (correlation)" in context.degraded


async def test_a_late_answer_changes_nothing_and_is_counted(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    asked: list[ContextRequest] = []
    async with peers(broker, asked.append):
        context = await gather(runtime)
        reply(broker, answer_to(asked[0], "slow"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert context.facts == ()
    assert runtime.gatherer._inbox.late(context.correlation_id) == 1
    assert runtime.gatherer._inbox._slots == {}


async def test_busy_declined_and_truncated_are_said(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def respond(request: ContextRequest) -> None:
        agents = (
            AgentAnswer(agent_id="b", status="busy"),
            AgentAnswer(agent_id="d", status="declined"),
            AgentAnswer(agent_id="t", status="context", truncated=True),
        )
        reply(broker, answer_to(request, "p", agents=agents))

    async with peers(broker, respond):
        context = await gather(runtime, expect=["p"], timeout_seconds=60)
    assert not context.coverage.complete
    assert context.degraded == ("busy: b", "declined: d", "cut to fit: t")


async def test_a_broker_that_never_confirms_is_waited_for_no_longer_than_the_window(
    broker: FakeBroker,
) -> None:
    transport = FakeTransport(broker)
    async with PeerContextRuntime(SETTINGS, transport=transport) as runtime:
        transport.silent = True
        context = await gather(runtime)
    assert context.elapsed_seconds < 20
    assert context.degraded == (
        "the broker did not confirm the request in time",
        "no peer answered",
    )


async def test_an_unknown_outcome_is_waited_out_since_peers_may_have_got_it(
    broker: FakeBroker,
) -> None:
    transport = FakeTransport(broker)
    async with PeerContextRuntime(SETTINGS, transport=transport) as runtime:
        transport.send_fault = SendOutcomeUnknownError("perhaps")
        context = await gather(runtime)
    assert context.elapsed_seconds >= WINDOW_SECONDS
    assert context.degraded == ("perhaps", "no peer answered")


async def test_a_request_that_certainly_did_not_leave_is_not_waited_for(
    broker: FakeBroker,
) -> None:
    transport = FakeTransport(broker)
    async with PeerContextRuntime(SETTINGS, transport=transport) as runtime:
        transport.send_fault = BrokerUnavailableError("gone")
        context = await gather(runtime, timeout_seconds=60)
    assert context.elapsed_seconds < 20
    assert context.degraded == ("gone", "no peer answered")
    assert not context.coverage.complete


async def test_without_a_broker_and_without_mock_mode_it_is_an_error(broker: FakeBroker) -> None:
    settings = PeerContextSettings(requester_id="tester", mock_mode="never")
    transport = FakeTransport(broker)
    async with PeerContextRuntime(settings, transport=transport) as runtime:
        transport.send_fault = BrokerUnavailableError("gone")
        with pytest.raises(BrokerUnavailableError, match="gone"):
            await gather(runtime)


async def test_mock_mode_ends_at_once_and_is_never_mistaken_for_an_answer() -> None:
    async with PeerContextRuntime(SETTINGS, transport=MockTransport("no broker")) as runtime:
        context = await gather(runtime, expect=["a"], timeout_seconds=60)
    assert context.elapsed_seconds < 20
    assert not context.coverage.complete
    assert context.degraded[0] == "mock mode: no broker"


async def test_a_lost_reply_topic_is_said(runtime: PeerContextRuntime) -> None:
    runtime.gatherer._inbox._subscription.lost = "topic deleted"  # type: ignore[union-attr, misc]
    context = await gather(runtime)
    assert context.degraded[0] == "answers could not arrive: topic deleted"
    assert not context.coverage.complete


async def test_switched_off_nobody_is_asked_and_it_is_said(broker: FakeBroker) -> None:
    settings = PeerContextSettings(requester_id="tester", enabled=False)
    async with PeerContextRuntime(settings, transport=FakeTransport(broker)) as runtime:
        context = await gather(runtime)
    assert broker.topics[REQUESTS] == []
    assert "switched off" in context.degraded[0]


async def test_each_sending_has_a_message_id_of_its_own(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    request = runtime.gatherer.request(failed_agent_id="product", thread_id="t")
    await runtime.gatherer.send(request)
    await runtime.gatherer.send(request)
    first, second = (decode(record.value) for record in broker.topics[REQUESTS])
    assert isinstance(first, ContextRequest)
    assert isinstance(second, ContextRequest)
    assert first.message_id != second.message_id
    assert first.correlation_id == second.correlation_id


@pytest.mark.parametrize("text", ["../x", "a\nb", "", "a" * 65, "\N{CYRILLIC SMALL LETTER A}"])
async def test_an_illegal_id_is_refused_before_anything_is_sent(
    broker: FakeBroker, runtime: PeerContextRuntime, text: str
) -> None:
    with pytest.raises(ProtocolError, match="failed_agent_id"):
        await gather(runtime, failed_agent_id=text)
    assert broker.topics[REQUESTS] == []


async def test_an_unreasonable_window_is_refused(runtime: PeerContextRuntime) -> None:
    with pytest.raises(ProtocolError, match="time_window_seconds"):
        await gather(runtime, time_window_seconds=0)


async def test_cancelled_at_any_moment_it_leaves_nothing_behind(
    runtime: PeerContextRuntime,
) -> None:
    for turns in range(12):
        task = asyncio.create_task(gather(runtime, timeout_seconds=60))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert runtime.gatherer._inbox._slots == {}


async def test_facts_in_a_state_channel_are_plain_json_with_source_and_time(
    broker: FakeBroker, runtime: PeerContextRuntime
) -> None:
    def respond(request: ContextRequest) -> None:
        base = answer_to(request, "a")
        remembering = base.agents[0].model_copy(update={"memory_state": {"mood": "good"}})
        reply(broker, answer_to(request, "a", agents=(remembering,)))

    async with peers(broker, respond):
        context = await gather(runtime, expect=["a"], timeout_seconds=60)
    channel = context.as_channel()
    assert channel["a-1"] == {
        "source": "peer",
        "told_by": ["a"],
        "interaction_id": "a-1",
        "thread_id": "t",
        "from_agent": "product",
        "to_agent": "a",
        "kind": "message",
        "payload": {"said": "to a"},
        "occurred_at": context.facts[0].interaction.occurred_at.isoformat().replace("+00:00", "Z"),
        "effect_key": None,
        "run_id": None,
        "checkpoint_id": None,
    }
    assert channel["memory:a"]["payload"] == {"mood": "good"}  # type: ignore[index, call-overload]
