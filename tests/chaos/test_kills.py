"""Agents are killed at any instant; all their workflows end as if nobody had disturbed them."""

import asyncio
from collections import Counter

import pytest
from chaos.world import World, world
from services.kafka import KafkaServer

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(1_800)]
AGENTS = ("alpha", "beta", "gamma", "delta")


async def kill_on(world: World, name: str, numbers: range) -> None:
    """Kill one agent again and again, at random points of its launches."""
    for number in numbers:
        thread_id = f"{name}-{number}"
        child = world.run(name, thread_id)
        await world.in_the_middle(child, thread_id)
        child.kill()
        await world.start_agent(name)


async def test_killed_agents_are_recovered_by_one_of_two_supervisors(
    kafka: KafkaServer, database: str, times: int, seed: int
) -> None:
    """In the first half of it a sentinel sees them die; then it is killed, too."""
    each = times // len(AGENTS)
    async with world(
        kafka.bootstrap_servers, database, seed=seed, sentinel="connect", work_seconds=0.15
    ) as made:
        sentinel = await made.start_sentinel()
        await asyncio.gather(*(made.start_supervisor(name) for name in ("guard", "warden")))
        await asyncio.gather(*(made.start_agent(name) for name in AGENTS))
        await asyncio.gather(*(kill_on(made, name, range(each // 2)) for name in AGENTS))
        sentinel.kill()
        made.forget_the_sentinel()
        rest = range(each // 2, each)
        await asyncio.gather(*(kill_on(made, name, rest) for name in AGENTS))
        kinds = await made.check()
        whys = Counter(said[2] for said in made.everything_seen())
    assert kinds.total() == each * len(AGENTS)
    print(f"{times} kills: {dict(kinds)}; seen: {dict(whys)}")
    assert kinds["resumed"] + kinds["restarted"] >= times / 2
    assert whys["died"] >= times / 8
    assert whys["silent"] >= times / 8
    # A process whose database was busy for too long hands its run over.
    assert set(whys) <= {"died", "silent", "handed_over"}
