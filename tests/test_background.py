"""One runtime a process, for any thread and any loop, started and stopped by counting."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from runtime_threads import no_runtime_left, running_threads

from langgraph_peerctx import background
from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.errors import BrokerUnavailableError, ConfigurationError, StoreError
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.runtime import PeerContextRuntime

MOCK = PeerContextSettings(mock_mode="always")
NOWHERE = PeerContextSettings(
    kafka=KafkaConfig(bootstrap_servers="127.0.0.1:1", connect_timeout_seconds=0.5),
    mock_mode="never",
)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with no_runtime_left():
        yield


async def ask(runtime: PeerContextRuntime) -> PeerContext:
    return await runtime.gather(failed_agent_id="product", thread_id="t", timeout_seconds=1)


async def thread_name(_runtime: PeerContextRuntime) -> str:
    return threading.current_thread().name


def test_a_process_has_one_runtime_and_the_last_lease_stops_it() -> None:
    first, second = background.lease(MOCK), background.lease()
    assert first.runtime() is second.runtime()
    first.release()
    first.release()
    assert second.runtime().call(thread_name) == "peerctx-runtime"
    second.release()
    assert background.settings_in_use() is None
    third = background.lease(MOCK)
    assert third.runtime() is not second.runtime()
    third.release()


async def test_it_serves_any_thread_and_any_loop() -> None:
    lease = background.lease(MOCK)
    runtime = await lease.aruntime()

    def elsewhere() -> tuple[PeerContext, PeerContext]:
        return runtime.call(ask), asyncio.run(runtime.acall(ask))

    contexts = [await runtime.acall(ask), *await asyncio.to_thread(elsewhere)]
    assert [context.degraded[0][:9] for context in contexts] == ["mock mode"] * 3
    await lease.arelease()
    assert "peerctx-runtime" not in running_threads()


async def test_cancelling_the_caller_cancels_the_work() -> None:
    lease = background.lease(MOCK)
    runtime = await lease.aruntime()
    began, ended = threading.Event(), threading.Event()

    async def wait(_runtime: PeerContextRuntime) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    calling = asyncio.create_task(runtime.acall(wait))
    assert await asyncio.to_thread(began.wait, 20)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert await asyncio.to_thread(ended.wait, 20)
    await lease.arelease()


async def test_what_the_work_raises_is_raised_to_its_caller() -> None:
    async def fail(_runtime: PeerContextRuntime) -> None:
        raise StoreError("locked")

    lease = background.lease(MOCK)
    with pytest.raises(StoreError, match="locked"):
        await (await lease.aruntime()).acall(fail)
    assert (await lease.aruntime()).degraded
    await lease.arelease()


async def test_a_runtime_that_cannot_start_says_so_to_each_and_is_tried_anew() -> None:
    leases = [background.lease(NOWHERE) for _ in range(3)]
    for lease in leases:
        with pytest.raises(BrokerUnavailableError, match=r"127\.0\.0\.1:1"):
            await lease.aruntime()
    assert background.settings_in_use() is None
    for lease in leases:
        await lease.arelease()
    again = background.lease(MOCK)
    await again.aruntime()
    await again.arelease()


def test_other_settings_than_those_it_runs_with_are_refused() -> None:
    lease = background.lease(MOCK)
    with pytest.raises(ConfigurationError, match="timeout_seconds"):
        background.lease(MOCK.model_copy(update={"timeout_seconds": 1.5}))
    lease.runtime()
    lease.release()


def test_a_kept_runtime_runs_on_until_it_is_let_go() -> None:
    for _ in range(2):
        lease = background.lease(MOCK, keep=True)
        runtime = lease.runtime()
        lease.release()
    assert background.settings_in_use() is not None
    assert runtime.call(ask).degraded
    busy = background.lease()
    background.stop_kept_runtime()
    assert busy.runtime().call(ask).degraded
    busy.release()


async def test_stopping_waits_for_whoever_is_at_work() -> None:
    lifespan, node = background.lease(MOCK), background.lease()
    runtime = await node.aruntime()
    finish = threading.Event()

    async def work(_runtime: PeerContextRuntime) -> str:
        await asyncio.to_thread(finish.wait, 5)
        return "done"

    working = asyncio.create_task(runtime.acall(work))
    await asyncio.sleep(0.01)
    await lifespan.arelease()
    finish.set()
    assert await working == "done"
    await node.arelease()
    with pytest.raises(ConfigurationError, match="stopped"):
        await runtime.acall(work)


def test_an_interrupted_call_ends_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a sync node waits: nobody waits for the gather any more."""
    began, ended = threading.Event(), threading.Event()

    async def work(_runtime: PeerContextRuntime) -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    def interrupted(_self: Any, _timeout: float | None = None) -> None:
        assert began.wait(5)
        raise KeyboardInterrupt

    lease = background.lease(MOCK)
    runtime = lease.runtime()
    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runtime.call(work)
    assert ended.wait(5)
    lease.release()


async def test_what_is_still_at_work_ends_with_the_runtime() -> None:
    async def work(_runtime: PeerContextRuntime) -> None:
        began.set()
        await asyncio.sleep(60)

    began = threading.Event()
    lease = background.lease(MOCK)
    runtime = await lease.aruntime()
    working = asyncio.create_task(runtime.acall(work))
    assert await asyncio.to_thread(began.wait, 5)
    await lease.arelease()
    async with asyncio.timeout(5):
        await asyncio.wait({working})
    assert working.cancelled()


@pytest.fixture
async def hosting(tmp_path: Path) -> AsyncIterator[background.BackgroundRuntime]:
    settings = MOCK.model_copy(update={"database_url": f"sqlite:///{tmp_path}/events.db"})
    lease = background.lease(settings)
    yield await lease.aruntime()
    await lease.arelease()


async def test_an_agent_is_hosted_as_long_as_anybody_wants_it(
    hosting: background.BackgroundRuntime,
) -> None:
    await asyncio.gather(hosting.host("a"), hosting.host("a"), hosting.host("b"))
    assert hosting.agents == ("a", "b")
    await hosting.unhost("a")
    await hosting.unhost("b")
    await hosting.unhost("b")
    assert hosting.agents == ("a",)


async def test_an_agent_whose_store_cannot_be_opened_is_not_hosted(tmp_path: Path) -> None:
    settings = MOCK.model_copy(update={"database_url": f"sqlite:///{tmp_path}/missing/events.db"})
    lease = background.lease(settings)
    runtime = await lease.aruntime()
    with pytest.raises(StoreError, match="missing"):
        await runtime.host("a")
    assert runtime.agents == ()
    await lease.arelease()


async def test_stopped_while_an_agent_is_being_hosted_it_closes_its_runtime_all_the_same(
    hosting: background.BackgroundRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, closed = threading.Event(), threading.Event()

    async def never(*_: Any, **__: Any) -> Any:
        began.set()
        await asyncio.Event().wait()

    close = PeerContextRuntime.close

    async def seen(self: PeerContextRuntime) -> None:
        await close(self)
        closed.set()

    monkeypatch.setattr(background, "ready_handler", never)
    monkeypatch.setattr(background, "STOP_TIMEOUT_SECONDS", 4)
    monkeypatch.setattr(PeerContextRuntime, "close", seen)
    being_hosted = asyncio.create_task(hosting.host("a"))
    assert await asyncio.to_thread(began.wait, 5)
    await asyncio.to_thread(hosting.stop)
    assert closed.is_set()
    async with asyncio.timeout(5):
        await asyncio.wait({being_hosted})
    assert being_hosted.cancelled()


FORKED = """
import os, sys
from langgraph_peerctx import background
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError
lease = background.lease(PeerContextSettings(mock_mode="always"))
runtime = lease.runtime()
child = os.fork()
if child == 0:
    refused = 0
    for attempt in (background.lease, lambda: runtime.call(None)):
        try:
            attempt()
        except ConfigurationError as error:
            refused += "forked" in str(error)
    os._exit(0 if refused == 2 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
KEPT = """
from langgraph_peerctx import background
from langgraph_peerctx.config import PeerContextSettings
background.lease(PeerContextSettings(mock_mode="always"), keep=True).runtime()
"""


@pytest.mark.parametrize("script", [FORKED, KEPT], ids=["forked", "kept"])
def test_in_a_process_of_its_own(script: str) -> None:
    done: Any = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
    )
    unsaid = [line for line in done.stderr.splitlines() if not line.startswith("mock mode: ")]
    assert (done.returncode, unsaid) == (0, [])
