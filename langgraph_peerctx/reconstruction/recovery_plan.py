"""What a recovery is made of, and what its graph keeps of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from langchain_core.runnables import RunnableConfig
from langgraph.types import Durability
from pydantic import Field
from typing_extensions import TypedDict  # pydantic makes schemas of this one only, up to 3.11

from langgraph_peerctx import background
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.workflow import Workflow
from langgraph_peerctx.gathering.gatherer import OnAnswer
from langgraph_peerctx.nodes.on_runtime import RuntimeSource
from langgraph_peerctx.nodes.peer_context_subgraph import Limits, PeerContextInput, QuestionState
from langgraph_peerctx.persistence.runs import Run
from langgraph_peerctx.reconstruction.approval import Thresholds
from langgraph_peerctx.reconstruction.gap_filling import Inference
from langgraph_peerctx.reconstruction.incident import OnStep, StepRecord
from langgraph_peerctx.reconstruction.lost_stores import LostStores
from langgraph_peerctx.reconstruction.report import Noticed
from langgraph_peerctx.reconstruction.resume import Admitted
from langgraph_peerctx.reconstruction.settling import OwnedThread
from langgraph_peerctx.reconstruction.sources import OwnEvents


class RecoveryInput(PeerContextInput, total=False):
    """Which workflow is to be recovered, and who is to be asked."""

    initial_state: Annotated[
        dict[str, Any] | None,
        Field(
            title="Initial state",
            description="What to begin with if the thread has no checkpoint.",
            examples=[{"product": "umbrella"}],
        ),
    ]
    in_doubt: Annotated[
        list[dict[str, Any]],
        Field(
            title="Effects in doubt",
            description="Effects of which nobody here knows whether they happened; see InDoubtKey.",
            examples=[[]],
        ),
    ]


class RecoveryOutput(TypedDict, total=False):
    """How the recovery ended."""

    result: Annotated[
        dict[str, Any] | None,
        Field(title="Result", description="As RecoveryResult, plain JSON; None before the end."),
    ]


class RecoveryState(RecoveryInput, QuestionState, RecoveryOutput, total=False):
    """The recovery's own state, plain JSON; no channel of it has a reducer.

    So it may stand inside another graph: a reducer that both share would double what it has.
    """

    incident_id: str
    started_at: str
    epoch: int
    doubts: list[str]
    run_id: str | None
    action: str
    checkpoint: dict[str, Any] | None
    reaches_checkpoint: bool
    gathered: dict[str, Any] | None
    noticed: dict[str, Any] | None
    evidence: dict[str, Any]
    approval: dict[str, Any]
    steps: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """What a recovery is made of, and no checkpoint can keep.

    Attributes:
        admitted: The run, where it was written down when it began: its input outranks
            `initial_state`.
        incident_id: The incident, where there is a row of it; by default a fresh one.
        before: Steps that were taken before the graph, the claim for instance.
        noticed: How the failure was noticed, and when.
        thread: The thread, where it is ours: its effects are settled, and done, under our lease.
        ended: The thread's last run, where it is not being recovered as an open one.
        lost: Begins a run anew of which no record is left; None if the caller owns nothing.
        run_id: Which run it was, where the caller knows.
        despite_silence: Whether it is begun although peers that may remember it say nothing.
        answers: What a human says of effects in doubt, by their keys.
        inference: A model that may fill what no evidence has.
        can_ask: Whether a human can be asked: an interrupt needs a checkpointer.
        source: Another runtime than the process's own.
        open_store: Another event store than the settings'.
        initial_state: What to begin with, where the state does not say.
    """

    workflow: Workflow
    admitted: Admitted | None = None
    incident_id: str | None = None
    before: tuple[StepRecord, ...] = ()
    noticed: Noticed | None = None
    thread: OwnedThread | None = None
    ended: Run | None = None
    lost: LostStores | None = None
    run_id: str | None = None
    despite_silence: bool = False
    answers: Mapping[str, Any] = field(default_factory=dict)
    inference: Inference = field(default_factory=Inference)
    can_ask: bool = True
    channel: str = "peer_context"
    context: Any = None
    config: RunnableConfig | None = None
    durability: Durability | None = None
    initial_state: Any = None
    use_peer_context: bool = True
    limits: Limits = field(default_factory=Limits)
    thresholds: Thresholds = field(default_factory=Thresholds)
    settings: PeerContextSettings | None = None
    source: RuntimeSource | None = None
    open_store: Callable[[], OwnEvents] | None = None
    on_step: OnStep | None = None
    on_answer: OnAnswer | None = None

    def settings_now(self) -> PeerContextSettings:
        """Return the settings that count at this moment."""
        return self.settings or background.settings_in_use() or PeerContextSettings()
