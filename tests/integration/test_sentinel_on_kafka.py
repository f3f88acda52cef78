"""Deaths on a real Kafka: real processes, killed, and known to a roster at once."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from messaging.sentinel_children import Child, registered, short_directory, until
from services.kafka import KafkaServer

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.presence import Presence
from langgraph_peerctx.messaging.roster import Roster
from langgraph_peerctx.messaging.sentinel import Sentinel
from langgraph_peerctx.messaging.sentinel_place import peer_of, place_of
from langgraph_peerctx.messaging.topics import topics_for
from langgraph_peerctx.messaging.transport import From, Record
from langgraph_peerctx.protocol.codec import decode
from langgraph_peerctx.protocol.messages import DeathNotice

pytestmark = pytest.mark.kafka


class Host:
    """A directory, a presence topic, and who is heard there."""

    def __init__(self, address: str, folder: Path) -> None:
        self.settings = PeerContextSettings(
            kafka=KafkaConfig(bootstrap_servers=address, presence_topic=f"p.{uuid4().hex}"),
            mock_mode="never",
            process_id="observer",
            sentinel_directory=str(folder),
            heartbeat_interval_seconds=0.2,
            heartbeat_pause_seconds=2,
        )
        self.socket = place_of(self.settings).socket
        self.notices: list[DeathNotice] = []

    def hear(self, record: Record) -> None:
        message = decode(record.value)
        if isinstance(message, DeathNotice):
            self.notices.append(message)

    def about(self, do: str, process_id: str, **more: str) -> dict[str, Any]:
        return {
            "do": do,
            "process_id": process_id,
            "incarnation": f"life-of-{process_id}",
            "address": self.settings.kafka.bootstrap_servers,
            "presence": self.settings.kafka.presence_topic,
            "directory": self.settings.sentinel_directory,
            **more,
        }

    @asynccontextmanager
    async def process(self, do: str, process_id: str, **more: str) -> AsyncIterator[Child]:
        child = Child(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "integration.sentinel_host"),
                json.dumps(self.about(do, process_id, **more)),
                cwd=Path(__file__).parents[1],
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        )
        try:
            yield child
        finally:
            await child.end()


@pytest.fixture
async def host(kafka: KafkaServer) -> AsyncIterator[Host]:
    with short_directory() as folder:
        host = Host(kafka.bootstrap_servers, folder)
        transport = KafkaTransport(host.settings.kafka)
        await transport.start()
        try:
            await transport.ensure_topics(topics_for(host.settings.kafka)[1:2])
            subscription = await transport.subscribe(
                [host.settings.kafka.presence_topic], host.hear, start=From(back=100)
            )
            await subscription.positioned()
            yield host
        finally:
            await transport.close()


@asynccontextmanager
async def observer(host: Host) -> AsyncIterator[Roster]:
    transport = KafkaTransport(host.settings.kafka)
    await transport.start()
    presence = Presence(transport, host.settings, "life-of-observer")
    await presence.start()
    try:
        await until(lambda: presence.roster.is_warm, 20)
        yield presence.roster
    finally:
        await presence.close()
        await transport.close()


async def listening(path: Path) -> None:
    await until(path.exists, 30)


def sentinel_of(roster: Roster, process_id: str) -> str | None:
    for member in roster.members:
        if member.beat.process_id == process_id:
            return member.beat.sentinel_id
    return None


async def test_a_killed_process_is_dead_at_once_and_one_that_leaves_has_left(host: Host) -> None:
    async with (
        observer(host) as roster,
        host.process("serve", "unused"),
        host.process("client", "killed") as killed,
        host.process("client", "leaver") as leaver,
    ):
        assert (await killed.hear()).startswith("sentinel-")
        assert (await leaver.hear()).startswith("sentinel-")
        await until(lambda: sentinel_of(roster, "killed") is not None)
        await until(lambda: sentinel_of(roster, "leaver") is not None)

        assert leaver.process.stdin is not None
        leaver.process.stdin.close()
        assert await leaver.process.wait() == 0
        await killed.end()
        await until(lambda: host.notices)
        await until(lambda: roster.died_at(("killed", "life-of-killed")) is not None)
        assert not roster.is_present(("killed", "life-of-killed"))
        dead = {m.beat.process_id: m for m in roster.members if m.died_at is not None}
        assert list(dead) == ["killed"]
        assert not roster.is_present(("leaver", "life-of-leaver"))
    assert [(n.process_id, n.incarnation) for n in host.notices] == [("killed", "life-of-killed")]
    assert roster.counters["false_notice"] == 0


async def test_a_sentinel_started_on_demand_sees_a_death_and_is_replaced_when_killed(
    host: Host,
) -> None:
    async with AsyncExitStack() as stack:
        roster = await stack.enter_async_context(observer(host))
        first, second = [
            await stack.enter_async_context(host.process("client", name, sentinel="auto"))
            for name in ("first", "second")
        ]
        sentinel_id = await first.hear()
        assert await second.hear() == sentinel_id
        await until(lambda: sentinel_of(roster, "second") == sentinel_id, 20)
        os.kill(await pid_at(host.socket), signal.SIGKILL)
        assert await first.hear() == "nobody"
        assert await second.hear() == "nobody"
        assert await first.hear() == sentinel_id
        assert await second.hear() == sentinel_id
        await first.end()
        await until(lambda: host.notices, 20)
        assert host.notices[0].process_id == "first"
        assert roster.is_present(("second", "life-of-second"))


async def pid_at(path: Path) -> int:
    reader, writer = await asyncio.open_unix_connection(str(path))
    del reader
    pid = peer_of(writer.get_extra_info("socket")).pid
    writer.close()
    await writer.wait_closed()
    assert pid
    return pid


async def test_fifty_killed_at_once_are_fifty_notices(host: Host) -> None:
    async with host.process("serve", "unused"), AsyncExitStack() as stack:
        await listening(host.socket)
        names = [f"worker-{number}" for number in range(50)]
        children = [
            await stack.enter_async_context(registered(host.socket, name)) for name in names
        ]
        for child in children:
            child.process.kill()
        await until(lambda: len(host.notices) >= 50, 40)
    assert sorted({notice.process_id for notice in host.notices}) == sorted(names)


async def test_a_broker_that_was_away_hears_of_the_death_when_it_is_back() -> None:
    with short_directory() as folder, KafkaServer() as kafka:
        host = Host(kafka.bootstrap_servers, folder)
        async with Sentinel(host.settings) as sentinel:
            await until(sentinel._speaks.is_set, 20)
            async with registered(host.socket, "worker") as child:
                await asyncio.sleep(0.5)
                await asyncio.to_thread(kafka.stop)
                await child.end()
                await until(lambda: sentinel.counters["died"])
            await asyncio.sleep(1)
            assert sentinel.counters["announced"] == 0
            await asyncio.to_thread(kafka.start)
            await until(lambda: sentinel.counters["announced"], 40)
        transport = KafkaTransport(host.settings.kafka)
        await transport.start()
        try:
            await transport.subscribe(
                [host.settings.kafka.presence_topic], host.hear, start=From(back=1_000)
            )
            await until(lambda: host.notices)
        finally:
            await transport.close()
    assert host.notices[0].process_id == "worker"
    assert host.notices[0].sent_at > host.notices[0].died_at
