"""What is with a thread that is not recovered here: somebody else is at it, was, or must be."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from langgraph_peerctx.durability.admission import is_redacted
from langgraph_peerctx.persistence.incidents import Incident, IncidentStatus, Settlement
from langgraph_peerctx.persistence.runs import LostRun, Run
from langgraph_peerctx.protocol.looking import plain
from langgraph_peerctx.reconstruction.incident import incident_record
from langgraph_peerctx.reconstruction.result import RecoveryResult
from langgraph_peerctx.reconstruction.resume import RecoveryStatus

RESULT_LIMIT = 1_000_000
"""A final state longer than this, as JSON, is not kept with the incident, in characters."""

_SAID: dict[IncidentStatus, tuple[RecoveryStatus, Callable[[Incident], str]]] = {
    "recovering": (
        "recovering_elsewhere",
        lambda found: f"{found.recoverer_id} is at work on it",
    ),
    "open": (
        "recovering_elsewhere",
        lambda found: (
            f"nobody is at it, and its next attempt is not before {found.next_attempt_at}; "
            f"`peerctx incidents redrive {found.incident_id[:8]}` does not wait"
        ),
    ),
    "waiting_for_human": (
        "waiting_for_human",
        lambda found: f"answer with `peerctx recover --answer` {found.incident_id[:8]}",
    ),
    "dead_letter": (
        "dead_letter",
        lambda found: f"see `peerctx incidents show {found.incident_id[:8]}`, and redrive it",
    ),
}


def as_it_stands(
    agent_id: str,
    thread_id: str,
    lost: LostRun | None,
    incident: Incident | None,
    others: Sequence[str] = (),
) -> RecoveryResult:
    """Return the result of asking for a recovery that is not ours to make; pure.

    Args:
        agent_id: The agent.
        thread_id: Its thread.
        lost: The thread's open run, if it has one.
        incident: The thread's newest incident, if it has one.
        others: Other agents that have a thread of this name.
    """
    if incident and incident.result and _is_over(incident, lost):
        return _elsewhere(incident)
    if lost is None:
        reason = f"nothing_to_recover: {agent_id} has no run of this thread that has not ended"
        if others:
            reason += f"; {', '.join(others)} has a thread of this name"
        return _result(agent_id, thread_id, "nothing_to_recover", reason)
    if incident is None or incident.run_id != lost.run_id or incident.status not in _SAID:
        left = max(0.0, lost.seconds_left)
        reason = (
            f"unreachable: {lost.owner_id} holds the thread's lease for another {left:.1f} s: "
            "if it is dead, try again then; a supervisor does so by itself"
        )
        return _result(agent_id, thread_id, "unreachable", reason)
    status, why = _SAID[incident.status]
    return result_without(incident, status, f"{status}: {why(incident)}")


def _is_over(incident: Incident, lost: LostRun | None) -> bool:
    """Tell whether an incident is the last word on a thread: its run was not begun again since."""
    if incident.status != "recovered" or lost is None:
        return incident.status == "recovered"
    return lost.run_id == incident.run_id and lost.epoch <= incident.epoch


def kept(result: RecoveryResult) -> dict[str, Any]:
    """Return of a result what is kept with the incident."""
    found = {name: plain(value) for name, value in result.items() if name != "incident"}
    if len(repr(found["final_state"])) > RESULT_LIMIT:
        found["final_state"] = None
        found["reasons"] = [*found["reasons"], "cut: the final state is too long to be kept here"]
    return found


_OURS: Final = re.compile(r"failed: \w+|\w+(?=: )")
"""What of a reason is ours: its word, and of what was raised the type. The rest may quote."""


def storable(run: Run, settlement: Settlement) -> Settlement:
    """Return of a recovery's end what is stored; of a redacted run nothing that was in it; pure.

    Args:
        run: The run.
        settlement: The end, with all that is known.
    """
    is_hidden = any(is_redacted(run, number) for number in range(len(run.inputs)))
    return without_values(settlement) if is_hidden else settlement


def without_values(settlement: Settlement) -> Settlement:
    """Return of a recovery's end how it ended, and nothing that was in its run; pure."""
    result = settlement.result
    return replace(
        settlement,
        error=None if settlement.error is None else _ours(settlement.error),
        result=result and _result_without_values(result),
        report=_without_errors(settlement.report),
    )


def _result_without_values(result: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**result, "final_state": None, "reasons": [_ours(said) for said in result["reasons"]]}


def _without_errors(report: Any) -> Any:
    """Return a record without what tasks have raised: it is in each view of a checkpoint."""
    if isinstance(report, list):
        return [_without_errors(item) for item in report]
    if not isinstance(report, Mapping):
        return report
    is_task = "state" in report and report.get("error") is not None
    kept = {key: _without_errors(item) for key, item in report.items()}
    return {**kept, "error": "redacted"} if is_task else kept


def _ours(said: str) -> str:
    found = _OURS.match(said)
    return said if found is None else found[0]


def _elsewhere(incident: Incident) -> RecoveryResult:
    """Return what another process has made of it."""
    told: dict[str, Any] = dict(incident.result or {})
    found = result_without(
        incident,
        "recovered_elsewhere",
        f"recovered_elsewhere: {incident.recoverer_id}: {told.get('status')}",
    )
    return {
        **found,
        "peer_context_used": bool(told.get("peer_context_used")),
        "degraded": bool(told.get("degraded")),
        "reasons": [*found["reasons"], *told.get("reasons", [])],
        "final_state": told.get("final_state"),
    }


def result_without(incident: Incident, status: RecoveryStatus, reason: str) -> RecoveryResult:
    """Return the result of a recovery that ran nothing here."""
    found = _result(incident.agent_id, incident.thread_id, status, reason)
    record: Any = incident.report or {**found["incident"], "incident_id": incident.incident_id}
    return {**found, "incident": record}


def _result(agent_id: str, thread_id: str, status: RecoveryStatus, reason: str) -> RecoveryResult:
    begun = {
        "incident_id": "",
        "failed_agent_id": agent_id,
        "thread_id": thread_id,
        "started_at": datetime.now(UTC).isoformat(),
        "steps": [],
    }
    return {
        "recovered": False,
        "status": status,
        "peer_context_used": False,
        "degraded": False,
        "reasons": [reason],
        "final_state": None,
        "incident": incident_record(begun, status, None),
    }
