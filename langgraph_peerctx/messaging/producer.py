"""Publishing messages: what is sent says what it is in its headers, so that readers can skip it."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError, ProtocolError
from langgraph_peerctx.identifiers import is_legal_id, new_id
from langgraph_peerctx.messaging.mock_transport import create_transport
from langgraph_peerctx.messaging.topics import topics_for
from langgraph_peerctx.messaging.transport import Delivery, Headers, Transport
from langgraph_peerctx.protocol.codec import encode
from langgraph_peerctx.protocol.json_values import plain_object
from langgraph_peerctx.protocol.messages import (
    AgentAnswer,
    ContextRequest,
    ContextResponse,
    InDoubtKey,
    Interaction,
    Message,
)

_logger = logging.getLogger(__name__)

_INTERACTIONS: TypeAdapter[tuple[Interaction, ...]] = TypeAdapter(tuple[Interaction, ...])


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What became of a message: the broker has it (`acknowledged`), or mock mode logged it."""

    message_id: str
    correlation_id: str
    topic: str
    delivery: Delivery


def headers_of(message: Message, *, traceparent: str | None = None) -> Headers:
    """Return type, correlation id, sender and W3C trace context as Kafka headers."""
    texts = {
        "message_type": message.message_type,
        "correlation_id": getattr(message, "correlation_id", None),
        "sender": _sender(message),
        "traceparent": traceparent,
    }
    return tuple((name, text.encode()) for name, text in texts.items() if text)


def _sender(message: Message) -> str:
    if isinstance(message, ContextRequest):
        return message.requester_id
    if isinstance(message, ContextResponse):
        return message.responder_id
    return message.process_id


async def publish(
    transport: Transport,
    topic: str,
    message: Message,
    *,
    max_bytes: int,
    traceparent: str | None = None,
) -> Receipt:
    """Send a message and wait for the broker's word; see `Transport.send` for what it raises."""
    delivery = await transport.send(
        topic,
        encode(message, max_bytes=max_bytes),
        headers=headers_of(message, traceparent=traceparent),
    )
    return Receipt(
        message_id=message.message_id,
        correlation_id=getattr(message, "correlation_id", ""),
        topic=topic,
        delivery=delivery,
    )


class KafkaMessageProducer:
    """Publishes requests and answers; an async context manager.

    Args:
        settings: By default from the environment.
        transport: A started transport to borrow; by default one of its own, closed with it.
    """

    def __init__(
        self,
        settings: PeerContextSettings | None = None,
        *,
        transport: Transport | None = None,
    ) -> None:
        self._settings = settings or PeerContextSettings()
        self._borrowed = transport
        self._transport = transport
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Connect, and see that the request topic is there.

        Raises:
            BrokerUnavailableError: If there is no broker, and mock mode is `never`.
            ConfigurationError: If the broker refuses the credentials.
        """
        if self._borrowed is not None:
            return
        async with AsyncExitStack() as stack:
            transport = create_transport(self._settings)
            stack.push_async_callback(transport.close)
            await transport.start()
            await transport.ensure_topics(topics_for(self._settings.kafka)[:1])
            self._transport = transport
            self._stack = stack.pop_all()

    async def stop(self) -> None:
        """Close what is its own. Safe to call twice."""
        if self._borrowed is None:
            self._transport = None
        await self._stack.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def publish_context_request(
        self,
        *,
        requester_id: str,
        failed_agent_id: str,
        thread_id: str,
        time_window_seconds: float = 3_600,
        correlation_id: str | None = None,
        run_id: str | None = None,
        epoch: int = 0,
        attempt: int = 1,
        max_interactions: int | None = None,
        in_doubt: Iterable[InDoubtKey] = (),
        traceparent: str | None = None,
    ) -> Receipt:
        """Broadcast "what do you remember of this agent in this thread?".

        Args:
            requester_id: The asking service; answers come on its response topic.
            failed_agent_id: Whom the question is about.
            thread_id: In which thread.
            time_window_seconds: How far back, in seconds.
            correlation_id: What the answers will carry; by default a fresh id.
            run_id: The run that died, where it is known.
            epoch: The asker's epoch.
            attempt: Which attempt at this recovery.
            max_interactions: How many interactions one agent may answer with.
            in_doubt: The effects to be settled.
            traceparent: W3C trace context to hand on.

        Raises:
            ProtocolError: If an id is illegal or a value out of its range.
            BrokerUnavailableError: If it could not be sent, and mock mode is `never`.
        """
        try:
            request = ContextRequest(
                sent_at=datetime.now(UTC),
                correlation_id=correlation_id or new_id(),
                requester_id=requester_id,
                failed_agent_id=failed_agent_id,
                thread_id=thread_id,
                run_id=run_id,
                epoch=epoch,
                attempt=attempt,
                time_window_seconds=time_window_seconds,
                max_interactions=max_interactions or self._settings.max_interactions,
                in_doubt=tuple(in_doubt),
            )
        except ValidationError as error:
            raise as_protocol_error(error) from None
        topic = self._settings.kafka.context_request_topic
        return await self._publish(topic, request, traceparent)

    async def publish_context_response(
        self,
        *,
        response_topic: str,
        responder_id: str,
        failed_agent_id: str,
        thread_id: str,
        interactions: Iterable[Interaction | Mapping[str, Any]] = (),
        memory_state: Mapping[str, Any] | None = None,
        correlation_id: str | None = None,
        traceparent: str | None = None,
    ) -> Receipt:
        """Answer as one agent.

        Args:
            response_topic: The prefix of response topics, a dot, and the requester's id.
            responder_id: The answering agent.
            failed_agent_id: Whom the answer is about.
            thread_id: In which thread.
            interactions: Newest first: `Interaction`s, or their JSON.
            memory_state: What the agent remembers beside them; plain JSON.
            correlation_id: The request's; an answer without it is taken by no waiting gather.
            traceparent: W3C trace context to hand on.

        Raises:
            ProtocolError: If the topic is no response topic, or a value is illegal.
            BrokerUnavailableError: If it could not be sent, and mock mode is `never`.
        """
        self._check_response_topic(response_topic)
        told = _interactions(interactions)
        memory = plain_object(memory_state or {}, name="memory_state")
        try:
            answer = AgentAnswer(
                agent_id=responder_id,
                status="context" if told or memory else "nothing",
                interactions=told,
                memory_state=memory,
            )
            response = ContextResponse(
                sent_at=datetime.now(UTC),
                correlation_id=correlation_id or new_id(),
                responder_id=responder_id,
                failed_agent_id=failed_agent_id,
                thread_id=thread_id,
                agents=(answer,),
            )
        except ValidationError as error:
            raise as_protocol_error(error) from None
        return await self._publish(response_topic, response, traceparent)

    async def _publish(self, topic: str, message: Message, traceparent: str | None) -> Receipt:
        if self._transport is None:
            raise ConfigurationError("this producer is not started: use it in an `async with`")
        return await publish(
            self._transport,
            topic,
            message,
            max_bytes=self._settings.max_message_bytes,
            traceparent=traceparent,
        )

    def _check_response_topic(self, topic: str) -> None:
        prefix, _, requester_id = topic.rpartition(".")
        if prefix != self._settings.kafka.context_response_topic_prefix or not is_legal_id(
            requester_id
        ):
            raise ProtocolError(
                "id",
                f"response_topic={topic!r:.80} is no response topic: expected "
                f"{self._settings.kafka.context_response_topic_prefix}.REQUESTER_ID",
            )


def _interactions(items: Iterable[Interaction | Mapping[str, Any]]) -> tuple[Interaction, ...]:
    try:
        return _INTERACTIONS.validate_json(_INTERACTIONS.dump_json(tuple(items), warnings=False))  # type: ignore[arg-type]  # mappings are dumped as they are
    except ValidationError as error:
        raise as_protocol_error(error) from None


def as_protocol_error(error: ValidationError) -> ProtocolError:
    """Translate what pydantic says of the first wrong field."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ".".join(str(step) for step in fault["loc"])
    return ProtocolError("field", f"{path}: {fault['msg']}"[:400])
