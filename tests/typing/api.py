"""The package as a user writes it: checked by mypy's strict mode, never run."""

from typing import Annotated, Any, TypedDict

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import ToolNode

from langgraph_peerctx import (
    AgentContextService,
    AgentFailure,
    AgentReconstructor,
    ContextRequestHandler,
    EffectTicket,
    EmbeddedBroker,
    EventStore,
    FencedCheckpointer,
    Incident,
    Interaction,
    InteractionRecorder,
    KafkaConfig,
    KafkaMessageConsumer,
    KafkaMessageProducer,
    PeerContext,
    PeerContextHook,
    PeerContextNode,
    PeerContextRuntime,
    PeerContextSettings,
    PeerContextState,
    ProcessState,
    Receiver,
    Reconstruction,
    RecoveryResult,
    RecoverySupervisor,
    Run,
    Settled,
    SupervisedWorkflow,
    aanswer_recovery,
    arecord_interaction,
    create_ask_peers_tool,
    create_peer_context_subgraph,
    create_recovery_graph,
    current_effect,
    effect,
    explain_reconstruction,
    get_service_manager,
    merge_peer_context,
    own_runs,
    owned,
    peer_context_lifespan,
    peer_context_retry_policy,
    record_interaction,
    recover_and_resume_workflow_async,
)
from langgraph_peerctx.messaging.kafka_config import get_kafka_config, get_response_topic


class State(PeerContextState):
    topic: str


class StateOfItsOwn(TypedDict, total=False):
    peer_context: Annotated[dict[str, Any], merge_peer_context]


def settings() -> PeerContextSettings:
    config: KafkaConfig = get_kafka_config()
    topic: str = get_response_topic("reconstructor")
    servers: str = config.bootstrap_servers
    del topic, servers
    with EmbeddedBroker() as broker:
        return PeerContextSettings(kafka=KafkaConfig(bootstrap_servers=broker.bootstrap_servers))


async def handle(message: dict[str, Any]) -> None:
    del message


async def messages() -> None:
    async with KafkaMessageProducer() as producer:
        receipt = await producer.publish_context_request(
            requester_id="reconstructor", failed_agent_id="product-agent-1", thread_id="thread-1"
        )
        correlation_id: str = receipt.correlation_id
        del correlation_id
    async with KafkaMessageConsumer(topics=["agent.context.request"], group_id="g") as consumer:
        consumer.register_handler("REQUEST_CONTEXT", handle)
        collected: list[dict[str, Any]] = await consumer.collect_messages(timeout=5.0)
        del collected


async def answering(store: EventStore) -> None:
    handler = ContextRequestHandler("marketing-agent-1", store=store)
    told: list[dict[str, Any]] = handler.query_interactions_with_agent("a", "thread-1", 60.0)
    async with AgentContextService("marketing-agent-1", store=store, handler=handler) as service:
        agent_id: str = service.agent_id
    manager = get_service_manager()
    await manager.register_agent("marketing-agent-1")
    await manager.stop_all()
    del told, agent_id


async def remembering(store: EventStore) -> Interaction:
    record_interaction(
        agent_id="a", from_agent="a", to_agent="b", thread_id="t", kind="order", store=store
    )
    return await arecord_interaction(
        agent_id="a", from_agent="a", to_agent="b", thread_id="t", kind="order", payload={"n": 1}
    )


async def gathering() -> list[tuple[str, tuple[str, ...]]]:
    async with PeerContextRuntime() as runtime:
        context: PeerContext = await runtime.gather(
            failed_agent_id="product-agent-1", thread_id="thread-1", expect=["marketing-agent-1"]
        )
    return [(fact.interaction.kind, fact.told_by) for fact in context.facts]


async def living() -> None:
    async with peer_context_lifespan(agents=["a"]) as runtime:
        agents: tuple[str, ...] = runtime.agents
    hook = PeerContextHook(["a"])
    hook.close()
    del agents


async def recovering() -> str:
    builder = StateGraph(State)
    builder.add_node("peer_context", PeerContextNode())
    builder.add_node("again", PeerContextNode(), retry_policy=peer_context_retry_policy())
    builder.add_node("steps", create_peer_context_subgraph(expect=["a"]).compile())
    builder.add_node("tools", ToolNode([create_ask_peers_tool()]))
    builder.add_node("write", lambda state: {"topic": state["topic"]})
    builder.add_edge(START, "peer_context")
    workflow = builder.compile(checkpointer=InMemorySaver())
    result: RecoveryResult = await recover_and_resume_workflow_async(
        workflow=workflow, agent_id="product-agent-1", thread_id="thread-1"
    )
    recovery = create_recovery_graph(workflow, expect=["a"], approve_below_coverage=0.5)
    recovery.compile(checkpointer=InMemorySaver())
    reconstructor = AgentReconstructor(enable_peer_context=True, peer_context_timeout=5.0)
    evidence: Reconstruction = await reconstructor.reconstruct_async(
        agent_id="product-agent-1", thread_id="thread-1"
    )
    del evidence
    return result["status"]


async def owning() -> dict[str, Any]:
    builder = StateGraph(State)
    builder.add_node("write", lambda state: {"topic": state["topic"]})
    builder.add_edge(START, "write")
    workflow = builder.compile(checkpointer=FencedCheckpointer(InMemorySaver()), name="launch")
    async with owned(workflow, agent_id="product-agent-1", thread_id="thread-1") as run:
        final: dict[str, Any] = await run.ainvoke({"topic": "umbrella"})
        async for chunk in run.astream({"topic": "umbrella"}, stream_mode="updates"):
            del chunk
    served = own_runs(workflow, agent_id="product-agent-1", name="launch")
    await served.ainvoke({"topic": "x"}, {"configurable": {"thread_id": "thread-2"}})
    async with peer_context_lifespan(agent_id="product-agent-1", workflow=workflow):
        pass
    return final


def make_context(run: Run) -> dict[str, str]:
    return {"tenant": run.thread_id}


def tell(failure: AgentFailure, result: RecoveryResult) -> None:
    words: tuple[str, str, str] = failure.agent_id, failure.why, result["status"]
    del words


async def supervising(workflow: Any) -> Incident:
    supervised = SupervisedWorkflow(workflow=workflow, context_factory=make_context)
    async with RecoverySupervisor({"launch": supervised}, on_recovery=tell) as supervisor:
        states: list[ProcessState] = await supervisor.states()
        result: RecoveryResult = await supervisor.recover("product-agent-1", "thread-1")
    del states, result
    return await aanswer_recovery("5e0c", True)  # noqa: FBT003 - the answer


async def order(product: str, count: int) -> dict[str, int]:
    return {product: count, **{name: len(v) for name, v in ticket_as_headers().items()}}


def ticket_as_headers() -> dict[str, str]:
    return current_effect().as_headers()


def look(ticket: EffectTicket) -> Settled:
    return Settled.happened({"number": 1}) if ticket.epoch else Settled.unknown()


@effect(lambda product, **_: f"note-{product}", scope="thread", if_unknown="retry")
def note(product: str, *, loud: bool = False) -> str:
    return product.upper() if loud else product


async def with_effects() -> tuple[dict[str, int], str]:
    reply: dict[str, int] = await effect(
        "order", order, "umbrella", 3, peer="inventory-agent", not_done_on=(ConnectionRefusedError,)
    )
    again: dict[str, int] = await effect("again", order, "lantern", 1, check=look)
    said: str = note("umbrella", loud=True)
    return {**reply, **again}, said


async def received(headers: dict[str, str]) -> Any:
    receiver = await Receiver.acreate("inventory-agent")
    async with receiver.areceive(EffectTicket.from_headers(headers)) as receipt:
        if receipt.is_first:
            receipt.reply = {"number": 7}
    return receipt.reply


async def recorded(workflow: Any) -> Reconstruction:
    recorder = InteractionRecorder("product-agent-1", peers={"ask": "marketing-agent-1"})
    async with (
        peer_context_lifespan(recorders=[recorder]),
        owned(workflow, agent_id="product-agent-1", thread_id="t", recorder=recorder) as run,
    ):
        await run.ainvoke({"topic": "umbrella"})
    recorder.close()
    found = await AgentReconstructor(workflow=workflow).reconstruct_async("product-agent-1", "t")
    text: str = str(explain_reconstruction(found))
    del text
    return found
