"""Who may write a thread: one row a thread, whose epoch rises with each new owner.

Expiry is judged by the database's clock alone. Rows are never deleted: an epoch that began anew
would let a superseded owner write.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import (
    BigInteger,
    Connection,
    Row,
    bindparam,
    case,
    func,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.sql.elements import ColumnElement

from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.identifiers import check_id
from langgraph_peerctx.persistence.database import Database
from langgraph_peerctx.persistence.schema import leases
from langgraph_peerctx.protocol.json_values import plain_text

LONGEST_SECONDS = 86_400
_MICROSECONDS = 1_000_000
_NAMES_IN_A_STATEMENT = 10_000
"""SQLite takes 32,766 parameters in one."""
_CLOCKS = {
    # The time of the statement, not of its transaction.
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)",
    "postgresql": "(extract(epoch from clock_timestamp()) * 1000000)::bigint",
}

_BESIDE: Any = select(
    func.pg_try_advisory_xact_lock(bindparam("key", type_=BigInteger)).label("was_free"),
    literal_column("to_regclass('peerctx_leases')::oid::bigint").label("number"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A thread's lease, as it stood when it was read.

    Attributes:
        run_id: The run that is under way, if the owner said so.
        epoch: Rises with each new owner; writes under a lower one are a superseded owner's.
        owner_id: The process that may write; None if it was given back.
        owner_incarnation: That life of the process.
        seconds_left: Until it expires, by the database's clock; less than zero since.
    """

    agent_id: str
    thread_id: str
    run_id: str | None
    epoch: int
    owner_id: str | None
    owner_incarnation: str | None
    seconds_left: float

    @property
    def is_free(self) -> bool:
        """Whether anybody may claim it."""
        return self.owner_incarnation is None or self.seconds_left < 0


class Leases(Database):
    """The leases of a control database; each method has an async twin with `a` in front."""

    def claim(
        self,
        agent_id: str,
        thread_id: str,
        *,
        owner_id: str,
        incarnation: str,
        ttl_seconds: float,
        run_id: str | None = None,
        dead_incarnation: str | None = None,
    ) -> Lease | None:
        """Take a thread, by one conditional write: of any number at once, one succeeds.

        It succeeds if nobody has it, if it has expired, if we have it already (the epoch stays), or
        if its owner is the incarnation that is known to be dead.

        Args:
            agent_id: Whose thread it is.
            thread_id: The thread.
            owner_id: The process that claims it.
            incarnation: This life of it.
            ttl_seconds: Until it expires, unless it is renewed.
            run_id: The run that is under way.
            dead_incarnation: Whose unexpired lease may be taken: somebody saw it die.

        Returns:
            The lease, or None if somebody else has it.

        Raises:
            ProtocolError: If an id is not legal.
            ConfigurationError: If the time is no positive number.
            StoreError: If the database failed.
        """
        claimed = partial(
            self._claim,
            agent_id=agent_id,
            thread_id=thread_id,
            owner_id=owner_id,
            incarnation=incarnation,
            ttl_seconds=ttl_seconds,
            run_id=run_id,
            dead_incarnation=dead_incarnation,
        )
        return self._work(claimed)

    def renew(
        self, incarnation: str, threads: Collection[tuple[str, str]], *, ttl_seconds: float
    ) -> list[Lease]:
        """Renew what one life of a process holds, with one statement.

        What is asked for and not in the result, has another owner by now. Nothing is renewed that
        is not asked for: a claim whose answer never came must run out.

        Args:
            incarnation: Whose leases.
            threads: Agent and thread of each.
            ttl_seconds: Until they expire, unless they are renewed again.
        """
        wanted = {*threads}
        asked = {"owner": incarnation, "ttl": int(ttl_seconds * _MICROSECONDS)}
        names = sorted({plain_text(thread_id) for _, thread_id in wanted})
        renewed: list[Lease] = []
        for start in range(0, len(names), _NAMES_IN_A_STATEMENT):
            some = names[start : start + _NAMES_IN_A_STATEMENT]
            renewed += self._renewed(some, asked)
        return [lease for lease in renewed if (lease.agent_id, lease.thread_id) in wanted]

    def _renewed(self, names: Sequence[str], asked: dict[str, Any]) -> list[Lease]:
        statement = (
            update(leases)
            .where(leases.c.owner_incarnation == bindparam("owner"), leases.c.thread_id.in_(names))
            .values(expires_at=self._now + bindparam("ttl", type_=BigInteger))
            .returning(*self._columns())
        )
        return self._read_leases(
            self._work(lambda connection: connection.execute(statement, asked).all())
        )

    def release(self, agent_id: str, thread_id: str, *, incarnation: str) -> bool:
        """Give a lease back; tell whether it was still ours."""
        statement = (
            update(leases)
            .where(
                leases.c.agent_id == bindparam("agent"),
                leases.c.thread_id == bindparam("thread"),
                leases.c.owner_incarnation == bindparam("owner"),
            )
            .values(owner_id=None, owner_incarnation=None, expires_at=self._now)
        )
        asked = {"agent": agent_id, "thread": plain_text(thread_id), "owner": incarnation}
        return self._work(lambda connection: connection.execute(statement, asked).rowcount) > 0

    def lease_of(self, agent_id: str, thread_id: str) -> Lease | None:
        """Return a thread's lease; None if the thread never had one."""
        found = self._leases_where(
            leases.c.agent_id == agent_id, leases.c.thread_id == plain_text(thread_id)
        )
        return found[0] if found else None

    def leases_of_thread(self, thread_id: str) -> list[Lease]:
        """Return the leases of a thread, sorted by agent: a checkpointer knows no agent."""
        return self._leases_where(leases.c.thread_id == plain_text(thread_id))

    def leases_owned_by(self, incarnation: str) -> list[Lease]:
        """Return what one life of a process owns."""
        return self._leases_where(leases.c.owner_incarnation == incarnation)

    def table_beside(self, advisory_lock: int) -> int | None:
        """Return the table's number if another session in this database has an advisory lock.

        Who took one that nobody else can know of, learns whether we are in the same database. None
        if we are not, and on SQLite.
        """
        if self._is_sqlite:
            return None
        (found,) = self._rows(_BESIDE, key=advisory_lock)
        return None if found.was_free else int(found.number)

    def expired_leases(self, *, limit: int = 1_000) -> list[Lease]:
        """Return leases that have an owner and have expired, longest expired first."""
        return self._leases_where(
            leases.c.owner_incarnation.is_not(None),
            leases.c.expires_at < self._now,
            order_by=leases.c.expires_at,
            limit=limit,
        )

    async def aclaim(self, agent_id: str, thread_id: str, **options: Any) -> Lease | None:
        """See `claim`."""
        return await self.in_thread(partial(self.claim, agent_id, thread_id, **options))

    async def arenew(
        self, incarnation: str, threads: Collection[tuple[str, str]], *, ttl_seconds: float
    ) -> list[Lease]:
        """See `renew`."""
        return await self.in_thread(
            partial(self.renew, incarnation, tuple(threads), ttl_seconds=ttl_seconds)
        )

    async def arelease(self, agent_id: str, thread_id: str, *, incarnation: str) -> bool:
        """See `release`."""
        work = partial(self.release, agent_id, thread_id, incarnation=incarnation)
        return await self.in_thread(work)

    async def alease_of(self, agent_id: str, thread_id: str) -> Lease | None:
        """See `lease_of`."""
        return await self.in_thread(partial(self.lease_of, agent_id, thread_id))

    async def aleases_of_thread(self, thread_id: str) -> list[Lease]:
        """See `leases_of_thread`."""
        return await self.in_thread(partial(self.leases_of_thread, thread_id))

    async def aleases_owned_by(self, incarnation: str) -> list[Lease]:
        """See `leases_owned_by`."""
        return await self.in_thread(partial(self.leases_owned_by, incarnation))

    async def atable_beside(self, advisory_lock: int) -> int | None:
        """See `table_beside`."""
        return await self.in_thread(partial(self.table_beside, advisory_lock))

    async def aexpired_leases(self, *, limit: int = 1_000) -> list[Lease]:
        """See `expired_leases`."""
        return await self.in_thread(partial(self.expired_leases, limit=limit))

    def _claim(
        self,
        connection: Connection,
        *,
        agent_id: str,
        thread_id: str,
        owner_id: str,
        incarnation: str,
        ttl_seconds: float,
        run_id: str | None,
        dead_incarnation: str | None,
    ) -> Lease | None:
        """Claim on a connection that may have a transaction open; see `claim`."""
        if not 0 < ttl_seconds <= LONGEST_SECONDS:
            raise ConfigurationError(
                f"ttl_seconds={ttl_seconds!r:.40} should be more than 0, and a day at most"
            )
        row = {
            "agent_id": check_id(agent_id, "agent_id"),
            "thread_id": plain_text(thread_id),
            "owner_id": check_id(owner_id, "owner_id"),
            "owner_incarnation": plain_text(incarnation),
            "run_id": run_id,
            "ttl": int(ttl_seconds * _MICROSECONDS),
            "dead": dead_incarnation,
        }
        found = connection.execute(self._claiming(), row).all()
        return self._read_leases(found)[0] if found else None

    @property
    def _now(self) -> ColumnElement[int]:
        """The database's own clock, in microseconds since 1970."""
        return literal_column(_CLOCKS["sqlite" if self._is_sqlite else "postgresql"], BigInteger)

    def _columns(self) -> Sequence[ColumnElement[Any]]:
        names = ("agent_id", "thread_id", "run_id", "epoch", "owner_id", "owner_incarnation")
        left = (leases.c.expires_at - self._now).label("left")
        return [*(leases.c[name] for name in names), left]

    def _claiming(self) -> Any:
        now = self._now
        insert = self._insert_into(leases).values(
            agent_id=bindparam("agent_id"),
            thread_id=bindparam("thread_id"),
            run_id=bindparam("run_id"),
            epoch=1,
            owner_id=bindparam("owner_id"),
            owner_incarnation=bindparam("owner_incarnation"),
            acquired_at=now,
            expires_at=now + bindparam("ttl", type_=BigInteger),
        )
        given = insert.excluded
        is_ours = leases.c.owner_incarnation == given.owner_incarnation
        return insert.on_conflict_do_update(
            index_elements=["agent_id", "thread_id"],
            set_={
                "epoch": case((is_ours, leases.c.epoch), else_=leases.c.epoch + 1),
                "acquired_at": case((is_ours, leases.c.acquired_at), else_=given.acquired_at),
                "run_id": given.run_id,
                "owner_id": given.owner_id,
                "owner_incarnation": given.owner_incarnation,
                "expires_at": given.expires_at,
            },
            where=or_(
                leases.c.owner_incarnation.is_(None),
                is_ours,
                leases.c.owner_incarnation == bindparam("dead"),
                leases.c.expires_at < now,
            ),
        ).returning(*self._columns())

    def _leases_where(
        self, *conditions: Any, order_by: Any = leases.c.agent_id, limit: int | None = None
    ) -> list[Lease]:
        statement = select(*self._columns()).where(*conditions).order_by(order_by).limit(limit)
        return self._read_leases(self._rows(statement))

    @staticmethod
    def _read_leases(rows: Sequence[Row[Any]]) -> list[Lease]:
        return [
            Lease(
                agent_id=row.agent_id,
                thread_id=row.thread_id,
                run_id=row.run_id,
                epoch=row.epoch,
                owner_id=row.owner_id,
                owner_incarnation=row.owner_incarnation,
                seconds_left=row.left / _MICROSECONDS,
            )
            for row in rows
        ]
