"""When a language model is asked at all, and how what it infers reaches the workflow."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from langchain_core.language_models import BaseChatModel

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.workflow import Workflow, input_keys, state_keys
from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.protocol.messages import Json
from langgraph_peerctx.reconstruction.checkpoint import CheckpointView
from langgraph_peerctx.reconstruction.gap_schema import GapSchema
from langgraph_peerctx.reconstruction.inference import Inferred, gaps_of, infer
from langgraph_peerctx.reconstruction.resume import Delivery, also_at_head


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """A model that may fill gaps, and which.

    Attributes:
        llm: Any chat model; None infers nothing.
        keys: The state keys that may be inferred; by default any that has no value, and only where
            the run is begun anew from what the caller knows: a run's own record and its checkpoint
            have no gaps, what they lack was not there.
    """

    llm: BaseChatModel | None = None
    keys: tuple[str, ...] = ()

    def check(self, workflow: Workflow) -> None:
        """See that the keys are the workflow's.

        Raises:
            ConfigurationError: If one is not, or there is no model to infer it.
        """
        if self.keys and self.llm is None:
            raise ConfigurationError(f"infer={list(self.keys)} needs llm=, a chat model")
        if unknown := sorted(set(self.keys) - state_keys(workflow)):
            raise ConfigurationError(
                f"infer= names {', '.join(unknown)}, which the workflow's state lacks"
            )

    async def fill(
        self,
        workflow: Workflow,
        values: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        is_exact: bool,
        but: Collection[str] = (),
        settings: PeerContextSettings | None = None,
    ) -> Inferred:
        """Ask for what has no value.

        Args:
            workflow: Whose state it is.
            values: What is known of it.
            facts: Event id -> fact, of the peers.
            is_exact: Whether the values are a checkpoint's, or the run's own record.
            but: Keys that hold what peers told.
            settings: For the longest question and wait; by default from the environment.
        """
        settings = settings or PeerContextSettings()
        gaps = gaps_of(workflow, values, but=but)
        if self.keys:
            gaps = tuple(key for key in gaps if key in self.keys)
        elif is_exact:
            gaps = ()
        return await infer(
            self.llm,
            workflow,
            gaps=gaps,
            state={key: value for key, value in values.items() if key not in but},
            facts=facts,
            budget_tokens=settings.inference_tokens,
            timeout_seconds=settings.inference_timeout_seconds,
        )


def filled(
    workflow: Workflow, view: CheckpointView, delivery: Delivery, values: Json, *, anew: bool
) -> Delivery:
    """Add inferred values to what a workflow is run with; a value that is there stays; pure.

    Args:
        workflow: The workflow.
        view: Its thread.
        delivery: What it would be run with.
        values: State key -> value, as the reconstruction has it.
        anew: Whether the run begins anew.
    """
    if not values:
        return delivery
    read, _ = GapSchema.of(workflow, [*values]).validated(values, {})
    if not anew:
        held = {*view.values, *view.pending_channels}
        new = {key: value for key, value in read.items() if key not in held}
        return also_at_head(view, delivery, new)
    given = delivery.input
    if not isinstance(given, Mapping):
        return delivery
    new = {k: v for k, v in read.items() if k in input_keys(workflow) and k not in given}
    return replace(delivery, input={**given, **new})
