"""`peerctx recover`: one thread, now, by hand."""

import asyncio
from typing import Any

from rich.console import Console
from rich.text import Text

from langgraph_peerctx import background
from langgraph_peerctx.commands.printing import cut, print_json, stdout_to_ourselves, table_of
from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.identifiers import check_id
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.reconstruction.recoverer import Recoverer, SupervisedWorkflow
from langgraph_peerctx.reconstruction.result import RecoveryResult
from langgraph_peerctx.workflow_loading import Declared, opened

WAITS_FOR_A_HUMAN = 3
NOT_OURS_NOW = 4
_CODES = {
    "resumed": 0,
    "restarted": 0,
    "already_finished": 0,
    "recovered_elsewhere": 0,
    "nothing_to_recover": 0,
    "waiting_for_human": WAITS_FOR_A_HUMAN,
    "in_doubt": WAITS_FOR_A_HUMAN,
    "unreachable": NOT_OURS_NOW,
    "recovering_elsewhere": NOT_OURS_NOW,
}
_SHOWN = 2_000


def recover(told: Declared, agent_id: str, thread_id: str, *, as_json: bool) -> int:
    """Recover a thread, say how it ended, and return the exit code that says so too.

    Raises:
        ConfigurationError: If a workflow cannot be had, or the run's is not among them.
        ProtocolError: If the agent's id is illegal.
        StoreError: If a database failed.
        BrokerUnavailableError: If there is no broker, and mock mode is `never`.
    """
    check_id(agent_id, "agent_id")
    with stdout_to_ourselves():
        told.prepare()
        result = asyncio.run(_recovered(told, agent_id, thread_id))
    if as_json:
        print_json(result)
    else:
        _show(agent_id, thread_id, result)
    return _CODES.get(result["status"], 1)


async def _recovered(told: Declared, agent_id: str, thread_id: str) -> RecoveryResult:
    """Recover under a claim, without a detector: whoever asks by hand has looked."""
    async with opened(told.places) as workflows:
        lease = background.lease()
        try:
            runtime = await lease.aruntime()
            ownership = await runtime.own()
            supervised = await _workflow_of(ownership.control, agent_id, thread_id, workflows)
            return await Recoverer(runtime, ownership).recover_thread(
                agent_id, thread_id, supervised
            )
        finally:
            await lease.arelease()


async def _workflow_of(
    control: ControlDatabase,
    agent_id: str,
    thread_id: str,
    workflows: dict[str, SupervisedWorkflow],
) -> SupervisedWorkflow:
    run = await control.anewest_run(agent_id, thread_id)
    if run is None:  # there is nothing to recover, whatever the workflow
        return next(iter(workflows.values()))
    found = workflows.get(run.workflow or "")
    if found is None:
        raise ConfigurationError(
            f"the run is of workflow {run.workflow!r:.80}, and only "
            f"{', '.join(sorted(workflows))} is named"
        )
    return found


def _show(agent_id: str, thread_id: str, result: RecoveryResult) -> None:
    incident: Any = result["incident"]
    table = table_of("recovery", f"{thread_id} of {agent_id}")
    rows = [
        ("status", result["status"]),
        ("recovered", "yes" if result["recovered"] else "no"),
        ("peers' facts used", "yes" if result["peer_context_used"] else "no"),
        ("degraded", "yes" if result["degraded"] else "no"),
        ("reasons", "\n".join(result["reasons"])),
        ("incident", incident["incident_id"]),
        ("took", f"{incident['elapsed_seconds']:.3f} s"),
    ]
    if result["final_state"] is not None:
        rows.append(("final state", cut(result["final_state"], _SHOWN)))
    for name, value in rows:
        table.add_row(name, Text(value))
    Console().print(table)
