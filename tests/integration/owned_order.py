"""A graph whose runs are owned, as a server loads it: with the server's own checkpointer."""

import operator
from typing import Annotated

from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt
from typing_extensions import TypedDict

from langgraph_peerctx import own_runs

AGENT = "order-agent"


class Order(TypedDict, total=False):
    """What an order knows."""

    log: Annotated[list[str], operator.add]


def reserve(_state: Order) -> Order:
    """Reserve a shelf."""
    return {"log": ["reserved"]}


def ask(_state: Order) -> Order:
    """Ask a human how many."""
    return {"log": [interrupt("how many?")]}


builder = StateGraph(Order)
builder.add_node("reserve", reserve)
builder.add_node("ask", ask)
builder.add_edge(START, "reserve")
builder.add_edge("reserve", "ask")
builder.add_edge("ask", END)
graph = own_runs(builder.compile(name="order"), agent_id=AGENT)
