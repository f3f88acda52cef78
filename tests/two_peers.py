"""Two peers that remember an order each, on a broker; one of them is slow to come."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.messaging.agent_context_service import AgentContextService
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.topics import topics_for
from langgraph_peerctx.messaging.transport import From, Record
from langgraph_peerctx.persistence.event_store import EventStore, record_interaction
from langgraph_peerctx.protocol.codec import decode
from langgraph_peerctx.protocol.messages import ContextRequest


class Peers:
    """`a` answers at once; `b` is away until it is asked a second time."""

    def __init__(self, settings: PeerContextSettings, place: Path) -> None:
        self.requests: list[ContextRequest] = []
        self._settings = settings
        self._place = place
        self._stack = AsyncExitStack()
        self._starting: list[asyncio.Task[None]] = []

    async def start(self, name: str) -> None:
        store = self._stack.enter_context(EventStore(f"sqlite:///{self._place}/{name}.db"))
        record_interaction(
            agent_id=name,
            from_agent="product-agent",
            to_agent=name,
            thread_id="thread-1",
            kind="order",
            interaction_id=f"order-{name}",
            store=store,
        )
        settings = self._settings.model_copy(update={"process_id": f"host-{name}"})
        await self._stack.enter_async_context(
            AgentContextService(name, settings=settings, store=store)
        )

    def see(self, record: Record) -> None:
        request = decode(record.value)
        assert isinstance(request, ContextRequest)
        self.requests.append(request)
        if len(self.requests) == 2:
            self._starting.append(asyncio.create_task(self.start("b")))

    async def close(self) -> None:
        await asyncio.gather(*self._starting)
        await self._stack.aclose()


@asynccontextmanager
async def two_peers(settings: PeerContextSettings, place: Path) -> AsyncIterator[Peers]:
    peers = Peers(settings, place)
    transport = KafkaTransport(settings.kafka)
    await transport.start()
    try:
        await transport.ensure_topics(topics_for(settings.kafka, [settings.requester_id]))
        watching = await transport.subscribe(
            [settings.kafka.context_request_topic], peers.see, start=From()
        )
        await watching.positioned()
        await peers.start("a")
        yield peers
        await peers.close()
    finally:
        await transport.close()
