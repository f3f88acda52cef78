"""What LangGraph's side costs, each figure beside its yardstick in the same run.

    python tests/benchmarks/langgraph_face.py [--rounds 21] [--asks 40] [--starts 7] [--json FILE]

`node`: `PeerContextNode` alone, beside a bare `gather()` on the same runtime; one peer in a process
of its own, real Kafka. `mock`: a run of a graph with the node in mock mode, beside the same graph
with a node that does nothing. `dev`: from the start of `langgraph dev` to its first answer, with
`langgraph.json` as it is, beside the same with an application that has no lifespan; in a folder of
an earlier start, and in an empty one, where event stores are made as well. Rounds take turns;
figures are medians over the rounds.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gather import FAILED, THREAD, children, end, make_topics, peer, settings_for, wake
from langgraph.graph import START, StateGraph
from services.kafka import KafkaServer, free_ports

from langgraph_peerctx import PeerContextNode, PeerContextState, background
from langgraph_peerctx.config import PeerContextSettings

REPOSITORY = Path(__file__).parents[2]
PEERS = ["peer-0"]
ABOUT = {"failed_agent_id": FAILED, "thread_id": THREAD}
OFFLINE = {
    "LANGGRAPH_CLI_NO_ANALYTICS": "1",
    "LANGGRAPH_NO_VERSION_CHECK": "true",
    "LANGSMITH_TRACING": "false",
}
BARE_APP = "from starlette.applications import Starlette\n\napp = Starlette()\n"
Rounds = Callable[[int], Awaitable[list[float]]]
"""Does something so many times, and returns the seconds of each."""


class State(PeerContextState, total=False):
    failed_agent_id: str
    thread_id: str


async def timed(work: Callable[[], Awaitable[Any]], times: int) -> list[float]:
    spent = []
    for _ in range(times):
        started = time.perf_counter()
        await work()
        spent.append(time.perf_counter() - started)
    return spent


async def in_turns(subject: Rounds, yardstick: Rounds, rounds: int, asks: int) -> dict[str, float]:
    """Time both, round by round; the first runs do not count."""
    await subject(10)
    await yardstick(10)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(statistics.median(await subject(asks)))
        theirs.append(statistics.median(await yardstick(asks)))
    return figures(ours, theirs)


def figures(ours: list[float], theirs: list[float]) -> dict[str, float]:
    subject, yardstick = (1_000 * statistics.median(medians) for medians in (ours, theirs))
    return {
        "p50_ms": round(subject, 3),
        "yardstick_ms": round(yardstick, 3),
        "excess_ms": round(subject - yardstick, 3),
    }


async def node_beside_gather(
    settings: PeerContextSettings, rounds: int, asks: int
) -> dict[str, float]:
    lease = background.lease(settings)
    runtime = await lease.aruntime()
    node = PeerContextNode(expect=PEERS, settings=settings)

    async def bare(times: int) -> list[float]:
        async def on_its_loop(own: Any) -> list[float]:
            return await timed(lambda: own.gather(**ABOUT, expect=PEERS), times)

        return await runtime.acall(on_its_loop)

    try:
        return await in_turns(lambda n: timed(lambda: node.ainvoke(ABOUT), n), bare, rounds, asks)
    finally:
        await lease.arelease()


async def mock_beside_nothing(rounds: int, asks: int) -> dict[str, float]:
    def graph_of(node: Any) -> Any:
        builder = StateGraph(State)
        builder.add_node("peer_context", node)
        builder.add_edge(START, "peer_context")
        return builder.compile()

    settings = PeerContextSettings(mock_mode="always")
    lease = background.lease(settings)
    await lease.aruntime()
    ours, bare = graph_of(PeerContextNode(settings=settings)), graph_of(lambda _state: {})
    try:
        return await in_turns(
            lambda n: timed(lambda: ours.ainvoke(ABOUT), n),
            lambda n: timed(lambda: bare.ainvoke(ABOUT), n),
            rounds,
            asks,
        )
    finally:
        await lease.arelease()


def dev_with_and_without(starts: int) -> dict[str, dict[str, float]]:
    ours = json.loads((REPOSITORY / "langgraph.json").read_text())
    bare = {**ours, "http": {"app": "./bare.py:app"}}
    again: list[float] = []
    fresh: list[float] = []
    without: list[float] = []
    with tempfile.TemporaryDirectory() as kept:
        seconds_to_start(ours, Path(kept))
        for _ in range(starts):
            again.append(seconds_to_start(ours, Path(kept)))
            without.append(seconds_to_start(bare, Path(kept)))
            with tempfile.TemporaryDirectory() as empty:
                fresh.append(seconds_to_start(ours, Path(empty)))
    return {
        "langgraph dev with the lifespan, beside without": figures(again, without),
        "the same in an empty folder": figures(fresh, without),
    }


def seconds_to_start(configuration: dict[str, Any], kept: Path) -> float:
    """Start a server that keeps its things there, wait for its first answer, and kill it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "graphs").symlink_to(REPOSITORY / "graphs")
        (folder / "bare.py").write_text(BARE_APP)
        (folder / "langgraph.json").write_text(json.dumps(configuration))
        (port,) = free_ports(1)
        command = ["langgraph_cli", "dev", "--no-browser", "--no-reload"]
        started = time.perf_counter()
        server = subprocess.Popen(
            [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env={**os.environ, **OFFLINE, "PEERCTX_STUDIO_FOLDER": str(kept)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while server.poll() is None and time.perf_counter() - started < 60:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ok", timeout=1).close()
                except (urllib.error.URLError, OSError):
                    time.sleep(0.01)
                else:
                    return time.perf_counter() - started
        finally:
            server.send_signal(signal.SIGKILL)
            server.wait(10)
    raise SystemExit("langgraph dev did not start")


def node_on_kafka(rounds: int, asks: int) -> dict[str, float]:
    with (
        tempfile.TemporaryDirectory() as folder,
        children([peer], 1, folder) as pipes,  # before any thread starts
        KafkaServer() as kafka,
    ):
        asyncio.run(make_topics(kafka.bootstrap_servers))
        wake(pipes, kafka.bootstrap_servers)
        settings = settings_for(kafka.bootstrap_servers, folder, "asker")
        result = asyncio.run(node_beside_gather(settings, rounds, asks))
        end(pipes)
        return result


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=21)
    options.add_argument("--asks", type=int, default=40)
    options.add_argument("--starts", type=int, default=7)
    options.add_argument("--json", type=Path, default=Path("bench-results/langgraph_face.json"))
    chosen = options.parse_args()
    logging.disable(logging.WARNING)
    results = {
        "node, beside a bare gather": node_on_kafka(chosen.rounds, chosen.asks),
        "graph in mock mode, beside an empty node": asyncio.run(
            mock_beside_nothing(chosen.rounds, chosen.asks)
        ),
        **dev_with_and_without(chosen.starts),
    }
    print(f"milliseconds, medians; {os.cpu_count()} cores, real Kafka, loopback")
    for name, row in results.items():
        print(f"{name:<52}{row['p50_ms']:>10} {row['yardstick_ms']:>10} {row['excess_ms']:>+9}")
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
