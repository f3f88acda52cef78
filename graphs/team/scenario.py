"""Where the team's processes find each other: broker, event stores, checkpoints."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from json import dumps, loads
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from langgraph_peerctx import KafkaConfig, PeerContextSettings

PRODUCT, MARKETING, INVENTORY = "product-agent", "marketing-agent", "inventory-agent"
PEERS = (INVENTORY, MARKETING)
TEAM = (PRODUCT, *PEERS)
RECOVERY = "recovery"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What every process of one demonstration must know; it travels as JSON.

    Attributes:
        bootstrap_servers: The broker.
        stores: Whose event store is where, as database URLs.
        checkpoints: The checkpoints that the product agent and its recoverer share.
    """

    bootstrap_servers: str
    stores: dict[str, str]
    checkpoints: str

    def settings_of(self, process: str) -> PeerContextSettings:
        """Return one process's settings. Without the broker it does not pretend."""
        return PeerContextSettings(
            kafka=KafkaConfig(bootstrap_servers=self.bootstrap_servers),
            mock_mode="never",
            requester_id=RECOVERY,
            process_id=process,
            database_url=self.stores[process],
        )

    def as_json(self) -> str:
        """Return the scenario for another process's command line."""
        return dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Scenario":
        """Return the scenario that another process sent."""
        return cls(**loads(text))


def mail_topic(agent_id: str) -> str:
    """Return the topic on which an agent gets its mail."""
    return f"team.mail.{agent_id}"


@asynccontextmanager
async def open_checkpointer(url: str) -> AsyncIterator[BaseCheckpointSaver[Any]]:
    """Open the shared checkpoints: an SQLite file, or PostgreSQL."""
    if url.startswith("postgresql://"):
        from langgraph.checkpoint.postgres.aio import (  # noqa: PLC0415 - not in the demo's extra
            AsyncPostgresSaver,
        )

        async with AsyncPostgresSaver.from_conn_string(url) as saver:
            await saver.setup()
            yield saver
    else:
        async with AsyncSqliteSaver.from_conn_string(url) as sqlite:
            yield sqlite


def say(event: str, **details: Any) -> None:
    """Tell whoever started this process what happens: one JSON object a line."""
    print(dumps({"event": event, "pid": os.getpid(), **details}), flush=True)  # noqa: T201 - its voice
