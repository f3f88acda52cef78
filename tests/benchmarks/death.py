"""How soon a death is known, beside what it stands on: a bare hop through Kafka, a bare pidfd.

    python tests/benchmarks/death.py [--kills 100] [--json FILE]

A real Apache Kafka on loopback is started and stopped.

`known`: a registered process is killed; from the kernel's word (a pidfd that the measuring process
polls) to the roster of another process, which then holds it for dead. The sentinel runs in a third.
Between the kills, records of a notice's size go the same way with bare aiokafka (`hop`), and
`kernel` is what the kernel took from the kill to its word. So `hop` and a pidfd's waking are the
floor of `known`. What follows upon it, up to the workflow's next node: revival.py.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from services.kafka import KafkaServer

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.presence import Presence
from langgraph_peerctx.messaging.producer import publish
from langgraph_peerctx.messaging.sentinel import serve
from langgraph_peerctx.messaging.sentinel_place import place_of
from langgraph_peerctx.messaging.topics import topics_for
from langgraph_peerctx.messaging.transport import Record, TopicSpec
from langgraph_peerctx.protocol.codec import encode
from langgraph_peerctx.protocol.messages import DeathNotice, Heartbeat

CHILD = Path(__file__).parents[1] / "messaging" / "registering_child.py"
HOPS = "bench.hops"
FORK = get_context("fork")  # the imports are paid once
TARGETS = {"p50": 15.0, "p99": 100.0}

Main = Callable[[str, str, Connection], Awaitable[None]]


def settings_for(address: str, folder: str, process_id: str) -> PeerContextSettings:
    return PeerContextSettings(
        kafka=KafkaConfig(bootstrap_servers=address),
        mock_mode="never",
        process_id=process_id,
        sentinel_directory=folder,
    )


async def sentinel(address: str, folder: str, _pipe: Connection) -> None:
    await serve(settings_for(address, folder, "unused"), idle_seconds=None)


async def observer(address: str, folder: str, pipe: Connection) -> None:
    """Tell when the roster holds a process for dead, and when a bare record came."""
    settings = settings_for(address, folder, "observer")
    transport = KafkaTransport(settings.kafka)
    await transport.start()
    presence = Presence(transport, settings, "life-of-observer")
    take = presence.roster.take

    def taken(record: Record) -> None:
        take(record)
        if record.header("message_type") == "AGENT_DIED":
            now = time.monotonic()
            dead = [m.beat.process_id for m in presence.roster.members if m.died_at is not None]
            pipe.send(("dead", now, dead))

    subscription = await transport.subscribe([settings.kafka.presence_topic], taken)
    await subscription.positioned()
    await presence.start()
    async with bare_reader(address, HOPS) as consumer:
        pipe.send("ready")
        async for record in consumer:
            pipe.send(("hop", time.monotonic(), record.offset))


@contextlib.asynccontextmanager
async def bare_reader(address: str, topic: str) -> Any:
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


def child(main: Main, folder: str, pipe: Connection) -> None:
    logging.disable(logging.ERROR)  # the broker is stopped before them
    with contextlib.suppress(EOFError):
        asyncio.run(main(pipe.recv(), folder, pipe))


@contextlib.contextmanager
def processes(mains: list[Main], folder: str) -> Iterator[list[Connection]]:
    """Fork one process each; they wait for the broker's address."""
    pipes, forked = [], []
    for main in mains:
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=child, args=(main, folder, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        forked.append(process)
    try:
        yield pipes
    finally:
        for process in forked:
            process.kill()
            process.join(10)
        for pipe in pipes:
            pipe.close()


async def make_topics(address: str) -> None:
    config = KafkaConfig(bootstrap_servers=address)
    transport = KafkaTransport(config)
    await transport.start()
    try:
        await transport.ensure_topics([*topics_for(config), TopicSpec(name=HOPS)])
    finally:
        await transport.close()


def expect(pipe: Connection, seconds: float = 30) -> Any:
    if not pipe.poll(seconds):
        raise SystemExit(f"nothing was heard within {seconds:g} s")
    return pipe.recv()


class Victims:
    """Small processes that have registered with the sentinel and are there for the roster."""

    def __init__(self, address: str, folder: str) -> None:
        self._settings = settings_for(address, folder, "victims")
        self._socket = place_of(self._settings).socket

    def wait_for_sentinel(self) -> None:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(self._socket))
                return
            time.sleep(0.05)
        raise SystemExit("the sentinel does not listen")

    def start(self, name: str) -> "subprocess.Popen[bytes]":
        about = {"socket": str(self._socket), "process_id": name, "incarnation": name}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD), json.dumps(about)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        if b"sentinel_id" not in process.stdout.readline():
            raise SystemExit(f"{name} was not registered")
        return process

    async def beat(self, transport: KafkaTransport, name: str) -> None:
        beat = Heartbeat(sent_at=datetime.now(UTC), process_id=name, incarnation=name, sequence=1)
        topic = self._settings.kafka.presence_topic
        await publish(transport, topic, beat, max_bytes=self._settings.max_message_bytes)


def killed(pid: int) -> tuple[float, float]:
    """Kill a process: when we did, and when the kernel's word came."""
    with os.fdopen(os.pidfd_open(pid), "rb", closefd=True) as watched:
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        poll.poll(10_000)
        return at, time.monotonic()


def buried(process: "subprocess.Popen[bytes]") -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    process.wait(10)


def notice_bytes() -> bytes:
    now = datetime.now(UTC)
    return encode(
        DeathNotice(
            sent_at=now,
            process_id="victim-100",
            incarnation="0" * 32,
            sentinel_id="sentinel-some-host-01234567",
            died_at=now,
        )
    )


async def death_to_known(address: str, folder: str, heard: Connection, kills: int) -> Any:
    """Part 1: kills and bare hops take turns, so that both see the same machine."""
    victims = Victims(address, folder)
    victims.wait_for_sentinel()
    transport = KafkaTransport(KafkaConfig(bootstrap_servers=address))
    await transport.start()
    kernel, known, hops, total = [], [], [], []
    payload = notice_bytes()
    async with AIOKafkaProducer(bootstrap_servers=address, acks="all") as producer:
        for number in range(-10, kills):  # the first ten warm up
            name = f"victim-{number + 10}"
            process = victims.start(name)
            await victims.beat(transport, name)
            await asyncio.sleep(0.1)  # nothing else is under way
            at, word_at = killed(process.pid)
            _, dead_at, dead = expect(heard)
            if name not in dead:
                raise SystemExit(f"{name} is not held for dead")
            buried(process)
            await asyncio.sleep(0.05)
            sent_at = time.monotonic()
            await producer.send_and_wait(HOPS, payload, partition=0)
            _, came_at, _ = expect(heard)
            if number >= 0:
                kernel.append(word_at - at)
                known.append(dead_at - word_at)
                total.append(dead_at - at)
                hops.append(came_at - sent_at)
    await transport.close()
    return {
        "kills": kills,
        "known": figures(known),
        "kill to known": figures(total),
        "kernel": figures(kernel),
        "hop": figures(hops),
    }


def figures(times: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(times)
    return {
        name: round(1_000 * ordered[min(len(ordered) - 1, int(len(ordered) * share))], 2)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }


def part_known(kills: int) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory(prefix="pcx-") as folder,
        processes([sentinel, observer], folder) as pipes,  # before any thread starts
        KafkaServer() as kafka,
    ):
        address = kafka.bootstrap_servers
        asyncio.run(make_topics(address))
        for pipe in pipes:
            pipe.send(address)
        expect(pipes[1], 60)
        return asyncio.run(death_to_known(address, folder, pipes[1], kills))  # type: ignore[no-any-return]


def print_known(result: dict[str, Any]) -> None:
    print(f"death to known, milliseconds; {result['kills']} kills of a small process")
    for name in ("known", "kill to known", "kernel", "hop"):
        row = result[name]
        print(f"{name:>14}  p50 {row['p50']:>7}  p99 {row['p99']:>7}  max {row['max']:>7}")
    for share, limit in TARGETS.items():
        met = "met" if result["known"][share] < limit else "MISSED"
        print(f"target {share} < {limit:g} ms: {met}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--json", type=Path, default=Path("bench-results/death.json"))
    chosen = options.parse_args()
    print(f"{os.cpu_count()} cores, real Kafka, loopback")
    results = {"cores": os.cpu_count(), "known": part_known(chosen.kills)}
    print_known(results["known"])
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
