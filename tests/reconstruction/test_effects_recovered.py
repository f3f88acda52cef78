"""What was in doubt is settled by the peer that knows, or by a human; on a broker of our own."""

import asyncio
import operator
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import owning
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from owning import AGENT, AT, GHOST, THREAD, new_run, settled

from langgraph_peerctx import (
    AgentReconstructor,
    Receiver,
    Settled,
    background,
    current_effect,
    effect,
    explain_reconstruction,
)
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.admission import (
    digest_of,
    packed_config,
    packed_input,
)
from langgraph_peerctx.durability.run_effects import About, RunEffects
from langgraph_peerctx.errors import ConfigurationError, InDoubtError, StaleOwnerError
from langgraph_peerctx.lifecycle import peer_context_lifespan
from langgraph_peerctx.messaging.context_handler import ContextRequestHandler
from langgraph_peerctx.nodes.state import PeerContextState
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.effect_ledger import NewEffect
from langgraph_peerctx.persistence.event_store import EventStore, record_interaction
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.runs import RunInput
from langgraph_peerctx.protocol.tickets import EffectTicket
from langgraph_peerctx.reconstruction.answering import aanswer_recovery
from langgraph_peerctx.reconstruction.recovery import recover_and_resume_workflow_async
from langgraph_peerctx.reconstruction.supervisor import RecoverySupervisor

PEER = "inventory-agent"
pytestmark = pytest.mark.usefixtures("_no_runtime_left")


class State(PeerContextState, total=False):
    log: Annotated[list[Any], operator.add]


class KilledError(BaseException):
    """Leaves what a kill would leave."""


@pytest.fixture
def settings(
    settings_on_broker: PeerContextSettings, monkeypatch: pytest.MonkeyPatch
) -> PeerContextSettings:
    del settings_on_broker
    monkeypatch.setenv("PEER_CONTEXT_TIMEOUT_SECONDS", "0.6")
    return PeerContextSettings()


class Peer:
    """An agent that takes orders, in a store of its own, and how they get there."""

    def __init__(self, folder: Path, *, receives: bool = True) -> None:
        self.store = EventStore(f"sqlite:///{folder}/peer.db")
        self.receiver = Receiver(PEER, store=self.store) if receives else None
        self.applied: list[str] = []
        self.tickets: list[EffectTicket] = []
        self.dies: list[str] = []
        self.is_down = False

    async def order(self, what: str) -> Any:
        """What the effect calls: it may be killed on the way there, or on the way back."""
        self.tickets.append(current_effect())
        if self.dies == ["before"]:
            self.dies.clear()
            raise KilledError
        reply = self.take(current_effect(), what)
        if self.dies == ["after"]:
            self.dies.clear()
            raise KilledError
        return reply

    def take(self, ticket: EffectTicket, what: str) -> Any:
        if self.is_down:
            raise ConnectionRefusedError
        if self.receiver is None:
            self.applied.append(what)
            for kind, sender, receiver in (("order", AGENT, PEER), ("order-done", PEER, AGENT)):
                record_interaction(
                    agent_id=PEER,
                    from_agent=sender,
                    to_agent=receiver,
                    thread_id=ticket.thread_id,
                    kind=kind,
                    payload={"number": len(self.applied)},
                    effect_key=ticket.effect_key,
                    run_id=ticket.run_id,
                    store=self.store,
                )
            return {"number": len(self.applied)}
        with self.receiver.receive(ticket) as receipt:
            if receipt.is_first:
                self.applied.append(what)
                receipt.reply = {"number": len(self.applied)}
        return receipt.reply

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Answer what is asked, as its process does."""
        async with peer_context_lifespan() as runtime:
            await runtime.host(ContextRequestHandler(PEER, store=self.store))
            yield
            await runtime.unhost(PEER)


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    made = Peer(tmp_path)
    yield made
    made.store.close()


def workflow(peer: Peer, /, **terms: Any) -> Any:
    async def plan(_: State) -> Any:
        return {"log": ["plan"]}

    async def order(_: State) -> Any:
        chosen = {"peer": PEER, "not_done_on": (ConnectionRefusedError,), **terms}
        return {"log": [await effect("order 4711", peer.order, "4711", **chosen)]}

    builder = StateGraph(State)
    builder.add_node("plan", plan)
    builder.add_node("order", order)
    builder.add_edge(START, "plan")
    builder.add_edge("plan", "order")
    builder.add_edge("order", END)
    return builder.compile(checkpointer=InMemorySaver(), name="launch")


async def lose(control: ControlDatabase, app: Any, *, run_id: str = "r1") -> None:
    """Run it as a process that dies in its effect."""
    run = new_run(app, run_id=run_id, durability="sync", config=packed_config(app, {}))
    lease = control.admit(run, GHOST)
    about = About(
        agent_id=AGENT,
        thread_id=THREAD,
        run_id=run_id,
        epoch=lease.epoch,
        input_digest=digest_of({"log": ["in"]}),
    )
    effects = RunEffects(control, about, incarnation=GHOST.incarnation)
    place = effects.go_along({**AT, "metadata": {"run_id": run_id}})
    with pytest.raises(KilledError):
        await app.ainvoke({"log": ["in"]}, place, durability="sync")


async def log_of(app: Any) -> Any:
    return (await app.aget_state(AT)).values["log"]


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


@pytest.mark.parametrize("dies", ["before", "after"])
async def test_with_all_its_stores_lost_the_peers_keep_an_effect_from_being_repeated(
    control: ControlDatabase,
    peer: Peer,
    dies: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = workflow(peer)
    peer.dies = [dies]
    await lose(control, app)
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    fresh = workflow(peer)
    async with peer.answering():
        result = await recover_and_resume_workflow_async(
            workflow=fresh,
            agent_id=AGENT,
            thread_id=THREAD,
            initial_state={"log": ["in"]},
            expect=[PEER],
        )
    assert result["status"] == "restarted"
    assert result["final_state"]["log"] == ["in", "plan", {"number": 1}]
    assert peer.applied == ["4711"]
    with ControlDatabase(f"sqlite:///{tmp_path}/new.db") as new:
        run = new.newest_run(AGENT, THREAD)
        assert run is not None
        assert run.end_kind == "returned"
        if dies == "after":
            assert run.run_id == "r1"
            assert run.epoch > 1


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


async def test_with_all_its_stores_lost_nothing_is_begun_before_the_peers_are_heard(
    control: ControlDatabase,
    peer: Peer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = workflow(peer)
    peer.dies = ["after"]
    await lose(control, app)
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    fresh = workflow(peer)

    async def recover(**more: Any) -> Any:
        return await recover_and_resume_workflow_async(
            workflow=fresh,
            agent_id=AGENT,
            thread_id=THREAD,
            initial_state={"log": ["in"]},
            expect=[PEER],
            peer_context_timeout=0.5,
            **more,
        )

    result = await recover()
    assert (result["status"], result["recovered"]) == ("in_doubt", False)
    assert "inventory-agent may remember" in result["reasons"][0]
    async with peer.answering():
        result = await recover()
    assert result["status"] == "restarted"
    assert result["final_state"]["log"] == ["in", "plan", {"number": 1}]
    assert peer.applied == ["4711"]


async def test_a_run_whose_peers_stay_silent_may_be_begun_on_purpose(
    peer: Peer, settings: PeerContextSettings
) -> None:
    del settings
    result = await recover_and_resume_workflow_async(
        workflow=workflow(peer),
        agent_id=AGENT,
        thread_id=THREAD,
        initial_state={"log": ["in"]},
        expect=[PEER],
        peer_context_timeout=0.5,
        despite_silence=True,
    )
    assert (result["status"], result["degraded"]) == ("restarted", True)
    assert peer.applied == ["4711"]


async def test_a_run_that_was_begun_anew_and_failed_goes_on_with_the_same_doubts(
    control: ControlDatabase,
    peer: Peer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = workflow(peer)
    peer.dies = ["after"]
    await lose(control, app)
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    fails = [True]

    async def fragile(_: State) -> Any:
        if fails.pop() if fails else False:
            raise ValueError("not yet")
        return {"log": ["plan"]}

    builder = StateGraph(State)
    builder.add_node("plan", fragile)
    builder.add_node("order", workflow(peer).builder.nodes["order"].runnable)
    builder.add_edge(START, "plan")
    builder.add_edge("plan", "order")
    fresh = builder.compile(checkpointer=InMemorySaver(), name="launch")

    async def recover() -> Any:
        return await recover_and_resume_workflow_async(
            workflow=fresh,
            agent_id=AGENT,
            thread_id=THREAD,
            initial_state={"log": ["in"]},
            expect=[PEER],
        )

    async with peer.answering():
        assert (await recover())["status"] == "failed"
        result = await recover()
    assert result["final_state"]["log"] == ["in", "plan", {"number": 1}]
    assert peer.applied == ["4711"]
    assert len(peer.tickets) == 1


async def test_a_finished_runs_effects_are_not_taken_for_those_of_another_input(
    peer: Peer, settings: PeerContextSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the lost run no peer knows anything; of the run before it they do."""
    del settings
    owned = own_runs(workflow(peer), agent_id=AGENT)
    await owned.ainvoke({"log": ["yesterday"]}, AT)
    background.stop_kept_runtime()
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")

    async def recover(given: str) -> Any:
        return await recover_and_resume_workflow_async(
            workflow=workflow(peer),
            agent_id=AGENT,
            thread_id=THREAD,
            initial_state={"log": [given]},
            expect=[PEER],
        )

    async with peer.answering():
        today = await recover("today")
    assert today["final_state"]["log"] == ["today", "plan", {"number": 2}]
    assert peer.applied == ["4711", "4711"]
    one, two = peer.tickets
    assert one.run_id != two.run_id
    assert two.epoch > one.epoch


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


async def lost(peer: Peer, **more: Any) -> Any:
    """Recover a thread of which nothing is left."""
    return await recover_and_resume_workflow_async(
        workflow=more.pop("app", None) or workflow(peer),
        agent_id=AGENT,
        thread_id=THREAD,
        **{"initial_state": {"log": ["in"]}, "expect": [PEER], **more},
    )


async def test_of_several_runs_that_were_given_the_same_nobody_guesses_which(
    control: ControlDatabase,
    peer: Peer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owned = own_runs(workflow(peer), agent_id=AGENT)
    await owned.ainvoke({"log": ["in"]}, AT)
    background.stop_kept_runtime()
    peer.dies = ["after"]
    await lose(control, workflow(peer), run_id="r2")
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    async with peer.answering():
        result = await lost(peer)
        assert result["status"] == "in_doubt"
        assert "Name it with run_id=" in result["reasons"][0]
        assert "r2" in result["reasons"][0]
        result = await lost(peer, run_id="r2")
    assert result["status"] == "restarted"
    assert peer.applied == ["4711", "4711"]


async def test_without_a_broker_a_run_of_which_no_record_is_left_is_not_begun(
    control: ControlDatabase,
    peer: Peer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_tcp_port: int,
) -> None:
    peer.dies = ["after"]
    await lose(control, workflow(peer))
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", f"127.0.0.1:{free_tcp_port}")
    for expect in ([PEER], []):
        result = await lost(peer, expect=expect)
        assert result["status"] == "in_doubt"
    assert peer.applied == ["4711"]


async def test_what_happened_long_ago_is_remembered_too(
    control: ControlDatabase,
    peer: Peer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peer.dies = ["after"]
    await lose(control, workflow(peer))
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    monkeypatch.setenv("PEER_CONTEXT_TIME_WINDOW_SECONDS", "0.1")
    await asyncio.sleep(0.3)
    async with peer.answering():
        result = await lost(peer)
    assert result["final_state"]["log"] == ["in", "plan", {"number": 1}]
    assert peer.applied == ["4711"]


async def test_with_its_control_database_lost_a_thread_goes_on_from_its_checkpoint(
    control: ControlDatabase,
    peer: Peer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = workflow(peer)
    peer.dies = ["after"]
    await lose(control, app)
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    async with peer.answering():
        result = await lost(peer, app=app, initial_state=None)
    assert result["status"] == "resumed"
    assert result["final_state"]["log"] == ["in", "plan", {"number": 1}]
    assert peer.applied == ["4711"]
    with ControlDatabase(f"sqlite:///{tmp_path}/new.db") as new:
        run = new.newest_run(AGENT, THREAD)
        assert run is not None
        assert (run.run_id, run.end_kind) == ("r1", "returned")


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
