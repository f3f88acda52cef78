"""A process that recovers a workflow by the graph, and is killed at a named place."""

import operator
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from dying import arm, die_at
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph

from langgraph_peerctx.nodes.state import PeerContextState
from langgraph_peerctx.reconstruction.recovery_graph import RecoverySteps, create_recovery_graph

AGENT: Any = {"configurable": {"thread_id": "thread-1"}}
RECOVERY: Any = {"configurable": {"thread_id": "recovery-1"}}
ORDER = {"failed_agent_id": "product-agent", "thread_id": "thread-1"}
NODES = ("load_checkpoint", "reconstruct", "settle", "approve", "resume_workflow")
INSIDE = "inside the workflow"
AFTER = "after the workflow, before the checkpoint"


class Launch(PeerContextState, total=False):
    log: Annotated[list[str], operator.add]
    facts: Annotated[list[str], operator.add]


def workflow(saver: Any, place: Path, dies: bool) -> Any:  # noqa: FBT001
    """Return a workflow whose second node writes down each visit, and may be where it dies."""

    def reserve(state: Launch) -> dict[str, Any]:
        with (place / "visits").open("a") as ledger:
            ledger.write("reserve\n")
        if dies:
            die_at(INSIDE, INSIDE)
        return {"log": ["reserve"], "facts": sorted(state.get("peer_context") or {})}

    builder = StateGraph(Launch)
    builder.add_node("plan", lambda _state: {"log": ["plan"]})
    builder.add_node("reserve", reserve)
    builder.add_node("launch", lambda _state: {"log": ["launch"]})
    for before, after in ((START, "plan"), ("plan", "reserve"), ("reserve", "launch")):
        builder.add_edge(before, after)
    builder.add_edge("launch", END)
    return builder.compile(checkpointer=saver)


@asynccontextmanager
async def recovery(place: Path, kill_at: str = "") -> AsyncIterator[Any]:
    """Open the recovery graph of the workflow, each with its own database."""
    async with (
        AsyncSqliteSaver.from_conn_string(str(place / "workflow.db")) as agents,
        AsyncSqliteSaver.from_conn_string(str(place / "recovery.db")) as recoveries,
    ):
        dying = workflow(agents, place, dies=kill_at == INSIDE)
        graph = create_recovery_graph(dying, expect=["a", "b"], timeout_seconds=20)
        yield graph.compile(checkpointer=recoveries)


def arm_nodes(kill_at: str) -> None:
    """Die at the beginning of a node, or when the workflow has ended."""
    for name in NODES:
        node = getattr(RecoverySteps, name)

        async def deadly(self: Any, state: Any, node: Any = node, name: str = name) -> Any:
            die_at(name, kill_at)
            update = await node(self, state)
            if name == "resume_workflow":
                die_at(AFTER, kill_at)
            return update

        setattr(RecoverySteps, name, deadly)


async def main(place: Path, role: str, kill_at: str) -> None:
    if role == "agent":
        async with AsyncSqliteSaver.from_conn_string(str(place / "workflow.db")) as saver:
            app = workflow(saver, place, dies=True)
            await app.ainvoke({"log": ["in"]}, AGENT, durability="sync")
    arm(kill_at)
    arm_nodes(kill_at)
    async with recovery(place, kill_at) as app:
        await app.ainvoke(ORDER if role == "recoverer" else None, RECOVERY, durability="sync")
