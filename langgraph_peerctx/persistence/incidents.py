"""One row a failure: who died, who recovers it, at which attempt, and how it ended.

A recovery begins and ends in one transaction each, together with the lease and the run: of any
number of recoverers one begins, and one that was superseded ends nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Literal, cast

from sqlalchemy import Connection, Row, or_, select, update
from sqlalchemy.sql.elements import ColumnElement

from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.identifiers import new_id
from langgraph_peerctx.persistence.effect_ledger import EffectLedger
from langgraph_peerctx.persistence.leases import Lease
from langgraph_peerctx.persistence.rows import json_text, moment_at
from langgraph_peerctx.persistence.runs import EndKind, LostRun, Owner, Run
from langgraph_peerctx.persistence.schema import incidents, leases, runs
from langgraph_peerctx.protocol.messages import Json

IncidentStatus = Literal["open", "recovering", "waiting_for_human", "recovered", "dead_letter"]

HANDED_OVER = "handed-over"
"""Stands for the dead incarnation where nobody died: the run was given back."""
BY_HAND = "not-known"
"""Stands for it where somebody recovered by hand what no record says who lost it."""

_MICROSECONDS = 1_000_000
_JSON = ("question", "answer", "result", "report")


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """A failure and its recovery.

    Attributes:
        dead_incarnation: The life of a process that lost the thread; `handed-over` if it gave it.
        lost_epoch: Under which epoch.
        status: `open` waits for an attempt, `dead_letter` for a person.
        attempts: How many were begun.
        epoch: Under which the last one was.
        recoverer_id: The process that began it.
        question: What a human is asked, if `waiting_for_human`.
        answer: What the human said, until it is used.
        result: How the last attempt ended.
        report: Its record.
        next_attempt_at: Not before then.
    """

    incident_id: str
    agent_id: str
    thread_id: str
    dead_incarnation: str
    lost_epoch: int
    run_id: str | None
    status: IncidentStatus
    attempts: int
    epoch: int
    recoverer_id: str | None
    question: Json | None
    answer: Json | None
    result: Json | None
    report: Json | None
    opened_at: datetime
    updated_at: datetime
    next_attempt_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """A recovery that was begun: the thread is the recoverer's.

    Attributes:
        lease: Under which it stands.
        is_over: Whether it was put aside instead: it has had all its attempts.
    """

    lease: Lease
    incident: Incident
    run: Run
    is_over: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """How an attempt ended.

    Attributes:
        status: What becomes of the incident.
        end_kind: How the run ended; `handed_over` leaves it open.
        retry_seconds: Until the next attempt, if `open`; if `waiting_for_human`, until it is seen
            whether the answer has come from elsewhere, and None if only a human has it.
        counts: Whether it counts as an attempt: an outage is nobody's fault.
    """

    status: IncidentStatus
    end_kind: EndKind
    error: str | None = None
    result: Mapping[str, Any] | None = None
    report: Mapping[str, Any] | None = None
    question: Mapping[str, Any] | None = None
    retry_seconds: float | None = None
    counts: bool = True


class ControlDatabase(EffectLedger):
    """What agents and recoverers share: leases, runs, effects and incidents.

    Safe to use from any thread; see `Database` for its arguments. Methods with `a` in front are for
    a loop.
    """

    def begin_recovery(
        self,
        lost: LostRun,
        owner: Owner,
        *,
        died: bool = False,
        holds: bool = False,
        max_attempts: int,
    ) -> Recovery | None:
        """Take a lost run over, in one transaction: of any number at once, one succeeds.

        Args:
            lost: The run, as it was found.
            owner: The recoverer.
            died: Whether its owner is known to be dead: then its unexpired lease may be taken.
            holds: Whether the recoverer itself is at work on the thread.
            max_attempts: After so many the incident is a dead letter.

        Returns:
            None if somebody else has it, it has ended, or it is not the time.
        """

        def work(connection: Connection) -> Recovery | None:
            incident = self._unfinished(connection, lost)
            if incident is not None and not self._is_due(connection, incident):
                return None
            run = self._run(connection, runs.c.run_id == lost.run_id)
            if run is None or not run.is_open or holds:
                return None
            if not self._is_still_lost(connection, lost, owner):
                return None
            lease = self._claim(
                connection,
                agent_id=lost.agent_id,
                thread_id=lost.thread_id,
                owner_id=owner.owner_id,
                incarnation=owner.incarnation,
                ttl_seconds=owner.ttl_seconds,
                run_id=lost.run_id,
                dead_incarnation=lost.owner_incarnation if died else None,
            )
            if lease is None:
                return None
            found = incident or self._open(connection, lost)
            if found.attempts >= max_attempts:
                self._update(connection, found.incident_id, status="dead_letter")
                self._end(connection, run.run_id, "handed_over")
                self._give_back(connection, lease)
            else:
                self._own(connection, run.run_id, owner, lease)
                self._update(
                    connection,
                    found.incident_id,
                    status="recovering",
                    attempts=found.attempts + 1,
                    epoch=lease.epoch,
                    recoverer_id=owner.owner_id,
                    next_attempt_at=None,
                )
            begun = self._incident(connection, incidents.c.incident_id == found.incident_id)
            assert begun is not None  # noqa: S101 - written above
            over = begun.status == "dead_letter"
            return Recovery(lease=lease, incident=begun, run=run, is_over=over)

        return self._work(work, transaction=True)

    def settle(self, recovery: Recovery, how: Settlement) -> bool:
        """Write down how an attempt ended and give the thread back, in one transaction.

        Returns:
            Whether it was still ours; otherwise nothing was written.
        """

        def work(connection: Connection) -> bool:
            incident = recovery.incident
            if not self._give_back(connection, recovery.lease):
                # The answer to an earlier try may have been lost.
                now = self._incident(connection, incidents.c.incident_id == incident.incident_id)
                is_ours = now is not None and (now.epoch, now.recoverer_id) == (
                    incident.epoch,
                    incident.recoverer_id,
                )
                return is_ours and now is not None and now.status in (how.status, "open")
            self._end(
                connection, recovery.run.run_id, how.end_kind, how.error, lease=recovery.lease
            )
            status, wait = how.status, how.retry_seconds
            answer = self._answer_since(connection, incident)
            if answer is not None and not _answers(answer, how.question):
                answer = None
            if status == "waiting_for_human" and answer is not None:
                status, wait = "open", None
            waits = status == "open" or (status == "waiting_for_human" and wait is not None)
            self._update(
                connection,
                incident.incident_id,
                status=status,
                attempts=incident.attempts - (0 if how.counts else 1),
                # It may not have been used yet.
                answer=_json(answer or incident.answer) if status == "open" else None,
                question=_json(how.question),
                result=_json(how.result),
                report=_json(how.report),
                next_attempt_at=self._now + int((wait or 0) * _MICROSECONDS) if waits else None,
            )
            return True

        return self._work(work, transaction=True)

    def note(self, lost: LostRun, result: Mapping[str, Any], *, again_seconds: float) -> None:
        """Open an incident that nobody here can recover, so that people see it, and why.

        For so many seconds it is nobody's, so that it does not stand in the way of others.
        """

        def work(connection: Connection) -> None:
            found = self._unfinished(connection, lost) or self._open(connection, lost)
            if found.status == "open":
                again = self._now + int(again_seconds * _MICROSECONDS)
                self._update(
                    connection, found.incident_id, result=_json(result), next_attempt_at=again
                )

        self._work(work, transaction=True)

    def keep_recovery(
        self,
        lease: Lease,
        run_id: str | None,
        *,
        recoverer_id: str,
        result: Mapping[str, Any],
        report: Mapping[str, Any],
    ) -> None:
        """Write down a recovery that was made by hand, of a run that was nobody's to claim.

        Args:
            lease: Under which it was made.
            run_id: The run, where it is known.
            recoverer_id: The process that made it.
            result: How it ended.
            report: Its record; it names the incident.
        """
        row = self._insert_into(incidents).values(
            incident_id=report["incident_id"],
            agent_id=lease.agent_id,
            thread_id=lease.thread_id,
            dead_incarnation=BY_HAND,
            lost_epoch=lease.epoch,
            run_id=run_id,
            status="recovered",
            attempts=1,
            epoch=lease.epoch,
            recoverer_id=recoverer_id,
            result=_json(result),
            report=_json(report),
            opened_at=self._now,
            updated_at=self._now,
        )
        self._work(lambda connection: connection.execute(row.on_conflict_do_nothing()))

    def answer(self, incident_id: str, answer: object, *, question: Json | None = None) -> Incident:
        """Answer an incident's question; the next supervisor that looks goes on with it.

        Args:
            incident_id: Whose question.
            answer: Plain JSON.
            question: The question that was seen; by default the one that is asked now.

        Raises:
            ConfigurationError: If there is no such incident, or it asks nothing, or something else.
            ProtocolError: If the answer is no plain JSON.
        """
        found = self.incident(incident_id)
        asked = None if found is None else (found.question or {}).get("question_id")
        if question is not None and question.get("question_id") != asked:
            raise ConfigurationError(
                f"incident {incident_id} asks something else by now: see `peerctx incidents show "
                f"{incident_id:.8}`, and answer that"
            )
        kept = json_text({"value": answer, "question_id": asked}, name="answer")
        asks = found is not None and found.question is not None and found.answer is None
        if found is not None and asks and found.status == "recovering":
            # It is being looked whether the answer has come from elsewhere.
            adding = (
                update(incidents)
                .where(
                    incidents.c.incident_id == found.incident_id,
                    incidents.c.status == "recovering",
                    incidents.c.epoch == found.epoch,
                )
                .values(answer=kept, updated_at=self._now)
            )
            if self._work(lambda connection: connection.execute(adding).rowcount):
                return found
        return self._moved_on(
            incident_id, {"waiting_for_human"}, "is not waiting for an answer", answer=kept
        )

    def redrive(self, incident_id: str) -> Incident:
        """Try a dead letter anew, with all its attempts.

        Raises:
            ConfigurationError: If there is no such incident, or it needs none.
        """
        return self._moved_on(
            incident_id,
            {"dead_letter", "open"},
            "is neither a dead letter nor waiting for its next attempt",
            attempts=0,
        )

    def incident(self, incident_id: str) -> Incident | None:
        """Return an incident, by its id or by a beginning of it that no other has."""
        pattern = incident_id.replace("\\", "\\\\").replace("%", r"\%").replace("_", r"\_") + "%"
        found = self._incidents(incidents.c.incident_id.like(pattern, escape="\\"), limit=2)
        exact = [one for one in found if one.incident_id == incident_id]
        return exact[0] if exact else found[0] if len(found) == 1 else None

    def incident_of(self, agent_id: str, thread_id: str) -> Incident | None:
        """Return the newest incident of a thread."""
        found = self._incidents(
            incidents.c.agent_id == agent_id, incidents.c.thread_id == thread_id, limit=1
        )
        return found[0] if found else None

    def all_incidents(
        self, *, status: IncidentStatus | None = None, limit: int = 100
    ) -> list[Incident]:
        """Return incidents, newest first."""
        asked = () if status is None else (incidents.c.status == status,)
        if status == "waiting_for_human":  # while its peer is asked again, it still waits
            asks = (incidents.c.status == "recovering") & incidents.c.question.is_not(None)
            asked = (or_(*asked, asks & incidents.c.answer.is_(None)),)
        return self._incidents(*asked, limit=limit)

    async def aincident_of(self, agent_id: str, thread_id: str) -> Incident | None:
        """See `incident_of`."""
        return await self.in_thread(partial(self.incident_of, agent_id, thread_id))

    def _moved_on(
        self, incident_id: str, from_: set[str], otherwise: str, **values: Any
    ) -> Incident:
        found = self.incident(incident_id)
        if found is None:
            raise ConfigurationError(
                f"there is no incident {incident_id!r:.80}: see `peerctx incidents list`"
            )
        if found.status not in from_:
            raise ConfigurationError(
                f"incident {found.incident_id} {otherwise}: it is {found.status}"
            )

        def work(connection: Connection) -> int:
            moving = (
                update(incidents)
                .where(incidents.c.incident_id == found.incident_id, incidents.c.status.in_(from_))
                .values(status="open", next_attempt_at=self._now, updated_at=self._now, **values)
            )
            return connection.execute(moving).rowcount

        if not self._work(work, transaction=True, again=False):
            raise ConfigurationError(f"incident {found.incident_id} {otherwise} any more")
        moved = self.incident(found.incident_id)
        assert moved is not None  # noqa: S101 - incidents are never deleted
        return moved

    def _open(self, connection: Connection, lost: LostRun) -> Incident:
        """Open an incident, or return it: the death of one incarnation under one epoch is one."""
        key = {
            "agent_id": lost.agent_id,
            "thread_id": lost.thread_id,
            "dead_incarnation": lost.owner_incarnation or HANDED_OVER,
            "lost_epoch": lost.epoch,
        }
        once = self._insert_into(incidents).values(
            incident_id=new_id(),
            run_id=lost.run_id,
            status="open",
            attempts=0,
            epoch=lost.epoch,
            opened_at=self._now,
            updated_at=self._now,
            **key,
        )
        connection.execute(once.on_conflict_do_nothing())
        opened = self._incident(connection, *(incidents.c[k] == v for k, v in key.items()))
        assert opened is not None  # noqa: S101 - it is there now
        return opened

    def _unfinished(self, connection: Connection, lost: LostRun) -> Incident | None:
        """Return the incident that a run has already: a recoverer that died does not begin anew."""
        return self._incident(
            connection,
            incidents.c.agent_id == lost.agent_id,
            incidents.c.thread_id == lost.thread_id,
            incidents.c.run_id == lost.run_id,
            incidents.c.status != "recovered",
        )

    def _is_still_lost(self, connection: Connection, lost: LostRun, owner: Owner) -> bool:
        """Tell whether the lease stands as it was found, and lock it.

        One of our own, of which we do not know, was claimed by somebody who never heard of it.
        """
        found = connection.execute(
            select(leases.c.epoch, leases.c.owner_incarnation, leases.c.expires_at < self._now)
            .where(leases.c.agent_id == lost.agent_id, leases.c.thread_id == lost.thread_id)
            .with_for_update()  # on SQLite the transaction itself is the lock
        ).first()
        if found is None or found[0] != lost.epoch:
            return False
        if found[1] == owner.incarnation:
            if not found[2]:
                return False
            connection.execute(
                update(leases)
                .where(leases.c.agent_id == lost.agent_id, leases.c.thread_id == lost.thread_id)
                .values(owner_id=None, owner_incarnation=None)
            )
        return True

    def _is_due(self, connection: Connection, incident: Incident) -> bool:
        if incident.status == "recovering":
            return True
        due = select(incidents.c.incident_id).where(
            incidents.c.incident_id == incident.incident_id,
            or_(
                (incidents.c.status == "open") & incidents.c.next_attempt_at.is_(None),
                incidents.c.status.in_(("open", "waiting_for_human"))
                & (incidents.c.next_attempt_at <= self._now),
            ),
        )
        return connection.execute(due).first() is not None

    def _answer_since(self, connection: Connection, incident: Incident) -> Json | None:
        """Return what a human has answered since an attempt began; None if nothing."""
        now = self._incident(connection, incidents.c.incident_id == incident.incident_id)
        return None if now is None or now.answer == incident.answer else now.answer

    def _update(self, connection: Connection, incident_id: str, **values: Any) -> None:
        connection.execute(
            update(incidents)
            .where(incidents.c.incident_id == incident_id)
            .values(updated_at=self._now, **values)
        )

    def _incident(self, connection: Connection, *asked: ColumnElement[bool]) -> Incident | None:
        newest = incidents.c.opened_at.desc(), incidents.c.incident_id
        row = connection.execute(select(incidents).where(*asked).order_by(*newest).limit(1)).first()
        return None if row is None else _read(row)

    def _incidents(self, *asked: ColumnElement[bool], limit: int) -> list[Incident]:
        newest = incidents.c.opened_at.desc(), incidents.c.incident_id
        rows = self._rows(select(incidents).where(*asked).order_by(*newest).limit(limit))
        return [_read(row) for row in rows]


def _answers(answer: Mapping[str, Any], question: Mapping[str, Any] | None) -> bool:
    """Tell whether an answer is to this question, and not to one that was asked before."""
    return question is None or answer.get("question_id") == question.get("question_id")


def _read(row: Row[Any]) -> Incident:
    values = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's public name for it
    for name in _JSON:
        values[name] = None if values[name] is None else json.loads(values[name])
    for name in ("opened_at", "updated_at", "next_attempt_at"):
        values[name] = None if values[name] is None else moment_at(values[name])
    values["status"] = cast("IncidentStatus", values["status"])
    return Incident(**values)


def _json(value: Mapping[str, Any] | None) -> str | None:
    """Return JSON for people: whatever a workflow's state holds, it can be written down."""
    if value is None:
        return None
    try:
        return json.dumps(value, default=repr)
    except (ValueError, RecursionError):
        return json.dumps({"cut": "it could not be written as JSON"})
