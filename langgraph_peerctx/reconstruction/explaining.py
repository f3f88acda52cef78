"""What is known of a dead agent's thread, in words: from where, since when, and what is not."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from langgraph_peerctx.drawing import printable, rows_html

_LIMIT = 160
"""Characters of one value; a reason may have more."""
_REASON_LIMIT = 400
_UNHEARD: Final = (
    ("silent", "was asked and did not answer"),
    ("left", "had left before it answered"),
    ("busy", "could not look"),
    ("declined", "declined to say"),
    ("truncated", "knows more than its answer had room for"),
    ("contradicted", "was told of in two ways"),
)


class Row(NamedTuple):
    """One thing that is known, or is not.

    Attributes:
        about: `known`, `conflict`, `effect`, `consumed`, `unknown` or `degraded`.
        what: Its name; of a `degraded`, the reason's first word.
        said: Its value, or what became of it.
        source: Who says so.
        event_id: Under which it was remembered.
        at: When it happened, ISO 8601.
    """

    about: str
    what: str
    said: str = ""
    source: str = ""
    event_id: str = ""
    at: str = ""


_TITLES: Final = {
    "known": "What is known",
    "conflict": "Where those who remember differ",
    "effect": "Effects, and how each was settled",
    "consumed": "What peers had taken already",
    "unknown": "What is not known",
    "degraded": "Why this is not everything",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is known of a thread; `print` it, or let a notebook show it.

    Whatever peers have written is shown as text: without control characters, and cut.
    """

    agent_id: str
    thread_id: str
    told: tuple[Row, ...]

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row each: about, what, said, source, event id, time; see `Row`."""
        return [tuple(row) for row in self.told]

    def __str__(self) -> str:
        lines = [f"{self._of(self.agent_id)} in {self._of(self.thread_id)}"]
        for about, title in _TITLES.items():
            found = [row for row in self.told if row.about == about]
            if found:
                lines += ["", title, *(f"  {_line(row)}" for row in found)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        title = f"What is known of {self.agent_id} in {self.thread_id}"
        return rows_html(
            title, ["", "what", "", "source", "event", "when"], self.rows(), limit=_REASON_LIMIT
        )

    @staticmethod
    def _of(name: str) -> str:
        return printable(name, _LIMIT)


def explain(found: Mapping[str, Any]) -> Explanation:
    """Explain what a recovery knew, fact by fact; pure.

    Args:
        found: A `Reconstruction`, an `IncidentRecord`, or a whole `RecoveryResult`. A record has
            no values: what it names stands in the workflow's state.
    """
    record = found.get("incident", found)
    reasons = found.get("reasons") or ()
    rows = [
        *_known(record),
        *_conflicts(record.get("conflicts") or ()),
        *_effects(record),
        *_consumed(record.get("consumed") or ()),
        *_unknown(record),
        *(_reason(str(one)) for one in reasons),
    ]
    return Explanation(
        agent_id=str(record["agent_id"]), thread_id=str(record["thread_id"]), told=tuple(rows)
    )


def _known(record: Mapping[str, Any]) -> Iterator[Row]:
    values, facts = record.get("state") or {}, record.get("peer_context") or {}
    own = {event["interaction_id"]: event for event in record.get("own_events") or ()}
    for origin in record.get("provenance") or ():
        kind, _, name = str(origin["fact"]).partition(".")
        event_id = str(origin.get("event_id") or "")
        fact = facts.get(event_id) or own.get(event_id) if kind == "event" else None
        said = ""
        if kind == "state" and name in values:
            said = printable(values[name], _LIMIT)
        elif fact is not None:
            said = printable(_words_of(fact), _LIMIT)
        told_by = [one for one in origin.get("told_by") or () if origin["source"] == "peer"]
        yield Row(
            about="known",
            what=printable(origin["fact"], _LIMIT),
            said=said,
            source=_with(origin["source"], told_by),
            event_id=printable(event_id, _LIMIT),
            at=printable(origin.get("occurred_at") or "", _LIMIT),
        )


def _words_of(fact: Mapping[str, Any]) -> str:
    return f"{fact.get('kind') or ''} {printable(fact.get('payload'), _LIMIT)}".strip()


def _conflicts(conflicts: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for conflict in conflicts:
        event_id = str(conflict.get("interaction_id", ""))
        for agent_id, version in (conflict.get("versions") or {}).items():
            yield Row(
                about="conflict",
                what=printable(f"event.{event_id}", _LIMIT),
                said=printable(_words_of(version), _LIMIT),
                source=printable(agent_id, _LIMIT),
                event_id=printable(event_id, _LIMIT),
                at=printable(version.get("occurred_at") or "", _LIMIT),
            )


def _effects(record: Mapping[str, Any]) -> Iterator[Row]:
    """Say of each effect how it was settled; of older records, what the peers said."""
    verdicts = {
        str(one["effect_key"]): f"{one['agent_id']} says {one['verdict']}"
        for one in record.get("in_doubt") or ()
    }
    for effect in record.get("effects") or ():
        key = str(effect["key"])
        status, verdict = effect.get("status") or "in_doubt", effect.get("verdict")
        said = ": ".join(str(one) for one in (status, verdict or verdicts.get(key)) if one)
        peer = effect.get("peer")
        yield Row(
            about="effect",
            what=printable(effect.get("name") or key, _LIMIT),
            said=printable(said, _LIMIT),
            source=_with(effect.get("source") or "nobody", [peer] if peer else []),
            event_id=printable(key, _LIMIT),
            at=printable(effect.get("done_at") or effect.get("intent_at") or "", _LIMIT),
        )
        verdicts.pop(key, None)
    for key, said in verdicts.items():
        yield Row(
            about="effect",
            what=printable(key, _LIMIT),
            said=printable(said, _LIMIT),
            source="peer",
            event_id=printable(key, _LIMIT),
        )


def _consumed(consumed: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for one in consumed:
        yield Row(
            about="consumed",
            what=printable(one.get("kind") or "", _LIMIT),
            source=printable(one.get("peer") or "", _LIMIT),
            event_id=printable(one.get("interaction_id") or "", _LIMIT),
            at=printable(one.get("occurred_at") or "", _LIMIT),
        )


def _unknown(record: Mapping[str, Any]) -> Iterator[Row]:
    coverage = record.get("coverage")
    if not record.get("checkpoint"):
        yield Row("unknown", "checkpoint", "the thread had none: nothing of its state is restored")
    if coverage is None:
        yield Row("unknown", "peers", "nobody was asked")
    else:
        yield from _unheard(coverage)
    for effect in record.get("effects") or ():
        if (effect.get("status") or "in_doubt") in {"in_doubt", "intent"}:
            name = printable(effect.get("name") or effect["key"], _LIMIT)
            yield Row("unknown", name, "nobody could tell whether it happened")


def _unheard(coverage: Mapping[str, Any]) -> Iterator[Row]:
    if not coverage.get("roster_known"):
        yield Row("unknown", "peers", "who should answer was not known")
    for name, said in _UNHEARD:
        for agent_id in coverage.get(name) or ():
            yield Row("unknown", printable(agent_id, _LIMIT), said)


def _reason(reason: str) -> Row:
    word, colon, rest = reason.partition(":")
    if not colon or " " in word:
        return Row("degraded", "", printable(reason, _REASON_LIMIT))
    return Row("degraded", printable(word, _LIMIT), printable(rest.strip(), _REASON_LIMIT))


def _with(source: object, names: Sequence[object]) -> str:
    told = f": {', '.join(str(one) for one in names)}" if names else ""
    return printable(f"{source}{told}", _LIMIT)


def _line(row: Row) -> str:
    """Return a row as a line: what, its value, and in brackets who says so."""
    said = f"{row.what}: {row.said}" if row.what and row.said else row.what or row.said
    origin = ", ".join(one for one in (row.source, row.event_id, row.at) if one)
    return f"{said} [{origin}]" if origin else said
