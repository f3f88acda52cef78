"""An agent that orders, its peer that takes orders, and how one of them dies between."""

import operator
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from owning import AGENT, AT, GHOST, THREAD, new_run

from langgraph_peerctx import (
    Receiver,
    current_effect,
    effect,
)
from langgraph_peerctx.durability.admission import (
    digest_of,
    packed_config,
)
from langgraph_peerctx.durability.run_effects import About, RunEffects
from langgraph_peerctx.lifecycle import peer_context_lifespan
from langgraph_peerctx.messaging.context_handler import ContextRequestHandler
from langgraph_peerctx.nodes.state import PeerContextState
from langgraph_peerctx.persistence.event_store import EventStore, record_interaction
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.protocol.tickets import EffectTicket

PEER = "inventory-agent"


class State(PeerContextState, total=False):
    log: Annotated[list[Any], operator.add]


class KilledError(BaseException):
    """Leaves what a kill would leave."""


class Peer:
    """An agent that takes orders, in a store of its own, and how they get there."""

    def __init__(self, folder: Path, *, receives: bool = True) -> None:
        self.store = EventStore(f"sqlite:///{folder}/peer.db")
        self.receiver = Receiver(PEER, store=self.store) if receives else None
        self.applied: list[str] = []
        self.tickets: list[EffectTicket] = []
        self.dies: list[str] = []
        self.is_down = False

    async def order(self, what: str) -> Any:
        """What the effect calls: it may be killed on the way there, or on the way back."""
        self.tickets.append(current_effect())
        if self.dies == ["before"]:
            self.dies.clear()
            raise KilledError
        reply = self.take(current_effect(), what)
        if self.dies == ["after"]:
            self.dies.clear()
            raise KilledError
        return reply

    def take(self, ticket: EffectTicket, what: str) -> Any:
        if self.is_down:
            raise ConnectionRefusedError
        if self.receiver is None:
            self.applied.append(what)
            for kind, sender, receiver in (("order", AGENT, PEER), ("order-done", PEER, AGENT)):
                record_interaction(
                    agent_id=PEER,
                    from_agent=sender,
                    to_agent=receiver,
                    thread_id=ticket.thread_id,
                    kind=kind,
                    payload={"number": len(self.applied)},
                    effect_key=ticket.effect_key,
                    run_id=ticket.run_id,
                    store=self.store,
                )
            return {"number": len(self.applied)}
        with self.receiver.receive(ticket) as receipt:
            if receipt.is_first:
                self.applied.append(what)
                receipt.reply = {"number": len(self.applied)}
        return receipt.reply

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Answer what is asked, as its process does."""
        async with peer_context_lifespan() as runtime:
            await runtime.host(ContextRequestHandler(PEER, store=self.store))
            yield
            await runtime.unhost(PEER)


def workflow(peer: Peer, /, **terms: Any) -> Any:
    async def plan(_: State) -> Any:
        return {"log": ["plan"]}

    async def order(_: State) -> Any:
        chosen = {"peer": PEER, "not_done_on": (ConnectionRefusedError,), **terms}
        return {"log": [await effect("order 4711", peer.order, "4711", **chosen)]}

    builder = StateGraph(State)
    builder.add_node("plan", plan)
    builder.add_node("order", order)
    builder.add_edge(START, "plan")
    builder.add_edge("plan", "order")
    builder.add_edge("order", END)
    return builder.compile(checkpointer=InMemorySaver(), name="launch")


async def lose(control: ControlDatabase, app: Any, *, run_id: str = "r1") -> None:
    """Run it as a process that dies in its effect."""
    run = new_run(app, run_id=run_id, durability="sync", config=packed_config(app, {}))
    lease = control.admit(run, GHOST)
    about = About(
        agent_id=AGENT,
        thread_id=THREAD,
        run_id=run_id,
        epoch=lease.epoch,
        input_digest=digest_of({"log": ["in"]}),
    )
    effects = RunEffects(control, about, incarnation=GHOST.incarnation)
    place = effects.go_along({**AT, "metadata": {"run_id": run_id}})
    with pytest.raises(KilledError):
        await app.ainvoke({"log": ["in"]}, place, durability="sync")


async def log_of(app: Any) -> Any:
    return (await app.aget_state(AT)).values["log"]
