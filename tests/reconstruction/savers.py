"""Checkpointers that stop writing on command: what a kill leaves behind, without a process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver


class KilledError(Exception):
    """Leaves a node as a kill would: nothing is written any more."""


@dataclass
class Life:
    """Shared by a saver and the copies that LangGraph makes of it."""

    dead: bool = False

    def end(self) -> None:
        self.dead = True
        raise KilledError


class Mortal(BaseCheckpointSaver[Any]):
    """Mixed into a saver: writes nothing while its life has ended."""

    life: Life

    async def aput(self, config: RunnableConfig, *arguments: Any) -> RunnableConfig:
        return config if self.life.dead else await super().aput(config, *arguments)

    async def aput_writes(self, *arguments: Any) -> None:
        if not self.life.dead:
            await super().aput_writes(*arguments)


class MortalMemory(Mortal, InMemorySaver):
    pass


class MortalSqlite(Mortal, AsyncSqliteSaver):
    pass


class MortalPostgres(Mortal, AsyncPostgresSaver):
    pass


@asynccontextmanager
async def mortal_saver(kind: str, place: Path, postgres_url: str | None) -> AsyncIterator[Mortal]:
    if kind == "memory":
        memory = MortalMemory()
        memory.life = Life()
        yield memory
    elif kind == "sqlite":
        async with MortalSqlite.from_conn_string(str(place / "checkpoints.db")) as sqlite:
            sqlite.life = Life()
            yield sqlite
    else:
        assert postgres_url is not None
        async with MortalPostgres.from_conn_string(postgres_url) as postgres:
            postgres.life = Life()
            await postgres.setup()
            yield postgres
