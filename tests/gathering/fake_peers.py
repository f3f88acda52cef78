"""Peers that answer as a test says."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from fakes import FakeBroker, FakeTransport

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.messaging.producer import headers_of
from langgraph_peerctx.messaging.transport import From, Record
from langgraph_peerctx.protocol.codec import decode, encode
from langgraph_peerctx.protocol.messages import (
    AgentAnswer,
    ContextRequest,
    ContextResponse,
    Interaction,
)

REQUESTS, REPLIES = "agent.context.request", "agent.context.response.tester"
SETTINGS = PeerContextSettings(requester_id="tester", mock_mode="auto")


def answer_to(request: ContextRequest, process: str, **changes: Any) -> ContextResponse:
    """What a process that hosts one agent of the same name would answer."""
    told = Interaction(
        interaction_id=f"{process}-1",
        thread_id=request.thread_id,
        from_agent=request.failed_agent_id,
        to_agent=process,
        kind="message",
        payload={"said": f"to {process}"},
        occurred_at=datetime.now(UTC),
    )
    fields: dict[str, Any] = {
        "sent_at": datetime.now(UTC),
        "correlation_id": request.correlation_id,
        "responder_id": process,
        "failed_agent_id": request.failed_agent_id,
        "thread_id": request.thread_id,
        "agents": (AgentAnswer(agent_id=process, status="context", interactions=(told,)),),
    }
    return ContextResponse(**(fields | changes))


@asynccontextmanager
async def peers(
    broker: FakeBroker, respond: Callable[[ContextRequest], None]
) -> AsyncIterator[None]:
    """Something that reads the requests and does as the test says."""

    def read(record: Record) -> None:
        message = decode(record.value)
        assert isinstance(message, ContextRequest)
        respond(message)

    transport = FakeTransport(broker)
    subscription = await transport.subscribe([REQUESTS], read, start=From())
    yield
    await subscription.close()


def reply(broker: FakeBroker, response: ContextResponse) -> None:
    broker.store(REPLIES, encode(response), headers_of(response))
