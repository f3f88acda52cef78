"""The two agents that are asked: what each does with a letter is a workflow of its own."""

from typing import Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph


class Stock(TypedDict, total=False):
    """What the inventory agent works with."""

    product: str
    units: int
    shelf: str
    reserved: int


class Campaign(TypedDict, total=False):
    """What the marketing agent works with."""

    product: str
    audience: str
    slogan: str


SHELVES = {"umbrella": "north-7", "lantern": "south-2"}


def inventory_workflow() -> CompiledStateGraph[Any, Any, Any, Any]:
    """Find the shelf, then take the units out of what is free."""

    def find_shelf(state: Stock) -> Stock:
        return {"shelf": SHELVES.get(state["product"], "annex")}

    def reserve(state: Stock) -> Stock:
        return {"reserved": state["units"]}

    builder = StateGraph(Stock)
    builder.add_node("find_shelf", find_shelf)
    builder.add_node("reserve", reserve)
    builder.add_edge(START, "find_shelf")
    builder.add_edge("find_shelf", "reserve")
    builder.add_edge("reserve", END)
    return builder.compile(name="inventory")


def marketing_workflow() -> CompiledStateGraph[Any, Any, Any, Any]:
    """Choose an audience, then write the slogan."""

    def choose_audience(state: Campaign) -> Campaign:
        return {"audience": "commuters" if state["product"] == "umbrella" else "campers"}

    def write_slogan(state: Campaign) -> Campaign:
        return {"slogan": f"The {state['product']} for {state['audience']}"}

    builder = StateGraph(Campaign)
    builder.add_node("choose_audience", choose_audience)
    builder.add_node("write_slogan", write_slogan)
    builder.add_edge(START, "choose_audience")
    builder.add_edge("choose_audience", "write_slogan")
    builder.add_edge("write_slogan", END)
    return builder.compile(name="marketing")
