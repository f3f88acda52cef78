"""What was in doubt is settled by the peer that knows, or by a human; on a broker of our own."""

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import owning
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from owning import AGENT, AT, GHOST, THREAD, new_run, settled
from reconstruction.orders import PEER, Peer, State, log_of, lose, workflow

from langgraph_peerctx import (
    AgentReconstructor,
    Settled,
    effect,
    explain_reconstruction,
)
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.admission import (
    packed_input,
)
from langgraph_peerctx.errors import ConfigurationError, InDoubtError, StaleOwnerError
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.effect_ledger import NewEffect
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.runs import RunInput
from langgraph_peerctx.reconstruction.answering import aanswer_recovery
from langgraph_peerctx.reconstruction.recovery import recover_and_resume_workflow_async
from langgraph_peerctx.reconstruction.supervisor import RecoverySupervisor

pytestmark = pytest.mark.usefixtures("_no_runtime_left")


@pytest.fixture
def settings(short_window: PeerContextSettings) -> PeerContextSettings:
    return short_window


@pytest.fixture
def _patient(settings: PeerContextSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first question be answered, however busy the machine is."""
    del settings
    monkeypatch.setenv("PEER_CONTEXT_TIMEOUT_SECONDS", "10")
    monkeypatch.setenv("PEER_CONTEXT_HEARTBEAT_PAUSE_SECONDS", "1.5")


async def test_what_has_arrived_is_not_done_again_and_its_reply_is_restored(
    control: ControlDatabase, peer: Peer
) -> None:
    app = workflow(peer)
    peer.dies = ["after"]
    await lose(control, app)
    async with peer.answering(), RecoverySupervisor({"launch": app}):
        incident = await settled(control)
    assert peer.applied == ["4711"]
    assert await log_of(app) == ["in", "plan", {"number": 1}]
    assert len(peer.tickets) == 1
    (known,) = control.effects_of(AGENT, THREAD, "r1")
    assert (known.status, known.source, known.outcome) == ("done", "peer", {"number": 1})
    assert incident.report is not None
    (shown,) = incident.report["effects"]
    assert (shown["name"], shown["status"], shown["source"]) == ("order 4711", "done", "peer")
    facts = {p["fact"]: p for p in incident.report["provenance"]}
    assert facts["effect.order 4711"]["source"] == "peer"


@pytest.mark.usefixtures("_patient")
async def test_what_has_not_arrived_is_barred_and_done_once(
    control: ControlDatabase, peer: Peer
) -> None:
    app = workflow(peer)
    peer.dies = ["before"]
    await lose(control, app)
    async with peer.answering(), RecoverySupervisor({"launch": app}):
        await settled(control)
    assert peer.applied == ["4711"]
    late, done = peer.tickets
    assert (late.effect_key, late.epoch) == (done.effect_key, done.epoch - 1)
    with pytest.raises(StaleOwnerError):  # what was on its way all the time
        peer.take(late, "4711")
    assert peer.applied == ["4711"]


async def test_a_peer_that_takes_no_tickets_tells_what_it_has_seen(
    control: ControlDatabase, tmp_path: Path
) -> None:
    peer = Peer(tmp_path, receives=False)
    app = workflow(peer)
    peer.dies = ["after"]
    await lose(control, app)
    async with peer.answering(), RecoverySupervisor({"launch": app}):
        await settled(control)
    assert peer.applied == ["4711"]
    assert await log_of(app) == ["in", "plan", {"number": 1}]
    peer.store.close()


@pytest.mark.usefixtures("_patient")
async def test_a_peer_that_takes_no_tickets_never_tells_that_it_has_not_seen(
    control: ControlDatabase, tmp_path: Path
) -> None:
    peer = Peer(tmp_path, receives=False)
    app = workflow(peer)
    peer.dies = ["before"]
    await lose(control, app)
    async with peer.answering(), RecoverySupervisor({"launch": app}):
        incident = await settled(control, "waiting_for_human")
        assert incident.question is not None
        assert incident.question["question"] == (
            "Did 'order 4711' reach inventory-agent? inventory-agent cannot tell."
        )
    assert peer.applied == []
    peer.store.close()


async def test_where_its_peer_is_silent_a_human_is_asked_plainly(
    control: ControlDatabase, peer: Peer
) -> None:
    app = workflow(peer)
    peer.dies = ["after"]
    await lose(control, app)
    async with RecoverySupervisor({"launch": app}):
        incident = await settled(control, "waiting_for_human")
        assert incident.question is not None
        assert incident.question["question"] == (
            "Did 'order 4711' reach inventory-agent? It is silent."
        )
        assert await log_of(app) == ["in", "plan"]
        answer = {"order 4711": {"happened": True, "reply": {"number": 1}}}
        await aanswer_recovery(incident.incident_id, answer)
        await settled(control)
    assert await log_of(app) == ["in", "plan", {"number": 1}]
    assert peer.applied == ["4711"]
    (known,) = control.effects_of(AGENT, THREAD, "r1")
    assert known.source == "human"


@pytest.mark.parametrize("answer", [False, {"order 4711": "not_seen"}, {"happened": "no"}])
async def test_what_a_human_says_did_not_happen_is_done(
    control: ControlDatabase, peer: Peer, answer: Any
) -> None:
    app = workflow(peer)
    peer.dies = ["before"]
    await lose(control, app)
    async with RecoverySupervisor({"launch": app}):
        incident = await settled(control, "waiting_for_human")
        await aanswer_recovery(incident.incident_id, answer)
        await settled(control)
    assert peer.applied == ["4711"]
    assert await log_of(app) == ["in", "plan", {"number": 1}]


@pytest.mark.parametrize(
    "answer",
    [None, "perhaps", 1, {}, {"nope": True}, {"order 4711": "done"}, {"order 4711": {"reply": 1}}],
)
async def test_an_answer_that_is_not_understood_is_refused(
    control: ControlDatabase, peer: Peer, answer: Any
) -> None:
    app = workflow(peer)
    peer.dies = ["before"]
    await lose(control, app)
    async with RecoverySupervisor({"launch": app}):
        incident = await settled(control, "waiting_for_human")
        with pytest.raises(ConfigurationError, match="is no answer about 'order 4711': true if"):
            await aanswer_recovery(incident.incident_id, answer)
        await aanswer_recovery(incident.incident_id, False)  # noqa: FBT003 - the answer
        await settled(control)
    assert peer.applied == ["4711"]


async def test_what_a_human_said_can_be_put_right(control: ControlDatabase, peer: Peer) -> None:
    """It happened: but with an outcome that the node needs."""

    async def order(_: State) -> Any:
        reply = await effect("order 4711", peer.order, "4711", peer=PEER)
        return {"log": [reply["number"]]}

    builder = StateGraph(State)
    builder.add_node("order", order)
    builder.add_edge(START, "order")
    app = builder.compile(checkpointer=InMemorySaver(), name="launch")
    peer.dies = ["after"]
    await lose(control, app)

    async def recover(**more: Any) -> Any:
        return await recover_and_resume_workflow_async(
            workflow=app, agent_id=AGENT, thread_id=THREAD, peer_context_timeout=0.5, **more
        )

    assert (await recover())["status"] == "waiting_for_human"
    assert (await recover(answers={"order 4711": True}))["status"] == "failed"
    incident = control.incident_of(AGENT, THREAD)
    assert incident is not None
    control.redrive(incident.incident_id)
    result = await recover(answers={"order 4711": {"happened": True, "reply": {"number": 7}}})
    assert result["final_state"]["log"] == ["in", 7]
    assert peer.applied == ["4711"]


async def test_a_peer_that_comes_back_settles_it_without_a_human(
    control: ControlDatabase, peer: Peer
) -> None:
    app = workflow(peer)
    peer.dies = ["after"]
    await lose(control, app)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(RecoverySupervisor({"launch": app}))
        await settled(control, "waiting_for_human")
        await stack.enter_async_context(peer.answering())
        incident = await settled(control)
    assert peer.applied == ["4711"]
    assert await log_of(app) == ["in", "plan", {"number": 1}]
    assert incident.attempts <= 1


async def test_what_is_to_be_done_again_in_any_case_asks_nobody(
    control: ControlDatabase, peer: Peer
) -> None:
    app = workflow(peer, if_unknown="retry", peer=None)
    peer.dies = ["before"]
    await lose(control, app)
    async with RecoverySupervisor({"launch": app}):
        await settled(control)
    assert peer.applied == ["4711"]


async def test_what_is_to_fail_becomes_a_dead_letter(control: ControlDatabase, peer: Peer) -> None:
    app = workflow(peer, if_unknown="fail")
    peer.dies = ["before"]
    await lose(control, app)
    async with RecoverySupervisor({"launch": app}):
        incident = await settled(control, "dead_letter")
    assert incident.result is not None
    assert incident.result["status"] == "in_doubt"
    assert peer.applied == []


async def test_a_look_of_the_workflows_own_comes_before_a_human(
    control: ControlDatabase, peer: Peer
) -> None:
    found = [Settled.unknown(), Settled.unknown(), Settled.happened({"number": 1})]
    app = workflow(peer, peer=None, check=lambda _: found.pop() if found else Settled.unknown())
    peer.dies = ["after"]
    await lose(control, app)
    async with RecoverySupervisor({"launch": app}):
        await settled(control)
    assert peer.applied == ["4711"]
    assert await log_of(app) == ["in", "plan", {"number": 1}]


async def test_a_look_in_vain_is_followed_by_a_question(
    control: ControlDatabase, peer: Peer
) -> None:
    app = workflow(peer, peer=None, check=lambda _: Settled.unknown())
    peer.dies = ["after"]
    await lose(control, app)
    async with RecoverySupervisor({"launch": app}):
        incident = await settled(control, "waiting_for_human")
        assert incident.question is not None
        assert "Did 'order 4711' happen?" in str(incident.question["question"])
        await aanswer_recovery(incident.incident_id, True)  # noqa: FBT003 - the answer
        await settled(control)
    assert peer.applied == ["4711"]
    assert await log_of(app) == ["in", "plan", None]


async def test_a_doubt_that_comes_up_in_a_run_hands_it_over(
    control: ControlDatabase, peer: Peer
) -> None:
    """A call that timed out, retried by LangGraph while the peer is away."""
    app = workflow(peer)
    fails = [TimeoutError()]
    act = peer.order

    async def times_out(what: str) -> Any:
        told = await act(what)
        if fails:
            raise fails.pop()
        return told

    peer.order = times_out
    owned = own_runs(app, agent_id=AGENT)
    with pytest.raises(TimeoutError):
        await owned.ainvoke({"log": ["in"]}, AT)
    with pytest.raises(InDoubtError):
        await owned.ainvoke(None, AT)
    run = control.newest_run(AGENT, THREAD)
    assert run is not None
    assert run.end_kind == "handed_over"
    async with peer.answering(), RecoverySupervisor({"launch": app}):
        await settled(control)
    assert peer.applied == ["4711"]
    assert await log_of(app) == ["in", "plan", {"number": 1}]


async def test_by_hand_a_doubt_is_a_result_and_an_answer_an_argument(
    control: ControlDatabase, peer: Peer
) -> None:
    app = workflow(peer)
    peer.dies = ["after"]
    await lose(control, app)
    held = control.lease_of(AGENT, THREAD)
    assert held is not None
    control.end(held, "r1", "raised", error="TimeoutError")

    async def recover(**more: Any) -> Any:
        return await recover_and_resume_workflow_async(
            workflow=app, agent_id=AGENT, thread_id=THREAD, peer_context_timeout=0.5, **more
        )

    result = await recover()
    assert (result["status"], result["recovered"]) == ("in_doubt", False)
    question = "Did 'order 4711' reach inventory-agent? It is silent."
    assert result["reasons"] == [f"in_doubt: {question}"]
    reply = {"happened": True, "reply": {"number": 1}}
    result = await recover(answers={"order 4711": reply})
    assert result["status"] == "resumed"
    assert result["final_state"]["log"] == ["in", "plan", {"number": 1}]
    assert peer.applied == ["4711"]


async def test_a_doubt_that_the_workflow_has_left_behind_is_not_asked_about(
    control: ControlDatabase, peer: Peer
) -> None:
    async def sloppy(_: State) -> Any:
        async def fails() -> None:
            raise TimeoutError

        with pytest.raises(TimeoutError):
            await effect("reminder", fails, peer=PEER)
        return {"log": ["plan"]}

    async def order(_: State) -> Any:
        return {"log": [await effect("order 4711", peer.order, "4711", if_unknown="retry")]}

    builder = StateGraph(State)
    builder.add_node("plan", sloppy)
    builder.add_node("order", order)
    builder.add_edge(START, "plan")
    builder.add_edge("plan", "order")
    app = builder.compile(checkpointer=InMemorySaver(), name="launch")
    peer.dies = ["before"]
    await lose(control, app)
    async with RecoverySupervisor({"launch": app}):
        await settled(control)
    assert await log_of(app) == ["in", "plan", {"number": 1}]
    assert {e.name: e.status for e in control.effects_of(AGENT, THREAD, "r1")} == {
        "reminder": "intent",
        "order 4711": "done",
    }


def two_orders(peer: Peer, other: Any) -> Any:
    """A workflow whose second order comes after the first is settled."""

    async def first(_: State) -> Any:
        told = await effect("first", peer.order, "first", peer=PEER)
        return {"log": [told]}

    async def second(_: State) -> Any:
        return {"log": [await effect("second", other, peer="silent-agent")]}

    return owning.workflow(second, first=first, state=State)


@pytest.mark.parametrize("answer", [True, False])
async def test_an_answer_is_to_the_question_that_was_asked_and_to_no_other(
    control: ControlDatabase, peer: Peer, answer: Any
) -> None:
    calls: list[int] = []

    async def times_out() -> Any:
        calls.append(1)
        raise TimeoutError

    app = two_orders(peer, times_out)
    peer.dies = ["after" if answer else "before"]
    await lose(control, app)
    async with RecoverySupervisor({"launch": app}):
        incident = await settled(control, "waiting_for_human")
        assert "'first'" in str(incident.question)
        await aanswer_recovery(incident.incident_id, answer)
        deadline = time.monotonic() + 30
        while "'second'" not in str(
            (incident := await settled(control, "waiting_for_human")).question
        ):
            assert time.monotonic() < deadline, incident
            await asyncio.sleep(0.02)
    assert len(calls) == 1
    assert {e.name: e.status for e in control.effects_of(AGENT, THREAD, "r1")}["second"] == "intent"
    assert peer.applied == ["first"]


async def test_an_answer_by_hand_reaches_a_recovery_that_waits(
    control: ControlDatabase, peer: Peer
) -> None:
    app = workflow(peer)
    peer.dies = ["after"]
    await lose(control, app)

    async def recover(**more: Any) -> Any:
        return await recover_and_resume_workflow_async(
            workflow=app, agent_id=AGENT, thread_id=THREAD, peer_context_timeout=0.5, **more
        )

    result = await recover()
    assert result["status"] == "waiting_for_human"
    assert "Did 'order 4711' reach inventory-agent?" in result["reasons"][0]
    result = await recover(answers={"order 4711": {"happened": True, "reply": {"number": 1}}})
    assert result["status"] == "resumed"
    assert result["final_state"]["log"] == ["in", "plan", {"number": 1}]
    assert peer.applied == ["4711"]


async def test_a_doubt_of_a_sibling_that_has_finished_is_not_asked_about(
    control: ControlDatabase, peer: Peer
) -> None:
    async def left(_: State) -> Any:
        async def fails() -> None:
            raise TimeoutError

        with pytest.raises(TimeoutError):
            await effect("reminder", fails, peer=PEER)
        return {"log": ["left"]}

    async def right(_: State) -> Any:
        await asyncio.sleep(0.2)
        return {"log": [await effect("order 4711", peer.order, "4711", if_unknown="retry")]}

    builder = StateGraph(State)
    for name, node in (("left", left), ("right", right)):
        builder.add_node(name, node)
        builder.add_edge(START, name)
    app = builder.compile(checkpointer=InMemorySaver(), name="launch")
    peer.dies = ["before"]
    await lose(control, app)
    async with RecoverySupervisor({"launch": app}):
        await settled(control)
    assert await log_of(app) == ["in", "left", {"number": 1}]


async def test_a_doubt_of_another_run_does_not_stop_this_one(
    control: ControlDatabase, peer: Peer
) -> None:
    ours = control.claim(AGENT, THREAD, owner_id="p", incarnation="old", ttl_seconds=0.001)
    assert ours is not None
    old = NewEffect(
        agent_id=AGENT,
        thread_id=THREAD,
        run_id="r0",
        position="gone@9",
        name="yesterday",
        peer_id=PEER,
        scope="thread",
    )
    control.intend(old, epoch=ours.epoch, incarnation="old")
    await asyncio.sleep(0.05)
    app = workflow(peer, if_unknown="retry", peer=None)
    peer.dies = ["before"]
    await lose(control, app)
    async with RecoverySupervisor({"launch": app}):
        await settled(control)
    assert peer.applied == ["4711"]


async def test_a_redacted_run_is_begun_with_what_the_caller_gives(
    control: ControlDatabase, peer: Peer
) -> None:
    app = workflow(peer)
    given = packed_input(app, {"log": ["secret"]}, lambda _: {"log": ["***"]})
    control.admit(replace(new_run(app), given=RunInput(value=given)), GHOST)
    async with RecoverySupervisor({"launch": app}):
        incident = await settled(control, "dead_letter")
    assert incident.result is not None
    assert "redacted_input" in str(incident.result["reasons"])
    result = await recover_and_resume_workflow_async(
        workflow=app, agent_id=AGENT, thread_id=THREAD, initial_state={"log": ["secret"]}
    )
    assert result["final_state"]["log"] == ["secret", "plan", {"number": 1}]
    assert peer.applied == ["4711"]


async def test_whoever_only_looks_sees_the_doubt_and_settles_nothing(
    control: ControlDatabase, peer: Peer
) -> None:
    app = workflow(peer)
    peer.dies = ["before"]
    await lose(control, app)
    looking = AgentReconstructor(workflow=app, peer_context_timeout=0.5)
    found = await looking.reconstruct_async(AGENT, THREAD)
    assert [(e["name"], e["status"]) for e in found["effects"]] == [("order 4711", "in_doubt")]
    assert any(reason.startswith("in_doubt: nobody could tell") for reason in found["reasons"])
    assert "order 4711" in str(explain_reconstruction(found))
    looking = AgentReconstructor(workflow=app, peer_context_timeout=10)
    async with peer.answering():
        found = await looking.reconstruct_async(AGENT, THREAD, expect=[PEER])
    (told,) = found["in_doubt"]
    assert told["verdict"] == "cannot_tell", "to deny it would bar it"
    assert [e.status for e in control.effects_of(AGENT, THREAD, "r1")] == ["intent"]


async def test_a_broken_control_database_costs_only_what_it_knows(
    peer: Peer, settings: PeerContextSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del settings
    (tmp_path / "broken.db").write_text("no database at all, but long enough to be looked into")
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/broken.db")
    looking = AgentReconstructor(workflow=workflow(peer), enable_peer_context=False)
    found = await looking.reconstruct_async(AGENT, THREAD)
    assert found["effects"] == []
    assert any(reason.startswith("no_ledger: ") for reason in found["reasons"])
