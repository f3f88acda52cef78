"""A thousand agents in twenty processes: one heartbeat and one renewal a process and interval."""

import asyncio
import statistics
import time
from pathlib import Path

import pytest
from chaos.crowd import Beats, Cost, crowd, until
from chaos.world import world
from services.kafka import KafkaServer

from langgraph_peerctx.runtime import PeerContextRuntime

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]
AGENTS = 50
"""In each process."""
SECONDS = 10
"""As many intervals."""


def size_bytes(kafka: KafkaServer, topic: str) -> int:
    folder: Path = kafka._folder / "data" / f"{topic}-0"
    return sum(file.stat().st_size for file in folder.glob("*.log"))


def told(before: dict[str, Cost], after: dict[str, Cost], grown_bytes: int, seconds: float) -> str:
    cpu = [(after[n].cpu_seconds - before[n].cpu_seconds) / seconds for n in after]
    rss = [cost.rss_mb for cost in after.values()]
    asked = [(after[n].statements - before[n].statements) / seconds for n in after]
    return (
        f"{len(after) * AGENTS} agents in {len(after)} processes: "
        f"{1_000 * statistics.mean(cpu):.1f} ms CPU a process and second (at most "
        f"{1_000 * max(cpu):.1f}), RSS {statistics.mean(rss):.0f} MB (at most {max(rss):.0f}), "
        f"{statistics.mean(asked):.2f} statements a process and second, "
        f"presence grows by {grown_bytes / seconds:.0f} bytes a second"
    )


async def test_a_process_beats_and_renews_once_an_interval_however_many_agents_it_hosts(
    kafka: KafkaServer, times: int, seed: int
) -> None:
    processes = 20 if times >= 200 else 4
    beats = Beats()
    async with (
        world(kafka.bootstrap_servers, "sqlite", seed=seed, interval=1.0, pause=3.0) as made,
        PeerContextRuntime(made.scenario.settings("observer")) as observer,
        crowd(made.scenario, processes, AGENTS) as everybody,
    ):
        topic = observer.settings.kafka.presence_topic
        reading = await observer.transport.subscribe([topic], beats.take)
        await reading.positioned()
        await asyncio.sleep(observer.settings.silence_seconds)

        began, before, size = time.time(), await everybody.costs(), size_bytes(kafka, topic)
        await until(began + SECONDS)
        after, grown = await everybody.costs(), size_bytes(kafka, topic) - size
        took = time.time() - began
        await asyncio.sleep(1)
        counts = beats.between(began, began + SECONDS)
        present = observer.presence.roster.present()
        agents = [agent for member in present for agent in member.beat.agents]
        await everybody.end()
        await reading.close()

    print(told(before, after, grown, took))
    assert {process for process, _ in counts} == {*everybody.children, "observer"}
    assert len(counts) == processes + 1, "one life each"
    # One an interval, and never one an agent; a busy machine may come to fewer.
    assert all(SECONDS / 2 <= count <= SECONDS + 2 for count in counts.values()), counts
    assert len(set(agents)) == len(agents) == processes * AGENTS
    for name in everybody.children:
        assert after[name].held == AGENTS
        renewals = after[name].renewals - before[name].renewals
        assert took / 2 <= renewals <= took + 2, (name, renewals, took)
        assert after[name].cpu_seconds - before[name].cpu_seconds < took / 4
        assert after[name].rss_mb < 500
    assert grown < processes * took * 16_384
