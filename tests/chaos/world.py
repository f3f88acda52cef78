"""One experiment: services, processes, and what is true of their workflows at the end."""

import asyncio
import random
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chaos.processes import Child, agent, peer, sentinel, supervisor
from chaos.scenario import FINAL, NODES, Scenario, workflow

from langgraph_peerctx.durability.fenced_checkpointer import FencedCheckpointer
from langgraph_peerctx.durability.ownership import Ownership
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.topics import topics_for
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.persistence.incidents import ControlDatabase


@dataclass
class World:
    """Agents and supervisors of one scenario, and its random numbers."""

    scenario: Scenario
    seed: int
    agents: dict[str, Child] = field(default_factory=dict)
    supervisors: list[Child] = field(default_factory=list)
    retired: list[Child] = field(default_factory=list)
    threads: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    async def start_agent(self, name: str, arm: Any = None, **elsewhere: Any) -> Child:
        """Start an agent, in place of the one before; it may see other addresses."""
        if name in self.agents:
            self.retired.append(self.agents[name])
        scenario = replace(self.scenario, **elsewhere)
        child = self.agents[name] = Child(agent, scenario, name, arm)
        await child.until("ready")
        return child

    async def start_sentinel(self) -> Child:
        child = Child(sentinel, self.scenario)
        self.retired.append(child)
        await child.until("ready")
        return child

    async def start_peer(self) -> Child:
        """Start a peer; who starts from now on places an order with it in each launch."""
        child = Child(peer, self.scenario)
        self.retired.append(child)
        _, port = await child.until("ready")
        self.scenario = replace(self.scenario, peer_port=port)
        return child

    async def start_supervisor(self, name: str, arm: Any = None) -> Child:
        child = Child(supervisor, self.scenario, name, arm)
        self.supervisors.append(child)
        await child.until("ready")
        return child

    def run(self, name: str, thread_id: str) -> Child:
        """Let an agent begin a launch."""
        self.threads.append((name, thread_id))
        child = self.agents[name]
        child.tell("run", thread_id)
        return child

    async def freeze_elsewhere_if_in_the_way(self, child: Child) -> None:
        """See that a frozen process is not inside a commit: on SQLite its files stay locked."""
        while child.is_stopped and self.is_locked():
            child.thaw()
            await asyncio.sleep(0.002)
            child.freeze()
            await child.stops_or_says("nothing")

    def is_locked(self) -> bool:
        """Tell whether anybody is inside a commit on one of SQLite's files."""
        if self.scenario.database != "sqlite":
            return False
        return any(map(_is_locked, Path(self.scenario.folder).glob("*.db")))

    async def ended(self, thread_id: str, within: float = 60) -> str:
        """Wait until a run has ended, whoever brought it there; return how."""
        name = self.agent_of(thread_id)
        deadline = time.monotonic() + within
        with ControlDatabase(self.scenario.control_url, timeout_seconds=20) as control:
            while True:
                run = await control.anewest_run(name, thread_id)
                if run is not None and not run.is_open:
                    return str(run.end_kind)
                assert time.monotonic() < deadline, (
                    f"{thread_id} has not ended: {run}, {control.incident_of(name, thread_id)}, "
                    f"{[s.said[-5:] for s in self.supervisors]}"
                )
                await asyncio.sleep(0.05)

    async def begun(self, thread_id: str, within: float = 30) -> None:
        """Wait until a launch is admitted."""
        deadline = time.monotonic() + within
        with ControlDatabase(self.scenario.control_url, timeout_seconds=20) as control:
            while control.newest_run(self.agent_of(thread_id), thread_id) is None:
                assert time.monotonic() < deadline, f"{thread_id} does not begin"
                await asyncio.sleep(0.01)

    async def in_the_middle(self, child: Child, thread_id: str) -> None:
        """Wait for a random moment of a launch: at its admission, or while a node is at work.

        The process itself tells how far it is, however busy the machine.
        """
        nodes = self.random.randint(0, len(NODES))
        if nodes == 0:
            await self.begun(thread_id)
        async with asyncio.timeout(60):
            while self._nodes_begun_by(child) < nodes:
                if child.has_said("refused", thread_id):
                    return
                await asyncio.sleep(0.002)
        await asyncio.sleep(self.random.uniform(0, self.scenario.work_seconds))

    def _nodes_begun_by(self, child: Child) -> int:
        lines = self.scenario.ledger.read_text().splitlines()
        return sum(line.startswith(f"{child.pid} ") for line in lines)

    def agent_of(self, thread_id: str) -> str:
        """Tell who was told to run a thread."""
        return next(name for name, thread in self.threads if thread == thread_id)

    def forget_the_sentinel(self) -> None:
        """Let those who start from now on expect none."""
        self.scenario = replace(self.scenario, sentinel="off")

    def seen(self, thread_id: str) -> list[tuple[Any, ...]]:
        """Return what supervisors saw of a thread."""
        return [said for said in self.everything_seen() if said[1] == thread_id]

    def everything_seen(self) -> list[tuple[Any, ...]]:
        """Return what supervisors saw."""
        for child in self.supervisors:
            child.hear()
        said = [said for child in self.supervisors for said in child.said]
        return [one for one in said if one[0] == "seen"]

    async def check(self) -> Counter[str]:
        """See that every workflow has ended as if nobody had disturbed it, and none twice."""
        kinds: Counter[str] = Counter()
        control = ControlDatabase(self.scenario.control_url, timeout_seconds=20)
        with control:
            async with self.scenario.checkpointer() as saver:
                app = workflow(self.scenario, saver, "nobody")
                for name, thread_id in self.threads:
                    await self.ended(thread_id)
                    run = control.newest_run(name, thread_id)
                    assert run is not None
                    assert run.end_kind == "returned", run
                    log, steps = await chain_of(app, control, thread_id)
                    assert log == FINAL, (thread_id, log)
                    assert steps == sorted(set(steps), reverse=True), (thread_id, steps)
                    incident = control.incident_of(name, thread_id)
                    if incident is None:
                        kinds["undisturbed"] += 1
                        continue
                    assert incident.status == "recovered", incident
                    assert incident.result is not None
                    kinds[str(incident.result["status"])] += 1
                    told = self.recovered(thread_id)
                    assert len(told) <= 1, f"recovered twice: {told}"
        return kinds

    def recovered(self, thread_id: str) -> list[tuple[Any, ...]]:
        for child in self.supervisors:
            child.hear()
        ran = ("resumed", "restarted")
        return [
            said
            for child in self.supervisors
            for said in child.said
            if said[:2] == ("recovered", thread_id) and said[2] in ran
        ]

    async def close(self) -> None:
        for child in [*self.agents.values(), *self.supervisors, *self.retired]:
            child.kill()


def _is_locked(file: Path) -> bool:
    """Tell whether a file stays locked for longer than a commit takes."""
    with closing(sqlite3.connect(file, timeout=0.25, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        connection.execute("ROLLBACK")
        return False


async def chain_of(
    app: Any, control: ControlDatabase, thread_id: str
) -> tuple[list[str], list[int]]:
    """Return the head's log, and the steps of the checkpoints that it descends from, newest first.

    The head is looked up as the fence does: by epoch, then by id.
    """
    outside = Ownership(control, owner_id="nobody", incarnation="nobody", ttl_seconds=60)
    fenced = FencedCheckpointer(app.checkpointer, outside)
    at: Any = {"configurable": {"thread_id": thread_id}}
    state = await app.copy({"checkpointer": fenced}).aget_state(at)
    assert state.next == (), (thread_id, state)
    steps = []
    found = await fenced.aget_tuple(at)
    while found is not None:
        steps.append(found.metadata["step"])
        found = found.parent_config and await fenced.aget_tuple(found.parent_config)
    await fenced.aclose()
    return state.values["log"], steps


@asynccontextmanager
async def world(servers: str, database: str, *, seed: int, **more: Any) -> AsyncIterator[World]:
    """Make topics and stores, as a deployment would; every process is gone at the end."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="s"))
        scenario = Scenario(
            servers=servers,
            folder=folder,
            database=database,
            sentinel_directory=place,
            **more,
        )
        settings = scenario.settings("maker")
        transport = KafkaTransport(settings.kafka)
        try:
            await transport.start()
            await transport.ensure_topics(topics_for(settings.kafka, [settings.requester_id]))
        finally:
            await transport.close()
        EventStore(settings.database_url).close()
        ControlDatabase(scenario.control_url, timeout_seconds=20).close()
        async with scenario.checkpointer() as saver:
            await saver.setup()
        scenario.ledger.touch()
        made = World(scenario=scenario, seed=seed)
        stack.push_async_callback(made.close)
        yield made
