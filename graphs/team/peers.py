"""The two agents that are asked: what each does with a letter is a workflow of its own.

Each letter is done once, however often it comes, and is entered in the agent's books in the same
transaction as its receipt.
"""

from functools import partial
from typing import Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from sqlalchemy import Column, Connection, MetaData, String, Table, func, select

from graphs.team.mail import Letter
from graphs.team.scenario import say
from langgraph_peerctx import EffectTicket, Receiver
from langgraph_peerctx.persistence.engine import connect

Workflow = CompiledStateGraph[Any, Any, Any, Any]


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


def inventory_workflow() -> Workflow:
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


def marketing_workflow() -> Workflow:
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


async def do_once(receiver: Receiver, workflow: Workflow, letter: Letter) -> dict[str, Any]:
    """Do what a letter asks for; if that is done already, return what was answered then.

    Raises:
        StaleOwnerError: If the sender's thread has another owner by now.
    """
    async with receiver.areceive(EffectTicket.from_field(letter.ticket)) as receipt:
        if receipt.is_first:
            say("work", kind=letter.kind, thread_id=letter.thread_id)
            receipt.reply = await workflow.ainvoke(letter.payload)
            await receipt.work(partial(enter, letter=letter))
        else:
            say("done_already", kind=letter.kind, thread_id=letter.thread_id)
    reply: dict[str, Any] = receipt.reply
    return reply


BOOKS = Table(
    "team_books",
    MetaData(),
    Column("agent_id", String),
    Column("thread_id", String),
    Column("kind", String),
)
"""One row each time that an agent has really done something."""


def enter(connection: Connection, letter: Letter) -> None:
    """Enter in the books what a letter asked for."""
    BOOKS.create(connection, checkfirst=True)
    row = {"agent_id": letter.recipient, "thread_id": letter.thread_id, "kind": letter.kind}
    connection.execute(BOOKS.insert(), row)


def times_done(database_url: str, agent_id: str, thread_id: str) -> int:
    """Return how often an agent has really done something in a thread, by its books."""
    count = select(func.count()).where(BOOKS.c.agent_id == agent_id, BOOKS.c.thread_id == thread_id)
    engine = connect(database_url)
    try:
        with engine.connect() as connection:
            return connection.execute(count).scalar_one()
    finally:
        engine.dispose()
