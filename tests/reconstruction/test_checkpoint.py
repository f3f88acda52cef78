import asyncio
import operator
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.func import entrypoint
from langgraph.graph import START, StateGraph
from langgraph.types import Command, Send, interrupt
from reconstruction.savers import KilledError, Mortal

from langgraph_peerctx.errors import (
    ConfigurationError,
    RecoveryError,
    StoreBusyError,
    StoreError,
)
from langgraph_peerctx.reconstruction import checkpoint
from langgraph_peerctx.reconstruction.checkpoint import CheckpointView, load_checkpoint

CONFIG: RunnableConfig = {"configurable": {"thread_id": "thread-1"}}


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


class Bench:
    """Builds workflows whose nodes ask, fail, or die, as their names say."""

    def __init__(self, saver: Mortal) -> None:
        self.saver = saver
        self.armed = True
        self.answered = asyncio.Event()

    async def node(self, name: str) -> list[str]:
        if name.startswith("ask"):
            return [f"{name} {interrupt(name)}"]
        if name.startswith("twice"):
            return [f"{interrupt('first')} {interrupt('second')}"]
        if self.armed and name.startswith("die"):
            await self.saver.life.end_when_quiet()
        if self.armed and name.startswith("fail"):
            raise RuntimeError(name)
        return [name]

    def builder(self, *names: str, parallel: bool = True) -> StateGraph[Any]:
        builder = StateGraph(State)
        for name in names:

            async def run(_state: State, name: str = name) -> dict[str, Any]:
                return {"log": await self.node(name)}

            builder.add_node(name, run)
        for before, name in zip((START, *names), names, strict=False):
            builder.add_edge(START if parallel else before, name)
        return builder

    def graph(self, *names: str, parallel: bool = True, **options: Any) -> Any:
        return self.builder(*names, parallel=parallel).compile(checkpointer=self.saver, **options)

    async def run(self, graph: Any, value: Any = None) -> None:
        try:
            await graph.ainvoke({"log": ["in"]} if value is None else value, CONFIG)
        except (KilledError, RuntimeError):
            pass
        finally:
            self.saver.life.dead = False

    async def view_after(self, graph: Any, *inputs: Any) -> CheckpointView:
        for value in inputs or (None,):
            await self.run(graph, value)
        return await load_checkpoint(graph, CONFIG)


@pytest.fixture
def bench(saver: Mortal) -> Bench:
    return Bench(saver)


def states(view: CheckpointView) -> dict[str, str]:
    return {task.name: task.state for task in view.tasks}


async def test_a_thread_nobody_knows_has_no_checkpoint(bench: Bench) -> None:
    view = await load_checkpoint(bench.graph("work"), CONFIG)

    assert view.status == "no_checkpoint"
    assert not view.exists
    assert view.has_checkpointer
    assert view.channels == {"log"}


@pytest.mark.parametrize("checkpointer", [None, True, False])
async def test_a_workflow_may_have_no_checkpointer(memory: Mortal, checkpointer: Any) -> None:
    graph: Any = Bench(memory).builder("work").compile(checkpointer=checkpointer)

    view = await load_checkpoint(graph, CONFIG)

    assert view.status == "no_checkpointer"
    assert not view.has_checkpointer


async def test_a_finished_thread_is_finished(bench: Bench) -> None:
    view = await bench.view_after(bench.graph("work"))

    assert view.status == "finished"
    assert view.values == {"log": ["in", "work"]}
    assert view.next_nodes == ()


async def test_a_killed_node_leaves_work(bench: Bench) -> None:
    view = await bench.view_after(bench.graph("die", "work"))

    assert view.status == "interrupted_work"
    assert states(view) == {"die": "unfinished", "work": "finished"}
    assert view.next_nodes == ("die",)
    assert view.values == {"log": ["in", "work"]}


async def test_a_node_that_raised_leaves_work_and_its_error(bench: Bench) -> None:
    view = await bench.view_after(bench.graph("fail"))

    assert view.status == "interrupted_work"
    assert view.tasks[0].error == "RuntimeError('fail')"


async def test_a_superstep_that_finished_and_was_not_committed_is_work(bench: Bench) -> None:
    graph = bench.graph("die", "work")
    await bench.run(graph)
    saved = await bench.saver.aget_tuple(CONFIG)
    snapshot = await graph.aget_state(CONFIG)
    assert saved is not None
    died = next(task for task in snapshot.tasks if task.name == "die")
    await bench.saver.aput_writes(saved.config, [("log", ["die"])], died.id)

    view = await load_checkpoint(graph, CONFIG)

    assert view.next_nodes == ()
    assert view.status == "interrupted_work"


async def test_a_question_waits_for_a_human(bench: Bench) -> None:
    view = await bench.view_after(bench.graph("ask", "work"))

    assert view.status == "waiting_for_human"
    assert states(view) == {"ask": "asking", "work": "finished"}
    assert len(view.tasks[0].question_ids) == 1


async def test_a_dead_task_beside_a_question_is_work(bench: Bench) -> None:
    view = await bench.view_after(bench.graph("ask", "die"))

    assert view.status == "interrupted_work"
    assert states(view) == {"ask": "asking", "die": "unfinished"}


async def test_two_questions_wait_for_a_human(bench: Bench) -> None:
    view = await bench.view_after(bench.graph("ask_a", "ask_b"))

    assert view.status == "waiting_for_human"
    assert states(view) == {"ask_a": "asking", "ask_b": "asking"}


async def test_the_second_question_of_a_node_waits_for_a_human(bench: Bench) -> None:
    view = await bench.view_after(bench.graph("twice"), None, Command(resume="yes"))

    assert view.status == "waiting_for_human"
    assert view.answer.state == "used"


async def test_an_answer_that_a_dead_sibling_outlived_is_used(bench: Bench) -> None:
    view = await bench.view_after(bench.graph("ask", "die"), None, Command(resume="yes"))

    assert states(view) == {"ask": "finished", "die": "unfinished"}
    assert view.answer.state == "used"
    assert view.status == "interrupted_work"


class Asker:
    """A node that asks and dies after the answer."""

    def __init__(self, bench: Bench, questions: int = 1) -> None:
        self.bench = bench
        self.questions = questions

    async def __call__(self, _state: State) -> dict[str, Any]:
        answers = [interrupt(f"question {number}") for number in range(self.questions)]
        if self.bench.armed:
            await self.bench.saver.life.end_when_quiet()
        return {"log": answers}


def asking_graph(bench: Bench, asker: Asker, *, checkpointer: bool | None = None) -> Any:
    inner = StateGraph(State)
    inner.add_node("ask", asker.__call__)
    inner.add_edge(START, "ask")
    if checkpointer is None:
        return inner.compile(checkpointer=bench.saver)
    outer = StateGraph(State)
    outer.add_node("sub", inner.compile(checkpointer=checkpointer or None))
    outer.add_edge(START, "sub")
    return outer.compile(checkpointer=bench.saver)


@pytest.mark.parametrize("subgraph", [None, False, True], ids=["root", "subgraph", "remembering"])
async def test_an_answer_whose_reader_was_killed_is_unread(
    bench: Bench, *, subgraph: bool | None
) -> None:
    graph = asking_graph(bench, Asker(bench), checkpointer=subgraph)

    view = await bench.view_after(graph, None, Command(resume="yes"))

    assert (view.answer.state, view.answer.value) == ("unread", "yes")
    assert view.status == "interrupted_work"


async def test_a_long_history_costs_no_answer_its_reader(bench: Bench) -> None:
    """Of a thread with hundreds of checkpoints only the newest are read."""
    graph = asking_graph(bench, Asker(bench))
    for number in range(150):
        await graph.aupdate_state(CONFIG, {"log": [str(number)]}, as_node="ask")

    view = await bench.view_after(graph, None, Command(resume="yes"))

    assert (view.answer.state, view.answer.value) == ("unread", "yes")


async def test_an_answer_is_asked_for_again_where_too_much_happened_since(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_INNER_LIMIT", 2)
    graph = asking_graph(bench, Asker(bench), checkpointer=False)

    view = await bench.view_after(graph, None, Command(resume="yes"))

    assert view.answer.state == "used"
    assert view.status == "waiting_for_human"


async def test_a_node_that_raised_with_its_answer_is_work(bench: Bench) -> None:
    async def ask(_state: State) -> dict[str, Any]:
        answer = interrupt("sure?")
        if bench.armed:
            raise RuntimeError(answer)
        return {"log": [answer]}

    builder = StateGraph(State)
    builder.add_node("ask", ask)
    builder.add_edge(START, "ask")
    graph: Any = builder.compile(checkpointer=bench.saver)

    view = await bench.view_after(graph, None, Command(resume="yes"))

    assert states(view) == {"ask": "unfinished"}
    assert (view.status, view.answer.state) == ("interrupted_work", "used")


@pytest.mark.parametrize("subgraph", [None, False, True], ids=["root", "subgraph", "remembering"])
async def test_an_answer_to_an_earlier_question_is_used(
    bench: Bench, *, subgraph: bool | None
) -> None:
    graph = asking_graph(bench, Asker(bench, questions=2), checkpointer=subgraph)

    view = await bench.view_after(graph, None, Command(resume="yes"))

    assert view.answer.state == "used"
    assert view.status == "waiting_for_human"


async def test_an_answer_given_to_an_earlier_step_of_a_subgraph_is_used(bench: Bench) -> None:
    inner = bench.builder("ask_a", "ask_b", parallel=False).compile()
    builder = StateGraph(State)
    builder.add_node("sub", inner)
    builder.add_edge(START, "sub")
    graph = builder.compile(checkpointer=bench.saver)

    view = await bench.view_after(graph, None, Command(resume="yes"))

    assert states(view) == {"sub": "asking"}
    assert view.answer.state == "used"
    assert view.status == "waiting_for_human"


async def test_an_answer_that_two_questions_could_mean_answers_neither(bench: Bench) -> None:
    graph = bench.graph("ask_a", "ask_b")
    await bench.run(graph)
    saved = await bench.saver.aget_tuple(CONFIG)
    assert saved is not None
    no_task = "00000000-0000-0000-0000-000000000000"
    await bench.saver.aput_writes(saved.config, [("__resume__", "yes")], no_task)

    view = await load_checkpoint(graph, CONFIG)

    assert view.answer.state == "used"
    assert view.status == "waiting_for_human"


async def test_an_answer_in_an_earlier_superstep_is_forgotten(bench: Bench) -> None:
    graph = bench.graph("ask", "die", parallel=False)

    view = await bench.view_after(graph, None, Command(resume="yes"))

    assert view.answer.state == "none"
    assert view.status == "interrupted_work"


@pytest.mark.parametrize("where", ["interrupt_before", "interrupt_after"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "any"])
async def test_a_static_breakpoint_waits_for_a_human(
    bench: Bench, where: str, *, named: bool
) -> None:
    stop = "second" if where == "interrupt_before" else "first"
    names = ["first", "second", "third"]
    graph = bench.graph(*names, parallel=False, **{where: [stop] if named else "*"})
    first_stop = [stop] if named or where == "interrupt_after" else ["first"]

    view = await bench.view_after(graph)

    assert view.status == "waiting_for_human"
    assert list(view.breakpoints) == first_stop


async def test_a_breakpoint_that_was_passed_holds_no_longer(bench: Bench) -> None:
    graph = bench.graph("first", "fail", parallel=False, interrupt_before=["fail"])
    await bench.run(graph)
    with pytest.raises(RuntimeError):
        await graph.ainvoke(None, CONFIG)

    view = await load_checkpoint(graph, CONFIG)

    assert view.status == "interrupted_work"
    assert view.breakpoints == ()


async def test_a_breakpoint_that_a_replay_was_sent_past_holds_no_longer(bench: Bench) -> None:
    graph = bench.graph("first", "die", parallel=False, interrupt_before=["die"])
    await bench.run(graph)
    paused = await graph.aget_state(CONFIG)
    with pytest.raises(KilledError):
        await graph.ainvoke(None, paused.config)
    bench.saver.life.dead = False

    view = await load_checkpoint(graph, CONFIG)

    assert view.status == "interrupted_work"
    assert view.breakpoints == ()


async def test_a_breakpoint_elsewhere_does_not_hold(bench: Bench) -> None:
    graph = bench.graph("die", "later", parallel=False, interrupt_before=["later"])

    view = await bench.view_after(graph)

    assert view.status == "interrupted_work"


async def test_a_thread_that_has_only_its_input_stands_at_no_breakpoint(memory: Mortal) -> None:
    bench = Bench(memory)
    graph = bench.graph("first", interrupt_before="*")
    await bench.run(graph)
    *_, of_input = [saved async for saved in memory.alist(CONFIG)]
    await memory.adelete_thread("thread-1")
    place: RunnableConfig = {"configurable": {"thread_id": "thread-1", "checkpoint_ns": ""}}
    versions = of_input.checkpoint["channel_versions"]
    await memory.aput(place, of_input.checkpoint, of_input.metadata, versions)

    view = await load_checkpoint(graph, CONFIG)

    assert states(view) == {"__start__": "unfinished"}
    assert (view.status, view.breakpoints) == ("interrupted_work", ())
    await graph.ainvoke(None, CONFIG)
    assert (await load_checkpoint(graph, CONFIG)).breakpoints == ("first",)


async def test_work_behind_a_breakpoint_that_was_passed_is_work(bench: Bench) -> None:
    graph = bench.graph("first", "second", "die", parallel=False, interrupt_before=["second"])
    await bench.run(graph)
    with pytest.raises(KilledError):
        await graph.ainvoke(None, CONFIG)
    bench.saver.life.dead = False

    view = await load_checkpoint(graph, CONFIG)

    assert states(view) == {"die": "unfinished"}
    assert view.status == "interrupted_work"


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("where", ["interrupt_before", "interrupt_after"])
async def test_a_breakpoint_inside_a_subgraph_waits_for_a_human(
    bench: Bench, depth: int, where: str
) -> None:
    stop = "second" if where == "interrupt_before" else "first"
    options: dict[str, Any] = {where: [stop]}
    graph: Any = bench.builder("first", "second", parallel=False).compile(**options)
    for level in range(depth):
        builder = StateGraph(State)
        builder.add_node("sub", graph)
        builder.add_edge(START, "sub")
        graph = builder.compile(checkpointer=bench.saver if level == depth - 1 else None)

    view = await bench.view_after(graph)

    assert states(view) == {"sub": "paused"}
    assert view.status == "waiting_for_human"


async def test_a_paused_subgraph_is_not_run_past_its_human_for_a_dead_sibling(
    bench: Bench,
) -> None:
    builder = bench.builder("die")
    builder.add_node("sub", bench.builder("first").compile(interrupt_before=["first"]))
    builder.add_edge(START, "sub")

    view = await bench.view_after(builder.compile(checkpointer=bench.saver))

    assert states(view) == {"die": "unfinished", "sub": "paused"}
    assert view.status == "waiting_for_human"


async def test_a_node_killed_inside_a_subgraph_is_work(bench: Bench) -> None:
    inner = bench.builder("first", "die", parallel=False).compile()
    builder = StateGraph(State)
    builder.add_node("sub", inner)
    builder.add_edge(START, "sub")

    view = await bench.view_after(builder.compile(checkpointer=bench.saver))

    assert states(view) == {"sub": "unfinished"}
    assert view.status == "interrupted_work"


async def test_a_subgraph_without_a_checkpointer_is_read_too(bench: Bench) -> None:
    inner = bench.builder("first", "die", parallel=False).compile(checkpointer=False)
    builder = StateGraph(State)
    builder.add_node("sub", inner)
    builder.add_edge(START, "sub")

    view = await bench.view_after(builder.compile(checkpointer=bench.saver))

    assert view.status == "interrupted_work"


async def test_each_task_of_a_fan_out_is_seen(bench: Bench) -> None:
    async def work(item: dict[str, str]) -> dict[str, Any]:
        return {"log": await bench.node(item["name"])}

    builder = StateGraph(State)
    builder.add_node("work", work, input_schema=dict)
    builder.add_conditional_edges(
        START, lambda _state: [Send("work", {"name": name}) for name in ("a", "die", "ask")]
    )

    view = await bench.view_after(builder.compile(checkpointer=bench.saver))

    assert [task.name for task in view.tasks] == ["work"] * 3
    assert sorted(task.state for task in view.tasks) == ["asking", "finished", "unfinished"]
    assert view.status == "interrupted_work"


async def test_an_update_that_waits_at_the_head_is_seen(bench: Bench) -> None:
    graph = bench.graph("die")

    view = await bench.view_after(graph, None, Command(update={"log": ["fact"]}))

    assert view.pending_channels == {"log"}
    assert view.values == {"log": ["in", "fact"]}


async def test_a_functional_workflow_is_read(bench: Bench) -> None:
    @entrypoint(checkpointer=bench.saver)
    async def workflow(names: dict[str, Any]) -> list[str]:
        return await bench.node("die" if names else "")

    cut_off = await bench.view_after(workflow)
    bench.armed = False
    await bench.run(workflow)
    finished = await load_checkpoint(workflow, CONFIG)

    assert (cut_off.status, cut_off.is_functional, cut_off.channels) == (
        "interrupted_work",
        True,
        frozenset(),
    )
    assert (finished.status, finished.values) == ("finished", {"__end__": ["die"]})


async def test_the_run_that_wrote_the_head_is_named(bench: Bench) -> None:
    graph = bench.graph("work")
    await graph.ainvoke({"log": ["in"]}, {**CONFIG, "metadata": {"run_id": "run-1"}})

    view = await load_checkpoint(graph, CONFIG)

    assert view.run_id == "run-1"
    assert view.created_at is not None
    assert view.created_at.tzinfo is not None


async def test_a_thread_that_an_update_was_sent_to_twice_is_said_to_be_unreadable(
    bench: Bench,
) -> None:
    class Plain(TypedDict, total=False):
        note: str

    async def die(_state: Plain) -> None:
        bench.saver.life.end()

    builder = StateGraph(Plain)
    builder.add_node("die", die)
    builder.add_edge(START, "die")
    graph = builder.compile(checkpointer=bench.saver)
    await bench.run(graph, {"note": "in"})
    saved = await bench.saver.aget_tuple(CONFIG)
    assert saved is not None
    writes = [("note", "once"), ("note", "twice")]
    await bench.saver.aput_writes(saved.config, writes, "00000000-0000-0000-0000-000000000000")

    with pytest.raises(RecoveryError, match="sent twice"):
        await load_checkpoint(graph, CONFIG)


async def test_the_values_stay_out_of_the_views_json(bench: Bench) -> None:
    view = await bench.view_after(bench.graph("fail"))

    assert view.as_json() == {
        "checkpoint_id": view.checkpoint_id,
        "created_at": view.created_at.isoformat() if view.created_at else None,
        "run_id": None,
        "step": 0,
        "status": "interrupted_work",
        "tasks": [{"name": "fail", "state": "unfinished", "error": "RuntimeError('fail')"}],
        "pending_channels": [],
        "breakpoints": [],
    }


class SilentSaver(InMemorySaver):
    async def aget_tuple(self, _config: RunnableConfig) -> None:
        await asyncio.Event().wait()


class BrokenSaver(InMemorySaver):
    async def aget_tuple(self, _config: RunnableConfig) -> None:
        raise OSError("disk gone")


class RestlessSaver(InMemorySaver):
    """Its thread moves on between any two looks, once `moves` has a number."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[int] = []

    async def aget_tuple(self, config: RunnableConfig) -> Any:
        saved = await super().aget_tuple(config)
        if saved is None or not self.moves:
            return saved
        self.moves.append(len(self.moves))
        moved = f"{len(self.moves):032x}"
        place: RunnableConfig = {"configurable": {"thread_id": "thread-1", "checkpoint_id": moved}}
        return saved._replace(checkpoint={**saved.checkpoint, "id": moved}, config=place)


def simple(saver: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node("work", lambda _state: {"log": ["work"]})
    builder.add_edge(START, "work")
    return builder.compile(checkpointer=saver)


async def test_a_checkpointer_that_does_not_answer_is_not_waited_for() -> None:
    with pytest.raises(StoreBusyError, match=r"SilentSaver\) did not answer within 0.05 s"):
        await load_checkpoint(simple(SilentSaver()), CONFIG, timeout_seconds=0.05)


async def test_a_checkpointer_that_fails_is_named() -> None:
    with pytest.raises(StoreError, match=r"BrokenSaver.*disk gone") as caught:
        await load_checkpoint(simple(BrokenSaver()), CONFIG)
    assert isinstance(caught.value.__cause__, OSError)


async def test_a_checkpointer_without_async_methods_is_refused_with_the_way_out() -> None:
    with (
        SqliteSaver.from_conn_string(":memory:") as saver,
        pytest.raises(ConfigurationError, match="AsyncSqliteSaver"),
    ):
        await load_checkpoint(simple(saver), CONFIG)


async def test_a_thread_that_moves_while_it_is_read_has_somebody_at_work() -> None:
    saver = RestlessSaver()
    graph = simple(saver)
    await graph.ainvoke({"log": ["in"]}, CONFIG)
    saver.moves.append(0)

    with pytest.raises(RecoveryError, match="at work"):
        await load_checkpoint(graph, CONFIG)


async def test_a_cancelled_reading_is_cancelled() -> None:
    reading = asyncio.create_task(load_checkpoint(simple(SilentSaver()), CONFIG))
    await asyncio.sleep(0)
    reading.cancel()

    with pytest.raises(asyncio.CancelledError):
        await reading
    assert [task for task in asyncio.all_tasks() if "load checkpoint" in task.get_name()] == []
