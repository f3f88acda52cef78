"""How long a gather takes when one of eight peers has just died, beside all eight alive.

    python tests/benchmarks/dead_peer.py [--kills 15] [--silent 8] [--json FILE]

A real Apache Kafka on loopback; eight peers in processes of their own, whom the asker knows from
its roster. One is killed, and in the same moment the others are asked, too. Before each kill all
eight answer ten times; after it a new process takes the dead one's place.

`suspicion` is when the roster no longer holds the dead one for present, counted from the asking:
with a sentinel the notice, without one the silence. The gather should end with it, and never later
than its window and a quarter of a second.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.death import figures
from benchmarks.revival import AGENT, peer, print_row, sentinel, settings_for
from chaos.processes import Child
from chaos.world import World, world
from services.kafka import KafkaServer

from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.runtime import PeerContextRuntime

PEERS, THREAD = 8, "thread-0"
ALIVE_ASKS = 10
GRACE_SECONDS = 0.25


class Peers:
    """Eight processes, and who asks them."""

    def __init__(self, made: World, runtime: PeerContextRuntime) -> None:
        self._made, self._runtime = made, runtime
        self._alive: dict[str, Child] = {}
        self._random = random.Random(1)

    async def start(self, *names: str) -> None:
        for name in names:
            child = Child(peer, self._made.scenario, name, [THREAD])
            self._alive[name] = child
            self._made.supervisors.append(child)
        for name in names:
            await self._alive[name].until("ready")
        while len(self._runtime.gatherer.there(AGENT)) < PEERS or not self._all_watched():
            await asyncio.sleep(0.05)

    def _all_watched(self) -> bool:
        """Their first heartbeat may come before they know of a sentinel."""
        roster = self._runtime.presence.roster
        watched = [m for m in roster.present() if m.beat.sentinel_id and m.beat.agents]
        return self._made.scenario.sentinel == "off" or len(watched) == PEERS

    async def ask(self) -> PeerContext:
        return await self._runtime.gather(failed_agent_id=AGENT, thread_id=THREAD)

    async def ask_all(self) -> float:
        context = await self.ask()
        if not context.coverage.complete or len(context.coverage.answered) != PEERS:
            raise SystemExit(f"incomplete: {context.coverage}")
        return context.elapsed_seconds

    async def ask_with_one_dead(self) -> tuple[float, float]:
        """Kill one and ask; return how long it took, and how long the roster believed in it."""
        await asyncio.sleep(self._random.uniform(0.2, 1.2))  # anywhere between two heartbeats
        name = self._random.choice(sorted(self._alive))
        (life,) = (n for n in self._runtime.gatherer.there(AGENT) if n.startswith(f"{name}@"))
        child = self._alive.pop(name)
        os.kill(child.pid, signal.SIGKILL)
        suspecting = asyncio.create_task(self._until_gone(life, time.monotonic()))
        context = await self.ask()
        suspicion = await suspecting
        child.kill()
        if len(context.coverage.answered) != PEERS - 1 or name in context.coverage.answered:
            raise SystemExit(f"not as it should be: {context.coverage}")
        await self.start(name)
        return context.elapsed_seconds, suspicion

    async def _until_gone(self, life: str, since: float) -> float:
        process_id, _, incarnation = life.partition("@")
        while self._runtime.presence.roster.is_present((process_id, incarnation)):
            await asyncio.sleep(0.002)
        return time.monotonic() - since


async def measured(made: World, kills: int) -> dict[str, Any]:
    settings = settings_for(made.scenario, "asker")
    if made.scenario.sentinel != "off":
        watcher = Child(sentinel, made.scenario)
        made.supervisors.append(watcher)
        await watcher.until("ready")
    alive, dead, suspicion = [], [], []
    async with PeerContextRuntime(settings) as runtime:
        peers = Peers(made, runtime)
        await peers.start(*(f"peer-{number}" for number in range(PEERS)))
        for _ in range(ALIVE_ASKS):
            await peers.ask_all()
        for _ in range(kills):
            alive += [await peers.ask_all() for _ in range(ALIVE_ASKS)]
            took, believed = await peers.ask_with_one_dead()
            dead.append(took)
            suspicion.append(believed)
    return {
        "kills": kills,
        "window_seconds": settings.timeout_seconds,
        "eight alive": figures(alive),
        "one freshly dead": figures(dead),
        "suspicion": figures(suspicion),
        "after the suspicion": figures([a - b for a, b in zip(dead, suspicion, strict=True)]),
    }


def print_one(title: str, found: dict[str, Any]) -> None:
    print(f"{title}, {found['kills']} kills, milliseconds")
    for name in ("eight alive", "one freshly dead", "suspicion", "after the suspicion"):
        print_row(name, found[name])
    limit = 1_000 * (found["window_seconds"] + GRACE_SECONDS)
    met = "met" if found["one freshly dead"]["max"] <= limit else "MISSED"
    print(f"target never longer than {limit:g} ms: {met}")


async def both(servers: str, kills: int, silent: int) -> dict[str, Any]:
    around = partial(world, servers, "sqlite", seed=1, interval=1.0, pause=3.0)
    found = {}
    for title, mode, times in (
        ("with a sentinel", "connect", kills),
        ("without a sentinel", "off", silent),
    ):
        async with around(sentinel=mode) as made:
            found[title] = await measured(made, times)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=15)
    options.add_argument("--silent", type=int, default=8)
    options.add_argument("--json", type=Path, default=Path("bench-results/dead_peer.json"))
    chosen = options.parse_args()
    loads = [os.getloadavg()[0]]
    with KafkaServer() as kafka:
        found = asyncio.run(both(kafka.bootstrap_servers, chosen.kills, chosen.silent))
    loads.append(os.getloadavg()[0])
    shown = " to ".join(f"{load:.1f}" for load in loads)
    print(f"{os.cpu_count()} cores, load {shown}, real Kafka, loopback")
    for title, row in found.items():
        print_one(title, row)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(
        json.dumps({"cores": os.cpu_count(), "load": loads, **found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
