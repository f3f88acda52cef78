"""`peerctx supervise`: recoveries, as long as it runs."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import NoReturn, Protocol

from langgraph_peerctx import background
from langgraph_peerctx.commands.printing import ago, event, print_line, stdout_to_ourselves
from langgraph_peerctx.commands.until_told import run_until_told
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.reconstruction import failure_detector
from langgraph_peerctx.reconstruction.failure_detector import AgentFailure
from langgraph_peerctx.reconstruction.result import RecoveryResult
from langgraph_peerctx.reconstruction.supervisor import RecoverySupervisor, see_that_it_is_shared
from langgraph_peerctx.workflow_loading import Declared, opened


class _Teller(Protocol):
    """Says what happens."""

    def began(self, workflows: list[str], open_runs: int) -> None: ...

    def noticed(self, said: str) -> None: ...

    def failed(self, failure: AgentFailure) -> None: ...

    def recovered(self, failure: AgentFailure, result: RecoveryResult) -> None: ...

    def ended(self) -> None: ...


def supervise(told: Declared, *, as_json: bool) -> None:
    """Recover lost runs of these workflows until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: If a workflow cannot be had, or the control database is not shared.
        StoreError: If a database cannot be opened.
        BrokerUnavailableError: If there is no broker, and mock mode is `never`.
    """
    tell: _Teller = _Lines() if as_json else _Sentences()
    with stdout_to_ourselves():
        told.prepare()
        _supervise(told, tell)
        tell.ended()


def _supervise(told: Declared, tell: _Teller) -> None:
    async def work() -> None:
        async with opened(told.places) as workflows:
            supervisor = RecoverySupervisor(
                workflows, on_failure=tell.failed, on_recovery=tell.recovered
            )
            see_that_it_is_shared(PeerContextSettings())
            async with _counted() as open_runs, _notices() as notices, supervisor:
                gc.collect()
                gc.freeze()  # what is there stays: to look through it takes 0.1 s in a recovery
                tell.began(sorted(workflows), open_runs)  # before it is told of the first
                await _pass_on(notices, tell)

    run_until_told(work)


@asynccontextmanager
async def _counted() -> AsyncIterator[int]:
    """Start the runtime that the supervisor will use, and count the runs that are open now."""
    lease = background.lease()
    try:
        runtime = await lease.aruntime()
        yield await (await runtime.own()).control.acount_open()
    finally:
        await lease.arelease()


# What the detector says of itself


async def _pass_on(notices: "asyncio.Queue[logging.LogRecord]", tell: _Teller) -> NoReturn:
    """Tell what holds recoveries up, and when that is over; that all is well only after that."""
    is_held_up = False
    while True:
        record = await notices.get()
        is_fault = record.levelno >= logging.WARNING
        if is_fault or is_held_up:
            tell.noticed(record.getMessage())
        is_held_up = is_fault


@asynccontextmanager
async def _notices() -> "AsyncIterator[asyncio.Queue[logging.LogRecord]]":
    """Take what the detector logs of broker and database, from its thread to our loop."""
    loop, notices = asyncio.get_running_loop(), asyncio.Queue[logging.LogRecord]()

    def take(record: logging.LogRecord) -> bool:
        """Tell whether it is not ours: a bug's traceback, or a lost run, which is told anyway."""
        if record.levelno > logging.WARNING or hasattr(record, "thread_id"):
            return True
        loop.call_soon_threadsafe(notices.put_nowait, record)
        return False

    logger = logging.getLogger(failure_detector.__name__)
    level = logger.level
    logger.addFilter(take)
    logger.setLevel(logging.INFO)
    try:
        yield notices
    finally:
        logger.setLevel(level)
        logger.removeFilter(take)


class _Sentences:
    """For people."""

    def began(self, workflows: list[str], open_runs: int) -> None:
        runs = "1 run is" if open_runs == 1 else f"{open_runs} runs are"
        print_line(
            f"supervising {', '.join(workflows)}; {runs} open now; SIGTERM or Ctrl-C ends it"
        )

    def noticed(self, said: str) -> None:
        print_line(f"notice     {said}")

    def failed(self, failure: AgentFailure) -> None:
        owner = failure.process_id or "nobody"
        silent = failure.silent_seconds
        print_line(
            f"lost       {failure.thread_id} of {failure.agent_id}: {failure.why}, owned by {owner}"
            + ("" if silent is None else f", silent for {ago(silent)}")
        )

    def recovered(self, failure: AgentFailure, result: RecoveryResult) -> None:
        took = result["incident"]["elapsed_seconds"]
        degraded = ", degraded" if result["degraded"] else ""
        why = "".join(f"\n           {reason}" for reason in result["reasons"])
        print_line(
            f"recovery   {failure.thread_id} of {failure.agent_id}: {result['status']}"
            f"{degraded}, {took:.3f} s{why}"
        )

    def ended(self) -> None:
        print_line("ended; what was under way is handed over")


class _Lines:
    """For programs: one JSON object a line, without the workflow's state."""

    def began(self, workflows: list[str], open_runs: int) -> None:
        event("supervising", workflows=workflows, open_runs=open_runs)

    def noticed(self, said: str) -> None:
        event("notice", message=said)

    def failed(self, failure: AgentFailure) -> None:
        event("lost", **asdict(failure))

    def recovered(self, failure: AgentFailure, result: RecoveryResult) -> None:
        event(
            "recovery",
            agent_id=failure.agent_id,
            thread_id=failure.thread_id,
            run_id=failure.run_id,
            workflow=failure.workflow,
            incident_id=result["incident"]["incident_id"],
            elapsed_seconds=result["incident"]["elapsed_seconds"],
            **{
                name: result[name]
                for name in ("status", "recovered", "degraded", "reasons", "peer_context_used")
            },
        )

    def ended(self) -> None:
        event("ended")
