"""The record of one recovery: its steps with their times, for people and for a database."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeAlias, TypedDict

from langgraph_peerctx.identifiers import new_id
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
    """A recovery from beginning to end, as plain JSON."""

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
"""Is told of each step when it has ended; runs on the recovery's loop and must neither block
nor raise."""


@dataclass(slots=True, kw_only=True)
class Incident:
    """Keeps the record while a recovery runs.

    Attributes:
        run_id: The run that is recovered, once the checkpoint has said so.
    """

    agent_id: str
    thread_id: str
    on_step: OnStep | None = None
    run_id: str | None = None
    incident_id: str = field(default_factory=new_id)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    steps: list[StepRecord] = field(default_factory=list)
    _start: float = field(default_factory=time.monotonic)

    @property
    def elapsed_seconds(self) -> float:
        """The seconds since the beginning."""
        return round(time.monotonic() - self._start, 6)

    @contextmanager
    def step(self, name: str) -> Iterator[Json]:
        """Time a step and report its end, however it ends.

        Yields:
            A mapping to put the step's detail into.
        """
        started_at, start = datetime.now(UTC), time.monotonic()
        detail: Json = {}
        outcome = "failed"
        try:
            yield detail
            outcome = "done"
        finally:
            self._report(
                StepRecord(
                    step=name,
                    started_at=started_at.isoformat(),
                    elapsed_seconds=round(time.monotonic() - start, 6),
                    outcome=outcome,
                    detail=detail,
                )
            )

    def record(
        self,
        *,
        status: str,
        checkpoint: Json | None,
        coverage: Json | None,
        conflicts: list[Json],
        in_doubt: list[Json],
        provenance: list[Json],
    ) -> IncidentRecord:
        """Close the record."""
        return IncidentRecord(
            incident_id=self.incident_id,
            agent_id=self.agent_id,
            thread_id=self.thread_id,
            run_id=self.run_id,
            started_at=self.started_at.isoformat(),
            elapsed_seconds=self.elapsed_seconds,
            status=status,
            steps=list(self.steps),
            checkpoint=checkpoint,
            coverage=coverage,
            conflicts=conflicts,
            in_doubt=in_doubt,
            provenance=provenance,
        )

    def _report(self, record: StepRecord) -> None:
        self.steps.append(record)
        _logger.info(
            "%s %s in %.3f s",
            record["step"],
            record["outcome"],
            record["elapsed_seconds"],
            extra={
                "incident_id": self.incident_id,
                "agent_id": self.agent_id,
                "thread_id": self.thread_id,
                "step": record["step"],
                "detail": record["detail"],
            },
        )
        if self.on_step is not None:
            self.on_step(record)
