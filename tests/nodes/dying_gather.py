"""A process that gathers inside a graph, and is killed at a named place."""

import asyncio
import json
import os
import signal
import sys
from typing import Any

from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph

from langgraph_peerctx.gathering.gatherer import Wanted
from langgraph_peerctx.gathering.steps import GatherSteps
from langgraph_peerctx.nodes.peer_context_subgraph import create_peer_context_subgraph
from langgraph_peerctx.nodes.state import PeerContextState

CONFIG: Any = {"configurable": {"thread_id": "outer"}}
ABOUT = {"failed_agent_id": "product-agent", "thread_id": "thread-1"}
PLACES = (
    "before position",
    "before request",
    "between request and checkpoint",
    "in the middle of collect",
    "after collect",
)


class Team(PeerContextState, total=False):
    failed_agent_id: str
    thread_id: str
    used: list[str]


def workflow(saver: Any, place: str = "", *, checkpointer: bool | None = None) -> Any:
    """Return a graph that gathers in a subgraph, and uses what came."""
    gather = create_peer_context_subgraph(expect=["a", "b"], timeout_seconds=20)

    def use(state: Team) -> dict[str, Any]:
        die_at("after collect", place)
        return {"used": sorted(state["peer_context"])}

    builder = StateGraph(Team)
    builder.add_node("peers", gather.compile(checkpointer=checkpointer))
    builder.add_node("use", use)
    builder.add_edge(START, "peers")
    builder.add_edge("peers", "use")
    builder.add_edge("use", END)
    return builder.compile(checkpointer=saver)


def die_at(here: str, place: str) -> None:
    if here == place:
        os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str) -> None:
    """Make this process die at a place."""
    position, ask, take = GatherSteps.position, GatherSteps.ask, Wanted.take

    async def deadly_position(self: Any, request: Any) -> Any:
        die_at("before position", place)
        return await position(self, request)

    async def deadly_ask(self: Any, *arguments: Any) -> Any:
        die_at("before request", place)
        asked = await ask(self, *arguments)
        await asyncio.sleep(0.3)  # the answers that can come have come
        die_at("between request and checkpoint", place)
        return asked

    def deadly_take(self: Any, response: Any) -> None:
        take(self, response)
        if self.expected and len(self.responses) == 1 and self.min_responses is None:
            die_at("in the middle of collect", place)

    GatherSteps.position = deadly_position  # type: ignore[method-assign]
    GatherSteps.ask = deadly_ask  # type: ignore[method-assign,assignment]
    Wanted.take = deadly_take  # type: ignore[method-assign]


async def main(database: str, place: str, checkpointer: bool | None) -> None:  # noqa: FBT001
    arm(place)
    async with AsyncSqliteSaver.from_conn_string(database) as saver:
        await workflow(saver, place, checkpointer=checkpointer).ainvoke(
            ABOUT, CONFIG, durability="async" if checkpointer is False else "sync"
        )


if __name__ == "__main__":
    asyncio.run(main(*json.loads(sys.argv[1])))
