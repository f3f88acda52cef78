"""Services go away and come back while agents die: all workflows end, nobody alive is accused."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from chaos.world import World, world
from services.kafka import KafkaServer
from services.postgres import PostgresServer

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(900)]
LIVE, DYING = ("alpha", "beta"), ("gamma", "delta")
WORK_SECONDS = 1.5


@dataclass
class Services:
    """A broker and a database of our own, to be killed and started again."""

    kafka: KafkaServer
    postgres: PostgresServer | None
    database: str


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def services(request: pytest.FixtureRequest) -> Iterator[Services]:
    with ExitStack() as stack:
        kafka = stack.enter_context(KafkaServer())
        if request.param == "sqlite":
            yield Services(kafka, None, "sqlite")
        else:
            postgres = PostgresServer({"max_connections": "200"}).start()
            stack.callback(postgres.__exit__)
            yield Services(kafka, postgres, postgres.url())


async def launch_everywhere(made: World, number: int) -> None:
    for name in (*LIVE, *DYING):
        if name not in made.agents or not made.agents[name].process.is_alive():
            await made.start_agent(name)
    for name in (*LIVE, *DYING):  # all are there: however long that took, none has an end yet
        made.run(name, f"{name}-{number}")
    for name in (*LIVE, *DYING):
        await made.begun(f"{name}-{number}")


def kill_the_dying(made: World) -> None:
    for name in DYING:
        made.agents[name].kill()


async def without(stop: Callable[[], None], start: Callable[[], object], made: World) -> None:
    """Take a service away for a while, and kill agents meanwhile."""
    await asyncio.to_thread(stop)
    await asyncio.sleep(1)
    kill_the_dying(made)
    await asyncio.sleep(2 * made.scenario.settings("x").lease_seconds)
    await asyncio.to_thread(start)


async def test_kafka_is_killed_and_started_while_agents_die(services: Services, seed: int) -> None:
    servers = services.kafka.bootstrap_servers
    async with world(servers, services.database, seed=seed, work_seconds=WORK_SECONDS) as made:
        await asyncio.gather(*(made.start_supervisor(name) for name in ("guard", "warden")))
        await launch_everywhere(made, 0)
        await without(services.kafka.kill, services.kafka.start, made)
        kinds = await made.check()
        for name in LIVE:
            assert made.seen(f"{name}-0") == []
    assert kinds["undisturbed"] == len(LIVE)
    assert sum(kinds.values()) == len((*LIVE, *DYING))


@pytest.mark.postgres
async def test_postgresql_is_stopped_and_started_while_agents_die(seed: int) -> None:
    """Who lives may have lost its run, since it could not write; it is not taken for dead."""
    with ExitStack() as stack:
        kafka = stack.enter_context(KafkaServer())
        postgres = PostgresServer({"max_connections": "200"}).start()
        stack.callback(postgres.__exit__)
        async with world(
            kafka.bootstrap_servers, postgres.url(), seed=seed, work_seconds=WORK_SECONDS
        ) as made:
            await asyncio.gather(*(made.start_supervisor(name) for name in ("guard", "warden")))
            await launch_everywhere(made, 0)
            await without(postgres.stop, postgres.start, made)
            await made.check()
            for name in LIVE:
                assert {said[2] for said in made.seen(f"{name}-0")} <= {"handed_over", "unrenewed"}


async def test_everything_stops_together_and_supervisors_start_again(
    services: Services, seed: int
) -> None:
    servers = services.kafka.bootstrap_servers
    async with world(servers, services.database, seed=seed, work_seconds=WORK_SECONDS) as made:
        await asyncio.gather(*(made.start_supervisor(name) for name in ("guard", "warden")))
        await launch_everywhere(made, 0)
        for child in (*made.supervisors, *made.agents.values()):
            child.kill()
        services.kafka.kill()
        if services.postgres is not None:
            services.postgres.stop(signal.SIGQUIT)
            services.postgres.start()
        services.kafka.start()
        await asyncio.gather(*(made.start_supervisor(name) for name in ("guard2", "warden2")))
        kinds = await made.check()
    assert kinds["undisturbed"] == 0
    assert sum(kinds.values()) == len((*LIVE, *DYING))
