"""Who is there, on a real Kafka: real processes, killed, blocked, and late."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from services.kafka import KafkaServer

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.runtime import PeerContextRuntime

pytestmark = pytest.mark.kafka

ABOUT = {"failed_agent_id": "product", "thread_id": "t"}


class Team:
    """Processes with an agent each, on a presence topic of their own."""

    def __init__(self, kafka: KafkaServer, folder: Path) -> None:
        self.address = kafka.bootstrap_servers
        self.presence = f"presence.{uuid4().hex}"
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self._folder = folder

    async def start(self, name: str, how: str = "answer") -> None:
        store = f"sqlite:///{self._folder}/{name}.db"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "integration.presence_child"),
            json.dumps([how, name, self.address, self.presence, store]),
            cwd=Path(__file__).parents[1],
            stdout=asyncio.subprocess.PIPE,
        )
        self.processes[name] = process
        assert process.stdout is not None
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"ready\n"

    async def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        await process.wait()

    async def close(self) -> None:
        for name in list(self.processes):
            await self.kill(name)

    def settings(self) -> PeerContextSettings:
        return PeerContextSettings(
            kafka=KafkaConfig(bootstrap_servers=self.address, presence_topic=self.presence),
            mock_mode="never",
            requester_id="tests",
            process_id="asker",
            heartbeat_interval_seconds=0.2,
            heartbeat_pause_seconds=2,
        )

    @asynccontextmanager
    async def asker(self) -> AsyncIterator[PeerContextRuntime]:
        async with PeerContextRuntime(self.settings()) as runtime:
            async with asyncio.timeout(20):
                while not runtime.presence.roster.is_warm:
                    await asyncio.sleep(0.01)
            yield runtime


@pytest.fixture
async def team(kafka: KafkaServer, tmp_path: Path) -> AsyncIterator[Team]:
    async with AsyncExitStack() as stack:
        team = Team(kafka, tmp_path)
        stack.push_async_callback(team.close)
        yield team


async def ask(runtime: PeerContextRuntime, window: float = 30) -> Any:
    return await runtime.gather(**ABOUT, timeout_seconds=window)


async def test_a_gather_ends_with_those_who_are_there_and_a_killed_one_is_soon_given_up(
    team: Team,
) -> None:
    for name in ("a", "b"):
        await team.start(name)
    await team.start("c", "mute")
    async with team.asker() as runtime:
        asking = asyncio.create_task(ask(runtime))
        await asyncio.sleep(0.5)
        assert not asking.done(), "c is there, and slow"
        killed_at = time.monotonic()
        await team.kill("c")
        context = await asking
        until_known = time.monotonic() - killed_at
        assert context.coverage.answered == ("process-a", "process-b")
        assert context.coverage.left == ("process-c",)
        assert not context.coverage.complete
        assert until_known < 15

        context = await ask(runtime)
        assert context.coverage.asked == ("process-a", "process-b")
        assert context.coverage.complete
        assert context.elapsed_seconds < 15


async def test_an_agent_whose_loop_hangs_is_there_and_answers(team: Team) -> None:
    await team.start("a", "block")
    async with team.asker() as runtime:
        await asyncio.sleep(3)  # longer than a pause
        context = await ask(runtime)
    assert context.coverage.answered == ("process-a",)
    assert context.coverage.complete


async def test_who_was_killed_before_we_came_is_not_expected(team: Team) -> None:
    await team.start("a")
    await team.start("gone")
    await team.kill("gone")
    async with team.asker() as runtime:
        await asyncio.sleep(1)
        context = await ask(runtime)
    assert context.coverage.asked == ("process-a",)
    assert context.coverage.complete
