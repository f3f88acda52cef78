"""What peers dispute settles nothing, and what they have consumed is shown before a resume."""

import operator
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import owning
import pytest
from owning import AGENT, AT, GHOST, THREAD, new_run, settled, until

from langgraph_peerctx import EffectTicket, Receiver, current_effect, effect
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.admission import digest_of, packed_config
from langgraph_peerctx.durability.run_effects import About, RunEffects
from langgraph_peerctx.messaging.agent_context_service import AgentContextService
from langgraph_peerctx.nodes.state import PeerContextState
from langgraph_peerctx.persistence.event_store import EventStore, record_interaction
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.reconstruction.answering import aanswer_recovery
from langgraph_peerctx.reconstruction.recoverer import SupervisedWorkflow
from langgraph_peerctx.reconstruction.recovery import recover_and_resume_workflow_async
from langgraph_peerctx.reconstruction.supervisor import RecoverySupervisor

PEER, HOSTS = "inventory-agent", ("host-a", "host-b")
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
    monkeypatch.setenv("PEER_CONTEXT_TIMEOUT_SECONDS", "5")
    return PeerContextSettings()


class Hosts:
    """Two processes that answer for one agent, each out of a store of its own."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.stores = {
            host: stack.enter_context(EventStore(f"sqlite:///{folder}/{host}.db")) for host in HOSTS
        }
        self.tickets: list[EffectTicket] = []

    @asynccontextmanager
    async def answering(
        self, settings: PeerContextSettings, *, only: Collection[str] = HOSTS
    ) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for host in only:
                own = settings.model_copy(update={"process_id": host})
                service = AgentContextService(PEER, settings=own, store=self.stores[host])
                await stack.enter_async_context(service)
            yield

    def make_receivers(self) -> None:
        for store in self.stores.values():
            Receiver(PEER, store=store)

    def receive(self, host: str, number: int) -> None:
        """Take the last effect on one host."""
        with Receiver(PEER, store=self.stores[host]).receive(self.tickets[-1]) as receipt:
            receipt.reply = {"number": number}

    def record(self, host: str, kind: str, payload: Any, **more: Any) -> None:
        """Record something about the last effect on one host, as one without receipts does."""
        ticket = self.tickets[-1]
        parties = (AGENT, PEER) if kind == "order" else (PEER, AGENT)
        record_interaction(
            agent_id=PEER,
            from_agent=parties[0],
            to_agent=parties[1],
            thread_id=THREAD,
            kind=kind,
            payload=payload,
            interaction_id=f"{kind}-1",
            run_id=ticket.run_id,
            store=self.stores[host],
            **{"effect_key": ticket.effect_key, **more},
        )


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[Hosts]:
    async with AsyncExitStack() as stack:
        yield Hosts(tmp_path, stack)


async def lose(control: ControlDatabase, hosts: Hosts) -> Any:
    """Run a workflow as a process that dies in its effect; return the workflow."""

    async def plan(_: State) -> Any:
        record_interaction(
            agent_id=PEER,
            from_agent=AGENT,
            to_agent=PEER,
            thread_id=THREAD,
            kind="plan",
            interaction_id="plan-1",
            store=hosts.stores["host-a"],
        )
        return {"log": ["plan"]}

    async def call() -> Any:
        hosts.tickets.append(current_effect())
        raise KilledError

    async def order(_: State) -> Any:
        return {"log": [await effect("order 4711", call, peer=PEER)]}

    app = owning.workflow(order, first=plan, state=State)
    run = new_run(app, durability="sync", config=packed_config(app, {}))
    lease = control.admit(run, GHOST)
    about = About(
        agent_id=AGENT,
        thread_id=THREAD,
        run_id="r1",
        epoch=lease.epoch,
        input_digest=digest_of(owning.IN),
    )
    effects = RunEffects(control, about, incarnation=GHOST.incarnation)
    place = effects.go_along({**AT, "metadata": {"run_id": "r1"}})
    with pytest.raises(KilledError):
        await app.ainvoke(owning.IN, place, durability="sync")
    return app


async def recover(app: Any) -> Any:
    return await recover_and_resume_workflow_async(
        workflow=app, agent_id=AGENT, thread_id=THREAD, expect=HOSTS
    )


def see_that_nothing_is_settled(control: ControlDatabase, hosts: Hosts, result: Any) -> None:
    """See that a human is asked, that nothing is written down, and nothing was called again."""
    assert (result["status"], result["recovered"]) == ("waiting_for_human", False)
    (reason,) = result["reasons"]
    assert "Did 'order 4711' reach inventory-agent? inventory-agent cannot tell." in reason
    (known,) = control.effects_of(AGENT, THREAD, "r1")
    assert (known.status, known.outcome, known.unknown_to) == ("intent", None, "peer")
    assert len(hosts.tickets) == 1


def said(result: Any, name: str) -> dict[str, Any]:
    """Return who says what in the one conflict of a result."""
    (conflict,) = result["incident"]["conflicts"]
    return {teller: told["payload"][name] for teller, told in conflict["versions"].items()}


async def test_of_a_peer_that_has_and_has_not_seen_an_effect_nothing_is_settled(
    control: ControlDatabase, hosts: Hosts, settings: PeerContextSettings
) -> None:
    hosts.make_receivers()
    app = await lose(control, hosts)
    hosts.receive("host-b", 7)
    async with hosts.answering(settings):
        result = await recover(app)
    see_that_nothing_is_settled(control, hosts, result)
    assert result["incident"]["coverage"]["contradicted"] == [PEER]


async def test_of_a_peer_that_replied_in_two_ways_nothing_is_settled_and_both_are_named(
    control: ControlDatabase, hosts: Hosts, settings: PeerContextSettings
) -> None:
    hosts.make_receivers()
    app = await lose(control, hosts)
    hosts.receive("host-a", 7)
    hosts.receive("host-b", 8)
    async with hosts.answering(settings):
        result = await recover(app)
    see_that_nothing_is_settled(control, hosts, result)
    assert said(result, "reply") == {
        "inventory-agent on host-a": {"number": 7},
        "inventory-agent on host-b": {"number": 8},
    }


async def test_a_peer_that_agrees_on_its_reply_and_not_on_what_it_was_asked_settles_nothing(
    control: ControlDatabase, hosts: Hosts, settings: PeerContextSettings
) -> None:
    app = await lose(control, hosts)
    for host, count in zip(HOSTS, (10, 100), strict=True):
        hosts.record(host, "order", {"count": count})
        hosts.record(host, "order-done", {"number": 7})
    async with hosts.answering(settings):
        result = await recover(app)
    see_that_nothing_is_settled(control, hosts, result)
    assert said(result, "count") == {
        "inventory-agent on host-a": 10,
        "inventory-agent on host-b": 100,
    }


async def test_a_dispute_is_one_whenever_the_supervisor_asks_again(
    control: ControlDatabase, hosts: Hosts, settings: PeerContextSettings
) -> None:
    app = await lose(control, hosts)
    for host, count in zip(HOSTS, (10, 100), strict=True):
        hosts.record(host, "order", {"count": count})
        hosts.record(host, "order-done", {"number": 7})
    supervised = SupervisedWorkflow(workflow=app, expect=HOSTS)

    def known() -> Any:
        return control.effects_of(AGENT, THREAD, "r1")[0]

    async with hosts.answering(settings), RecoverySupervisor({"launch": supervised}):
        await settled(control, "waiting_for_human")
        first = known().unknown_at
        await until(lambda: known().status != "intent" or known().unknown_at > first)
        incident = control.incident_of(AGENT, THREAD)
    assert known().status == "intent"
    assert incident is not None
    assert incident.status != "recovered"
    assert len(hosts.tickets) == 1


async def test_a_dispute_about_something_else_keeps_nobody_from_settling_an_effect(
    control: ControlDatabase, hosts: Hosts, settings: PeerContextSettings
) -> None:
    app = await lose(control, hosts)
    for host, count in zip(HOSTS, (10, 100), strict=True):
        hosts.record(host, "order", {"count": 10})
        hosts.record(host, "order-done", {"number": 7})
        hosts.record(host, "remark", {"count": count}, effect_key=None)
    async with hosts.answering(settings):
        result = await recover(app)
    assert len(said(result, "count")) == 2
    assert result["final_state"]["log"] == ["in", "plan", {"number": 7}]
    assert len(hosts.tickets) == 1


async def test_whoever_approves_sees_the_effects_and_what_peers_took_after_the_checkpoint(
    control: ControlDatabase, hosts: Hosts, settings: PeerContextSettings
) -> None:
    hosts.make_receivers()
    app = await lose(control, hosts)
    hosts.receive("host-a", 7)
    snapshot = await app.aget_state(AT)
    supervised = SupervisedWorkflow(
        workflow=app, expect=("host-a", "nobody"), timeout_seconds=4.0, approve_below_coverage=1.0
    )
    async with (
        hosts.answering(settings, only=["host-a"]),
        RecoverySupervisor({"launch": supervised}),
    ):
        incident = await settled(control, "waiting_for_human")
        question = incident.question
        assert question is not None
        assert question["why"] == ["coverage is 0.50, below 1"]
        (taken,) = question["consumed"]
        assert (taken["peer"], taken["kind"]) == (PEER, "effect")
        assert datetime.fromisoformat(taken["occurred_at"]) > datetime.fromisoformat(
            snapshot.created_at
        )
        assert "plan-1" in question["would_write"]["facts"]
        (shown,) = question["run_effects"]
        assert (shown["name"], shown["status"], shown["source"]) == ("order 4711", "done", "peer")
        await aanswer_recovery(incident.incident_id, True)  # noqa: FBT003 - the answer
        incident = await settled(control)
    assert incident.report is not None
    assert incident.report["consumed"] == [taken]
    assert (await app.aget_state(AT)).values["log"] == ["in", "plan", {"number": 7}]
