"""The record of one recovery: its steps with their times, for people and for a database."""

import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NotRequired, TypeAlias, TypedDict

from langgraph_peerctx import tracing
from langgraph_peerctx.persistence.incidents import Recovery
from langgraph_peerctx.protocol.messages import Json
from langgraph_peerctx.reconstruction.report import IncidentTimes, incident_times, moment_of

_logger = logging.getLogger(__name__)


_HOST = socket.gethostname()


class StepRecord(TypedDict):
    """One step of a recovery; `detail` holds counts and ids, never payloads.

    `host` is whose clock it was.
    """

    step: str
    host: NotRequired[str]
    started_at: str
    elapsed_seconds: float
    outcome: str
    detail: Json


class IncidentRecord(TypedDict):
    """A recovery from beginning to end, as plain JSON.

    A recovery that was taken up by another process has one record: its steps are those that ended.
    Records that were kept by an earlier version lack the last four.

    Attributes:
        times: When each thing happened.
        effects: What is known of each of the run's effects, and from whom.
        consumed: What peers took from the agent after its last checkpoint.
        traceparent: The recovery's span, where it was traced.
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
    times: IncidentTimes
    effects: list[Json]
    consumed: list[Json]
    traceparent: str | None


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

    def detail_in_short(self) -> dict[str, object]:
        """Return of the detail what a span has room for: what is neither a list nor a mapping."""
        return {name: one for name, one in self.detail.items() if not isinstance(one, list | dict)}


@contextmanager
def timed(
    name: str, *, on_step: OnStep | None = None, is_traced: bool = True, **ids: Any
) -> Iterator[Step]:
    """Time a step and report its end, however it ends; a span of the recovery's, if it has one.

    Args:
        name: The step's.
        on_step: Is told of it.
        is_traced: Whether it is a span where there is a trace.
        **ids: What the log says beside it: `incident_id`, `agent_id`, `thread_id`.
    """
    started_at, start = datetime.now(UTC), time.monotonic()
    step, outcome = Step(), "failed"
    try:
        with _step_span(name, ids) if is_traced else nullcontext(tracing.NO_SPAN) as span:
            yield step
            span.set(**step.detail_in_short())
        outcome = "done"
    finally:
        step.record = StepRecord(
            step=name,
            host=_HOST,
            started_at=started_at.isoformat(),
            elapsed_seconds=round(time.monotonic() - start, 6),
            outcome=outcome,
            detail=step.detail,
        )
        _report(step.record, on_step, ids)


def _step_span(name: str, ids: Mapping[str, Any]) -> AbstractContextManager[tracing.Span]:
    return tracing.span(f"peerctx.recovery.{name}", only_inside=True, **ids)


@contextmanager
def recovery_span(recovery: Recovery, claim: StepRecord | None) -> Iterator[tracing.Span]:
    """Trace a recovery, from its claim on.

    The span is linked to the lost run's and to the last attempt's: they may be other traces.

    Args:
        recovery: What was claimed.
        claim: That step.
    """
    incident = recovery.incident
    claimed = moment_of(claim["started_at"]) if claim else None
    with tracing.span(
        "peerctx.recovery",
        links=(recovery.run.traceparent, _traceparent_in(incident.report)),
        started_at=claimed,
        incident_id=incident.incident_id,
        agent_id=incident.agent_id,
        thread_id=incident.thread_id,
        run_id=incident.run_id,
        attempts=incident.attempts,
    ) as span:
        if claim is not None and claimed is not None:
            tracing.add_span(
                "peerctx.recovery.claim",
                claimed,
                claim["elapsed_seconds"],
                epoch=recovery.lease.epoch,
            )
        yield span


def _traceparent_in(report: Json | None) -> str | None:
    found = (report or {}).get("traceparent")
    return found if isinstance(found, str) else None


def incident_record(
    state: Mapping[str, Any],
    status: str,
    evidence: Mapping[str, Any] | None,
    *,
    times: IncidentTimes | None = None,
    effects: Sequence[Json] | None = None,
) -> IncidentRecord:
    """Close the record.

    Args:
        state: The recovery's state; of it `noticed`, `asked`, `gathered` and
            `first_checkpoint_at` count for the times, where they are there.
        status: How it ended.
        evidence: What was put together, if it came so far.
        times: When each thing happened; by default what the state says of it.
        effects: What is known of each of the run's effects; by default what the evidence says.
    """
    evidence = evidence or {}
    ended = datetime.now(UTC)
    began = datetime.fromisoformat(state["started_at"])
    steps: Sequence[StepRecord] = state["steps"]
    return IncidentRecord(
        incident_id=state["incident_id"],
        agent_id=state["failed_agent_id"],
        thread_id=state["thread_id"],
        run_id=state.get("run_id"),
        started_at=state["started_at"],
        elapsed_seconds=max(0.0, round((ended - began).total_seconds(), 6)),
        status=status,
        steps=list(steps),
        checkpoint=state.get("checkpoint"),
        coverage=evidence.get("coverage"),
        conflicts=evidence.get("conflicts", []),
        in_doubt=evidence.get("in_doubt", []),
        provenance=evidence.get("provenance", []),
        times=times or _times_in(state, ended),
        effects=list(evidence.get("effects", []) if effects is None else effects),
        consumed=list(evidence.get("consumed", [])),
        traceparent=tracing.current_traceparent(),
    )


def _times_in(state: Mapping[str, Any], ended: datetime) -> IncidentTimes:
    return incident_times(
        state["steps"],
        noticed=state.get("noticed"),
        asked=state.get("asked"),
        answers=(state.get("gathered") or {}).get("answers") or (),
        first_checkpoint_at=state.get("first_checkpoint_at"),
        ended_at=ended.isoformat(),
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
