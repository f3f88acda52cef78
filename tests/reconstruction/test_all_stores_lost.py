"""With host, event store, control database and checkpoints gone, the peers are what is left."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import owning
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from owning import AGENT, AT, THREAD
from reconstruction.orders import PEER, KilledError, Peer, State, lose, workflow

from langgraph_peerctx import Settled, background, effect
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.protocol.tickets import EffectTicket
from langgraph_peerctx.reconstruction.recovery import recover_and_resume_workflow_async

pytestmark = pytest.mark.usefixtures("_no_runtime_left")


@pytest.fixture
def settings(settings_on_broker: PeerContextSettings) -> PeerContextSettings:
    return settings_on_broker


@pytest.fixture
def everything_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Leave of all that was written down nothing."""

    def lose_it() -> None:
        monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")

    return lose_it


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
            **more,
        )

    result = await recover(peer_context_timeout=0.5)
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


async def test_the_record_of_a_run_that_was_begun_anew_is_kept(
    control: ControlDatabase, peer: Peer, everything_lost: Callable[[], None], tmp_path: Path
) -> None:
    peer.dies = ["after"]
    await lose(control, workflow(peer))
    everything_lost()
    async with peer.answering():
        result = await lost(peer)
    record = result["incident"]
    assert record["run_id"] == "r1"
    assert [(e["name"], e["status"], e["source"]) for e in record["effects"]] == [
        ("order 4711", "done", "peer")
    ]
    with ControlDatabase(f"sqlite:///{tmp_path}/new.db") as new:
        incident = new.incident_of(AGENT, THREAD)
        assert incident is not None
        assert (incident.incident_id, incident.status) == (record["incident_id"], "recovered")
        assert incident.report == record
        assert incident.result is not None
        assert incident.result["final_state"]["log"] == ["in", "plan", {"number": 1}]


# Where nobody remembers the run


class Mails:
    """What reaches no peer: mails that are sent, at first by a process that dies of it."""

    def __init__(self) -> None:
        self.sent = 0

    def workflow(self, peer: Peer, **terms: Any) -> Any:
        async def send() -> str:
            self.sent += 1
            if self.sent == 1:
                raise KilledError
            return f"mail {self.sent}"

        async def mail(_: State) -> Any:
            return {"log": [await effect("mail", send, **terms)]}

        async def order(_: State) -> Any:
            return {"log": [await effect("order 4711", peer.order, "4711", peer=PEER)]}

        return owning.workflow(order, first=mail, state=State)


@pytest.mark.parametrize("scope", ["run", "thread"])
@pytest.mark.parametrize("happened", [True, False])
async def test_what_reaches_no_peer_is_asked_about_though_nobody_remembers_the_run(
    control: ControlDatabase,
    peer: Peer,
    everything_lost: Callable[[], None],
    scope: Any,
    *,
    happened: bool,
) -> None:
    mails = Mails()
    await lose(control, mails.workflow(peer, scope=scope))
    everything_lost()
    app = mails.workflow(peer, scope=scope)
    async with peer.answering():
        result = await lost(peer, app=app)
        assert (result["status"], mails.sent, peer.applied) == ("in_doubt", 1, [])
        assert "Did 'mail' happen?" in " ".join(result["reasons"])
        answer = {"happened": True, "reply": "mail 1"} if happened else False
        result = await lost(peer, app=app, answers={"mail": answer})
    assert result["final_state"]["log"] == ["in", "mail 1" if happened else "mail 2", {"number": 1}]
    assert peer.applied == ["4711"]


async def test_what_its_own_look_can_tell_is_not_asked_about(
    control: ControlDatabase, peer: Peer, everything_lost: Callable[[], None]
) -> None:
    mails = Mails()

    async def look(_: EffectTicket) -> Settled:
        return Settled.happened("mail 1")

    await lose(control, mails.workflow(peer, check=look))
    everything_lost()
    async with peer.answering():
        result = await lost(peer, app=mails.workflow(peer, check=look))
    assert result["final_state"]["log"] == ["in", "mail 1", {"number": 1}]
    assert (mails.sent, peer.applied) == (1, ["4711"])


async def test_a_peer_that_keeps_nothing_denies_nothing_by_having_nothing(
    control: ControlDatabase, tmp_path: Path, everything_lost: Callable[[], None]
) -> None:
    mute = Peer(tmp_path, receives=False)

    def keeps_nothing(_: EffectTicket, what: str) -> None:
        mute.applied.append(what)

    mute.take = keeps_nothing  # type: ignore[method-assign]
    mute.dies = ["after"]
    with mute.store:
        await lose(control, workflow(mute))
        everything_lost()
        async with mute.answering():
            result = await lost(mute)
    assert (result["status"], mute.applied) == ("in_doubt", ["4711"])
    assert "Did 'order 4711' reach inventory-agent?" in " ".join(result["reasons"])


@pytest.mark.parametrize("receives", [True, False])
async def test_an_effect_of_the_whole_thread_is_not_done_again_at_a_peer_that_has_seen_it(
    control: ControlDatabase, tmp_path: Path, everything_lost: Callable[[], None], *, receives: bool
) -> None:
    peer = Peer(tmp_path, receives=receives)
    with peer.store:
        peer.dies = ["after"]
        await lose(control, workflow(peer, scope="thread"))
        everything_lost()
        async with peer.answering():
            result = await lost(peer, app=workflow(peer, scope="thread"))
    assert (result["status"], peer.applied) == ("restarted", ["4711"])
    assert result["final_state"]["log"] == ["in", "plan", {"number": 1}]


async def test_another_run_on_purpose_has_no_doubts_of_the_one_that_nobody_remembers(
    control: ControlDatabase, peer: Peer, everything_lost: Callable[[], None]
) -> None:
    mails = Mails()
    await lose(control, mails.workflow(peer))
    everything_lost()
    async with peer.answering():
        result = await lost(peer, app=mails.workflow(peer), despite_silence=True)
    assert result["final_state"]["log"] == ["in", "mail 2", {"number": 1}]
