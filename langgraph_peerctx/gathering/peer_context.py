"""What a gather brings home: facts with their sources, and how much of the truth they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from pydantic import JsonValue, TypeAdapter
from pydantic_core import to_json

from langgraph_peerctx.drawing import coverage_html, peer_context_html
from langgraph_peerctx.protocol.messages import InDoubtAnswer, InDoubtKey, Interaction, Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One interaction, and the agents that remember it: at least one, sorted, no repetition."""

    interaction: Interaction
    told_by: tuple[str, ...]

    def as_json(self) -> Json:
        """Return the fact as plain JSON, with its source and time, fit for a state channel."""
        body = self.interaction.model_dump(mode="json", exclude={"sequence"})
        return {"source": "peer", "told_by": list(self.told_by), **body}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """One interaction that peers remember differently; the first version told is the one kept.

    `versions` maps each agent to what it says; an agent that two processes answer for stands there
    once for each, as `agent on process`.
    """

    interaction_id: str
    versions: Mapping[str, Interaction]

    def as_json(self) -> Json:
        """Return the conflict as plain JSON."""
        versions: Json = {
            agent_id: version.model_dump(mode="json", exclude={"sequence"})
            for agent_id, version in self.versions.items()
        }
        return {"interaction_id": self.interaction_id, "versions": versions}


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Who was asked and what became of it.

    Names are the caller's where it said whom to expect (an agent or a process), else process ids.
    Each tuple is sorted. Every name in `asked` is in exactly one of `answered`, `silent`, `left`.
    `empty`, `declined` and `busy` are agents of those that answered; `extra` answered unasked.

    Attributes:
        roster_known: Whether `asked` is known to be everybody: the caller's list or a warm roster.
        late: How many answers came after the end, as far as it is known.
        duplicate: How many answers came twice.
        truncated: Agents whose answer was cut.
        contradicted: Processes that answered twice, and not the same; agents of whose memory, or
            of an effect, two processes tell differently.
        dropped: How many answers were not taken because of a limit.
    """

    asked: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    declined: tuple[str, ...] = ()
    busy: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()
    contradicted: tuple[str, ...] = ()
    late: int = 0
    duplicate: int = 0
    dropped: int = 0
    roster_known: bool = False
    degraded: bool = False

    @property
    def complete(self) -> bool:
        """Whether everybody who could know has said all that it knows; never by vacuity."""
        return (
            self.roster_known
            and len(self.asked) > 0
            and not (self.silent or self.left or self.busy or self.declined)
            and not (self.truncated or self.contradicted)
            and self.dropped == 0
            and not self.degraded
        )

    def as_json(self) -> Json:
        """Return the coverage as plain JSON, `complete` with it."""
        names: dict[str, JsonValue] = {
            name: list(getattr(self, name))
            for name in (
                *("asked", "answered", "empty", "declined", "busy"),
                *("silent", "left", "extra", "truncated", "contradicted"),
            )
        }
        counts: dict[str, JsonValue] = {
            name: getattr(self, name) for name in ("late", "duplicate", "dropped")
        }
        return {**names, **counts, "roster_known": self.roster_known, "complete": self.complete}

    def _repr_html_(self) -> str:
        return coverage_html(self.as_json())


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One answer that came.

    Attributes:
        agents: Each agent that its process answered for, and with what.
        at: When it was read, by our clock.
    """

    responder_id: str
    agents: Mapping[str, str]
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerContext:
    """What the peers remember of one agent in one thread.

    Attributes:
        facts: In causal order, oldest first; each interaction once.
        memory: Agent id -> what it remembers of the failed agent, beside the interactions.
        in_doubt: What the named peers said of each effect that was asked about.
        conflicts: Where peers contradict each other.
        coverage: How much of the truth this is.
        degraded: Why this is not the whole truth; empty when nothing was missing.
        elapsed_seconds: From the request's sending to the end, by the monotonic clock.
        answers: Who answered and when, in the order in which they came.
        unheard: Of each peer that was asked about effects, the processes that are known to host it
            and did not say what they know: they are silent, or gone, or decline.
    """

    correlation_id: str
    failed_agent_id: str
    thread_id: str
    gathered_at: datetime
    facts: tuple[Fact, ...] = ()
    memory: Mapping[str, Json] = field(default_factory=dict)
    in_doubt: tuple[InDoubtAnswer, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    coverage: Coverage = field(default_factory=Coverage)
    degraded: tuple[str, ...] = ()
    elapsed_seconds: float = 0.0
    answers: tuple[Answered, ...] = ()
    unheard: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def word_on(self, key: InDoubtKey) -> InDoubtAnswer | None:
        """Return what the named peer says of an effect in doubt; None if it says nothing.

        Where those who remember the effect contradict each other, nobody can tell. That it was not
        seen is the peer's word only if each process says so that hosts it.
        """
        found = [
            answer
            for answer in self.in_doubt
            if (answer.effect_key, answer.agent_id) == (key.effect_key, key.peer_id)
        ]
        if not found or (found[0].verdict == "not_seen" and self.unheard.get(key.peer_id)):
            return None
        disputed = any(
            version.effect_key == key.effect_key
            for conflict in self.conflicts
            for version in conflict.versions.values()
        )
        if not disputed:
            return found[0]
        return found[0].model_copy(update={"verdict": "cannot_tell", "reply": None})

    def as_channel(self) -> Json:
        """Return event id -> fact, plain JSON: what goes into a workflow's state.

        An agent's memory stands under `memory:<agent id>`.
        """
        gathered_at = self.gathered_at.isoformat()
        remembered: Json = {
            f"memory:{agent_id}": {
                "source": "peer",
                "told_by": [agent_id],
                "kind": "memory",
                "occurred_at": gathered_at,
                "payload": state,
            }
            for agent_id, state in self.memory.items()
            if state
        }
        told: Json = {fact.interaction.interaction_id: fact.as_json() for fact in self.facts}
        return told | remembered

    def as_report(self) -> Json:
        """Return what is to be known beside the facts, plain JSON: how much of the truth they are.

        `correlation_id`, `gathered_at`, `elapsed_seconds`, `facts` (how many), `coverage`,
        `degraded`, `conflicts` and `in_doubt`.
        """
        return {
            "correlation_id": self.correlation_id,
            "gathered_at": self.gathered_at.isoformat(),
            "elapsed_seconds": round(self.elapsed_seconds, 6),
            "facts": len(self.facts),
            "coverage": self.coverage.as_json(),
            "degraded": list[JsonValue](self.degraded),
            "conflicts": [conflict.as_json() for conflict in self.conflicts],
            "in_doubt": [answer.model_dump(mode="json") for answer in self.in_doubt],
        }

    def as_json(self) -> Json:
        """Return all of it as plain JSON, for `from_json`."""
        whole: Json = _ADAPTER.dump_python(self, mode="json")
        return whole

    def _repr_html_(self) -> str:
        return peer_context_html(
            [fact.as_json() for fact in self.facts],
            self.memory,
            self.as_report(),
            failed_agent_id=self.failed_agent_id,
            thread_id=self.thread_id,
        )

    @staticmethod
    def from_json(whole: Json) -> "PeerContext":
        """Return what `as_json` made plain.

        Raises:
            ValueError: If it is nothing of the kind.
        """
        return _ADAPTER.validate_json(to_json(whole))


_ADAPTER: Final[TypeAdapter[PeerContext]] = TypeAdapter(PeerContext)
