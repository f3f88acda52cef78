"""A gather whose steps are taken by processes that die between them."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fakes import FakeBroker, FakeSubscription, FakeTransport
from gathering.fake_peers import SETTINGS, answer_to, peers, reply

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import BrokerUnavailableError, TooFewResponsesError
from langgraph_peerctx.gathering import steps as steps_module
from langgraph_peerctx.gathering.gatherer import Wanted
from langgraph_peerctx.gathering.steps import Asked, GatherSteps
from langgraph_peerctx.protocol.messages import ContextRequest
from langgraph_peerctx.runtime import PeerContextRuntime

NAMES = ["a", "b", "c"]


class Team:
    """Peers of which some are slow to answer, and what they were asked."""

    def __init__(self, broker: FakeBroker) -> None:
        self.broker = broker
        self.awake = set(NAMES)
        self.asked: list[tuple[str, ...]] = []
        self.message_ids: set[str] = set()

    def respond(self, request: ContextRequest) -> None:
        self.asked.append(request.addressees)
        self.message_ids.add(request.message_id)
        for name in request.addressees or NAMES:
            if name in self.awake:
                reply(self.broker, answer_to(request, name))


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
async def team(broker: FakeBroker) -> AsyncIterator[Team]:
    team = Team(broker)
    async with peers(broker, team.respond):
        yield team


@asynccontextmanager
async def process(
    broker: FakeBroker, settings: PeerContextSettings = SETTINGS
) -> AsyncIterator[PeerContextRuntime]:
    """A process that takes steps; leaving the block is its death: nothing of it is kept."""
    async with PeerContextRuntime(settings, transport=FakeTransport(broker)) as runtime:
        yield runtime


def question(runtime: PeerContextRuntime) -> ContextRequest:
    return runtime.gatherer.request(failed_agent_id="product", thread_id="t")


def told(context: Any) -> list[str]:
    return sorted(fact.interaction.interaction_id for fact in context.facts)


async def test_three_steps_are_one_gather(broker: FakeBroker, team: Team) -> None:
    async with process(broker) as runtime:
        request = question(runtime)
        since = await runtime.steps.position(request)
        asked = await runtime.steps.ask(request, since, NAMES)
        context = await runtime.steps.collect(
            request, since, asked, Wanted(NAMES), timeout_seconds=5
        )
    assert told(context) == ["a-1", "b-1", "c-1"]
    assert context.coverage.complete
    assert context.degraded == ()
    assert context.coverage.duplicate == 0
    assert team.asked == [()]


@pytest.mark.parametrize("dies_after", ["position", "ask", "unsaved ask"])
async def test_a_successor_sees_what_arrived_and_asks_only_those_that_are_missing(
    broker: FakeBroker, team: Team, dies_after: str
) -> None:
    team.awake = {"a", "b"}
    async with process(broker) as first:
        request = question(first)
        since = await first.steps.position(request)
        asked = Asked(at=datetime.now(UTC))
        if dies_after != "position":
            asked = await first.steps.ask(request, since, NAMES)
        await asyncio.sleep(0.01)  # the answers arrive, and die with the process
    team.awake = {"c"} if dies_after != "position" else set(NAMES)

    async with process(broker) as second:
        if dies_after != "ask":  # the checkpoint knows only what was saved
            asked = await second.steps.ask(request, since, NAMES)
        context = await second.steps.collect(
            request, since, asked, Wanted(NAMES), timeout_seconds=5
        )
    assert told(context) == ["a-1", "b-1", "c-1"]
    assert context.coverage.complete
    assert context.coverage.duplicate == 0
    assert team.asked == ([()] if dies_after == "position" else [(), ("c",)])
    assert len(team.message_ids) == len(team.asked)


async def test_whoever_has_all_answers_asks_nobody(broker: FakeBroker, team: Team) -> None:
    async with process(broker) as first:
        request = question(first)
        since = await first.steps.position(request)
        asked = await first.steps.ask(request, since, NAMES)
        await asyncio.sleep(0.01)
    async with process(broker) as second:
        again = await second.steps.ask(request, since, NAMES)
        context = await second.steps.collect(
            request, since, again, Wanted(NAMES), timeout_seconds=5
        )
    async with process(broker) as third:
        same = await third.steps.collect(request, since, asked, Wanted(NAMES), timeout_seconds=5)
    assert told(context) == told(same) == ["a-1", "b-1", "c-1"]
    assert team.asked == [()]


async def test_where_nobody_was_expected_the_rest_of_the_window_is_waited(
    broker: FakeBroker, team: Team
) -> None:
    team.awake = {"a"}
    async with process(broker) as first:
        request = question(first)
        since = await first.steps.position(request)
        asked = await first.steps.ask(request, since)
        await asyncio.sleep(0.01)
    long_ago = Asked(at=asked.at - timedelta(seconds=60))
    async with process(broker) as second:
        started = time.monotonic()
        context = await second.steps.collect(request, since, long_ago, Wanted(), timeout_seconds=60)
        elapsed = time.monotonic() - started
    assert told(context) == ["a-1"]
    assert elapsed < 20
    assert team.asked == [()]


async def test_a_step_may_be_tried_again_in_its_process(broker: FakeBroker, team: Team) -> None:
    team.awake = {"a"}
    async with process(broker) as runtime:
        request = question(runtime)
        since = await runtime.steps.position(request)
        assert await runtime.steps.position(request) == since
        asked = await runtime.steps.ask(request, since, NAMES)
        with pytest.raises(TooFewResponsesError):
            await runtime.steps.collect(
                request, since, asked, Wanted(NAMES, 3), timeout_seconds=0.05
            )
        team.awake = set(NAMES)
        await runtime.steps.ask(request, since, NAMES)
        context = await runtime.steps.collect(
            request, since, asked, Wanted(NAMES, 3), timeout_seconds=5
        )
    assert told(context) == ["a-1", "b-1", "c-1"]
    assert team.asked == [(), ("b", "c")]


async def test_collecting_may_be_tried_again_and_has_a_window_of_its_own(
    broker: FakeBroker, team: Team
) -> None:
    team.awake = {"a"}
    async with process(broker) as runtime:
        request = question(runtime)
        since = await runtime.steps.position(request)
        asked = await runtime.steps.ask(request, since, NAMES, timeout_seconds=0.1)
        wanted = Wanted(NAMES, 3)
        with pytest.raises(TooFewResponsesError):
            await runtime.steps.collect(request, since, asked, wanted, timeout_seconds=0.1)
        team.awake = set(NAMES)
        context = await runtime.steps.collect(
            request, since, asked, Wanted(NAMES, 3), timeout_seconds=5
        )
    assert told(context) == ["a-1", "b-1", "c-1"]
    assert team.asked == [(), ("b", "c")]


async def test_nothing_is_asked_before_the_answers_can_be_read(
    broker: FakeBroker, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_self: Any) -> None:
        await asyncio.Event().wait()

    async with process(broker) as runtime:
        request = question(runtime)
        since = await runtime.steps.position(request)
        with monkeypatch.context() as patch:
            patch.setattr(FakeSubscription, "positioned", never)
            asked = await runtime.steps.ask(request, since, NAMES, timeout_seconds=0.05)
    assert team.asked == []
    assert asked.trouble == "the broker did not confirm the request in time"


async def test_names_that_a_request_cannot_carry_are_asked_with_everybody(
    broker: FakeBroker, team: Team
) -> None:
    async with process(broker) as first:
        request = question(first)
        since = await first.steps.position(request)
        await first.steps.ask(request, since, ["a", "the other one"])
        await asyncio.sleep(0.01)
        await first.steps.ask(request, since, ["a", "the other one"])
        await asyncio.sleep(0.01)
    assert team.asked == [(), ()]


async def test_a_question_that_did_not_leave_is_not_waited_for(broker: FakeBroker) -> None:
    async with process(broker) as runtime:
        runtime.transport.send_fault = BrokerUnavailableError("gone")  # type: ignore[attr-defined]  # the fake's
        request = question(runtime)
        since = await runtime.steps.position(request)
        asked = await runtime.steps.ask(request, since)
        started = time.monotonic()
        context = await runtime.steps.collect(request, since, asked, Wanted(), timeout_seconds=60)
    assert time.monotonic() - started < 20
    assert "gone" in context.degraded
    assert not context.coverage.complete


async def test_without_mock_mode_a_missing_broker_is_an_error(broker: FakeBroker) -> None:
    never = SETTINGS.model_copy(update={"mock_mode": "never"})
    async with process(broker, never) as runtime:
        request = question(runtime)
        since = await runtime.steps.position(request)
        runtime.transport.send_fault = BrokerUnavailableError("gone")  # type: ignore[attr-defined]  # the fake's
        with pytest.raises(BrokerUnavailableError, match="gone"):
            await runtime.steps.ask(request, since)


async def test_switched_off_nobody_is_asked(broker: FakeBroker, team: Team) -> None:
    off = SETTINGS.model_copy(update={"enabled": False})
    async with process(broker, off) as runtime:
        request = question(runtime)
        since = await runtime.steps.position(request)
        asked = await runtime.steps.ask(request, since, NAMES)
        context = await runtime.steps.collect(request, since, asked, Wanted(NAMES))
    assert team.asked == []
    assert "switched off" in context.degraded[0]


async def test_gathers_that_nobody_collects_are_forgotten_and_read_anew(
    broker: FakeBroker, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps_module, "MAX_OPEN", 2)
    async with process(broker) as runtime:
        requests = [question(runtime) for _ in range(4)]
        places = [await runtime.steps.position(request) for request in requests]
        asked = [
            await runtime.steps.ask(request, since, NAMES)
            for request, since in zip(requests, places, strict=True)
        ]
        await asyncio.sleep(0.01)
        contexts = [
            await runtime.steps.collect(request, since, before, Wanted(NAMES), timeout_seconds=5)
            for request, since, before in zip(requests, places, asked, strict=True)
        ]
        assert not open_gathers(runtime.steps)
    assert [told(context) for context in contexts] == [["a-1", "b-1", "c-1"]] * 4
    assert len(team.asked) == 4


def open_gathers(steps: GatherSteps) -> list[str]:
    return list(steps._open)
