"""Lost runs are brought to their end, whatever their threads look like; on a broker of our own."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import owning
import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.runtime import Runtime
from langgraph.types import Command, interrupt
from owning import AGENT, AT, GHOST, IN, THREAD, asks, new_run, settled, until
from reconstruction.workflows import State
from typing_extensions import TypedDict

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.admission import packed_config, packed_context
from langgraph_peerctx.errors import CheckpointerError, ConfigurationError, StoreError
from langgraph_peerctx.lifecycle import peer_context_lifespan
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.runs import Owner
from langgraph_peerctx.reconstruction.answering import aanswer_recovery
from langgraph_peerctx.reconstruction.reconstructor import recover_and_resume_workflow_async
from langgraph_peerctx.reconstruction.recoverer import RECOVERY_THREAD, SupervisedWorkflow
from langgraph_peerctx.reconstruction.supervisor import (
    LONGEST_LINE,
    RecoverySupervisor,
    place_in_line,
)

workflow = partial(owning.workflow, state=State)
pytestmark = pytest.mark.usefixtures("_no_runtime_left")


@pytest.fixture
def settings(settings_on_broker: PeerContextSettings) -> PeerContextSettings:
    return settings_on_broker


class DiedError(Exception):
    """Leaves what a kill would leave."""


async def lose(
    control: ControlDatabase,
    app: Any,
    given: Any = IN,
    *,
    runs: bool = False,
    config: RunnableConfig | None = None,
    context: Any = None,
    **more: Any,
) -> None:
    """Admit a run as a process that died at once; with `runs`, it died in its second node."""
    kept = {"config": packed_config(app, config or {}), "context": packed_context(app, context)}
    run = new_run(app, given, **({"durability": "sync"} | kept | more))
    control.admit(run, GHOST)
    if runs:
        place = {**AT, "metadata": {"run_id": run.run_id}}
        with pytest.raises(DiedError):
            await app.ainvoke(given, place, durability="sync", context=context)


def dies_once(then: Any = None) -> Callable[[Any], Any]:
    """A node that dies when it is first run."""
    seen: list[bool] = []

    def second(state: Any) -> Any:
        if not seen:
            seen.append(True)
            raise DiedError
        return {"log": ["second"]} if then is None else then(state)

    return second


@asynccontextmanager
async def supervising(app: Any, **more: Any) -> AsyncIterator[RecoverySupervisor]:
    async with RecoverySupervisor({"launch": app}, **more) as supervisor:
        yield supervisor


async def test_a_run_killed_before_its_first_checkpoint_is_begun_from_its_admission(
    control: ControlDatabase,
) -> None:
    app = workflow()
    await lose(control, app, config={"configurable": {"tenant": "x"}, "tags": ["kept"]})
    async with supervising(app):
        incident = await settled(control)
    assert incident.result is not None
    assert incident.result["status"] == "restarted"
    state = await app.aget_state(AT)
    assert state.values["log"] == ["in", "first", "second"]
    assert state.metadata["run_id"] == "r1"
    run = control.run("r1")
    assert run is not None
    assert (run.end_kind, run.epoch) == ("returned", 2)
    assert control.lease_of(AGENT, THREAD).is_free  # type: ignore[union-attr]


async def test_a_run_killed_in_a_node_goes_on_there(control: ControlDatabase) -> None:
    app = workflow(dies_once())
    await lose(control, app, runs=True)
    told: list[Any] = []
    async with supervising(app, on_recovery=lambda f, r: told.append((f, r))):
        incident = await settled(control)
        await until(lambda: bool(told))
    assert incident.result is not None
    assert incident.result["status"] == "resumed"
    assert (await app.aget_state(AT)).values["log"] == ["in", "first", "second"]
    ((failure, result),) = told
    assert (failure.agent_id, failure.why, failure.process_id) == (AGENT, "silent", "ghost")
    assert result["final_state"]["log"] == ["in", "first", "second"]
    assert result["incident"]["incident_id"] == incident.incident_id
    assert [step["step"] for step in result["incident"]["steps"]][:2] == [
        "claim",
        "load_checkpoint",
    ]


async def test_a_lost_run_on_a_thread_with_an_earlier_one_is_not_taken_for_it(
    control: ControlDatabase,
) -> None:
    """Under `exit` a kill leaves the earlier run's end, which looks like success."""
    app = workflow()
    await app.ainvoke({"log": ["earlier"]}, {**AT, "metadata": {"run_id": "r0"}})
    await lose(control, app, {"log": ["in"]}, durability="exit")
    async with supervising(app):
        incident = await settled(control)
    assert incident.result is not None
    assert incident.result["status"] == "restarted"
    state = await app.aget_state(AT)
    assert state.values["log"] == ["earlier", "first", "second", "in", "first", "second"]


async def test_a_run_that_finished_and_could_not_say_so_is_not_run_again(
    control: ControlDatabase,
) -> None:
    app = workflow()
    await lose(control, app)
    await app.ainvoke({"log": ["in"]}, {**AT, "metadata": {"run_id": "r1"}})
    async with supervising(app):
        incident = await settled(control)
    assert incident.result is not None
    assert incident.result["status"] == "already_finished"
    assert (await app.aget_state(AT)).values["log"] == ["in", "first", "second"]


async def test_a_run_that_waits_for_its_human_is_left_to_wait(control: ControlDatabase) -> None:
    app = workflow(asks)
    await lose(control, app)
    await app.ainvoke({"log": ["in"]}, {**AT, "metadata": {"run_id": "r1"}})
    async with supervising(app):
        incident = await settled(control)
    assert incident.result is not None
    assert incident.result["status"] == "waiting_for_human"
    run = control.run("r1")
    assert run is not None
    assert run.end_kind == "returned"
    final = await own_runs(app, agent_id=AGENT).ainvoke(Command(resume="three"), AT)
    assert final["log"] == ["in", "first", "three"]


async def answered(control: ControlDatabase, app: Any, answer: Any) -> str:
    """Admit an answer as a process that died; return where the thread stood."""
    head = (await app.aget_state(AT)).config["configurable"]["checkpoint_id"]
    control.reopen(new_run(app, answer, checkpoint_id=head), GHOST)
    return str(head)


async def asked(control: ControlDatabase, app: Any) -> None:
    """Bring a run to its question, in an orderly way."""
    lease = control.admit(new_run(app), GHOST)
    await app.ainvoke({"log": ["in"]}, {**AT, "metadata": {"run_id": "r1"}}, durability="sync")
    control.end(lease, "r1", "returned")


async def test_an_answer_that_was_lost_on_its_way_is_given_again(control: ControlDatabase) -> None:
    app = workflow(asks)
    await asked(control, app)
    await answered(control, app, Command(resume="three"))
    async with supervising(app):
        incident = await settled(control)
    assert incident.result is not None
    assert incident.result["status"] == "resumed"
    assert (await app.aget_state(AT)).values["log"] == ["in", "first", "three"]


async def test_an_answer_that_was_used_is_not_given_to_the_next_question(
    control: ControlDatabase,
) -> None:
    def asks_twice(_state: Any) -> Any:
        return {"log": [interrupt("how many?"), interrupt("which colour?")]}

    app = workflow(asks_twice)
    await asked(control, app)
    await answered(control, app, Command(resume="three"))
    at_work: Any = {**AT, "metadata": {"run_id": "r1"}}
    await app.ainvoke(Command(resume="three"), at_work, durability="sync")
    async with supervising(app):
        incident = await settled(control)
    assert incident.result is not None
    assert incident.result["status"] == "waiting_for_human"
    final = await app.ainvoke(Command(resume="red"), at_work)
    assert final["log"] == ["in", "first", "three", "red"]


class Context(TypedDict):
    tenant: str


async def test_a_context_is_what_the_run_kept_or_what_a_factory_makes(
    control: ControlDatabase,
) -> None:
    seen: list[Any] = []

    async def second(_state: Any, runtime: Runtime[Context]) -> Any:
        seen.append(runtime.context)
        return {"log": ["second"]}

    app = workflow(second, context_schema=Context)
    await lose(control, app, context={"tenant": "kept"})
    async with supervising(app):
        await settled(control)
    await lose(control, app, run_id="r2")

    async def make(run: Any) -> Any:
        return {"tenant": f"made for {run.run_id}"}

    async with supervising(SupervisedWorkflow(workflow=app, context_factory=make)):
        await until(lambda: len(seen) == 2)
    assert seen == [{"tenant": "kept"}, {"tenant": "made for r2"}]


async def test_without_its_context_it_is_put_aside_for_a_person(control: ControlDatabase) -> None:
    app = workflow(context_schema=Context)
    await lose(control, app)
    async with supervising(app):
        incident = await settled(control, "dead_letter")
    assert incident.result is not None
    assert incident.result["status"] == "needs_context"
    assert control.lost_runs() == []


async def test_a_workflow_that_raises_is_tried_again_and_then_a_dead_letter(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_MAX_ATTEMPTS", "2")
    tries: list[float] = []

    def second(_state: Any) -> Any:
        tries.append(time.monotonic())
        if len(tries) < 4:
            raise ValueError("no paper")
        return {"log": ["second"]}

    app = workflow(second)
    await lose(control, app)
    async with supervising(app):
        incident = await settled(control, "dead_letter")
        assert incident.attempts == 2
        assert incident.result is not None
        assert any("no paper" in reason for reason in incident.result["reasons"])
        assert tries[1] - tries[0] >= 1, "not at once again"
        control.redrive(incident.incident_id)
        await settled(control)
    assert len(tries) == 4
    assert (await app.aget_state(AT)).values["log"] == ["in", "first", "second"]


async def test_an_outage_costs_no_attempt(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_MAX_ATTEMPTS", "1")
    tries: list[int] = []

    def second(_state: Any) -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise CheckpointerError("the disk is full")
        return {"log": ["second"]}

    app = workflow(second)
    await lose(control, app)
    async with supervising(app):
        incident = await settled(control)
    assert (len(tries), incident.attempts) == (3, 1)


async def test_a_node_that_raises_what_looks_like_an_outage_has_its_attempts_counted(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_MAX_ATTEMPTS", "2")
    tries: list[int] = []

    def second(_state: Any) -> Any:
        tries.append(1)
        raise StoreError("the shop's own database is away")

    app = workflow(second)
    await lose(control, app)
    async with supervising(app):
        await settled(control, "dead_letter")
    assert len(tries) == 2


async def test_a_workflow_that_nobody_knows_is_shown_to_people(control: ControlDatabase) -> None:
    app = workflow()
    await lose(control, app, workflow="another")
    async with supervising(app):
        async with asyncio.timeout(60):
            while (incident := control.incident_of(AGENT, THREAD)) is None:
                await asyncio.sleep(0.02)
    assert incident.status == "open"
    assert incident.attempts == 0
    async with RecoverySupervisor({"another": app}):
        await settled(control)


async def test_a_recovery_asks_a_human_and_waits_without_a_lease(
    control: ControlDatabase,
) -> None:
    app = workflow(dies_once())
    await lose(control, app, runs=True)
    careful = SupervisedWorkflow(workflow=app, approve_below_coverage=1.0, timeout_seconds=0.1)
    async with supervising(careful):
        waiting = await settled(control, "waiting_for_human")
        assert waiting.question is not None
        assert "Resume the workflow" in str(waiting.question["question"])
        lease = control.lease_of(AGENT, THREAD)
        assert lease is not None
        assert lease.is_free
        epoch = lease.epoch
        await asyncio.sleep(1.2)
        assert control.lease_of(AGENT, THREAD).epoch == epoch, "nobody touches it"  # type: ignore[union-attr]
        assert (await app.aget_state(AT)).values["log"] == ["in", "first"]
        await aanswer_recovery(waiting.incident_id[:8], True)  # noqa: FBT003 - the answer
        incident = await settled(control)
    assert incident.incident_id == waiting.incident_id
    assert (await app.aget_state(AT)).values["log"] == ["in", "first", "second"]


async def test_a_human_may_say_no(control: ControlDatabase) -> None:
    app = workflow(dies_once())
    await lose(control, app, runs=True)
    careful = SupervisedWorkflow(workflow=app, approve_below_coverage=1.0, timeout_seconds=0.1)
    async with supervising(careful):
        waiting = await settled(control, "waiting_for_human")
        await aanswer_recovery(waiting.incident_id, "no")
        incident = await settled(control, "dead_letter")
    assert incident.result is not None
    assert incident.result["status"] == "not_approved"
    assert (await app.aget_state(AT)).values["log"] == ["in", "first"]


async def test_a_supervisor_that_leaves_hands_its_recovery_over(control: ControlDatabase) -> None:
    started = asyncio.Event()
    seen: list[int] = []

    async def second(_state: Any) -> Any:
        seen.append(1)
        started.set()
        await asyncio.sleep(0 if len(seen) > 1 else 60)
        return {"log": ["second"]}

    app = workflow(second)
    await lose(control, app)
    async with supervising(app):
        await started.wait()
    incident = control.incident_of(AGENT, THREAD)
    assert incident is not None
    assert (incident.status, incident.attempts) == ("open", 0)
    assert control.lease_of(AGENT, THREAD).is_free  # type: ignore[union-attr]
    async with supervising(app):
        await settled(control)
    assert (await app.aget_state(AT)).values["log"] == ["in", "first", "second"]


async def test_no_more_recoveries_at_once_than_are_allowed(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_MAX_RECOVERIES", "2")
    at_work, most = 0, 0

    async def second(_state: Any) -> Any:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await until(lambda: most > 1)
        await asyncio.sleep(0.2)
        at_work -= 1
        return {"log": ["second"]}

    app = workflow(second)
    for number in range(5):
        control.admit(new_run(app, run_id=f"r{number}", thread_id=f"t{number}"), GHOST)
    async with supervising(app):
        await until(lambda: len(control.all_incidents(status="recovered")) == 5)
    assert most == 2


async def test_its_own_threads_are_out_of_the_way(control: ControlDatabase) -> None:
    app = workflow()
    await lose(control, app)
    async with supervising(app):
        incident = await settled(control)
    threads = {t.config["configurable"]["thread_id"] for t in app.checkpointer.list(None)}
    assert threads == {THREAD, f"{RECOVERY_THREAD}{incident.incident_id}"}


async def test_recovered_by_hand_it_is_claimed_too(
    control: ControlDatabase, settings: PeerContextSettings
) -> None:
    app = workflow(dies_once())
    await lose(control, app, runs=True)
    result = await recover_and_resume_workflow_async(
        workflow=app, agent_id=AGENT, thread_id=THREAD, peer_context_timeout=0.2
    )
    assert result["status"] == "resumed"
    assert result["final_state"]["log"] == ["in", "first", "second"]
    run = control.run("r1")
    assert run is not None
    assert (run.end_kind, run.epoch) == ("returned", 2)
    again = await recover_and_resume_workflow_async(
        workflow=app, agent_id=AGENT, thread_id=THREAD, peer_context_timeout=0.2
    )
    assert again["status"] == "already_finished"
    assert again["final_state"]["log"] == ["in", "first", "second"]
    del settings


async def test_recovered_by_hand_while_its_process_holds_its_lease_it_is_unreachable(
    control: ControlDatabase,
) -> None:
    app = workflow()
    alive = Owner(owner_id="alive", incarnation="a", ttl_seconds=60)
    control.admit(new_run(app), alive)
    result = await recover_and_resume_workflow_async(
        workflow=app, agent_id=AGENT, thread_id=THREAD, peer_context_timeout=0.2
    )
    assert (result["status"], result["recovered"]) == ("unreachable", False)
    assert "alive holds the thread's lease" in result["reasons"][0]
    assert (await app.aget_state(AT)).values == {}


async def test_a_lifespan_with_a_workflow_recovers_its_runs(control: ControlDatabase) -> None:
    app = workflow()
    await lose(control, app)
    async with peer_context_lifespan(agent_id=AGENT, workflow=app) as runtime:
        assert runtime.agents == (AGENT,)
        await settled(control)
    assert (await app.aget_state(AT)).values["log"] == ["in", "first", "second"]


async def test_without_a_shared_control_database_automatic_recovery_is_off_and_says_so(
    settings: PeerContextSettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    del settings
    monkeypatch.delenv("PEER_CONTEXT_CONTROL_DATABASE_URL")
    with pytest.raises(ConfigurationError, match="automatic recovery is off"):
        async with RecoverySupervisor({"launch": workflow()}):
            pass
    async with peer_context_lifespan(agent_id=AGENT, workflow=workflow()):
        assert "automatic recovery is off" in caplog.text


async def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs workflows"):
        RecoverySupervisor({})
    with pytest.raises(ConfigurationError, match="not compiled"):
        RecoverySupervisor({"launch": workflow().builder})
    with pytest.raises(ConfigurationError, match="approve_below_coverage"):
        SupervisedWorkflow(workflow=workflow(), approve_below_coverage=2)
    supervisor = RecoverySupervisor({"launch": workflow()})
    with pytest.raises(ConfigurationError, match="not started"):
        await supervisor.recover(AGENT, THREAD)
    with pytest.raises(ConfigurationError, match="not started"):
        await supervisor.states()


def test_supervisors_stand_in_line_and_each_thread_has_a_line_of_its_own() -> None:
    everybody = [f"guard-{number}" for number in range(30)]
    firsts = set()
    for number in range(200):
        thread = f"thread-{number}"
        places = {name: place_in_line(thread, name, everybody) for name in everybody}
        assert sorted(places.values())[:LONGEST_LINE] == list(range(LONGEST_LINE))
        assert max(places.values()) == LONGEST_LINE
        firsts |= {name for name, place in places.items() if place == 0}
    assert len(firsts) > 20, "the work is spread"
    assert place_in_line("t", "alone", []) == 0
