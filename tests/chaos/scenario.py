"""What the processes of one experiment share, and the workflow that they run."""

import asyncio
import operator
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

from chaos.trading import PEER, place_order
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from langgraph_peerctx import effect
from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.nodes.state import PeerContextState

NODES = ("plan", "left", "right", "join", "end")
in_node: Callable[[str], object] = str
"""Called in each node when its work is done and nothing is stored: a process may die there."""
FINAL = ["in", *NODES]
"""The log of a launch that nobody disturbed."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Where everybody finds each other; it is handed to each process.

    Attributes:
        pause: How long a living process may be late with its heartbeat, on a busy machine, too; of
            its lease it has twice as long.
        database: Control database and checkpoints: `sqlite`, two files, or a PostgreSQL address.
        work_seconds: How long each node works.
        peer_port: Where the peer takes orders; one is placed by `join`, as an effect. None: there
            is no peer, and no effect.
    """

    servers: str
    folder: str
    database: str = "sqlite"
    sentinel: str = "off"
    sentinel_directory: str | None = None
    interval: float = 0.25
    pause: float = 1.25
    work_seconds: float = 0.05
    stuck: float = 300.0
    durability: str = "sync"
    name: str = field(default_factory=lambda: uuid4().hex[:12])
    control: str | None = None
    peer_port: int | None = None
    kafka: dict[str, Any] = field(default_factory=dict)

    @property
    def control_url(self) -> str:
        if self.control is not None:
            return self.control
        return self.database if self.database != "sqlite" else f"sqlite:///{self.folder}/control.db"

    @property
    def ledger(self) -> Path:
        """One line a node that began: who ran it, of which thread."""
        return Path(self.folder) / "ledger"

    @property
    def peer_store(self) -> Path:
        """The peer's receipts, and what it has applied."""
        return Path(self.folder) / f"{PEER}.db"

    def settings(self, process_id: str, **more: Any) -> PeerContextSettings:
        return PeerContextSettings(
            kafka=KafkaConfig(
                bootstrap_servers=self.servers,
                presence_topic=f"presence.{self.name}",
                context_request_topic=f"request.{self.name}",
                context_response_topic_prefix=f"response.{self.name}",
                **self.kafka,
            ),
            **{
                "mock_mode": "auto",
                "process_id": process_id,
                "requester_id": "recovery",
                "database_url": f"sqlite:///{self.folder}/events.db",
                "control_database_url": self.control_url,
                "heartbeat_interval_seconds": self.interval,
                "heartbeat_pause_seconds": self.pause,
                "sweep_seconds": 1.0,
                "stuck_seconds": self.stuck,
                "sentinel": self.sentinel,
                "sentinel_directory": self.sentinel_directory,
                **more,
            },
        )

    @asynccontextmanager
    async def checkpointer(self) -> AsyncIterator[Any]:
        if self.database == "sqlite":
            async with AsyncSqliteSaver.from_conn_string(f"{self.folder}/threads.db") as saver:
                await saver.setup()
                yield saver
        else:
            # A single connection would not outlive a restart of the server.
            async with AsyncConnectionPool[Any](
                self.database,
                min_size=1,
                max_size=4,
                kwargs={"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row},
                check=AsyncConnectionPool.check_connection,
                timeout=5,
            ) as pool:
                yield AsyncPostgresSaver(pool)


class Launch(PeerContextState, total=False):
    log: Annotated[list[str], operator.add]


def workflow(scenario: Scenario, saver: Any, who: str) -> Any:
    """A line with a fan-out in it; each node writes down that it began, works, and says so."""

    def node(name: str) -> Any:
        async def run(_state: Launch) -> dict[str, Any]:
            with scenario.ledger.open("a") as ledger:
                ledger.write(f"{who} {name} {time.time():.3f}\n")
            await asyncio.sleep(scenario.work_seconds)
            if name == "join" and scenario.peer_port is not None:
                await effect("order", place_order, scenario.peer_port, peer=PEER)
            in_node(name)
            return {"log": [name]}

        return run

    builder = StateGraph(Launch)
    for name in NODES:
        builder.add_node(name, node(name))
    builder.add_edge(START, "plan")
    builder.add_edge("plan", "left")
    builder.add_edge("plan", "right")
    builder.add_edge(["left", "right"], "join")
    builder.add_edge("join", "end")
    builder.add_edge("end", END)
    return builder.compile(checkpointer=saver, name="launch")
