"""Recoveries where something else goes wrong too, and of runs that are not the usual kind."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command, interrupt
from owning import AGENT, AT, GHOST, IN, THREAD, State, asks, new_run, newest, until, workflow
from reconstruction.obedient import Scripted
from sqlalchemy.exc import OperationalError
from typing_extensions import TypedDict

from langgraph_peerctx import background
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.admission import packed_config
from langgraph_peerctx.durability.fenced_checkpointer import FencedCheckpointer
from langgraph_peerctx.durability.ownership import Ownership
from langgraph_peerctx.errors import (
    CheckpointerError,
    ConfigurationError,
    StoreBusyError,
    StoreError,
    ThreadBusyError,
)
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.incidents import ControlDatabase, Incident
from langgraph_peerctx.persistence.runs import LostRun, NewRun, Owner, Packed, RunInput
from langgraph_peerctx.reconstruction.reconstructor import recover_and_resume_workflow_async
from langgraph_peerctx.reconstruction.recoverer import Recoverer, SupervisedWorkflow
from langgraph_peerctx.reconstruction.recovery import standing_of
from langgraph_peerctx.reconstruction.supervisor import RecoverySupervisor

new = partial(new_run, durability="sync")
pytestmark = pytest.mark.usefixtures("_no_runtime_left")


class Anything(State, total=False):
    anything: Any


class Context(TypedDict):
    role: str


@pytest.fixture
def settings(settings: PeerContextSettings, monkeypatch: pytest.MonkeyPatch) -> PeerContextSettings:
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", settings.control_url)
    monkeypatch.setenv("PEER_CONTEXT_SWEEP_SECONDS", "0.5")
    return PeerContextSettings()


@asynccontextmanager
async def recovering(**more: Any) -> AsyncIterator[tuple[Recoverer, Ownership]]:
    lease = background.lease()
    try:
        runtime = await lease.aruntime()
        ownership = await runtime.own()
        yield Recoverer(runtime, ownership, **more), ownership
    finally:
        await lease.arelease()


async def recovered(app: Any, **more: Any) -> Any:
    """Recover the thread once, in this process, without asking peers."""
    async with recovering(**more) as (recoverer, _):
        return await recoverer.recover_thread(AGENT, THREAD, by_itself(app))


def by_itself(app: Any) -> SupervisedWorkflow:
    return SupervisedWorkflow(workflow=app, use_peer_context=False)


def crashes_once(node: Callable[..., Any]) -> Callable[..., Any]:
    """A node that at first leaves what a crash leaves: an open run, and no trace of the step."""
    seen: list[bool] = []

    def crashing(state: Any, runtime: Runtime[Context], config: RunnableConfig) -> Any:
        if not seen:
            seen.append(True)
            raise CheckpointerError("the disk is full")
        return node(state, runtime, config)

    return crashing


async def lose(control: ControlDatabase, run: NewRun, *, goes_on: bool = False) -> None:
    """Admit a run as a process that dies at once."""
    (control.reopen if goes_on else control.admit)(run, GHOST)
    await asyncio.sleep(0.03)


def incident_of(control: ControlDatabase) -> Incident:
    incident = control.incident_of(AGENT, THREAD)
    assert incident is not None
    return incident


# What a run was given


@pytest.mark.parametrize("stop", [{"interrupt_before": ["second"]}, {"interrupt_after": "*"}])
async def test_a_recovery_stops_where_its_run_was_to_stop(
    control: ControlDatabase, stop: Any
) -> None:
    first = crashes_once(lambda *_: {"log": ["first"]})
    app = workflow(first=first)
    with pytest.raises(CheckpointerError):
        await own_runs(app, agent_id=AGENT).ainvoke({"log": ["in"]}, AT, **stop)
    result = await recovered(app)
    assert result["status"] == "waiting_for_human"
    state = await app.aget_state(AT)
    assert (state.next, state.values["log"]) == (("second",), ["in", "first"])
    assert newest(control).end_kind == "returned"
    final = await own_runs(app, agent_id=AGENT).ainvoke(None, AT)
    assert final["log"] == ["in", "first", "second"]


async def test_what_an_answer_came_with_counts_more_than_what_its_run_began_with(
    control: ControlDatabase,
) -> None:
    def pay(_state: Any, runtime: Runtime[Context], config: RunnableConfig) -> Any:
        return {"log": [config["configurable"]["user"], runtime.context["role"]]}

    app = workflow(crashes_once(pay), first=asks, context_schema=Context)
    owning = own_runs(app, agent_id=AGENT)

    def by(who: str) -> Any:
        place = {"configurable": {"thread_id": THREAD, "user": who}}
        return {"config": place, "context": {"role": who}}

    await owning.ainvoke({"log": []}, **by("requester"))
    with pytest.raises(CheckpointerError):
        await owning.ainvoke(Command(resume="three"), durability="async", **by("approver"))
    assert newest(control).durability == "async"
    result = await recovered(app)
    assert result["final_state"]["log"] == ["three", "approver", "approver"]


@pytest.mark.parametrize("answers", [("A", "B"), ("yes", "yes")])
@pytest.mark.parametrize("is_used", [False, True])
async def test_an_answer_is_given_again_if_the_thread_shows_no_trace_of_it(
    control: ControlDatabase, answers: tuple[str, str], *, is_used: bool
) -> None:
    def asks_thrice(_state: Any) -> Any:
        return {"log": [interrupt("1?"), interrupt("2?"), interrupt("3?")]}

    app = workflow(asks_thrice)
    at_work: Any = {**AT, "metadata": {"run_id": "r1"}}
    await lose(control, new(app))
    await app.ainvoke(IN, at_work, durability="sync")
    head = (await app.aget_state(AT)).config["configurable"]["checkpoint_id"]
    for number, answer in enumerate(answers):
        control.end(control.lease_of(AGENT, THREAD), "r1", "returned")  # type: ignore[arg-type]
        given = Command(resume=answer)
        await lose(control, new(app, given, checkpoint_id=head), goes_on=True)
        if number == 0 or is_used:
            await app.ainvoke(given, at_work, durability="sync")
    result = await recovered(app)
    assert result["status"] == "waiting_for_human"
    final = await own_runs(app, agent_id=AGENT).ainvoke(Command(resume="C"), AT)
    assert final["log"] == ["in", "first", *answers, "C"], "each answer was given once"


@pytest.mark.parametrize(
    ("begun", "asked", "goes_on"),
    [
        ("sync", None, "sync"),
        ("async", None, "async"),
        ("exit", None, "async"),
        (None, "async", "async"),
        ("async", "sync", "sync"),
    ],
)
@pytest.mark.parametrize("is_by_hand", [True, False])
async def test_a_run_goes_on_with_a_durability_with_which_it_can_be_run(
    control: ControlDatabase, begun: Any, asked: Any, goes_on: str, *, is_by_hand: bool
) -> None:
    app = workflow()
    await lose(control, new(app, durability=begun))
    if is_by_hand:
        result = await recover_and_resume_workflow_async(
            workflow=app,
            agent_id=AGENT,
            thread_id=THREAD,
            use_peer_context=False,
            durability=asked,
        )
    else:
        async with recovering() as (recoverer, _):
            supervised = SupervisedWorkflow(workflow=app, use_peer_context=False, durability=asked)
            result = await recoverer.recover_thread(AGENT, THREAD, supervised)
    assert result["status"] == "restarted"
    (resumed,) = [s for s in result["incident"]["steps"] if s["step"] == "resume_workflow"]
    assert resumed["detail"]["durability"] == goes_on


async def test_a_model_may_fill_the_named_gaps_of_an_automatic_recovery(
    control: ControlDatabase,
) -> None:
    app = workflow(state=Anything)
    await lose(control, new(app))
    llm = Scripted(answers=['{"anything": "guessed", "log": ["no gap"]}'])
    supervised = SupervisedWorkflow(
        workflow=app, use_peer_context=False, llm=llm, infer=("anything",)
    )
    async with recovering() as (recoverer, _):
        result = await recoverer.recover_thread(AGENT, THREAD, supervised)
    assert result["final_state"] == {"log": ["in", "first", "second"], "anything": "guessed"}
    origins = {p["fact"]: p["source"] for p in result["incident"]["provenance"]}
    assert origins["state.anything"] == "inference"


@pytest.mark.parametrize("named", [{"infer": ("anything",)}, {"infer": ("nothing",), "llm": True}])
def test_gaps_that_no_model_can_fill_are_refused_when_the_workflow_is_named(named: Any) -> None:
    llm = Scripted(answers=[]) if named.pop("llm", False) else None
    with pytest.raises(ConfigurationError, match="infer="):
        SupervisedWorkflow(workflow=workflow(), llm=llm, **named)


def fails_once(name: str) -> Callable[[Any], Any]:
    """Return a node that fails when it is visited first."""
    visits = count()

    def node(_state: Any) -> Any:
        if next(visits) == 0:
            raise ValueError("no paper")
        return {"log": [name]}

    return node


async def by_hand(app: Any) -> Any:
    """Recover the thread without peers."""
    return await recover_and_resume_workflow_async(
        workflow=app, agent_id=AGENT, thread_id=THREAD, use_peer_context=False
    )


async def test_the_record_of_a_recovery_by_hand_is_kept(control: ControlDatabase) -> None:
    app = workflow(fails_once("second"))
    with pytest.raises(ValueError, match="no paper"):
        await own_runs(app, agent_id=AGENT).ainvoke(IN, AT)
    assert control.incident_of(AGENT, THREAD) is None, "nobody died"

    result = await by_hand(app)
    assert result["status"] == "resumed"
    incident = incident_of(control)
    assert (incident.status, incident.run_id) == ("recovered", newest(control).run_id)
    assert incident.report == result["incident"]
    assert (await by_hand(app))["status"] == "already_finished"
    assert control.all_incidents() == [incident], "what brought nothing on is no recovery"


async def test_a_run_that_went_on_after_a_recovery_by_hand_is_not_told_by_its_old_end(
    control: ControlDatabase,
) -> None:
    app = workflow(asks, first=fails_once("first"))
    with pytest.raises(ValueError, match="no paper"):
        await own_runs(app, agent_id=AGENT).ainvoke(IN, AT)

    assert (await by_hand(app))["status"] == "waiting_for_human"
    assert incident_of(control).status == "recovered"
    answer = new(app, Command(resume="three"), run_id=newest(control).run_id)
    control.reopen(answer, Owner(owner_id="alive", incarnation="alive-1", ttl_seconds=60))
    result = await by_hand(app)
    assert (result["status"], result["final_state"]) == ("unreachable", None)
    assert "alive holds the thread's lease" in result["reasons"][0]


async def test_a_record_that_cannot_be_kept_costs_only_itself_and_is_said(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = workflow(fails_once("second"))
    with pytest.raises(ValueError, match="no paper"):
        await own_runs(app, agent_id=AGENT).ainvoke(IN, AT)

    def full(*_: Any, **__: Any) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(ControlDatabase, "keep_recovery", full)
    result = await by_hand(app)
    assert (result["status"], result["degraded"]) == ("resumed", True)
    assert "not_kept: the disk is full" in result["reasons"]
    assert control.incident_of(AGENT, THREAD) is None


@pytest.mark.parametrize(
    ("lost", "status", "runs"),
    [
        ("before its first step", "restarted", ["y"]),
        ("in the subgraph", "resumed", ["y", "y"]),
        # It names nothing to a root graph, and the thread had come to its end.
        ("without a map", "restarted", []),
    ],
)
async def test_a_fork_from_a_subgraphs_checkpoint_is_recovered(
    control: ControlDatabase, lost: str, status: str, runs: list[str]
) -> None:
    ran: list[str] = []
    crashes: list[str] = []

    def y(_state: State) -> Any:
        ran.append("y")
        if crashes:
            raise CheckpointerError(crashes.pop())
        return {"log": ["y"]}

    inner = StateGraph(State)
    inner.add_node("x", lambda _state: ran.append("x") or {"log": ["x"]})
    inner.add_node("y", y)
    inner.add_edge(START, "x")
    inner.add_edge("x", "y")
    builder = StateGraph(State)
    builder.add_node("child", inner.compile(checkpointer=True))
    builder.add_edge(START, "child")
    saver = InMemorySaver()
    app = builder.compile(checkpointer=saver, name="launch")
    await app.ainvoke({"log": ["in"]}, AT)
    found = {
        (place["checkpoint_ns"], t.metadata["step"]): place["checkpoint_id"]
        for t in saver.list(AT)
        if (place := t.config["configurable"])
    }
    root, inside = found["", 0], found["child", 1]
    mapped = {"checkpoint_map": {"": root, "child": inside}}
    alone = {"thread_id": THREAD, "checkpoint_ns": "child", "checkpoint_id": inside}
    ran.clear()
    if lost == "in the subgraph":
        crashes.append("the disk is full")
        with pytest.raises(CheckpointerError):
            await own_runs(app, agent_id=AGENT).ainvoke(None, {"configurable": alone | mapped})
    else:
        place = alone if lost == "without a map" else {**mapped, "checkpoint_id": root}
        config = packed_config(app, {"configurable": place})
        await lose(control, new(app, None, config=config))
    result = await recovered(app)
    assert (result["status"], ran) == (status, runs)
    assert result["final_state"]["log"] == ["in", "in", "x", "y"]
    assert newest(control).end_kind == "returned"


async def test_a_graph_without_a_name_is_known_by_its_agents(control: ControlDatabase) -> None:
    ran: list[str] = []

    def graph(node: str) -> Any:
        builder = StateGraph(State)
        builder.add_node(node, crashes_once(lambda *_: ran.append(node)))
        builder.add_edge(START, node)
        return builder.compile(checkpointer=InMemorySaver())

    orders, refunds = graph("order"), graph("refund")
    with pytest.raises(CheckpointerError):
        await own_runs(refunds, agent_id=AGENT).ainvoke({"log": []}, AT)
    async with RecoverySupervisor({orders.get_name(): by_itself(orders)}) as supervisor:
        with pytest.raises(ConfigurationError, match=f"is of workflow {AGENT!r}"):
            await supervisor.recover(AGENT, THREAD)
    assert newest(control).is_open
    async with RecoverySupervisor({AGENT: by_itself(refunds)}) as supervisor:
        await supervisor.recover(AGENT, THREAD)
    assert ran == ["refund"]


# Who is at work


async def test_nobody_goes_on_with_a_run_that_this_process_recovers(
    control: ControlDatabase,
) -> None:
    reached, opened, visits = asyncio.Event(), asyncio.Event(), []

    async def second(_state: Any) -> Any:
        visits.append(1)
        reached.set()
        await opened.wait()
        return {"log": ["second"]}

    app = workflow(second)
    await lose(control, new(app))
    recovery = asyncio.create_task(recovered(app))
    await reached.wait()
    with pytest.raises(ThreadBusyError):
        await own_runs(app, agent_id=AGENT).ainvoke(None, AT)
    opened.set()
    assert (await recovery)["status"] == "restarted"
    assert (len(visits), newest(control).end_kind) == (1, "returned")


async def test_a_recovery_beside_a_run_leaves_the_run_its_fence(
    control: ControlDatabase, settings: PeerContextSettings
) -> None:
    reached, opened = asyncio.Event(), asyncio.Event()

    async def second(_state: Any) -> Any:
        reached.set()
        await opened.wait()
        return {"log": ["second"]}

    saver = FencedCheckpointer(InMemorySaver())
    running = asyncio.create_task(
        own_runs(workflow(second, saver), agent_id=AGENT).ainvoke({"log": []}, AT)
    )
    await reached.wait()
    control.claim("other-agent", "ended", owner_id="x", incarnation="x", ttl_seconds=1)
    control.release("other-agent", "ended", incarnation="x")

    async def third(_state: Any) -> Any:
        """While the recovery has a runtime of its own, the run writes."""
        opened.set()
        assert (await running)["log"] == ["first", "second"]

    result = await recover_and_resume_workflow_async(
        workflow=workflow(third),
        agent_id="other-agent",
        thread_id="ended",
        initial_state={"log": []},
        use_peer_context=False,
        settings=settings,
    )
    assert (result["status"], result["reasons"][1:]) == ("restarted", [])
    assert newest(control).end_kind == "returned"


# Claims


async def test_a_claim_that_comes_too_late_is_given_back(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_TIMEOUT_SECONDS", "2")
    app = workflow()
    await lose(control, new(app))
    async with recovering() as (recoverer, ownership):
        database: Any = ownership.control
        begin, opened = database.begin_recovery, threading.Event()

        def late(*arguments: Any, **options: Any) -> Any:
            database.begin_recovery = begin
            begun = begin(*arguments, **options)
            assert opened.wait(30)
            return begun

        database.begin_recovery = late
        with pytest.raises(StoreBusyError):
            await recoverer.recover_thread(AGENT, THREAD, by_itself(app))
        opened.set()
        await until(lambda: newest(control).end_kind == "handed_over")
        assert (incident_of(control).status, incident_of(control).attempts) == ("open", 0)
        result = await recoverer.recover_thread(AGENT, THREAD, by_itself(app))
    assert result["status"] == "restarted"


async def test_a_claim_whose_answer_was_lost_is_made_again_by_the_same_process(
    control: ControlDatabase,
) -> None:
    app = workflow()
    await lose(control, new(app))
    async with recovering() as (recoverer, ownership):
        database: Any = ownership.control
        attempt = database._attempt

        def loses_its_answer(work: Any, *, transaction: bool) -> Any:
            done = attempt(work, transaction=transaction)
            if not transaction:
                return done
            database._attempt = attempt
            error = OperationalError("COMMIT", {}, Exception("the server closed the connection"))
            error.connection_invalidated = True
            raise error

        database._attempt = loses_its_answer
        result = await recoverer.recover_thread(AGENT, THREAD, by_itself(app))
        assert result["status"] == "recovering_elsewhere"
        async with asyncio.timeout(30):
            while result["status"] == "recovering_elsewhere":
                await asyncio.sleep(0.1)
                result = await recoverer.recover_thread(AGENT, THREAD, by_itself(app))
    assert result["status"] == "restarted"
    assert newest(control).end_kind == "returned"


async def test_runs_that_nobody_knows_do_not_hide_the_others(control: ControlDatabase) -> None:
    app = workflow()
    for number in range(3):
        name = f"unknown-{number}"
        await lose(control, new(app, run_id=name, thread_id=name, workflow="retired"))
    await lose(control, new(app))

    def seen() -> list[str]:
        return [run.run_id for run in control.lost_runs(limit=3)]

    unknown = control.lost_runs(limit=3)
    assert "r1" not in [run.run_id for run in unknown]
    for run in unknown:
        control.note(run, {"status": "unknown_workflow"}, again_seconds=60)
    assert seen() == ["r1"]
    control.note(unknown[0], {"status": "unknown_workflow"}, again_seconds=0)
    await until(lambda: seen() == ["unknown-0", "r1"])


# How it ends


def deep() -> Any:
    value: Any = 1
    for _ in range(40):
        value = {"n": value}
    return value


@pytest.mark.parametrize(
    ("value", "is_shown"),
    [
        (b"\x89PNG\xff\xfe", lambda shown: shown == "iVBOR__-"),
        (float("nan"), lambda shown: shown is None),
        (float("-inf"), lambda shown: shown is None),
        (deep(), lambda shown: "cut: too deep" in str(shown)),
        ("\ud800", lambda shown: shown == "?"),
        ("a\0b", lambda shown: shown == "ab"),
        ({(1, 2): {3}}, lambda shown: shown == {"1,2": [3]}),
    ],
    ids=["bytes", "nan", "inf", "deep", "surrogate", "nul", "keys"],
)
async def test_whatever_the_state_holds_a_recovery_is_settled_and_shows_it(
    control: ControlDatabase, value: Any, is_shown: Callable[[Any], bool]
) -> None:
    app = workflow(lambda _state: {"anything": value}, state=Anything)
    await lose(control, new(app))
    assert (await recovered(app))["status"] == "restarted"
    assert (incident_of(control).status, newest(control).end_kind) == ("recovered", "returned")
    shown: Any = incident_of(control).result
    assert is_shown(shown["final_state"]["anything"])


async def test_a_listener_that_raises_costs_a_recovery_nothing(
    control: ControlDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []

    def listener(step: Any) -> None:
        told.append(step["step"])
        raise BrokenPipeError("nobody reads any more")

    app = workflow()
    await lose(control, new(app))
    result = await recovered(app, on_step=listener)
    assert (result["status"], incident_of(control).attempts) == ("restarted", 1)
    assert {"claim", "load_checkpoint", "resume_workflow"} <= {*told}
    assert "a listener failed" in caplog.text


async def test_listeners_of_a_supervisor_that_raise_stop_nobody(
    embedded_settings: PeerContextSettings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    del embedded_settings
    monkeypatch.setenv("KAFKA_PRESENCE_TOPIC", f"presence.{tmp_path.name}"[:100])
    told: list[str] = []

    def listener(*what: Any) -> None:
        told.append(type(what[-1]).__name__)
        raise BrokenPipeError("nobody reads any more")

    app = workflow()
    with ControlDatabase(PeerContextSettings().control_url) as control:
        await lose(control, new(app))
        async with RecoverySupervisor(
            {"launch": app}, on_failure=listener, on_recovery=listener
        ) as supervisor:
            await until(lambda: len(told) == 2)
            assert supervisor.counters["restarted"] == 1
        assert newest(control).end_kind == "returned"
    assert told == ["AgentFailure", "dict"]


@pytest.mark.parametrize("fate", ["cancelled", "outage"])
async def test_a_humans_approval_outlives_an_attempt_that_did_not_come_to_it(
    control: ControlDatabase, fate: str
) -> None:
    reached, trouble = asyncio.Event(), []

    class Saver(InMemorySaver):
        async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
            if trouble == ["cancelled"]:
                reached.set()
                await asyncio.Event().wait()
            if trouble == ["outage"]:
                raise ConnectionError("the checkpoints' database is away")
            return await super().aget_tuple(config)

    app = workflow(saver=Saver())
    careful = SupervisedWorkflow(workflow=app, approve_below_coverage=1.0, timeout_seconds=0.1)
    await lose(control, new(app))
    async with recovering() as (recoverer, _):
        result = await recoverer.recover_thread(AGENT, THREAD, careful)
        assert result["status"] == "waiting_for_human"
        control.answer(incident_of(control).incident_id, answer=True)
        trouble.append(fate)
        attempt = asyncio.create_task(recoverer.recover_thread(AGENT, THREAD, careful))
        if fate == "cancelled":
            await reached.wait()
            attempt.cancel()
        await asyncio.gather(attempt, return_exceptions=True)
        trouble.clear()
        assert incident_of(control).status == "open"
        control.redrive(incident_of(control).incident_id)  # now, not in a second
        result = await recoverer.recover_thread(AGENT, THREAD, careful)
    assert result["status"] == "restarted", "it does not ask again"


# What the control database says


@pytest.mark.parametrize("kind", ["named", "default"])
async def test_a_control_database_that_cannot_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    file = tmp_path / "broken.db"
    file.write_bytes(b"no database" * 1_000)
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", f"sqlite:///{file}")
    if kind == "named":
        monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{file}")
        with pytest.raises(StoreError):
            await standing_of(PeerContextSettings(), AGENT, THREAD)
    else:  # the agent's own events: their loss costs no recovery
        monkeypatch.delenv("PEER_CONTEXT_CONTROL_DATABASE_URL")
        assert await standing_of(PeerContextSettings(), AGENT, THREAD) == "unknown"
        assert "is not known" in caplog.text


async def test_a_control_database_that_is_busy_or_away_is_not_taken_for_an_empty_one(
    control: ControlDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the default one: it will be back, and then say who is at work."""
    control.close()
    monkeypatch.delenv("PEER_CONTEXT_CONTROL_DATABASE_URL")
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_TIMEOUT_SECONDS", "0.2")
    file = tmp_path / "control.db"
    locking = sqlite3.connect(file)
    locking.executescript("PRAGMA locking_mode=EXCLUSIVE; BEGIN EXCLUSIVE;")
    try:
        with pytest.raises(StoreBusyError):
            await standing_of(PeerContextSettings(), AGENT, THREAD)
    finally:
        locking.close()
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(StoreError):
        await standing_of(PeerContextSettings(), AGENT, THREAD)


# Many at once, on a real server


def together(*works: Callable[[], object]) -> list[Exception]:
    failures: list[Exception] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the test says what came of it
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


@pytest.mark.postgres
def test_who_leaves_and_who_ends_or_recovers_its_runs_do_not_wait_for_each_other(
    postgres_url: str,
) -> None:
    def numbered(number: int, name: str) -> NewRun:
        thread = f"{name}-{number:02}"
        given = RunInput(value=Packed("json", b"{}"))
        return NewRun(run_id=thread, agent_id=AGENT, thread_id=thread, given=given)

    me = Owner(owner_id="me", incarnation="me", ttl_seconds=60)
    successor = Owner(owner_id="successor", incarnation="s", ttl_seconds=60)
    failures: list[Exception] = []
    with ControlDatabase(postgres_url) as control:
        for round_ in range(6):
            leases = [control.admit(numbered(n, f"end-{round_}"), me) for n in range(30)]

            def end_all(leases: Any = leases) -> None:
                for lease in reversed(leases):
                    control.end(lease, lease.run_id, "returned")

            failures += together(end_all, lambda: control.hand_over("me"))

            ghost = Owner(owner_id="ghost", incarnation=f"g{round_}", ttl_seconds=0.001)
            for n in range(30):
                control.admit(numbered(n, f"lost-{round_}"), ghost)
            found = [run for run in control.lost_runs() if run.owner_incarnation == f"g{round_}"]

            def recover_all(found: list[LostRun] = found) -> None:
                for run in reversed(found):
                    control.begin_recovery(run, successor, max_attempts=5)

            failures += together(
                recover_all, lambda ghost=ghost: control.hand_over(ghost.incarnation)
            )
            control.hand_over("s")
    assert failures == []
