"""A run of which no record is left, begun anew under what its peers remember of it.

The agent's own stores are gone with its host. What its peers hold of the run names its id and its
epoch: under the same id each effect has the same key again, so that a peer knows a repeated one. An
effect that no ledger knows any more is in doubt until its peer has told. So it is where nobody
remembers the run, too: what reaches no peer, or one that keeps nothing, leaves no trace.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from langchain_core.runnables import RunnableConfig

from langgraph_peerctx.asking import calls_of
from langgraph_peerctx.durability.admission import (
    Redact,
    fenced,
    hides,
    packed_config,
    packed_context,
    packed_input,
)
from langgraph_peerctx.durability.fenced_checkpointer import EPOCH, FencedCheckpointer
from langgraph_peerctx.durability.ownership import AgentFence, Ownership
from langgraph_peerctx.durability.recording import recorded, recorder_of
from langgraph_peerctx.durability.run_config import but_its_own
from langgraph_peerctx.durability.workflow import Workflow, checkpointer_of
from langgraph_peerctx.identifiers import new_id
from langgraph_peerctx.owned import name_of
from langgraph_peerctx.owned_run import how_it_ended, warn_of_doubts, write_end
from langgraph_peerctx.persistence.runs import EndKind, NewRun, RunDurability, RunInput
from langgraph_peerctx.protocol.messages import Json
from langgraph_peerctx.reconstruction.checkpoint import reading
from langgraph_peerctx.reconstruction.settling import OwnedThread
from langgraph_peerctx.runtime import PeerContextRuntime

RECEIPT: Final = "effect"
"""The kind of interaction that a `Receiver` records; see `persistence.receipts`."""
MARGIN = 16
"""So many owners may have come after the last that wrote a checkpoint."""
HIGHEST_EPOCH: Final = 2**53
"""No thread changes owners so often: a higher one is a lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """What peers remember of a run.

    Attributes:
        run_ids: The runs that it can be, sorted: those that were given the same, or else those of
            which nobody knows what they were given.
        is_sure: Whether it is the one that stands there.
        epoch: The highest epoch that any of them has seen.
        since: When the first of it happened; None if nobody knows of anything.
    """

    run_ids: tuple[str, ...] = ()
    is_sure: bool = False
    epoch: int = 0
    since: datetime | None = None

    @property
    def run_id(self) -> str | None:
        """The run, if it is known which it is."""
        return self.run_ids[0] if self.is_sure else None


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
    receipts = [f for f in done if f.get("kind") == RECEIPT]
    of_runs = [f for f in named if f.get("kind") == RECEIPT]
    digests = {str(f["run_id"]): _payload(f).get("input_digest") for f in of_runs}
    same = {run_id for run_id, digest in digests.items() if digest and digest == input_digest}
    # A peer without receipts knows the run, and not what it was given.
    unsure = {run_id for f in named if digests.get(run_id := str(f["run_id"])) is None}
    run_ids = same or unsure
    return Remembered(
        run_ids=tuple(sorted(run_ids)),
        is_sure=len(same) == 1,
        epoch=max(map(_epoch, receipts), default=0),
        since=min((_when(f) for f in named if str(f["run_id"]) in run_ids), default=None),
    )


def said_of(known: Remembered, run_id: str | None) -> str:
    """Say what a run was begun anew with; pure.

    Args:
        known: What peers remember.
        run_id: Under which id it was begun.
    """
    if known.run_id is None:
        return (
            f"lost_stores: no record of the run is left, and nobody remembers one with this input: "
            f"begun as run {run_id}; what was not for peers to see may have been done before, and "
            "is in doubt"
        )
    return (
        f"lost_stores: no record of the run is left but what peers remember of run {run_id}: an "
        "effect that none of them has seen is in doubt, and so is what was not theirs to see"
    )


def unheard(coverage: Mapping[str, Any] | None, expect: Sequence[str]) -> list[str]:
    """Return who should have told what it remembers and has not; pure.

    Args:
        coverage: Of the gather; None if nobody was to be asked.
        expect: Who was to answer, if the caller said so.
    """
    if coverage is None:
        return []
    kinds = ("silent", "left", "busy", "declined", "contradicted")
    missing = {name for kind in kinds for name in coverage.get(kind, [])}
    missing |= set(expect) - set(coverage.get("answered", []))
    if not missing and not coverage.get("roster_known"):
        return ["whoever worked with it"]
    return sorted(missing)


def what_is_missing(
    known: Remembered, coverage: Mapping[str, Any] | None, expect: Sequence[str]
) -> str | None:
    """Say what must be known before a run is begun anew; None if nothing is missing; pure.

    Args:
        known: What peers remember.
        coverage: Of the gather; None if nobody was to be asked.
        expect: Who was to answer, if the caller said so.
    """
    if known.run_ids and not known.is_sure:
        return (
            "No record of the run is left, and it may be one of those that peers remember: "
            f"{', '.join(known.run_ids)}. Name it with run_id=, or begin another one with "
            "despite_silence=True"
        )
    silent = unheard(coverage, expect)
    if not silent:
        return None
    return (
        f"No record of the run is left, and {', '.join(silent)} may remember what it has done, and "
        "did not say: try again when it does, or begin it anew with despite_silence=True"
    )


@dataclass(slots=True, kw_only=True)
class Begun:
    """A run that was begun anew.

    Attributes:
        thread: Its thread, under our lease.
        workflow: Behind its fence.
        place: What to run it with.
        error: What it raised, if it did: for whoever runs it to set.
    """

    thread: OwnedThread
    run_id: str
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
        is_another: Whether the caller wants another run than the lost one, of which nobody knows.
        redact: What to store of the input; see `own_runs`.
    """

    owning: Callable[[], Awaitable[PeerContextRuntime]]
    asks_peers: bool
    is_configured: bool
    is_another: bool = False
    redact: Redact | None = None

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
        input_digest: str | None,
        context: Any,
        durability: RunDurability | None,
    ) -> AsyncIterator["Begun"]:
        """Admit the run, and write down how it ended at the end of the block.

        Raises:
            ThreadBusyError: If anybody is at work on the thread.
            ConfigurationError: If the input cannot be stored, or `redact` failed.
            StoreError: If the control database failed.
        """
        value = packed_input(workflow, initial_state, self.redact)
        input_digest = None if hides(value) else input_digest
        runtime = await self.owning()
        ownership = await runtime.own()
        thread_id = place["configurable"]["thread_id"]
        seconds = runtime.settings.database_timeout_seconds
        since = known.since if known.run_id is not None else None
        if since is None and not self.is_another:
            since = datetime.now(UTC)
        run = NewRun(
            run_id=known.run_id or new_id(),
            agent_id=agent_id,
            thread_id=thread_id,
            given=RunInput(value=value),
            workflow=name_of(workflow, agent_id),
            config=packed_config(workflow, place),
            context=packed_context(workflow, context),
            durability=durability,
            doubted_since=since,
            above_epoch=max(known.epoch, await epoch_above(workflow, place, seconds)),
        )
        held = await ownership.aadmit(run)
        calls = calls_of(runtime) if self.asks_peers else None
        thread = OwnedThread(ownership=ownership, held=held, calls=calls)
        effects = thread.effects_of(run.run_id, input_digest=input_digest, doubted_since=since)
        metadata = {**(place.get("metadata") or {}), "run_id": run.run_id}
        behind = fenced(workflow, AgentFence(agent_id, ownership))
        with_effects = effects.go_along({**place, "metadata": metadata})
        recorder = recorder_of(agent_id)
        begun = Begun(
            thread=thread,
            run_id=run.run_id,
            workflow=behind,
            place=but_its_own(recorded(with_effects, recorder), workflow.config),
        )
        try:
            yield begun
        except BaseException as error:
            await write_end(ownership, held, run.run_id, *self._ended(error, ownership))
            raise
        if begun.error is not None:
            await write_end(ownership, held, run.run_id, *self._ended(begun.error, ownership))
        else:
            await write_end(ownership, held, run.run_id, "returned", None)
            warn_of_doubts(begun.place, "returned")

    def _ended(self, error: BaseException, ownership: Ownership) -> tuple[EndKind, str | None]:
        return how_it_ended(error, ownership, is_hidden=self.redact is not None)


async def epoch_above(workflow: Workflow, place: RunnableConfig, timeout_seconds: float) -> int:
    """Return an epoch that no owner of the thread is likely to have had.

    Peers do not tell of the epochs below which they have barred keys. Where checkpoints are left,
    these say which the last owner's was, and a fence looks at every epoch since. Otherwise the
    seconds since 1970 are above any that was counted, and above those of an earlier loss.

    Raises:
        StoreError: If the checkpointer failed, or did not answer in time.
    """
    saver = checkpointer_of(workflow)
    if saver is None:
        return int(time.time())
    bare = saver.bare if isinstance(saver, FencedCheckpointer) else saver
    async with reading(bare, timeout_seconds):
        newest = await bare.aget_tuple(place)
    if newest is None:
        return int(time.time())
    epoch = newest.metadata.get(EPOCH)
    return MARGIN + (epoch if isinstance(epoch, int) else 0)


def _when(fact: Json) -> datetime:
    return datetime.fromisoformat(str(fact["occurred_at"]))


def _payload(fact: Json) -> Json:
    payload = fact.get("payload")
    return payload if isinstance(payload, dict) else {}


def _epoch(fact: Json) -> int:
    epoch = _payload(fact).get("epoch")
    if not isinstance(epoch, int) or isinstance(epoch, bool):
        return 0
    return epoch if 0 < epoch <= HIGHEST_EPOCH else 0
