"""Workflows in a file, in each form that a command takes."""

import operator
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, StateGraph

from langgraph_peerctx.nodes.state import PeerContextState
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.reconstruction.recoverer import SupervisedWorkflow


class Flow(PeerContextState, total=False):
    log: Annotated[list[str], operator.add]


def work(state: Flow) -> dict[str, Any]:
    if "fail" in state["log"]:
        raise RuntimeError("as it was told to")
    return {"log": ["worked"]}


def loud(state: Flow) -> dict[str, Any]:
    """Prints, and so does a process that it starts."""
    print("a node prints")
    subprocess.run(["echo", "a child prints"], check=True)
    return work(state)


loud_builder = StateGraph(Flow)
loud_builder.add_node("loud", loud)
loud_builder.add_edge(START, "loud")

builder = StateGraph(Flow)
builder.add_node("work", work)
builder.add_edge(START, "work")

number = 42
bare = builder.compile(name="flow")
graph = builder.compile(checkpointer=InMemorySaver(), name="flow")
owned = own_runs(graph, agent_id="agent")
supervised = SupervisedWorkflow(workflow=graph, approve_below_coverage=0.5)


def made() -> Any:
    return graph


async def made_later() -> Any:
    return graph


def made_of(settings: Any) -> Any:
    return settings


def refused() -> Any:
    raise OSError("the disk is gone")


@contextmanager
def kept_open() -> Iterator[Any]:
    yield supervised


@asynccontextmanager
async def on_sqlite() -> AsyncIterator[Any]:
    """The form for a checkpointer that belongs to a loop."""
    async with AsyncSqliteSaver.from_conn_string(os.environ["FLOW_THREADS"]) as saver:
        yield builder.compile(checkpointer=saver, name="flow")


@asynccontextmanager
async def loud_on_sqlite() -> AsyncIterator[Any]:
    async with AsyncSqliteSaver.from_conn_string(os.environ["FLOW_THREADS"]) as saver:
        yield loud_builder.compile(checkpointer=saver, name="flow")


@asynccontextmanager
async def approved_on_sqlite() -> AsyncIterator[Any]:
    async with on_sqlite() as workflow:
        yield SupervisedWorkflow(workflow=workflow, approve_below_coverage=0.5)
