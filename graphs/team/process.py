"""One process of the team: `python -m graphs.team.process ROLE SCENARIO [THREAD [DAWDLE_IN]]`.

Roles: `inventory-agent` and `marketing-agent` serve until they are ended, `product-agent` runs one
launch, `recovery` takes over a launch whose process died.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from langchain_core.runnables import RunnableConfig

from graphs.team.mail import Letter, Mailbox
from graphs.team.peers import inventory_workflow, marketing_workflow
from graphs.team.product import Launch, Steps, product_workflow
from graphs.team.scenario import (
    INVENTORY,
    PEERS,
    PRODUCT,
    RECOVERY,
    Scenario,
    open_checkpointer,
    say,
)
from langgraph_peerctx import (
    AgentContextService,
    EventStore,
    PeerContextRuntime,
    PeerContextSettings,
    recover_and_resume_workflow_async,
)
from langgraph_peerctx.messaging.mock_transport import create_transport
from langgraph_peerctx.messaging.transport import Transport
from langgraph_peerctx.protocol.messages import ContextResponse

START: Launch = {"product": "umbrella", "units": 3}


async def peer(agent_id: str, scenario: Scenario) -> None:
    """Serve letters, and answer what is asked about a dead colleague."""
    workflow = inventory_workflow() if agent_id == INVENTORY else marketing_workflow()

    async def handle(letter: Letter) -> dict[str, Any]:
        say("work", kind=letter.kind, thread_id=letter.thread_id)
        result: dict[str, Any] = await workflow.ainvoke(letter.payload)
        return result

    settings = scenario.settings_of(agent_id)
    async with connected(settings) as (transport, store):
        mailbox = Mailbox(agent_id, transport, store, handle)
        await mailbox.open()
        async with AgentContextService(agent_id, settings=settings, store=store):
            say("ready")
            await mailbox.serve()


async def product(scenario: Scenario, thread_id: str, dawdle_in: str | None) -> None:
    """Run one launch; with `dawdle_in` it is meant to be killed there."""
    config: RunnableConfig = {"configurable": {"thread_id": thread_id}}
    async with (
        connected(scenario.settings_of(PRODUCT)) as (transport, store),
        open_checkpointer(scenario.checkpoints) as checkpointer,
    ):
        mailbox = Mailbox(PRODUCT, transport, store)
        await mailbox.open()
        workflow = product_workflow(Steps(mailbox, dawdle_in), checkpointer)
        say("ready")
        final = await workflow.ainvoke(START, config, durability="sync")
        say("final", state=final)


async def recovery(scenario: Scenario, thread_id: str) -> None:
    """Take over a dead process's launch, with what its peers remember."""

    def on_answer(answer: ContextResponse) -> None:
        told = [i.model_dump(mode="json") for a in answer.agents for i in a.interactions]
        say("answer", peer=answer.responder_id, told=told)

    settings = scenario.settings_of(RECOVERY)
    async with (
        connected(settings) as (transport, store),
        open_checkpointer(scenario.checkpoints) as checkpointer,
        PeerContextRuntime(settings, transport=transport, store=store) as runtime,
    ):
        mailbox = Mailbox(PRODUCT, transport, store)
        await mailbox.open()
        say("ready")
        result = await recover_and_resume_workflow_async(
            workflow=product_workflow(Steps(mailbox), checkpointer),
            agent_id=PRODUCT,
            thread_id=thread_id,
            initial_state=START,
            expect=PEERS,
            peer_context_timeout=5.0,
            runtime=runtime,
            on_answer=on_answer,
            on_step=lambda step: say("recovery", step=step["step"], status=step["outcome"]),
        )
        say(
            "final",
            state=result["final_state"],
            status=result["status"],
            degraded=result["degraded"],
            reasons=result["reasons"],
            peer_context_used=result["peer_context_used"],
        )


@asynccontextmanager
async def connected(
    settings: PeerContextSettings,
) -> AsyncIterator[tuple[Transport, EventStore]]:
    """Connect to the broker and open the process's own event store."""
    transport = create_transport(settings)
    with EventStore(settings.database_url) as store:
        await transport.start()
        try:
            yield transport, store
        finally:
            await transport.close()


def main(role: str, scenario_json: str, thread_id: str = "", dawdle_in: str = "") -> None:
    """Do one role's work until it is done, or until somebody ends the process."""
    scenario = Scenario.from_json(scenario_json)
    if role == PRODUCT:
        asyncio.run(product(scenario, thread_id, dawdle_in or None))
    elif role == RECOVERY:
        asyncio.run(recovery(scenario, thread_id))
    else:
        asyncio.run(peer(role, scenario))


if __name__ == "__main__":
    main(*sys.argv[1:])
