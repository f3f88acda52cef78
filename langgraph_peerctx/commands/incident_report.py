"""An incident's record as tables: its times, who answered, what became of effects and facts."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from langgraph_peerctx.commands.printing import folded, lean_table, moment, whole
from langgraph_peerctx.drawing import printable
from langgraph_peerctx.reconstruction.explaining import explain
from langgraph_peerctx.reconstruction.report import moment_of

_MOMENTS = (
    ("last heartbeat", "last_heartbeat_at", ""),
    ("known", "known_at", "to_known"),
    ("claimed", "claimed_at", "to_claimed"),
    ("asked", "requested_at", ""),
    ("last answer", "", "to_answers"),
    ("reconstructed", "reconstructed_at", ""),
    ("resumed", "resumed_at", "to_resumed"),
    ("first checkpoint", "first_checkpoint_at", "to_first_checkpoint"),
    ("ended", "ended_at", ""),
)
_COVERAGE = ("asked", "answered", "silent", "left", "busy", "declined", "truncated", "extra")


def report_parts(report: Mapping[str, Any], *, all_facts: bool = False) -> Iterator[RenderableType]:
    """Yield the parts of a record, top to bottom; what it does not say, as older ones, is left out.

    Args:
        report: An `IncidentRecord`; may be empty.
        all_facts: Whether to name each restored fact, and not only to count them.
    """
    times: Mapping[str, Any] = report.get("times") or {}
    if any(times.get(key) for _, key, _ in _MOMENTS if key):
        yield _times(times)
    if times.get("answers"):
        yield _answers(times["answers"])
    if report.get("coverage"):
        yield _coverage(report["coverage"])
    if report:
        yield from _told(report, all_facts=all_facts)


def took(seconds: float | None) -> str:
    """Return a duration for people."""
    if seconds is None:
        return ""
    return f"{seconds * 1_000:.1f} ms" if seconds < 1 else f"{seconds:.3f} s"


def _times(times: Mapping[str, Any]) -> Table:
    table = lean_table(*(whole(name) for name in ("moment", "at (UTC)", "took")))
    table.caption_justify = "left"
    answers, durations = times.get("answers") or [], times.get("took") or {}
    for label, key, duration in _MOMENTS:
        at = times.get(key) if key else answers[-1]["at"] if answers else None
        if at is not None:
            why = f" ({times['why']})" if key == "known_at" and times.get("why") else ""
            since = took(durations.get(duration)) if duration else ""
            table.add_row(Text(f"{label}{why}"), Text(_clock(at)), Text(since))
    if durations.get("total") is not None:
        table.add_row(Text("in all"), Text(""), Text(took(durations["total"])))
    if times.get("clocks") == "several":
        table.caption = Text("these are the clocks of several hosts")
    return table


def _answers(answers: Sequence[Mapping[str, Any]]) -> Table:
    table = lean_table(whole("answered by"), whole("after"), folded("agents"))
    for one in answers:
        agents = ", ".join(f"{agent}: {status}" for agent, status in one["agents"].items())
        table.add_row(
            Text(printable(one["responder_id"])),
            Text(took(one.get("after_seconds"))),
            Text(printable(agents, 400)),
        )
    return table


def _coverage(coverage: Mapping[str, Any]) -> Text:
    verdict = "complete" if coverage.get("complete") else "not complete"
    said = [
        f"{name} {', '.join(printable(one) for one in coverage[name])}"
        for name in _COVERAGE
        if coverage.get(name)
    ]
    return Text("; ".join([f"coverage: {verdict}", *said]))


def _told(report: Mapping[str, Any], *, all_facts: bool) -> Iterator[RenderableType]:
    """Yield what an explanation has: effects, conflicts, facts taken already, provenance."""
    rows = explain(report).told
    for about, title, who in (
        ("effect", "effect", "settled by"),
        ("conflict", "told in two ways", "by"),
        ("consumed", "peers had taken", "peer"),
    ):
        found = [row for row in rows if row.about == about]
        if found:
            table = lean_table(folded(title), folded("what"), folded(who), whole("at (UTC)"))
            for row in found:
                table.add_row(
                    Text(row.what), Text(row.said), Text(row.source), Text(_second(row.at))
                )
            yield table
    known = [row for row in rows if row.about == "known"]
    if known and all_facts:
        table = lean_table(folded("restored"), folded("from"), folded("event"), whole("at (UTC)"))
        for row in known:
            table.add_row(
                Text(row.what), Text(row.source), Text(row.event_id), Text(_second(row.at))
            )
        yield table
    elif known:
        counts = Counter(row.source.partition(":")[0] for row in known)
        said = ", ".join(f"{count} from {source}" for source, count in counts.items())
        yield Text(f"restored: {said}; --all names each")


def _clock(at: str) -> str:
    found = moment_of(at)
    return at if found is None else found.astimezone(UTC).strftime("%H:%M:%S.%f")[:12]


def _second(at: str) -> str:
    return moment(moment_of(at)) or at
