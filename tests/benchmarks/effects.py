"""What an effect costs, beside one commit through the same engine and the bare call.

    python tests/benchmarks/effects.py [--rounds 15] [--effects 100] [--json FILE]

An effect is two commits, its intent and its outcome, each in a thread of the database. Beside it
stand, in the same run and taking turns round by round, one commit of one row through the same
engine and the same threads, and the call that the effect does, which only returns. SQLite: a file
of our own. PostgreSQL: a server of our own that syncs its files. Figures are medians over the
rounds, of p50 and p99 of each, in milliseconds.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

sys.path.insert(0, str(Path(__file__).parents[1]))

from langgraph.graph import END, START, StateGraph
from services.postgres import PostgresServer
from typing_extensions import TypedDict

from langgraph_peerctx import effect
from langgraph_peerctx.durability.run_effects import About, RunEffects
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.schema import effects

TARGET_MS = {"SQLite": 1.5}
TARGET_COMMITS = 2.5
AGENT = "bench"


class State(TypedDict, total=False):
    times: int
    spent: list[float]


@contextmanager
def databases() -> Iterator[dict[str, ControlDatabase]]:
    with (
        tempfile.TemporaryDirectory() as folder,
        PostgresServer() as server,
        server.database() as url,
        ControlDatabase(f"sqlite:///{folder}/control.db") as sqlite,
        ControlDatabase(url) as postgresql,
    ):
        yield {"SQLite": sqlite, "PostgreSQL": postgresql}


async def timed(act: Callable[[int], Awaitable[Any]], times: int) -> list[float]:
    spent = []
    for number in range(times):
        started = time.perf_counter()
        await act(number)
        spent.append((time.perf_counter() - started) * 1_000)
    return spent


async def call() -> dict[str, int]:
    return {"number": 1}


async def effects_of(control: ControlDatabase, times: int) -> list[float]:
    """Return what each effect of a node takes."""
    thread_id = uuid4().hex
    lease = control.claim(
        AGENT, thread_id, owner_id="bench", incarnation="bench", ttl_seconds=3_600
    )
    assert lease is not None
    about = About(agent_id=AGENT, thread_id=thread_id, run_id=thread_id, epoch=lease.epoch)
    spent: list[float] = []

    async def node(_: State) -> State:
        spent.extend(await timed(lambda n: effect(f"order-{n}", call, peer="peer"), times))
        return {}

    builder = StateGraph(State)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    builder.add_edge("node", END)
    place: Any = {"configurable": {"thread_id": thread_id}}
    run = RunEffects(control, about, incarnation="bench")
    await builder.compile().ainvoke({}, run.go_along(place))
    return spent


async def commits_of(control: ControlDatabase, times: int) -> list[float]:
    """Return what one commit of one such row takes."""
    run_id = uuid4().hex

    def commit(number: int) -> None:
        row = {
            "agent_id": AGENT,
            "effect_id": f"{run_id}-{number}",
            "thread_id": run_id,
            "run_id": run_id,
            "position": "node@1",
            "effect_key": f"order-{number}",
            "scope": "run",
            "status": "intent",
            "epoch": 1,
            "attempt": 1,
            "intent_at": number,
        }
        insert = effects.insert().values(**row)
        control._work(lambda connection: connection.execute(insert))

    return await timed(lambda n: control.in_thread(partial(commit, n)), times)


async def calls_of(_control: ControlDatabase, times: int) -> list[float]:
    return await timed(lambda _: call(), times)


SIDES = {"call": calls_of, "commit": commits_of, "effect": effects_of}


async def measured(rounds: int, times: int) -> dict[str, dict[str, tuple[float, float]]]:
    found: dict[str, dict[str, tuple[float, float]]] = {}
    with databases() as opened:
        for database, control in opened.items():
            p50: dict[str, list[float]] = {name: [] for name in SIDES}
            p99: dict[str, list[float]] = {name: [] for name in SIDES}
            for number in range(-1, rounds):  # the first does not count
                for name in [*SIDES][:: 1 if number % 2 else -1]:
                    spent = await SIDES[name](control, times)
                    if number >= 0:
                        p50[name].append(statistics.median(spent))
                        p99[name].append(statistics.quantiles(spent, n=100)[98])
            middle = statistics.median
            found[database] = {name: (middle(p50[name]), middle(p99[name])) for name in SIDES}
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--effects", type=int, default=100)
    options.add_argument("--json", type=Path, default=Path("bench-results/effects.json"))
    chosen = options.parse_args()
    results = asyncio.run(measured(chosen.rounds, chosen.effects))
    print(
        f"milliseconds, medians of {chosen.rounds} rounds of {chosen.effects}; "
        f"{os.cpu_count()} cores"
    )
    columns = ("call p50", "commit p50", "effect p50", "commits", "effect p99")
    print(f"{'':<12}" + "".join(f"{name:>12}" for name in columns) + "  target")
    for database, row in results.items():
        (bare, _), (commit, _), (done, slow) = row["call"], row["commit"], row["effect"]
        target = f"<= {TARGET_COMMITS} commits"
        if database in TARGET_MS:
            target = f"<= {TARGET_MS[database]} ms, {target}"
        print(
            f"{database:<12}{bare:>12.4f}{commit:>12.3f}{done:>12.3f}{done / commit:>12.2f}"
            f"{slow:>12.3f}  {target}"
        )
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
