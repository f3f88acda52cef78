"""Watch an agent die and its work go on: `make demo`, or `python -m graphs.demo`.

Three agents in three processes launch a product together. The product agent is killed by
`kill -9` in the middle of a step, after its peer has acted and before anything of it was stored.
A recovery process asks the peers what they remember, and finishes the launch. Beside it, the same
launch runs without a crash. The exit code is 0 if both end equal and nothing was ordered twice.
"""

import asyncio
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from graphs.team.scenario import (
    INVENTORY,
    MARKETING,
    PEERS,
    PRODUCT,
    RECOVERY,
    TEAM,
    Scenario,
    mail_topic,
)
from langgraph_peerctx import EmbeddedBroker, EventStore, KafkaConfig
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.topics import topics_for
from langgraph_peerctx.messaging.transport import TopicSpec

DEADLINE_SECONDS = 45.0
STEP_OF_DEATH = "advertise"
COLOURS = {PRODUCT: "cyan", MARKETING: "magenta", INVENTORY: "green", RECOVERY: "yellow"}

Event = dict[str, Any]


class Story:
    """What happens, told as it happens."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began = time.monotonic()

    def tell(self, who: str, what: str) -> None:
        """Tell one thing that somebody does, with the seconds since the beginning."""
        seconds = time.monotonic() - self._began
        colour = COLOURS.get(who, "white")
        self.console.print(f"[dim]{seconds:5.1f} s[/]  [{colour}]{who:<16}[/] {what}")

    def hear(self, who: str, event: Event) -> None:
        """Tell what a process says of itself."""
        tellers: dict[str, Callable[[Event], str]] = {
            "ready": lambda e: f"alive, process {e['pid']}",
            "asking": lambda e: f"asks {e['peer']}: {e['kind']}",
            "work": lambda e: f"does what it was asked for: [bold]{e['kind']}[/]",
            "answered": lambda e: f"has {e['peer']}'s answer",
            "dawdling": lambda e: f"is in the middle of [bold]{e['step']}[/], nothing stored of it",
            "step": lambda e: f"step done: {e['step']}",
            "remembered": lambda e: f"does not ask again: {e['by']} remembers the {e['kind']}",
            "answer": lambda e: f"{e['peer']} remembers {len(e['told'])} interactions",
            "recovery": lambda e: f"[dim]{e['step']}: {e['status']}[/]",
            "final": lambda _: "[bold]finished[/]",
        }
        self.tell(who, tellers[event["event"]](event))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How it ended.

    Attributes:
        uninterrupted: The final state of the launch that nobody disturbed.
        recovered: What the recovery process said at its end.
        told: Peer -> the interactions that it remembered, as JSON.
        orders: Peer -> how often it was asked to act in the launch that was killed.
    """

    uninterrupted: dict[str, Any]
    recovered: Event
    told: dict[str, list[dict[str, Any]]]
    orders: dict[str, int]

    @property
    def equal(self) -> bool:
        """Whether both launches ended alike, but for what the recovery brought home."""
        return without_context(self.uninterrupted) == without_context(self.recovered["state"])

    @property
    def good(self) -> bool:
        """Whether all that is promised has come true."""
        once = all(count == 1 for count in self.orders.values())
        return self.equal and once and self.recovered["status"] == "resumed"


class Member:
    """One process of the team, and what it says."""

    def __init__(self, role: str, process: asyncio.subprocess.Process, story: Story) -> None:
        self.role = role
        self.process = process
        self.said: list[Event] = []
        self._story = story
        self._more = asyncio.Event()
        self._hearing = asyncio.create_task(self._hear(), name=f"hear-{role}")

    async def until(self, event: str) -> Event:
        """Wait until the process says this.

        Raises:
            RuntimeError: If it ends without.
        """
        while True:
            for said in self.said:
                if said["event"] == event:
                    return said
            if self._hearing.done():
                raise RuntimeError(f"{self.role} ended before it said {event!r}")
            self._more.clear()
            await self._more.wait()

    async def end(self, *, by: signal.Signals = signal.SIGTERM) -> None:
        """End the process, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(by)
        try:
            async with asyncio.timeout(5):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        await self._hearing

    async def _hear(self) -> None:
        assert self.process.stdout is not None  # noqa: S101 - we asked for a pipe
        async for line in self.process.stdout:
            event = json.loads(line)
            self.said.append(event)
            self._story.hear(self.role, event)
            self._more.set()
        self._more.set()


@contextlib.asynccontextmanager
async def member(
    role: str, scenario: Scenario, story: Story, *arguments: str
) -> AsyncIterator[Member]:
    """Run one process of the team; it is gone at the end of the block, whatever happens."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "graphs.team.process", role, scenario.as_json(), *arguments),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    running = Member(role, process, story)
    try:
        yield running
    finally:
        await running.end()


async def play(scenario: Scenario, story: Story) -> Outcome:
    """Run both launches, kill one of them, recover it."""
    calm, doomed = f"calm-{uuid4().hex[:8]}", f"doomed-{uuid4().hex[:8]}"
    async with contextlib.AsyncExitStack() as stack:
        await make_topics(scenario)
        peers = [await stack.enter_async_context(member(role, scenario, story)) for role in PEERS]
        await asyncio.gather(*(peer.until("ready") for peer in peers))

        story.console.rule("a launch that nobody disturbs")
        async with member(PRODUCT, scenario, story, calm) as undisturbed:
            uninterrupted = await undisturbed.until("final")

        story.console.rule("the same launch, and a kill")
        async with member(PRODUCT, scenario, story, doomed, STEP_OF_DEATH) as victim:
            await victim.until("dawdling")
            victim.process.kill()
            await victim.process.wait()
            story.tell(PRODUCT, f"[bold red]killed[/] (kill -9 {victim.process.pid})")

        story.console.rule("the recovery")
        async with member(RECOVERY, scenario, story, doomed) as recoverer:
            recovered = await recoverer.until("final")
    return Outcome(
        uninterrupted=uninterrupted["state"],
        recovered=recovered,
        told={e["peer"]: e["told"] for e in recoverer.said if e["event"] == "answer"},
        orders={peer: orders_of(scenario, peer, doomed) for peer in PEERS},
    )


async def make_topics(scenario: Scenario) -> None:
    """Make the protocol's topics and the team's own, as a deployment would."""
    config = KafkaConfig(bootstrap_servers=scenario.bootstrap_servers)
    transport = KafkaTransport(config)
    await transport.start()
    try:
        mail = [TopicSpec(name=mail_topic(agent_id)) for agent_id in TEAM]
        await transport.ensure_topics([*topics_for(config, [RECOVERY]), *mail])
    finally:
        await transport.close()


def orders_of(scenario: Scenario, peer: str, thread_id: str) -> int:
    """Return how often a peer was asked to act in a thread, by its own event store."""
    with EventStore(scenario.stores[peer]) as store:
        seen = store.interactions_of(peer, thread_id=thread_id)
    kinds = Counter(interaction.kind for interaction in seen)
    return sum(count for kind, count in kinds.items() if not kind.endswith("-done"))


def without_context(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state without what the recovery brought home."""
    return {name: value for name, value in state.items() if name != "peer_context"}


def show(outcome: Outcome, console: Console) -> None:
    """Show who knew what, and the two ends side by side."""
    known = Table("peer", "what it remembered", "kind", title="what the peers contributed")
    for peer, told in sorted(outcome.told.items()):
        for interaction in reversed(told):
            known.add_row(peer, json.dumps(interaction["payload"]), interaction["kind"])
    ends = Table("", "never interrupted", "killed and recovered", title="how both launches ended")
    recovered = outcome.recovered["state"]
    for name, value in without_context(outcome.uninterrupted).items():
        ends.add_row(name, str(value), str(recovered.get(name)))
    for peer, count in outcome.orders.items():
        ends.add_row(f"orders to {peer}", "1", str(count))
    console.print()
    console.print(known)
    console.print(ends)
    verdict = "[bold green]equal, and nothing happened twice[/]"
    if not outcome.good:
        verdict = f"[bold red]not equal[/]: {outcome.recovered}"
    console.print(Panel(verdict, expand=False))


def main() -> int:
    """Run the demonstration on the embedded broker and SQLite; return the exit code."""
    console = Console()
    story = Story(console)
    console.print(
        Panel("Three agents, one kill -9, one recovery.", title="langgraph-peerctx", expand=False)
    )
    with tempfile.TemporaryDirectory() as folder, EmbeddedBroker() as broker:
        scenario = Scenario(
            bootstrap_servers=broker.bootstrap_servers,
            stores={who: f"sqlite:///{folder}/{who}.db" for who in (*TEAM, RECOVERY)},
            checkpoints=f"{folder}/checkpoints.db",
        )
        outcome = asyncio.run(bounded(scenario, story))
    show(outcome, console)
    return 0 if outcome.good else 1


async def bounded(scenario: Scenario, story: Story) -> Outcome:
    """Play within the deadline."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        return await play(scenario, story)


if __name__ == "__main__":
    sys.exit(main())
