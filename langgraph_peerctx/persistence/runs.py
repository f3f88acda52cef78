"""Every run that was admitted, what it was given, and how it ended; one without an end has crashed.

A run is admitted together with the lease of its thread, in one transaction, before anything of it
is done: so a run that was killed before its first checkpoint is known, with its input.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple, cast

from sqlalchemy import Connection, Row, delete, exists, func, or_, select, text, update
from sqlalchemy.sql.elements import ColumnElement

from langgraph_peerctx.errors import ThreadBusyError
from langgraph_peerctx.persistence.leases import Lease, Leases
from langgraph_peerctx.persistence.rows import microseconds, moment_at
from langgraph_peerctx.persistence.schema import incidents, leases, run_inputs, runs
from langgraph_peerctx.protocol.json_values import plain_text

EndKind = Literal["returned", "raised", "cancelled", "handed_over"]
RunDurability = Literal["sync", "async", "exit"]

_MICROSECONDS = 1_000_000
_ERROR_LIMIT = 2_000

# As the partial index has it: a database uses that only for the very same condition.
IS_OPEN: Any = text("(peerctx_runs.ended_at IS NULL OR peerctx_runs.end_kind = 'handed_over')")


class Packed(NamedTuple):
    """A value as LangGraph's serializer packs it."""

    kind: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInput:
    """One thing that a run was given.

    Attributes:
        checkpoint_id: Where the thread stood when it came; None if it had no checkpoint.
    """

    value: Packed
    checkpoint_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """A run that asks to be admitted.

    Attributes:
        workflow: The name under which supervisors know its workflow.
        config: What of its config can be kept.
        context: Its context, if that can be kept.
        doubted_since: The record of an earlier begin is lost: since then, at the earliest, it may
            have had effects of which its ledger does not know.
        above_epoch: The highest epoch of the thread that anybody remembers.
        traceparent: The span in which it began, if it is traced.
    """

    run_id: str
    agent_id: str
    thread_id: str
    given: RunInput
    workflow: str | None = None
    config: Packed | None = None
    context: Packed | None = None
    durability: RunDurability | None = None
    doubted_since: datetime | None = None
    above_epoch: int = 0
    traceparent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """An admitted run.

    Attributes:
        owner_incarnation: Who works at it, or did last.
        epoch: Under which epoch.
        inputs: What it was given: its input first, then each answer; at least one.
        end_kind: How it ended; None while it is open. `handed_over` waits for its next owner.
        error: What it raised.
        doubted_since: See `NewRun`.
        traceparent: The span in which it began or was gone on with; None if it was not traced.
    """

    run_id: str
    agent_id: str
    thread_id: str
    workflow: str | None
    owner_incarnation: str | None
    epoch: int
    inputs: tuple[RunInput, ...]
    config: Packed | None
    context: Packed | None
    durability: RunDurability | None
    admitted_at: datetime
    ended_at: datetime | None
    end_kind: EndKind | None
    error: str | None
    doubted_since: datetime | None = None
    traceparent: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether it still has work to do."""
        return self.ended_at is None or self.end_kind == "handed_over"


@dataclass(frozen=True, slots=True, kw_only=True)
class LostRun:
    """An open run that nobody may be working at.

    Attributes:
        epoch: Of its thread's lease, as it stands.
        owner_id: Who has the lease, or had it when it expired; None if it was given back.
        seconds_left: Of the lease, by the database's clock; less than zero since it expired.
    """

    agent_id: str
    thread_id: str
    run_id: str
    workflow: str | None
    epoch: int
    owner_id: str | None
    owner_incarnation: str | None
    seconds_left: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """One life of a process that has leases.

    Attributes:
        runs: How many leases.
        seconds_left: Of the longest.
        agents: Whose threads they are, sorted.
    """

    owner_id: str
    owner_incarnation: str
    runs: int
    seconds_left: float
    agents: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who takes a thread.

    Attributes:
        owner_id: The process.
        incarnation: This life of it.
        ttl_seconds: How long its leases live without being renewed.
    """

    owner_id: str
    incarnation: str
    ttl_seconds: float


class Runs(Leases):
    """The runs of a control database, and the leases under which they are."""

    def admit(self, run: NewRun, owner: Owner) -> Lease:
        """Take the thread and write down the run with its input, in one transaction.

        Safe to repeat: the same run id again is the same admission.

        Raises:
            ThreadBusyError: If somebody else has the thread, an earlier run of it is open, or the
                run id is another agent's or thread's.
            StoreError: If the database failed.
        """

        def work(connection: Connection) -> Lease:
            lease = self._take(connection, run.agent_id, run.thread_id, owner, run_id=run.run_id)
            lease = self._raised(connection, lease, run.above_epoch)
            since = run.doubted_since
            row = {
                "run_id": plain_text(run.run_id),
                "agent_id": run.agent_id,
                "thread_id": plain_text(run.thread_id),
                "workflow": run.workflow,
                "owner_incarnation": owner.incarnation,
                "epoch": lease.epoch,
                "durability": run.durability,
                "doubted_since": None if since is None else microseconds(since),
                "traceparent": run.traceparent,
                **_columns_of("config", run.config),
                **_columns_of("context", run.context),
            }
            once = self._insert_into(runs).values(admitted_at=self._now, **row)
            is_new = connection.execute(once.on_conflict_do_nothing()).rowcount > 0
            if not is_new and not self._own(connection, run.run_id, owner, lease):
                raise _another_s(run)
            self._add_input(connection, run.run_id, 0, run.given)
            return lease

        return self._work(work, transaction=True)

    def reopen(self, run: NewRun, owner: Owner) -> Lease:
        """Take the thread and go on with a run that ended, with one more input.

        What it was given last counts: config, context and durability too. Not to be repeated where
        its outcome is unknown: see `withdraw`.

        Raises:
            ThreadBusyError: If somebody else has the thread, a run of it is open, or the run id is
                another agent's or thread's.
            StoreError: If the database failed.
        """

        def work(connection: Connection) -> Lease:
            lease = self._take(connection, run.agent_id, run.thread_id, owner)
            if not self._own(connection, run.run_id, owner, lease):
                raise _another_s(run)
            count = select(func.count()).where(run_inputs.c.run_id == run.run_id)
            number = connection.execute(count).scalar_one()
            self._add_input(connection, run.run_id, number, run.given)
            given = {
                "durability": run.durability,
                "traceparent": run.traceparent,
                **_columns_of("config", run.config),
                **_columns_of("context", run.context),
            }
            connection.execute(update(runs).where(runs.c.run_id == run.run_id).values(**given))
            return lease

        return self._work(work, transaction=True, again=False)

    def take(self, agent_id: str, thread_id: str, owner: Owner) -> Lease:
        """Take a thread on which nothing is open, to write to it outside of a run.

        Raises:
            ThreadBusyError: If somebody else has the thread, or a run of it is open.
            StoreError: If the database failed.
        """
        work = partial(self._take, agent_id=agent_id, thread_id=thread_id, owner=owner)
        return self._work(work, transaction=True)

    def withdraw(self, agent_id: str, thread_id: str, run_id: str, incarnation: str) -> bool:
        """Take back an admission of which its caller never heard; tell whether there was one.

        The run ends as cancelled: nothing of it was begun.
        """

        def work(connection: Connection) -> bool:
            lease = connection.execute(
                select(*self._columns())
                .where(
                    leases.c.agent_id == agent_id,
                    leases.c.thread_id == plain_text(thread_id),
                    leases.c.owner_incarnation == incarnation,
                )
                .with_for_update()
            ).all()
            of_thread = runs.c.agent_id == agent_id, runs.c.thread_id == plain_text(thread_id)
            run = self._run(connection, runs.c.run_id == run_id, *of_thread)
            if not lease or run is None or run.epoch != lease[0].epoch:
                return False
            if len(run.inputs) > 1:  # an answer, which its caller will give again
                last = run_inputs.c.number == len(run.inputs) - 1
                connection.execute(delete(run_inputs).where(run_inputs.c.run_id == run_id, last))
            (ours,) = self._read_leases(lease)
            why = "its admission was not heard of in time"
            self._end(connection, run_id, "cancelled", why, lease=ours)
            return self._give_back(connection, ours)

        return self._work(work, transaction=True)

    def end(
        self,
        lease: Lease,
        run_id: str,
        kind: EndKind,
        *,
        error: str | None = None,
    ) -> bool:
        """Write down how a run ended and give its thread back, in one transaction.

        Args:
            lease: Ours, as it was when the run began.
            run_id: The run.
            kind: How it ended.
            error: What it raised.

        Returns:
            Whether it was still ours to end; otherwise nothing was written.
        """

        def work(connection: Connection) -> bool:
            if self._give_back(connection, lease):
                self._end(connection, run_id, kind, error, lease=lease)
                return True
            # The answer to an earlier try may have been lost.
            ended = select(runs.c.end_kind).where(
                runs.c.run_id == run_id, runs.c.epoch == lease.epoch
            )
            return bool(connection.execute(ended).scalar() == kind)

        return self._work(work, transaction=True)

    def hand_over(self, incarnation: str) -> int:
        """Give back all that one life of a process has; its open runs wait for their next owner.

        Returns:
            How many runs.
        """
        is_ours = exists().where(
            leases.c.agent_id == runs.c.agent_id,
            leases.c.thread_id == runs.c.thread_id,
            leases.c.owner_incarnation == incarnation,
            leases.c.epoch == runs.c.epoch,
        )
        # Leases first, in one order, as everybody does: or two of us wait for each other.
        locking = (
            select(leases.c.epoch)
            .where(leases.c.owner_incarnation == incarnation)
            .order_by(leases.c.agent_id, leases.c.thread_id)
            .with_for_update()
        )
        handing = (
            update(runs)
            .where(runs.c.owner_incarnation == incarnation, runs.c.ended_at.is_(None), is_ours)
            .values(ended_at=self._now, end_kind="handed_over")
        )
        giving = (
            update(leases)
            .where(leases.c.owner_incarnation == incarnation)
            .values(owner_id=None, owner_incarnation=None, expires_at=self._now)
        )

        def work(connection: Connection) -> int:
            connection.execute(locking).all()
            handed = connection.execute(handing).rowcount
            connection.execute(giving)
            return handed

        return self._work(work, transaction=True)

    def run(self, run_id: str) -> Run | None:
        """Return a run with all that it was given; None if there is none of this id."""
        return self._work(lambda connection: self._run(connection, runs.c.run_id == run_id))

    def newest_run(self, agent_id: str, thread_id: str) -> Run | None:
        """Return the run of a thread that had an owner last; None if there never was one.

        By its epoch, which only rises: a database's clock may step back.
        """
        asked = runs.c.agent_id == agent_id, runs.c.thread_id == plain_text(thread_id)
        return self._work(lambda connection: self._run(connection, *asked))

    def lost_runs(self, dead: Sequence[str] = (), *, limit: int = 1_000) -> list[LostRun]:
        """Return open runs whose lease is free, has expired, or is one of these incarnations'.

        Not those that wait for a human or for the time of their next attempt, nor dead letters.

        Args:
            dead: Incarnations that are known to be dead.
            limit: At most so many, the earliest admitted first.
        """
        its_owner = leases.c.owner_incarnation
        return self._lost(
            or_(its_owner.is_(None), leases.c.expires_at < self._now, its_owner.in_(dead)),
            ~self._waits(),
            limit=limit,
        )

    def open_run(self, agent_id: str, thread_id: str) -> LostRun | None:
        """Return a thread's open run, whoever works at it; None if it has none."""
        found = self._lost(
            runs.c.agent_id == agent_id, runs.c.thread_id == plain_text(thread_id), limit=1
        )
        return found[0] if found else None

    def count_open(self) -> int:
        """Return how many runs are open, whoever works at them."""
        (row,) = self._rows(select(func.count().label("open")).select_from(runs).where(IS_OPEN))
        return int(row.open)

    def holders(self) -> list[Holder]:
        """Return who has leases, expired or not, sorted by process."""
        whose = leases.c.owner_id, leases.c.owner_incarnation, leases.c.agent_id
        statement: Any = (
            select(
                *whose,
                func.count().label("runs"),
                (func.max(leases.c.expires_at) - self._now).label("left"),
            )
            .where(leases.c.owner_incarnation.is_not(None))
            .group_by(*whose)
            .order_by(*whose)
        )
        lives = groupby(self._rows(statement), lambda row: (row.owner_id, row.owner_incarnation))
        return [_holder(*life, list(by_agent)) for life, by_agent in lives]

    async def aadmit(self, run: NewRun, owner: Owner) -> Lease:
        """See `admit`."""
        return await self.in_thread(partial(self.admit, run, owner))

    async def ahand_over(self, incarnation: str) -> int:
        """See `hand_over`."""
        return await self.in_thread(partial(self.hand_over, incarnation))

    async def arun(self, run_id: str) -> Run | None:
        """See `run`."""
        return await self.in_thread(partial(self.run, run_id))

    async def anewest_run(self, agent_id: str, thread_id: str) -> Run | None:
        """See `newest_run`."""
        return await self.in_thread(partial(self.newest_run, agent_id, thread_id))

    async def alost_runs(self, dead: Sequence[str] = (), *, limit: int = 1_000) -> list[LostRun]:
        """See `lost_runs`."""
        return await self.in_thread(partial(self.lost_runs, tuple(dead), limit=limit))

    async def aopen_run(self, agent_id: str, thread_id: str) -> LostRun | None:
        """See `open_run`."""
        return await self.in_thread(partial(self.open_run, agent_id, thread_id))

    async def acount_open(self) -> int:
        """See `count_open`."""
        return await self.in_thread(self.count_open)

    async def aholders(self) -> list[Holder]:
        """See `holders`."""
        return await self.in_thread(self.holders)

    # What transactions are made of

    def _take(
        self,
        connection: Connection,
        agent_id: str,
        thread_id: str,
        owner: Owner,
        *,
        run_id: str | None = None,
    ) -> Lease:
        """Claim a thread on which nothing is open, unless it is the admission that is repeated."""
        lease = self._claim(
            connection,
            agent_id=agent_id,
            thread_id=thread_id,
            owner_id=owner.owner_id,
            incarnation=owner.incarnation,
            ttl_seconds=owner.ttl_seconds,
            run_id=run_id,
            dead_incarnation=None,
        )
        if lease is None:
            raise ThreadBusyError(
                f"thread {thread_id!r:.80} of {agent_id} has an owner that is at work: wait until "
                "its run has ended, or see `peerctx agents`"
            )
        asked = runs.c.agent_id == agent_id, runs.c.thread_id == plain_text(thread_id)
        newest = self._run(connection, *asked, IS_OPEN)
        is_again = newest is not None and (newest.run_id, newest.epoch) == (run_id, lease.epoch)
        if newest is not None and not is_again:
            raise ThreadBusyError(
                f"run {newest.run_id} of thread {thread_id!r:.80} has not ended: wait for it; if "
                f"its process has died, a supervisor recovers it, or `peerctx recover {agent_id} "
                f"{thread_id}` does"
            )
        return lease

    def _raised(self, connection: Connection, lease: Lease, above_epoch: int) -> Lease:
        """Raise a lease's epoch above one that others remember, where our own record is lost."""
        if lease.epoch > above_epoch:
            return lease
        connection.execute(
            update(leases)
            .where(leases.c.agent_id == lease.agent_id, leases.c.thread_id == lease.thread_id)
            .values(epoch=above_epoch + 1)
        )
        return replace(lease, epoch=above_epoch + 1)

    def _own(self, connection: Connection, run_id: str, owner: Owner, lease: Lease) -> bool:
        """Let a run of the lease's thread go on under a new owner; tell whether there is one."""
        owned = connection.execute(
            update(runs)
            .where(runs.c.run_id == run_id, *_of_thread(lease))
            .values(
                owner_incarnation=owner.incarnation,
                epoch=lease.epoch,
                ended_at=None,
                end_kind=None,
                error=None,
            )
        )
        return owned.rowcount > 0

    def _add_input(self, connection: Connection, run_id: str, number: int, given: RunInput) -> None:
        added = self._insert_into(run_inputs).values(
            run_id=plain_text(run_id),
            number=number,
            input_type=given.value.kind,
            input=given.value.data,
            admitted_at=self._now,
            checkpoint_id=given.checkpoint_id,
        )
        connection.execute(added.on_conflict_do_nothing())

    def _give_back(self, connection: Connection, lease: Lease) -> bool:
        """Give a lease back; tell whether it was still ours."""
        given = connection.execute(
            update(leases)
            .where(
                leases.c.agent_id == lease.agent_id,
                leases.c.thread_id == lease.thread_id,
                leases.c.owner_incarnation == lease.owner_incarnation,
                leases.c.epoch == lease.epoch,
            )
            .values(owner_id=None, owner_incarnation=None, expires_at=self._now)
        )
        return given.rowcount > 0

    def _end(
        self,
        connection: Connection,
        run_id: str,
        kind: EndKind,
        error: str | None = None,
        *,
        lease: Lease | None = None,
    ) -> None:
        """Write down how a run ended: under a lease only one that was run under it."""
        ours = () if lease is None else (*_of_thread(lease), runs.c.epoch == lease.epoch)
        connection.execute(
            update(runs)
            .where(runs.c.run_id == run_id, *ours)
            .values(
                ended_at=self._now,
                end_kind=kind,
                error=None if error is None else plain_text(error[:_ERROR_LIMIT]),
            )
        )

    def _run(self, connection: Connection, *asked: ColumnElement[bool]) -> Run | None:
        newest = runs.c.epoch.desc(), runs.c.admitted_at.desc(), runs.c.run_id
        row = connection.execute(select(runs).where(*asked).order_by(*newest).limit(1)).first()
        if row is None:
            return None
        given = connection.execute(
            select(run_inputs)
            .where(run_inputs.c.run_id == row.run_id)
            .order_by(run_inputs.c.number)
        )
        return Run(
            run_id=row.run_id,
            agent_id=row.agent_id,
            thread_id=row.thread_id,
            workflow=row.workflow,
            owner_incarnation=row.owner_incarnation,
            epoch=row.epoch,
            inputs=tuple(
                RunInput(
                    value=Packed(kind=one.input_type, data=one.input),
                    checkpoint_id=one.checkpoint_id,
                )
                for one in given
            ),
            config=_packed(row.config_type, row.config),
            context=_packed(row.context_type, row.context),
            durability=cast("RunDurability | None", row.durability),
            admitted_at=moment_at(row.admitted_at),
            ended_at=None if row.ended_at is None else moment_at(row.ended_at),
            end_kind=cast("EndKind | None", row.end_kind),
            error=row.error,
            doubted_since=None if row.doubted_since is None else moment_at(row.doubted_since),
            traceparent=row.traceparent,
        )

    def _lost(self, *asked: ColumnElement[bool], limit: int) -> list[LostRun]:
        of_its_thread = leases.c.agent_id == runs.c.agent_id, leases.c.thread_id == runs.c.thread_id
        statement = (
            select(
                *(runs.c[name] for name in ("agent_id", "thread_id", "run_id", "workflow")),
                *(leases.c[name] for name in ("epoch", "owner_id", "owner_incarnation")),
                (leases.c.expires_at - self._now).label("left"),
            )
            .join(leases, of_its_thread[0] & of_its_thread[1])
            .where(IS_OPEN, *asked)
            .order_by(runs.c.admitted_at)
            .limit(limit)
        )
        return [
            LostRun(
                agent_id=row.agent_id,
                thread_id=row.thread_id,
                run_id=row.run_id,
                workflow=row.workflow,
                epoch=row.epoch,
                owner_id=row.owner_id,
                owner_incarnation=row.owner_incarnation,
                seconds_left=row.left / _MICROSECONDS,
            )
            for row in self._rows(statement)
        ]

    def _waits(self) -> Any:
        """Whether a run has an incident for which it is not the time, or not ours."""
        return exists().where(
            incidents.c.agent_id == runs.c.agent_id,
            incidents.c.thread_id == runs.c.thread_id,
            incidents.c.run_id == runs.c.run_id,
            or_(
                incidents.c.status == "dead_letter",
                (incidents.c.status == "waiting_for_human") & incidents.c.next_attempt_at.is_(None),
                incidents.c.next_attempt_at > self._now,
            ),
        )


def _of_thread(lease: Lease) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Return whether a run is of the thread that a lease is of."""
    return runs.c.agent_id == lease.agent_id, runs.c.thread_id == plain_text(lease.thread_id)


def _another_s(run: NewRun) -> ThreadBusyError:
    return ThreadBusyError(
        f"the run id {run.run_id!r:.80} is another's, and no run of thread {run.thread_id!r:.80} "
        f"of {run.agent_id}: begin it under an id of its own"
    )


def _holder(owner_id: str, incarnation: str, by_agent: Sequence[Row[Any]]) -> Holder:
    return Holder(
        owner_id=owner_id,
        owner_incarnation=incarnation,
        runs=sum(row.runs for row in by_agent),
        seconds_left=max(row.left for row in by_agent) / _MICROSECONDS,
        # Not in the database's order, which may be a language's.
        agents=tuple(sorted(row.agent_id for row in by_agent)),
    )


def _packed(kind: str | None, data: bytes | None) -> Packed | None:
    return None if kind is None or data is None else Packed(kind=kind, data=data)


def _columns_of(name: str, value: Packed | None) -> dict[str, Any]:
    return {} if value is None else {f"{name}_type": value.kind, name: value.data}
