"""Agents are killed at any instant; all their workflows end as if nobody had disturbed them."""

import asyncio

import pytest
from chaos.world import World, world
from services.kafka import KafkaServer

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(1_800)]
AGENTS = ("alpha", "beta", "gamma", "delta")


async def kill_on(world: World, name: str, times: int) -> None:
    """Kill one agent again and again, at random points of its launches."""
    for number in range(times):
        thread_id = f"{name}-{number}"
        child = world.run(name, thread_id)
        await asyncio.sleep(world.random.uniform(0, 0.35))
        child.kill()
        await world.start_agent(name)
        if not world.was_begun(thread_id):  # it died before it read the order
            world.threads.remove((name, thread_id))


async def test_killed_agents_are_recovered_by_one_of_two_supervisors(
    kafka: KafkaServer, database: str, times: int, seed: int
) -> None:
    async with world(kafka.bootstrap_servers, database, seed=seed) as made:
        await asyncio.gather(*(made.start_supervisor(name) for name in ("guard", "warden")))
        await asyncio.gather(*(made.start_agent(name) for name in AGENTS))
        await asyncio.gather(*(kill_on(made, name, times // len(AGENTS)) for name in AGENTS))
        kinds = await made.check()
    print(f"{times} kills: {dict(kinds)}")
    assert kinds["resumed"] + kinds["restarted"] >= times / 2
