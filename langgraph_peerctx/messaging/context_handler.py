"""What one agent remembers of another, out of its own event store."""

import logging
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from langgraph_peerctx.errors import ConfigurationError, ProtocolError, StoreError
from langgraph_peerctx.identifiers import check_id
from langgraph_peerctx.messaging.producer import as_protocol_error
from langgraph_peerctx.persistence.event_store import EventStore, get_event_store
from langgraph_peerctx.protocol.json_values import plain_object
from langgraph_peerctx.protocol.messages import (
    AgentAnswer,
    AgentStatus,
    ContextRequest,
    InDoubtAnswer,
    InDoubtKey,
    Interaction,
    Json,
)

_logger = logging.getLogger(__name__)

MayAnswer = Callable[[ContextRequest], bool]
Redact = Callable[[Json], Json]
_REQUEST = TypeAdapter(ContextRequest)

REPLIES_LIMIT_BYTES = 131_072
"""Of all replies to in-doubt keys in one answer: they are never cut, and the answer must be sent.
What does not fit is not told, and counts as not settled."""


class ContextRequestHandler:
    """Answers for one agent. It tells only what passed between that agent and the failed one.

    Args:
        agent_id: Whose memory this is.
        store: Its event store, borrowed; by default the environment's.
        may_answer: Says whether a request may be answered at all; by default every valid one.
        memory_keys: Which keys of a remembered state may be told; by default all that the agent
            chose to remember.
        redact: Applied to each payload and memory before it is told. Not to the reply in an answer
            to an effect in doubt: it is what this agent replied to that very effect, or would have,
            and becomes its outcome.
        max_interactions: The most that one answer holds, whatever the request allows.

    Raises:
        ProtocolError: If `agent_id` is no legal id.
    """

    def __init__(
        self,
        agent_id: str,
        *,
        store: EventStore | None = None,
        may_answer: MayAnswer | None = None,
        memory_keys: Collection[str] | None = None,
        redact: Redact | None = None,
        max_interactions: int = 200,
    ) -> None:
        self.agent_id: str = check_id(agent_id, "agent_id")
        self._store = store
        self._may_answer = may_answer
        self._memory_keys = None if memory_keys is None else frozenset(memory_keys)
        self._redact = redact
        self._max_interactions = max_interactions

    @property
    def store(self) -> EventStore:
        """The event store that is asked."""
        if self._store is None:
            self._store = get_event_store()
        return self._store

    def query_interactions_with_agent(
        self, target_agent_id: str, thread_id: str, time_window_seconds: float
    ) -> list[dict[str, Any]]:
        """Return what passed between this agent and another in one thread, newest first.

        It blocks while the database works; `handle_context_request` does not.

        Args:
            target_agent_id: The other agent.
            thread_id: The thread.
            time_window_seconds: How far back, in seconds.

        Returns:
            Interactions as plain JSON.

        Raises:
            StoreError: If the store cannot be read.
        """
        found = self._interactions(target_agent_id, thread_id, time_window_seconds)
        return [interaction.model_dump(mode="json") for interaction in found]

    def get_memory_state_for_agent(self, target_agent_id: str) -> dict[str, Any]:
        """Return what this agent chose to remember of another, as plain JSON; often empty.

        Raises:
            StoreError: If the store cannot be read.
        """
        state = self.store.memory_of(self.agent_id, target_agent_id)
        if self._memory_keys is not None:
            state = {key: value for key, value in state.items() if key in self._memory_keys}
        return self._redacted(state) if state else state

    async def handle_context_request(
        self, message: ContextRequest | Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return this agent's answer to a request, as plain JSON; nothing is sent.

        Args:
            message: A request, or its JSON as a consumer's handler gets it.

        Returns:
            `responder_id`, `failed_agent_id`, `thread_id`, and the fields of an `AgentAnswer`:
            `status`, `interactions`, `memory_state`, ...; and `in_doubt`.

        Raises:
            ProtocolError: If the message is no valid request.
        """
        request = message if isinstance(message, ContextRequest) else _request(message)
        answer, in_doubt = await self.store.in_thread(lambda: self.answer(request))
        return {
            "responder_id": self.agent_id,
            "failed_agent_id": request.failed_agent_id,
            "thread_id": request.thread_id,
            **answer.model_dump(mode="json"),
            "in_doubt": [settled.model_dump(mode="json") for settled in in_doubt],
        }

    def answer(self, request: ContextRequest) -> tuple[AgentAnswer, tuple[InDoubtAnswer, ...]]:
        """Answer a request in the calling thread, which blocks while the database works.

        A store that fails makes the answer `busy`, with the reason; a `may_answer` or `redact` that
        fails makes it `declined`: rather nothing is told than what should be hidden. In-doubt keys
        that name this agent are answered whatever window and limits say. Who declines settles none:
        of them it has not been heard.
        """
        try:
            if not self._allowed(request):
                reason = "this agent does not answer this requester"
                return AgentAnswer(agent_id=self.agent_id, status="declined", reason=reason), ()
            return self._told(request), self._settled(request)
        except ConfigurationError as error:
            _logger.error("%s does not answer: %s", self.agent_id, error)  # noqa: TRY400 - a traceback may show what is to be hidden
            reason = "what decides over this agent's answers failed"
            return AgentAnswer(agent_id=self.agent_id, status="declined", reason=reason), ()
        except StoreError as error:
            _logger.warning("the event store of %s cannot be asked: %s", self.agent_id, error)
            return self.busy(request, error)

    def busy(
        self, request: ContextRequest, error: Exception
    ) -> tuple[AgentAnswer, tuple[InDoubtAnswer, ...]]:
        """Return the answer of an agent that cannot look into its memory now."""
        reason = f"the event store cannot be asked ({type(error).__name__})"
        busy = AgentAnswer(agent_id=self.agent_id, status="busy", reason=reason)
        return busy, self._cannot_tell(request)

    def _told(self, request: ContextRequest) -> AgentAnswer:
        limit = min(request.max_interactions, self._max_interactions)
        found = self._interactions(
            request.failed_agent_id, request.thread_id, request.time_window_seconds, limit + 1
        )
        memory = self.get_memory_state_for_agent(request.failed_agent_id)
        status: AgentStatus = "context" if found or memory else "nothing"
        # Everything in it was validated when it came into the store.
        return AgentAnswer.model_construct(
            agent_id=self.agent_id,
            status=status,
            interactions=tuple(found[:limit]),
            memory_state=memory,
            truncated=len(found) > limit,
            reason=None,
        )

    def _interactions(
        self, target_agent_id: str, thread_id: str, window_seconds: float, limit: int | None = None
    ) -> list[Interaction]:
        found = self.store.interactions_with(
            self.agent_id,
            target_agent_id,
            thread_id=thread_id,
            since=datetime.now(UTC) - timedelta(seconds=window_seconds),
            limit=limit or self._max_interactions,
        )
        if self._redact is None:
            return found
        return [i.model_copy(update={"payload": self._redacted(i.payload)}) for i in found]

    def _allowed(self, request: ContextRequest) -> bool:
        if self._may_answer is None:
            return True
        try:
            return self._may_answer(request)
        except Exception as error:
            raise ConfigurationError(f"its may_answer raised {type(error).__name__}") from error

    def _redacted(self, payload: Json) -> Json:
        if self._redact is None:
            return payload
        try:
            return plain_object(self._redact(payload))
        except Exception as error:
            raise ConfigurationError(f"its redact raised {type(error).__name__}") from error

    def _settled(self, request: ContextRequest) -> tuple[InDoubtAnswer, ...]:
        """Say of each key that names this agent whether it arrived.

        `not_seen` only from an agent with a `Receiver`: without one, a key that is not recorded
        may still be on its way.
        """
        keys = [key for key in request.in_doubt if key.peer_id == self.agent_id]
        settled: list[InDoubtAnswer] = []
        room = REPLIES_LIMIT_BYTES
        try:
            for key in keys:
                answer = self._settle(request, key)
                size = 0 if answer.reply is None else len(to_json(answer.reply))
                fits = size <= room
                room -= size if fits else 0
                settled.append(answer if fits else self._unknown(key))
        except StoreError as error:
            # The next key would wait as long, and the asker waits for all of them.
            _logger.warning("%s cannot settle what is in doubt: %s", self.agent_id, error)
        return (*settled, *map(self._unknown, keys[len(settled) :]))

    def _settle(self, request: ContextRequest, key: InDoubtKey) -> InDoubtAnswer:
        verdict, reply = self.store.settle_key(
            self.agent_id,
            request.failed_agent_id,
            request.thread_id,
            key.effect_key,
            intent_at=_by_our_clock(key.intent_at, request),
            epoch=request.epoch,
        )
        return InDoubtAnswer(
            effect_key=key.effect_key,
            agent_id=self.agent_id,
            verdict=verdict,
            reply=reply,
        )

    def _cannot_tell(self, request: ContextRequest) -> tuple[InDoubtAnswer, ...]:
        return tuple(self._unknown(k) for k in request.in_doubt if k.peer_id == self.agent_id)

    def _unknown(self, key: InDoubtKey) -> InDoubtAnswer:
        return InDoubtAnswer(
            effect_key=key.effect_key, agent_id=self.agent_id, verdict="cannot_tell"
        )


def _by_our_clock(moment: datetime, request: ContextRequest) -> datetime:
    """Return a moment of the asker's clock by ours, where ours is behind: what it sent has come.

    A store that looks older than it is would deny what came before it was made.
    """
    behind = max(timedelta(), request.sent_at - datetime.now(UTC))
    try:
        return moment - behind
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)


def _request(message: Mapping[str, Any]) -> ContextRequest:
    try:
        return _REQUEST.validate_python(dict(message), strict=False)
    except ValidationError as error:
        raise as_protocol_error(error) from None
    except TypeError as error:
        raise ProtocolError("not_an_object", f"no request: {error}") from None
