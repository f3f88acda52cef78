"""A runtime whose peers are a list."""

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import BrokerUnavailableError
from langgraph_peerctx.gathering.gatherer import OnAnswer, Wanted
from langgraph_peerctx.gathering.peer_context import Coverage, Fact, PeerContext
from langgraph_peerctx.gathering.steps import Asked
from langgraph_peerctx.protocol.messages import ContextRequest, Interaction

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)


def interaction(
    interaction_id: str = "order-1", *, payload: dict[str, Any] | None = None
) -> Interaction:
    return Interaction(
        interaction_id=interaction_id,
        thread_id="thread-1",
        from_agent="product-agent",
        to_agent="inventory-agent",
        kind="order",
        payload={"sku": "A1"} if payload is None else payload,
        occurred_at=NOW,
    )


def context(*interactions: Interaction, **values: Any) -> PeerContext:
    """Return what the inventory agent would have told."""
    facts = tuple(Fact(interaction=item, told_by=("inventory-agent",)) for item in interactions)
    return PeerContext(
        **{
            "correlation_id": "c1",
            "failed_agent_id": "product-agent",
            "thread_id": "thread-1",
            "gathered_at": NOW + timedelta(seconds=1),
            "facts": facts,
            "coverage": Coverage(asked=("host-1",), answered=("host-1",)),
            **values,
        }
    )


@dataclass
class FakeStore:
    events: list[Interaction] = field(default_factory=list)
    error: Exception | None = None
    since: list[float] = field(default_factory=list)
    """How many seconds back each question went."""

    async def ainteractions_of(
        self, agent_id: str, *, since: datetime | None = None, **_: Any
    ) -> list[Interaction]:
        if self.error:
            raise self.error
        if since:
            self.since.append((datetime.now(UTC) - since).total_seconds())
        return [event for event in self.events if event.from_agent == agent_id]


@dataclass
class FakeRuntime:
    """Answers every gather with `answer`, or raises `error`; remembers what it was asked."""

    answer: PeerContext = field(default_factory=lambda: context(interaction()))
    error: Exception | None = None
    store: FakeStore = field(default_factory=FakeStore)
    settings: PeerContextSettings = field(default_factory=PeerContextSettings)
    questions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> "FakeRuntime":
        return self

    def request(self, **question: Any) -> ContextRequest:
        self.questions.append(question)
        values = {**question, "time_window_seconds": question["time_window_seconds"] or 3_600.0}
        return ContextRequest(
            sent_at=NOW, correlation_id="c1", requester_id="reconstructor", **values
        )

    async def position(self, _request: ContextRequest) -> dict[tuple[str, int], int]:
        return {("agent.context.response.reconstructor", 0): 7}

    async def ask(
        self,
        _request: ContextRequest,
        _since: Any,
        expect: Collection[str] = (),
        *,
        timeout_seconds: float | None = None,
    ) -> Asked:
        self.questions[-1] |= {"expect": tuple(expect), "timeout_seconds": timeout_seconds}
        if isinstance(self.error, BrokerUnavailableError):
            raise self.error
        return Asked(at=NOW)

    async def collect(
        self,
        _request: ContextRequest,
        _since: Any,
        _asked: Asked,
        wanted: Wanted,
        *,
        timeout_seconds: float | None = None,
    ) -> PeerContext:
        self.questions[-1] |= {
            "min_responses": wanted.min_responses,
            "timeout_seconds": timeout_seconds,
        }
        if self.error:
            raise self.error
        return self.answer

    async def gather(self, *, on_answer: OnAnswer | None = None, **question: Any) -> PeerContext:
        self.questions.append({"on_answer": on_answer, **question})
        if self.error:
            raise self.error
        return self.answer
