"""How long a gather takes beside its floor: bare aiokafka echoes of answers of the same size.

    python tests/benchmarks/gather.py [--peers 1,8,64] [--rounds 7] [--asks 60] [--json FILE]

A real Apache Kafka on loopback is started and stopped. For each number of peers, that many
processes with an `AgentContextService` and an event store of their own, and as many processes
that echo with bare aiokafka, live side by side; rounds of gathers and of bare asks take turns, so
that both see the same machine. Figures are medians over the rounds.

`first`: a fresh process each time; from connected clients and existing topics to the merged answer.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from services.kafka import KafkaServer

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.messaging.agent_context_service import AgentContextService
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.topics import topics_for
from langgraph_peerctx.messaging.transport import TopicSpec
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.protocol.codec import encode
from langgraph_peerctx.protocol.messages import AgentAnswer, ContextResponse, Interaction
from langgraph_peerctx.runtime import PeerContextRuntime

FAILED, THREAD, REQUESTER = "product-agent-1", "thread-1", "bench"
ECHO_REQUESTS, ECHO_REPLIES = "bench.echo.request", "bench.echo.response"
INTERACTIONS = 20
FORK = get_context("fork")  # the imports are paid once


def settings_for(address: str, folder: str, process_id: str) -> PeerContextSettings:
    return PeerContextSettings(
        kafka=KafkaConfig(bootstrap_servers=address),
        mock_mode="never",
        requester_id=REQUESTER,
        process_id=process_id,
        database_url=f"sqlite:///{folder}/{process_id}.db",
    )


def remembered(agent_id: str) -> list[Interaction]:
    """What one peer remembers: twenty messages of some 200 bytes."""
    now = datetime.now(UTC)
    return [
        Interaction(
            interaction_id=f"{agent_id}-{number}",
            thread_id=THREAD,
            from_agent=FAILED,
            to_agent=agent_id,
            kind="message",
            payload={"number": number, "text": "an order of three units " * 8},
            occurred_at=now - timedelta(seconds=INTERACTIONS - number),
        )
        for number in range(INTERACTIONS)
    ]


async def until_told(pipe: Connection) -> None:
    """Say that we are ready, then live until the parent says so, or is gone."""
    pipe.send("ready")
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), gone.set)
    await gone.wait()


async def peer(address: str, folder: str, number: int, pipe: Connection) -> None:
    agent_id = f"peer-{number}"
    settings = settings_for(address, folder, agent_id)
    with EventStore(settings.database_url) as store:
        store.append_many(agent_id, remembered(agent_id))
        async with AgentContextService(agent_id, settings=settings, store=store):
            await until_told(pipe)


async def echo(address: str, _folder: str, number: int, pipe: Connection) -> None:
    """The floor: assign by hand, answer each request with as many bytes as a peer would."""
    answer = encode(
        ContextResponse(
            sent_at=datetime.now(UTC),
            correlation_id="0" * 32,
            responder_id=f"peer-{number}",
            failed_agent_id=FAILED,
            thread_id=THREAD,
            agents=(
                AgentAnswer(
                    agent_id=f"peer-{number}",
                    status="context",
                    interactions=tuple(remembered(f"peer-{number}")),
                ),
            ),
        )
    )
    async with (
        AIOKafkaProducer(bootstrap_servers=address, acks="all") as producer,
        reader(address, ECHO_REQUESTS) as consumer,
    ):
        await consumer.getmany(timeout_ms=1)

        async def serve() -> None:
            async for record in consumer:
                await producer.send(ECHO_REPLIES, answer, partition=0, key=record.value[:32])

        serving = asyncio.create_task(serve())
        await until_told(pipe)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


@contextlib.asynccontextmanager
async def reader(address: str, topic: str) -> Any:
    consumer = AIOKafkaConsumer(bootstrap_servers=address, auto_offset_reset="latest")
    await consumer.start()
    try:
        partition = TopicPartition(topic, 0)
        consumer.assign([partition])
        await consumer.seek_to_end(partition)
        await consumer.position(partition)
        yield consumer
    finally:
        await consumer.stop()


def child(
    main: Callable[[str, str, int, Connection], Awaitable[None]],
    number: int,
    folder: str,
    pipe: Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.WARNING)
    with contextlib.suppress(EOFError):
        asyncio.run(main(pipe.recv(), folder, number, pipe))


@contextlib.contextmanager
def children(kinds: list[Any], count: int, folder: str) -> Iterator[list[Connection]]:
    """Fork `count` processes of each kind; they wait for the broker's address."""
    pipes: list[Connection] = []
    processes: list[ForkProcess] = []
    for main in kinds:
        for number in range(count):
            ours, theirs = FORK.Pipe()
            process = FORK.Process(target=child, args=(main, number, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
    try:
        yield pipes
    finally:
        end(pipes)
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def wake(pipes: list[Connection], address: str) -> None:
    for pipe in pipes:
        pipe.send(address)
    for pipe in pipes:
        if not pipe.poll(120):
            raise SystemExit("a process did not become ready within 120 s")
        pipe.recv()


def end(pipes: list[Connection]) -> None:
    """Tell every process to end; closing is not enough, later ones hold copies of our ends."""
    for pipe in pipes:
        with contextlib.suppress(OSError):
            pipe.send("end")
        pipe.close()


class Floor:
    """One asker with bare aiokafka, waiting for all N echoes."""

    def __init__(self, producer: Any, consumer: Any, peers: int) -> None:
        self.producer, self.consumer, self.peers = producer, consumer, peers

    async def ask(self) -> float:
        token = os.urandom(16).hex().encode()
        started = time.perf_counter()
        sending = asyncio.ensure_future(
            self.producer.send_and_wait(ECHO_REQUESTS, token + b"x" * 400, partition=0)
        )
        answered = 0
        while answered < self.peers:
            batches = await self.consumer.getmany(timeout_ms=5_000)
            answered += sum(r.key == token for batch in batches.values() for r in batch)
        elapsed = time.perf_counter() - started
        await sending
        return elapsed


async def gathered(runtime: PeerContextRuntime, peers: int) -> float:
    expect = [f"peer-{number}" for number in range(peers)]
    started = time.perf_counter()
    context = await runtime.gather(failed_agent_id=FAILED, thread_id=THREAD, expect=expect)
    elapsed = time.perf_counter() - started
    if not context.coverage.complete or len(context.facts) != peers * INTERACTIONS:
        raise SystemExit(f"incomplete: {context.coverage}, {len(context.facts)} facts")
    return elapsed


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * share))]


def figures(rounds: list[list[float]]) -> dict[str, float]:
    """Milliseconds: the median over the rounds of each round's percentile."""
    return {
        name: round(1_000 * statistics.median(percentile(times, share) for times in rounds), 3)
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }


async def warm(address: str, folder: str, peers: int, rounds: int, asks: int) -> dict[str, Any]:
    settings = settings_for(address, folder, "asker")
    async with (
        PeerContextRuntime(settings) as runtime,
        AIOKafkaProducer(bootstrap_servers=address, acks="all") as producer,
        reader(address, ECHO_REPLIES) as consumer,
    ):
        floor = Floor(producer, consumer, peers)
        for _ in range(10):
            await gathered(runtime, peers)
            await floor.ask()
        gathers: list[list[float]] = []
        floors: list[list[float]] = []
        for number in range(rounds):
            print(f"\r{peers} peers: round {number + 1} of {rounds}", end="", file=sys.stderr)
            gathers.append([await gathered(runtime, peers) for _ in range(asks)])
            floors.append([await floor.ask() for _ in range(asks)])
        print(file=sys.stderr)
    gather, bare = figures(gathers), figures(floors)
    return {
        "peers": peers,
        "gather": gather,
        "floor": bare,
        "p50_ratio": round(gather["p50"] / bare["p50"], 2),
        "p99_excess_ms": round(gather["p99"] - bare["p99"], 2),
    }


async def first(address: str, folder: str, peers: int) -> tuple[float, float]:
    """A fresh asker: seconds to connect and position, and seconds of its first gather."""
    settings = settings_for(address, folder, f"fresh-{os.getpid()}")
    started = time.perf_counter()
    async with PeerContextRuntime(settings) as runtime:
        connected = time.perf_counter() - started
        return connected, await gathered(runtime, peers)


def fresh_process(address: str, folder: str, peers: int) -> tuple[float, float]:
    ours, theirs = FORK.Pipe()

    def run() -> None:
        logging.disable(logging.WARNING)
        theirs.send(asyncio.run(first(address, folder, peers)))

    process = FORK.Process(target=run)
    process.start()
    theirs.close()
    try:
        return ours.recv()  # type: ignore[no-any-return]  # a Connection carries anything
    finally:
        process.join(10)


def measure(peers: int, rounds: int, asks: int) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as folder,
        children([peer, echo], peers, folder) as pipes,  # before any thread starts
        KafkaServer() as kafka,
    ):
        address = kafka.bootstrap_servers
        asyncio.run(make_topics(address))
        wake(pipes, address)
        result = asyncio.run(warm(address, folder, peers, rounds, asks))
        fresh = [fresh_process(address, folder, peers) for _ in range(10)]
        end(pipes)
        result["connect_ms"] = round(1_000 * statistics.median(c for c, _ in fresh), 1)
        result["first_gather_ms"] = round(1_000 * statistics.median(g for _, g in fresh), 1)
        result["first_gather_max_ms"] = round(1_000 * max(g for _, g in fresh), 1)
        return result


async def make_topics(address: str) -> None:
    config = KafkaConfig(bootstrap_servers=address)
    transport = KafkaTransport(config)
    await transport.start()
    try:
        echoes = [TopicSpec(name=ECHO_REQUESTS), TopicSpec(name=ECHO_REPLIES)]
        await transport.ensure_topics([*topics_for(config, [REQUESTER]), *echoes])
    finally:
        await transport.close()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--peers", default="1,8,64")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--asks", type=int, default=60)
    options.add_argument("--json", type=Path, default=Path("bench-results/gather.json"))
    chosen = options.parse_args()
    results = [measure(int(n), chosen.rounds, chosen.asks) for n in chosen.peers.split(",")]
    print(
        f"\ngather beside bare echoes, milliseconds; {os.cpu_count()} cores, real Kafka, loopback"
    )
    print(
        f"{'peers':>5} {'gather p50':>11} {'floor p50':>10} {'ratio':>6} {'gather p99':>11} "
        f"{'floor p99':>10} {'excess':>7} {'first':>7} {'(max)':>7} {'connect':>8}"
    )
    for row in results:
        gather, floor = row["gather"], row["floor"]
        print(
            f"{row['peers']:>5} {gather['p50']:>11} {floor['p50']:>10} {row['p50_ratio']:>6} "
            f"{gather['p99']:>11} {floor['p99']:>10} {row['p99_excess_ms']:>7} "
            f"{row['first_gather_ms']:>7} {row['first_gather_max_ms']:>7} {row['connect_ms']:>8}"
        )
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps({"cores": os.cpu_count(), "results": results}, indent=2))


if __name__ == "__main__":
    main()
