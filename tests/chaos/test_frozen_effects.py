"""Agents are frozen in the middle of an effect and replaced: it is done once, by whomever."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from chaos.freezing import Holding
from chaos.processes import Child
from chaos.trading import Place, applied, barred
from chaos.world import World, world
from services.kafka import KafkaServer

from langgraph_peerctx.persistence.effect_ledger import Effect, EffectLedger

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(1_800)]
AGENTS = ("alpha", "beta", "gamma", "delta")


@asynccontextmanager
async def trading_world(
    servers: str, database: str, seed: int
) -> AsyncIterator[tuple[World, Child]]:
    """A world with two supervisors and a peer that takes orders."""
    async with world(servers, database, seed=seed) as made:
        peer = await made.start_peer()
        await asyncio.gather(*(made.start_supervisor(name) for name in ("guard", "warden")))
        yield made, peer


async def freeze_at(world: World, name: str, thread_id: str, place: Place) -> tuple[Child, Holding]:
    """Freeze an agent in its effect; return it, and what holds it there."""
    holding = Holding(place, Path(world.scenario.folder) / f"{thread_id}.gate")
    child = await world.start_agent(name, holding)
    world.run(name, thread_id)
    await child.stops_or_says("done", thread_id)
    await world.freeze_elsewhere_if_in_the_way(child)
    return child, holding


async def thaw(child: Child, holding: Holding, thread_id: str) -> str:
    """Let a frozen agent go on, and return how its run ended for it."""
    holding.let_go()
    child.thaw()
    said = await child.until_one_of(("done", thread_id), ("refused", thread_id))
    await child.leave()
    return str(said[2]) if said[0] == "refused" else "done"


def effect_of(world: World, name: str, thread_id: str) -> Effect:
    """Return what is known of a launch's only effect."""
    with EffectLedger(world.scenario.control_url, timeout_seconds=20) as ledger:
        run = ledger.newest_run(name, thread_id)
        assert run is not None
        (effect,) = ledger.effects_of(name, thread_id, run.run_id)
        return effect


def arrived(peer: Child, thread_id: str) -> list[tuple[str, int]]:
    """Return what became of each order of a thread that reached the peer, and under which epoch."""
    peer.hear()
    return [(said[0], said[2]) for said in peer.said if said[1] == thread_id]


async def on_all_agents(freeze: Callable[[str, str], Awaitable[None]], times: int) -> None:
    """Freeze each agent a few times, one after the other; a quarter of `times` in all."""

    async def one_by_one(name: str, numbers: range) -> None:
        for number in numbers:
            await freeze(name, f"{name}-{number}")

    numbers = range(max(len(AGENTS), times // 4))
    async with asyncio.TaskGroup() as doing:
        for first, name in enumerate(AGENTS):
            doing.create_task(one_by_one(name, numbers[first :: len(AGENTS)]))


async def test_who_is_frozen_before_its_call_is_refused_by_the_peer_when_it_comes_late(
    kafka: KafkaServer, database: str, times: int, seed: int
) -> None:
    """Its successor has asked the peer, which saw nothing and bars the key, and has done it."""

    async def freeze(name: str, thread_id: str) -> None:
        child, holding = await freeze_at(made, name, thread_id, "between intent and call")
        meant = effect_of(made, name, thread_id)
        assert (meant.status, meant.attempt, arrived(peer, thread_id)) == ("intent", 1, [])
        await made.ended(thread_id)
        assert arrived(peer, thread_id) == [("first", meant.epoch + 1)]
        assert barred(made.scenario.peer_store, meant.key) == meant.epoch + 1
        assert await thaw(child, holding, thread_id) == "StaleOwnerError"
        assert arrived(peer, thread_id) == [("first", meant.epoch + 1), ("refused", meant.epoch)]
        assert applied(made.scenario.peer_store, thread_id) == [meant.epoch + 1]
        done = effect_of(made, name, thread_id)
        assert (done.status, done.attempt, done.epoch) == ("done", 2, meant.epoch + 1)
        assert done.outcome == f"taken under {meant.epoch + 1}"

    async with trading_world(kafka.bootstrap_servers, database, seed) as (made, peer):
        await on_all_agents(freeze, times)
        kinds = await made.check()
    assert kinds == {"resumed": kinds.total()}


async def test_who_is_frozen_after_its_call_is_not_done_again_and_has_nothing_more_to_say(
    kafka: KafkaServer, database: str, times: int, seed: int
) -> None:
    """The peer has told its successor what it replied."""

    async def freeze(name: str, thread_id: str) -> None:
        child, holding = await freeze_at(made, name, thread_id, "between call and outcome")
        meant = effect_of(made, name, thread_id)
        assert (meant.status, arrived(peer, thread_id)) == ("intent", [("first", meant.epoch)])
        await made.ended(thread_id)
        told = effect_of(made, name, thread_id)
        assert (told.status, told.source, told.attempt) == ("done", "peer", 1)
        assert told.outcome == f"taken under {meant.epoch}"
        assert await thaw(child, holding, thread_id) == "StaleOwnerError"
        assert arrived(peer, thread_id) == [("first", meant.epoch)]
        assert applied(made.scenario.peer_store, thread_id) == [meant.epoch]
        assert effect_of(made, name, thread_id) == told

    async with trading_world(kafka.bootstrap_servers, database, seed) as (made, peer):
        await on_all_agents(freeze, times)
        kinds = await made.check()
    assert kinds == {"resumed": kinds.total()}
