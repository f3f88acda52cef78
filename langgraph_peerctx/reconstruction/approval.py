"""When a human is asked before a workflow is resumed, and what is shown."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.protocol.messages import Json

_YES = ("approve", "approved", "yes")
_NO = ("reject", "rejected", "no")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Below which a human is asked; None asks nobody.

    Attributes:
        coverage: The share of those who were expected that must have answered, from 0 to 1. Where
            nobody was expected nobody knows, and it counts as 0.
        confidence: The share of what peers told that nobody contradicts and, of effects in doubt,
            that somebody settled, from 0 to 1.
    """

    coverage: float | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("coverage", self.coverage), ("confidence", self.confidence)):
            if value is not None and not 0 <= value <= 1:
                raise ConfigurationError(f"approve_below_{name}={value!r}: expected 0 to 1")

    def missed(self, evidence: Mapping[str, Any]) -> list[str]:
        """Say which thresholds the evidence does not reach."""
        found = (
            ("coverage", coverage_of(evidence), self.coverage),
            ("confidence", confidence_of(evidence), self.confidence),
        )
        return [
            f"{name} is {value:.2f}, below {least:g}"
            for name, value, least in found
            if least is not None and value < least
        ]


def coverage_of(evidence: Mapping[str, Any]) -> float:
    """Return which share of those who were expected has answered."""
    coverage = evidence["coverage"] or {}
    asked = coverage.get("asked", [])
    return len(coverage["answered"]) / len(asked) if asked else 0.0


def confidence_of(evidence: Mapping[str, Any]) -> float:
    """Return which share of what was told stands undisputed; 1 where nothing was told."""
    effects = {answer["effect_key"] for answer in evidence["in_doubt"]}
    settled = {a["effect_key"] for a in evidence["in_doubt"] if a["verdict"] != "cannot_tell"}
    told = len(evidence["peer_context"]) + len(effects)
    disputed = len(evidence["conflicts"]) + len(effects - settled)
    return max(0.0, 1 - disputed / told) if told else 1.0


def what_to_approve(
    state: Mapping[str, Any], channel: str, why: list[str], unclear: object = None
) -> Json:
    """Return what a human is shown: why it is asked, and what a resume would do.

    What would be written and from where, what is known of the run's effects, and what peers took
    from the agent after the checkpoint, which a resume goes back behind.
    """
    evidence = state["evidence"]
    said: Json = {} if unclear is None else {"not_understood": repr(unclear)[:200]}
    asked = [state["thread_id"], state.get("run_id"), *why, sorted(evidence["peer_context"])]
    return {
        "question": "Resume the workflow with this? Answer true or false.",
        "question_id": hashlib.sha256(repr(asked).encode()).hexdigest()[:16],
        "why": list(why),
        "failed_agent_id": state["failed_agent_id"],
        "thread_id": state["thread_id"],
        "checkpoint": state["checkpoint"],
        "would_write": {"channel": channel, "facts": evidence["peer_context"]},
        "coverage": evidence["coverage"],
        "conflicts": evidence["conflicts"],
        "in_doubt": evidence["in_doubt"],
        "run_effects": evidence["effects"],
        "consumed": evidence["consumed"],
        "reasons": evidence["reasons"],
        **said,
    }


def is_approved(answer: object) -> bool | None:
    """Read a human's answer: true or false, a word, or `{"approve": true}`; None if unclear."""
    if isinstance(answer, Mapping):
        answer = answer.get("approve")
    if isinstance(answer, bool):
        return answer
    word = answer.strip().lower() if isinstance(answer, str) else None
    return True if word in _YES else False if word in _NO else None
