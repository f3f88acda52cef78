"""`peerctx incidents`: what failed, how it was recovered, and what waits for a person."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from langgraph_peerctx.commands.control import control_database
from langgraph_peerctx.commands.incident_report import report_parts
from langgraph_peerctx.commands.printing import (
    cut,
    folded,
    lean_table,
    moment,
    print_json,
    print_line,
    print_value,
    whole,
)
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.persistence.incidents import ControlDatabase, Incident, IncidentStatus
from langgraph_peerctx.persistence.inspection import UNKNOWN_WORKFLOW
from langgraph_peerctx.reconstruction.answering import answer_recovery

SHORT_ID = 8
_SHOWN = 20_000
"""How much of a question or a state is shown to people, in characters; JSON has it all."""
_NOTHING: tuple[object, ...] = (None, [], {})
_DATE_WIDTH = len("2030-01-01")
_UNSUPERVISED = (
    "no supervisor that saw it knows its workflow. Run one that does: peerctx supervise "
    "--workflow NAME=FILE.py:ATTRIBUTE, where NAME is that under which its runs were admitted"
)


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
    Console().print(_table(found))
    if any(map(_is_unsupervised, found)):
        print_line(f"\n{UNKNOWN_WORKFLOW}: {_UNSUPERVISED}")


def show_incident(incident_id: str, *, as_json: bool, all_facts: bool = False) -> None:
    """Print what is known of one incident; with `all_facts`, each restored fact.

    Raises:
        ConfigurationError: If there is none of this id, or more than one begins so.
    """
    with control_database(PeerContextSettings()) as control:
        incident = _found(control, incident_id)
    if as_json:
        print_json(asdict(incident))
    else:
        _show(incident, all_facts=all_facts)


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
        ConfigurationError: If there is no such incident, it asks nothing, or the answer is none to
            what it asks.
    """
    incident = answer_recovery(incident_id, answer, settings=PeerContextSettings())
    _tell(incident, "is answered: the next supervisor goes on with it", as_json=as_json)


def _table(found: Sequence[Incident]) -> Table:
    table = lean_table(
        whole("incident"),
        whole("status"),
        folded("thread"),
        whole("tries"),
        Column("opened (UTC)", min_width=_DATE_WIDTH),
        Column("result", overflow="fold", min_width=len(UNKNOWN_WORKFLOW)),
    )
    for one in found:
        cells = [
            one.incident_id[:SHORT_ID],
            one.status,
            f"{one.thread_id} of {one.agent_id}",
            str(one.attempts),
            moment(one.opened_at),
            _outcome(one),
        ]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _is_unsupervised(incident: Incident) -> bool:
    result: dict[str, Any] = incident.result or {}
    return incident.status == "open" and result.get("status") == UNKNOWN_WORKFLOW


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


def _show(incident: Incident, *, all_facts: bool) -> None:
    table = lean_table(whole("incident"), folded(incident.incident_id))
    for name, value in _rows(incident):
        if value:
            table.add_row(name, Text(value))
    console = Console()
    console.print(table)
    report: dict[str, Any] = incident.report or {}
    for part in report_parts(report, all_facts=all_facts):
        console.print()
        console.print(part)
    steps = report.get("steps") or []
    if steps:
        console.print()
        console.print(_steps(steps))
        console.print(_details(steps))
    for name, said in _values(incident):
        if said is not None:
            print_value(name, said, _SHOWN)
    for advice in _advice(incident):
        print_line(f"\n{advice}")


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
    ]


def _values(incident: Incident) -> list[tuple[str, object]]:
    result: dict[str, Any] = incident.result or {}
    return [
        ("final state", result.get("final_state")),
        ("question", incident.question),
        ("answer", incident.answer),
    ]


def _steps(steps: list[dict[str, Any]]) -> Table:
    table = lean_table(*(whole(name) for name in ("step", "began (UTC)", "took", "outcome")))
    for step in steps:
        table.add_row(
            Text(step["step"]),
            Text(step["started_at"][11:23]),
            Text(f"{step['elapsed_seconds'] * 1_000:.1f} ms"),
            Text(step["outcome"]),
        )
    return table


def _details(steps: list[dict[str, Any]]) -> Text:
    """Return what each step noted, under the table: a column would break every id."""
    lines = []
    for step in steps:
        said = {name: one for name, one in step["detail"].items() if one not in _NOTHING}
        noted = [f"{name}={cut(one, 200)}" for name, one in said.items()]
        lines += [f"\n{step['step']}: {', '.join(noted)}"] if noted else []
    return Text("".join(lines))


def _advice(incident: Incident) -> list[str]:
    short = incident.incident_id[:SHORT_ID]
    if incident.status == "waiting_for_human":
        said = (incident.question or {}).get("question", "it waits for an answer")
        return [str(said), f"answer it with: peerctx recover --answer {short} VALUE"]
    if incident.status == "dead_letter":
        return [f"when its cause is gone: peerctx incidents redrive {short}"]
    if _is_unsupervised(incident):
        return [f"{UNKNOWN_WORKFLOW}: {_UNSUPERVISED}"]
    return []
