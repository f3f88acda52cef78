"""The record of one recovery: its steps with their times, for people and for a database."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeAlias, TypedDict

from langgraph_peerctx.protocol.messages import Json

_logger = logging.getLogger(__name__)


class StepRecord(TypedDict):
    """One step of a recovery; `detail` holds counts and ids, never payloads."""

    step: str
    started_at: str
    elapsed_seconds: float
    outcome: str
    detail: Json


class IncidentRecord(TypedDict):
    """A recovery from beginning to end, as plain JSON.

    A recovery that was taken up by another process has one record: its steps are those that ended.
    """

    incident_id: str
    agent_id: str
    thread_id: str
    run_id: str | None
    started_at: str
    elapsed_seconds: float
    status: str
    steps: list[StepRecord]
    checkpoint: Json | None
    coverage: Json | None
    conflicts: list[Json]
    in_doubt: list[Json]
    provenance: list[Json]


OnStep: TypeAlias = Callable[[StepRecord], None]
"""Is told of each step when it has ended; runs on the recovery's loop and must not block. What it
raises is logged."""


@dataclass(slots=True)
class Step:
    """A step that is being taken.

    Attributes:
        detail: What to say of it.
        record: The record, once the step has ended.
    """

    detail: Json = field(default_factory=dict)
    record: StepRecord | None = None


@contextmanager
def timed(name: str, *, on_step: OnStep | None = None, **ids: Any) -> Iterator[Step]:
    """Time a step and report its end, however it ends.

    Args:
        name: The step's.
        on_step: Is told of it.
        **ids: What the log says beside it: `incident_id`, `agent_id`, `thread_id`.
    """
    started_at, start = datetime.now(UTC), time.monotonic()
    step, outcome = Step(), "failed"
    try:
        yield step
        outcome = "done"
    finally:
        step.record = StepRecord(
            step=name,
            started_at=started_at.isoformat(),
            elapsed_seconds=round(time.monotonic() - start, 6),
            outcome=outcome,
            detail=step.detail,
        )
        _report(step.record, on_step, ids)


def incident_record(
    state: Mapping[str, Any], status: str, evidence: Mapping[str, Any] | None
) -> IncidentRecord:
    """Close the record.

    Args:
        state: The recovery's state.
        status: How it ended.
        evidence: What was put together, if it came so far.
    """
    evidence = evidence or {}
    began = datetime.fromisoformat(state["started_at"])
    steps: Sequence[StepRecord] = state["steps"]
    return IncidentRecord(
        incident_id=state["incident_id"],
        agent_id=state["failed_agent_id"],
        thread_id=state["thread_id"],
        run_id=state.get("run_id"),
        started_at=state["started_at"],
        elapsed_seconds=max(0.0, round((datetime.now(UTC) - began).total_seconds(), 6)),
        status=status,
        steps=list(steps),
        checkpoint=state.get("checkpoint"),
        coverage=evidence.get("coverage"),
        conflicts=evidence.get("conflicts", []),
        in_doubt=evidence.get("in_doubt", []),
        provenance=evidence.get("provenance", []),
    )


def tell(listener: Callable[..., None], *what: object) -> None:
    """Tell somebody; what they make of it is not our affair."""
    try:
        listener(*what)
    except Exception:
        _logger.exception("a listener failed")


def _report(record: StepRecord, on_step: OnStep | None, ids: Mapping[str, Any]) -> None:
    _logger.info(
        "%s %s in %.3f s",
        record["step"],
        record["outcome"],
        record["elapsed_seconds"],
        extra={**ids, "step": record["step"], "detail": record["detail"]},
    )
    if on_step is not None:
        tell(on_step, record)
