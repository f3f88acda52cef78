"""When each thing of a recovery happened, and how long it took; pure.

Moments are wall-clock time: they outlive the process that noted them, as no monotonic clock does.
All of them are noted by the host that recovers, the last heartbeat as the moment at which it came.
Only where another host took the recovery up are two clocks compared, and `clocks` says so.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic makes schemas of this one only, up to 3.11

from langgraph_peerctx.reconstruction.failure_detector import AgentFailure

Clocks = Literal["one", "several"]


class Noticed(TypedDict):
    """How a failure was noticed.

    Attributes:
        last_heartbeat_at: When the last one came; None if none was heard.
        known_at: When it was known that the run is lost.
        why: How: a death notice, silence, and so on; see `AgentFailure`.
    """

    last_heartbeat_at: str | None
    known_at: str | None
    why: str


class AnswerTime(TypedDict):
    """When one peer process answered.

    Attributes:
        agents: Each agent that it answered for, and with what: `context`, `nothing`, …
        after_seconds: Since the question left; None if that is not known.
    """

    responder_id: str
    agents: dict[str, str]
    at: str
    after_seconds: float | None


class Took(TypedDict):
    """Seconds up to each moment from the last one before it that is known; None where it is not.

    `to_answers` is up to the last answer. `total` counts from the first moment that is known.
    """

    to_known: float | None
    to_claimed: float | None
    to_answers: float | None
    to_resumed: float | None
    to_first_checkpoint: float | None
    total: float | None


class IncidentTimes(TypedDict):
    """The moments of a recovery, in their order, as ISO 8601 in UTC; None where one is not known.

    Attributes:
        last_heartbeat_at: When the lost process was heard last.
        known_at: When it was known that the run is lost.
        why: How that was noticed.
        claimed_at: When the thread was the recoverer's.
        requested_at: When the peers were asked.
        answers: Who answered, in the order in which they came.
        reconstructed_at: When the evidence was put together.
        resumed_at: When the workflow was set going.
        first_checkpoint_at: When it had written its first new checkpoint.
        ended_at: When the record was closed.
        clocks: Whether `several` hosts' clocks are compared: then a duration between moments of two
            hosts is as wrong as their clocks.
        took: How long each part took; never less than zero.
    """

    last_heartbeat_at: str | None
    known_at: str | None
    why: str | None
    claimed_at: str | None
    requested_at: str | None
    answers: list[AnswerTime]
    reconstructed_at: str | None
    resumed_at: str | None
    first_checkpoint_at: str | None
    ended_at: str | None
    clocks: Clocks
    took: Took


def noticed(failure: AgentFailure) -> Noticed:
    """Return what is to be kept of how a failure was noticed, plain JSON."""
    return Noticed(
        last_heartbeat_at=_text(failure.last_seen_at),
        known_at=_text(failure.known_at or failure.noticed_at),
        why=failure.why,
    )


def incident_times(
    steps: Sequence[Mapping[str, Any]],
    *,
    noticed: Mapping[str, Any] | None = None,
    asked: Mapping[str, Any] | None = None,
    answers: Sequence[Mapping[str, Any]] = (),
    first_checkpoint_at: str | None = None,
    ended_at: str | None = None,
) -> IncidentTimes:
    """Put the moments of a recovery together.

    Args:
        steps: `StepRecord`s, in their order; what they do not say is not known.
        noticed: See `noticed`.
        asked: What became of the question, as the recovery graph's state has it.
        answers: As a gathered `PeerContext` has them, plain JSON.
        first_checkpoint_at: See `first_checkpoint_after`.
        ended_at: When it was over.
    """
    known = noticed or {}
    requested_at = _requested(steps, asked)
    heard = [_answer(one, requested_at) for one in sorted(answers, key=_came_at)]
    hosts = {step["host"] for step in steps if step.get("host")}
    times = IncidentTimes(
        last_heartbeat_at=known.get("last_heartbeat_at"),
        known_at=known.get("known_at"),
        why=known.get("why"),
        claimed_at=_end_of(steps[:1], "claim"),
        requested_at=requested_at,
        answers=heard,
        reconstructed_at=_end_of(steps, "reconstruct"),
        resumed_at=_start_of(steps, "resume_workflow"),
        first_checkpoint_at=first_checkpoint_at,
        ended_at=ended_at,
        clocks="several" if len(hosts) > 1 else "one",
        took=_UNKNOWN,
    )
    began_at = steps[0]["started_at"] if steps else None
    return {**times, "took": _took(times, began_at)}


def seconds_between(start: str | None, end: str | None) -> float | None:
    """Return the seconds from one moment to another; zero if they stand the other way round."""
    first, last = moment_of(start), moment_of(end)
    if first is None or last is None:
        return None
    return max(0.0, round((last - first).total_seconds(), 6))


def moment_of(text: object) -> datetime | None:
    """Return a moment as it was written down; None for what is none."""
    try:
        found = datetime.fromisoformat(text)  # type: ignore[arg-type]  # that is the question
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


_UNKNOWN: Took = {
    "to_known": None,
    "to_claimed": None,
    "to_answers": None,
    "to_resumed": None,
    "to_first_checkpoint": None,
    "total": None,
}


def _took(times: IncidentTimes, began_at: str | None) -> Took:
    before = [times["last_heartbeat_at"]]

    def up_to(moment: str | None) -> float | None:
        since = next((one for one in reversed(before) if one is not None), None)
        before.append(moment)
        return seconds_between(since, moment)

    to_known, to_claimed = up_to(times["known_at"]), up_to(times["claimed_at"])
    if times["claimed_at"] is None:
        before.append(began_at)
    first = next((one for one in (*before[:2], began_at) if one is not None), None)
    return Took(
        to_known=to_known,
        to_claimed=to_claimed,
        to_answers=up_to(times["answers"][-1]["at"] if times["answers"] else None),
        to_resumed=up_to(times["resumed_at"]),
        to_first_checkpoint=up_to(times["first_checkpoint_at"]),
        total=seconds_between(first, times["ended_at"]),
    )


def _came_at(one: Mapping[str, Any]) -> datetime:
    """Return when an answer came; text does not sort where fractions of a second are left out."""
    return moment_of(one["at"]) or datetime.max.replace(tzinfo=UTC)


def _answer(one: Mapping[str, Any], requested_at: str | None) -> AnswerTime:
    return AnswerTime(
        responder_id=one["responder_id"],
        agents=dict(one["agents"]),
        at=one["at"],
        after_seconds=seconds_between(requested_at, one["at"]),
    )


def _requested(steps: Sequence[Mapping[str, Any]], asked: Mapping[str, Any] | None) -> str | None:
    if asked and asked.get("at"):
        return None if asked.get("is_certain") else str(asked["at"])
    return _start_of([step for step in steps if not step["detail"].get("error")], "request_context")


def _start_of(steps: Sequence[Mapping[str, Any]], name: str) -> str | None:
    found = _step(steps, name)
    return None if found is None else str(found["started_at"])


def _end_of(steps: Sequence[Mapping[str, Any]], name: str) -> str | None:
    found = _step(steps, name)
    start = None if found is None else moment_of(found["started_at"])
    if found is None or start is None:
        return None
    return (start + timedelta(seconds=found["elapsed_seconds"])).isoformat()


def _step(steps: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    """Return the last step of this name that was not broken off."""
    done = (s for s in reversed(steps) if s["step"] == name and s["outcome"] == "done")
    return next(done, None)


def _text(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(UTC).isoformat()
