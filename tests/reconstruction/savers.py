"""Checkpointers that stop writing on command: what a kill leaves behind, without a process."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

QUIET_TURNS = 100


class KilledError(Exception):
    """Leaves a node as a kill would: nothing is written any more."""


@dataclass
class Life:
    """Shared by a saver and the copies that LangGraph makes of it."""

    dead: bool = False
    in_flight: int = 0

    def end(self) -> None:
        self.dead = True
        raise KilledError

    async def end_when_quiet(self) -> None:
        """End when all that the rest of the process can do by itself is done and stored.

        From a node's end to the storing of its writes the loop turns a few times, and waits for
        nothing but the checkpointer.
        """
        quiet_turns = 0
        while quiet_turns < QUIET_TURNS:
            await asyncio.sleep(0)
            quiet_turns = 0 if self.in_flight else quiet_turns + 1
        self.end()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


class Mortal(BaseCheckpointSaver[Any]):
    """Mixed into a saver: writes nothing while its life has ended."""

    life: Life

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        with self.life.at_work():
            return await super().aget_tuple(config)

    async def aput(self, config: RunnableConfig, *arguments: Any) -> RunnableConfig:
        if self.life.dead:
            return config
        with self.life.at_work():
            return await super().aput(config, *arguments)

    async def aput_writes(self, *arguments: Any) -> None:
        if self.life.dead:
            return
        with self.life.at_work():
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
