"""Effects in doubt: which they are, who is asked, and what becomes of an answer."""

import asyncio
import logging
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from urllib.parse import unquote

from langgraph_peerctx.asking import Calls, EffectPeers
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.effects import Settled
from langgraph_peerctx.durability.ownership import Held, Ownership
from langgraph_peerctx.durability.run_effects import About, RunEffects
from langgraph_peerctx.errors import StoreError
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.persistence.database import open_in_thread
from langgraph_peerctx.persistence.effect_ledger import Effect, EffectSource, unsettled
from langgraph_peerctx.persistence.incidents import ControlDatabase, Incident
from langgraph_peerctx.persistence.inspection import has_schema
from langgraph_peerctx.protocol.messages import InDoubtAnswer, InDoubtKey, Json
from langgraph_peerctx.reconstruction.checkpoint import CheckpointView

_logger = logging.getLogger(__name__)

_PLACE = re.compile(r"(?P<node>[^@]*)@-?\d+(?P<index>(\[\d+\])?)")
"""Of a position, what stands in the graph itself; see `positions`."""
ASKED_AT_ONCE = 16
MOST_KEYS = 1_000
"""So many keys go into one request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedThread:
    """A thread that we have taken over: its effects are settled, and done, under our lease.

    Attributes:
        held: Our lease; claimed anew at each attempt, never read from a checkpoint.
        calls: How the peers are asked; None if they are not to be.
    """

    ownership: Ownership
    held: Held
    calls: Calls | None

    @property
    def epoch(self) -> int:
        """Under which we write."""
        return self.held.epoch

    def effects_of(
        self,
        run_id: str,
        *,
        input_digest: str | None = None,
        doubted_since: datetime | None = None,
    ) -> RunEffects:
        """Return what a run of the thread needs for its effects."""
        return RunEffects(
            self.ownership.control,
            replace(self._about(run_id), input_digest=input_digest),
            incarnation=self.ownership.owner.incarnation,
            peers=self._peers,
            doubted_since=doubted_since,
        )

    async def known(self, run_id: str | None) -> list[Effect]:
        """Return a run's effects, in the order they were meant.

        Raises:
            StoreError: If the control database failed.
        """
        if run_id is None:
            return []
        control = self.ownership.control
        read = partial(control.effects_of, self.held.agent_id, self.held.thread_id, run_id)
        return await control.in_thread(read)

    async def settle(
        self, effect: Effect, told: InDoubtAnswer | Settled, source: EffectSource
    ) -> Effect:
        """Write down what somebody says of an effect; return it as it is known now.

        Raises:
            StoreError: If the control database failed.
        """
        control = self.ownership.control
        write = partial(control.settle_effect, effect, told.verdict, source, told.reply)
        settled = await control.in_thread(write)
        _logger.info(
            "effect %r: %s, says %s",
            effect.name[:80],
            told.verdict,
            effect.peer_id if source == "peer" else source,
            extra={"thread_id": effect.thread_id, "effect_key": effect.key},
        )
        return settled

    async def amend(self, effect: Effect, said: Settled) -> None:
        """Put right what a human has said before of an effect.

        Raises:
            StoreError: If the control database failed.
        """
        control = self.ownership.control
        await control.in_thread(partial(control.amend, effect, said.verdict, said.reply))

    async def incident(self, incident_id: str) -> Incident | None:
        """Return an incident, with what it asks and what was answered.

        Raises:
            StoreError: If the control database failed.
        """
        control = self.ownership.control
        return await control.in_thread(partial(control.incident, incident_id))

    async def ask_again(self, doubtful: Iterable[Effect], run_id: str) -> None:
        """Ask the peers of effects in doubt once more, and write down what they say.

        Raises:
            StoreError: If the control database failed.
        """
        if self._peers is None:
            return
        about, peers = self._about(run_id), self._peers

        async def ask(effect: Effect, key: InDoubtKey) -> None:
            told = await peers.aask(about, key)
            if told is not None:
                await self.settle(effect, told, "peer")

        asked = [(effect, effect.in_doubt_key) for effect in doubtful]
        asking = [ask(effect, key) for effect, key in asked if key is not None]
        for start in range(0, len(asking), ASKED_AT_ONCE):
            await asyncio.gather(*asking[start : start + ASKED_AT_ONCE])

    @property
    def _peers(self) -> EffectPeers | None:
        return None if self.calls is None else EffectPeers(self.calls)

    def _about(self, run_id: str) -> About:
        return About(
            agent_id=self.held.agent_id,
            thread_id=self.held.thread_id,
            run_id=run_id,
            epoch=self.held.epoch,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownEffects:
    """The effects of a thread's newest run, for looking at.

    Attributes:
        shortfalls: Why they are not known.
    """

    run_id: str = ""
    effects: tuple[Effect, ...] = ()
    shortfalls: tuple[str, ...] = ()

    def doubts(self, view: CheckpointView | None, peers: PeerContext | None) -> list[Effect]:
        """Return those in doubt that a peer has not told of either."""
        told = {e.key for e, word in words_on(self.effects, peers) if word.verdict != "cannot_tell"}
        after = view.step if view is not None and view.run_id == self.run_id else None
        found = doubtful(self.effects, run_id=self.run_id, after=after)
        return [effect for effect in found if effect.key not in told]


async def known_effects(
    settings: PeerContextSettings, agent_id: str, thread_id: str
) -> KnownEffects:
    """Read what the control database knows of a thread's newest run; none is made by looking.

    A broken one costs only that.
    """

    def look() -> KnownEffects:
        seconds = settings.database_timeout_seconds
        if not has_schema(settings.control_url, timeout_seconds=seconds):
            return KnownEffects()
        with ControlDatabase(settings.control_url, timeout_seconds=seconds) as control:
            run = control.newest_run(agent_id, thread_id)
            if run is None:
                return KnownEffects()
            effects = control.effects_of(agent_id, thread_id, run.run_id)
            return KnownEffects(run_id=run.run_id, effects=tuple(effects))

    try:
        return await open_in_thread(look)
    except StoreError as error:
        return KnownEffects(shortfalls=(f"no_ledger: {error}",))


def keys_of(effects: Iterable[Effect]) -> list[InDoubtKey]:
    """Return what peers are asked about: each effect in doubt that names one."""
    keys = (effect.in_doubt_key for effect in unsettled([*effects]))
    return [key for key in keys if key is not None][:MOST_KEYS]


def words_on(
    effects: Iterable[Effect], peers: PeerContext | None
) -> list[tuple[Effect, InDoubtAnswer]]:
    """Return what the named peers say of each effect in doubt."""
    if peers is None:
        return []
    found = [(e, peers.word_on(key)) for e in unsettled([*effects]) if (key := e.in_doubt_key)]
    return [(effect, word) for effect, word in found if word is not None]


def doubtful(
    effects: Iterable[Effect],
    *,
    run_id: str,
    after: int | None,
    finished: Collection[str] = (),
) -> list[Effect]:
    """Return the effects that a human must be asked about before the workflow goes on.

    Not those that are done again whatever became of them; nor those at which the workflow can look
    itself, until it has looked in vain; nor those that it has left behind with their doubt, and
    never comes to again.

    Args:
        effects: A run's, and those of its thread: of another run's the workflow asks if it comes
            to them.
        run_id: The run.
        after: As in `is_ahead`.
        finished: As in `is_ahead`.
    """
    return [
        effect
        for effect in unsettled([*effects])
        if effect.if_unknown != "retry"
        and (not effect.has_check or effect.unknown_to == "check")
        and effect.run_id == run_id
        and is_ahead(effect, run_id=run_id, after=after, finished=finished)
    ]


def is_ahead(
    effect: Effect, *, run_id: str, after: int | None, finished: Collection[str] = ()
) -> bool:
    """Tell whether the workflow may come to an effect, once more or for the first time.

    To one of its thread that another run has written it may: nobody knows.

    Args:
        effect: A run's, or of its thread.
        run_id: The run.
        after: The superstep that the checkpoint closes; None if the run begins anew.
        finished: What has finished in the next one: nodes with all their tasks, and `Send`s of
            them, as `node[index]`.
    """
    if effect.run_id != run_id or after is None:
        return True
    if effect.superstep - 1 == after:
        return finished_as(effect).isdisjoint(finished)
    return effect.superstep > after


def finished_as(effect: Effect) -> set[str]:
    """Return what is finished if an effect's task is: its node, or its `Send`."""
    found = _PLACE.match(effect.position)
    if found is None:
        return set()
    node = unquote(found["node"])
    return {node, node + found["index"]}


def effect_json(effect: Effect) -> Json:
    """Return an effect as it is shown, plain JSON; its outcome is not told."""
    return {
        "key": effect.key,
        "name": effect.name,
        "peer": effect.peer_id,
        "position": effect.position,
        "status": effect.status if effect.status != "intent" else "in_doubt",
        "source": effect.source,
        "attempt": effect.attempt,
        "intent_at": effect.intent_at.isoformat(),
        "done_at": None if effect.done_at is None else effect.done_at.isoformat(),
    }
