"""Workflows that die by SIGKILL where they are told to, and die only then.

Each is built with a `Script`: what has run is in its ledger, one line for each beginning of a node,
written before anything else happens, so that it outlives the process.
"""

import asyncio
import operator
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.types import Send, interrupt

from langgraph_peerctx.nodes.state import PeerContextState


class State(PeerContextState, total=False):
    log: Annotated[list[str], operator.add]


@dataclass
class Script:
    """When to die.

    Attributes:
        kill_in: The node that kills the process when it has begun; None for none.
        kill_on_visit: On which of its beginnings, counted over all processes.
        after_writes: How many writes it lets the checkpointer store before.
        after_checkpoints: How many checkpoints it lets it store before.
    """

    ledger: Path
    kill_in: str | None = None
    kill_on_visit: int = 1
    after_writes: int = 0
    after_checkpoints: int = 0
    written: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    stored: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def enter(self, name: str) -> None:
        with self.ledger.open("a") as ledger:
            ledger.write(name + "\n")
        if name == self.kill_in and self.visits()[name] == self.kill_on_visit:
            for _ in range(self.after_writes):
                await self.written.acquire()
            for _ in range(self.after_checkpoints):
                await self.stored.acquire()
            os.kill(os.getpid(), signal.SIGKILL)

    def visits(self) -> Counter[str]:
        return Counter(self.ledger.read_text().split()) if self.ledger.exists() else Counter()


Saver = BaseCheckpointSaver[Any]


def _node(script: Script, name: str) -> Any:
    async def run(_state: State) -> dict[str, Any]:
        await script.enter(name)
        return {"log": [name]}

    return run


def line(script: Script, saver: Saver) -> Any:
    builder = StateGraph(State)
    builder.add_sequence([(name, _node(script, name)) for name in ("first", "second", "third")])
    builder.add_edge(START, "first")
    return builder.compile(checkpointer=saver)


def fan_out(script: Script, saver: Saver) -> Any:
    builder = StateGraph(State)
    for name in ("left", "right", "join"):
        builder.add_node(name, _node(script, name))
    builder.add_edge(START, "left")
    builder.add_edge(START, "right")
    builder.add_edge(["left", "right"], "join")
    return builder.compile(checkpointer=saver)


class Item(TypedDict):
    number: int


def map_reduce(script: Script, saver: Saver) -> Any:
    async def work(item: Item) -> dict[str, Any]:
        name = f"work-{item['number']}"
        await script.enter(name)
        return {"log": [name]}

    def spread(_state: State) -> list[Send]:
        return [Send("work", {"number": number}) for number in range(4)]

    builder = StateGraph(State)
    builder.add_node("plan", _node(script, "plan"))
    builder.add_node("work", work, input_schema=Item)
    builder.add_node("reduce", _node(script, "reduce"))
    builder.add_edge(START, "plan")
    builder.add_conditional_edges("plan", spread, ["work"])
    builder.add_edge("work", "reduce")
    return builder.compile(checkpointer=saver)


def loop(script: Script, saver: Saver) -> Any:
    def more(state: State) -> str:
        return "turn" if state["log"].count("turn") < 3 else "done"

    builder = StateGraph(State)
    builder.add_node("turn", _node(script, "turn"))
    builder.add_node("done", _node(script, "done"))
    builder.add_edge(START, "turn")
    builder.add_conditional_edges("turn", more, ["turn", "done"])
    return builder.compile(checkpointer=saver)


class InnerState(TypedDict, total=False):
    inner: Annotated[list[str], operator.add]


def subgraph(script: Script, saver: Saver, *, checkpointer: bool | None = None) -> Any:
    def inner_node(name: str) -> Any:
        async def run(_state: InnerState) -> dict[str, Any]:
            await script.enter(name)
            return {"inner": [name]}

        return run

    inner = StateGraph(InnerState)
    inner.add_sequence([(name, inner_node(name)) for name in ("inner-1", "inner-2", "inner-3")])
    inner.add_edge(START, "inner-1")

    class Outer(State, total=False):
        inner: list[str]

    builder = StateGraph(Outer)
    builder.add_node("sub", inner.compile(checkpointer=checkpointer))
    builder.add_node("after", _node(script, "after"))
    builder.add_edge(START, "sub")
    builder.add_edge("sub", "after")
    return builder.compile(checkpointer=saver)


def unsaved_subgraph(script: Script, saver: Saver) -> Any:
    return subgraph(script, saver, checkpointer=False)


def remembering_subgraph(script: Script, saver: Saver) -> Any:
    return subgraph(script, saver, checkpointer=True)


def functional(script: Script, saver: Saver) -> Any:
    @task
    async def step(name: str) -> str:
        await script.enter(name)
        return name

    @entrypoint(checkpointer=saver)
    async def workflow(given: list[str]) -> list[str]:
        done = [await step(name) for name in ("step-1", "step-2", "step-3")]
        return [*given, *done]

    return workflow


def question_beside_work(script: Script, saver: Saver) -> Any:
    async def ask(_state: State) -> dict[str, Any]:
        await script.enter("ask")
        return {"log": [f"ask {interrupt('sure?')}"]}

    builder = StateGraph(State)
    builder.add_node("ask", ask)
    builder.add_node("work", _node(script, "work"))
    builder.add_edge(START, "ask")
    builder.add_edge(START, "work")
    return builder.compile(checkpointer=saver)


def two_questions(script: Script, saver: Saver) -> Any:
    async def ask(_state: State) -> dict[str, Any]:
        await script.enter("ask")
        first = interrupt("first?")
        await script.enter("between")
        second = interrupt("second?")
        await script.enter("behind")
        return {"log": [f"{first} {second}"]}

    builder = StateGraph(State)
    builder.add_node("ask", ask)
    builder.add_edge(START, "ask")
    return builder.compile(checkpointer=saver)


WORKFLOWS: dict[str, Callable[[Script, Saver], Any]] = {
    build.__name__: build
    for build in (
        line,
        fan_out,
        map_reduce,
        loop,
        subgraph,
        unsaved_subgraph,
        remembering_subgraph,
        functional,
        question_beside_work,
        two_questions,
    )
}
