"""The agent that dies, or is frozen: it launches a product with the help of its two peers."""

from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from graphs.team.mail import Mailbox
from graphs.team.scenario import INVENTORY, MARKETING, say
from langgraph_peerctx import PeerContextState, current_effect, effect


class Launch(PeerContextState, total=False):
    """What a launch needs; `peer_context` is where a recovery puts what the peers remember."""

    product: str
    units: int
    shelf: str
    slogan: str
    launched: bool


class Steps:
    """The steps of a launch: plan, reserve units, order a campaign, launch.

    Args:
        mailbox: The way to the peers.
        on_answer: Is awaited when an answer has come, before it is written down.
    """

    def __init__(
        self, mailbox: Mailbox, on_answer: Callable[[str], Awaitable[None]] | None = None
    ) -> None:
        self._mailbox = mailbox
        self._on_answer = on_answer

    async def plan(self, state: Launch) -> Launch:
        """Decide how many units."""
        say("step", step="plan")
        return {"units": state.get("units", 3)}

    async def reserve(self, state: Launch) -> Launch:
        """Have the inventory agent reserve them."""
        order = {"product": state["product"], "units": state["units"]}
        reply = await effect("reserve", self._order, INVENTORY, order, peer=INVENTORY)
        say("step", step="reserve")
        return {"shelf": reply["shelf"]}

    async def advertise(self, state: Launch) -> Launch:
        """Have the marketing agent make a campaign."""
        order = {"product": state["product"]}
        reply = await effect("campaign", self._order, MARKETING, order, peer=MARKETING)
        say("step", step="advertise")
        return {"slogan": reply["slogan"]}

    async def launch(self, state: Launch) -> Launch:  # noqa: ARG002 - what LangGraph passes
        """Launch."""
        say("step", step="launch")
        return {"launched": True}

    async def _order(self, peer: str, order: dict[str, Any]) -> dict[str, Any]:
        """Send an order to a peer, with the ticket of the effect that it is."""
        ticket = current_effect()
        say("asking", kind=ticket.name, peer=peer)
        reply = await self._mailbox.ask(peer, ticket.name, order, ticket)
        say("answered", kind=ticket.name, peer=peer)
        if self._on_answer is not None:
            await self._on_answer(ticket.name)
        return reply


def product_workflow(
    steps: Steps, checkpointer: BaseCheckpointSaver[Any]
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """Return the launch as a graph; `checkpointer` is shared with whoever may have to recover."""
    builder = StateGraph(Launch)
    builder.add_node("plan", steps.plan)
    builder.add_node("reserve", steps.reserve)
    builder.add_node("advertise", steps.advertise)
    builder.add_node("launch", steps.launch)
    for before, after in pairwise((START, "plan", "reserve", "advertise", "launch", END)):
        builder.add_edge(before, after)
    return builder.compile(checkpointer=checkpointer, name="product")
