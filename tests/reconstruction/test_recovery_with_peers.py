"""Recovery with a runtime of its own, over a broker, with peers that answer."""

import operator
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from langgraph.graph import START, StateGraph
from reconstruction.savers import KilledError, Mortal

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.messaging.agent_context_service import AgentContextService
from langgraph_peerctx.messaging.embedded_broker import EmbeddedBroker
from langgraph_peerctx.nodes.state import PeerContextState
from langgraph_peerctx.persistence.event_store import (
    EventStore,
    get_event_store,
    record_interaction,
)
from langgraph_peerctx.reconstruction.reconstructor import (
    AgentReconstructor,
    recover_and_resume_workflow_async,
)


class State(PeerContextState, total=False):
    log: Annotated[list[str], operator.add]


@pytest.fixture(params=["embedded", pytest.param("real", marks=pytest.mark.kafka)])
def bootstrap_servers(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "real":
        yield request.getfixturevalue("kafka").bootstrap_servers
        return
    topics = ["agent.context.request", "agent.context.response.reconstructor"]
    with EmbeddedBroker(topics) as broker:
        yield broker.bootstrap_servers


@pytest.fixture
def own_url(tmp_path: Path) -> str:
    """The dead agent's own store: it is there, and empty."""
    url = f"sqlite:///{tmp_path / 'product.db'}"
    EventStore(url).close()
    return url


@pytest.fixture
def settings(bootstrap_servers: str, own_url: str) -> PeerContextSettings:
    return PeerContextSettings(
        kafka=KafkaConfig(bootstrap_servers=bootstrap_servers),
        database_url=own_url,
        mock_mode="never",
    )


@pytest.fixture
async def peer(settings: PeerContextSettings, tmp_path: Path) -> AsyncIterator[EventStore]:
    """An inventory agent that remembers an order of the product agent."""
    with EventStore(f"sqlite:///{tmp_path / 'inventory.db'}") as store:
        record_interaction(
            agent_id="inventory-agent",
            from_agent="product-agent",
            to_agent="inventory-agent",
            thread_id="thread-1",
            kind="order",
            payload={"sku": "A1"},
            interaction_id="order-1",
            store=store,
        )
        async with AgentContextService("inventory-agent", settings=settings, store=store):
            yield store


@pytest.fixture
async def dead(memory: Mortal) -> Any:
    """A workflow whose process died in its only node."""
    deaths = iter([True])

    def work(_state: State) -> dict[str, Any]:
        if next(deaths, False):
            memory.life.end()
        return {"log": ["work"]}

    builder = StateGraph(State)
    builder.add_node("work", work)
    builder.add_edge(START, "work")
    graph: Any = builder.compile(checkpointer=memory)
    with pytest.raises(KilledError):
        await graph.ainvoke({"log": ["in"]}, {"configurable": {"thread_id": "thread-1"}})
    memory.life.dead = False
    return graph


@pytest.mark.usefixtures("peer")
async def test_a_dead_agents_workflow_goes_on_with_what_a_peer_remembers(
    settings: PeerContextSettings, dead: Any
) -> None:
    answers: list[Any] = []

    result = await recover_and_resume_workflow_async(
        workflow=dead,
        agent_id="product-agent",
        thread_id="thread-1",
        expect=["inventory-agent"],
        settings=settings,
        on_answer=answers.append,
    )

    assert result["status"] == "resumed"
    assert result["reasons"] == []
    fact = result["final_state"]["peer_context"]["order-1"]
    assert (fact["source"], fact["told_by"], fact["payload"]) == (
        "peer",
        ["inventory-agent"],
        {"sku": "A1"},
    )
    coverage: Any = result["incident"]["coverage"]
    assert coverage["answered"] == ["inventory-agent"]
    assert len(answers) == 1


@pytest.mark.usefixtures("peer")
async def test_who_is_told_of_answers_and_raises_costs_the_recovery_nothing(
    settings: PeerContextSettings, dead: Any
) -> None:
    def listener(_answer: Any) -> None:
        raise BrokenPipeError("nobody reads any more")

    result = await recover_and_resume_workflow_async(
        workflow=dead,
        agent_id="product-agent",
        thread_id="thread-1",
        expect=["inventory-agent"],
        settings=settings,
        on_answer=listener,
    )
    assert (result["status"], result["reasons"]) == ("resumed", [])


@pytest.mark.usefixtures("peer")
async def test_the_agents_own_record_outranks_its_peers(
    settings: PeerContextSettings, dead: Any
) -> None:
    record_interaction(
        agent_id="product-agent",
        from_agent="product-agent",
        to_agent="inventory-agent",
        thread_id="thread-1",
        kind="order",
        payload={"sku": "mine"},
        interaction_id="order-1",
        store=get_event_store(settings.database_url),
    )

    result = await AgentReconstructor(workflow=dead, settings=settings).reconstruct_async(
        agent_id="product-agent", thread_id="thread-1", expect=["inventory-agent"]
    )

    fact: Any = result["peer_context"]["order-1"]
    assert (fact["source"], fact["payload"]) == ("own", {"sku": "mine"})
    assert len(result["own_events"]) == 1
    assert len(result["conflicts"]) == 1


async def test_a_broker_that_is_not_there_costs_the_peers_part_only(
    own_url: str, dead: Any
) -> None:
    nowhere = PeerContextSettings(
        kafka=KafkaConfig(bootstrap_servers="127.0.0.1:1", connect_timeout_seconds=1.0),
        database_url=own_url,
        mock_mode="never",
    )

    result = await recover_and_resume_workflow_async(
        workflow=dead, agent_id="product-agent", thread_id="thread-1", settings=nowhere
    )

    assert (result["status"], result["degraded"]) == ("resumed", True)
    assert [reason.split(":")[0] for reason in result["reasons"]] == ["no_broker"]
    assert result["final_state"]["log"] == ["in", "work"]


async def test_mock_mode_is_said_and_not_taken_for_an_answer(own_url: str, dead: Any) -> None:
    mock = PeerContextSettings(database_url=own_url, mock_mode="always")

    result = await recover_and_resume_workflow_async(
        workflow=dead, agent_id="product-agent", thread_id="thread-1", settings=mock
    )

    assert (result["status"], result["degraded"]) == ("resumed", True)
    assert result["reasons"]
    assert not result["peer_context_used"]


async def test_a_store_that_cannot_be_opened_costs_the_own_events_only(
    tmp_path: Path, dead: Any
) -> None:
    (tmp_path / "damaged.db").write_bytes(b"no database at all" * 100)
    broken = PeerContextSettings(database_url=f"sqlite:///{tmp_path / 'damaged.db'}")

    result = await recover_and_resume_workflow_async(
        workflow=dead,
        agent_id="product-agent",
        thread_id="thread-1",
        use_peer_context=False,
        settings=broken,
    )

    assert result["status"] == "resumed"
    assert [reason.split(":")[0] for reason in result["reasons"]] == ["no_own_events"]
