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


def printable(value: object, limit: int = MAX_TEXT) -> str:
    """Return any value as text that does nothing to a terminal; what is too long is cut."""
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    cut = plain if len(plain) <= limit else plain[:limit] + "…"
    return "".join(c if c.isprintable() else _REPLACEMENT for c in cut)


def text(value: object, limit: int = MAX_TEXT) -> str:
    """Return any value as text that is safe in HTML."""
    return escape(printable(value, limit))


def rows_html(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], *, limit: int = MAX_TEXT
) -> str:
    """Draw a table of any texts; `limit` is a cell's, in characters."""
    cells = [[text(cell, limit) for cell in row] for row in rows]
    return _block(text(title), _table([text(header) for header in headers], cells))


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
        _moments(record.get("times") or {}),
        _timeline(record["started_at"], record["steps"]),
        " ".join(["restored:", *restored, *trouble]) if restored or trouble else "",
        coverage_html(record["coverage"]) if record["coverage"] else "",
    )


def draw_incident(record: Mapping[str, Any]) -> Drawing:
    """Draw the record of a recovery: from the last heartbeat to its end, and each step of it.

    Args:
        record: An `IncidentRecord`, as `RecoveryResult` has it under `incident`, and an `Incident`
            under `report`. What it does not say, as older ones, is left out.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bar:
    """One row of a chart; `start` and `took` in seconds, `marks` on the same axis."""

    label: str
    start: float
    took: float
    colour: str
    said: object
    marks: Sequence[tuple[float, str]] = ()


_LEFT, _WIDTH, _RIGHT, _HEIGHT = 150, 420, 80, 20


def _chart(label: str, bars: Sequence[_Bar]) -> str:
    """A bar a row on a common axis, in SVG."""
    whole = max((bar.start + bar.took for bar in bars), default=0.0) or 1.0

    def at(seconds: float) -> float:
        return _LEFT + _WIDTH * min(1.0, seconds / whole)

    drawn = []
    for row, bar in enumerate(bars):
        y = row * _HEIGHT
        drawn.append(
            f"<text x='0' y='{y + 14}' fill='currentColor'>{text(bar.label, 24)}</text>"
            f"<rect x='{at(bar.start):.1f}' y='{y + 4}' "
            f"width='{max(2.0, _WIDTH * bar.took / whole):.1f}' "
            f"height='12' rx='2' fill='{bar.colour}'><title>{text(bar.said, 400)}</title></rect>"
        )
        drawn += [
            f"<rect x='{at(seconds) - 1:.1f}' y='{y + 1}' width='2' height='18' "
            f"fill='currentColor'><title>{text(said, 400)}</title></rect>"
            for seconds, said in bar.marks
        ]
        drawn.append(
            f"<text x='{_LEFT + _WIDTH + 8}' y='{y + 14}' fill='{MUTED}'>{_took(bar.took)}</text>"
        )
    across, down = _LEFT + _WIDTH + _RIGHT, _HEIGHT * len(bars)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' aria-label='{text(label)}' "
        f"viewBox='0 0 {across} {down}' width='{across}' height='{down}' "
        f"font-family='sans-serif' font-size='12'>{''.join(drawn)}</svg>"
    )


def _timeline(began: str, steps: Sequence[Mapping[str, Any]]) -> str:
    """A bar a step."""
    bars = [
        _Bar(
            label=step["step"],
            start=_seconds(began, step["started_at"]),
            took=max(0.0, step["elapsed_seconds"]),
            colour=GOOD if step["outcome"] == "done" else BAD,
            said=step["detail"],
        )
        for step in steps
    ]
    return _chart("steps of the recovery", bars)


_MOMENTS = (
    ("known", "known_at", WARN),
    ("claimed", "claimed_at", MUTED),
    ("asked", "requested_at", MUTED),
    ("answered", "", SOURCES["peer"]),
    ("reconstructed", "reconstructed_at", SOURCES["own"]),
    ("resumed", "resumed_at", SOURCES["checkpoint"]),
    ("first checkpoint", "first_checkpoint_at", GOOD),
    ("ended", "ended_at", GOOD),
)


def _moments(times: Mapping[str, Any]) -> str:
    """From the last heartbeat to the end: a bar up to each moment, a mark for each answer."""
    answers = times.get("answers") or []
    reached = [
        (label, at, colour)
        for label, key, colour in _MOMENTS
        if (at := times.get(key) if key else answers[-1]["at"] if answers else None)
    ]
    zero = times.get("last_heartbeat_at") or (reached[0][1] if reached else None)
    if zero is None:
        return ""
    bars, before = [], 0.0
    for label, at, colour in reached:
        start, before = before, max(before, _seconds(zero, at))
        marks = [(_seconds(zero, one["at"]), _answer(one)) for one in answers]
        bars.append(
            _Bar(
                label=label,
                start=start,
                took=before - start,
                colour=colour,
                said=at,
                marks=marks if label == "answered" else (),
            )
        )
    heard = (
        [f"{_strong('last heartbeat')} {_moment(zero)}"] if times.get("last_heartbeat_at") else []
    )
    why = [f"noticed: {text(times['why'])}"] if times.get("why") else []
    several = times.get("clocks") == "several"
    return "".join(
        [
            _line(", ".join([*heard, *why])) if heard or why else "",
            _chart("times of the incident", bars),
            *(_line(text(_answer(one), 400), MUTED) for one in answers[:MAX_ROWS]),
            _line("these are the clocks of several hosts", WARN) if several else "",
        ]
    )


def _answer(one: Mapping[str, Any]) -> str:
    agents = ", ".join(f"{agent}: {status}" for agent, status in one["agents"].items())
    after = one.get("after_seconds")
    took = "" if after is None else f" after {_took(after)}"
    return f"{one['responder_id']} answered{took} ({agents})"


def _seconds(zero: str, at: str) -> float:
    """Return the seconds since a moment; none, where clocks say less than that."""
    passed = datetime.fromisoformat(at) - datetime.fromisoformat(zero)
    return max(0.0, passed.total_seconds())


def _took(seconds: float) -> str:
    return f"{seconds * 1_000:.1f} ms" if seconds < 10 else f"{seconds:.2f} s"  # noqa: PLR2004 - people read 9999.9 ms and 10.00 s


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
