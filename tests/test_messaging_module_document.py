"""Every code block of the messaging module's description runs as written, on a real Kafka.

`src` is called `langgraph_peerctx` here, and what the text leaves open is filled in: `[...]`,
`{...}`, an hour's sleep, and the names that a block expects around it.
"""

import ast
import asyncio
import re
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypedDict
from uuid import uuid4

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from services.kafka import KafkaServer

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.messaging.agent_context_service import (
    AgentContextService,
    ContextResponder,
    get_service_manager,
)
from langgraph_peerctx.messaging.consumer import KafkaMessageConsumer
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.producer import KafkaMessageProducer
from langgraph_peerctx.messaging.topics import topics_for
from langgraph_peerctx.persistence.event_store import EventStore, record_interaction

pytestmark = pytest.mark.kafka

DOCUMENT = Path(__file__).parent / "documents" / "messaging-module.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
FILLED_IN = {
    "interactions=[...]": "interactions=[]",
    "memory_state={...}": "memory_state={'mood': 'good'}",
    "asyncio.sleep(3600)": "asyncio.sleep(0.05)",
}


def block(marker: str) -> str:
    """Return the one block that holds this text, with the package's name and no gaps."""
    (found,) = [text for text in BLOCKS if marker in text]
    found = found.replace("from src.", "from langgraph_peerctx.")
    for gap, filling in FILLED_IN.items():
        found = found.replace(gap, filling)
    return found


async def run(code: str, **names: Any) -> dict[str, Any]:
    """Run a block as the body of a coroutine function, and return its names."""
    body = textwrap.indent(code, "    ")
    source = f"async def block():\n{body}\n    return locals()\n"
    ast.parse(source)
    namespace: dict[str, Any] = {"asyncio": asyncio, **names}
    exec(compile(source, str(DOCUMENT), "exec"), namespace)  # noqa: S102 - our own document
    async with asyncio.timeout(60):
        result: dict[str, Any] = await namespace["block"]()
    return result


@pytest.fixture(autouse=True)
async def environment(
    kafka: KafkaServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[PeerContextSettings]:
    """What a reader of the document has: a broker with its topics, and a store."""
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", kafka.bootstrap_servers)
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", f"sqlite:///{tmp_path}/events.db")
    monkeypatch.setenv("PEER_CONTEXT_MOCK_MODE", "never")
    config = KafkaConfig()
    transport = KafkaTransport(config)
    await transport.start()
    requesters = ["reconstructor", "reconstructor-1", "reconstructor-123"]
    await transport.ensure_topics(topics_for(config, requesters))
    await transport.close()
    yield PeerContextSettings()
    await get_service_manager().stop_all()


class State(TypedDict, total=False):
    steps: list[str]
    peer_context: dict[str, Any]


def workflow_that_dies_once() -> Any:
    """A workflow whose second step fails the first time, as one whose process was killed."""
    failures = iter([True])

    def reserve(_: State) -> State:
        return {"steps": ["reserved"]}

    def announce(state: State) -> State:
        if next(failures, False):
            raise RuntimeError("killed")
        return {"steps": [*state["steps"], "announced"]}

    builder = StateGraph(State)
    builder.add_node("reserve", reserve)
    builder.add_node("announce", announce)
    builder.add_edge(START, "reserve")
    builder.add_edge("reserve", "announce")
    builder.add_edge("announce", END)
    return builder.compile(checkpointer=InMemorySaver())


def test_every_block_is_run_here() -> None:
    markers = re.findall(r'block\("([^"]+)"\)', Path(__file__).read_text())
    covered = {text for text in BLOCKS for marker in markers if marker in text}
    assert len(BLOCKS) == 8
    assert covered == set(BLOCKS)


async def test_kafka_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS")
    await run(block("print(config.bootstrap_servers)"))
    assert capsys.readouterr().out.splitlines() == [
        "localhost:9092",
        "agent.context.request",
        "agent.context.response.reconstructor-1",
    ]


async def test_kafka_producer(environment: PeerContextSettings) -> None:
    topics = ["agent.context.request", "agent.context.response.reconstructor-123"]
    async with KafkaMessageConsumer(topics, settings=environment) as consumer:
        await run(block("async with KafkaMessageProducer() as producer:"))
        messages = await consumer.collect_messages(timeout=10, max_messages=2)
    request, response = sorted(messages, key=lambda m: m["message_type"], reverse=True)
    assert request["message_type"] == "REQUEST_CONTEXT"
    assert request["time_window_seconds"] == 3600
    assert response["responder_id"] == "marketing-agent-1"
    assert response["agents"][0]["memory_state"] == {"mood": "good"}


async def test_kafka_consumer(capsys: pytest.CaptureFixture[str]) -> None:
    async def ask_meanwhile() -> None:
        async with KafkaMessageProducer() as producer:
            while True:  # the group takes about three seconds to come together, or longer
                await producer.publish_context_request(
                    requester_id="reconstructor",
                    failed_agent_id="product-agent-1",
                    thread_id="thread-456",
                )
                await asyncio.sleep(0.25)

    code = block("consumer = KafkaMessageConsumer(").replace(
        "paas-agent-product-agent-1", f"paas-agent-{uuid4().hex}"
    )
    asking = asyncio.create_task(ask_meanwhile())
    names = await run(code)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert names["messages"] == []  # nobody answered: PROVIDE_CONTEXT is what was collected
    assert "Received request for product-agent-1" in capsys.readouterr().out
    assert names["task"].done()


async def test_context_request_handler(environment: PeerContextSettings) -> None:
    with EventStore(environment.database_url) as store:
        record_interaction(
            agent_id="marketing-agent-1",
            from_agent="product-agent-1",
            to_agent="marketing-agent-1",
            thread_id="thread-456",
            kind="order",
            payload={"campaign": "spring"},
            store=store,
        )
        store.remember("marketing-agent-1", "product-agent-1", {"mood": "good"})
    message = {
        "message_type": "REQUEST_CONTEXT",
        "schema_version": 1,
        "message_id": "m1",
        "correlation_id": "c1",
        "sent_at": "2026-01-01T00:00:00Z",
        "requester_id": "reconstructor-1",
        "failed_agent_id": "product-agent-1",
        "thread_id": "thread-456",
        "time_window_seconds": 3600,
    }
    names = await run(block("ContextRequestHandler(agent_id="), message=message)
    assert [i["payload"] for i in names["interactions"]] == [{"campaign": "spring"}]
    assert names["memory_state"] == {"mood": "good"}
    assert names["response_data"]["status"] == "context"
    assert names["response_data"]["interactions"] == names["interactions"]


async def test_agent_context_service() -> None:
    names = await run(block("async with AgentContextService("))
    assert not names["service"].is_running


async def test_service_manager() -> None:
    names = await run(block("manager.register_agent"))
    assert names["service"].agent_id == "product-agent-1"
    assert not names["service"].is_running
    assert get_service_manager().get_service("product-agent-1") is None


async def test_integration_with_reconstruction(
    environment: PeerContextSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with marketing(environment, tmp_path):
        names = await run(block("reconstructor = AgentReconstructor("))
    assert names["result"]["peer_agents_queried"] == ["marketing-agent-1"]
    (fact,) = names["result"]["peer_context"].values()
    assert fact["payload"] == {"campaign": "spring"}
    assert "Peer agents queried: ['marketing-agent-1']" in capsys.readouterr().out


async def test_full_recovery_with_peer_context(
    environment: PeerContextSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workflow = workflow_that_dies_once()
    with pytest.raises(RuntimeError, match="killed"):
        await workflow.ainvoke({"steps": []}, {"configurable": {"thread_id": "thread-123"}})
    async with marketing(environment, tmp_path):
        names = await run(
            block("result = await recover_and_resume_workflow_async("),
            workflow=workflow,
            initial_state={"steps": []},
        )
    result = names["result"]
    assert result["status"] == "resumed"
    assert result["final_state"]["steps"] == ["reserved", "announced"]
    (fact,) = result["final_state"]["peer_context"].values()
    assert fact["told_by"] == ["marketing-agent-1"]
    assert "Peer context used: True" in capsys.readouterr().out


class marketing:  # noqa: N801 - used as a verb would be
    """A peer that remembers one order of the failed agent in `thread-123`."""

    def __init__(self, environment: PeerContextSettings, folder: Path) -> None:
        self._settings = environment.model_copy(update={"process_id": "marketing-process"})
        self._store = EventStore(f"sqlite:///{folder}/marketing.db")

    async def __aenter__(self) -> None:
        record_interaction(
            agent_id="marketing-agent-1",
            from_agent="product-agent-1",
            to_agent="marketing-agent-1",
            thread_id="thread-123",
            kind="order",
            payload={"campaign": "spring"},
            store=self._store,
        )
        self._service = AgentContextService(
            "marketing-agent-1", responder=ContextResponder(self._settings), store=self._store
        )
        await self._service.start()

    async def __aexit__(self, *_: object) -> None:
        await self._service.stop()
        self._store.close()
