"""What the recorder adds to a run, beside the bare run in the same process.

    python tests/benchmarks/recording.py [--rounds 10] [--runs 30] [--json FILE]

A graph of five nodes of 10 ms, as `ainvoke` (the nodes sleep on the loop) and as `invoke` (they
sleep in the thread); a chat of twenty messages in its state, and SQLite in a file for the events.
Bare and recorded take turns, run by run; figures are medians over the rounds, of p50 and p99. The
processor's time is the whole process's, the writer's thread included.
"""

import argparse
import asyncio
import json
import operator
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from langchain_core.messages import AIMessage, HumanMessage
from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

from langgraph_peerctx.durability.recorder import InteractionRecorder
from langgraph_peerctx.persistence.event_store import EventStore

NODES = 5
NODE_SECONDS = 0.010
TARGET_PERCENT = 5.0
WARM_UP = 5
CHAT = [HumanMessage(f"message {number}: " + "words " * 20) for number in range(20)]


class State(TypedDict, total=False):
    messages: Annotated[list[Any], operator.add]


@dataclass(frozen=True)
class Figures:
    """Milliseconds."""

    bare_p50: float
    recorded_p50: float
    bare_p99: float
    recorded_p99: float
    bare_cpu: float
    recorded_cpu: float

    @property
    def percent(self) -> float:
        return (self.recorded_p50 / self.bare_p50 - 1) * 100


def on_the_loop(number: int) -> Any:
    async def node(_state: State) -> State:
        await asyncio.sleep(NODE_SECONDS)
        return {"messages": [AIMessage(f"answer {number}: " + "words " * 20)]}

    return node


def in_the_thread(number: int) -> Any:
    def node(_state: State) -> State:
        time.sleep(NODE_SECONDS)
        return {"messages": [AIMessage(f"answer {number}: " + "words " * 20)]}

    return node


def graph(node_of: Callable[[int], Any]) -> Any:
    builder = StateGraph(State)
    names = [f"node_{number}" for number in range(NODES)]
    for number, name in enumerate(names):
        builder.add_node(name, node_of(number))
    for one, other in zip([START, *names], names, strict=False):
        builder.add_edge(one, other)
    return builder.compile()


def milliseconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Return how long a run took, and how much of the processor."""
    started, cpu = time.perf_counter(), time.process_time()
    run()
    return (time.perf_counter() - started) * 1_000, (time.process_time() - cpu) * 1_000


def compared(sides: dict[str, Callable[[], Any]], rounds: int, times: int) -> Figures:
    """Let both take turns, run by run; the first runs do not count."""
    p50: dict[str, list[float]] = {name: [] for name in sides}
    p99: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for run in [*sides.values()] * WARM_UP:
        run()
    for _ in range(rounds):
        spent: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(times):
            for name in list(sides)[:: 1 if number % 2 else -1]:
                wall, worked = milliseconds(sides[name])
                spent[name].append(wall)
                cpu[name].append(worked)
        for name, found in spent.items():
            p50[name].append(statistics.median(found))
            p99[name].append(statistics.quantiles(found, n=100)[98])
    middle = statistics.median
    return Figures(
        bare_p50=middle(p50["bare"]),
        recorded_p50=middle(p50["recorded"]),
        bare_p99=middle(p99["bare"]),
        recorded_p99=middle(p99["recorded"]),
        bare_cpu=middle(cpu["bare"]),
        recorded_cpu=middle(cpu["recorded"]),
    )


def measured(rounds: int, times: int) -> dict[str, Figures]:
    found = {}
    given = {"messages": CHAT}
    with tempfile.TemporaryDirectory() as folder, EventStore(f"sqlite:///{folder}/own.db") as store:
        recorder = InteractionRecorder("bench", store=store)
        bare = graph(in_the_thread)
        recorded = bare.with_config(callbacks=[recorder])
        sides = {"bare": lambda: bare.invoke(given), "recorded": lambda: recorded.invoke(given)}
        found["invoke"] = compared(sides, rounds, times)
        abare = graph(on_the_loop)
        arecorded = abare.with_config(callbacks=[recorder])
        with asyncio.Runner() as runner:
            asides = {
                "bare": lambda: runner.run(abare.ainvoke(given)),
                "recorded": lambda: runner.run(arecorded.ainvoke(given)),
            }
            found["ainvoke"] = compared(asides, rounds, times)
        recorder.close()
        expected = 2 * (WARM_UP + rounds * times) * (NODES + 2)
        assert recorder.counters == {"stored": expected}, recorder.counters
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--runs", type=int, default=30)
    options.add_argument("--json", type=Path, default=Path("bench-results/recording.json"))
    chosen = options.parse_args()
    results = measured(chosen.rounds, chosen.runs)
    print(
        f"{NODES} nodes of {NODE_SECONDS * 1_000:g} ms; milliseconds, medians of {chosen.rounds} "
        f"rounds of {chosen.runs} runs; {os.cpu_count()} cores"
    )
    columns = (
        "bare p50",
        "recorded p50",
        "more %",
        "target %",
        "bare p99",
        "recorded p99",
        "bare cpu",
        "recorded cpu",
    )
    print(f"{'':<10}" + "".join(f"{name:>14}" for name in columns))
    for name, row in results.items():
        print(
            f"{name:<10}{row.bare_p50:>14.2f}{row.recorded_p50:>14.2f}{row.percent:>+14.2f}"
            f"{f'<= {TARGET_PERCENT:g}':>14}{row.bare_p99:>14.2f}{row.recorded_p99:>14.2f}"
            f"{row.bare_cpu:>14.2f}{row.recorded_cpu:>14.2f}"
        )
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(
        json.dumps({name: vars(row) for name, row in results.items()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
