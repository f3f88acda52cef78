"""The channel in which a workflow receives what its peers remember."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from typing_extensions import TypedDict  # pydantic makes schemas of this one only, up to 3.11

EvidenceSource = Literal["checkpoint", "own", "peer", "inference"]
EVIDENCE_RANKS: Final[Mapping[str, int]] = {"checkpoint": 4, "own": 3, "peer": 2, "inference": 1}
"""How much a source is worth, the higher the better; an unknown one is worth nothing."""


def rank_of(fact: object) -> int:
    """Return how much a fact is worth by its `source`; what is no fact is worth nothing."""
    source = fact.get("source") if isinstance(fact, Mapping) else None
    return EVIDENCE_RANKS.get(source, 0) if isinstance(source, str) else 0


def merge_peer_context(
    left: Mapping[str, Any] | None, right: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Add facts to those that are there, by event id; a reducer for a LangGraph channel.

    A fact that is there already gives way only to better evidence of the same event (see
    `EVIDENCE_RANKS`). So the same facts may come any number of times. Neither argument is changed.
    """
    merged = dict(left or {})
    for event_id, fact in (right or {}).items():
        if event_id not in merged or rank_of(fact) > rank_of(merged[event_id]):
            merged[event_id] = fact
    return merged


class PeerContextState(TypedDict, total=False):
    """A state to extend: `class State(PeerContextState): ...`.

    `peer_context` maps event id to fact: plain JSON with at least `source`, `told_by`,
    `occurred_at`, `kind` and `payload`; see `PeerContext.as_channel`. `peer_context_report` says of
    the last gather how much of the truth it brought: coverage, and why it is degraded; see
    `PeerContext.as_report`.
    """

    peer_context: Annotated[dict[str, Any], merge_peer_context]
    peer_context_report: dict[str, Any]
