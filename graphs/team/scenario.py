"""Where the team's processes find each other: broker, event stores, checkpoints, who owns what."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from json import dumps, loads
from os import getpid
from time import monotonic
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from langgraph_peerctx import KafkaConfig, PeerContextSettings

PRODUCT, MARKETING, INVENTORY = "product-agent", "marketing-agent", "inventory-agent"
PEERS = (INVENTORY, MARKETING)
TEAM = (PRODUCT, *PEERS)
SUPERVISOR, SENTINEL = "supervisor", "sentinel"
EVERYBODY = (*TEAM, SUPERVISOR, SENTINEL)

INTERVAL_SECONDS, PAUSE_SECONDS = 0.3, 1.5
"""A third of the defaults: a demonstration should not keep anybody waiting for a lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What every process of one demonstration must know; it travels as JSON.

    Attributes:
        bootstrap_servers: The broker.
        stores: Whose event store is where, as database URLs.
        checkpoints: The checkpoints that the product agent and its supervisor share.
        control: The control database that both share: who owns which launch, and until when.
        sentinel_directory: Where the sentinel is found; None if nobody is to ask for one. A
            socket's name is short: so must this be.
    """

    bootstrap_servers: str
    stores: dict[str, str]
    checkpoints: str
    control: str
    sentinel_directory: str | None = None

    @classmethod
    def in_folder(
        cls, bootstrap_servers: str, folder: str, *, sentinel_directory: str | None = None
    ) -> "Scenario":
        """Return a scenario whose databases are SQLite files."""
        return cls(
            bootstrap_servers=bootstrap_servers,
            stores={who: f"sqlite:///{folder}/{who}.db" for who in EVERYBODY},
            checkpoints=f"{folder}/checkpoints.db",
            control=f"sqlite:///{folder}/control.db",
            sentinel_directory=sentinel_directory,
        )

    def settings_of(self, process: str) -> PeerContextSettings:
        """Return one process's settings. Without the broker it does not pretend."""
        return PeerContextSettings(
            kafka=KafkaConfig(bootstrap_servers=self.bootstrap_servers),
            mock_mode="never",
            requester_id=SUPERVISOR,
            process_id=process,
            database_url=self.stores[process],
            control_database_url=self.control,
            heartbeat_interval_seconds=INTERVAL_SECONDS,
            heartbeat_pause_seconds=PAUSE_SECONDS,
            sentinel="connect" if self.sentinel_directory else "off",
            sentinel_directory=self.sentinel_directory,
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
    """Tell whoever started this process what happens: one JSON object a line, from any thread.

    `at` is the monotonic clock, which all processes of a host share.
    """
    said = {"event": event, "pid": getpid(), "at": monotonic(), **details}
    sys.stdout.write(dumps(said) + "\n")  # in one piece: answers arrive on another thread
    sys.stdout.flush()
