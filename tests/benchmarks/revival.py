"""How soon a killed agent's workflow goes on elsewhere, stage by stage, beside a bare recoverer.

    python tests/benchmarks/revival.py [--database sqlite|postgresql] [--kills 60] [--silent 15]

A real Apache Kafka on loopback; control database and checkpoints in SQLite files, or in a
PostgreSQL that syncs its files. A supervisor and three peers are warm; the peers remember five
messages of each thread. An agent process is killed in the middle of a node; times are counted from
the kill.

`next node` is the first line of that node, run again in the supervisor. The yardstick, after every
second kill on the same checkpointer: a process with nothing but the workflow holds the agent's
pidfd and calls `ainvoke(None)` when the kernel says so; no lease, no claim, no peers.

`lost host`: the same without a sentinel, so that silence and the lease's end have to tell.
"""

import argparse
import asyncio
import json
import logging
import operator
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from benchmarks.death import figures, killed
from chaos.processes import Child, Orders
from chaos.scenario import Scenario
from chaos.world import World, world
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from services.kafka import KafkaServer
from services.postgres import PostgresServer

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.lifecycle import peer_context_lifespan
from langgraph_peerctx.messaging.sentinel import serve
from langgraph_peerctx.nodes.state import PeerContextState
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.protocol.messages import Interaction
from langgraph_peerctx.reconstruction.supervisor import RecoverySupervisor
from langgraph_peerctx.runtime import PeerContextRuntime

AGENT, PEERS = "launcher", ("supplier", "carrier", "printer")
WARM_UP = 5
SETTLING_SECONDS = 0.2
"""An agent that has just started is left alone so long."""
TARGET_MS = 150.0
STAGES = (
    "kernel's word",
    "notice",
    "known",
    "claimed",
    "checkpoint read",
    "request sent",
    "last answer",
    "collected",
    "reconstructed",
    "resumed",
    "next node",
)
_ENDS = {
    "claim": "claimed",
    "load_checkpoint": "checkpoint read",
    "request_context": "request sent",
    "collect_context": "collected",
    "reconstruct": "reconstructed",
}
InNode = Callable[[str], Awaitable[None]]


class Launch(PeerContextState, total=False):
    log: Annotated[list[str], operator.add]


def workflow(saver: Any, in_node: InNode) -> Any:
    """Two nodes in a line; the second is what is killed, and run again."""

    async def plan(_state: Launch) -> dict[str, Any]:
        return {"log": ["plan"]}

    async def act(_state: Launch, config: RunnableConfig) -> dict[str, Any]:
        await in_node(config["configurable"]["thread_id"])
        return {"log": ["act"]}

    builder = StateGraph(Launch)
    builder.add_node("plan", plan)
    builder.add_node("act", act)
    builder.add_edge(START, "plan")
    builder.add_edge("plan", "act")
    builder.add_edge("act", END)
    return builder.compile(checkpointer=saver, name="launch")


def settings_for(scenario: Scenario, name: str) -> PeerContextSettings:
    return scenario.settings(
        name,
        mock_mode="never",
        sweep_seconds=10.0,
        database_url=f"sqlite:///{scenario.folder}/{name}.db",
    )


async def sentinel(orders: Orders, scenario: Scenario) -> None:
    logging.disable(logging.ERROR)
    orders.say("ready")
    await serve(settings_for(scenario, "unused"), idle_seconds=None)


async def peer(orders: Orders, scenario: Scenario, name: str, threads: list[str]) -> None:
    """Host one agent, that remembers something of each thread."""
    logging.disable(logging.WARNING)
    settings = settings_for(scenario, name)
    with EventStore(settings.database_url) as store:
        store.append_many(name, [i for thread_id in threads for i in remembered(name, thread_id)])
    async with peer_context_lifespan(agents=[name], settings=settings) as runtime:
        await runtime.own()
        orders.say("ready")
        await asyncio.Event().wait()


def remembered(name: str, thread_id: str) -> list[Interaction]:
    now = datetime.now(UTC)
    return [
        Interaction(
            interaction_id=f"{name}-{thread_id}-{number}",
            thread_id=thread_id,
            from_agent=AGENT,
            to_agent=name,
            kind="message",
            payload={"number": number, "text": "an order of three units " * 8},
            occurred_at=now - timedelta(seconds=5 - number),
        )
        for number in range(5)
    ]


async def victim(orders: Orders, scenario: Scenario, thread_id: str, *, owns: bool) -> None:
    """Run one launch, and stay in its second node."""
    logging.disable(logging.WARNING)

    async def stay(_thread_id: str) -> None:
        orders.say("in node")
        await asyncio.Event().wait()

    settings = settings_for(scenario, f"{AGENT}-{os.getpid()}")
    async with (
        scenario.checkpointer() as saver,
        peer_context_lifespan(agents=[AGENT], settings=settings) as runtime,
    ):
        await runtime.own()
        app = workflow(saver, stay)
        await until_watched(runtime, scenario)
        running = own_runs(app, agent_id=AGENT) if owns else app
        place: RunnableConfig = {"configurable": {"thread_id": thread_id}}
        await running.ainvoke({"log": ["in"]}, place, durability="sync")


async def until_watched(runtime: Any, scenario: Scenario) -> None:
    while scenario.sentinel != "off" and runtime.sentinel_id is None:
        await asyncio.sleep(0.01)


async def supervisor(orders: Orders, scenario: Scenario) -> None:
    """Recover, and say when each stage was reached."""
    logging.disable(logging.WARNING)
    settings = settings_for(scenario, "guard")
    EventStore(settings.database_url).close()
    reached: dict[str, float] = {}

    def now(stage: str) -> None:
        reached[stage] = time.monotonic()

    async def in_node(thread_id: str) -> None:
        now("next node")
        orders.say("next node", thread_id, reached["next node"])

    def step(record: Any) -> None:
        if (stage := _ENDS.get(record["step"])) is not None:
            now(stage)
        if record["step"] == "resume_workflow":
            began = datetime.fromisoformat(record["started_at"]).timestamp()
            reached["resumed"] = began - time.time() + time.monotonic()

    def seen(failure: Any) -> None:
        now("known")
        orders.say("known", failure.thread_id, reached["known"], failure.silent_seconds)

    def recovered(failure: Any, result: Any) -> None:
        orders.say("recovered", failure.thread_id, result["status"], result["reasons"], reached)

    async with (
        scenario.checkpointer() as saver,
        RecoverySupervisor(
            {"launch": workflow(saver, in_node)},
            settings=settings,
            on_failure=seen,
            on_recovery=recovered,
            on_step=step,
            on_answer=lambda _: now("last answer"),
        ) as supervising,
    ):
        await supervising._started().runtime.acall(partial(tell_of_notices, now))
        orders.say("ready")
        await asyncio.Event().wait()


async def tell_of_notices(now: Callable[[str], None], runtime: PeerContextRuntime) -> None:
    roster = runtime.presence.roster
    look = roster.on_notice
    assert look is not None

    def noticed(member: Any) -> None:
        now("notice")
        look(member)

    roster.on_notice = noticed


async def bare(orders: Orders, scenario: Scenario) -> None:
    """Hold an agent's pidfd, and run its workflow on as soon as the kernel says that it ended."""

    async def in_node(thread_id: str) -> None:
        orders.say("next node", thread_id, time.monotonic())

    async with scenario.checkpointer() as saver:
        app = workflow(saver, in_node)
        orders.say("ready")
        while True:
            pid, thread_id = await orders.told()
            ended, descriptor = asyncio.Event(), os.pidfd_open(pid)
            asyncio.get_running_loop().add_reader(descriptor, ended.set)
            orders.say("watching", thread_id)
            await ended.wait()
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
            await app.ainvoke(None, {"configurable": {"thread_id": thread_id}}, durability="sync")
            orders.say("recovered", thread_id)


class Stage:
    """The processes of one measurement."""

    def __init__(self, made: World) -> None:
        self._scenario = made.scenario
        self.children = made.supervisors
        self.rss: list[float] = []

    async def start(self, role: Any, *arguments: Any, **options: Any) -> Child:
        child = Child(partial(role, **options), self._scenario, *arguments)
        self.children.append(child)
        return child

    async def warm(self, threads: list[str]) -> tuple[Child, Child]:
        """Start everybody; return the supervisor and the bare recoverer."""
        if self._scenario.sentinel != "off":
            await (await self.start(sentinel)).until("ready")
        peers = [await self.start(peer, name, threads) for name in PEERS]
        guard, plain = await self.start(supervisor), await self.start(bare)
        for child in (*peers, guard, plain):
            await child.until("ready")
        # Until silence counts, too.
        await asyncio.sleep(settings_for(self._scenario, "x").silence_seconds * 2 + 1)
        return guard, plain

    async def agent_in_node(self, thread_id: str, *, owns: bool) -> Child:
        child = await self.start(victim, thread_id, owns=owns)
        await child.until("in node")
        await asyncio.sleep(SETTLING_SECONDS)
        self.rss.append(psutil.Process(child.pid).memory_info().rss / 2**20)
        return child

    async def revived(self, guard: Child, thread_id: str) -> dict[str, float]:
        """Kill an agent; return when the supervisor reached each stage, in seconds since."""
        child = await self.agent_in_node(thread_id, owns=True)
        at, word_at = killed(child.pid)
        _, _, status, reasons, reached = await guard.until("recovered", thread_id)
        if status != "resumed" or reasons:
            raise SystemExit(f"{thread_id}: {status}, {reasons}")
        child.kill()
        moments = {**reached, "kernel's word": word_at}
        return {name: moment - at for name, moment in moments.items()}

    async def run_on(self, plain: Child, thread_id: str) -> float:
        """Kill an agent that owns nothing; return when the bare recoverer was in its node."""
        child = await self.agent_in_node(thread_id, owns=False)
        plain.tell(child.pid, thread_id)
        await plain.until("watching", thread_id)
        at, _ = killed(child.pid)
        _, _, next_at = await plain.until("next node", thread_id)
        await plain.until("recovered", thread_id)
        child.kill()
        return float(next_at - at)


async def with_sentinel(made: World, kills: int) -> dict[str, Any]:
    """The supervisor's kills, and the bare recoverer's between them: both see the same machine."""
    stage = Stage(made)
    numbers = range(-WARM_UP, kills)
    threads = [f"thread-{WARM_UP + number}" for number in numbers]
    guard, plain = await stage.warm(threads)
    times: dict[str, list[float]] = {name: [] for name in STAGES}
    yardstick: list[float] = []
    for number, thread_id in zip(numbers, threads, strict=True):
        since_kill = await stage.revived(guard, thread_id)
        if number >= 0:
            for name, seconds in since_kill.items():
                times[name].append(seconds)
        if number % 2 == 0:
            yardstick.append(await stage.run_on(plain, f"bare-{thread_id}"))
    return {
        "kills": kills,
        "rss_mb": round(statistics.median(stage.rss)),
        "stages": {name: figures(times[name]) for name in STAGES},
        "from the kernel's word": figures(
            [a - b for a, b in zip(times["next node"], times["kernel's word"], strict=True)]
        ),
        "yardstick": figures(yardstick[WARM_UP // 2 :]),
    }


async def lost_host(made: World, kills: int) -> dict[str, Any]:
    """Kills about a second apart: they are noticed each by itself."""
    stage = Stage(made)
    threads = [f"thread-{number}" for number in range(kills)]
    guard, _ = await stage.warm(threads)
    settings = settings_for(made.scenario, "x")
    victims = [await stage.agent_in_node(thread_id, owns=True) for thread_id in threads]
    killed_at, left = {}, []
    with ControlDatabase(settings.control_url) as control:
        for child, thread_id in zip(victims, threads, strict=True):
            await asyncio.sleep(made.random.uniform(0.5, 1.5))
            lease = control.lease_of(AGENT, thread_id)
            assert lease is not None
            left.append(lease.seconds_left)
            killed_at[thread_id], _ = killed(child.pid)
            child.kill()
    known, silent, node = [], [], []
    for thread_id, at in killed_at.items():
        _, _, known_at, silent_seconds = await guard.until("known", thread_id)
        _, _, next_at = await guard.until("next node", thread_id)
        known.append(known_at - at)
        silent.append(silent_seconds)
        node.append(next_at - at)
    return {
        "kills": kills,
        "limit_seconds": settings.silence_seconds * 2,
        "the lease runs out": figures(left),
        "known": figures(known),
        "silent when known": figures(silent),
        "next node": figures(node),
    }


async def measured(servers: str, database: str, kills: int, silent: int) -> dict[str, Any]:
    around = partial(world, servers, database, seed=1, interval=1.0, pause=3.0)
    async with around(sentinel="connect") as made:
        found = {"sentinel": await with_sentinel(made, kills)}
    async with around() as made:
        found["lost host"] = await lost_host(made, silent)
    return found


def print_sentinel(found: dict[str, Any]) -> None:
    print(
        f"{found['kills']} kills of a process of {found['rss_mb']} MB, milliseconds since the kill"
    )
    before = 0.0
    for name in STAGES:
        print_row(name, found["stages"][name], f"({found['stages'][name]['p50'] - before:+.2f})")
        before = found["stages"][name]["p50"]
    for name in ("from the kernel's word", "yardstick"):
        print_row(name, found[name])
    met = "met" if found["stages"]["next node"]["p50"] < TARGET_MS else "MISSED"
    print(f"target p50 < {TARGET_MS:g} ms: {met}")


def print_lost_host(found: dict[str, Any]) -> None:
    print(f"lost host, {found['kills']} kills, milliseconds since the kill")
    for name in ("the lease runs out", "known", "next node", "silent when known"):
        print_row(name, found[name])
    limit = 1_000 * found["limit_seconds"]
    met = "met" if found["next node"]["max"] <= limit else "MISSED"
    print(f"target within {limit:g} ms: {met}")


def print_row(name: str, row: dict[str, float], more: str = "") -> None:
    print(f"{name:>24}  p50 {row['p50']:>8} {more:>9}  p99 {row['p99']:>8}  max {row['max']:>8}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    options.add_argument("--kills", type=int, default=60)
    options.add_argument("--silent", type=int, default=15)
    options.add_argument("--json", type=Path, default=None)
    chosen = options.parse_args()
    loads = [os.getloadavg()[0]]
    with ExitStack() as stack:
        kafka, database = stack.enter_context(KafkaServer()), "sqlite"
        if chosen.database == "postgresql":
            server = stack.enter_context(PostgresServer())
            database = stack.enter_context(server.database())
        found = asyncio.run(
            measured(kafka.bootstrap_servers, database, chosen.kills, chosen.silent)
        )
    loads.append(os.getloadavg()[0])
    shown = " to ".join(f"{load:.1f}" for load in loads)
    print(f"{chosen.database}; {os.cpu_count()} cores, load {shown}, real Kafka, loopback")
    print_sentinel(found["sentinel"])
    print_lost_host(found["lost host"])
    file = chosen.json or Path(f"bench-results/revival-{chosen.database}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"cores": os.cpu_count(), "load": loads, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
