"""What LangGraph does, as far as resuming builds on it; an upgrade that changes it is seen here."""

import asyncio
import operator
from collections import Counter
from collections.abc import Callable
from contextvars import Context
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.types import ERROR
from langgraph.errors import EmptyInputError, InvalidUpdateError, NodeError
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.runtime import get_runtime
from langgraph.types import Command, Durability, interrupt
from reconstruction.savers import KilledError, Mortal

CONFIG: RunnableConfig = {"configurable": {"thread_id": "thread-1"}}


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]
    note: str


class Bench:
    """A workflow's nodes, how often each began, and the kills that are still to come."""

    def __init__(self, saver: Mortal) -> None:
        self.saver = saver
        self.began: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()

    def node(self, name: str, body: Callable[[], str] | None = None) -> Any:
        async def run(_state: State) -> dict[str, Any]:
            self.began[name] += 1
            text = body() if body else name
            await self.die_if_told(name)
            return {"log": [text]}

        return run

    async def die_if_told(self, name: str) -> None:
        if self.kills[name] > 0:
            self.kills[name] -= 1
            await self.saver.life.end_when_quiet()

    def graph(self, *edges: tuple[str, str], **nodes: Any) -> Any:
        builder = StateGraph(State)
        for name, node in nodes.items():
            builder.add_node(name, node)
        for start, end in edges:
            builder.add_edge(start, end)
        return builder.compile(checkpointer=self.saver)

    def fan_out(self) -> Any:
        return self.graph(
            (START, "left"),
            (START, "right"),
            left=self.node("left"),
            right=self.node("right"),
        )

    async def run(self, graph: Any, value: Any, *, durability: Durability = "sync") -> Any:
        """Run as a process that may be killed on the way."""
        try:
            return await graph.ainvoke(value, CONFIG, durability=durability)
        except KilledError:
            return None
        finally:
            self.saver.life.dead = False

    async def is_pending(self, note: str) -> bool:
        saved = await self.saver.aget_tuple(CONFIG)
        assert saved is not None
        return ("note", note) in [write[1:] for write in saved.pending_writes or ()]


@pytest.fixture
def bench(saver: Mortal) -> Bench:
    return Bench(saver)


async def test_command_update_keeps_what_a_finished_sibling_wrote(bench: Bench) -> None:
    graph = bench.fan_out()
    bench.kills["right"] = 1
    await bench.run(graph, {"log": ["in"]})

    result = await bench.run(graph, Command(update={"note": "from peers"}))

    assert result == {"log": ["in", "left", "right"], "note": "from peers"}
    assert bench.began == {"left": 1, "right": 2}


async def test_update_state_throws_away_what_a_finished_sibling_wrote(bench: Bench) -> None:
    graph = bench.fan_out()
    bench.kills["right"] = 1
    await bench.run(graph, {"log": ["in"]})

    await graph.aupdate_state(CONFIG, {"note": "from peers"}, as_node=START)
    await bench.run(graph, None)

    assert bench.began["left"] == 2


async def test_initial_state_sent_again_doubles_a_reducer_channel(bench: Bench) -> None:
    graph = bench.fan_out()
    bench.kills["right"] = 1
    await bench.run(graph, {"log": ["in"]})

    result = await bench.run(graph, {"log": ["in"]})

    assert result["log"].count("in") == 2


async def test_an_update_of_an_unknown_channel_is_dropped_with_a_log_line(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    graph = bench.fan_out()
    bench.kills["right"] = 1
    await bench.run(graph, {"log": ["in"]})

    result = await bench.run(graph, Command(update={"nowhere": "lost"}))

    assert "nowhere" not in result
    assert "unknown channel nowhere" in caplog.text


async def test_command_update_asks_an_open_question_again(bench: Bench) -> None:
    graph = bench.graph((START, "ask"), ask=bench.node("ask", lambda: str(interrupt("sure?"))))
    await bench.run(graph, {"log": ["in"]})

    result = await bench.run(graph, Command(update={"note": "from peers"}))

    assert [question.value for question in result["__interrupt__"]] == ["sure?"]
    assert bench.began["ask"] == 2


async def test_none_on_a_finished_thread_returns_the_old_result(bench: Bench) -> None:
    graph = bench.fan_out()
    first = await bench.run(graph, {"log": ["in"]})

    assert await bench.run(graph, None) == first
    assert bench.began == {"left": 1, "right": 1}


async def test_none_on_a_thread_without_a_checkpoint_is_an_error(bench: Bench) -> None:
    with pytest.raises(EmptyInputError):
        await bench.run(bench.fan_out(), None)


async def test_next_is_empty_before_the_last_superstep_is_committed(bench: Bench) -> None:
    graph = bench.fan_out()
    bench.kills["right"] = 1
    await bench.run(graph, {"log": ["in"]})
    saved = await bench.saver.aget_tuple(CONFIG)
    assert saved is not None
    snapshot = await graph.aget_state(CONFIG)
    right = next(item for item in snapshot.tasks if item.name == "right")
    await bench.saver.aput_writes(saved.config, [("log", ["right"])], right.id)

    snapshot = await graph.aget_state(CONFIG)

    assert snapshot.next == ()
    assert len(snapshot.tasks) == 2
    assert await bench.run(graph, None) == {"log": ["in", "left", "right"]}
    assert bench.began == {"left": 1, "right": 1}


async def test_exit_durability_leaves_nothing_of_a_killed_run(bench: Bench) -> None:
    graph = bench.fan_out()
    bench.kills["right"] = 1
    await bench.run(graph, {"log": ["in"]}, durability="exit")

    assert await bench.saver.aget_tuple(CONFIG) is None


async def test_after_a_lost_second_run_none_returns_the_first_runs_result(bench: Bench) -> None:
    graph = bench.fan_out()
    first = await bench.run(graph, {"log": ["in"]}, durability="exit")
    bench.kills["right"] = 1
    await bench.run(graph, {"log": ["again"]}, durability="exit")

    assert await bench.run(graph, None) == first


async def test_an_update_sent_twice_to_one_broken_step_makes_the_thread_unreadable(
    bench: Bench,
) -> None:
    graph = bench.fan_out()
    bench.kills["right"] = 2
    await bench.run(graph, {"log": ["in"]})
    await bench.run(graph, Command(update={"note": "once"}))

    # The run that fails at it may end before it is saved.
    async with asyncio.timeout(20):
        while not await bench.is_pending("twice"):
            with pytest.raises(InvalidUpdateError):
                await bench.run(graph, Command(update={"note": "twice"}))
    with pytest.raises(InvalidUpdateError):
        await bench.run(graph, None)
    with pytest.raises(InvalidUpdateError):
        await graph.aget_state(CONFIG)


async def test_an_update_sent_twice_doubles_a_reducer_channel(bench: Bench) -> None:
    graph = bench.fan_out()
    bench.kills["right"] = 2
    await bench.run(graph, {"log": ["in"]})
    await bench.run(graph, Command(update={"log": ["fact"]}))

    result = await bench.run(graph, Command(update={"log": ["fact"]}))

    assert result["log"].count("fact") == 2


async def test_a_pending_update_is_kept_by_none_over_three_attempts(bench: Bench) -> None:
    graph = bench.fan_out()
    bench.kills["right"] = 3
    await bench.run(graph, {"log": ["in"]})
    await bench.run(graph, Command(update={"log": ["fact"]}))
    await bench.run(graph, None)

    assert await bench.run(graph, None) == {"log": ["in", "fact", "left", "right"]}
    assert bench.began == {"left": 1, "right": 4}


async def test_the_same_run_id_resumes_and_does_nothing_once_finished(bench: Bench) -> None:
    graph = bench.fan_out()
    config: RunnableConfig = {**CONFIG, "metadata": {"run_id": "run-1"}}
    bench.kills["right"] = 1
    with pytest.raises(KilledError):
        await graph.ainvoke({"log": ["in"]}, config, durability="sync")
    bench.saver.life.dead = False

    resumed = await graph.ainvoke({"log": ["in"]}, config, durability="sync")
    again = await graph.ainvoke({"log": ["in"]}, config, durability="sync")

    assert resumed == again == {"log": ["in", "left", "right"]}
    assert bench.began == {"left": 1, "right": 2}


async def test_none_reads_the_answer_that_a_killed_node_had_received(bench: Bench) -> None:
    graph = bench.graph((START, "ask"), ask=bench.node("ask", lambda: str(interrupt("sure?"))))
    await bench.run(graph, {"log": ["in"]})
    bench.kills["ask"] = 1
    await bench.run(graph, Command(resume="yes"))

    assert await bench.run(graph, None) == {"log": ["in", "yes"]}


async def test_an_update_makes_langgraph_forget_an_answer_that_was_not_read(bench: Bench) -> None:
    graph = bench.graph((START, "ask"), ask=bench.node("ask", lambda: str(interrupt("sure?"))))
    await bench.run(graph, {"log": ["in"]})
    bench.kills["ask"] = 1
    await bench.run(graph, Command(resume="yes"))

    result = await bench.run(graph, Command(update={"note": "from peers"}))

    assert [question.value for question in result["__interrupt__"]] == ["sure?"]


def two_questions() -> str:
    return f"{interrupt('first?')} {interrupt('second?')}"


async def test_none_answers_the_second_question_with_the_first_answer(bench: Bench) -> None:
    graph = bench.graph((START, "ask"), ask=bench.node("ask", two_questions))
    await bench.run(graph, {"log": ["in"]})
    await bench.run(graph, Command(resume="yes"))

    assert await bench.run(graph, None) == {"log": ["in", "yes yes"]}


async def test_an_update_that_changes_nothing_makes_langgraph_forget_a_used_answer(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    graph = bench.graph((START, "ask"), ask=bench.node("ask", two_questions))
    await bench.run(graph, {"log": ["in"]})
    await bench.run(graph, Command(resume="yes"))

    for _ in range(3):
        result = await bench.run(graph, Command(update={ERROR: "used"}))
        assert [question.value for question in result["__interrupt__"]] == ["second?"]

    assert await bench.run(graph, Command(resume="no")) == {"log": ["in", "yes no"]}
    assert caplog.text == ""


async def test_a_static_breakpoint_looks_like_a_kill_and_an_update_runs_past_it(
    bench: Bench,
) -> None:
    builder = StateGraph(State)
    builder.add_node("pay", bench.node("pay"))
    builder.add_edge(START, "pay")
    graph: Any = builder.compile(checkpointer=bench.saver, interrupt_before=["pay"])
    await bench.run(graph, {"log": ["in"]})

    snapshot = await graph.aget_state(CONFIG)
    assert [(item.error, item.interrupts) for item in snapshot.tasks] == [(None, ())]
    await bench.run(graph, Command(update={"note": "from peers"}))

    assert bench.began["pay"] == 1


async def test_an_open_question_stays_open_while_a_dead_sibling_is_finished(bench: Bench) -> None:
    graph = bench.graph(
        (START, "ask"),
        (START, "work"),
        ask=bench.node("ask", lambda: str(interrupt("sure?"))),
        work=bench.node("work"),
    )
    bench.kills["work"] = 1
    await bench.run(graph, {"log": ["in"]})

    result = await bench.run(graph, Command(update={"note": "from peers"}))

    assert [question.value for question in result["__interrupt__"]] == ["sure?"]
    assert (await graph.aget_state(CONFIG)).next == ("ask",)


async def test_a_workflow_run_inside_a_node_carries_the_outer_thread_id(memory: Mortal) -> None:
    seen: list[Any] = []

    def look(_state: State, config: RunnableConfig) -> dict[str, Any]:
        seen.append(dict(config["metadata"]).get("outer"))
        return {"note": "done"}

    builder = StateGraph(State)
    builder.add_node("look", look)
    builder.add_edge(START, "look")
    inner: Any = builder.compile(checkpointer=memory)

    async def call(_state: State) -> dict[str, Any]:
        await inner.ainvoke({}, {"configurable": {"thread_id": "inner-1"}})
        loop = asyncio.get_running_loop()
        run = inner.ainvoke({}, {"configurable": {"thread_id": "inner-2"}})
        await loop.create_task(run, context=Context())
        return {}

    builder = StateGraph(State)
    builder.add_node("call", call)
    builder.add_edge(START, "call")
    await builder.compile().ainvoke({}, {"metadata": {"outer": "seen"}})

    assert seen == ["seen", None]


async def test_a_resumed_workflow_has_no_context(bench: Bench) -> None:
    contexts: list[object] = []

    async def read(_state: State) -> dict[str, Any]:
        contexts.append(get_runtime().context)
        await bench.die_if_told("read")
        return {"log": ["read"]}

    builder = StateGraph(State, context_schema=dict)
    builder.add_node("read", read)
    builder.add_edge(START, "read")
    graph: Any = builder.compile(checkpointer=bench.saver)
    bench.kills["read"] = 1
    with pytest.raises(KilledError):
        await graph.ainvoke({"log": ["in"]}, CONFIG, context={"user": "u1"}, durability="sync")
    bench.saver.life.dead = False

    await bench.run(graph, None)

    assert contexts == [{"user": "u1"}, None]


async def test_an_update_of_a_functional_workflow_is_dropped_with_a_log_line(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    @task
    async def step(number: int) -> int:
        bench.began["step"] += 1
        return number + 1

    @entrypoint(checkpointer=bench.saver)
    async def workflow(number: int) -> int:
        value = await step(number)
        await bench.die_if_told("workflow")
        return value

    bench.kills["workflow"] = 1
    await bench.run(workflow, 1)

    assert await bench.run(workflow, Command(update={"note": "from peers"})) == 2
    assert "unknown channel note" in caplog.text
    assert bench.began["step"] == 1


async def test_sync_durability_fails_in_a_subgraph_without_a_checkpointer(bench: Bench) -> None:
    builder = StateGraph(State)
    builder.add_node("work", lambda _state: {"note": "done"})
    builder.add_edge(START, "work")
    graph = bench.graph((START, "sub"), sub=builder.compile(checkpointer=False))

    with pytest.raises(AttributeError, match="_put_checkpoint_fut"):
        await bench.run(graph, {"log": ["in"]})
    assert (await bench.run(graph, None, durability="async"))["note"] == "done"


async def test_an_error_handler_that_raises_leaves_a_thread_that_looks_finished() -> None:
    """So the recovery graph uses none: an error that stops a recovery must be tried again."""

    class Plain(TypedDict, total=False):
        log: str

    def fail(_state: Plain) -> None:
        raise OSError("down")

    def pass_on(_state: Plain, error: NodeError) -> None:
        raise error.error

    builder = StateGraph(Plain)
    builder.add_node("fail", fail, error_handler=pass_on)
    builder.add_edge(START, "fail")
    app = builder.compile(checkpointer=InMemorySaver())
    config: RunnableConfig = {"configurable": {"thread_id": "1"}}
    with pytest.raises(OSError, match="down"):
        await app.ainvoke({"log": "in"}, config)

    assert (await app.aget_state(config)).tasks == ()
    assert await app.ainvoke(None, config) == {"log": "in"}
