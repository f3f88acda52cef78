"""The example for Studio: an agent that dies in a step whose effect only its peer remembers."""

from typing import Annotated, Any, Literal

from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from pydantic import Field
from typing_extensions import TypedDict

from langgraph_peerctx import PeerContextState, arecord_interaction

AGENT, INVENTORY, MARKETING = "product-agent", "inventory-agent", "marketing-agent"
PEERS = (INVENTORY, MARKETING)


class LaunchInput(TypedDict, total=False):
    """What is to be launched."""

    product: Annotated[
        str, Field(title="Product", description="What is launched.", examples=["umbrella"])
    ]
    dies_in: Annotated[
        Literal["reserve", "advertise"] | None,
        Field(
            title="Dies in",
            description="The step in which the agent dies after its peer has acted, if any.",
            examples=["advertise"],
        ),
    ]


class Launch(LaunchInput, PeerContextState, total=False):
    """What a launch knows; `peer_context` is where a recovery puts what the peers remember."""

    shelf: str
    slogan: str
    asked: int
    launched: bool


class AgentDiedError(RuntimeError):
    """Stands for the kill: the step has acted, and nothing of it is stored."""


async def reserve(state: Launch, config: RunnableConfig) -> Launch:
    """Have the inventory agent reserve a shelf."""
    reply, asked = await _done_by(INVENTORY, "reserve", {"shelf": "A7"}, state, config)
    return {"shelf": reply["shelf"], "asked": asked}


async def advertise(state: Launch, config: RunnableConfig) -> Launch:
    """Have the marketing agent make a campaign."""
    slogan = f"Never without your {state.get('product', 'umbrella')}"
    reply, asked = await _done_by(MARKETING, "advertise", {"slogan": slogan}, state, config)
    return {"slogan": reply["slogan"], "asked": asked}


async def launch(state: Launch) -> Launch:
    """Launch, if all is there."""
    return {"launched": bool(state["shelf"] and state["slogan"])}


async def _done_by(
    peer: str, kind: str, reply: dict[str, Any], state: Launch, config: RunnableConfig
) -> tuple[dict[str, Any], int]:
    """Return a peer's reply, and how often peers were asked so far; ask no peer twice."""
    asked = state.get("asked", 0)
    for fact in (state.get("peer_context") or {}).values():
        if fact["kind"] == kind:
            return fact["payload"], asked
    await arecord_interaction(
        agent_id=peer,
        from_agent=AGENT,
        to_agent=peer,
        thread_id=str(config["configurable"]["thread_id"]),
        kind=kind,
        payload=reply,
    )
    if state.get("dies_in") == kind:
        raise AgentDiedError(f"{AGENT} died in the middle of {kind}: nothing of it is stored")
    return reply, asked + 1


def builder() -> StateGraph[Any, Any, Any, Any]:
    """Return the workflow, not compiled."""
    workflow = StateGraph(Launch, input_schema=LaunchInput)
    workflow.add_node("reserve", reserve)
    workflow.add_node("advertise", advertise)
    workflow.add_node("launch", launch)
    workflow.add_edge(START, "reserve")
    workflow.add_edge("reserve", "advertise")
    workflow.add_edge("advertise", "launch")
    workflow.add_edge("launch", END)
    return workflow


graph = builder().compile(name="launch")
