"""A graph behind a server, and one that records and is served itself."""

import operator
from typing import Annotated

from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

from langgraph_peerctx.durability.recorder import InteractionRecorder


class State(TypedDict, total=False):
    """What was done."""

    log: Annotated[list[str], operator.add]


async def price(_state: State) -> State:
    """Tell the price."""
    return {"log": ["3 euro"]}


plain = StateGraph(State).add_node("price", price).add_edge(START, "price").compile(name="pricing")
recorded = plain.with_config(callbacks=[InteractionRecorder("pricing-agent")])
