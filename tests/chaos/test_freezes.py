"""Agents are frozen until they are replaced, and thawed: nothing of theirs counts any more."""

import asyncio

import pytest
from chaos.freezing import PLACES, Freezing
from chaos.world import World, world
from services.kafka import KafkaServer

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(3_600)]
AGENTS = ("alpha", "beta", "gamma", "delta")


async def freeze_on(world: World, name: str, places: list[str]) -> list[str]:
    """Freeze one agent at a place of its launch each, and return what it said when it was back."""
    told = []
    for number, place in enumerate(places):
        thread_id = f"{name}-{number}"
        arm = Freezing(place, world.random.randint(1, 8), ahead=world.random.random() < 0.5)
        child = await world.start_agent(name, arm)
        world.run(name, thread_id)
        if place == "anywhere":
            await asyncio.sleep(world.random.uniform(0.05, 0.8))
            child.freeze()
        await child.stops_or_says("done", thread_id)
        await world.ended(thread_id)
        child.thaw()
        said = await child.until_one_of(("done", thread_id), ("refused", thread_id))
        told.append(said[2] if said[0] == "refused" else "done")
        await child.leave()
    return told


async def test_frozen_agents_are_replaced_and_nothing_of_theirs_counts_afterwards(
    kafka: KafkaServer, database: str, times: int, seed: int
) -> None:
    async with world(kafka.bootstrap_servers, database, seed=seed, work_seconds=0.15) as made:
        # Half of them anywhere, half at a named place.
        places = [
            "anywhere" if number % 2 else PLACES[1 + number // 2 % 3] for number in range(times)
        ]
        await asyncio.gather(*(made.start_supervisor(name) for name in ("guard", "warden")))
        told = await asyncio.gather(
            *(freeze_on(made, name, places[n :: len(AGENTS)]) for n, name in enumerate(AGENTS))
        )
        await asyncio.sleep(1)  # what they would still write
        kinds = await made.check()
    ends = [end for ends in told for end in ends]
    print(f"{times} freezes: {dict(kinds)}; the thawed: {sorted(ends)}")
    assert set(ends) <= {"done", "StaleOwnerError"}
    assert ends.count("StaleOwnerError") >= times / 3
