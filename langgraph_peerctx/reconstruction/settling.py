"""Effects in doubt: who is asked, what a human is asked, and what an answer means."""

import asyncio
import hashlib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any
from urllib.parse import unquote

from pydantic import JsonValue

from langgraph_peerctx.asking import Calls, EffectPeers
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.effects import Settled
from langgraph_peerctx.durability.ownership import Held, Ownership
from langgraph_peerctx.durability.run_effects import About, RunEffects
from langgraph_peerctx.errors import ConfigurationError, ProtocolError, StoreError
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.persistence.database import open_in_thread
from langgraph_peerctx.persistence.effect_ledger import Effect, EffectSource, unsettled
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.inspection import has_schema
from langgraph_peerctx.protocol.json_values import plain
from langgraph_peerctx.protocol.messages import InDoubtAnswer, InDoubtKey, Json
from langgraph_peerctx.reconstruction.approval import is_approved
from langgraph_peerctx.reconstruction.checkpoint import CheckpointView

_logger = logging.getLogger(__name__)

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
        after: The superstep that the checkpoint closes; None if the run begins anew.
        finished: Nodes of the next one that have finished all their tasks.
    """
    return [
        effect
        for effect in unsettled([*effects])
        if effect.if_unknown != "retry"
        and (not effect.has_check or effect.unknown_to == "check")
        and effect.run_id == run_id
        and (after is None or effect.superstep > after)
        and not (effect.superstep - 1 == after and _node_of(effect) in finished)
    ]


def _node_of(effect: Effect) -> str:
    return unquote(effect.position.partition("@")[0])


def why_unknown(effect: Effect, *, asked: bool) -> str:
    """Say why nobody could tell of an effect, in a sentence."""
    if effect.peer_id is None:
        return "It names no peer that could tell."
    if not asked:
        return "Peers were not asked."
    if effect.unknown_at is not None:
        return f"{effect.peer_id} cannot tell."
    return "It is silent."


def question_of(effect: Effect) -> str:
    """Put plainly what a human is asked."""
    if effect.peer_id is None:
        return f"Did {effect.name!r} happen?"
    return f"Did {effect.name!r} reach {effect.peer_id}?"


def question_id(*parts: object) -> str:
    """Return what binds an answer to the question that was asked: another one gets another."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def what_to_settle(
    effects: Sequence[Effect], *, asked: bool, consumed: Sequence[Json], unclear: object = None
) -> Json:
    """Return what a human is shown: each effect in doubt, and how to answer."""
    lines = [f"{question_of(e)} {why_unknown(e, asked=asked)}" for e in effects]
    said: Json = {} if unclear is None else {"not_understood": repr(unclear)[:200]}
    return {
        "question": " ".join(lines),
        "question_id": question_id("settle", *((e.key, e.attempt) for e in effects)),
        "how_to_answer": (
            'true if it happened, and its outcome is null; {"happened": true, "reply": ...} with '
            "its outcome; false if it did not happen, and will not any more. Of several, an object "
            "from name or key to that"
        ),
        "effects": [effect_json(effect) for effect in effects],
        "consumed": list(consumed),
        **said,
    }


def answers_in(
    answer: object, effects: Sequence[Effect], *, may_be_bare: bool
) -> list[tuple[Effect, Settled]]:
    """Read what a human says of effects: what is clear of it.

    Args:
        answer: `{key or name: true | false | {"happened": ..., "reply": ...}}`, or of a single
            effect the value alone.
        effects: Those in doubt.
        may_be_bare: Whether one alone was asked about.
    """
    found = []
    for effect in effects:
        said = _said_of(effect, answer, effects, may_be_bare=may_be_bare)
        settled = _settled(said)
        if settled is not None:
            found.append((effect, settled))
    return found


def see_that_it_is_understood(question: Mapping[str, Any] | None, answer: object) -> None:
    """Refuse an answer that no recovery could use.

    Args:
        question: As an incident keeps it.
        answer: What a human says.

    Raises:
        ConfigurationError: If it is no answer to the question; it says what would be.
    """
    if question is None:
        return
    effects = question.get("effects")
    if effects is None:
        if is_approved(answer) is None:
            raise ConfigurationError(f"{answer!r:.80} is no answer: {question.get('question')}")
        return
    said = answer if isinstance(answer, Mapping) and "happened" not in answer else None
    known = {effect[name] for effect in effects for name in ("key", "name")}
    if said is None:
        wrong = _settled(answer) is None or len(effects) > 1
    else:
        wrong = not said or any(k not in known or _settled(v) is None for k, v in said.items())
    if wrong:
        names = ", ".join(repr(effect["name"]) for effect in effects)
        raise ConfigurationError(
            f"{answer!r:.80} is no answer about {names}: {question.get('how_to_answer')}"
        )


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


def _said_of(
    effect: Effect, answer: object, effects: Sequence[Effect], *, may_be_bare: bool
) -> object:
    if isinstance(answer, Mapping) and "happened" not in answer:
        if effect.key in answer:
            return answer[effect.key]
        is_only_one = sum(other.name == effect.name for other in effects) == 1
        return answer.get(effect.name) if is_only_one else None
    return answer if may_be_bare else None


def _settled(said: object) -> Settled | None:
    reply: JsonValue = None
    if isinstance(said, Mapping):
        try:
            reply = plain(said.get("reply"), name="reply")
        except ProtocolError:
            return None
        said = said.get("happened")
    if isinstance(said, str):
        said = {"seen": True, "not_seen": False}.get(said.strip().lower(), said)
    happened = is_approved(said)
    if happened is None:
        return None
    return Settled.happened(reply) if happened else Settled.did_not_happen()
