"""A process that gathers inside a graph, and is killed at a named place."""

from typing import Any

from dying import arm, die_at
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph

from langgraph_peerctx.nodes.peer_context_subgraph import create_peer_context_subgraph
from langgraph_peerctx.nodes.state import PeerContextState

CONFIG: Any = {"configurable": {"thread_id": "outer"}}
ABOUT = {"failed_agent_id": "product-agent", "thread_id": "thread-1"}


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


async def main(database: str, place: str, checkpointer: bool | None) -> None:  # noqa: FBT001
    arm(place)
    async with AsyncSqliteSaver.from_conn_string(database) as saver:
        await workflow(saver, place, checkpointer=checkpointer).ainvoke(
            ABOUT, CONFIG, durability="async" if checkpointer is False else "sync"
        )
