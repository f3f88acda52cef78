"""Effects in doubt: who is asked, what a human is asked, and what an answer means."""

import asyncio
import hashlib
import logging
import re
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
from langgraph_peerctx.persistence.incidents import ControlDatabase, Incident
from langgraph_peerctx.persistence.inspection import has_schema
from langgraph_peerctx.protocol.json_values import plain
from langgraph_peerctx.protocol.messages import InDoubtAnswer, InDoubtKey, Json
from langgraph_peerctx.reconstruction.approval import is_approved
from langgraph_peerctx.reconstruction.checkpoint import CheckpointView

_logger = logging.getLogger(__name__)

_PLACE = re.compile(r"(?P<node>[^@]*)@-?\d+(?P<index>(\[\d+\])?)")
"""Of a position, what stands in the graph itself; see `positions`."""
_HOW_TO_ANSWER = (
    'true if it happened, and its outcome is null; {"happened": true, "reply": ...}, and no other '
    "field, with its outcome; false if it did not happen, and will not any more. Of several, an "
    "object from name or key to that"
)
_TOLD: dict[str | None, str] = {"own": "the run itself", "peer": "its peer", "check": "its check"}
ASKED_AT_ONCE = 16
MOST_SHOWN = 10
"""So many effects are named to whoever has given an answer that is none."""
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


def why_unknown(effect: Effect, *, asked: bool) -> str:
    """Say why nobody could tell of an effect, in a sentence."""
    if effect.peer_id is None:
        return "It names no peer that could tell."
    if not asked:
        return "Peers were not asked."
    if effect.unknown_at is not None:
        return f"{effect.peer_id} cannot tell."
    return "It is silent."


def question_of(effect: Effect, among: Iterable[Effect]) -> str:
    """Put plainly what a human is asked; where others have its name, of which."""
    called = _called(effect, among)
    if effect.peer_id is None:
        return f"Did {called} happen?"
    return f"Did {called} reach {effect.peer_id}?"


def _called(effect: Effect, among: Iterable[Effect]) -> str:
    if named(among).get(effect.name) is not None:
        return repr(effect.name)
    return f"{effect.name!r} ({effect.key}, at {effect.position})"


def lines_on(effects: Iterable[Effect], among: Sequence[Effect], *, asked: bool) -> list[str]:
    """Say of each effect in doubt what a human is asked, and why nobody could tell."""
    return [f"{question_of(e, among)} {why_unknown(e, asked=asked)}" for e in effects]


def named(effects: Iterable[Effect]) -> dict[str, str | None]:
    """Return how an answer may call effects: by their keys, or by a name that no other has.

    Args:
        effects: All of the run: one that is settled has its name too.

    Returns:
        From name or key to key; None for the name of several.
    """
    return _named((effect.name, effect.key) for effect in effects)


def _named(effects: Iterable[tuple[str, str]]) -> dict[str, str | None]:
    names: dict[str, str | None] = {}
    keys: dict[str, str | None] = {}
    for name, key in effects:
        names[name] = None if name in names else key
        keys[key] = key
    return names | keys


def question_id(*parts: object) -> str:
    """Return what binds an answer to the question that was asked: another one gets another."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def what_to_settle(
    effects: Sequence[Effect],
    *,
    among: Sequence[Effect],
    asked: bool,
    consumed: Sequence[Json] = (),
    too_late: Sequence[str] = (),
    unclear: object = None,
) -> Json:
    """Return what a human is shown: each effect in doubt, and how to answer.

    Args:
        effects: Those in doubt.
        among: All of the run.
        asked: Whether peers were.
        consumed: What peers have taken from the agent after its checkpoint.
        too_late: What was said before and cannot count any more.
        unclear: What was said before and is no answer.
    """
    said: Json = {} if unclear is None else {"not_understood": repr(unclear)[:200]}
    before = [*too_late, *(f"{text} is no answer." for text in said.values())]
    names = named(among)
    in_doubt = {e.name: names.get(e.name) for e in effects}
    return {
        "question": " ".join([*before, *lines_on(effects, among, asked=asked)]),
        "question_id": question_id("settle", *((e.key, e.attempt) for e in effects)),
        "how_to_answer": _how_to_answer(in_doubt),
        "effects": [
            {**effect_json(e), "answer_with": e.name if in_doubt[e.name] else e.key}
            for e in effects
        ],
        "consumed": list(consumed),
        **said,
    }


def _how_to_answer(names: Mapping[str, str | None]) -> str:
    shared = ", ".join(repr(name) for name, key in names.items() if key is None)
    return _HOW_TO_ANSWER + (f"; {shared} names several: of these, the full key" if shared else "")


def read_answer(
    answer: object, names: Mapping[str, str | None], *, may_be_bare: bool
) -> dict[str, Settled]:
    """Read what a human says of effects, wherever it comes from.

    Args:
        answer: `{key or name: true | false | {"happened": ..., "reply": ...}}`.
        names: How the effects may be called; see `named`.
        may_be_bare: Whether, of a single effect, it may be the value alone.

    Returns:
        From key to what is said.

    Raises:
        ConfigurationError: If any of it is no answer; it says what would be.
    """
    handles = _handles(names)
    if isinstance(answer, Mapping) and answer and "happened" not in answer:
        said = answer
    elif may_be_bare and len(handles) == 1:
        said = dict.fromkeys(handles, answer)
    else:
        raise _no_answer("it does not say of which effect", answer, names)
    found: dict[str, Settled] = {}
    for name, word in said.items():
        key, settled = names.get(name), _settled(word)
        if key is None or settled is None or key in found:
            raise _no_answer(_why_not(name, word, names), answer, names)
        found[key] = settled
    return found


def _handles(names: Mapping[str, str | None]) -> dict[str, str]:
    """Return what to call each effect, by its key: its name, if no other has it."""
    found: dict[str, str] = {}
    for name, key in names.items():
        if key is not None:
            found.setdefault(key, name)
    return found


def _why_not(name: object, word: object, names: Mapping[Any, str | None]) -> str:
    if name not in names:
        return f"{name!r:.80} is none of them"
    if names[name] is None:
        return f"{name!r:.80} is the name of several"
    if _settled(word) is None:
        return f"{word!r:.80} does not say whether it happened, and with which reply"
    return f"{name!r:.80} is said twice"


def _no_answer(why: str, answer: object, names: Mapping[str, str | None]) -> ConfigurationError:
    handles = [repr(name) for name in _handles(names).values()]
    more = [f"{len(handles) - MOST_SHOWN} more"] if len(handles) > MOST_SHOWN else []
    about = ", ".join(handles[:MOST_SHOWN] + more) or "anything: no effect is known"
    return ConfigurationError(
        f"{why}: {answer!r:.80} is no answer about {about}: {_how_to_answer(names)}"
    )


def answer_of(
    incident: Incident | None, open_ones: Sequence[Effect], among: Sequence[Effect]
) -> dict[str, Settled]:
    """Return what a human has answered to an incident's question, of what is in doubt still.

    An answer counts for the question that stands beside it, or that would be asked now if none
    does, and of that for the attempts that were asked about.

    Raises:
        ConfigurationError: If it is no answer to the question.
    """
    if incident is None or incident.answer is None:
        return {}
    given: Mapping[str, Any] = incident.answer
    now = what_to_settle(open_ones, among=among, asked=False)
    questions: list[Mapping[str, Any]] = [incident.question or now, now]
    for question in questions:
        if is_about_effects(question) and question["question_id"] == given["question_id"]:
            said = read_answer(given["value"], _named_in(question), may_be_bare=True)
            asked = {effect["key"]: effect["attempt"] for effect in question["effects"]}
            still = {e.key for e in open_ones if asked.get(e.key) == e.attempt}
            return {key: settled for key, settled in said.items() if key in still}
    return {}


def is_said(effect: Effect, said: Settled) -> bool:
    """Tell whether what somebody says of an effect is what is known of it."""
    if said.verdict == "seen":
        return effect.status == "done" and effect.outcome == said.reply
    return effect.status == "not_done"


def too_late(effect: Effect, *, is_ahead: bool) -> str | None:
    """Say why what a human says of an effect cannot count any more; None if it can."""
    if not is_ahead:
        why = "the workflow is past it and does not come to it again, so see to it by hand"
    elif effect.source not in (None, "human"):
        why = f"{_TOLD[effect.source]} has told what became of it"
    else:
        return None
    return f"too_late: what was said of {effect.name!r} ({effect.key}) is not used: {why}."


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
    if is_about_effects(question):
        read_answer(answer, _named_in(question), may_be_bare=True)
    elif is_approved(answer) is None:
        raise ConfigurationError(f"{answer!r:.80} is no answer: {question.get('question')}")


def is_about_effects(question: Mapping[str, Any]) -> bool:
    """Tell whether effects in doubt are asked about; to approve a resume, some are shown, too."""
    return "how_to_answer" in question


def _named_in(question: Mapping[str, Any]) -> dict[str, str | None]:
    """Return how an answer may call the effects of a question that was asked."""
    effects = question["effects"]
    names = _named((effect["name"], effect["key"]) for effect in effects)
    shared = {e["name"] for e in effects if e.get("answer_with", e["name"]) != e["name"]}
    return names | dict.fromkeys(shared)


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


def _settled(said: object) -> Settled | None:
    """Read one word on one effect; None if it is none, or says what cannot be kept."""
    reply: JsonValue = None
    has_reply = isinstance(said, Mapping) and "reply" in said
    if isinstance(said, Mapping):
        if not {"happened"} <= said.keys() <= {"happened", "reply"}:
            return None
        try:
            reply = plain(said.get("reply"), name="reply")
        except ProtocolError:
            return None
        said = said["happened"]
    if isinstance(said, str):
        said = {"seen": True, "not_seen": False}.get(said.strip().lower(), said)
    happened = None if isinstance(said, Mapping) else is_approved(said)
    if happened is None or (has_reply and not happened):
        return None
    return Settled.happened(reply) if happened else Settled.did_not_happen()
