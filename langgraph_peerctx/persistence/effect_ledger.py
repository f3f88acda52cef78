"""Side effects of runs: meant, and what came of them. An intent alone is in doubt."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from typing import Any, Literal

from pydantic import JsonValue
from pydantic_core import from_json, to_json
from sqlalchemy import BigInteger, Connection, Row, bindparam, case, func, or_, select, update
from sqlalchemy.sql.elements import ColumnElement

from langgraph_peerctx.errors import StaleOwnerError
from langgraph_peerctx.persistence.rows import microseconds, moment_at
from langgraph_peerctx.persistence.runs import Runs
from langgraph_peerctx.persistence.schema import effects, leases
from langgraph_peerctx.protocol.json_values import plain_text
from langgraph_peerctx.protocol.messages import InDoubtKey, Verdict

EffectScope = Literal["run", "thread"]
EffectStatus = Literal["intent", "done", "not_done"]
EffectSource = Literal["own", "peer", "check", "human"]
IfUnknown = Literal["ask", "retry", "fail"]

_SUPERSTEP = re.compile(r"@(-?\d+)")
_KEY_DIGITS = 16
"""Of an effect's hash, in its key: 64 bits, beside a name that people can read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEffect:
    """A side effect that is meant.

    Attributes:
        position: Where in the run; see `positions`.
        name: The caller's key.
        peer_id: The agent that it reaches, which alone can tell whether it did.
        scope: `run`: once at this position of this run. `thread`: once in the thread.
        if_unknown: What to do if nobody can tell whether it happened.
        has_check: Whether the caller can look itself.
    """

    agent_id: str
    thread_id: str
    run_id: str
    position: str
    name: str
    peer_id: str | None = None
    scope: EffectScope = "run"
    if_unknown: IfUnknown = "ask"
    has_check: bool = False

    @property
    def effect_id(self) -> str:
        """What it is kept under: of its place and its name, never of a task or checkpoint."""
        place = (self.run_id, self.position) if self.scope == "run" else ()
        parts = [self.thread_id, *place, self.name]
        return hashlib.sha256(to_json([self.scope, *map(plain_text, parts)])).hexdigest()

    @property
    def key(self) -> str:
        """What a peer keeps it under."""
        return f"{self.name}@{self.effect_id[:_KEY_DIGITS]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect(NewEffect):
    """A side effect and what is known of it.

    Attributes:
        status: An `intent` is in doubt until its outcome is there, or somebody tells.
        epoch: Under which it was meant last.
        attempt: How often it was.
        intent_at: When, by the database's clock.
        outcome: What came of it, if `done`.
        source: Who says so.
        unknown_at: When it was asked about last and nobody could tell.
        unknown_to: Who could not tell: the `check` once it has looked in vain, or else the `peer`.
        is_retried: Whether it was begun though an attempt before was in doubt.
    """

    status: EffectStatus
    epoch: int
    attempt: int
    intent_at: datetime
    outcome: JsonValue = None
    done_at: datetime | None = None
    source: EffectSource | None = None
    unknown_at: datetime | None = None
    unknown_to: EffectSource | None = None
    is_retried: bool = False

    @property
    def superstep(self) -> int:
        """The superstep of the graph itself at which it stands; see `positions`."""
        found = _SUPERSTEP.search(self.position)
        return int(found[1]) if found else 0

    @property
    def in_doubt_key(self) -> InDoubtKey | None:
        """What its peer is asked about; None without a peer."""
        if self.peer_id is None:
            return None
        return InDoubtKey(
            effect_key=self.key, peer_id=self.peer_id, epoch=self.epoch, intent_at=self.intent_at
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """An effect that was to begin.

    Attributes:
        has_begun: Whether it may be done now: its intent is written, under this attempt.
    """

    effect: Effect
    has_begun: bool


class EffectLedger(Runs):
    """The effects of a control database, beside the runs that they are of."""

    def intend(
        self,
        new: NewEffect,
        *,
        epoch: int,
        incarnation: str,
        over: int | None = None,
        doubted_since: datetime | None = None,
    ) -> Standing:
        """Write down that an effect is meant, in one transaction with the check that we may.

        Of one that is in doubt the terms are brought up to date, but for its peer, if it names one:
        only whom it was sent to can tell.

        Args:
            new: The effect.
            epoch: Under which we have the thread.
            incarnation: This life of our process.
            over: The attempt in doubt that was found out not to count: a next one begins.
            doubted_since: The ledger before this one was lost: what is not in it may have been
                done, at this moment at the earliest.

        Raises:
            StaleOwnerError: If the thread is not ours any more; nothing was written.
            StoreError: If the database failed.
        """
        asked = {
            **_row_of(new, epoch),
            "incarnation": incarnation,
            "since": None if doubted_since is None else microseconds(doubted_since),
        }
        # A second try would find the first one's intent, and take it for one in doubt.
        at = self._work(
            lambda connection: connection.execute(self._intending, asked).scalar_one_or_none(),
            again=False,
        )
        if at is not None:
            return Standing(effect=_begun(new, epoch, at), has_begun=doubted_since is None)

        def work(connection: Connection) -> Standing:
            self._see_that_it_is_ours(connection, new, epoch, incarnation)
            found = self._effect(connection, new)
            assert found is not None  # noqa: S101 - it kept the intent from being written
            is_over = found.status == "intent" and found.attempt == over
            if found.status != "not_done" and not is_over:
                found = self._up_to_date(connection, found, new)
                return Standing(effect=found, has_begun=False)
            self._intend_again(connection, found, new, epoch)
            again = self._effect(connection, new)
            assert again is not None  # noqa: S101 - it was read above
            return Standing(effect=again, has_begun=True)

        return self._work(work, transaction=True, again=False)

    def conclude(self, effect: Effect, outcome: JsonValue) -> None:
        """Write down what came of an effect that we have done; of a later attempt nothing."""
        asked = {
            "agent": effect.agent_id,
            "effect": effect.effect_id,
            "try": effect.attempt,
            "what": _json(outcome),
        }
        self._work(lambda connection: connection.execute(self._concluding, asked))

    def refute(self, effect: Effect) -> Effect:
        """Write down that an effect that we were about to do was not done; return it as it is now.

        Where an earlier attempt is in doubt, it stays in doubt: we know of our own attempt alone.
        """
        values = {"status": "not_done", "source": "own"}
        return self._settle(effect, values, effects.c.retried == 0)

    def settle_effect(
        self,
        effect: Effect,
        verdict: Verdict,
        source: EffectSource,
        reply: JsonValue = None,
    ) -> Effect:
        """Write down what somebody says of an effect in doubt; return it as it is known now.

        What was settled or begun anew since it was read, stays as it is.
        """
        if verdict == "seen":
            values: dict[str, Any] = {"status": "done", "source": source, "outcome": _json(reply)}
        elif verdict == "not_seen":
            values = {"status": "not_done", "source": source}
        else:
            by_check = effects.c.unknown_to == "check"
            unknown_to = case((by_check, effects.c.unknown_to), else_=source)
            values = {"unknown_at": self._now, "unknown_to": unknown_to}
        return self._settle(effect, values)

    def amend(self, effect: Effect, verdict: Verdict, reply: JsonValue = None) -> None:
        """Put right what a human has said of an effect; of what others said nothing."""
        is_done = verdict == "seen"

        def work(connection: Connection) -> None:
            connection.execute(
                update(effects)
                .where(
                    effects.c.agent_id == effect.agent_id,
                    effects.c.effect_id == effect.effect_id,
                    effects.c.attempt == effect.attempt,
                    effects.c.source == "human",
                )
                .values(
                    status="done" if is_done else "not_done",
                    outcome=_json(reply) if is_done else None,
                    done_at=self._now,
                )
            )

        self._work(work, transaction=True)

    def effect(self, new: NewEffect) -> Effect | None:
        """Return an effect as it is known; None if it was never meant."""
        return self._work(partial(self._effect, new=new))

    def effects_of(self, agent_id: str, thread_id: str, run_id: str) -> list[Effect]:
        """Return a run's effects, and those of its whole thread, in the order they were meant."""
        statement = (
            select(effects)
            .where(
                effects.c.agent_id == bindparam("agent"),
                effects.c.thread_id == bindparam("thread"),
                or_(effects.c.run_id == bindparam("run"), effects.c.scope == "thread"),
            )
            .order_by(effects.c.intent_at, effects.c.effect_id)
        )
        rows = self._rows(statement, agent=agent_id, thread=thread_id, run=run_id)
        return [_read(row) for row in rows]

    def _see_that_it_is_ours(
        self, connection: Connection, new: NewEffect, epoch: int, incarnation: str
    ) -> None:
        """Lock the lease until the intent is written: nobody takes the thread over meanwhile."""
        held = connection.execute(
            select(leases.c.epoch, leases.c.owner_incarnation)
            .where(
                leases.c.agent_id == new.agent_id,
                leases.c.thread_id == plain_text(new.thread_id),
            )
            .with_for_update(read=True)  # on SQLite the transaction itself is the lock
        ).first()
        if held is None or (held.epoch, held.owner_incarnation) != (epoch, incarnation):
            raise StaleOwnerError(
                f"thread {new.thread_id!r:.80} is not ours any more: we held epoch {epoch}, and "
                f"{new.name!r:.80} was not begun; see `peerctx incidents list`"
            )

    def _effect(self, connection: Connection, new: NewEffect) -> Effect | None:
        row = connection.execute(
            select(effects).where(
                effects.c.agent_id == new.agent_id, effects.c.effect_id == new.effect_id
            )
        ).first()
        return None if row is None else _read(row)

    @cached_property
    def _intending(self) -> Any:
        """One statement for what happens nearly always: the lease is ours, the effect is new."""
        given = [bindparam(name, type_=effects.c[name].type) for name in _INTENT]
        at = func.coalesce(bindparam("since", type_=BigInteger), self._now)
        ours = (
            select(*given, at)
            .where(
                leases.c.agent_id == bindparam("agent_id"),
                leases.c.thread_id == bindparam("thread_id"),
                leases.c.epoch == bindparam("epoch"),
                leases.c.owner_incarnation == bindparam("incarnation"),
            )
            .with_for_update(read=True, of=leases)
        )
        insert = self._insert_into(effects).from_select([*_INTENT, "intent_at"], ours)
        return insert.on_conflict_do_nothing().returning(effects.c.intent_at)

    @cached_property
    def _concluding(self) -> Any:
        return (
            update(effects)
            .where(
                effects.c.agent_id == bindparam("agent"),
                effects.c.effect_id == bindparam("effect"),
                effects.c.status == "intent",
                effects.c.attempt == bindparam("try"),
            )
            .values(status="done", source="own", outcome=bindparam("what"), done_at=self._now)
        )

    def _intend_again(
        self, connection: Connection, found: Effect, new: NewEffect, epoch: int
    ) -> None:
        connection.execute(
            update(effects)
            .where(effects.c.agent_id == new.agent_id, effects.c.effect_id == new.effect_id)
            .values(
                status="intent",
                epoch=epoch,
                attempt=found.attempt + 1,
                intent_at=self._now,
                peer_id=new.peer_id,
                if_unknown=new.if_unknown,
                has_check=int(new.has_check),
                run_id=plain_text(new.run_id),
                position=plain_text(new.position),
                source=None,
                unknown_at=None,
                unknown_to=None,
                retried=int(found.status == "intent"),
            )
        )

    def _up_to_date(self, connection: Connection, found: Effect, new: NewEffect) -> Effect:
        """Bring the terms of an effect in doubt up to date, and return it.

        Of one of the whole thread that includes the run that has come to it, and where, which asks
        about it from now on. What a human has said of one can be put right for as long as the
        workflow comes to it again: so there it counts, too.
        """
        now = replace(found, run_id=plain_text(new.run_id), position=plain_text(new.position))
        if found.status == "intent":
            now = replace(
                now,
                peer_id=found.peer_id or new.peer_id,
                if_unknown=new.if_unknown,
                has_check=new.has_check,
            )
        elif found.source != "human":
            return found
        if now == found:
            return found
        connection.execute(
            update(effects)
            .where(effects.c.agent_id == new.agent_id, effects.c.effect_id == new.effect_id)
            .values(
                run_id=now.run_id,
                position=now.position,
                peer_id=now.peer_id,
                if_unknown=now.if_unknown,
                has_check=int(now.has_check),
            )
        )
        return now

    def _settle(
        self, effect: Effect, values: dict[str, Any], *conditions: ColumnElement[bool]
    ) -> Effect:
        def work(connection: Connection) -> Effect:
            ends = {"done_at": self._now} if "status" in values else {}
            connection.execute(
                update(effects)
                .where(
                    effects.c.agent_id == effect.agent_id,
                    effects.c.effect_id == effect.effect_id,
                    effects.c.status == "intent",
                    effects.c.attempt == effect.attempt,
                    *conditions,
                )
                .values(**values, **ends)
            )
            found = self._effect(connection, effect)
            assert found is not None  # noqa: S101 - effects are never deleted
            return found

        return self._work(work, transaction=True)


_INTENT = (
    *("agent_id", "effect_id", "thread_id", "run_id", "position", "effect_key", "peer_id"),
    *("scope", "status", "epoch", "attempt", "if_unknown", "has_check"),
)
"""What is written of an intent, beside its time."""


def _row_of(new: NewEffect, epoch: int) -> dict[str, Any]:
    return {
        "agent_id": new.agent_id,
        "effect_id": new.effect_id,
        "thread_id": plain_text(new.thread_id),
        "run_id": plain_text(new.run_id),
        "position": plain_text(new.position),
        "effect_key": plain_text(new.name),
        "peer_id": new.peer_id,
        "scope": new.scope,
        "status": "intent",
        "epoch": epoch,
        "attempt": 1,
        "if_unknown": new.if_unknown,
        "has_check": int(new.has_check),
    }


def _begun(new: NewEffect, epoch: int, intent_at: int) -> Effect:
    return Effect(
        agent_id=new.agent_id,
        thread_id=new.thread_id,
        run_id=new.run_id,
        position=new.position,
        name=new.name,
        peer_id=new.peer_id,
        scope=new.scope,
        if_unknown=new.if_unknown,
        has_check=new.has_check,
        status="intent",
        epoch=epoch,
        attempt=1,
        intent_at=moment_at(intent_at),
    )


def _read(row: Row[Any]) -> Effect:
    return Effect(
        agent_id=row.agent_id,
        thread_id=row.thread_id,
        run_id=row.run_id,
        position=row.position,
        name=row.effect_key,
        peer_id=row.peer_id,
        scope=row.scope,
        if_unknown=row.if_unknown or "ask",
        has_check=bool(row.has_check),
        status=row.status,
        epoch=row.epoch,
        attempt=row.attempt,
        intent_at=moment_at(row.intent_at),
        outcome=None if row.outcome is None else from_json(row.outcome),
        done_at=None if row.done_at is None else moment_at(row.done_at),
        source=row.source,
        unknown_at=None if row.unknown_at is None else moment_at(row.unknown_at),
        unknown_to=row.unknown_to,
        is_retried=bool(row.retried),
    )


def _json(value: JsonValue) -> str | None:
    return None if value is None else to_json(value).decode()


def unsettled(found: Sequence[Effect]) -> list[Effect]:
    """Return of effects those that are in doubt."""
    return [effect for effect in found if effect.status == "intent"]
