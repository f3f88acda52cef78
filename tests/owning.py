"""A workflow of two nodes, its runs in a control database, and waiting for what becomes of them."""

import asyncio
import operator
import time
from collections.abc import Callable
from typing import Annotated, Any

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt
from typing_extensions import TypedDict

from langgraph_peerctx.durability.admission import packed
from langgraph_peerctx.persistence.incidents import ControlDatabase, Incident
from langgraph_peerctx.persistence.runs import NewRun, Owner, RunInput

AGENT, THREAD = "product-agent", "thread-1"
AT: Any = {"configurable": {"thread_id": THREAD}}
GHOST = Owner(owner_id="ghost", incarnation="ghost-1", ttl_seconds=0.01)
IN: Any = {"log": ["in"]}


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


def workflow(
    second: Any = None, saver: Any = None, first: Any = None, state: Any = State, **more: Any
) -> Any:
    """Build `launch`, whose nodes log their names where nothing else is given."""
    builder = StateGraph(state, **more)
    builder.add_node("first", first or (lambda _state: {"log": ["first"]}))
    builder.add_node("second", second or (lambda _state: {"log": ["second"]}))
    builder.add_edge(START, "first")
    builder.add_edge("first", "second")
    builder.add_edge("second", END)
    return builder.compile(checkpointer=saver or InMemorySaver(), name="launch")


def asks(_state: Any) -> Any:
    """Ask a human: a node."""
    return {"log": [interrupt("how many?")]}


def new_run(app: Any, given: Any = IN, *, checkpoint_id: str | None = None, **more: Any) -> NewRun:
    """Return a run to be admitted, or an answer."""
    value = packed(app, given, name="input")
    fields: dict[str, Any] = {
        "run_id": "r1",
        "agent_id": AGENT,
        "thread_id": THREAD,
        "workflow": "launch",
        "given": RunInput(value=value, checkpoint_id=checkpoint_id),
    }
    return NewRun(**(fields | more))


def newest(control: ControlDatabase) -> Any:
    """Return the thread's newest run."""
    return control.newest_run(AGENT, THREAD)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_so():
            await asyncio.sleep(0.02)


async def settled(control: ControlDatabase, *statuses: str, within: float = 60) -> Incident:
    """Return the thread's incident when it is recovered, or has one of the statuses."""
    deadline = time.monotonic() + within
    while True:
        incident = control.incident_of(AGENT, THREAD)
        if incident is not None and incident.status in (statuses or ("recovered",)):
            return incident
        assert time.monotonic() < deadline, incident
        await asyncio.sleep(0.02)
