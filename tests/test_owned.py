"""A run is written down before it begins, fenced while it runs, and ended in writing."""

import asyncio
import logging
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command
from owning import AGENT, AT, THREAD, State, asks, newest, until, workflow
from typing_extensions import TypedDict

from langgraph_peerctx import background, effect
from langgraph_peerctx.durability.admission import config_of, context_of, input_of
from langgraph_peerctx.errors import (
    CheckpointerError,
    ConfigurationError,
    StaleOwnerError,
    StoreError,
    ThreadBusyError,
)
from langgraph_peerctx.owned import own_runs, owned
from langgraph_peerctx.persistence.incidents import ControlDatabase

pytestmark = pytest.mark.usefixtures("_no_runtime_left")


async def test_a_run_is_written_down_with_its_input_before_its_first_step(
    control: ControlDatabase,
) -> None:
    seen = []

    async def second(_state: State) -> State:
        seen.append((newest(control), control.lease_of(AGENT, THREAD)))
        return {"log": ["second"]}

    app = workflow(second)
    async with owned(app, agent_id=AGENT, thread_id=THREAD) as run:
        final = await run.ainvoke({"log": ["in"]}, {"configurable": {"tenant": "x"}, "tags": ["t"]})
    assert final == {"log": ["in", "first", "second"]}
    ((during, lease),) = seen
    assert (during.is_open, during.workflow, during.durability) == (True, "launch", "sync")
    assert input_of(app, during) == {"log": ["in"]}
    kept = config_of(app, during)
    assert kept["configurable"] == {"tenant": "x"}
    assert kept["tags"] == ["t"]
    assert lease.owner_incarnation == during.owner_incarnation
    assert (lease.run_id, lease.epoch) == (during.run_id, during.epoch)
    ended = newest(control)
    assert (ended.end_kind, ended.run_id) == ("returned", during.run_id)
    assert control.lease_of(AGENT, THREAD).is_free  # type: ignore[union-attr]


async def test_its_checkpoints_say_which_run_they_are_of(control: ControlDatabase) -> None:
    saver = InMemorySaver()
    app = workflow(saver=saver)
    async with owned(app, agent_id=AGENT, thread_id=THREAD) as run:
        await run.ainvoke({"log": []})
    run_id = newest(control).run_id
    assert {t.metadata["run_id"] for t in saver.list(AT)} == {run_id}
    assert {t.metadata["peerctx_epoch"] for t in saver.list(AT)} == {1}


async def test_two_inputs_are_two_runs(control: ControlDatabase) -> None:
    async with owned(workflow(), agent_id=AGENT, thread_id=THREAD) as run:
        await run.ainvoke({"log": ["1"]})
        first = newest(control).run_id
        final = await run.ainvoke({"log": ["2"]})
    assert final["log"] == ["1", "first", "second", "2", "first", "second"]
    assert newest(control).run_id != first


async def test_what_raises_is_written_down_as_that(control: ControlDatabase) -> None:
    def second(_state: State) -> State:
        raise ValueError("no paper")

    async with owned(workflow(second), agent_id=AGENT, thread_id=THREAD) as run:
        with pytest.raises(ValueError, match="no paper"):
            await run.ainvoke({"log": []})
    assert (newest(control).end_kind, newest(control).error) == ("raised", "ValueError: no paper")
    assert control.lost_runs() == []


async def test_a_run_whose_checkpointer_fails_has_not_failed_by_itself(
    control: ControlDatabase,
) -> None:
    class Failing(InMemorySaver):
        async def aput(self, *arguments: Any) -> Any:
            if arguments[2]["step"] == 1:
                raise OSError("the disk is gone")
            return await super().aput(*arguments)

    async with owned(workflow(saver=Failing()), agent_id=AGENT, thread_id=THREAD) as run:
        with pytest.raises(CheckpointerError, match="the disk is gone"):
            await run.ainvoke({"log": []})
    assert newest(control).end_kind == "handed_over"
    assert [lost.run_id for lost in control.lost_runs()] == [newest(control).run_id]


async def test_what_its_caller_cancels_is_not_to_be_recovered(control: ControlDatabase) -> None:
    started = asyncio.Event()

    async def second(_state: State) -> State:
        started.set()
        await asyncio.Event().wait()
        return {}

    async with owned(workflow(second), agent_id=AGENT, thread_id=THREAD) as run:
        running = asyncio.create_task(run.ainvoke({"log": []}))
        await started.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert newest(control).end_kind == "cancelled"
    assert control.lost_runs() == []


async def test_a_stream_that_is_broken_off_is_cancelled(control: ControlDatabase) -> None:
    async with owned(workflow(), agent_id=AGENT, thread_id=THREAD) as run:
        stream = run.astream({"log": []}, stream_mode="updates")
        async for chunk in stream:
            assert chunk == {"first": {"log": ["first"]}}
            break
        await stream.aclose()
    assert newest(control).end_kind == "cancelled"


async def test_a_stream_to_its_end_returns(control: ControlDatabase) -> None:
    async with owned(workflow(), agent_id=AGENT, thread_id=THREAD) as run:
        chunks = [chunk async for chunk in run.astream({"log": []}, stream_mode="updates")]
    assert [list(chunk) for chunk in chunks] == [["first"], ["second"]]
    assert newest(control).end_kind == "returned"


async def test_what_is_open_when_the_process_leaves_is_handed_over(
    control: ControlDatabase,
) -> None:
    started = asyncio.Event()

    async def second(_state: State) -> State:
        started.set()
        await asyncio.Event().wait()
        return {}

    app = own_runs(workflow(second), agent_id=AGENT)
    running = asyncio.create_task(app.ainvoke({"log": []}, AT))
    await started.wait()
    lease = background.lease()
    runtime = await lease.aruntime()
    await (await runtime.own()).hand_over()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await lease.arelease()
    assert newest(control).end_kind == "handed_over"
    assert [lost.run_id for lost in control.lost_runs()] == [newest(control).run_id]


async def test_an_answer_goes_on_with_the_run_that_asked(control: ControlDatabase) -> None:
    app = workflow(asks)
    async with owned(app, agent_id=AGENT, thread_id=THREAD) as run:
        asked = await run.ainvoke({"log": ["in"]})
        assert asked["__interrupt__"]
        before = newest(control)
        assert before.end_kind == "returned"
        final = await run.ainvoke(Command(resume="three"))
    assert final["log"] == ["in", "first", "three"]
    after = newest(control)
    assert (after.run_id, after.end_kind) == (before.run_id, "returned")
    assert input_of(app, after, 1).resume == "three"
    assert after.inputs[1].checkpoint_id is not None


async def test_a_fork_from_an_earlier_checkpoint_is_a_run_of_its_own(
    control: ControlDatabase,
) -> None:
    app = own_runs(workflow(), agent_id=AGENT)
    await app.ainvoke({"log": ["in"]}, AT)
    first = newest(control)
    (before_second,) = [s async for s in app.aget_state_history(AT) if s.next == ("second",)]
    final = await app.ainvoke(None, before_second.config)
    assert final["log"] == ["in", "first", "second"]
    fork = newest(control)
    assert fork.run_id != first.run_id
    wanted = before_second.config["configurable"]["checkpoint_id"]
    assert config_of(app, fork)["configurable"]["checkpoint_id"] == wanted


async def test_a_thread_at_work_is_refused(control: ControlDatabase) -> None:
    started, refused = asyncio.Event(), asyncio.Event()

    async def second(_state: State) -> State:
        started.set()
        await refused.wait()
        return {"log": ["second"]}

    app = own_runs(workflow(second), agent_id=AGENT)
    running = asyncio.create_task(app.ainvoke({"log": []}, AT))
    await started.wait()
    with pytest.raises(ThreadBusyError):
        await app.ainvoke({"log": ["other"]}, AT)
    refused.set()
    assert (await running)["log"] == ["first", "second"]
    assert newest(control).end_kind == "returned"


async def test_who_is_replaced_is_refused_and_ends_nothing(control: ControlDatabase) -> None:
    def second(_state: State) -> State:
        (lost,) = control.lost_runs([newest(control).owner_incarnation])
        control.claim(
            AGENT,
            THREAD,
            owner_id="successor",
            incarnation="s",
            ttl_seconds=60,
            dead_incarnation=lost.owner_incarnation,
        )
        return {"log": ["zombie"]}

    saver = InMemorySaver()
    async with owned(workflow(second, saver), agent_id=AGENT, thread_id=THREAD) as run:
        with pytest.raises(StaleOwnerError):
            await run.ainvoke({"log": ["in"]})
    assert newest(control).is_open
    assert control.lease_of(AGENT, THREAD).owner_id == "successor"  # type: ignore[union-attr]
    head = saver.get_tuple(AT)
    assert head is not None
    assert head.checkpoint["channel_values"]["log"] == ["in", "first"]
    assert head.pending_writes == []


async def test_leases_are_renewed_while_a_node_blocks_its_loop(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 s to live; the node sleeps for 4 s, and nobody else may have it."""
    monkeypatch.setenv("PEER_CONTEXT_HEARTBEAT_PAUSE_SECONDS", "1.5")
    left: list[float] = []

    async def second(_state: State) -> State:
        time.sleep(4)  # noqa: ASYNC251 - as some nodes do
        left.append(control.lease_of(AGENT, THREAD).seconds_left)  # type: ignore[union-attr]
        return {"log": ["second"]}

    async with owned(workflow(second), agent_id=AGENT, thread_id=THREAD) as run:
        await run.ainvoke({"log": []})
    assert left[0] > 0
    assert newest(control).end_kind == "returned"


async def test_a_loop_that_is_stuck_loses_its_lease(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_STUCK_SECONDS", "0.3")
    left: list[float] = []

    async def second(_state: State) -> State:
        deadline = time.monotonic() + 20
        left.append(0.0)
        while left[0] >= 0 and time.monotonic() < deadline:
            time.sleep(0.05)  # noqa: ASYNC251 - stuck
            left[0] = control.lease_of(AGENT, THREAD).seconds_left  # type: ignore[union-attr]
        return {"log": ["second"]}

    async with owned(workflow(second), agent_id=AGENT, thread_id=THREAD) as run:
        final = await run.ainvoke({"log": []})
    assert left[0] < 0, "anybody may take it"
    assert final["log"] == ["first", "second"], "nobody did, so it went on"
    assert "does not turn" in caplog.text


def test_sync_code_does_the_same(control: ControlDatabase) -> None:
    app = own_runs(workflow(asks), agent_id=AGENT)
    app.invoke({"log": ["in"]}, AT)
    final = app.invoke(Command(resume="three"), AT)
    assert final["log"] == ["in", "first", "three"]
    assert (newest(control).end_kind, len(newest(control).inputs)) == ("returned", 2)

    def boom(_state: State) -> State:
        raise ValueError("no paper")

    with pytest.raises(ValueError, match="no paper"):
        own_runs(workflow(boom), agent_id=AGENT).invoke({"log": []}, AT)
    assert newest(control).end_kind == "raised"


async def test_inside_another_graph_it_is_an_ordinary_subgraph(control: ControlDatabase) -> None:
    inner = own_runs(workflow(), agent_id=AGENT)
    builder = StateGraph(State)
    builder.add_node("inner", inner)
    builder.add_node("called", lambda state: inner.invoke({"log": [str(len(state["log"]))]}))
    builder.add_edge(START, "inner")
    builder.add_edge("inner", "called")
    app = builder.compile(checkpointer=InMemorySaver())
    await app.ainvoke({"log": []}, AT)
    assert newest(control) is None


async def test_a_context_comes_back(control: ControlDatabase) -> None:
    class Context(TypedDict):
        tenant: str

    app = workflow(context_schema=Context)
    async with owned(app, agent_id=AGENT, thread_id=THREAD) as run:
        await run.ainvoke({"log": []}, context={"tenant": "x"})
        assert context_of(app, newest(control)) == {"tenant": "x"}
        await run.ainvoke({"log": []}, context={"lock": threading.Lock()})
    assert newest(control).context is None, "it belongs to a process: a context_factory makes it"


async def test_less_than_sync_is_said_aloud(
    control: ControlDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    del control
    async with owned(workflow(), agent_id=AGENT, thread_id=THREAD) as run:
        with caplog.at_level(logging.WARNING):
            await run.ainvoke({"log": []}, durability="exit")
    assert "durability='exit'" in caplog.text


async def test_bad_input_is_refused_and_nothing_begins(control: ControlDatabase) -> None:
    app = workflow()
    owning = own_runs(app, agent_id=AGENT)
    with pytest.raises(ConfigurationError, match="the input cannot be stored"):
        await owning.ainvoke({"log": [threading.Lock()]}, AT)
    with pytest.raises(ConfigurationError, match="needs a thread"):
        await owning.ainvoke({"log": []})
    with pytest.raises(ConfigurationError, match="owned already"):
        own_runs(owning, agent_id=AGENT)
    with pytest.raises(ConfigurationError, match="not compiled"):
        own_runs(app.builder, agent_id=AGENT)
    assert newest(control) is None


async def test_a_control_database_that_is_not_there_begins_nothing(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    del control
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", "sqlite:////nowhere/control.db")
    with pytest.raises(Exception, match="folder"):
        async with owned(workflow(), agent_id=AGENT, thread_id=THREAD):
            pass


async def test_an_end_that_cannot_be_written_is_written_when_the_database_is_back(
    control: ControlDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    async def second(_state: State) -> State:
        lease = background.lease()
        (await lease.aruntime()).call(break_ends)
        lease.release()
        return {"log": ["second"]}

    async def break_ends(runtime: Any) -> None:
        database = (await runtime.own()).control
        end = database.end

        def mended(*arguments: Any, **options: Any) -> bool:
            if not mended_now.is_set():
                raise StoreError("gone")
            return bool(end(*arguments, **options))

        database.end = mended

    mended_now = threading.Event()
    async with owned(workflow(second), agent_id=AGENT, thread_id=THREAD) as run:
        final = await run.ainvoke({"log": []})
        assert final["log"] == ["first", "second"], "its outcome counts more"
        assert newest(control).is_open
        mended_now.set()
        await until(lambda: not newest(control).is_open)
    assert newest(control).end_kind == "returned"
    assert "not written down yet" in caplog.text


async def test_what_an_ended_run_leaves_in_doubt_is_said_aloud(
    control: ControlDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails() -> None:
        raise TimeoutError

    async def second(_state: State) -> State:
        with suppress(TimeoutError):
            await effect("pay", fails)
        effect("mail", str)
        return {"log": ["second"]}

    async with owned(workflow(second), agent_id=AGENT, thread_id=THREAD) as run:
        await run.ainvoke({"log": []})
    (said,) = [r for r in caplog.records if "whether its effects happened" in r.getMessage()]
    assert said.levelno == logging.WARNING
    assert "'pay'" in said.getMessage()
    assert "'mail'" not in said.getMessage()
    assert (said.agent_id, said.thread_id, said.run_id) == (  # type: ignore[attr-defined]
        AGENT, THREAD, newest(control).run_id,
    )  # fmt: skip
    assert newest(control).end_kind == "returned"


def test_sync_code_says_the_same(
    control: ControlDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise TimeoutError

    def second(_state: State) -> State:
        effect("pay", fails)  # type: ignore[func-returns-value]
        return {}

    with pytest.raises(TimeoutError):
        own_runs(workflow(second), agent_id=AGENT).invoke({"log": []}, AT)
    assert newest(control).end_kind == "raised"
    assert "not known: 'pay'" in caplog.text


async def test_nobody_is_warned_of_what_is_handed_over(
    control: ControlDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    async def second(_state: State) -> State:
        async def fails() -> None:
            raise StaleOwnerError("replaced meanwhile")

        await effect("pay", fails)
        return {}

    async with owned(workflow(second), agent_id=AGENT, thread_id=THREAD) as run:
        with pytest.raises(StaleOwnerError):
            await run.ainvoke({"log": []})
    assert newest(control).end_kind == "handed_over"
    assert "whether its effects happened" not in caplog.text


async def test_of_a_redacted_run_neither_error_nor_hook_tells_what_was_in_it(
    control: ControlDatabase,
) -> None:
    given: list[Any] = []

    def redact(value: Any) -> Any:
        given.append(value)
        if isinstance(value, Command):
            raise KeyError("no card: 4111-1111")
        return {"log": ["***"]}

    def second(state: State) -> State:
        raise ValueError("cannot charge " + state["log"][0])

    app = workflow(second)
    async with owned(app, agent_id=AGENT, thread_id=THREAD, redact=redact) as run:
        with pytest.raises(ValueError, match="cannot charge"):
            await run.ainvoke({"log": ["card 4111-1111"]})
        assert (newest(control).end_kind, newest(control).error) == ("raised", "ValueError")
        with pytest.raises(ValueError, match="cannot charge"):
            await run.ainvoke(None)
        assert len(given) == 1, "there is nothing to redact in nothing"
        with pytest.raises(ConfigurationError, match="redact raised KeyError") as caught:
            await run.ainvoke(Command(resume="yes"))
    assert "4111-1111" not in "".join(traceback.format_exception(caught.value))
    assert isinstance(given[1], Command)
