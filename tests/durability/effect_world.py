"""What effects did, what the ledger knows of it, and what the peer says."""

import asyncio
import operator
from collections.abc import Callable
from typing import Annotated, Any

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from typing_extensions import TypedDict

from langgraph_peerctx.durability.run_effects import About, RunEffects
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.protocol.messages import InDoubtAnswer, InDoubtKey, Verdict

AGENT, THREAD, RUN, PEER = "product-agent", "thread-1", "run-1", "inventory-agent"
INCARNATION = "one-life"


class State(TypedDict, total=False):
    log: Annotated[list[Any], operator.add]
    n: int
    given: Any


class World:
    """What was done, and what the peer says."""

    def __init__(self, control: ControlDatabase) -> None:
        self.control = control
        self.done: list[Any] = []
        self.asked: list[tuple[About, InDoubtKey]] = []
        self.says: Verdict | None = None
        self.reply: Any = None
        self.claim("one-life")

    def claim(self, incarnation: str, *, dead: str | None = None) -> None:
        lease = self.control.claim(
            AGENT,
            THREAD,
            owner_id="process",
            incarnation=incarnation,
            ttl_seconds=60,
            dead_incarnation=dead,
        )
        assert lease is not None
        self.incarnation, self.epoch = incarnation, lease.epoch

    def effects(self, run_id: str = RUN, **more: Any) -> RunEffects:
        about = About(agent_id=AGENT, thread_id=THREAD, run_id=run_id, epoch=self.epoch)
        return RunEffects(self.control, about, incarnation=self.incarnation, peers=self, **more)

    def at(self, run_id: str = RUN, **more: Any) -> Any:
        place: Any = {"configurable": {"thread_id": THREAD}}
        return self.effects(run_id, **more).go_along(place)

    def act(self, what: Any = "it", fails: BaseException | None = None) -> Any:
        self.done.append(what)
        if fails is not None:
            raise fails
        return {"done": what, "times": len(self.done)}

    async def aact(self, what: Any = "it", fails: BaseException | None = None) -> Any:
        await asyncio.sleep(0)
        return self.act(what, fails)

    def ask(self, about: About, key: InDoubtKey) -> InDoubtAnswer | None:
        self.asked.append((about, key))
        if self.says is None:
            return None
        return InDoubtAnswer(
            effect_key=key.effect_key, agent_id=key.peer_id, verdict=self.says, reply=self.reply
        )

    async def aask(self, about: About, key: InDoubtKey) -> InDoubtAnswer | None:
        return self.ask(about, key)

    def known(self, run_id: str = RUN) -> list[Any]:
        return self.control.effects_of(AGENT, THREAD, run_id)


Node = Callable[[State], Any]


def line(*nodes: tuple[str, Any], **more: Any) -> Any:
    builder = StateGraph(State)
    before = START
    for name, node in nodes:
        builder.add_node(name, node, **more)
        builder.add_edge(before, name)
        before = name
    builder.add_edge(before, END)
    return builder.compile(checkpointer=InMemorySaver())


class DieError(BaseException):
    """A kill, as far as a test can have one in its own process."""
