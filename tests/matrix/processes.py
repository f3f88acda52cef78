"""The processes of the matrix: agents that die, peers, and who brings the workflows to an end."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from chaos.processes import Child, Orders
from chaos.scenario import Scenario
from forking import CONTEXT
from langgraph.errors import EmptyInputError
from langgraph.types import Command
from matrix.cells import Durability
from matrix.places import Deadly, begin
from matrix.trading import System, handler_of, serving, trade_of
from matrix.workflows import WORKFLOWS, WorkflowName, built

from langgraph_peerctx.background import BackgroundRuntime
from langgraph_peerctx.errors import PeerContextError
from langgraph_peerctx.lifecycle import peer_context_lifespan
from langgraph_peerctx.messaging.sentinel import Sentinel
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.reconstruction.reconstructor import recover_and_resume_workflow_async
from langgraph_peerctx.reconstruction.recoverer import SupervisedWorkflow
from langgraph_peerctx.reconstruction.supervisor import RecoverySupervisor
from langgraph_peerctx.runtime import PeerContextRuntime

ASKS = "__interrupt__"
"""What LangGraph returns of a workflow that waits for a human."""
YES = "yes"
PEER_SECONDS = 2.0
"""How long a recovery by hand waits for peers that say nothing."""
SUPERVISED_SECONDS = 15.0
"""How long one by a supervisor does, which knows who is there: only a peer that is late is waited
for, as on a busy machine, and none that is gone."""

CONTEXT.set_forkserver_preload(
    [
        "langgraph_peerctx",
        "langgraph.checkpoint.sqlite.aio",
        "langgraph.checkpoint.postgres.aio",
        "aiokafka",
        "alembic.command",
        "alembic.config",
        "matrix.processes",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a workflow: its own agent on its own thread, which is named after the case."""

    system: System
    workflow: WorkflowName
    durability: Durability
    case: str
    peer: str
    port: int

    @property
    def initial(self) -> dict[str, Any]:
        return {"case": self.case, "peer": self.peer, "port": self.port, "log": []}

    @property
    def place(self) -> Any:
        return {"configurable": {"thread_id": self.case}}


class Heard(Child):
    """A child whose words are sorted by what they are about, as they come."""

    def __init__(self, role: Callable[..., Any], *arguments: Any) -> None:
        super().__init__(role, *arguments)
        self.ended_at: float | None = None
        self._queues: defaultdict[tuple[str, str], asyncio.Queue[Any]] = defaultdict(asyncio.Queue)
        self._loop = asyncio.get_running_loop()
        self._reading = self._pipe.fileno(), self.process.sentinel
        self._loop.add_reader(self._reading[0], self._take)
        self._loop.add_reader(self._reading[1], self._end)

    async def word(self, kind: str, about: str = "", *, within: float = 90) -> tuple[Any, ...]:
        """Wait for the next word of a kind about something."""
        async with asyncio.timeout(within):
            said: tuple[Any, ...] = await self._queues[kind, about].get()
            return said

    def words(self, kind: str, about: str = "") -> list[tuple[Any, ...]]:
        """Return the words of a kind that are there, and forget them."""
        queue, found = self._queues[kind, about], []
        while not queue.empty():
            found.append(queue.get_nowait())
        return found

    async def death(self, within: float = 90) -> float:
        """Wait until it has ended; return when we knew, on the wall's clock."""
        async with asyncio.timeout(within):
            while self.ended_at is None:
                await asyncio.sleep(0.002)
            return self.ended_at

    def kill(self) -> None:
        for reading in self._reading:
            self._loop.remove_reader(reading)
        if self.ended_at is None:  # its number may be another process's by now
            super().kill()

    def _take(self) -> None:
        try:
            while self._pipe.poll():
                kind, about, *rest = self._pipe.recv()
                self._queues[kind, about].put_nowait(tuple(rest))
        except (EOFError, OSError):
            self._loop.remove_reader(self._reading[0])

    def _end(self) -> None:
        self.ended_at = time.time()
        self._loop.remove_reader(self._reading[1])
        self._take()


def settings_of(scenario: Scenario, name: str, **more: Any) -> Any:
    """Return the settings of one process."""
    return scenario.settings(
        name,
        mock_mode="never",
        timeout_seconds=PEER_SECONDS,
        max_attempts=8,
        **more,
    )


def app_of(job: Job, saver: Any) -> Any:
    """Compile a job's workflow."""
    return _compiled(job.system, job.workflow, saver)


def _compiled(system: System, workflow: WorkflowName, saver: Any) -> Any:
    return built(workflow, trade_of(system)).compile(checkpointer=saver, name=workflow)


async def agent(
    orders: Orders, scenario: Scenario, places: str, job: Job, deadly: Deadly | None
) -> None:
    """Run one job; end at a place of it, if so ordered."""
    logging.disable(logging.ERROR)
    begin("agent", places, deadly)
    async with scenario.checkpointer() as saver:
        if job.system == "langgraph":
            await _run(orders, app_of(job, saver), job)
            return
        settings = settings_of(scenario, job.case)
        async with peer_context_lifespan(settings=settings) as runtime:
            await _known(runtime)
            owned = own_runs(app_of(job, saver), agent_id=job.case)
            await _run(orders, owned, job)


async def _known(runtime: BackgroundRuntime) -> None:
    """Wait until others have heard us, and the sentinel would see us die."""
    await runtime.own()
    while runtime.sentinel_id is None or not await runtime.acall(_is_heard):
        await asyncio.sleep(0.005)


async def _is_heard(runtime: PeerContextRuntime) -> bool:
    return runtime.presence.roster.heard_at is not None


async def _run(orders: Orders, app: Any, job: Job) -> None:
    state = await app.ainvoke(job.initial, job.place, durability=job.durability)
    while ASKS in state:
        state = await app.ainvoke(Command(resume=YES), job.place, durability=job.durability)
    orders.say("result", job.case, "ended", *(await _log(app, job.case)))


async def _log(app: Any, case: str) -> Any:
    """Return what is stored of a thread: its log, and whether anything is left to do."""
    snapshot = await app.aget_state({"configurable": {"thread_id": case}})
    return snapshot.values.get("log"), list(snapshot.next)


async def peer(
    orders: Orders, scenario: Scenario, name: str, port: int, file: str, system: System
) -> None:
    """Take orders; where it keeps receipts, also tell what was received."""
    logging.disable(logging.ERROR)
    if system != "peers":
        async with serving(port, handler_of(Path(file), None, None)):
            orders.say("ready", "")
            await orders.next()
        return
    settings = settings_of(scenario, name, database_url=f"sqlite:///{file}")
    async with peer_context_lifespan(agents=[name], settings=settings) as runtime:
        await _known(runtime)
        with EventStore(settings.database_url) as store:
            async with serving(port, handler_of(Path(file), name, store)):
                orders.say("ready", "")
                await orders.next()


async def sentinel(orders: Orders, scenario: Scenario) -> None:
    """See everybody die."""
    logging.disable(logging.ERROR)
    async with Sentinel(scenario.settings("sentinel")):
        orders.say("ready", "")
        await orders.next()


# Who goes on with a dead agent's workflow.


async def alone(orders: Orders, scenario: Scenario, places: str) -> None:
    """Go on with what LangGraph has kept, as often as it is told."""
    logging.disable(logging.ERROR)
    begin("alone", places)
    async with asyncio.TaskGroup() as doing:
        while (order := await orders.next())[0] == "recover":
            _, job, folder = order
            doing.create_task(_go_on(orders, replace(scenario, folder=folder), job))


async def _go_on(orders: Orders, scenario: Scenario, job: Job) -> None:
    async with scenario.checkpointer() as saver:
        app = app_of(job, saver)
        try:
            try:
                state = await app.ainvoke(None, job.place, durability=job.durability)
            except EmptyInputError:
                state = await app.ainvoke(job.initial, job.place, durability=job.durability)
            while ASKS in state:
                answer = Command(resume=YES)
                state = await app.ainvoke(answer, job.place, durability=job.durability)
        except Exception as error:  # noqa: BLE001 - a workflow may raise anything
            orders.say("result", job.case, "failed", type(error).__name__, str(error))
        else:
            orders.say("result", job.case, "ended", *(await _log(app, job.case)))


async def supervisor(orders: Orders, scenario: Scenario, places: str, system: System) -> None:
    """Recover by itself, say what it sees, and answer for a human where it is told."""
    logging.disable(logging.ERROR)
    begin("supervisor", places)
    asks_peers = system == "peers"
    async with scenario.checkpointer() as saver:
        apps = {name: _compiled(system, name, saver) for name in WORKFLOWS}
        workflows = {
            name: SupervisedWorkflow(
                workflow=app, use_peer_context=asks_peers, timeout_seconds=SUPERVISED_SECONDS
            )
            for name, app in apps.items()
        }
        name = f"supervisor-{system.replace(' ', '-')}"
        supervising = RecoverySupervisor(
            workflows,
            settings=settings_of(scenario, name),
            on_failure=lambda f: orders.say("seen", f.thread_id, time.time(), f.why),
            on_recovery=lambda f, r: orders.say(
                "recovered", f.thread_id, time.time(), r["status"], r["reasons"]
            ),
        )
        async with supervising, asyncio.TaskGroup() as doing:
            orders.say("ready", "")
            while (order := await orders.next())[0] != "leave":
                owned = own_runs(apps[order[1].workflow], agent_id=order[1].case)
                doing.create_task(_attend(orders, owned, *order))


async def _attend(orders: Orders, owned: Any, what: str, job: Job) -> None:
    """Say how a thread stands; before that, answer its question, or try its run anew."""
    try:
        if what == "answer":
            await owned.ainvoke(Command(resume=YES), job.place, durability=job.durability)
        elif what == "again":
            await owned.ainvoke(None, job.place, durability=job.durability)
    except Exception as error:  # noqa: BLE001 - a workflow may raise anything
        orders.say("result", job.case, "failed", type(error).__name__, str(error))
    else:
        orders.say("result", job.case, "ended", *(await _log(owned, job.case)))


async def operator(orders: Orders, scenario: Scenario, places: str, job: Job) -> None:
    """Recover a thread of which nothing is left, with new stores, as often as it is told."""
    logging.disable(logging.ERROR)
    begin("operator", places)
    asks_peers = job.system == "peers"
    settings = settings_of(scenario, f"{job.case}-operator")
    async with scenario.checkpointer() as saver:
        app = app_of(job, saver)
        recover = partial(
            recover_and_resume_workflow_async,
            workflow=app,
            agent_id=job.case,
            thread_id=job.case,
            initial_state=job.initial,
            use_peer_context=asks_peers,
            peer_context_timeout=PEER_SECONDS,
            expect=[job.peer] if asks_peers else [],
            durability=job.durability,
            settings=settings,
        )
        while (order := await orders.next())[0] != "leave":
            if order[0] == "recover":
                await _recover(orders, recover, job)
            else:
                owned = own_runs(app, agent_id=job.case, settings=settings)
                await _attend(orders, owned, order[0], job)


async def _recover(orders: Orders, recover: Callable[[], Awaitable[Any]], job: Job) -> None:
    try:
        result = await recover()
    except PeerContextError as error:
        orders.say("recovered", job.case, time.time(), type(error).__name__, [str(error)])
    else:
        orders.say("recovered", job.case, time.time(), result["status"], result["reasons"])


@asynccontextmanager
async def started(role: Callable[..., Any], *arguments: Any) -> AsyncIterator[Heard]:
    """Start a process that serves, and end it."""
    child = Heard(role, *arguments)
    try:
        await child.word("ready")
        yield child
    finally:
        child.kill()
