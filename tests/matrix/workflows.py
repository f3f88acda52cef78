"""Five small workflows that order things from a peer, and each place where their agent may die."""

import asyncio
import operator
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from langgraph.graph import END, START, StateGraph
from langgraph.types import Send, interrupt
from matrix.places import at
from matrix.trading import Trade

from langgraph_peerctx.nodes.state import PeerContextState

WorkflowName = Literal["line", "fan", "map", "loop", "team"]
WORKFLOWS: tuple[WorkflowName, ...] = ("line", "fan", "map", "loop", "team")
TITLES: dict[WorkflowName, str] = {
    "line": "a line",
    "fan": "a fan-out with a join",
    "map": "a map-reduce with Send",
    "loop": "a loop with a conditional edge",
    "team": "a subgraph and a human's approval",
}

Kind = Literal[
    "before a node",
    "inside a node",
    "after a node",
    "before the intent",
    "between intent and call",
    "between call and outcome",
    "after the outcome",
]
NODE_KINDS: tuple[Kind, ...] = ("before a node", "inside a node", "after a node")
EFFECT_KINDS: tuple[Kind, ...] = (
    "before the intent",
    "between intent and call",
    "between call and outcome",
    "after the outcome",
)
KINDS = (*NODE_KINDS, *EFFECT_KINDS)

_STEP_SECONDS = 0.006
"""Half of a node's work."""
_STAGGER_SECONDS = 0.05
"""How much later the next of several parallel branches begins: one effect at a time."""
_ROUNDS = 3
_ITEMS = 3

Node = Callable[[Any], Awaitable[dict[str, Any]]]


class Job(PeerContextState, total=False):
    """What every workflow works on.

    Attributes:
        case: Which run this is; also its thread.
        peer: The agent that takes its orders.
        port: Where that one listens.
        log: What was done.
        rounds: How often the loop was gone through.
    """

    case: str
    peer: str
    port: int
    log: Annotated[list[str], operator.add]
    rounds: int


class Draft(PeerContextState, total=False):
    """The subgraph's: it shares no reducer with its parent."""

    case: str
    peer: str
    port: int
    notes: list[str]


class Item(PeerContextState, total=False):
    """What one worker of the map-reduce gets."""

    case: str
    peer: str
    port: int
    item: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an agent may die.

    Attributes:
        kind: What kind of place it is.
        name: As it is passed.
        of: The node, or the order.
    """

    kind: Kind
    name: str
    of: str


_NODES: dict[WorkflowName, tuple[str, ...]] = {
    "line": ("plan", "reserve", "book", "report"),
    "fan": ("plan", "left", "right", "join", "report"),
    "map": ("split", *(f"work-{n}" for n in range(_ITEMS)), "reduce"),
    "loop": ("plan", *(f"try-{n}" for n in range(_ROUNDS)), "report"),
    "team": ("prepare", "draft", "check", "approve", "publish", "report"),
}
ORDERS: dict[WorkflowName, tuple[str, ...]] = {
    "line": ("reserve", "book"),
    "fan": ("left", "right", "join"),
    "map": tuple(f"work-{n}" for n in range(_ITEMS)),
    "loop": tuple(f"try-{n}" for n in range(_ROUNDS)),
    "team": ("prepare", "check", "publish"),
}


def places_of(workflow: WorkflowName) -> list[Place]:
    """Return every place where an agent that runs a workflow may die."""
    nodes = [
        Place(kind=kind, name=f"{kind.split()[0]} {node}", of=node)
        for kind in NODE_KINDS
        for node in _NODES[workflow]
    ]
    effects = [
        Place(kind=kind, name=f"{kind}: {order}", of=order)
        for kind in EFFECT_KINDS
        for order in ORDERS[workflow]
    ]
    return [*nodes, *effects]


def built(workflow: WorkflowName, trade: Trade) -> StateGraph[Any]:
    """Return a workflow that orders in a given way; not compiled."""
    return _BUILDERS[workflow](trade)


async def _done(state: Any, name: str, trade: Trade | None = None) -> str:
    """Do one node's work, and order what it needs."""
    case = state["case"]
    at(case, f"before {name}")
    await asyncio.sleep(_STEP_SECONDS)
    at(case, f"inside {name}")
    said = name if trade is None else await trade(state, name)
    await asyncio.sleep(_STEP_SECONDS)
    at(case, f"after {name}")
    return said


def _node(name: str, trade: Trade | None = None, *, late: int = 0) -> Node:
    async def run(state: Job) -> dict[str, Any]:
        await asyncio.sleep(late * _STAGGER_SECONDS)
        return {"log": [await _done(state, name, trade)]}

    return run


def _line(trade: Trade) -> StateGraph[Any]:
    builder = StateGraph(Job)
    builder.add_node("plan", _node("plan"))
    builder.add_node("reserve", _node("reserve", trade))
    builder.add_node("book", _node("book", trade))
    builder.add_node("report", _node("report"))
    for here, there in (("plan", "reserve"), ("reserve", "book"), ("book", "report")):
        builder.add_edge(here, there)
    return _between(builder, "plan", "report")


def _fan(trade: Trade) -> StateGraph[Any]:
    builder = StateGraph(Job)
    builder.add_node("plan", _node("plan"))
    builder.add_node("left", _node("left", trade))
    builder.add_node("right", _node("right", trade, late=1))
    builder.add_node("join", _node("join", trade))
    builder.add_node("report", _node("report"))
    builder.add_edge("plan", "left")
    builder.add_edge("plan", "right")
    builder.add_edge(["left", "right"], "join")
    builder.add_edge("join", "report")
    return _between(builder, "plan", "report")


def _map(trade: Trade) -> StateGraph[Any]:
    async def work(state: Item) -> dict[str, Any]:
        await asyncio.sleep(state["item"] * _STAGGER_SECONDS)
        return {"log": [await _done(state, f"work-{state['item']}", trade)]}

    def sent(state: Job) -> list[Send]:
        job = {"case": state["case"], "peer": state["peer"], "port": state["port"]}
        return [Send("work", {**job, "item": item}) for item in range(_ITEMS)]

    builder = StateGraph(Job)
    builder.add_node("split", _node("split"))
    builder.add_node("work", work, input_schema=Item)
    builder.add_node("reduce", _node("reduce"))
    builder.add_conditional_edges("split", sent, ["work"])
    builder.add_edge("work", "reduce")
    return _between(builder, "split", "reduce")


def _loop(trade: Trade) -> StateGraph[Any]:
    async def attempt(state: Job) -> dict[str, Any]:
        number = state.get("rounds", 0)
        said = await _done(state, f"try-{number}", trade)
        return {"log": [said], "rounds": number + 1}

    def again(state: Job) -> str:
        return "attempt" if state["rounds"] < _ROUNDS else "report"

    builder = StateGraph(Job)
    builder.add_node("plan", _node("plan"))
    builder.add_node("attempt", attempt)
    builder.add_node("report", _node("report"))
    builder.add_edge("plan", "attempt")
    builder.add_conditional_edges("attempt", again, ["attempt", "report"])
    return _between(builder, "plan", "report")


def _team(trade: Trade) -> StateGraph[Any]:
    async def draft(state: Draft) -> dict[str, Any]:
        return {"notes": [await _done(state, "draft")]}

    async def check(state: Draft) -> dict[str, Any]:
        return {"notes": [*state["notes"], await _done(state, "check", trade)]}

    inner = StateGraph(Draft)
    inner.add_node("draft", draft)
    inner.add_node("check", check)
    inner.add_edge("draft", "check")
    crew = _between(inner, "draft", "check").compile()

    async def ask_crew(state: Job) -> dict[str, Any]:
        job = {"case": state["case"], "peer": state["peer"], "port": state["port"]}
        return {"log": (await crew.ainvoke(job))["notes"]}

    async def approve(state: Job) -> dict[str, Any]:
        at(state["case"], "before approve")
        said = interrupt({"question": "Publish it?"})
        at(state["case"], "inside approve")
        await asyncio.sleep(_STEP_SECONDS)
        at(state["case"], "after approve")
        return {"log": [f"approve: {said}"]}

    builder = StateGraph(Job)
    builder.add_node("prepare", _node("prepare", trade))
    builder.add_node("crew", ask_crew)
    builder.add_node("approve", approve)
    builder.add_node("publish", _node("publish", trade))
    builder.add_node("report", _node("report"))
    steps = ("prepare", "crew", "approve", "publish", "report")
    for here, there in pairwise(steps):
        builder.add_edge(here, there)
    return _between(builder, "prepare", "report")


def _between(builder: StateGraph[Any], first: str, last: str) -> StateGraph[Any]:
    builder.add_edge(START, first)
    builder.add_edge(last, END)
    return builder


_BUILDERS: dict[WorkflowName, Callable[[Trade], StateGraph[Any]]] = {
    "line": _line,
    "fan": _fan,
    "map": _map,
    "loop": _loop,
    "team": _team,
}
