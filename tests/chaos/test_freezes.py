"""Agents are frozen until they are replaced, and thawed: nothing of theirs counts any more."""

import asyncio

import pytest
from chaos import scenario
from chaos.freezing import PLACES, Freezing, stop_here
from chaos.world import World, world
from services.kafka import KafkaServer

from langgraph_peerctx.persistence.incidents import ControlDatabase

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
            await world.in_the_middle(child, thread_id)
            child.freeze()
        await child.stops_or_says("done", thread_id)
        await world.freeze_elsewhere_if_in_the_way(child)
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
    # One frozen in the middle of its admission does not know what became of it, and says so.
    assert set(ends) <= {"done", "StaleOwnerError", "CheckpointerError", "StoreError"}
    assert ends.count("StaleOwnerError") >= times / 3


async def test_on_sqlite_a_process_frozen_inside_a_commit_is_in_the_way_until_it_is_killed(
    kafka: KafkaServer, seed: int
) -> None:
    """Nobody can take its thread, since nobody can write; nothing is lost."""
    async with world(kafka.bootstrap_servers, "sqlite", seed=seed) as made:
        await made.start_supervisor("guard")
        child = await made.start_agent("alpha", freeze_inside_a_commit)
        made.run("alpha", "t")
        await child.stops_or_says("done", "t")
        await asyncio.sleep(2 * made.scenario.settings("x").lease_seconds)
        assert made.recovered("t") == []
        assert made.is_locked()
        child.kill()
        kinds = await made.check()
    assert kinds == {"resumed": 1}


def freeze_inside_a_commit(_orders: object) -> None:
    """Arm a process: it stops when it has the control file's lock, at the end of its run."""

    def end(self: ControlDatabase, *_: object, **__: object) -> bool:
        def work(_connection: object) -> bool:
            stop_here()
            return True

        return self._work(work, transaction=True)

    ControlDatabase.end = end  # type: ignore[method-assign]
    scenario.in_node = _fail_at_the_end


def _fail_at_the_end(name: str) -> None:
    if name == "end":
        raise RuntimeError("so that there is work left")
