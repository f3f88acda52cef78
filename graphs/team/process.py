"""One process of the team: `python -m graphs.team.process ROLE SCENARIO [THREAD [DAWDLE_AT]]`.

Roles: `inventory-agent` and `marketing-agent` serve until they are ended, `product-agent` runs one
launch, `supervisor` finishes the launches whose process is lost, `sentinel` sees processes die.
With DAWDLE_AT the launch does not write down what came of that effect until it is told to go on, by
a line on its input.
"""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from graphs.team.mail import Mailbox
from graphs.team.peers import do_once, inventory_workflow, marketing_workflow
from graphs.team.product import Launch, Steps, product_workflow
from graphs.team.scenario import (
    INVENTORY,
    PRODUCT,
    SENTINEL,
    SUPERVISOR,
    Scenario,
    open_checkpointer,
    say,
)
from langgraph_peerctx import (
    AgentContextService,
    AgentFailure,
    EventStore,
    PeerContextRuntime,
    PeerContextSettings,
    Receiver,
    RecoveryResult,
    RecoverySupervisor,
    StaleOwnerError,
    owned,
    peer_context_lifespan,
)
from langgraph_peerctx.background import BackgroundRuntime
from langgraph_peerctx.messaging.mock_transport import create_transport
from langgraph_peerctx.messaging.sentinel import Sentinel
from langgraph_peerctx.messaging.transport import Transport
from langgraph_peerctx.protocol.messages import ContextResponse
from langgraph_peerctx.reconstruction.incident import StepRecord

START: Launch = {"product": "umbrella", "units": 3}
WATCHED_SECONDS = 5.0
"""How long a launch waits for the sentinel; without one it begins, and silence would tell."""


async def peer(agent_id: str, scenario: Scenario) -> None:
    """Serve letters, and answer what is asked about a lost colleague."""
    workflow = inventory_workflow() if agent_id == INVENTORY else marketing_workflow()
    settings = scenario.settings_of(agent_id)
    async with connected(settings) as (transport, store):
        receiver = await Receiver.acreate(agent_id, store=store)
        mailbox = Mailbox(agent_id, transport, store, partial(do_once, receiver, workflow))
        await mailbox.open()
        async with AgentContextService(agent_id, settings=settings, store=store):
            say("ready")
            await mailbox.serve()


async def product(
    scenario: Scenario, thread_id: str, dawdle_at: str, told: threading.Event
) -> None:
    """Run one launch as its owner; with `dawdle_at` it is meant to be disturbed there."""

    async def dawdle(kind: str) -> None:
        if kind == dawdle_at:
            say("dawdling", kind=kind)
            await asyncio.to_thread(told.wait)

    settings = scenario.settings_of(PRODUCT)
    async with (
        connected(settings) as (transport, store),
        open_checkpointer(scenario.checkpoints) as checkpointer,
        peer_context_lifespan(settings=settings) as runtime,
    ):
        mailbox = Mailbox(PRODUCT, transport, store)
        await mailbox.open()
        workflow = product_workflow(Steps(mailbox, dawdle), checkpointer)
        async with owned(workflow, agent_id=PRODUCT, thread_id=thread_id) as run:
            say("ready", watched_by=await until_watched(runtime, settings))
            try:
                say("final", state=await run.ainvoke(START))
            except StaleOwnerError as error:
                found = await workflow.aget_state({"configurable": {"thread_id": thread_id}})
                say("refused", error=type(error).__name__, why=str(error), state=found.values)


async def supervisor(scenario: Scenario) -> None:
    """Notice launches whose process is lost, and finish them with what the peers remember."""
    settings = scenario.settings_of(SUPERVISOR)
    async with (
        connected(settings) as (transport, store),
        open_checkpointer(scenario.checkpoints) as checkpointer,
    ):
        mailbox = Mailbox(PRODUCT, transport, store)
        await mailbox.open()
        workflow = product_workflow(Steps(mailbox), checkpointer)
        async with RecoverySupervisor(
            {"product": workflow},
            settings=settings,
            on_failure=tell_failure,
            on_step=tell_step,
            on_answer=tell_answer,
            on_recovery=tell_recovery,
        ):
            say("ready")
            await asyncio.Event().wait()


async def sentinel(scenario: Scenario) -> None:
    """See processes of this host die; `peerctx sentinel` is the same, as a service."""
    async with Sentinel(scenario.settings_of(SENTINEL)) as watching:
        say("ready")
        await watching.run()


async def until_watched(runtime: BackgroundRuntime, settings: PeerContextSettings) -> str | None:
    """Wait until the host's sentinel would see us die, if there is one; return its name."""

    async def watcher(running: PeerContextRuntime) -> str | None:
        return running.presence.standing.sentinel_id

    if settings.sentinel == "off":
        return None
    try:
        async with asyncio.timeout(WATCHED_SECONDS):
            while (found := await runtime.acall(watcher)) is None:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.02)
    except TimeoutError:
        return None
    return found


def tell_failure(failure: AgentFailure) -> None:
    """Tell how a lost launch was noticed."""
    say("known", thread_id=failure.thread_id, why=failure.why, by=failure.by)


def tell_step(step: StepRecord) -> None:
    """Tell of a step of the recovery; the first begins when the launch is claimed."""
    say("recovery", step=step["step"], seconds=step["elapsed_seconds"], outcome=step["outcome"])


def tell_answer(answer: ContextResponse) -> None:
    """Tell what a peer remembers, and what it says of an effect in doubt."""
    told = [i.model_dump(mode="json") for a in answer.agents for i in a.interactions]
    say("answer", thread_id=answer.thread_id, peer=answer.responder_id, told=told)
    for word in answer.in_doubt:
        say("in_doubt", thread_id=answer.thread_id, **word.model_dump(mode="json"))


def tell_recovery(failure: AgentFailure, result: RecoveryResult) -> None:
    """Tell how it ended."""
    names = ("status", "degraded", "reasons", "peer_context_used")
    told = {name: result[name] for name in names}  # type: ignore[literal-required]  # all are there
    effects = result["incident"]["effects"]
    say("final", thread_id=failure.thread_id, state=result["final_state"], effects=effects, **told)


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


class Told(logging.Handler):
    """What is logged is a part of the story."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        say("logged", text=self.format(record))


def listen(told: threading.Event) -> None:
    """Listen to whoever started us, and end when they do: nobody would be left to end us."""
    while os.read(0, 64):  # not sys.stdin: its lock would outlive the interpreter's end
        told.set()
    os._exit(1)


def main(role: str, scenario_json: str, thread_id: str = "", dawdle_at: str = "") -> None:
    """Do one role's work until it is done, or until somebody ends the process."""
    told = threading.Event()
    threading.Thread(target=listen, args=[told], daemon=True).start()
    logging.getLogger().addHandler(Told())
    scenario = Scenario.from_json(scenario_json)
    if role == PRODUCT:
        asyncio.run(product(scenario, thread_id, dawdle_at, told))
    elif role == SUPERVISOR:
        asyncio.run(supervisor(scenario))
    elif role == SENTINEL:
        asyncio.run(sentinel(scenario))
    else:
        asyncio.run(peer(role, scenario))


if __name__ == "__main__":
    main(*sys.argv[1:])
