"""Pictures of results, for notebooks: HTML and SVG without scripts or style sheets.

Colours are the page's own text colour and middle tones, so that they are read on white and on
black. Whatever peers have written is shown as text: escaped, without control characters, cut.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from typing import Any

MAX_TEXT = 160
"""Characters of one value; what is longer is cut, and ends in an ellipsis."""
MAX_ROWS = 200

GOOD, WARN, BAD, MUTED = "#24874f", "#a06f00", "#d9454a", "#7a7a7a"
SOURCES = {"checkpoint": "#3a7bc8", "own": "#9563d6", "peer": GOOD, "inferred": WARN}

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CELL = "padding:2px 10px;text-align:left;vertical-align:top;border-bottom:1px solid #8a8f9855"
_MONO = "font-family:monospace;font-size:0.92em"


@dataclass(frozen=True, slots=True)
class Drawing:
    """Something that a notebook shows; `html` is well-formed, and safe whatever it tells of."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def text(value: object, limit: int = MAX_TEXT) -> str:
    """Return any value as text that is safe in HTML."""
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    cut = plain if len(plain) <= limit else plain[:limit] + "…"
    return escape("".join(c if c.isprintable() else _REPLACEMENT for c in cut))


def peer_context_html(
    facts: Sequence[Mapping[str, Any]],
    memory: Mapping[str, Any],
    report: Mapping[str, Any],
    *,
    failed_agent_id: str,
    thread_id: str,
) -> str:
    """Draw who knew what: a row a fact, a column an agent, and how much of the truth it is.

    Args:
        facts: As `Fact.as_json` has them, oldest first.
        memory: Agent id -> what it remembers beside.
        report: As `PeerContext.as_report` has it.
        failed_agent_id: Whom it is about.
        thread_id: In which thread.
    """
    tellers = sorted({agent for fact in facts for agent in fact["told_by"]})
    rows = [
        [
            _moment(fact["occurred_at"]),
            text(fact["kind"]),
            f"{text(fact['from_agent'])} → {text(fact['to_agent'])}",
            _mono(fact["payload"]),
            *(_mark(agent in fact["told_by"]) for agent in tellers),
        ]
        for fact in facts
    ]
    return _block(
        f"What peers remember of {_strong(failed_agent_id)} in {_strong(thread_id)}",
        _reasons(report["degraded"]),
        _table(["when", "kind", "between", "what", *map(text, tellers)], rows)
        if rows
        else _line("no interactions", MUTED),
        *(_line(f"{_strong(agent)} remembers beside: {_mono(m)}") for agent, m in memory.items()),
        coverage_html(report["coverage"]),
    )


def coverage_html(report: Mapping[str, Any]) -> str:
    """Draw who was asked and what became of it; `report` as `Coverage.as_json` has it."""
    whole, known = bool(report["complete"]), bool(report["roster_known"])
    said = "everybody was asked and has told all" if whole else "this may not be everything"
    if not known:
        said += "; who should answer was not known"
    kinds = (
        ("answered", "answered", GOOD),
        ("silent", "silent", BAD),
        ("left", "left before", WARN),
        ("declined", "declined", WARN),
        ("busy", "could not look", WARN),
        ("truncated", "cut", WARN),
        ("contradicted", "told in two ways", WARN),
        ("empty", "knew nothing", MUTED),
        ("extra", "unasked", MUTED),
    )
    chips = [
        _chip(f"{label}: {', '.join(map(text, report[name]))}", colour)
        for name, label, colour in kinds
        if report.get(name)
    ]
    counts = [
        _chip(f"{report[name]} {name}", MUTED)
        for name in ("late", "duplicate", "dropped")
        if report.get(name)
    ]
    verdict = _chip("complete" if whole else "not complete", GOOD if whole else WARN)
    return _block(f"{verdict} {said}", " ".join([*chips, *counts]))


def _incident(record: Mapping[str, Any]) -> str:
    sources: dict[str, int] = {}
    for origin in record["provenance"]:
        sources[origin["source"]] = sources.get(origin["source"], 0) + 1
    restored = [
        _chip(f"{count} from {text(name)}", SOURCES.get(name, MUTED))
        for name, count in sources.items()
    ]
    trouble = [
        _chip(f"{len(record[name])} {label}", WARN)
        for name, label in (("conflicts", "conflicts"), ("in_doubt", "effects asked about"))
        if record[name]
    ]
    return _block(
        f"{_strong(record['agent_id'])} in {_strong(record['thread_id'])}: "
        f"{_strong(record['status'])} after {record['elapsed_seconds']:.3f} s "
        f"<span style='color:{MUTED}'>({text(record['incident_id'])})</span>",
        _timeline(record["started_at"], record["steps"]),
        " ".join(["restored:", *restored, *trouble]) if restored or trouble else "",
        coverage_html(record["coverage"]) if record["coverage"] else "",
    )


def draw_incident(record: Mapping[str, Any]) -> Drawing:
    """Draw the record of a recovery: when each step was taken, and how long it took.

    Args:
        record: An `IncidentRecord`, as `RecoveryResult` has it under `incident`.
    """
    return Drawing(_incident(record))


def draw_recovery(result: Mapping[str, Any]) -> Drawing:
    """Draw how a recovery ended: status, steps, where each restored fact comes from, the state.

    Args:
        result: A `RecoveryResult`.
    """
    record = result["incident"]
    good = result["recovered"] or result["status"] in {"already_finished", "nothing_to_recover"}
    colour = BAD if result["status"] == "failed" else GOOD if good else WARN
    origins = [
        [
            text(origin["fact"]),
            _chip(text(origin["source"]), SOURCES.get(origin["source"], MUTED)),
            text(", ".join(origin.get("told_by", ()))),
            _moment(origin["occurred_at"]),
        ]
        for origin in record["provenance"]
    ]
    html = _block(
        _chip(text(result["status"]), colour)
        + (" with what peers know" if result["peer_context_used"] else " without peers"),
        _reasons(result["reasons"]),
        _incident(record),
        _folded(
            "where each restored fact comes from",
            _table(["fact", "source", "told by", "when"], origins),
        )
        if origins
        else "",
        _folded("final state", _state(result["final_state"])),
    )
    return Drawing(html)


def draw_states(states: Mapping[str, Mapping[str, Any]]) -> Drawing:
    """Draw states beside each other, key by key, and mark where they differ.

    Args:
        states: Title -> state, as a workflow returns it.
    """
    columns = list(states.values())
    keys = dict.fromkeys(key for state in columns for key in state)
    rows = []
    for key in keys:
        shown = [_mono(state[key]) if key in state else _line("—", MUTED) for state in columns]
        alike = all(key in state and state[key] == columns[0].get(key) for state in columns)
        rows.append([text(key), *shown, _mark(alike, no="≠")])
    return Drawing(_block("", _table(["", *map(text, states), "equal"], rows)))


def _timeline(began: str, steps: Sequence[Mapping[str, Any]]) -> str:
    """A bar a step on a common axis, in SVG."""
    zero = datetime.fromisoformat(began)
    spans = []
    for step in steps:
        start = (datetime.fromisoformat(step["started_at"]) - zero).total_seconds()
        spans.append((step, max(0.0, start), max(0.0, step["elapsed_seconds"])))
    whole = max((start + took for _, start, took in spans), default=0.0) or 1.0
    left, width, height = 150, 420, 20
    bars = []
    for row, (step, start, took) in enumerate(spans):
        x, y = left + width * start / whole, row * height
        colour = GOOD if step["outcome"] == "done" else BAD
        bars.append(
            f"<text x='0' y='{y + 14}' fill='currentColor'>{text(step['step'], 24)}</text>"
            f"<rect x='{x:.1f}' y='{y + 4}' width='{max(2.0, width * took / whole):.1f}' "
            f"height='12' rx='2' fill='{colour}'><title>{text(step['detail'], 400)}</title></rect>"
            f"<text x='{left + width + 8}' y='{y + 14}' fill='{MUTED}'>{took * 1_000:.1f} ms</text>"
        )
    size = f"width='{left + width + 80}' height='{height * len(spans)}'"
    box = f"viewBox='0 0 {left + width + 80} {height * len(spans)}'"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' aria-label='steps of the recovery' "
        f"{box} {size} font-family='sans-serif' font-size='12'>{''.join(bars)}</svg>"
    )


def _state(state: Any) -> str:
    if not isinstance(state, Mapping):
        return _mono(state)
    return _table(["key", "value"], [[text(key), _mono(value)] for key, value in state.items()])


def _block(title: str, *parts: str) -> str:
    body = "".join(f"<div style='margin:4px 0'>{part}</div>" for part in (title, *parts) if part)
    return f"<div style='color:inherit;line-height:1.5'>{body}</div>"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are HTML already."""
    head = "".join(f"<th style='{_CELL};font-weight:600'>{header}</th>" for header in headers)
    body = "".join(
        "<tr>" + "".join(f"<td style='{_CELL}'>{cell}</td>" for cell in row) + "</tr>"
        for row in rows[:MAX_ROWS]
    )
    more = len(rows) - MAX_ROWS
    left_out = _line(f"and {more} more", MUTED) if more > 0 else ""
    table = f"<table style='border-collapse:collapse'><tr>{head}</tr>{body}</table>"
    return f"<div style='overflow-x:auto'>{table}</div>{left_out}"


def _reasons(reasons: Iterable[str]) -> str:
    return "".join(_line(f"⚠ {text(reason, 400)}", WARN) for reason in reasons)


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{text(title)}</summary>{body}</details>"


def _line(html: str, colour: str = "inherit") -> str:
    return f"<div style='color:{colour}'>{html}</div>"


def _chip(html: str, colour: str) -> str:
    return (
        f"<span style='border:1px solid {colour};color:{colour};border-radius:8px;"
        f"padding:0 6px'>{html}</span>"
    )


def _strong(value: object) -> str:
    return f"<b>{text(value)}</b>"


def _mono(value: object) -> str:
    return f"<span style='{_MONO}'>{text(value)}</span>"


def _mark(yes: bool, no: str = "") -> str:  # noqa: FBT001 - one of two marks
    return f"<span style='color:{GOOD if yes else BAD}'>{'✓' if yes else no}</span>"


def _moment(iso: str) -> str:
    """Return hours, minutes and seconds of a moment; the whole of it as its title."""
    clock = datetime.fromisoformat(iso).strftime("%H:%M:%S.%f")[:12]
    return f"<span title='{text(iso)}'>{clock}</span>"
