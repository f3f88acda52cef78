"""What is left of a recovery: its times, with the incident, and one trace from end to end."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import owning
import pytest
from owning import AGENT, GHOST, THREAD, new_run, settled
from runtime_threads import no_runtime_left
from spans import Spans, id_of, links_of, parent_of, trace_of, tracing_on

from langgraph_peerctx import background
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.messaging.agent_context_service import AgentContextService
from langgraph_peerctx.nodes.state import PeerContextState
from langgraph_peerctx.persistence.event_store import EventStore, record_interaction
from langgraph_peerctx.persistence.incidents import ControlDatabase, Incident
from langgraph_peerctx.reconstruction.explaining import explain
from langgraph_peerctx.reconstruction.recovery import recover_and_resume_workflow_async
from langgraph_peerctx.reconstruction.report import moment_of
from langgraph_peerctx.reconstruction.supervisor import RecoverySupervisor
from langgraph_peerctx.tracing import span


@pytest.fixture
def settings(
    settings_on_broker: PeerContextSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> PeerContextSettings:
    del settings_on_broker
    monkeypatch.setenv("KAFKA_CONTEXT_REQUEST_TOPIC", f"request.{tmp_path.name}"[:100])
    monkeypatch.setenv("PEER_CONTEXT_HEARTBEAT_PAUSE_SECONDS", "1.5")  # the peer beats on our loop
    return PeerContextSettings()


@pytest.fixture
def spans() -> Iterator[Spans]:
    with tracing_on() as found:
        yield found


@pytest.fixture(autouse=True)
async def _peer(settings: PeerContextSettings, tmp_path: Path) -> AsyncIterator[None]:
    """An inventory agent that remembers an order, in a process of its own name."""
    with no_runtime_left(), EventStore(f"sqlite:///{tmp_path}/inventory.db") as store:
        record_interaction(
            agent_id="inventory-agent",
            from_agent=AGENT,
            to_agent="inventory-agent",
            thread_id=THREAD,
            kind="order",
            interaction_id="order-1",
            store=store,
        )
        elsewhere = settings.model_copy(update={"process_id": "host-inventory"})
        async with AgentContextService("inventory-agent", settings=elsewhere, store=store):
            yield
        background.stop_kept_runtime()


def workflow() -> Any:
    async def second(_state: Any) -> Any:
        with span("the workflow's own"):
            return {}

    return owning.workflow(second, first=lambda _: {}, state=PeerContextState)


def lose(control: ControlDatabase, app: Any, traceparent: str | None = None) -> None:
    control.admit(new_run(app, {}, traceparent=traceparent), GHOST)


async def recovered(control: ControlDatabase, app: Any) -> Incident:
    async with RecoverySupervisor({"launch": app}):
        return await settled(control)


async def test_the_report_of_an_incident_has_its_times(control: ControlDatabase) -> None:
    app = workflow()
    lose(control, app)
    incident = await recovered(control, app)
    report: Any = incident.report
    times = report["times"]
    assert (times["why"], times["clocks"], times["last_heartbeat_at"]) == ("silent", "one", None)
    (answer,) = times["answers"]
    assert answer["responder_id"] == "host-inventory"
    assert answer["agents"] == {"inventory-agent": "context"}
    assert 0 < answer["after_seconds"] < 5
    order = [
        *("known_at", "claimed_at", "requested_at"),
        *("reconstructed_at", "resumed_at", "first_checkpoint_at", "ended_at"),
    ]
    moments = [moment_of(times[name]) for name in order]
    assert None not in moments
    assert moments == sorted(moments, key=str)
    first = [saved async for saved in app.checkpointer.alist(None)][-1]
    assert times["first_checkpoint_at"] == first.checkpoint["ts"]
    assert times["took"]["total"] >= times["took"]["to_resumed"] > 0
    assert ("known", "event.order-1") in [row[:2] for row in explain(report).rows()]


async def test_a_recovery_is_one_trace_linked_to_the_lost_runs(
    control: ControlDatabase, spans: Spans
) -> None:
    app = workflow()
    with span("the lost run") as lost:
        lose(control, app, lost.traceparent)
    incident = await recovered(control, app)
    root = spans.one("peerctx.recovery")
    assert parent_of(root) is None
    assert links_of(root) == [id_of(spans.one("the lost run"))]
    said = dict(root.attributes or {})
    assert said["peerctx.incident_id"] == incident.incident_id
    assert (said["peerctx.thread_id"], said["peerctx.run_id"]) == (THREAD, "r1")
    assert said["peerctx.status"] == "restarted"
    report: Any = incident.report
    assert report["traceparent"].split("-")[2] == f"{id_of(root):016x}"
    steps = {one.name for one in spans.all() if parent_of(one) == id_of(root)}
    assert steps == {f"peerctx.recovery.{step['step']}" for step in report["steps"]}
    inside = {
        "peerctx.gather": "peerctx.recovery.request_context",
        "peerctx.answer": "peerctx.gather",
        "the workflow's own": "peerctx.recovery.resume_workflow",
    }
    for name, parent in inside.items():
        assert parent_of(spans.one(name)) == id_of(spans.one(parent)), name
        assert trace_of(spans.one(name)) == trace_of(root)
    assert links_of(spans.one("peerctx.gather")) == [id_of(spans.one("peerctx.answer"))]


async def test_a_recovery_by_hand_belongs_to_its_callers_trace(
    spans: Spans, settings: PeerContextSettings
) -> None:
    with span("the caller"):
        result = await recover_and_resume_workflow_async(
            workflow=workflow(),
            agent_id=AGENT,
            thread_id=THREAD,
            initial_state={},
            expect=["inventory-agent"],
            settings=settings,
        )
    assert result["status"] == "restarted"
    root = spans.one("peerctx.recovery")
    assert parent_of(root) == id_of(spans.one("the caller"))
    assert {trace_of(one) for one in spans.all()} == {trace_of(root)}
    assert result["incident"]["times"]["answers"][0]["responder_id"] == "host-inventory"
