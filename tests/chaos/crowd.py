"""Processes that host many agents each, all at work, and what they cost."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
from chaos.processes import Child, Orders
from chaos.scenario import Scenario
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from sqlalchemy import event
from typing_extensions import TypedDict

from langgraph_peerctx.lifecycle import peer_context_lifespan
from langgraph_peerctx.messaging.transport import Record
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.protocol.codec import decode
from langgraph_peerctx.protocol.messages import Heartbeat


class Waiting(TypedDict):
    done: bool


def waiting_workflow(over: asyncio.Event) -> Any:
    async def wait(_state: Waiting) -> dict[str, Any]:
        await over.wait()
        return {"done": True}

    builder = StateGraph(Waiting)
    builder.add_node("wait", wait)
    builder.add_edge(START, "wait")
    builder.add_edge("wait", END)
    return builder.compile(checkpointer=InMemorySaver(), name="waiting")


async def host(orders: Orders, scenario: Scenario, name: str, agents: list[str]) -> None:
    """Host agents, each with a run that stays open until `end`; count statements meanwhile."""
    over = asyncio.Event()
    app = waiting_workflow(over)
    settings = scenario.settings(name)
    async with peer_context_lifespan(agents=agents, settings=settings) as runtime:
        ownership = await runtime.own()
        statements = counted(ownership.control)
        orders.say("ready")
        await orders.told()
        async with asyncio.TaskGroup() as runs:
            for agent_id in agents:
                place: Any = {"configurable": {"thread_id": f"thread-of-{agent_id}"}}
                runs.create_task(own_runs(app, agent_id=agent_id).ainvoke({"done": False}, place))
            while len(ownership.held) < len(agents):
                await asyncio.sleep(0.01)
            orders.say("running")
            while (await orders.told())[0] == "count":
                orders.say("counted", dict(statements), len(ownership.held))
            over.set()
        orders.say("ended")


def counted(control: ControlDatabase) -> Counter[str]:
    """Count the statements that go to the database from now on, by their first three words."""
    statements: Counter[str] = Counter()

    def count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements[" ".join(statement.split()[:3])] += 1

    event.listen(control._engine, "before_cursor_execute", count)
    return statements


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one process has used by now."""

    cpu_seconds: float
    rss_mb: float
    renewals: int
    statements: int
    held: int


@dataclass
class Crowd:
    """All processes, by their process ids."""

    children: dict[str, Child] = field(default_factory=dict)

    async def costs(self) -> dict[str, Cost]:
        """Ask everybody what it has used."""
        found = {}
        for name, child in self.children.items():
            process = psutil.Process(child.pid)
            child.said = [said for said in child.said if said[0] != "counted"]
            child.tell("count")
            _, statements, held = await child.until("counted")
            times = process.cpu_times()
            found[name] = Cost(
                cpu_seconds=times.user + times.system,
                rss_mb=process.memory_info().rss / 2**20,
                renewals=statements.get("UPDATE peerctx_leases SET", 0),
                statements=sum(statements.values()),
                held=held,
            )
        return found

    async def end(self) -> None:
        """Let all runs end."""
        for child in self.children.values():
            child.tell("end")
        for child in self.children.values():
            await child.until("ended")


@asynccontextmanager
async def crowd(scenario: Scenario, processes: int, agents: int) -> AsyncIterator[Crowd]:
    """Start so many processes with so many agents each, whose runs are under way."""
    made = Crowd()
    try:
        for number in range(processes):
            name = f"host-{number}"
            names = [f"agent-{number}-{other}" for other in range(agents)]
            made.children[name] = Child(host, scenario, name, names)
        for child in made.children.values():
            await child.until("ready", within=120)
        for child in made.children.values():  # one after the other: it is one SQLite file
            child.tell("run")
            await child.until("running")
        yield made
    finally:
        for child in made.children.values():
            child.kill()


@dataclass
class Beats:
    """The heartbeats on a presence topic from now on."""

    taken: list[tuple[float, str, str]] = field(default_factory=list)

    def take(self, record: Record) -> None:
        message = decode(record.value)
        if isinstance(message, Heartbeat):
            at = record.timestamp_ms / 1_000
            self.taken.append((at, message.process_id, message.incarnation))

    def between(self, begin: float, end: float) -> Counter[tuple[str, str]]:
        """Count them by process and incarnation; times are the broker's, which is on this host."""
        return Counter((process, life) for at, process, life in self.taken if begin <= at < end)


async def until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.time()))
