"""Watch agents be lost and their work go on: `make demo`, or `python -m graphs.demo`.

Three agents in three processes launch a product together. In the first act the product agent is
killed by `kill -9` in the middle of a step: its peer has made the campaign and has answered, and
the answer is not written down. In the second it is frozen there, replaced, and thawed. Nobody calls
a recovery: a supervisor notices, takes the launch over, asks the peers what was done, and finishes
it. Beside that, the same launch runs undisturbed. The exit code is 0 if all end equal, nothing was
ordered twice, and the frozen one was refused when it came back.
"""

import asyncio
import contextlib
import json
import logging
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Column, Table

from graphs.team.peers import times_done
from graphs.team.scenario import (
    INVENTORY,
    MARKETING,
    PEERS,
    PRODUCT,
    SENTINEL,
    SUPERVISOR,
    TEAM,
    Scenario,
    mail_topic,
)
from langgraph_peerctx import EmbeddedBroker, KafkaConfig
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.topics import topics_for
from langgraph_peerctx.messaging.transport import TopicSpec

DEADLINE_SECONDS = 60.0
"""It takes about 15 s on two cores."""
EFFECT_OF_LOSS = "campaign"
COLOURS = {
    PRODUCT: "cyan",
    MARKETING: "magenta",
    INVENTORY: "green",
    SUPERVISOR: "yellow",
    SENTINEL: "blue",
}
KNOWN_BECAUSE = {"died": "the sentinel saw it end", "silent": "silent, its lease ran out"}
IN_DOUBT = {"reserve": "were the units reserved?", "campaign": "was the campaign made?"}
VERDICTS = {
    "seen": "yes, and repeats its answer",
    "not_seen": "no, and from who is gone it takes none any more",
    "cannot_tell": "nobody can tell",
}
CLAIMED, RESUMED = "load_checkpoint", "resume_workflow"
"""The steps of a recovery before which the launch is claimed, and with which it goes on."""
MOMENTS = {
    "known": "known",
    CLAIMED: "claimed",
    "answer": "answers",
    RESUMED: "resumed",
    "final": "finished",
}
PROMISE = (
    "Nobody called, and both lost launches ended like the undisturbed one: nothing was "
    "ordered twice, and the frozen agent was refused when it came back."
)

Event = dict[str, Any]


class Story:
    """What happens, told as it happens."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.chapter = "setting up"
        self._began = time.monotonic()
        self._blow_at = self._began

    def begin(self, chapter: str) -> None:
        """Begin the next chapter."""
        self.chapter = chapter
        self.console.rule(chapter)

    def strike(self, who: str, what: str, *, at: float) -> None:
        """Tell that somebody was struck; what follows is counted from then."""
        self._blow_at = at
        self.tell(who, f"[bold red]{what}[/]")

    def tell(self, who: str, what: str) -> None:
        """Tell one thing that somebody does, with the seconds since the beginning."""
        seconds = time.monotonic() - self._began
        line = Table.grid(
            Column(width=8), Column(width=16), Column(overflow="fold"), padding=(0, 1)
        )
        line.add_row(f"[dim]{seconds:5.1f} s[/]", f"[{COLOURS[who]}]{who}[/]", what)
        self.console.print(line)

    def hear(self, who: str, event: Event) -> None:
        """Tell what a process says of itself."""
        tellers: dict[str, Callable[[Event], str]] = {
            "ready": self._ready,
            "asking": lambda e: f"asks {e['peer']}: {e['kind']}",
            "work": lambda e: f"does what it was asked for: [bold]{e['kind']}[/]",
            "done_already": lambda e: f"has done it already: {e['kind']}",
            "answered": lambda e: f"has {e['peer']}'s answer",
            "dawdling": lambda e: f"has not written it down yet: [bold]{e['kind']}[/]",
            "step": lambda e: f"step done: {e['step']}",
            "known": self._known,
            "recovery": self._claimed,
            "answer": self._answer,
            "in_doubt": self._in_doubt,
            "final": self._final,
            "refused": lambda e: f"[bold red]refused[/]: {e['error']}, {escape(e['why'])}",
            "logged": lambda e: f"[dim]logs: {escape(e['text'])}[/]",
        }
        if told := tellers[event["event"]](event):
            self.tell(who, told)

    def _ready(self, event: Event) -> str:
        watched = f", watched by the {SENTINEL}" if event.get("watched_by") else ""
        return f"alive, process {event['pid']}{watched}"

    def _known(self, event: Event) -> str:
        why = KNOWN_BECAUSE.get(event["why"], event["why"])
        return f"[bold]knows it {self._after(event)}[/]: {why}"

    def _claimed(self, event: Event) -> str:
        return f"has claimed the launch {self._after(event)}" if event["step"] == CLAIMED else ""

    def _answer(self, event: Event) -> str:
        return f"{event['peer']} remembers {len(event['told'])} interactions"

    def _in_doubt(self, event: Event) -> str:
        name = event["effect_key"].partition("@")[0]
        self.tell(SUPERVISOR, f"[bold]in doubt[/]: {IN_DOUBT[name]}")
        self.tell(event["agent_id"], f"says: {VERDICTS[event['verdict']]}")
        return ""

    def _final(self, event: Event) -> str:
        if "status" not in event:
            return "[bold]finished[/]"
        return f"[bold]{event['status']} and finished {self._after(event)}[/]"

    def _after(self, event: Event) -> str:
        return f"after {(moment_of(event) - self._blow_at) * 1000:,.0f} ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover:
    """One launch whose process was lost, and who finished it.

    Attributes:
        blow_at: When the process was struck, by the clock that all share.
        said: What the supervisor said since.
        orders: Peer -> how often it has really done something in this launch.
        refused: What the lost process said when it came back, if it could.
    """

    blow_at: float
    said: list[Event]
    orders: dict[str, int]
    refused: Event | None = None

    @property
    def known(self) -> Event:
        """How the loss was noticed."""
        return next(event for event in self.said if event["event"] == "known")

    @property
    def final(self) -> Event:
        """How the recovery ended."""
        return next(event for event in self.said if event["event"] == "final")

    @property
    def told(self) -> dict[str, list[dict[str, Any]]]:
        """Peer -> the interactions that it remembered, as JSON."""
        return {event["peer"]: event["told"] for event in self.said if event["event"] == "answer"}

    @property
    def moments(self) -> dict[str, float]:
        """What happened when, in seconds after the blow; the last answer, if there are several."""
        names = [(MOMENTS.get(e.get("step") or e["event"]), e) for e in self.said]
        return {name: moment_of(event) - self.blow_at for name, event in names if name}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How it ended.

    Attributes:
        uninterrupted: The final state of the launch that nobody disturbed.
        orders: Peer -> how often it has really done something in that.
        killed: The launch whose process was killed.
        frozen: The launch whose process was frozen and came back.
    """

    uninterrupted: dict[str, Any]
    orders: dict[str, int]
    killed: Takeover
    frozen: Takeover

    @property
    def shortfalls(self) -> list[str]:
        """What is promised and has not come true."""
        found: list[str] = []
        for name, takeover in (("killed", self.killed), ("frozen", self.frozen)):
            if takeover.final["status"] != "resumed":
                found.append(f"the {name} launch is {takeover.final['status']}")
            if not self.is_equal(takeover):
                found.append(f"the {name} launch ended in another state")
            if takeover.orders != self.orders:
                found.append(f"the {name} launch ordered {takeover.orders}")
        refused = self.frozen.refused or {}
        if refused.get("error") != "StaleOwnerError":
            found.append("the frozen agent was not refused")
        if refused.get("state") != self.frozen.final["state"]:
            found.append("the frozen agent found another state than its successor's")
        return found

    def is_equal(self, takeover: Takeover) -> bool:
        """Tell whether a launch ended as if undisturbed, but for what its recovery brought home."""
        return without_context(self.uninterrupted) == without_context(takeover.final["state"])


class Member:
    """One process of the team, and what it says."""

    def __init__(self, role: str, process: asyncio.subprocess.Process, story: Story) -> None:
        self.role = role
        self.process = process
        self.said: list[Event] = []
        self._story = story
        self._more = asyncio.Event()
        self._hearing = asyncio.create_task(self._hear(), name=f"hear-{role}")

    async def until(self, event: str, **details: Any) -> Event:
        """Wait until the process says this.

        Raises:
            RuntimeError: If it ends without.
        """
        wanted = {"event": event, **details}
        while True:
            for said in self.said:
                if wanted.items() <= {name: said.get(name) for name in wanted}.items():
                    return said
            if self._hearing.done():
                raise RuntimeError(f"{self.role} ended before it said {event!r}")
            self._more.clear()
            await self._more.wait()

    def go_on(self) -> None:
        """Tell the process not to wait any more."""
        assert self.process.stdin is not None  # noqa: S101 - we asked for a pipe
        self.process.stdin.write(b"\n")

    async def end(self) -> None:
        """End the process, frozen or not, and wait until it is gone."""
        for number in (signal.SIGTERM, signal.SIGCONT):
            self._signal(number)
        try:
            async with asyncio.timeout(5):
                await self.process.wait()
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await self.process.wait()
        await self._hearing

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

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
    """Run one process of the team; it is gone at the end of the block, whatever happens.

    Ctrl-C is ours alone: its session is its own. Should we be killed, it sees its input end.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "graphs.team.process", role, scenario.as_json(), *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        start_new_session=True,
        limit=2**20,
    )
    running = Member(role, process, story)
    try:
        yield running
    finally:
        await running.end()


async def play(scenario: Scenario, story: Story) -> Outcome:
    """Run the launch three times: undisturbed, killed, and frozen."""
    async with contextlib.AsyncExitStack() as stack:
        await make_topics(scenario)
        watchman = [SENTINEL] if scenario.sentinel_directory else []
        for roles in ([*watchman, *PEERS], [SUPERVISOR]):  # who is watched asks for the watchman
            started = [await stack.enter_async_context(member(r, scenario, story)) for r in roles]
            await asyncio.gather(*(each.until("ready") for each in started))
        supervisor = started[-1]
        calm, orders = await undisturbed(scenario, story)
        return Outcome(
            uninterrupted=calm,
            orders=orders,
            killed=await killed(scenario, story, supervisor),
            frozen=await frozen(scenario, story, supervisor),
        )


async def undisturbed(scenario: Scenario, story: Story) -> tuple[dict[str, Any], dict[str, int]]:
    """Run a launch that nobody disturbs; return its final state, and what its peers did."""
    story.begin("a launch that nobody disturbs")
    thread_id = thread("calm")
    async with member(PRODUCT, scenario, story, thread_id) as agent:
        final = await agent.until("final")
        await agent.process.wait()  # it leaves by itself
    return final["state"], orders_in(scenario, thread_id)


async def killed(scenario: Scenario, story: Story, supervisor: Member) -> Takeover:
    """Kill a launch's process; the supervisor finishes the launch."""
    story.begin("act one: the same launch, and a kill")
    thread_id = thread("killed")
    async with member(PRODUCT, scenario, story, thread_id, EFFECT_OF_LOSS) as agent:
        await agent.until("dawdling")
        blow_at = time.monotonic()
        agent.process.kill()
        story.strike(PRODUCT, f"killed (kill -9 {agent.process.pid})", at=blow_at)
        await supervisor.until("final", thread_id=thread_id)
    return Takeover(
        blow_at=blow_at,
        said=since(blow_at, supervisor.said),
        orders=orders_in(scenario, thread_id),
    )


async def frozen(scenario: Scenario, story: Story, supervisor: Member) -> Takeover:
    """Freeze a launch's process; the supervisor finishes the launch, and then it comes back."""
    story.begin("act two: the same launch, and a freeze")
    thread_id = thread("frozen")
    async with member(PRODUCT, scenario, story, thread_id, EFFECT_OF_LOSS) as agent:
        await agent.until("dawdling")
        blow_at = await freeze(agent.process, scenario)
        story.strike(PRODUCT, f"frozen (kill -STOP {agent.process.pid})", at=blow_at)
        await supervisor.until("final", thread_id=thread_id)
        said = since(blow_at, supervisor.said)
        agent.process.send_signal(signal.SIGCONT)
        agent.go_on()
        story.tell(PRODUCT, f"[bold]thawed[/] (kill -CONT {agent.process.pid}), and goes on")
        refused = await agent.until("refused")
        await agent.process.wait()
    return Takeover(
        blow_at=blow_at, said=said, orders=orders_in(scenario, thread_id), refused=refused
    )


async def freeze(process: asyncio.subprocess.Process, scenario: Scenario) -> float:
    """Freeze a process, outside of any transaction; return when."""
    while True:
        blow_at = time.monotonic()
        process.send_signal(signal.SIGSTOP)
        shared = (scenario.control, scenario.checkpoints)
        if not any([await asyncio.to_thread(is_locked, database) for database in shared]):
            return blow_at
        # Frozen inside a commit to SQLite, it would keep the file from everybody.
        process.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.05)


def is_locked(database: str) -> bool:
    """Tell whether somebody keeps others from writing to an SQLite file."""
    if database.startswith("postgresql"):
        return False
    file = database.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(file, timeout=0.2)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
    return False


async def make_topics(scenario: Scenario) -> None:
    """Make the protocol's topics and the team's own, as a deployment would."""
    config = KafkaConfig(bootstrap_servers=scenario.bootstrap_servers)
    transport = KafkaTransport(config)
    await transport.start()
    try:
        mail = [TopicSpec(name=mail_topic(agent_id)) for agent_id in TEAM]
        await transport.ensure_topics([*topics_for(config, [SUPERVISOR]), *mail])
    finally:
        await transport.close()


def thread(name: str) -> str:
    """Return a fresh thread's id."""
    return f"{name}-{uuid4().hex[:8]}"


def since(moment: float, said: Iterable[Event]) -> list[Event]:
    """Return what was said since a moment."""
    return [event for event in said if event["at"] >= moment]


def moment_of(event: Event) -> float:
    """Return when something happened; of what takes its time, when it began."""
    at: float = event["at"]
    return at - float(event.get("seconds", 0.0))


def orders_in(scenario: Scenario, thread_id: str) -> dict[str, int]:
    """Return how often each peer has really done something in a thread, by its own books."""
    return {peer: times_done(scenario.stores[peer], peer, thread_id) for peer in PEERS}


def without_context(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state without what the recovery brought home."""
    return {name: value for name, value in state.items() if name != "peer_context"}


def show(outcome: Outcome, console: Console) -> None:
    """Show who knew what, how fast it went, and the ends side by side."""
    console.print()
    killed = outcome.killed
    for table in (known_by_peers(killed), settled(killed), times(outcome), ends(outcome)):
        console.print(table)
    if outcome.shortfalls:
        console.print(Panel(f"[bold red]{escape('; '.join(outcome.shortfalls))}[/]", expand=False))
    else:
        console.print(Panel(f"[bold green]{PROMISE}[/]", expand=False))


def known_by_peers(takeover: Takeover) -> Table:
    """Return what the peers contributed."""
    table = Table("peer", "what it remembered", "kind", title="what the peers contributed")
    for peer, told in sorted(takeover.told.items()):
        letters = (i for i in reversed(told) if i["kind"] != "effect")  # a receipt repeats them
        for interaction in letters:
            table.add_row(peer, json.dumps(interaction["payload"]), interaction["kind"])
    return table


def settled(takeover: Takeover) -> Table:
    """Return what became of each effect, and who says so."""
    table = Table("effect", "peer", "attempts", "outcome", title="what became of the effects")
    for effect in takeover.final["effects"]:
        known = {"own": "written down", "peer": "the peer's word"}.get(effect["source"])
        table.add_row(effect["name"], effect["peer"], str(effect["attempt"]), known)
    return table


def times(outcome: Outcome) -> Table:
    """Return what happened when, after each blow."""
    table = Table("milliseconds", *MOMENTS.values(), "known by", title="nobody called")
    for blow, takeover in (("killed", outcome.killed), ("frozen", outcome.frozen)):
        found = takeover.moments
        moments = (f"{found[n] * 1000:,.0f}" if n in found else "" for n in MOMENTS.values())
        table.add_row(blow, *moments, takeover.known["by"])
    return table


def ends(outcome: Outcome) -> Table:
    """Return how all launches ended, side by side."""
    table = Table(Column(no_wrap=True), "undisturbed", "killed", "frozen")
    table.title = "how the launches ended"
    lost = (outcome.killed, outcome.frozen)
    for name, value in without_context(outcome.uninterrupted).items():
        table.add_row(name, str(value), *(str(t.final["state"].get(name)) for t in lost))
    for peer in PEERS:
        counts = (outcome.orders, *(t.orders for t in lost))
        table.add_row(f"done by {peer}", *(str(count[peer]) for count in counts))
    return table


def main() -> int:
    """Run the demonstration on the embedded broker and SQLite; return the exit code."""
    # Broken off, a child may have been waited for already; asyncio warns of that.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    console = Console()
    story = Story(console)
    console.print(
        Panel(
            "Three agents; one is killed, one is frozen, and nobody calls a recovery.",
            title="langgraph-peerctx",
            expand=False,
        )
    )
    with tempfile.TemporaryDirectory() as folder, EmbeddedBroker() as broker:
        scenario = Scenario.in_folder(
            broker.bootstrap_servers, folder, sentinel_directory=f"{folder}/s"
        )
        try:
            outcome = asyncio.run(bounded(scenario, story))
        except (TimeoutError, RuntimeError) as error:
            console.print(Panel(f"[bold red]{escape(str(error))}[/]", expand=False))
            return 1
        except (KeyboardInterrupt, asyncio.CancelledError):
            console.print("interrupted: every process is ended")
            return 130
    show(outcome, console)
    return 0 if not outcome.shortfalls else 1


async def bounded(scenario: Scenario, story: Story) -> Outcome:
    """Play within the deadline, and end every process also when we are told to end.

    Raises:
        TimeoutError: If it has not ended by then.
        RuntimeError: If a process ended that should not.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - we run in one
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await play(scenario, story)
    except TimeoutError:
        raise TimeoutError(
            f"not done within {DEADLINE_SECONDS:.0f} s; it came as far as: {story.chapter}"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
