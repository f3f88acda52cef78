"""The agent that dies, or is frozen: it launches a product with the help of its two peers."""

import asyncio
from itertools import pairwise
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from graphs.team.mail import Mailbox
from graphs.team.scenario import INVENTORY, MARKETING, say
from langgraph_peerctx import PeerContextState

WORK_SECONDS = 3.0
"""How long the step that is disturbed goes on working after its peer has answered: about as long as
a lease lives here, so that a frozen process has little left to do when it is thawed."""


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
        dawdle_in: The step that goes on working for a while after its peer has answered.
    """

    def __init__(self, mailbox: Mailbox, dawdle_in: str | None = None) -> None:
        self._mailbox = mailbox
        self._dawdle_in = dawdle_in

    async def plan(self, state: Launch) -> Launch:
        """Decide how many units."""
        await self._finished("plan")
        return {"units": state.get("units", 3)}

    async def reserve(self, state: Launch, config: RunnableConfig) -> Launch:
        """Have the inventory agent reserve them."""
        wanted = {"product": state["product"], "units": state["units"]}
        reply = await self._asked(state, INVENTORY, "reserve", config, **wanted)
        await self._finished("reserve")
        return {"shelf": reply["shelf"]}

    async def advertise(self, state: Launch, config: RunnableConfig) -> Launch:
        """Have the marketing agent make a campaign."""
        reply = await self._asked(state, MARKETING, "campaign", config, product=state["product"])
        await self._finished("advertise")
        return {"slogan": reply["slogan"]}

    async def launch(self, state: Launch) -> Launch:  # noqa: ARG002 - what LangGraph passes
        """Launch."""
        await self._finished("launch")
        return {"launched": True}

    async def _asked(
        self, state: Launch, peer: str, kind: str, config: RunnableConfig, **payload: Any
    ) -> dict[str, Any]:
        """Ask a peer, unless it remembers having done it already."""
        thread_id = config["configurable"]["thread_id"]
        effect_key = f"{kind}:{thread_id}"
        if (done := remembered(state, kind, effect_key)) is not None:
            say("remembered", kind=kind, by=peer)
            return done
        say("asking", kind=kind, peer=peer)
        reply = await self._mailbox.ask(
            peer, kind, thread_id=thread_id, effect_key=effect_key, **payload
        )
        say("answered", kind=kind, peer=peer)
        return reply

    async def _finished(self, step: str) -> None:
        if step == self._dawdle_in:
            say("dawdling", step=step)
            await asyncio.sleep(WORK_SECONDS)
        say("step", step=step)


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


def remembered(state: Launch, kind: str, effect_key: str) -> dict[str, Any] | None:
    """Return what a peer answered before the crash, if a recovery brought it home."""
    for fact in state.get("peer_context", {}).values():
        if fact.get("kind") == f"{kind}-done" and fact.get("effect_key") == effect_key:
            return dict(fact["payload"])
    return None
