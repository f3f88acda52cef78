"""An effect is done once at its place in the run, and what is in doubt is never guessed."""

import asyncio
import threading
import time
from collections.abc import Awaitable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from durability.effect_world import (
    AGENT,
    PEER,
    RUN,
    THREAD,
    DieError,
    State,
    World,
    line,
)
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, RetryPolicy, Send, interrupt

from langgraph_peerctx import Settled, current_effect, effect
from langgraph_peerctx.errors import (
    CheckpointerError,
    ConfigurationError,
    InDoubtError,
    ProtocolError,
    StaleOwnerError,
)
from langgraph_peerctx.persistence.effect_ledger import NewEffect
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.protocol.messages import Verdict


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


@pytest.mark.parametrize("saver", [True, False, None])
@pytest.mark.parametrize("is_called", [True, False])
async def test_a_graph_with_checkpoints_of_its_own_has_an_effect_each_time(
    world: World, *, saver: bool | None, is_called: bool
) -> None:
    """Its namespace has no task ids above it: `sub|inner:task`."""

    async def inner(state: State) -> Any:
        await effect("order", world.aact, state["n"])
        return {"n": state["n"] + 1}

    builder = StateGraph(State)
    builder.add_node("inner", inner)
    builder.add_edge(START, "inner")
    nested = builder.compile(checkpointer=saver)

    async def called(state: State) -> Any:
        return await nested.ainvoke({"n": state["n"]})

    builder = StateGraph(State)
    builder.add_node("sub", called if is_called else nested)
    builder.add_edge(START, "sub")
    builder.add_conditional_edges("sub", lambda s: "sub" if s["n"] < 3 else END)
    await builder.compile(checkpointer=InMemorySaver()).ainvoke({"n": 0}, world.at())
    assert world.done == [0, 1, 2]
    inner_steps = (1, 4, 7) if saver is True else (1, 1, 1)  # it goes on from its own checkpoint
    assert [e.position for e in world.known()] == [
        f"sub@{n + 1}/inner@{step}" for n, step in enumerate(inner_steps)
    ]


async def test_a_graph_with_checkpoints_of_its_own_goes_on_at_the_same_place(world: World) -> None:
    dies = [True]

    async def inner(state: State) -> Any:
        told = await effect("order", world.aact, state["n"])
        if dies.pop() if dies else False:
            raise DieError
        return {"log": [told["times"]]}

    builder = StateGraph(State)
    builder.add_node("inner", inner)
    builder.add_edge(START, "inner")
    nested = builder.compile(checkpointer=True)

    async def twice(_: State) -> Any:
        first, second = await nested.ainvoke({"n": 1}), await nested.ainvoke({"n": 2})
        return {"log": [*first["log"], *second["log"]]}

    app = line(("sub", twice))
    with pytest.raises(DieError):
        await app.ainvoke({}, world.at())
    await app.ainvoke(None, world.at())
    assert world.done == [1, 2]
    assert [e.position for e in world.known()] == ["sub@1/inner@1", "sub@1+1/inner@1"]


@pytest.mark.parametrize("is_refuted", [True, False])
async def test_what_came_of_it_is_written_down_whoever_is_cancelled_meanwhile(
    world: World, *, is_refuted: bool
) -> None:
    """Others are busy with the database at that moment."""
    go_on, called = threading.Event(), asyncio.Event()

    async def act() -> Any:
        for _ in range(40):
            world.control.later(lambda: go_on.wait(10))
        called.set()
        if is_refuted:
            raise ConnectionRefusedError
        return {"number": 7}

    async def node(_: State) -> Any:
        return {"log": [await effect("order", act, not_done_on=[ConnectionRefusedError])]}

    running = asyncio.ensure_future(line(("node", node)).ainvoke({}, world.at()))
    await called.wait()
    for _ in range(2):
        await asyncio.sleep(0.05)
        running.cancel()
    asyncio.get_running_loop().call_later(0.1, go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await running
    (known,) = world.known()
    assert (known.status, known.outcome) == (
        ("not_done", None) if is_refuted else ("done", {"number": 7})
    )


async def test_an_outcome_that_cannot_be_written_while_the_caller_is_cancelled_is_said(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    called = asyncio.Event()

    async def act() -> Any:
        world.control.close()
        called.set()

    async def node(_: State) -> Any:
        await effect("order", act)

    running = asyncio.ensure_future(line(("node", node)).ainvoke({}, world.at()))
    await called.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert "what came of an effect is not written down" in caplog.text


async def test_a_second_attempt_that_was_not_done_leaves_the_first_in_doubt(world: World) -> None:
    failing: list[BaseException | None] = [ConnectionRefusedError("no"), TimeoutError("maybe")]

    async def node(_: State) -> Any:
        fails = failing.pop() if failing else None
        call = partial(world.aact, "it", fails)
        refused = (ConnectionRefusedError,)
        await effect("order", call, if_unknown="retry", not_done_on=refused, peer=PEER)

    app = line(("node", node))
    with pytest.raises(TimeoutError):
        await app.ainvoke({}, world.at())
    with pytest.raises(ConnectionRefusedError):
        await app.ainvoke(None, world.at())
    assert [(e.status, e.attempt) for e in world.known()] == [("intent", 2)]
    world.says = "seen"
    await app.ainvoke(None, world.at())
    assert world.done == ["it", "it"]


async def test_a_peer_that_cannot_tell_is_not_taken_for_a_look_in_vain(world: World) -> None:
    failing: list[BaseException | None] = [TimeoutError("no answer")]
    unknown_to: list[str | None] = []

    async def look(_ticket: Any) -> Settled:
        unknown_to.append(world.known()[0].unknown_to)
        return Settled.unknown()

    async def node(_: State) -> Any:
        fails = failing.pop() if failing else None
        await effect("order", world.aact, "it", fails, peer=PEER, check=look)

    app = line(("node", node))
    with pytest.raises(TimeoutError):
        await app.ainvoke({}, world.at())
    assert world.known()[0].unknown_to is None
    world.says = "cannot_tell"
    with pytest.raises(InDoubtError):
        await app.ainvoke(None, world.at())
    assert unknown_to == ["peer"]
    assert world.known()[0].unknown_to == "check"


def two_at_once(one: Any, other: Any) -> Any:
    builder = StateGraph(State)
    for name, node in (("one", one), ("other", other)):
        builder.add_node(name, node)
        builder.add_edge(START, name)
    return builder.compile(checkpointer=InMemorySaver())


async def test_of_two_nodes_at_once_with_one_key_the_second_waits_for_the_first(
    world: World,
) -> None:
    async def slow() -> Any:
        await asyncio.sleep(0.1)
        return world.act()

    async def node(_: State) -> Any:
        return {"log": [await effect("order", slow, scope="thread")]}

    told = await two_at_once(node, node).ainvoke({}, world.at())
    assert told["log"] == [{"done": "it", "times": 1}] * 2
    assert len(world.done) == 1


def test_in_sync_nodes_too(world: World) -> None:
    def slow() -> Any:
        time.sleep(0.1)
        return world.act()

    def node(_: State) -> Any:
        return {"log": [effect("order", slow, scope="thread")]}

    told = two_at_once(node, node).invoke({}, world.at())
    assert told["log"] == [{"done": "it", "times": 1}] * 2
    assert len(world.done) == 1


async def test_what_the_first_leaves_in_doubt_the_second_asks_about(world: World) -> None:
    fails: list[BaseException | None] = [TimeoutError("maybe")]

    async def slow() -> Any:
        await asyncio.sleep(0.1)
        return world.act("it", fails.pop() if fails else None)

    async def node(_: State) -> Any:
        try:
            return {"log": [await effect("order", slow, scope="thread", peer=PEER)]}
        except TimeoutError:
            return {"log": ["in time"]}

    world.says, world.reply = "seen", "the peer's"
    told = await two_at_once(node, node).ainvoke({}, world.at())
    assert sorted(told["log"]) == ["in time", "the peer's"]
    assert len(world.done) == 1


async def test_who_waits_may_be_cancelled_and_the_first_goes_on(world: World) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> Any:
        begun.set()
        await go_on.wait()
        return world.act()

    async def node(_: State) -> Any:
        first = asyncio.ensure_future(effect("order", slow, scope="thread"))
        await begun.wait()
        return {"log": [await first]}

    async def impatient(_: State) -> Any:
        await begun.wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await effect("order", slow, scope="thread")
        go_on.set()
        return {}

    told = await two_at_once(node, impatient).ainvoke({}, world.at())
    assert told["log"] == [{"done": "it", "times": 1}]


async def test_where_waiting_might_never_end_it_is_refused(world: World) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> Any:
        begun.set()
        await go_on.wait()
        return world.act()

    async def node(_: State) -> Any:
        return {"log": [await effect("order", slow, scope="thread")]}

    async def refused() -> None:
        with pytest.raises(ConfigurationError, match="is being done at this moment"):
            await effect("order", world.aact, scope="thread")

    async def inside_of_another_effect(_: State) -> Any:
        await begun.wait()
        await effect("another", refused)
        go_on.set()
        return {}

    told = await two_at_once(node, inside_of_another_effect).ainvoke({}, world.at())
    assert told["log"] == [{"done": "it", "times": 1}]
    begun.clear()
    go_on.clear()

    async def again(_: State) -> Any:
        return {"log": [await effect("order-2", slow, scope="thread")]}

    async def blocking_the_loop(_: State) -> Any:
        await begun.wait()
        with pytest.raises(ConfigurationError, match="is being done at this moment"):
            effect("order-2", world.act, scope="thread")
        go_on.set()
        return {}

    told = await two_at_once(again, blocking_the_loop).ainvoke({}, world.at("run-2"))
    assert told["log"] == [{"done": "it", "times": 2}]


@pytest.mark.parametrize("wrong", ["ValueError", ValueError, [ValueError, "x"], (ValueError(),), 5])
def test_what_is_no_exception_class_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"not_done_on=.*expected a tuple of exception"):
        effect("order", not_done_on=wrong)


async def test_the_exceptions_may_stand_in_a_list(world: World) -> None:
    async def node(_: State) -> Any:
        call = partial(world.aact, "it", ConnectionRefusedError())
        await effect("order", call, not_done_on=[ConnectionRefusedError])

    with pytest.raises(ConnectionRefusedError):
        await line(("node", node)).ainvoke({}, world.at())
    assert [e.status for e in world.known()] == ["not_done"]


async def test_a_run_knows_which_of_its_effects_have_no_outcome(world: World) -> None:
    async def node(_: State) -> Any:
        await effect("done", world.aact)
        for name, fails in (("not done", ConnectionRefusedError()), ("unclear", TimeoutError())):
            with pytest.raises(type(fails)):
                await effect(name, world.aact, "x", fails, not_done_on=(ConnectionRefusedError,))
        return {}

    effects = world.effects()
    place: Any = {"configurable": {"thread_id": THREAD}}
    await line(("node", node)).ainvoke({}, effects.go_along(place))
    (left,) = effects.unsettled
    assert left.name == "unclear"
    effects.settle(left, "not_seen", "peer")
    assert effects.unsettled == []
