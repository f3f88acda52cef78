"""An effect is done once at its place in the run, and what is in doubt is never guessed."""

import asyncio
import operator
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, RetryPolicy, Send, interrupt
from typing_extensions import TypedDict

from langgraph_peerctx import Settled, current_effect, effect
from langgraph_peerctx.durability.run_effects import About, RunEffects
from langgraph_peerctx.errors import (
    CheckpointerError,
    ConfigurationError,
    InDoubtError,
    ProtocolError,
    StaleOwnerError,
)
from langgraph_peerctx.persistence.effect_ledger import NewEffect
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.protocol.messages import InDoubtAnswer, InDoubtKey, Verdict

AGENT, THREAD, RUN, PEER = "product-agent", "thread-1", "run-1", "inventory-agent"
INCARNATION = "one-life"


class State(TypedDict, total=False):
    log: Annotated[list[Any], operator.add]
    n: int
    given: Any


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlDatabase]:
    with ControlDatabase(f"sqlite:///{tmp_path}/control.db") as opened:
        yield opened


class World:
    """What was done, and what the peer says."""

    def __init__(self, control: ControlDatabase) -> None:
        self.control = control
        self.done: list[Any] = []
        self.asked: list[tuple[About, InDoubtKey]] = []
        self.says: Verdict | None = None
        self.reply: Any = None
        self.claim("one-life")

    def claim(self, incarnation: str, *, dead: str | None = None) -> None:
        lease = self.control.claim(
            AGENT,
            THREAD,
            owner_id="process",
            incarnation=incarnation,
            ttl_seconds=60,
            dead_incarnation=dead,
        )
        assert lease is not None
        self.incarnation, self.epoch = incarnation, lease.epoch

    def effects(self, run_id: str = RUN, **more: Any) -> RunEffects:
        about = About(agent_id=AGENT, thread_id=THREAD, run_id=run_id, epoch=self.epoch)
        return RunEffects(self.control, about, incarnation=self.incarnation, peers=self, **more)

    def at(self, run_id: str = RUN, **more: Any) -> Any:
        place: Any = {"configurable": {"thread_id": THREAD}}
        return self.effects(run_id, **more).go_along(place)

    def act(self, what: Any = "it", fails: BaseException | None = None) -> Any:
        self.done.append(what)
        if fails is not None:
            raise fails
        return {"done": what, "times": len(self.done)}

    async def aact(self, what: Any = "it", fails: BaseException | None = None) -> Any:
        await asyncio.sleep(0)
        return self.act(what, fails)

    def ask(self, about: About, key: InDoubtKey) -> InDoubtAnswer | None:
        self.asked.append((about, key))
        if self.says is None:
            return None
        return InDoubtAnswer(
            effect_key=key.effect_key, agent_id=key.peer_id, verdict=self.says, reply=self.reply
        )

    async def aask(self, about: About, key: InDoubtKey) -> InDoubtAnswer | None:
        return self.ask(about, key)

    def known(self, run_id: str = RUN) -> list[Any]:
        return self.control.effects_of(AGENT, THREAD, run_id)


@pytest.fixture
def world(control: ControlDatabase) -> World:
    return World(control)


Node = Callable[[State], Any]


def line(*nodes: tuple[str, Any], **more: Any) -> Any:
    builder = StateGraph(State)
    before = START
    for name, node in nodes:
        builder.add_node(name, node, **more)
        builder.add_edge(before, name)
        before = name
    builder.add_edge(before, END)
    return builder.compile(checkpointer=InMemorySaver())


class DieError(BaseException):
    """A kill, as far as a test can have one in its own process."""


async def test_a_node_that_runs_again_gets_the_outcome_and_calls_nothing(world: World) -> None:
    dies = [True]

    async def node(_: State) -> Any:
        told = await effect("order", world.aact, "4711", peer=PEER)
        if dies.pop() if dies else False:
            raise DieError
        return {"log": [told]}

    app = line(("node", node))
    with pytest.raises(DieError):
        await app.ainvoke({}, world.at())
    assert await app.ainvoke(None, world.at()) == {"log": [{"done": "4711", "times": 1}]}
    assert world.done == ["4711"]
    assert world.asked == []


def test_sync_effects_block_and_are_done_once(world: World) -> None:
    dies = [True]

    def node(_: State) -> Any:
        told = effect("order", world.act, "4711", peer=PEER)
        if dies.pop() if dies else False:
            raise DieError
        return {"log": [told]}

    app = line(("node", node))
    with pytest.raises(DieError):
        app.invoke({}, world.at())
    assert app.invoke(None, world.at()) == {"log": [{"done": "4711", "times": 1}]}
    assert world.done == ["4711"]


async def test_a_decorated_function_is_an_effect_with_a_key_of_its_arguments(world: World) -> None:
    @effect(lambda order, **_: f"order-{order}", peer=PEER)
    async def place(order: int, *, express: bool = False) -> Any:
        """Place it."""
        return await world.aact((order, express))

    @effect("note")
    def note(text: str) -> Any:
        return world.act(text)

    async def node(_: State) -> Any:
        return {"log": [await place(1), await place(2, express=True), note("n")]}

    assert place.__doc__ == "Place it."
    app = line(("node", node))
    told = await app.ainvoke({}, world.at())
    # As JSON: a tuple is a list, the first time as well.
    assert told["log"][1]["done"] == [2, True]
    assert [e.name for e in world.known()] == ["order-1", "order-2", "note"]


async def test_a_loop_of_three_has_three_effects(world: World) -> None:
    async def node(state: State) -> Any:
        await effect("order", world.aact, state["n"])
        return {"n": state["n"] + 1}

    builder = StateGraph(State)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    builder.add_conditional_edges("node", lambda s: "node" if s["n"] < 3 else END)
    await builder.compile(checkpointer=InMemorySaver()).ainvoke({"n": 0}, world.at())
    assert world.done == [0, 1, 2]
    assert [e.position for e in world.known()] == ["node@1", "node@2", "node@3"]


async def test_a_subgraph_in_a_loop_has_an_effect_each_time(world: World) -> None:
    """Fact 57: it reports inner step 1 each time."""

    async def inner(state: State) -> Any:
        await effect("order", world.aact, state["n"])
        return {"n": state["n"] + 1}

    sub = StateGraph(State)
    sub.add_node("inner", inner)
    sub.add_edge(START, "inner")
    builder = StateGraph(State)
    builder.add_node("sub", sub.compile())
    builder.add_edge(START, "sub")
    builder.add_conditional_edges("sub", lambda s: "sub" if s["n"] < 3 else END)
    await builder.compile(checkpointer=InMemorySaver()).ainvoke({"n": 0}, world.at())
    assert [e.position for e in world.known()] == [
        "sub@1/inner@1",
        "sub@2/inner@1",
        "sub@3/inner@1",
    ]


async def test_a_graph_called_twice_in_a_node_has_two_effects(world: World) -> None:
    async def inner(state: State) -> Any:
        return {"n": (await effect("order", world.aact, state["n"]))["times"]}

    sub = line(("inner", inner)).copy({"checkpointer": None})

    async def node(_: State) -> Any:
        one, two = await sub.ainvoke({"n": 1}), await sub.ainvoke({"n": 1})
        return {"log": [one["n"], two["n"]]}

    assert (await line(("node", node)).ainvoke({}, world.at()))["log"] == [1, 2]
    assert [e.position for e in world.known()] == ["node@1/inner@1", "node@1+1/inner@1"]


async def test_each_send_has_its_effect(world: World) -> None:
    async def work(state: State) -> Any:
        await effect("order", world.aact, state["n"])
        return {"log": [state["n"]]}

    builder = StateGraph(State)
    builder.add_node("plan", lambda _: {})
    builder.add_node("work", work)
    builder.add_edge(START, "plan")
    builder.add_conditional_edges("plan", lambda _: [Send("work", {"n": i}) for i in range(3)])
    await builder.compile(checkpointer=InMemorySaver()).ainvoke({}, world.at())
    assert sorted(world.done) == [0, 1, 2]
    assert sorted(e.position for e in world.known()) == ["work@2[0]", "work@2[1]", "work@2[2]"]


async def test_tasks_of_a_functional_workflow_have_their_effects(world: World) -> None:
    @task
    async def order(n: int) -> Any:
        return (await effect("order", world.aact, n))["done"]

    @entrypoint(checkpointer=InMemorySaver())
    async def workflow(n: int) -> Any:
        await effect("begin", world.aact, "begin")
        return [await order(n), *await asyncio.gather(order(n), order(n))]

    assert await workflow.ainvoke(7, world.at()) == [7, 7, 7]
    assert world.done == ["begin", 7, 7, 7]
    places = {e.position for e in world.known() if e.name == "order"}
    assert places == {"workflow@0/order@0(0)", "workflow@0/order@0(1)", "workflow@0/order@0(2)"}


async def test_a_retried_node_does_not_do_it_again(world: World) -> None:
    fails = [ValueError("later"), ValueError("later")]

    async def node(_: State) -> Any:
        told = await effect("order", world.aact)
        if fails:
            raise fails.pop()
        return {"log": [told["times"]]}

    policy = RetryPolicy(max_attempts=3, initial_interval=0.01, retry_on=ValueError)
    app = line(("node", node), retry_policy=policy)
    assert await app.ainvoke({}, world.at()) == {"log": [1]}
    assert len(world.done) == 1


async def test_an_answered_question_does_not_do_it_again(world: World) -> None:
    async def node(_: State) -> Any:
        told = await effect("order", world.aact)
        return {"log": [told["times"], interrupt("well?")]}

    app = line(("node", node))
    await app.ainvoke({}, world.at())
    assert (await app.ainvoke(Command(resume="yes"), world.at()))["log"] == [1, "yes"]


async def test_a_key_used_twice_at_one_place_is_an_error(world: World) -> None:
    async def node(_: State) -> Any:
        await effect("order", world.aact)
        await effect("order", world.aact)

    with pytest.raises(ConfigurationError, match="'order' is used twice at node@1"):
        await line(("node", node)).ainvoke({}, world.at())


async def test_another_run_of_the_thread_does_it_again_unless_the_scope_is_the_thread(
    world: World,
) -> None:
    async def node(_: State) -> Any:
        await effect("mine", world.aact, "run")
        await effect("ours", world.aact, "thread", scope="thread")
        return {}

    app = line(("node", node))
    await app.ainvoke({}, world.at("run-1"))
    await app.ainvoke({}, world.at("run-2"))
    assert world.done == ["run", "thread", "run"]


async def test_the_ticket_names_the_effect_and_the_epoch(world: World) -> None:
    tickets = []

    async def call() -> Any:
        tickets.append(current_effect())

    async def node(_: State) -> Any:
        await effect("order", call, peer=PEER)
        with pytest.raises(ConfigurationError, match="no effect is being done"):
            current_effect()
        return {}

    await line(("node", node)).ainvoke({}, world.at())
    (ticket,), (known,) = tickets, world.known()
    assert (ticket.sender_id, ticket.thread_id, ticket.run_id) == (AGENT, THREAD, RUN)
    assert (ticket.effect_key, ticket.name, ticket.epoch) == (known.key, "order", world.epoch)


@pytest.mark.parametrize("is_async", [True, False])
async def test_what_fails_is_in_doubt_and_asked_about_before_it_is_done_again(
    world: World,
    *,
    is_async: bool,
) -> None:
    failing: list[BaseException | None] = [TimeoutError("no answer")]

    async def anode(_: State) -> Any:
        fails = failing.pop() if failing else None
        return {"log": [await effect("order", world.aact, "4711", fails, peer=PEER)]}

    def node(_: State) -> Any:
        fails = failing.pop() if failing else None
        return {"log": [effect("order", world.act, "4711", fails, peer=PEER)]}

    app = line(("node", anode if is_async else node))
    with pytest.raises(TimeoutError):
        await app.ainvoke({}, world.at())
    assert [e.status for e in world.known()] == ["intent"]
    world.says, world.reply = "seen", {"ticket": 5}
    assert await app.ainvoke(None, world.at()) == {"log": [{"ticket": 5}]}
    assert world.done == ["4711"]
    ((about, key),) = world.asked
    assert (about.run_id, about.epoch) == (RUN, world.epoch)
    assert (key.effect_key, key.peer_id) == (world.known()[0].key, PEER)
    assert [(e.status, e.source) for e in world.known()] == [("done", "peer")]


async def test_what_the_peer_has_not_seen_is_done_again(world: World) -> None:
    failing: list[BaseException | None] = [TimeoutError("no answer")]

    async def node(_: State) -> Any:
        fails = failing.pop() if failing else None
        return {"log": [await effect("order", world.aact, "4711", fails, peer=PEER)]}

    app = line(("node", node))
    with pytest.raises(TimeoutError):
        await app.ainvoke({}, world.at())
    world.says = "not_seen"
    await app.ainvoke(None, world.at())
    assert world.done == ["4711", "4711"]
    assert [(e.status, e.source, e.attempt) for e in world.known()] == [("done", "own", 2)]


@pytest.mark.parametrize("says", [None, "cannot_tell"])
async def test_what_nobody_can_tell_is_not_done_again(world: World, says: Verdict | None) -> None:
    failing: list[BaseException | None] = [TimeoutError("no answer")]

    async def node(_: State) -> Any:
        fails = failing.pop() if failing else None
        return {"log": [await effect("order", world.aact, "4711", fails, peer=PEER)]}

    app = line(("node", node))
    with pytest.raises(TimeoutError):
        await app.ainvoke({}, world.at())
    world.says = says
    with pytest.raises(InDoubtError, match="Did 'order' reach inventory-agent") as caught:
        await app.ainvoke(None, world.at())
    assert not caught.value.is_final
    assert world.done == ["4711"]
    assert (world.known()[0].unknown_at is not None) == (says is not None)


async def test_the_caller_may_choose_to_do_it_again_or_to_fail(world: World) -> None:
    failing: list[BaseException | None] = [TimeoutError("no answer")]

    async def node(state: State) -> Any:
        fails = failing.pop() if failing else None
        return {
            "log": [await effect("order", world.aact, "4711", fails, if_unknown=state["given"])]
        }

    app = line(("node", node))
    with pytest.raises(TimeoutError):
        await app.ainvoke({"given": "fail"}, world.at())
    with pytest.raises(InDoubtError, match="names no peer") as caught:
        await app.ainvoke(None, world.at())
    assert caught.value.is_final
    await app.ainvoke(Command(update={"given": "retry"}), world.at())
    assert world.done == ["4711", "4711"]


async def test_what_is_named_as_not_done_is_done_again_unasked(world: World) -> None:
    failing: list[BaseException | None] = [ConnectionRefusedError("nobody there")]

    async def node(_: State) -> Any:
        fails = failing.pop() if failing else None
        told = await effect(
            "order", world.aact, "it", fails, peer=PEER, not_done_on=(ConnectionRefusedError,)
        )
        return {"log": [told["times"]]}

    app = line(("node", node))
    with pytest.raises(ConnectionRefusedError):
        await app.ainvoke({}, world.at())
    assert [(e.status, e.source) for e in world.known()] == [("not_done", "own")]
    assert await app.ainvoke(None, world.at()) == {"log": [2]}
    assert world.asked == []


@pytest.mark.parametrize(
    ("found", "times", "source"),
    [(Settled.happened("yes"), 1, "check"), (Settled.did_not_happen(), 2, "own")],
)
async def test_the_caller_can_look_itself(
    world: World, found: Settled, times: int, source: str
) -> None:
    failing: list[BaseException | None] = [TimeoutError("no answer")]
    looked = []

    async def look(ticket: Any) -> Settled:
        looked.append(ticket.name)
        return found

    async def node(_: State) -> Any:
        fails = failing.pop() if failing else None
        return {"log": [await effect("order", world.aact, "it", fails, check=look)]}

    app = line(("node", node))
    with pytest.raises(TimeoutError):
        await app.ainvoke({}, world.at())
    await app.ainvoke(None, world.at())
    assert (len(world.done), looked) == (times, ["order"])
    assert world.known()[0].source == source


async def test_a_look_that_finds_nothing_out_leaves_it_in_doubt(world: World) -> None:
    failing: list[BaseException | None] = [TimeoutError("no answer")]

    async def node(_: State) -> Any:
        fails = failing.pop() if failing else None
        look: Any = lambda _: Settled.unknown()  # noqa: E731
        return {"log": [await effect("order", world.aact, "it", fails, check=look)]}

    app = line(("node", node))
    with pytest.raises(TimeoutError):
        await app.ainvoke({}, world.at())
    with pytest.raises(InDoubtError):
        await app.ainvoke(None, world.at())
    assert world.known()[0].unknown_at is not None


async def test_a_superseded_owner_calls_nothing(world: World) -> None:
    async def node(_: State) -> Any:
        await effect("order", world.aact)

    place = world.at()
    world.claim("another-life", dead="one-life")
    with pytest.raises(StaleOwnerError, match="was not begun"):
        await line(("node", node)).ainvoke({}, place)
    assert world.done == []
    assert world.known() == []


async def test_a_successor_gets_the_outcome_under_its_own_epoch(world: World) -> None:
    dies = [True]

    async def node(_: State) -> Any:
        told = await effect("order", world.aact, peer=PEER)
        if dies.pop() if dies else False:
            raise DieError
        return {"log": [told["times"]]}

    app = line(("node", node))
    with pytest.raises(DieError):
        await app.ainvoke({}, world.at())
    world.claim("another-life", dead="one-life")
    assert await app.ainvoke(None, world.at()) == {"log": [1]}


async def test_a_late_outcome_does_not_overwrite_a_later_attempt(world: World) -> None:
    new = NewEffect(agent_id=AGENT, thread_id=THREAD, run_id=RUN, position="n@1", name="order")
    control, ours = world.control, {"epoch": world.epoch, "incarnation": world.incarnation}
    first = control.intend(new, **ours).effect  # type: ignore[arg-type]
    control.settle_effect(first, "not_seen", "peer")
    second = control.intend(new, **ours)  # type: ignore[arg-type]
    assert second.has_begun
    assert second.effect.attempt == 2
    control.conclude(first, "too late")
    assert control.effect(new) == second.effect
    control.conclude(second.effect, "in time")
    now = control.effect(new)
    assert now is not None
    assert now.outcome == "in time"


async def test_a_run_whose_ledger_was_lost_asks_before_anything_is_done(world: World) -> None:
    since = datetime(2026, 1, 2, tzinfo=UTC)

    async def node(_: State) -> Any:
        return {"log": [await effect("order", world.aact, peer=PEER)]}

    world.says, world.reply = "seen", "before"
    app = line(("node", node))
    told = await app.ainvoke({}, world.at(doubted_since=since))
    assert told == {"log": ["before"]}
    assert world.done == []
    assert world.asked[0][1].intent_at == since


async def test_an_outcome_that_is_no_json_is_said_and_stays_in_doubt(world: World) -> None:
    async def node(_: State) -> Any:
        await effect("order", object)

    with pytest.raises(ConfigurationError, match="'order' was done, and its outcome cannot"):
        await line(("node", node)).ainvoke({}, world.at())
    assert [e.status for e in world.known()] == ["intent"]


@pytest.mark.parametrize("key", ["", "x" * 201, "two\nlines", 5])
async def test_a_bad_key_is_refused_before_anything_is_done(world: World, key: Any) -> None:
    async def node(_: State) -> Any:
        await effect(key, world.aact)

    with pytest.raises(ConfigurationError, match="is no printable text"):
        await line(("node", node)).ainvoke({}, world.at())
    assert world.done == []


@pytest.mark.parametrize(
    ("terms", "error"),
    [
        ({"scope": "forever"}, "scope="),
        ({"if_unknown": "guess"}, "if_unknown="),
        ({"peer": "no such id!"}, "no legal id"),
    ],
)
def test_bad_terms_are_refused(terms: Any, error: str) -> None:
    with pytest.raises((ConfigurationError, ProtocolError), match=error):
        effect("order", **terms)


async def test_a_look_that_returns_something_else_is_refused(world: World) -> None:
    failing: list[BaseException | None] = [TimeoutError("no answer")]

    async def node(_: State) -> Any:
        fails = failing.pop() if failing else None
        check: Any = lambda _: True  # noqa: E731
        await effect("order", world.aact, "it", fails, check=check)

    app = line(("node", node))
    with pytest.raises(TimeoutError):
        await app.ainvoke({}, world.at())
    with pytest.raises(ConfigurationError, match="expected a Settled"):
        await app.ainvoke(None, world.at())


async def test_outside_of_an_owned_run_it_says_what_is_needed(world: World) -> None:
    async def node(_: State) -> Any:
        await effect("order", world.aact)

    with pytest.raises(ConfigurationError, match="`owned` or `own_runs`"):
        await line(("node", node)).ainvoke({}, {"configurable": {"thread_id": THREAD}})
    with pytest.raises(ConfigurationError, match="stands in no node"):
        effect("order", world.act)
    assert world.done == []


async def test_a_sync_function_that_returns_a_coroutine_is_refused(world: World) -> None:
    async def node(_: State) -> Any:
        effect("order", lambda: world.aact())  # noqa: PLW0108 - the function itself would do

    with pytest.raises(ConfigurationError, match="pass an async function"):
        await line(("node", node)).ainvoke({}, world.at())


async def test_partials_and_callable_objects_are_called_as_what_they_are(world: World) -> None:
    class Caller:
        async def __call__(self, what: str) -> Any:
            return await world.aact(what)

    async def node(_: State) -> Any:
        await effect("one", partial(world.aact, "one"))
        await effect("two", Caller(), "two")
        return {}

    await line(("node", node)).ainvoke({}, world.at())
    assert world.done == ["one", "two"]


async def test_effects_of_one_node_may_be_done_at_once(world: World) -> None:
    async def node(_: State) -> Any:
        doing: list[Awaitable[Any]] = [effect(f"o{i}", world.aact, i) for i in range(8)]
        return {"log": [told["done"] for told in await asyncio.gather(*doing)]}

    assert (await line(("node", node)).ainvoke({}, world.at()))["log"] == list(range(8))


async def test_a_database_that_fails_hands_the_run_over(world: World) -> None:
    async def node(_: State) -> Any:
        await effect("order", world.aact)

    place = world.at()
    world.control.close()
    with pytest.raises(CheckpointerError, match="effect ledger"):
        await line(("node", node)).ainvoke({}, place)
    assert world.done == []


async def test_nothing_of_it_is_kept_in_a_checkpoint(world: World) -> None:
    async def node(_: State) -> Any:
        await effect("order", world.aact)
        return {"n": 1}

    app = line(("node", node))
    await app.ainvoke({}, world.at())
    async for saved in app.checkpointer.alist({"configurable": {"thread_id": THREAD}}):
        assert "peerctx" not in str(saved.metadata)


async def test_whoever_is_cancelled_before_the_call_leaves_nothing_in_doubt(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LangGraph does with the siblings of a node that failed."""
    written, go_on = threading.Event(), threading.Event()
    intend = ControlDatabase.intend

    def slow(self: ControlDatabase, *arguments: Any, **named: Any) -> Any:
        standing = intend(self, *arguments, **named)
        written.set()
        assert go_on.wait(10)
        return standing

    monkeypatch.setattr(ControlDatabase, "intend", slow)

    async def node(_: State) -> Any:
        return {"log": [await effect("order", world.aact, peer=PEER)]}

    running = asyncio.ensure_future(line(("node", node)).ainvoke({}, world.at()))
    await asyncio.to_thread(written.wait, 10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    go_on.set()
    deadline = time.monotonic() + 10
    while [e.status for e in world.known()] != ["not_done"]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert world.done == []
