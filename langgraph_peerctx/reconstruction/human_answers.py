"""What a human is asked of effects in doubt, and what an answer means; pure."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from langgraph_peerctx.durability.effects import Settled
from langgraph_peerctx.errors import ConfigurationError, ProtocolError
from langgraph_peerctx.persistence.effect_ledger import Effect
from langgraph_peerctx.persistence.incidents import Incident
from langgraph_peerctx.protocol.json_values import plain
from langgraph_peerctx.protocol.messages import Json
from langgraph_peerctx.reconstruction.approval import is_approved
from langgraph_peerctx.reconstruction.settling import effect_json

_HOW_TO_ANSWER = (
    'true if it happened, and its outcome is null; {"happened": true, "reply": ...}, and no other '
    "field, with its outcome; false if it did not happen, and will not any more. Of several, an "
    "object from name or key to that"
)
_TOLD: dict[str | None, str] = {"own": "the run itself", "peer": "its peer", "check": "its check"}
MOST_SHOWN = 10
"""So many effects are named to whoever has given an answer that is none."""


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
