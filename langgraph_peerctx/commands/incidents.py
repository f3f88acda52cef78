"""`peerctx incidents`: what failed, how it was recovered, and what waits for a person."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from langgraph_peerctx.commands.control import control_database
from langgraph_peerctx.commands.printing import cut, moment, print_json, print_line, table_of
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.persistence.incidents import ControlDatabase, Incident, IncidentStatus

SHORT_ID = 8
_SHOWN = 2_000
"""How much of a question or a state is shown to people, in characters; JSON has it all."""


def list_incidents(status: IncidentStatus | None, limit: int, *, as_json: bool) -> None:
    """Print incidents, newest first."""
    with control_database(PeerContextSettings()) as control:
        found = control.all_incidents(status=status, limit=limit)
    if as_json:
        print_json([asdict(one) for one in found])
        return
    if not found:
        print_line("no incidents")
        return
    table = table_of("incident", "status", "agent", "thread", "attempts", "opened (UTC)", "result")
    for one in found:
        table.add_row(
            *(Text(text) for text in (one.incident_id[:SHORT_ID], one.status, one.agent_id)),
            *(Text(text) for text in (one.thread_id, str(one.attempts), moment(one.opened_at))),
            Text(_outcome(one)),
        )
    Console().print(table)


def show_incident(incident_id: str, *, as_json: bool) -> None:
    """Print all that is known of one incident.

    Raises:
        ConfigurationError: If there is none of this id, or more than one begins so.
    """
    with control_database(PeerContextSettings()) as control:
        incident = _found(control, incident_id)
    if as_json:
        print_json(asdict(incident))
    else:
        _show(incident)


def redrive_incident(incident_id: str, *, as_json: bool) -> None:
    """Let the next supervisor try anew.

    Raises:
        ConfigurationError: If there is no such incident, or it needs none.
    """
    with control_database(PeerContextSettings()) as control:
        incident = control.redrive(incident_id)
    _tell(incident, "is open again: the next supervisor tries anew", as_json=as_json)


def answer_incident(incident_id: str, answer: object, *, as_json: bool) -> None:
    """Answer an incident's question.

    Raises:
        ConfigurationError: If there is no such incident, or it asks nothing.
    """
    with control_database(PeerContextSettings()) as control:
        incident = control.answer(incident_id, answer)
    _tell(incident, "is answered: the next supervisor goes on with it", as_json=as_json)


def _tell(incident: Incident, what: str, *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(incident))
    else:
        print_line(f"incident {incident.incident_id} {what}")


def _found(control: ControlDatabase, incident_id: str) -> Incident:
    incident = control.incident(incident_id)
    if incident is None:
        raise ConfigurationError(
            f"there is no incident {incident_id!r:.80}, or more than one begins so: "
            "see `peerctx incidents list`"
        )
    return incident


def _outcome(incident: Incident) -> str:
    result: dict[str, Any] = incident.result or {}
    status = str(result.get("status") or "")
    reasons = [str(reason) for reason in result.get("reasons") or []]
    return next((one[:120] for one in reasons if one.startswith(f"{status}:")), status)


def _show(incident: Incident) -> None:
    table = table_of("incident", incident.incident_id)
    for name, value in _rows(incident):
        if value:
            table.add_row(name, Text(value))
    console = Console()
    console.print(table)
    report: dict[str, Any] = incident.report or {}
    steps = report.get("steps") or []
    if steps:
        console.print(_steps(steps))
    for advice in _advice(incident):
        print_line(advice)


def _rows(incident: Incident) -> list[tuple[str, str]]:
    result: dict[str, Any] = incident.result or {}
    return [
        ("status", incident.status),
        ("agent", incident.agent_id),
        ("thread", incident.thread_id),
        ("run", incident.run_id or ""),
        ("lost by", f"{incident.dead_incarnation}, under epoch {incident.lost_epoch}"),
        ("attempts", str(incident.attempts)),
        ("recoverer", f"{incident.recoverer_id or '-'}, under epoch {incident.epoch}"),
        ("opened (UTC)", moment(incident.opened_at)),
        ("updated (UTC)", moment(incident.updated_at)),
        ("next attempt (UTC)", moment(incident.next_attempt_at)),
        ("result", str(result.get("status") or "")),
        ("degraded", "yes" if result.get("degraded") else ""),
        ("reasons", "\n".join(result.get("reasons") or [])),
        ("final state", _if_any(result.get("final_state"))),
        ("question", _if_any(incident.question)),
        ("answer", _if_any(incident.answer)),
    ]


def _if_any(value: object) -> str:
    return "" if value is None else cut(value, _SHOWN)


def _steps(steps: list[dict[str, Any]]) -> Any:
    table = table_of("step", "began (UTC)", "took", "outcome", "detail")
    for step in steps:
        table.add_row(
            Text(step["step"]),
            Text(step["started_at"][11:23]),
            Text(f"{step['elapsed_seconds'] * 1_000:.1f} ms"),
            Text(step["outcome"]),
            Text(cut(step["detail"], 200)),
        )
    return table


def _advice(incident: Incident) -> list[str]:
    short = incident.incident_id[:SHORT_ID]
    if incident.status == "waiting_for_human":
        said = (incident.question or {}).get("question", "it waits for an answer")
        return [str(said), f"answer it with: peerctx recover --answer {short} VALUE"]
    if incident.status == "dead_letter":
        return [f"when its cause is gone: peerctx incidents redrive {short}"]
    return []
