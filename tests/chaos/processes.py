"""Agents and supervisors in processes of their own, forked from where all is imported already."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from chaos.scenario import Scenario, workflow
from chaos.trading import PEER, Taker
from forking import CONTEXT

from langgraph_peerctx.durability.receiver import Receiver
from langgraph_peerctx.errors import StoreBusyError
from langgraph_peerctx.lifecycle import peer_context_lifespan
from langgraph_peerctx.messaging.sentinel import Sentinel
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.reconstruction.result import RecoveryResult
from langgraph_peerctx.reconstruction.supervisor import RecoverySupervisor


class Child:
    """A process that takes orders and says what happens, over one pipe."""

    def __init__(self, role: Callable[..., Any], *arguments: Any) -> None:
        ours, theirs = CONTEXT.Pipe()
        self._pipe: Connection = ours
        self.said: list[tuple[Any, ...]] = []
        self.process = CONTEXT.Process(target=_main, args=(role, theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def tell(self, *order: Any) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(order)

    def hear(self) -> list[tuple[Any, ...]]:
        """Return what it has said since, and keep it."""
        news = []
        with contextlib.suppress(EOFError, OSError):
            while self._pipe.poll():
                news.append(self._pipe.recv())
        self.said += news
        return news

    def has_said(self, *beginning: Any) -> tuple[Any, ...] | None:
        self.hear()
        return next((s for s in self.said if s[: len(beginning)] == beginning), None)

    async def until(self, *beginning: Any, within: float = 30) -> Any:
        """Wait until it says something that begins so."""
        return await self.until_one_of(beginning, within=within)

    async def ends(self, within: float = 60) -> None:
        """Wait until it has ended by itself."""
        deadline = time.monotonic() + within
        while self.process.is_alive():
            assert time.monotonic() < deadline, f"it lives on: {self.said}"
            await asyncio.sleep(0.01)
        self.hear()

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def is_stopped(self) -> bool:
        return _state(self.pid) == "T"

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    async def stops_or_says(self, *beginning: Any, within: float = 30) -> None:
        """Wait until a SIGSTOP has taken hold, or it says something that begins so."""
        deadline = time.monotonic() + within
        while not self.is_stopped and not self.has_said(*beginning):
            assert time.monotonic() < deadline, f"it neither stops nor says {beginning}"
            await asyncio.sleep(0.005)

    async def until_one_of(self, *beginnings: tuple[Any, ...], within: float = 30) -> Any:
        """Wait until it says something that begins with one of these."""
        deadline = time.monotonic() + within
        while True:
            for beginning in beginnings:
                if (found := self.has_said(*beginning)) is not None:
                    return found
            assert self.process.is_alive(), f"it ended without {beginnings}: {self.said[-3:]}"
            assert time.monotonic() < deadline, f"no {beginnings} within {within} s: {self.said}"
            await asyncio.sleep(0.005)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.join(10)
        self.hear()

    async def leave(self) -> None:
        """End it in an orderly way."""
        self.tell("leave")
        deadline = time.monotonic() + 30
        while self.process.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self.kill()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _main(role: Callable[..., Awaitable[None]], pipe: Connection, *arguments: Any) -> None:
    os.environ["LANGGRAPH_STRICT_MSGPACK"] = "true"
    asyncio.run(role(Orders(pipe), *arguments))


class Orders:
    """The child's end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def say(self, *what: Any) -> None:
        self._pipe.send(what)

    async def next(self) -> tuple[Any, ...]:
        while not self._pipe.poll():
            await asyncio.sleep(0.005)
        order: tuple[Any, ...] = self._pipe.recv()
        return order

    async def told(self) -> tuple[Any, ...]:
        """Wait for an order in a thread, so that nothing is looked after meanwhile."""
        order: tuple[Any, ...] = await asyncio.to_thread(self._pipe.recv)
        return order


async def agent(orders: Orders, scenario: Scenario, name: str, arm: Any = None) -> None:
    """An agent that runs what it is told, and answers its peers meanwhile."""
    if arm is not None:
        arm(orders)
    settings = scenario.settings(f"{name}-{os.getpid()}")
    async with (
        scenario.checkpointer() as saver,
        peer_context_lifespan(agents=[name], settings=settings) as runtime,
    ):
        await runtime.own()
        while scenario.sentinel != "off" and runtime.sentinel_id is None:
            await asyncio.sleep(0.01)
        app = own_runs(workflow(scenario, saver, f"{os.getpid()}"), agent_id=name)
        orders.say("ready", os.getpid())
        while (order := await orders.next())[0] == "run":
            thread_id = order[1]
            try:
                final = await app.ainvoke(
                    {"log": ["in"]},
                    {"configurable": {"thread_id": thread_id}},
                    durability=scenario.durability,
                )
                orders.say("done", thread_id, final["log"])
            except Exception as error:  # noqa: BLE001 - each database has its own
                orders.say("refused", thread_id, type(error).__name__, str(error))


async def peer(orders: Orders, scenario: Scenario) -> None:
    """A peer that takes orders, says what became of each, and tells those who ask."""
    url = f"sqlite:///{scenario.peer_store}"
    settings = scenario.settings(f"{PEER}-{os.getpid()}", database_url=url)
    with EventStore(url) as store:
        taker = Taker(await Receiver.acreate(PEER, store=store), orders.say)
        server = await asyncio.start_server(taker.serve, "127.0.0.1", 0)
        async with server, peer_context_lifespan(agents=[PEER], settings=settings) as runtime:
            await runtime.own()
            orders.say("ready", server.sockets[0].getsockname()[1])
            await orders.next()


async def sentinel(orders: Orders, scenario: Scenario) -> None:
    """A sentinel of the scenario's own."""
    async with Sentinel(scenario.settings("sentinel")) as watching:
        orders.say("ready", watching.sentinel_id)
        await watching.run()


async def supervisor(orders: Orders, scenario: Scenario, name: str, arm: Any = None) -> None:
    """A supervisor that says what it sees and does."""
    if arm is not None:
        arm(orders)
    settings = scenario.settings(f"{name}-{os.getpid()}")
    async with scenario.checkpointer() as saver:
        app = workflow(scenario, saver, f"{os.getpid()}")
        async with RecoverySupervisor(
            {"launch": app},
            settings=settings,
            on_failure=lambda f: orders.say("seen", f.thread_id, f.why, f.epoch, time.time()),
            on_recovery=lambda f, r: orders.say(
                "recovered",
                f.thread_id,
                r["status"],
                _log(r["final_state"]),
                r["reasons"],
                time.time(),
            ),
        ) as supervising:
            orders.say("ready", os.getpid())
            while (order := await orders.next())[0] != "leave":
                if order[0] == "recover":
                    result = await _recovered(supervising, order[1], order[2])
                    orders.say("result", order[2], result["status"], _log(result["final_state"]))
                if order[0] == "states":
                    states = await supervising.states()
                    orders.say("states", [(s.process_id, s.state, s.why) for s in states])


async def _recovered(
    supervising: RecoverySupervisor, agent_id: str, thread_id: str
) -> RecoveryResult:
    """Recover by hand; where the database is too busy, do as the error says and try again."""
    while True:
        with contextlib.suppress(StoreBusyError):
            return await supervising.recover(agent_id, thread_id)


def _log(state: Any) -> Any:
    return (state or {}).get("log")
