"""A run of which no record is left, begun anew under what its peers remember of it.

The agent's own stores are gone with its host. What its peers hold of the run names its id and its
epoch: under the same id each effect has the same key again, so that a peer knows a repeated one. An
effect that no ledger knows any more is in doubt until its peer has told.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from langchain_core.runnables import RunnableConfig

from langgraph_peerctx.asking import calls_of
from langgraph_peerctx.durability.admission import (
    digest_of,
    fenced,
    packed,
    packed_config,
    packed_context,
)
from langgraph_peerctx.durability.ownership import AgentFence
from langgraph_peerctx.durability.workflow import Workflow
from langgraph_peerctx.identifiers import new_id
from langgraph_peerctx.owned import how_it_ended, name_of, write_end
from langgraph_peerctx.persistence.runs import NewRun, RunDurability, RunInput
from langgraph_peerctx.protocol.messages import Json
from langgraph_peerctx.reconstruction.settling import OwnedThread
from langgraph_peerctx.runtime import PeerContextRuntime


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """What peers remember of a run.

    Attributes:
        run_id: The newest run with this input that any of them knows; None if none does.
        epoch: The highest epoch that any of them has seen.
        since: When the first of it happened; None if nobody knows of anything.
    """

    run_id: str | None = None
    epoch: int = 0
    since: datetime | None = None


def remembered(agent_id: str, facts: Mapping[str, Any], input_digest: str | None) -> Remembered:
    """Return what peers' facts say of the run of an agent that was given this input; pure.

    A run with another input is another one: its effects must not be taken for this one's.

    Args:
        agent_id: The agent.
        facts: Event id -> fact, as in `Reconstruction["peer_context"]`.
        input_digest: Of what the run is begun with; None if it is not known.
    """
    done = [f for f in facts.values() if f.get("from_agent") == agent_id]
    if not done:
        return Remembered()
    # An effect of the whole thread stands under the thread's id.
    named = [f for f in done if f.get("run_id") and f["run_id"] != f.get("thread_id")]
    digests = {str(f["run_id"]): _payload(f)["input_digest"] for f in named if _has_digest(f)}
    possible = [f for f in named if digests.get(str(f["run_id"]), input_digest) == input_digest]
    newest = max(possible, key=_when, default=None)
    run_id = None if newest is None else str(newest["run_id"])
    of_it = [_when(fact) for fact in done if fact.get("run_id") == run_id]
    since = min(of_it, default=None)
    return Remembered(run_id=run_id, epoch=max(map(_epoch, done)), since=since)


def said_of(known: Remembered, run_id: str | None) -> str:
    """Say what a run was begun anew with; pure.

    Args:
        known: What peers remember.
        run_id: Under which id it was begun.
    """
    if known.run_id is None:
        return (
            f"lost_stores: no record of the run is left, and nobody remembers one with this input: "
            f"begun as run {run_id}"
        )
    return (
        f"lost_stores: no record of the run is left but what peers remember of run {run_id}: an "
        "effect that none of them has seen is in doubt, and so is what was not theirs to see"
    )


def unheard(coverage: Mapping[str, Any] | None) -> list[str]:
    """Return who was asked and has not told what it remembers; pure."""
    if coverage is None:
        return []
    kinds = ("silent", "left", "busy", "declined", "truncated", "contradicted")
    return sorted({name for kind in kinds for name in coverage.get(kind, [])})


@dataclass(slots=True, kw_only=True)
class Begun:
    """A run that was begun anew.

    Attributes:
        workflow: Behind its fence.
        place: What to run it with.
        error: What it raised, if it did: for whoever runs it to set.
    """

    workflow: Workflow
    place: RunnableConfig
    error: Exception | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LostStores:
    """Begins a run anew under our lease.

    Attributes:
        owning: Returns the runtime that owns; its control database may be new.
        asks_peers: Whether peers are asked about effects in doubt.
        is_configured: Whether a control database was named: then any run is owned, otherwise only
            one that peers remember.
    """

    owning: Callable[[], Awaitable[PeerContextRuntime]]
    asks_peers: bool
    is_configured: bool

    def concerns(self, known: Remembered) -> bool:
        """Tell whether such a run is to be owned."""
        return self.is_configured or known.since is not None

    @asynccontextmanager
    async def begun(
        self,
        workflow: Workflow,
        place: RunnableConfig,
        known: Remembered,
        *,
        agent_id: str,
        initial_state: Any,
        context: Any,
        durability: RunDurability | None,
    ) -> AsyncIterator["Begun"]:
        """Admit the run, and write down how it ended at the end of the block.

        Raises:
            ThreadBusyError: If anybody is at work on the thread.
            StoreError: If the control database failed.
        """
        runtime = await self.owning()
        ownership = await runtime.own()
        thread_id = place["configurable"]["thread_id"]
        run = NewRun(
            run_id=known.run_id or new_id(),
            agent_id=agent_id,
            thread_id=thread_id,
            given=RunInput(value=packed(workflow, initial_state, name="input")),
            workflow=name_of(workflow, agent_id),
            config=packed_config(workflow, place),
            context=packed_context(workflow, context),
            durability=durability,
            doubted_since=known.since,
            above_epoch=known.epoch,
        )
        held = await ownership.aadmit(run)
        calls = calls_of(runtime) if self.asks_peers else None
        thread = OwnedThread(ownership=ownership, held=held, calls=calls)
        effects = thread.effects_of(
            run.run_id, input_digest=digest_of(initial_state), doubted_since=known.since
        )
        metadata = {**(place.get("metadata") or {}), "run_id": run.run_id}
        behind = fenced(workflow, AgentFence(agent_id, ownership))
        begun = Begun(workflow=behind, place=effects.go_along({**place, "metadata": metadata}))
        try:
            yield begun
        except BaseException as error:
            await write_end(ownership, held, run.run_id, *how_it_ended(error, ownership))
            raise
        if begun.error is not None:
            await write_end(ownership, held, run.run_id, *how_it_ended(begun.error, ownership))
        else:
            await write_end(ownership, held, run.run_id, "returned", None)


def _when(fact: Json) -> datetime:
    return datetime.fromisoformat(str(fact["occurred_at"]))


def _payload(fact: Json) -> Json:
    payload = fact.get("payload")
    return payload if isinstance(payload, dict) else {}


def _has_digest(fact: Json) -> bool:
    return isinstance(_payload(fact).get("input_digest"), str)


def _epoch(fact: Json) -> int:
    epoch = _payload(fact).get("epoch")
    return epoch if isinstance(epoch, int) and not isinstance(epoch, bool) and epoch > 0 else 0
