"""Recoverers die too, and many come at once: another finishes, and one alone."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from chaos.killing import PLACES, Killing, in_its_first_node
from chaos.world import World, world
from services.kafka import KafkaServer

from langgraph_peerctx.persistence.incidents import ControlDatabase

Databases = Callable[[], AbstractContextManager[str]]

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(900)]


async def finished_in_spite_of_kills_at(world: World, place: str) -> None:
    await world.start_agent("alpha", in_its_first_node)
    await world.run("alpha", world.scenario.name).ends()
    for attempt in ("first", "second"):
        recoverer = await world.start_supervisor(attempt, Killing(place))
        await recoverer.ends()
    await world.start_supervisor("third")
    await world.check()
    with ControlDatabase(world.scenario.control_url, timeout_seconds=20) as control:
        incident = control.incident_of("alpha", world.scenario.name)
    assert incident is not None
    assert incident.attempts == 3


@pytest.mark.parametrize("places", [PLACES[:5], PLACES[5:]], ids=["first", "last"])
async def test_a_recoverer_killed_anywhere_twice_is_taken_up_by_a_third(
    kafka: KafkaServer, databases: Databases, seed: int, places: tuple[str, ...]
) -> None:
    async def experiment(place: str) -> None:
        with databases() as database:
            async with world(
                kafka.bootstrap_servers, database, seed=seed, work_seconds=0.3
            ) as made:
                await finished_in_spite_of_kills_at(made, place)

    await asyncio.gather(*(experiment(place) for place in places))


async def test_of_twenty_supervisors_at_once_one_recovers_and_the_others_say_so(
    kafka: KafkaServer, database: str, seed: int
) -> None:
    async with world(kafka.bootstrap_servers, database, seed=seed, work_seconds=0.3) as made:
        await made.start_agent("alpha", in_its_first_node)
        names = [f"guard{number}" for number in range(20)]
        for start in range(0, 20, 5):
            await asyncio.gather(*(made.start_supervisor(n) for n in names[start : start + 5]))
        await made.run("alpha", "t").ends()
        with ControlDatabase(made.scenario.control_url, timeout_seconds=20) as control:
            deadline = time.monotonic() + 30
            while (lost := control.open_run("alpha", "t")) and lost.seconds_left > 0:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
        for supervisor in made.supervisors:
            supervisor.tell("recover", "alpha", "t")
        results = [await s.until("result", "t", within=90) for s in made.supervisors]
        await made.check()
        statuses = sorted(result[2] for result in results)
        by_itself = len(made.recovered("t"))
    ran = [status for status in statuses if status in ("resumed", "restarted")]
    assert len(ran) + by_itself == 1, statuses
    elsewhere = {"recovered_elsewhere", "recovering_elsewhere"}
    assert set(statuses) - set(ran) <= elsewhere, statuses
    final = [result[3] for result in results if result[2] == "recovered_elsewhere"]
    assert all(log == ["in", "plan", "left", "right", "join", "end"] for log in final)
