"""The recovery of a launch, for Studio: it asks a human where a peer is silent."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from langgraph.graph import StateGraph
from langgraph_sdk.runtime import ServerRuntime

from graphs.launch import PEERS, builder
from graphs.server import checkpointer
from langgraph_peerctx import create_recovery_graph


@asynccontextmanager
async def make_graph(
    runtime: ServerRuntime[None],  # noqa: ARG001 - how the server knows that this is a factory
) -> AsyncIterator[StateGraph[Any, Any, Any, Any]]:
    """Yield the graph, with a connection of its own to the threads of the launches.

    The server enters it for every read of a schema or a state, too: it opens a file, no more. The
    runtime of the peers lives with the server; see `graphs/server.py`.
    """
    async with checkpointer() as threads:
        workflow = builder().compile(checkpointer=threads, name="launch")
        yield create_recovery_graph(workflow, expect=PEERS, approve_below_coverage=1.0)
