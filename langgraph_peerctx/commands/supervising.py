"""`peerctx supervise`: recoveries, as long as it runs."""

import asyncio
import gc
from dataclasses import asdict
from typing import Protocol

from langgraph_peerctx.commands.printing import ago, event, print_line
from langgraph_peerctx.commands.until_told import run_until_told
from langgraph_peerctx.reconstruction.failure_detector import AgentFailure
from langgraph_peerctx.reconstruction.result import RecoveryResult
from langgraph_peerctx.reconstruction.supervisor import RecoverySupervisor
from langgraph_peerctx.workflow_loading import Declared, opened


class _Teller(Protocol):
    """Says what happens."""

    def began(self, workflows: list[str]) -> None: ...

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
    told.prepare()
    tell: _Teller = _Lines() if as_json else _Sentences()

    async def work() -> None:
        async with opened(told.places) as workflows:
            supervisor = RecoverySupervisor(
                workflows, on_failure=tell.failed, on_recovery=tell.recovered
            )
            async with supervisor:
                gc.collect()
                gc.freeze()  # what is there stays: to look through it takes 0.1 s in a recovery
                tell.began(sorted(workflows))
                await asyncio.Event().wait()

    run_until_told(work)
    tell.ended()


class _Sentences:
    """For people."""

    def began(self, workflows: list[str]) -> None:
        print_line(f"supervising {', '.join(workflows)}; SIGTERM or Ctrl-C ends it")

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

    def began(self, workflows: list[str]) -> None:
        event("supervising", workflows=workflows)

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
