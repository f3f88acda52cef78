"""The experiment: services and processes that serve all kills, and one kill after the other."""

import asyncio
import logging
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chaos.scenario import Scenario
from matrix import processes
from matrix.cells import Cell
from matrix.judging import Ending, Kill, Uninterrupted, judged
from matrix.places import KILLED, Deadly, passed
from matrix.processes import Heard, Job, started
from matrix.trading import SYSTEMS, Ledger, System
from matrix.workflows import WORKFLOWS, WorkflowName

from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.topics import topics_for
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.persistence.incidents import ControlDatabase, Incident

_logger = logging.getLogger(__name__)

BACK_SECONDS = 3.0
"""How long after the kill a peer that was down is started again: a recovery finds it away first."""
AGAIN_SECONDS = 1.0
"""How long whoever recovers by hand waits before the next try."""
PATIENCE_SECONDS = 90.0
MOST_ATTEMPTS = 30
MOST_QUESTIONS = 10
"""How often whoever recovers by hand asks a peer that is there, and has not told in time."""
LOOK_SECONDS = 0.05
KILL_ATTEMPTS = 3
_STORES = ("control.db", "events.db", "threads.db")
_SLUGS: dict[System, str] = {"langgraph": "langgraph", "no peers": "alone", "peers": "peers"}
_REFUSED = "ConnectionRefusedError"
_IN_DOUBT = ("InDoubtError", "in_doubt")


class NotKilledError(Exception):
    """An agent ended before it came to the place of its kill."""


@dataclass(kw_only=True)
class Peer:
    """A peer of one system: its name, address and ledger, and its process, while it has one."""

    name: str
    port: int
    file: Path
    system: System
    process: Heard | None = None

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.file)


@dataclass
class Experiment:
    """What serves all kills.

    Attributes:
        scenario: Where everybody finds each other.
        folder: Everything is in it, and is gone with it.
    """

    scenario: Scenario
    folder: Path
    stack: AsyncExitStack
    peers: dict[System, Peer] = field(default_factory=dict)
    supervisors: dict[System, Heard] = field(default_factory=dict)
    controls: dict[System, ControlDatabase] = field(default_factory=dict)
    plain: dict[WorkflowName, Uninterrupted] = field(default_factory=dict)

    async def begin(self) -> None:
        """Start what serves all kills, and see what undisturbed runs do."""
        for name in ("places", "peers", "stores"):
            (self.folder / name).mkdir()
        await self._enter(processes.sentinel, self.scenario)
        self.alone = await self._enter_unready(processes.alone)
        for system in SYSTEMS:
            self._stores_for(_SLUGS[system])
            peer = self._peer(system, f"peer-{_SLUGS[system]}", self.stack)
            self.stack.callback(_end, peer)
            await self._start(peer)
            self.peers[system] = peer
            if system == "langgraph":
                continue
            scenario = self._kept(system)
            self.controls[system] = self.stack.enter_context(
                ControlDatabase(scenario.control_url, timeout_seconds=20)
            )
            self.supervisors[system] = await self._enter(
                processes.supervisor, scenario, self._places, system
            )
        for workflow in WORKFLOWS:
            self.plain[workflow] = await self._undisturbed(workflow)

    # One kill

    async def kill(self, cell: Cell, system: System) -> Kill:
        """Kill one system's agent in one way, let the system do what it can, and judge it.

        An agent that fails by itself before it comes to its place (SQLite's bare checkpointer may
        find its file locked) was not killed: another one is.
        """
        for attempt in range(KILL_ATTEMPTS):
            case = f"{_SLUGS[system]}-{cell.number}" + (f"-{attempt}" if attempt else "")
            try:
                return await self._kill(cell, system, case)
            except NotKilledError as error:
                _logger.warning("%s", error)
        raise NotKilledError(f"{cell} of {system}: none of {KILL_ATTEMPTS} agents got there")

    async def _kill(self, cell: Cell, system: System, case: str) -> Kill:
        async with AsyncExitStack() as stack:
            peer = self.peers[system]
            if cell.peer != "alive":
                peer = self._peer(system, f"peer-{case}", stack)
                stack.callback(_end, peer)
                await self._start(peer)
            job = Job(
                system=system,
                workflow=cell.workflow,
                durability=cell.durability,
                case=case,
                peer=peer.name,
                port=peer.port,
            )
            scenario = self._kept(system)
            if cell.store == "lost" or system == "langgraph":  # nobody watches over it there
                scenario = replace(scenario, folder=str(self._stores_for(f"{case}-first")))
            others = () if cell.peer == "alive" or peer.process is None else (peer.process.pid,)
            deadly = Deadly(case=case, place=cell.place.name, others=others)
            agent = Heard(processes.agent, scenario, self._places, job, deadly)
            stack.callback(agent.kill)
            known_at = await agent.death()
            trace = passed(self.folder / "places", case)
            if not any(passed.place == KILLED for passed in trace):
                raise NotKilledError(f"{cell} of {system}: it was not killed: {trace}")
            if cell.store == "lost":
                shutil.rmtree(scenario.folder)
                scenario = replace(scenario, folder=str(self._stores_for(f"{case}-new")))
            if cell.peer == "down":
                back = self._come_back(peer, trace[-1].at + BACK_SECONDS)
                stack.push_async_callback(_awaited, asyncio.create_task(back))
            ending = await self._follow(cell, job, scenario, known_at)
            return judged(
                cell,
                system,
                ending,
                applied=peer.ledger.applied(case),
                trace=passed(self.folder / "places", case),
                plain=self.plain[cell.workflow],
            )

    async def _follow(
        self,
        cell: Cell,
        job: Job,
        scenario: Scenario,
        known_at: float,
    ) -> Ending:
        if job.system == "langgraph":
            return await self._by_hand(cell, job, scenario, known_at)
        if cell.store == "lost":
            async with _operated(scenario, self._places, job) as operator:
                return await self._operated(cell, job, operator, known_at)
        return await self._supervised(cell, job, known_at)

    async def _by_hand(
        self,
        cell: Cell,
        job: Job,
        scenario: Scenario,
        known_at: float,
    ) -> Ending:
        """Let LangGraph go on, and try again while the peer may come back."""
        attempts = 0
        while True:
            attempts += 1
            self.alone.tell("recover", job, scenario.folder)
            how, *rest = await self.alone.word("result", job.case)
            if how == "ended":
                return _ended(known_at, rest, attempts=attempts)
            if rest[0] != _REFUSED or _is_in_vain(cell, attempts):
                return _failed(known_at, f"{rest[0]}: {rest[1]}", attempts=attempts)
            await asyncio.sleep(AGAIN_SECONDS)

    async def _operated(
        self,
        cell: Cell,
        job: Job,
        operator: Heard,
        known_at: float,
    ) -> Ending:
        """Recover a thread of which nothing is left, as an operator does."""
        attempts, asked = 0, False
        while True:
            attempts += 1
            operator.tell("recover")
            _, status, reasons = await operator.word("recovered", job.case)
            said = f"{status}: {'; '.join(reasons)}"
            is_doubt = any(word in said for word in _IN_DOUBT)
            if status == "waiting_for_human" and not is_doubt:
                return await self._answered(cell, job, operator, known_at, asked=asked)
            if status in {"resumed", "restarted", "already_finished"}:
                operator.tell("state")
                _, *rest = await operator.word("result", job.case)
                return _ended(known_at, rest, attempts=attempts, asked_meanwhile=asked)
            asked = asked or is_doubt
            nobody = is_doubt and (job.system == "no peers" or cell.peer == "gone")
            is_slow = is_doubt and cell.peer == "alive" and attempts < MOST_QUESTIONS
            if nobody or (_is_in_vain(cell, attempts) and not is_slow):
                return _failed(known_at, said, attempts=attempts)
            await asyncio.sleep(AGAIN_SECONDS)

    async def _supervised(self, cell: Cell, job: Job, known_at: float) -> Ending:
        """Watch what a supervisor does by itself."""
        supervisor, control = self.supervisors[job.system], self.controls[job.system]
        begun_at, asked = time.monotonic(), False
        while True:
            incident = await control.aincident_of(job.case, job.case)
            for at, _ in supervisor.words("seen", job.case)[:1]:
                known_at = at
            if incident is not None and incident.status == "recovered":
                if incident.result and incident.result["status"] == "waiting_for_human":
                    return await self._answered(cell, job, supervisor, known_at, asked=asked)
                supervisor.tell("state", job)
                _, *rest = await supervisor.word("result", job.case)
                attempts = incident.attempts
                return _ended(known_at, rest, attempts=attempts, asked_meanwhile=asked)
            if incident is not None and _stands_still(cell, job, incident):
                return _failed(known_at, _said(incident), attempts=incident.attempts)
            asked = asked or (incident is not None and incident.status == "waiting_for_human")
            if time.monotonic() > begun_at + PATIENCE_SECONDS:
                return _failed(known_at, f"too long: {_said(incident)}")
            await asyncio.sleep(LOOK_SECONDS)

    async def _answered(
        self,
        cell: Cell,
        job: Job,
        process: Heard,
        known_at: float,
        *,
        asked: bool,
    ) -> Ending:
        """Answer the workflow's own question, and see it end."""
        attempts, what = 0, "answer"
        while True:
            attempts += 1
            process.tell(what, job)
            how, *rest = await process.word("result", job.case)
            if how == "ended":
                return _ended(known_at, rest, attempts=attempts, asked_meanwhile=asked)
            if _is_in_vain(cell, attempts):
                return _failed(known_at, f"{rest[0]}: {rest[1]}", attempts=attempts)
            what = "again"
            await asyncio.sleep(AGAIN_SECONDS)

    # What serves

    async def _undisturbed(self, workflow: WorkflowName) -> Uninterrupted:
        """Run a workflow on each system; nobody dies, and all do the same."""
        found = []
        for system in SYSTEMS:
            peer, case = self.peers[system], f"{_SLUGS[system]}-plain-{workflow}"
            job = Job(
                system=system,
                workflow=workflow,
                durability="sync",
                case=case,
                peer=peer.name,
                port=peer.port,
            )
            agent = Heard(processes.agent, self._kept(system), self._places, job, None)
            try:
                _, log, left = await agent.word("result", case)
            finally:
                agent.kill()
            assert not left, f"{case} did not end: {left}"
            found.append(Uninterrupted(log=log, applied=peer.ledger.applied(case)))
        assert all(one == found[0] for one in found), found
        return found[0]

    @property
    def _places(self) -> str:
        return str(self.folder / "places")

    def _kept(self, system: System) -> Scenario:
        return replace(self.scenario, folder=str(self.folder / "stores" / _SLUGS[system]))

    def _stores_for(self, name: str) -> Path:
        """Make empty stores, as a deployment would."""
        folder = self.folder / "stores" / name
        folder.mkdir()
        for store in _STORES:
            shutil.copy(self.folder / store, folder / store)
        return folder

    def _peer(self, system: System, name: str, stack: AsyncExitStack) -> Peer:
        """Name a peer, and keep a port for it: bound here, and never listened to."""
        file = self.folder / "peers" / f"{name}.db"
        if system == "peers":
            shutil.copy(self.folder / "events.db", file)
        held = stack.enter_context(closing(socket.socket()))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        return Peer(name=name, port=held.getsockname()[1], file=file, system=system)

    async def _start(self, peer: Peer) -> None:
        Ledger(peer.file)
        peer.process = Heard(
            processes.peer, self.scenario, peer.name, peer.port, str(peer.file), peer.system
        )
        await peer.process.word("ready")

    async def _come_back(self, peer: Peer, at: float) -> None:
        await asyncio.sleep(max(0.0, at - time.time()))
        _end(peer)
        await self._start(peer)

    async def _enter(self, role: Any, *arguments: Any) -> Heard:
        return await self.stack.enter_async_context(started(role, *arguments))

    async def _enter_unready(self, role: Any) -> Heard:
        child = Heard(role, self.scenario, self._places)
        self.stack.callback(child.kill)
        return child


def _end(peer: Peer) -> None:
    if peer.process is not None:
        peer.process.kill()
        peer.process = None


async def _awaited(task: asyncio.Task[None]) -> None:
    await task


@asynccontextmanager
async def _operated(scenario: Scenario, places: str, job: Job) -> AsyncIterator[Heard]:
    child = Heard(processes.operator, scenario, places, job)
    try:
        yield child
    finally:
        child.kill()


def _said(incident: Incident | None) -> str:
    if incident is None:
        return "nobody has noticed"
    result = incident.result or {}
    parts = [incident.status, *result.get("reasons", []), str(incident.question or "")]
    return "; ".join(parts)


def _stands_still(cell: Cell, job: Job, incident: Incident) -> bool:
    """Tell whether a supervised recovery will not go on by itself."""
    if incident.status == "dead_letter":
        return True
    if incident.status == "waiting_for_human":
        # Where there is a peer, or one that comes back, the supervisor asks it again by itself.
        return cell.peer == "gone" or job.system == "no peers"
    return cell.peer == "gone" and incident.status == "open" and incident.attempts > 1


def _is_in_vain(cell: Cell, attempts: int) -> bool:
    """Tell whether another try by hand would change nothing."""
    if cell.peer == "gone":
        return attempts > 1
    return cell.peer == "alive" or attempts > MOST_ATTEMPTS


def _ended(known_at: float, stored: Iterable[Any], **more: Any) -> Ending:
    log, left = stored
    if left:
        return _failed(known_at, f"it stands before {left}", **more)
    return Ending(how="ended", known_at=known_at, ended_at=time.time(), log=log, **more)


def _failed(known_at: float, said: str, **more: Any) -> Ending:
    doubts = any(word in said for word in _IN_DOUBT)
    how = "asked" if doubts or said.startswith("waiting_for_human") else "failed"
    if how == "failed" and _REFUSED in said:
        how = "refused"
    return Ending(how=how, known_at=known_at, ended_at=time.time(), said=said[:600], **more)


@asynccontextmanager
async def experiment(servers: str) -> AsyncIterator[Experiment]:
    """Make topics and stores, as a deployment would; every process is gone at the end."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="m"))
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="s"))
        scenario = Scenario(
            servers=servers, folder=folder, sentinel="connect", sentinel_directory=place
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
        made = Experiment(scenario=scenario, folder=Path(folder), stack=stack)
        await made.begin()
        yield made
