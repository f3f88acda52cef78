"""Many peers' answers to one context: a pure function, the same whatever order they came in."""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import TypeAlias

from langgraph_peerctx.gathering.peer_context import Conflict, Fact
from langgraph_peerctx.protocol.messages import (
    ContextResponse,
    InDoubtAnswer,
    Interaction,
    Json,
)

_Teller: TypeAlias = tuple[str, str, str]
"""Agent, process that answered for it, and that process's incarnation."""
_Told: TypeAlias = dict[str, dict[_Teller, Interaction]]
"""Interaction id -> teller -> its version; tellers sorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What answers amount to together.

    Attributes:
        facts: In causal order, oldest first; each interaction once.
        memory: Agent id -> what it remembers.
        conflicts: By interaction id; the version of the agent that sorts first is the one kept.
        truncated: Agents whose answer was cut, here or at the peer.
        contested: Agents of whose memory, or of an effect, two processes tell differently; of the
            memory the first one's is kept.
        misfits: How many interactions were not the answering agent's own with the failed agent, in
            the thread that was asked about, and were left out.
    """

    facts: tuple[Fact, ...] = ()
    memory: Mapping[str, Json] = field(default_factory=dict)
    in_doubt: tuple[InDoubtAnswer, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    truncated: tuple[str, ...] = ()
    contested: tuple[str, ...] = ()
    misfits: int = 0


def merge(
    responses: Sequence[ContextResponse],
    *,
    failed_agent_id: str,
    thread_id: str,
    max_bytes: int | None = None,
) -> Merged:
    """Merge answers; the result does not depend on their order.

    Interactions are known by their id and told by every agent that has them. What one agent
    recorded stays in the order of its own sequence; between agents the time of occurrence decides.
    Where clocks and sequences contradict each other, the earliest goes first.

    Args:
        responses: At most one per responder and incarnation.
        failed_agent_id: Whom the question was about.
        thread_id: The thread that the question was about.
        max_bytes: The newest interactions that fit into so many bytes of JSON are kept; by default
            all are.
    """
    told: _Told = {}
    memory: dict[str, Json] = {}
    truncated: set[str] = set()
    contested: set[str] = set()
    misfits = 0
    by_responder = sorted(responses, key=_responder)
    answers = sorted(
        (((answer.agent_id, *_responder(r)), answer) for r in by_responder for answer in r.agents),
        key=itemgetter(0),
    )
    for teller, answer in answers:
        agent_id = answer.agent_id
        if answer.truncated:
            truncated.add(agent_id)
        if answer.memory_state and memory.setdefault(agent_id, answer.memory_state) != (
            answer.memory_state
        ):
            contested.add(agent_id)
        parties = {(agent_id, failed_agent_id), (failed_agent_id, agent_id)}
        for interaction in answer.interactions:
            if (
                interaction.thread_id != thread_id
                or (interaction.from_agent, interaction.to_agent) not in parties
            ):
                misfits += 1
            elif (versions := told.get(interaction.interaction_id)) is not None:
                versions.setdefault(teller, interaction)
            else:
                told[interaction.interaction_id] = {teller: interaction}
    words = [word for response in by_responder for word in response.in_doubt]
    settled = _settled(words)
    contested |= {word.agent_id for word in words if word not in settled}
    if max_bytes is not None:
        kept = _newest_within(told, max_bytes)
        truncated.update(agent for key in told.keys() - kept.keys() for agent, *_ in told[key])
        told = kept
    return Merged(
        facts=tuple(
            Fact(interaction=_first(told[key]), told_by=_agents(told[key]))
            for key in _causal_order(told)
        ),
        memory=memory,
        in_doubt=settled,
        conflicts=tuple(
            Conflict(interaction_id=key, versions=_named(told[key]))
            for key in sorted(key for key, versions in told.items() if len(versions) > 1)
            if _contradict(told[key].values())
        ),
        truncated=tuple(sorted(truncated)),
        contested=tuple(sorted(contested)),
        misfits=misfits,
    )


def _responder(response: ContextResponse) -> tuple[str, str]:
    return response.responder_id, response.incarnation or ""


def _first(versions: Mapping[_Teller, Interaction]) -> Interaction:
    """Return the version of the agent that sorts first."""
    return next(iter(versions.values()))


def _agents(tellers: Iterable[_Teller]) -> tuple[str, ...]:
    """Return the agents' names; tellers are sorted, and so are they."""
    return tuple(dict.fromkeys(agent_id for agent_id, *_ in tellers))


def _named(versions: Mapping[_Teller, Interaction]) -> dict[str, Interaction]:
    """Name each version after its agent, and its process where two answer for the agent."""
    answers = Counter(agent_id for agent_id, *_ in versions)
    named: dict[str, Interaction] = {}
    for (agent_id, process, incarnation), version in versions.items():
        name = agent_id if answers[agent_id] == 1 else f"{agent_id} on {process}"
        named[name if name not in named else f"{name}, {incarnation}"] = version
    return named


def _contradict(versions: Iterable[Interaction]) -> bool:
    """Tell whether versions differ in more than when and where each agent recorded them."""
    bodies = [v.model_copy(update={"sequence": None, "occurred_at": None}) for v in versions]
    return any(body != bodies[0] for body in bodies)


def _newest_within(told: _Told, max_bytes: int) -> _Told:
    kept: _Told = {}
    room = max_bytes
    when = _when(told)
    for key in sorted(told, key=when.__getitem__, reverse=True):
        room -= len(_first(told[key]).model_dump_json())
        if room < 0:
            break
        kept[key] = told[key]
    return kept


def _when(told: _Told) -> dict[str, tuple[float, str]]:
    """Return when each interaction happened, by its first version; the id decides a tie."""
    # As numbers: comparing moments of different time zone objects costs ten times as much.
    return {key: (_first(told[key]).occurred_at.timestamp(), key) for key in told}


def _causal_order(told: _Told) -> list[str]:
    """Sort by time of occurrence, but never against what one agent's sequence says."""
    when = _when(told)
    by_time = [key for _, key in sorted(when.values())]
    if _rises(told[key] for key in by_time):
        return by_time
    return _sorted_topologically(by_time, _recorded(told), when)


def _rises(versions: Iterable[Mapping[_Teller, Interaction]]) -> bool:
    """Tell whether each teller's own sequence rises in this order."""
    last: dict[_Teller, int] = {}
    for by_teller in versions:
        for teller, interaction in by_teller.items():
            sequence = interaction.sequence
            if sequence is None:
                continue
            if sequence < last.get(teller, 0):
                return False
            last[teller] = sequence
    return True


def _recorded(told: _Told) -> list[list[str]]:
    """Return, for each teller, the ids that it told of in the order in which it recorded them."""
    recorded: dict[_Teller, list[tuple[int, str]]] = {}
    for key, versions in told.items():
        for teller, interaction in versions.items():
            if interaction.sequence is not None:
                recorded.setdefault(teller, []).append((interaction.sequence, key))
    return [[key for _, key in sorted(rows)] for rows in recorded.values()]


def _sorted_topologically(
    by_time: Sequence[str],
    recorded: Iterable[Sequence[str]],
    when: Mapping[str, tuple[float, str]],
) -> list[str]:
    after: dict[str, list[str]] = {key: [] for key in by_time}
    waits = dict.fromkeys(by_time, 0)
    for keys in recorded:
        for earlier, later in pairwise(keys):
            after[earlier].append(later)
            waits[later] += 1
    ready = [when[key] for key in by_time if waits[key] == 0]
    earliest_first = iter(by_time)
    left = set(by_time)
    order: list[str] = []
    while left:
        # Nothing ready while something is left: sequences contradict each other.
        key = heapq.heappop(ready)[1] if ready else next(earliest_first)
        if key not in left:
            continue
        left.remove(key)
        order.append(key)
        for later in after[key]:
            waits[later] -= 1
            if waits[later] == 0:
                heapq.heappush(ready, when[later])
    return order


def _settled(answers: Iterable[InDoubtAnswer]) -> tuple[InDoubtAnswer, ...]:
    """Return each agent's word on each key once; a contradiction, in replies too, is no word."""
    words: dict[tuple[str, str], InDoubtAnswer] = {}
    for answer in answers:
        known = words.setdefault((answer.effect_key, answer.agent_id), answer)
        if (known.verdict, known.reply) != (answer.verdict, answer.reply):
            words[answer.effect_key, answer.agent_id] = known.model_copy(
                update={"verdict": "cannot_tell", "reply": None}
            )
    return tuple(words[key] for key in sorted(words))
