"""A retried node stands where it stood: nothing is done again, and nothing is taken for another."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from durability.effect_world import (
    PEER,
    THREAD,
    State,
    World,
    line,
)
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import EmptyInputError, NodeTimeoutError
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.pregel._algo import LazyAtomicCounter
from langgraph.types import CachePolicy, Command, RetryPolicy, Send, TimeoutPolicy, interrupt

from langgraph_peerctx import effect
from langgraph_peerctx.durability.positions import _value_of
from langgraph_peerctx.errors import (
    ConfigurationError,
)


def retries(attempts: int, **more: Any) -> RetryPolicy:
    return RetryPolicy(max_attempts=attempts, jitter=False, retry_on=ConnectionError, **more)


def twice(error: type[Exception] = ConnectionError) -> RetryPolicy:
    return RetryPolicy(max_attempts=2, initial_interval=0.01, jitter=False, retry_on=error)


def fails_once() -> Callable[[], None]:
    fails = [True]

    def end() -> None:
        if fails.pop() if fails else False:
            raise ConnectionError

    return end


@pytest.mark.parametrize("saver", [True, False, None])
@pytest.mark.parametrize("is_called", [True, False])
async def test_a_retry_of_a_node_does_nothing_again_that_graphs_in_it_have_done(
    world: World, *, saver: bool | None, is_called: bool
) -> None:
    end = fails_once()

    async def place(_: State) -> Any:
        return {"log": [(await effect("order", world.aact, "one"))["done"]]}

    async def bill(_: State) -> Any:
        told = await effect("order", world.aact, "two")
        end()
        return {"log": [told["done"]]}

    nested = line(("place", place), ("bill", bill)).copy({"checkpointer": saver})

    async def called(_: State) -> Any:
        return await nested.ainvoke({})

    app = line(("sub", called if is_called else nested), retry_policy=twice())
    assert (await app.ainvoke({}, world.at()))["log"] == ["one", "two"]
    assert world.done == ["one", "two"]
    assert [e.position for e in world.known()] == ["sub@1/place@1", "sub@1/bill@2"]


async def test_a_retry_counts_the_graphs_that_it_calls_as_the_attempt_before_it(
    world: World,
) -> None:
    """Also where the first of them ends before its first node."""
    end, breaks = fails_once(), [True]

    async def place(state: State) -> Any:
        return {"log": [(await effect("order", world.aact, state["n"]))["done"]]}

    nested = line(("place", place)).copy({"checkpointer": None})

    async def node(_: State) -> Any:
        given: Any = {"n": 1}
        if breaks.pop() if breaks else False:
            given = None
        first = await nested.ainvoke(given)
        second = await nested.ainvoke({"n": 2})
        end()
        return {"log": [*first["log"], *second["log"]]}

    def is_broken(error: Exception) -> bool:
        return isinstance(error, ConnectionError | EmptyInputError)

    policy = RetryPolicy(max_attempts=3, initial_interval=0.01, jitter=False, retry_on=is_broken)
    app = line(("node", node), retry_policy=policy)
    assert (await app.ainvoke({}, world.at()))["log"] == [1, 2]
    assert world.done == [1, 2]
    assert [e.position for e in world.known()] == ["node@1/place@1", "node@1+1/place@1"]


@pytest.mark.parametrize("is_entrypoint", [True, False])
async def test_a_retry_does_nothing_again_that_its_tasks_have_done(
    world: World, *, is_entrypoint: bool
) -> None:
    end = fails_once()

    @task
    async def order(number: int) -> Any:
        return (await effect("order", world.aact, number))["done"]

    async def all_orders() -> Any:
        found = await asyncio.gather(*(order(number) for number in range(3)))
        end()
        return found

    if is_entrypoint:

        @entrypoint(checkpointer=InMemorySaver(), retry_policy=twice())
        async def flow(_: int) -> Any:
            return await all_orders()

        assert await flow.ainvoke(0, world.at()) == [0, 1, 2]
        caller = "flow@0"
    else:

        async def node(_: State) -> Any:
            return {"log": await all_orders()}

        app = line(("node", node), retry_policy=twice())
        assert (await app.ainvoke({}, world.at()))["log"] == [0, 1, 2]
        caller = "node@1"
    assert sorted(world.done) == [0, 1, 2]
    step = caller.partition("@")[2]
    assert {e.position for e in world.known()} == {
        f"{caller}/order@{step}({number})" for number in range(3)
    }


def test_a_retry_of_sync_tasks_in_threads_does_nothing_again(world: World) -> None:
    end = fails_once()

    @task
    def order(number: int) -> Any:
        time.sleep(0.01 * (5 - number))  # the last is the first to be done
        return effect("order", world.act, number)["done"]

    @entrypoint(checkpointer=InMemorySaver(), retry_policy=twice())
    def flow(_: int) -> Any:
        found = [future.result() for future in [order(number) for number in range(5)]]
        end()
        return found

    assert flow.invoke(0, world.at()) == [0, 1, 2, 3, 4]
    assert sorted(world.done) == [0, 1, 2, 3, 4]


async def test_what_a_failed_attempt_has_called_stands_where_the_next_one_calls_it(
    world: World,
) -> None:
    """It is still at work while its caller is tried again."""
    second, go_on = asyncio.Event(), asyncio.Event()

    async def slow(number: int) -> Any:
        await go_on.wait()
        return await world.aact(number)

    @task
    async def order(number: int) -> Any:
        return (await effect("order", slow, number))["done"]

    @entrypoint(checkpointer=InMemorySaver(), retry_policy=twice())
    async def flow(_: int) -> Any:
        doing = order(7)
        await asyncio.sleep(0.05)
        if not second.is_set():
            second.set()
            raise ConnectionError
        go_on.set()
        return await doing

    assert await flow.ainvoke(0, world.at()) == 7
    assert world.done == [7]


async def test_graphs_with_checkpoints_of_their_own_that_run_side_by_side_are_told_apart(
    world: World,
) -> None:
    """All three have one namespace, `work`."""

    async def inner(state: State) -> Any:
        await asyncio.sleep(0.01)
        return {"log": [(await effect("order", world.aact, state["n"]))["done"]]}

    nested = line(("inner", inner)).copy({"checkpointer": True})

    async def work(state: State) -> Any:
        await nested.ainvoke({"n": state["n"]})
        return {}

    builder = StateGraph(State)
    builder.add_node("work", work)
    builder.add_conditional_edges(
        START, lambda _: [Send("work", {"n": n}) for n in range(3)], ["work"]
    )
    await builder.compile(checkpointer=InMemorySaver()).ainvoke({}, world.at())
    assert sorted(world.done) == [0, 1, 2]
    assert {e.position for e in world.known()} == {f"work@1[{n}]/inner@1" for n in range(3)}


@pytest.mark.parametrize("saver", [True, None])
async def test_a_node_may_have_any_name(world: World, *, saver: bool | None) -> None:
    async def inner(state: State) -> Any:
        return {"log": [(await effect("order", world.aact, state["n"]))["done"]]}

    nested = line(("2", inner)).copy({"checkpointer": saver})

    async def twice_called(_: State) -> Any:
        return {"log": [(await nested.ainvoke({"n": n}))["log"][-1] for n in (1, 2)]}

    app = line(("1", twice_called))
    await app.ainvoke({}, world.at())
    assert world.done == [1, 2]
    assert [e.position for e in world.known()] == ["1@1/2@1", "1@1+1/2@1"]


async def test_a_task_may_have_any_name(world: World) -> None:
    @task(name="a|b:c")
    async def order() -> Any:
        return (await effect("order", world.aact))["done"]

    @entrypoint(checkpointer=InMemorySaver())
    async def flow(_: int) -> Any:
        return await order()

    assert await flow.ainvoke(0, world.at()) == "it"
    assert [e.position for e in world.known()] == ["flow@0/a%7Cb%3Ac@0(0)"]


@pytest.mark.parametrize("is_refused", [True, False])
async def test_a_node_may_itself_try_again_what_has_failed(
    world: World, *, is_refused: bool
) -> None:
    """As the retries of tools do. What is in doubt is asked about first."""
    world.says, world.reply = "seen", {"number": 7}
    fails = [ConnectionRefusedError() if is_refused else TimeoutError()]

    async def send(what: str) -> Any:
        return await world.aact(what, fails.pop() if fails else None)

    async def node(_: State) -> Any:
        send_once = partial(
            effect, "order", send, "4711", peer=PEER, not_done_on=[ConnectionRefusedError]
        )
        try:
            return {"log": [await send_once()]}
        except OSError:
            return {"log": [await send_once()]}

    told = await line(("node", node)).ainvoke({}, world.at())
    if is_refused:
        assert told == {"log": [{"done": "4711", "times": 2}]}
        assert world.asked == []
    else:
        assert told == {"log": [{"number": 7}]}
        assert world.done == ["4711"]


@pytest.mark.parametrize("same_key", [True, False])
async def test_graphs_side_by_side_in_a_retried_node_are_told_apart(
    world: World, *, same_key: bool
) -> None:
    """The one that began second comes to its effect first."""
    end = fails_once()

    async def inner(state: State) -> Any:
        await asyncio.sleep(0 if state["n"] == 2 else 0.05)
        key = "order" if same_key else f"order {state['n']}"
        return {"log": [(await effect(key, world.aact, state["n"]))["done"]]}

    nested = line(("inner", inner)).copy({"checkpointer": None})

    async def node(_: State) -> Any:
        found = await asyncio.gather(nested.ainvoke({"n": 1}), nested.ainvoke({"n": 2}))
        end()
        return {"log": [one["log"][0] for one in found]}

    app = line(("node", node), retry_policy=twice())
    assert (await app.ainvoke({}, world.at()))["log"] == [1, 2]
    assert sorted(world.done) == [1, 2]


@pytest.mark.parametrize("kind", ["graph", "task"])
async def test_an_attempt_that_has_timed_out_and_still_cleans_up_is_another_one(
    world: World, kind: str
) -> None:
    attempts: list[int] = []

    async def inner(_: State) -> Any:
        return {"log": [(await effect("order", world.aact, "4711"))["done"]]}

    nested = line(("inner", inner)).copy({"checkpointer": None})

    @task
    async def order() -> Any:
        return (await effect("order", world.aact, "4711"))["done"]

    async def node(_: State) -> Any:
        attempts.append(len(attempts))
        is_first = len(attempts) == 1
        try:
            await (nested.ainvoke({}) if kind == "graph" else order())
            own = await effect("bill", world.aact, "bill")
            if is_first:
                await asyncio.sleep(60)
            return {"log": [own["done"]]}
        finally:
            if is_first:
                await asyncio.sleep(1)  # longer than the next attempt takes

    builder = StateGraph(State)
    builder.add_node(
        "node",
        node,
        timeout=TimeoutPolicy(run_timeout=5),
        retry_policy=twice(NodeTimeoutError),
    )
    builder.add_edge(START, "node")
    app = builder.compile(checkpointer=InMemorySaver())
    assert (await app.ainvoke({}, world.at()))["log"] == ["bill"]
    assert len(attempts) == 2
    assert world.done == ["4711", "bill"]
    await asyncio.sleep(1)  # until the first one is over


async def test_what_an_attempt_has_left_running_does_not_take_the_place_of_the_next(
    world: World,
) -> None:
    second, over, is_first = asyncio.Event(), asyncio.Event(), [True]

    async def fails(_: Any) -> None:
        await asyncio.sleep(0)
        raise ConnectionError

    async def lasts(_: Any) -> None:
        await second.wait()

    async def ends(_: Any) -> None:
        over.set()

    async def node(_: State) -> Any:
        if is_first.pop() if is_first else False:
            left = RunnableLambda(lasts) | RunnableLambda(ends)
            await asyncio.gather(RunnableLambda(fails).ainvoke(1), left.ainvoke(2))
        one = await effect("order", world.aact, "order")
        second.set()
        await over.wait()
        await asyncio.sleep(0.01)
        other = await effect("bill", world.aact, "bill")
        return {"log": [one["done"], other["done"]]}

    app = line(("node", node), retry_policy=twice())
    async with asyncio.timeout(10):
        assert (await app.ainvoke({}, world.at()))["log"] == ["order", "bill"]
    assert [e.position for e in world.known()] == ["node@1", "node@1"]


async def test_each_of_many_nodes_may_fail_before_any_is_tried_again(world: World) -> None:
    failed: set[int] = set()

    @task
    async def order(number: int) -> Any:
        return (await effect("order", world.aact, number))["done"]

    async def work(state: State) -> Any:
        done = await order(state["n"])
        if state["n"] not in failed:
            failed.add(state["n"])
            raise ConnectionError
        return {"log": [done]}

    many = 250
    builder = StateGraph(State)
    builder.add_node("work", work, retry_policy=retries(2, initial_interval=2))
    builder.add_conditional_edges(
        START, lambda _: [Send("work", {"n": n}) for n in range(many)], ["work"]
    )
    await builder.compile(checkpointer=InMemorySaver()).ainvoke({}, world.at())
    assert sorted(world.done) == [*range(many)]


async def test_a_retry_whose_place_cannot_be_known_is_refused_and_goes_on_anew(
    world: World,
) -> None:
    """The attempt before it was answered from what an earlier one had written."""
    flaky = [True]

    @task
    async def order() -> Any:
        return (await effect("order", world.aact, "4711"))["done"]

    @entrypoint(checkpointer=InMemorySaver(), retry_policy=twice())
    async def flow(_: int) -> Any:
        placed = await order()
        answer = interrupt("ship it?")
        if flaky.pop() if flaky else False:
            raise ConnectionError
        return [placed, answer]

    await flow.ainvoke(0, world.at())
    with pytest.raises(ConfigurationError, match="go on with ainvoke"):
        await flow.ainvoke(Command(resume="yes"), world.at())
    assert world.done == ["4711"]
    assert await flow.ainvoke(None, world.at()) == ["4711", "yes"]
    assert world.done == ["4711"]


async def test_what_comes_from_a_cache_counts_in_each_attempt(world: World) -> None:
    end = fails_once()

    @task(cache_policy=CachePolicy())
    async def looks(what: str) -> str:
        return what

    @task
    async def order(what: str) -> Any:
        return (await effect("order", world.aact, what))["done"]

    cache = InMemoryCache[Any]()

    @entrypoint(checkpointer=InMemorySaver(), retry_policy=twice(), cache=cache)
    async def flow(what: str) -> Any:
        found = await order(await looks(what))
        end()
        return found

    await looks_once(looks, cache)
    assert await flow.ainvoke("4711", world.at()) == "4711"
    assert world.done == ["4711"]


async def looks_once(looks: Any, cache: Any) -> None:
    """Fill the cache, as another run does."""

    @entrypoint(cache=cache)
    async def other(what: str) -> str:
        return str(await looks(what))

    assert await other.ainvoke("4711") == "4711"


async def test_a_name_is_used_again_only_for_the_same(world: World) -> None:
    """Of what failed nobody knows whether it came: another order is not that one."""
    world.says, world.reply = "seen", {"order": "shoes"}

    async def send(what: str) -> Any:
        world.done.append(what)
        raise TimeoutError

    async def node(_: State) -> Any:
        with pytest.raises(TimeoutError):
            await effect("order", send, "shoes", peer=PEER)
        with pytest.raises(ConfigurationError, match="used twice at node@1"):
            await effect("order", send, "hat", peer=PEER)
        return {"log": [await effect("order", send, "shoes", peer=PEER)]}

    assert (await line(("node", node)).ainvoke({}, world.at()))["log"] == [{"order": "shoes"}]
    assert world.done == ["shoes"]


@pytest.mark.parametrize("saver", [True, None])
async def test_graphs_in_tools_that_are_called_side_by_side_are_told_apart(
    world: World, *, saver: bool | None
) -> None:
    async def inner(state: State) -> Any:
        return {"log": [(await effect("order", world.aact, state["n"]))["done"]]}

    nested = line(("inner", inner)).copy({"checkpointer": saver})

    @tool
    async def ask(number: int) -> str:
        """Ask a subagent."""
        return str((await nested.ainvoke({"n": number}))["log"][-1])

    async def work(state: State) -> Any:
        return {"log": [await ask.ainvoke({"number": state["n"]})]}

    builder = StateGraph(State)
    builder.add_node("work", work)
    builder.add_conditional_edges(
        START, lambda _: [Send("work", {"n": n}) for n in range(3)], ["work"]
    )
    found = await builder.compile(checkpointer=InMemorySaver()).ainvoke({}, world.at())
    assert sorted(found["log"]) == ["0", "1", "2"]
    assert sorted(world.done) == [0, 1, 2]


def test_langgraphs_counters_can_be_read_without_counting() -> None:
    """What a node has called is counted by these; see `positions`."""
    counter = LazyAtomicCounter()
    assert _value_of(counter) == 0
    assert [counter(), counter()] == [0, 1]
    assert [_value_of(counter), _value_of(counter), counter()] == [2, 2, 2]
    assert _value_of(lambda: 7) is None


async def test_a_run_leaves_nothing_behind(world: World) -> None:
    end = fails_once()

    async def inner(_: State) -> Any:
        return {"log": [(await effect("order", world.aact))["done"]]}

    nested = line(("inner", inner)).copy({"checkpointer": None})

    async def node(_: State) -> Any:
        await nested.ainvoke({})
        end()
        return {}

    effects = world.effects()
    place: Any = {"configurable": {"thread_id": THREAD}}
    await line(("node", node), retry_policy=twice()).ainvoke({}, effects.go_along(place))
    positions = effects._positions
    assert positions._parents == {}
    assert positions._nodes == {}
    assert positions._executions == {}
    assert positions._failed == {}
