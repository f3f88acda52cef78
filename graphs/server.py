"""What LangGraph's server needs beside the graphs: peers on a broker, and a place for threads.

Without KAFKA_BOOTSTRAP_SERVERS there is an embedded broker, and the two peers live in this process.
Everything is kept in the folder that PEERCTX_STUDIO_FOLDER names, by default `.studio`.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from starlette.applications import Starlette

from graphs.launch import PEERS
from langgraph_peerctx import (
    EmbeddedBroker,
    KafkaConfig,
    PeerContextSettings,
    peer_context_lifespan,
)

FOLDER = Path(os.environ.get("PEERCTX_STUDIO_FOLDER", ".studio")).absolute()


@asynccontextmanager
async def checkpointer() -> AsyncIterator[AsyncSqliteSaver]:
    """Keep every thread in one SQLite file, so that a killed server loses none."""
    await asyncio.to_thread(FOLDER.mkdir, parents=True, exist_ok=True)
    async with AsyncSqliteSaver.from_conn_string(str(FOLDER / "threads.db")) as saver:
        yield saver


@asynccontextmanager
async def lifespan(server: Starlette) -> AsyncIterator[Any]:
    """Run the peer context runtime, and the peers in it, while the server runs."""
    await asyncio.to_thread(FOLDER.mkdir, parents=True, exist_ok=True)
    # The graphs' nodes read the same from the environment.
    os.environ.setdefault("PEER_CONTEXT_DATABASE_URL", f"sqlite:///{FOLDER / 'events.db'}")
    async with AsyncExitStack() as stack:
        if "KAFKA_BOOTSTRAP_SERVERS" not in os.environ:
            broker = EmbeddedBroker()
            await asyncio.to_thread(broker.__enter__)
            stack.push(broker)
            kafka = KafkaConfig(bootstrap_servers=broker.bootstrap_servers)
        else:
            kafka = KafkaConfig()
        settings = PeerContextSettings(kafka=kafka)
        yield await stack.enter_async_context(
            peer_context_lifespan(server, agents=PEERS, settings=settings)
        )


app = Starlette(lifespan=lifespan)
