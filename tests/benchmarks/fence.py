"""What the fence adds to a checkpoint's write, beside the bare saver in the same run.

    python tests/benchmarks/fence.py [--rounds 15] [--puts 100] [--json FILE]

SQLite: checkpoints in one file, leases in another. PostgreSQL: both in one database of a server of
our own that syncs its files, so that lease and write share a transaction. Bare and fenced take
turns, round by round; figures are medians over the rounds, of p50 and p99 of each. A checkpoint
carries a chat of twenty messages; the writes are those of one task.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

sys.path.insert(0, str(Path(__file__).parents[1]))

from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from services.postgres import PostgresServer

from langgraph_peerctx.durability.fenced_checkpointer import FencedCheckpointer
from langgraph_peerctx.durability.ownership import Ownership
from langgraph_peerctx.persistence.leases import Leases

TARGETS_MS = {"SQLite": 1.0, "PostgreSQL": 0.8}
CHAT = [f"message {number}: " + "words " * 20 for number in range(20)]
Step = Callable[[Any, str], Awaitable[None]]


@dataclass(frozen=True)
class Figures:
    """Milliseconds."""

    bare_p50: float
    fenced_p50: float
    bare_p99: float
    fenced_p99: float

    @property
    def excess(self) -> float:
        return self.fenced_p50 - self.bare_p50


async def put(saver: Any, thread_id: str) -> None:
    config: Any = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}
    version = saver.get_next_version(None, None)
    checkpoint: Any = {
        **empty_checkpoint(),
        "channel_values": {"messages": CHAT},
        "channel_versions": {"messages": version},
    }
    await saver.aput(config, checkpoint, {"source": "loop", "step": 1}, {"messages": version})


async def put_writes(saver: Any, thread_id: str) -> None:
    place = {"thread_id": thread_id, "checkpoint_ns": "", "checkpoint_id": "1"}
    await saver.aput_writes({"configurable": place}, [("messages", CHAT[:1])], uuid4().hex)


async def timed(step: Step, saver: Any, thread_id: str, times: int) -> list[float]:
    spent = []
    for _ in range(times):
        started = time.perf_counter()
        await step(saver, thread_id)
        spent.append((time.perf_counter() - started) * 1_000)
    return spent


async def compared(bare: Any, fenced: Any, step: Step, rounds: int, times: int) -> Figures:
    """Let both take turns; the first writes do not count."""
    sides = [(bare, "bare"), (fenced, "owned")]
    p50: dict[str, list[float]] = {"bare": [], "owned": []}
    p99: dict[str, list[float]] = {"bare": [], "owned": []}
    for saver, thread_id in sides:
        await timed(step, saver, thread_id, 20)
    for number in range(rounds):
        for saver, thread_id in sides[:: 1 if number % 2 else -1]:
            spent = await timed(step, saver, thread_id, times)
            p50[thread_id].append(statistics.median(spent))
            p99[thread_id].append(statistics.quantiles(spent, n=100)[98])
    middle = statistics.median
    return Figures(
        middle(p50["bare"]), middle(p50["owned"]), middle(p99["bare"]), middle(p99["owned"])
    )


@asynccontextmanager
async def fence(saver: Any, control: str) -> AsyncIterator[FencedCheckpointer]:
    with Leases(control) as leases:
        ownership = Ownership(leases, owner_id="bench", incarnation=uuid4().hex, ttl_seconds=3_600)
        assert await ownership.claim("bench", "owned")
        fenced = FencedCheckpointer(saver, ownership)
        yield fenced
        await fenced.aclose()


@asynccontextmanager
async def on_sqlite() -> AsyncIterator[tuple[Any, FencedCheckpointer]]:
    with tempfile.TemporaryDirectory() as folder:
        async with (
            AsyncSqliteSaver.from_conn_string(f"{folder}/checkpoints.db") as saver,
            fence(saver, f"sqlite:///{folder}/control.db") as fenced,
        ):
            await saver.setup()
            yield saver, fenced


@asynccontextmanager
async def on_postgresql() -> AsyncIterator[tuple[Any, FencedCheckpointer]]:
    with PostgresServer() as server, server.database() as url:
        async with AsyncPostgresSaver.from_conn_string(url) as saver:
            await saver.setup()
            async with fence(saver, url) as fenced:
                await put(fenced, "owned")
                transactions = fenced._transactions
                assert transactions is not None
                assert await transactions.ownership(saver), "they share no transaction"
                yield saver, fenced


async def measured(rounds: int, times: int) -> dict[str, Figures]:
    found = {}
    for database, opened in (("SQLite", on_sqlite), ("PostgreSQL", on_postgresql)):
        async with opened() as (bare, fenced):
            for step in (put, put_writes):
                figures = await compared(bare, fenced, step, rounds, times)
                found[f"{database}, a{step.__name__}"] = figures
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--puts", type=int, default=100)
    options.add_argument("--json", type=Path, default=Path("bench-results/fence.json"))
    chosen = options.parse_args()
    results = asyncio.run(measured(chosen.rounds, chosen.puts))
    print(
        f"milliseconds, medians of {chosen.rounds} rounds of {chosen.puts}; {os.cpu_count()} cores"
    )
    columns = ("bare p50", "fenced p50", "more", "target", "bare p99", "fenced p99")
    print(f"{'':<26}" + "".join(f"{name:>12}" for name in columns))
    for name, row in results.items():
        target = TARGETS_MS[name.partition(",")[0]]
        print(
            f"{name:<26}{row.bare_p50:>12.3f}{row.fenced_p50:>12.3f}{row.excess:>+12.3f}"
            f"{'<= ' + str(target):>12}{row.bare_p99:>12.3f}{row.fenced_p99:>12.3f}"
        )
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(
        json.dumps({name: vars(row) for name, row in results.items()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
