"""An agent that is cut off is not taken for dead before its lease is out, and can do no harm."""

import asyncio
import math
import re
import time

import pytest
from chaos import scenario
from chaos.processes import Orders
from chaos.scenario import FINAL
from chaos.world import world
from services.kafka import KafkaServer, free_ports
from services.postgres import PostgresServer
from services.proxy import Proxy

from langgraph_peerctx.persistence.incidents import ControlDatabase

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]


async def test_an_agent_cut_from_kafka_alone_keeps_its_threads(database: str, seed: int) -> None:
    """Its heartbeats stay away for longer than any suspicion; its lease does not."""
    (port,) = free_ports(1)
    far = {"FAR": "PLAINTEXT"}
    with KafkaServer(listeners=far, advertised={"FAR": f"127.0.0.1:{port}"}) as kafka:
        async with (
            Proxy(kafka.address("FAR"), port=port) as proxy,
            world(kafka.bootstrap_servers, database, seed=seed, work_seconds=3.0) as made,
        ):
            guard = await made.start_supervisor("guard")
            await made.start_agent("alpha", servers=proxy.address)
            made.run("alpha", "t")
            await made.begun("t")
            await asyncio.sleep(1)
            proxy.frozen = True
            await asyncio.sleep(2 * made.scenario.settings("x").lease_seconds)
            guard.tell("states")
            (_, states) = await guard.until("states")
            assert [state for name, state, _ in states if name.startswith("alpha")] == [
                "unreachable"
            ]
            assert await made.ended("t") == "returned"
            assert made.seen("t") == []
            proxy.frozen = False
            kinds = await made.check()
    assert kinds == {"undisturbed": 1}


@pytest.mark.postgres
async def test_an_agent_cut_from_the_database_loses_its_thread_not_before_its_time(
    kafka: KafkaServer, postgres_server: PostgresServer, seed: int
) -> None:
    """And it writes nothing afterwards, though it beats all the time."""
    with postgres_server.database() as database:
        address = database.rpartition("@")[2].partition("/")[0]
        async with (
            Proxy(address) as proxy,
            world(
                kafka.bootstrap_servers, database, seed=seed, pause=2.0, work_seconds=1.0
            ) as made,
        ):
            far = database.replace(address, proxy.address)
            await made.start_supervisor("guard")
            child = await made.start_agent("alpha", database=far)
            made.run("alpha", "t")
            await made.begun("t")
            await asyncio.sleep(0.5)
            proxy.frozen = True
            cut_at = time.time()
            with ControlDatabase(database, timeout_seconds=20) as control:
                lease = control.lease_of("alpha", "t")
            assert lease is not None
            assert await made.ended("t") == "returned"
            ((_, _, why, _, seen_at),) = made.seen("t")
            assert why == "unrenewed"
            assert lease.seconds_left > 0
            assert seen_at >= cut_at + lease.seconds_left
            proxy.frozen = False
            told = await child.until_one_of(("done", "t"), ("refused", "t"), within=60)
            assert told[0] == "refused"
            await asyncio.sleep(1)
            kinds = await made.check()
            with ControlDatabase(database) as control:
                run = control.newest_run("alpha", "t")
    assert kinds == {"resumed": 1}
    assert run is not None
    assert run.epoch == 2


async def test_a_regular_expression_that_holds_the_interpreter_costs_nobody_its_thread(
    kafka: KafkaServer, database: str, seed: int
) -> None:
    """Its heartbeats stay away for 5 s, with the intervals of production."""
    async with world(kafka.bootstrap_servers, database, seed=seed, interval=1.0, pause=3.0) as made:
        await made.start_supervisor("guard")
        of = made.scenario.settings("x")
        for number in range(8):  # how long it holds depends on what else the machine does
            thread_id = f"t{number}"
            child = await made.start_agent("alpha", arm=hold_the_interpreter)
            made.run("alpha", thread_id)
            await made.ended(thread_id, within=90)
            (_, held_seconds, seconds) = await child.until("held", within=90)
            if of.silence_seconds < held_seconds and seconds < of.lease_seconds - 1.5:
                break
        else:
            pytest.fail("the machine is too busy to hold an interpreter for five seconds")
        assert made.seen(thread_id) == []
        (_, _, log) = await child.until("done", thread_id)
        assert log == FINAL
        kinds = await made.check()
    assert kinds["undisturbed"] >= 1


async def test_an_agent_whose_loop_is_stuck_is_replaced_and_refused_when_it_is_back(
    kafka: KafkaServer, database: str, seed: int
) -> None:
    async with world(kafka.bootstrap_servers, database, seed=seed, stuck=1.0, pause=2.0) as made:
        await made.start_supervisor("guard")
        child = await made.start_agent("alpha", arm=sleep_on_the_loop)
        made.run("alpha", "t")
        assert await made.ended("t") == "returned"
        (_, _, kind, _) = await child.until("refused", "t")
        kinds = await made.check()
        whys = {said[2] for said in made.seen("t")}
    assert kind == "StaleOwnerError"
    assert kinds == {"resumed": 1}
    assert whys == {"stuck"}


def sleep_on_the_loop(_orders: Orders) -> None:
    """Arm a process: one node blocks its loop for longer than it may."""
    scenario.in_node = lambda name: time.sleep(12) if name == "join" else None


HELD_SECONDS = 5.0
"""More than a pause and an interval, less than a lease."""


def hold_the_interpreter(orders: Orders) -> None:
    """Arm a process: in one node it looks for a pattern for so long, and says how long it was.

    First for a moment, to know the machine's pace: that is told too, of both together.
    """

    def search(name: str) -> None:
        if name == "join":
            some = 20_000
            first = time.monotonic()
            re.search("a*b", "a" * some)
            took = time.monotonic() - first
            began = time.monotonic()
            # It takes four times as long for twice as much.
            re.search("a*b", "a" * int(some * math.sqrt(HELD_SECONDS / took)))
            orders.say("held", time.monotonic() - began, time.monotonic() - first)

    scenario.in_node = search
