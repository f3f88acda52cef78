"""Heartbeats out, one an interval, whatever the broker does; and a last word."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from fakes import FakeBroker, FakeTransport

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import BrokerUnavailableError
from langgraph_peerctx.messaging.presence import Presence, Standing
from langgraph_peerctx.protocol.codec import decode
from langgraph_peerctx.protocol.messages import Heartbeat

TOPIC = "agent.presence"
SETTINGS = PeerContextSettings(
    process_id="process-1",
    mock_mode="always",
    heartbeat_interval_seconds=0.05,
    heartbeat_pause_seconds=0.15,
)


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker(topics={TOPIC: []})


def beats(broker: FakeBroker) -> list[Heartbeat]:
    read = [decode(record.value) for record in broker.topics[TOPIC]]
    return [beat for beat in read if isinstance(beat, Heartbeat)]


async def until(true: Callable[[], Any], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


async def test_it_beats_with_what_others_should_know_and_says_when_it_leaves(
    broker: FakeBroker,
) -> None:
    presence = Presence(
        FakeTransport(broker),
        SETTINGS,
        "life-1",
        standing=Standing(
            agents=lambda: ("a", "b"),
            open_runs=lambda: 2,
            loop_lag_seconds=lambda: 0.25,
            supervises=True,
            sentinel_id="sentinel-1",
        ),
    )
    await presence.start()
    await until(lambda: presence.roster.is_warm)
    await presence.close()
    await presence.close()
    told = beats(broker)
    assert {(b.process_id, b.incarnation) for b in told} == {("process-1", "life-1")}
    assert [b.sequence for b in told] == list(range(1, len(told) + 1))
    assert (told[0].agents, told[0].open_runs, told[0].loop_lag_seconds) == (("a", "b"), 2, 0.25)
    assert (told[0].supervises, told[0].sentinel_id) == (True, "sentinel-1")
    assert [b.leaving for b in told] == [False] * (len(told) - 1) + [True]
    assert broker.readers == []


async def test_one_beat_an_interval(broker: FakeBroker) -> None:
    settings = SETTINGS.model_copy(update={"heartbeat_interval_seconds": 0.2})
    presence = Presence(FakeTransport(broker), settings, "life-1")
    await presence.start()
    await until(lambda: len(beats(broker)) == 3)
    first, _, third = (beat.sent_at for beat in beats(broker))
    assert (third - first).total_seconds() > 0.3
    await presence.close()


async def test_a_beat_at_once_where_something_changed(broker: FakeBroker) -> None:
    settings = SETTINGS.model_copy(update={"heartbeat_interval_seconds": 60})
    presence = Presence(FakeTransport(broker), settings, "life-1")
    await presence.start()
    await until(lambda: len(beats(broker)) == 1)
    presence.speak_for(lambda: ("a",))
    await until(lambda: beats(broker)[-1].agents == ("a",))
    await presence.close()


async def test_a_broker_that_takes_nothing_is_said_once_and_beating_goes_on(
    broker: FakeBroker, caplog: pytest.LogCaptureFixture
) -> None:
    transport = FakeTransport(broker)
    transport.send_fault = BrokerUnavailableError("gone")
    presence = Presence(transport, SETTINGS, "life-1")
    await presence.start()
    await until(lambda: "nobody hears" in caplog.text)
    await asyncio.sleep(0.2)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert [r.getMessage() for r in warnings] == ["nobody hears that we are there: gone"]
    assert not presence.roster.is_warm
    transport.send_fault = None
    await until(lambda: presence.roster.is_warm)
    await presence.close()


async def test_leaving_waits_for_no_broker_longer_than_a_second(broker: FakeBroker) -> None:
    transport = FakeTransport(broker)
    presence = Presence(transport, SETTINGS, "life-1")
    await presence.start()
    await until(lambda: beats(broker))
    transport.silent = True
    started = time.monotonic()
    await presence.close()
    assert time.monotonic() - started < 15


async def test_it_leaves_though_what_it_would_tell_is_gone(broker: FakeBroker) -> None:
    gone: list[bool] = []

    def agents() -> tuple[str, ...]:
        if gone:
            raise ZeroDivisionError
        return ("a",)

    presence = Presence(FakeTransport(broker), SETTINGS, "life-1", standing=Standing(agents=agents))
    await presence.start()
    await until(lambda: beats(broker))
    gone.append(True)
    await presence.close()
    assert beats(broker)[-1].leaving
    assert broker.readers == []


async def test_what_it_is_to_tell_may_fail_and_costs_one_beat(broker: FakeBroker) -> None:
    def agents() -> tuple[str, ...]:
        if len(beats(broker)) == 1:
            broker.topics[TOPIC].append(broker.topics[TOPIC][0])
            raise ZeroDivisionError
        return ()

    presence = Presence(FakeTransport(broker), SETTINGS, "life-1", standing=Standing(agents=agents))
    await presence.start()
    await until(lambda: len(beats(broker)) >= 4)
    await presence.close()
