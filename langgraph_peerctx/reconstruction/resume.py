"""Decide what a thread needs, bring the peers' facts into its state once, and let it go on."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, Literal

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT
from langgraph.types import Command, Durability

from langgraph_peerctx.durability.isolation import in_empty_context
from langgraph_peerctx.durability.workflow import Workflow, input_keys
from langgraph_peerctx.errors import InDoubtError
from langgraph_peerctx.reconstruction.channel import peer_channel
from langgraph_peerctx.reconstruction.checkpoint import CheckpointView

_logger = logging.getLogger(__name__)

Action = Literal["resume", "restart", "answer", "stop"]
RecoveryStatus = Literal[
    "resumed",
    "restarted",
    "already_finished",
    "waiting_for_human",
    "needs_context",
    "nothing_to_recover",
    "not_approved",
    "in_doubt",
    "failed",
    "unreachable",
    "recovering_elsewhere",
    "recovered_elsewhere",
    "dead_letter",
]

_DISCARD_ANSWER: Final = {ERROR: "the answer stored here was used"}
"""An update that changes no channel, and makes LangGraph forget an answer that was used already.

Resumed with `None`, it would give that answer to the thread's next question (langgraph 1.2.22).
"""

_NEEDS_CONTEXT: Final = (
    "needs_context: the workflow has a context_schema, and contexts are not kept in checkpoints: "
    "pass context=, equal to the one of the process that died"
)

_REDACTED: Final = (
    "redacted_input: the run left no checkpoint, and its input was redacted before it was stored: "
    "begin it anew with initial_state="
)
_REDACTED_ANSWER: Final = (
    "redacted_answer: the answer was lost on its way, and it was redacted before it was stored: "
    "give it again"
)

_LATER: Final = (
    "not_delivered: an earlier recovery's facts wait at this step, and newer ones would make the "
    "thread unreadable: they stay in this result"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One thing that a run was given.

    Attributes:
        checkpoint_id: Where the thread stood then, if that was noted.
        is_redacted: Whether the value is not what was given, but what may be stored of it.
    """

    value: Any
    checkpoint_id: str | None = None
    is_redacted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The run that is recovered, as it was written down when it began.

    Attributes:
        inputs: Its input, then each answer; at least one.
        fork_of: What names the checkpoint from which it forked, if it did.
        doubted_since: The record of an earlier begin is lost; see `NewRun`.
    """

    run_id: str
    inputs: tuple[Given, ...]
    fork_of: Mapping[str, Any] | None = None
    doubted_since: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do with a thread.

    Attributes:
        status: How the recovery ends, if `action` is `stop`.
        reasons: Why it stops.
    """

    action: Action
    status: RecoveryStatus | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What the workflow is run with.

    Attributes:
        input: What goes to `ainvoke`: None, a `Command`, or the initial state with the facts in it.
        channel: The channel that has the facts, or will have them; None if they do not get there.
        is_new: Whether this input carries them: then they must be found at the head afterwards.
        shortfalls: Why the facts do not reach the workflow.
    """

    input: Any
    channel: str | None = None
    is_new: bool = False
    shortfalls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the workflow ended: with an output, or with what it raised."""

    output: Any = None
    error: Exception | None = None
    asked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a recovery ended that ran its workflow."""

    status: RecoveryStatus
    final_state: Any
    reasons: tuple[str, ...] = ()
    shortfalls: tuple[str, ...] = ()


def decide(
    workflow: Workflow,
    view: CheckpointView,
    *,
    has_initial_state: bool,
    has_context: bool,
    admitted: Admitted | None = None,
) -> Decision:
    """Decide by a thread's checkpoint whether it is resumed, restarted or left alone; pure.

    What is known of the run counts more than what the checkpoint looks like: a kill may have lost
    all of it, and then the newest checkpoint is an earlier run's.
    """
    decision = (
        _by_status(view, has_initial_state=has_initial_state)
        if admitted is None
        else _by_run(view, admitted, has_initial_state=has_initial_state)
    )
    if decision.action != "stop" and workflow.context_schema is not None and not has_context:
        return Decision(
            action="stop",
            status="needs_context",
            reasons=(_NEEDS_CONTEXT,),
        )
    return decision


def _by_status(view: CheckpointView, *, has_initial_state: bool) -> Decision:
    if view.status == "interrupted_work":
        return Decision(action="resume")
    if view.status == "finished":
        return Decision(action="stop", status="already_finished")
    if view.status == "waiting_for_human":
        return Decision(action="stop", status="waiting_for_human", reasons=(_waits_for(view),))
    if has_initial_state:
        return Decision(action="restart")
    return Decision(
        action="stop",
        status="nothing_to_recover",
        reasons=(f"{view.status}: nothing to go on from, and no initial_state to begin with",),
    )


def _by_run(view: CheckpointView, admitted: Admitted, *, has_initial_state: bool) -> Decision:
    if not view.exists or view.run_id != admitted.run_id:
        if admitted.inputs[0].is_redacted and not has_initial_state:
            return Decision(action="stop", status="nothing_to_recover", reasons=(_REDACTED,))
        return Decision(action="restart")
    if _is_untouched(view, admitted) and view.status != "interrupted_work":
        if admitted.inputs[-1].is_redacted:
            why = (_REDACTED_ANSWER, _waits_for(view))
            return Decision(action="stop", status="waiting_for_human", reasons=why)
        return Decision(action="answer")
    return _by_status(view, has_initial_state=True)


def _is_untouched(view: CheckpointView, admitted: Admitted) -> bool:
    """Tell whether the last answer that was given to a run was lost on its way.

    The thread stands where it stood then, and has received fewer answers than were given there.
    """
    here = [given for given in admitted.inputs[1:] if given.checkpoint_id == view.checkpoint_id]
    if not here or admitted.inputs[-1] is not here[-1] or view.answer.state == "unread":
        return False
    return len(here) > view.answer.received


def _waits_for(view: CheckpointView) -> str:
    asking = [
        f"{task.name} asks {', '.join(task.questions)}"
        for task in view.tasks
        if task.state == "asking"
    ]
    paused = [*view.breakpoints, *(task.name for task in view.tasks if task.state == "paused")]
    parts = []
    if asking:
        parts.append(f"{', '.join(asking)}: answer with Command(resume=...)")
    if paused:
        parts.append(f"a static breakpoint holds {', '.join(paused)}: go on with ainvoke(None)")
    return f"waiting_for_human: {'; '.join(parts)}"


def deliver_at_head(
    workflow: Workflow, view: CheckpointView, channel_name: str, facts: Mapping[str, Any]
) -> Delivery:
    """Choose the input that resumes a broken superstep and brings the facts along, once; pure.

    An update stays with the head until the superstep commits. Sent a second time it would double a
    reducer channel, and make the thread unreadable for any other. So a channel that is pending is
    left alone, and so is a fact that the state has already.
    """
    channel = peer_channel(workflow, channel_name)
    if channel is None:
        return Delivery(input=_command(view), shortfalls=(_no_channel(workflow, channel_name),))
    update = channel.update(view.values.get(channel.name), facts)
    if update is None:
        return Delivery(input=_command(view), channel=channel.name if facts else None)
    if channel.name in view.pending_channels:
        return Delivery(input=_command(view), channel=channel.name, shortfalls=(_LATER,))
    command = _command(view, {channel.name: update})
    return Delivery(input=command, channel=channel.name, is_new=True)


def _command(view: CheckpointView, update: Mapping[str, Any] | None = None) -> Command[Any] | None:
    """Return what resumes a superstep: None if nothing is to be said to it.

    With any update LangGraph forgets the answer that is stored at the head. So an unread one is
    given again, and a used one is got rid of.
    """
    if view.answer.state == "used":
        return Command(update=update or _DISCARD_ANSWER)
    if update is None:
        return None
    if view.answer.state == "unread":
        return Command(update=update, resume=view.answer.value)
    return Command(update=update)


def also_at_head(view: CheckpointView, delivery: Delivery, update: Mapping[str, Any]) -> Delivery:
    """Return a delivery that writes to more channels of a broken superstep; pure.

    Args:
        view: The thread: none of the channels is pending there.
        delivery: What resumes it.
        update: Channel -> value.
    """
    command = delivery.input
    if not update:
        return delivery
    if command is None:
        return replace(delivery, input=_command(view, update))
    if not isinstance(command, Command) or not isinstance(command.update or {}, Mapping):
        return delivery
    both: Any = {**(command.update or {}), **update}
    return replace(delivery, input=replace(command, update=both))


def deliver_at_start(
    workflow: Workflow, initial_state: object, channel_name: str, facts: Mapping[str, Any]
) -> Delivery:
    """Put the facts into the initial state of a workflow that begins anew; pure."""
    channel = peer_channel(workflow, channel_name)
    if channel is None:
        return Delivery(input=initial_state, shortfalls=(_no_channel(workflow, channel_name),))
    if channel.name not in input_keys(workflow) or not isinstance(initial_state, Mapping):
        return Delivery(input=initial_state, shortfalls=_undeliverable(facts))
    given = initial_state.get(channel.name)
    update = channel.replaced(given, facts)
    if update is None:
        return Delivery(input=initial_state)
    return Delivery(input={**initial_state, channel.name: update}, channel=channel.name)


def deliver_answer(
    workflow: Workflow,
    view: CheckpointView,
    given: object,
    channel_name: str,
    facts: Mapping[str, Any],
) -> Delivery:
    """Choose the input that gives a thread the answer that it has not received; pure."""
    delivery = deliver_at_head(workflow, view, channel_name, facts)
    if not isinstance(given, Command):
        return delivery
    facts_too = delivery.input.update if isinstance(delivery.input, Command) else None
    if not facts_too:
        return replace(delivery, input=given)
    if given.update and not isinstance(given.update, Mapping):
        return Delivery(input=given, shortfalls=_undeliverable(facts))
    both = replace(given, update={**(given.update or {}), **facts_too})
    return replace(delivery, input=both)


def _no_channel(workflow: Workflow, name: str) -> str:
    if workflow.channels.get(name) is not None:
        return f"no_channel: the channel {name!r} is declared as neither a mapping nor a list"
    return (
        f"no_channel: the workflow's state has no channel {name!r}, so what the peers know stays "
        "in this result; declare it (see PeerContextState) or name another"
    )


def _undeliverable(facts: Mapping[str, Any]) -> tuple[str, ...]:
    why = "not_delivered: the workflow's input cannot carry the peers' facts: they stay here"
    return (why,) if facts else ()


async def resume_workflow(
    workflow: Workflow,
    config: RunnableConfig,
    delivery: Delivery,
    *,
    context: object,
    durability: Durability | None,
) -> Outcome:
    """Run the workflow to its end, to its next question, or to its next failure.

    It runs in an empty `contextvars.Context`. What it raises is part of the outcome; a cancellation
    goes through it and on.
    """
    try:
        output = await in_empty_context(
            workflow.ainvoke(delivery.input, config, context=context, durability=durability),
            name=f"resume {config['configurable']['thread_id']}",
        )
    except Exception as error:  # the recovery decides: a workflow may raise anything
        _logger.exception(
            "the workflow raised while it was recovered",
            extra={"thread_id": config["configurable"]["thread_id"]},
        )
        return Outcome(error=error)
    if isinstance(output, dict) and INTERRUPT in output:
        return Outcome(output=_without_questions(output), asked=True)
    return Outcome(output=output)


def _without_questions(output: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in output.items() if key != INTERRUPT}


def conclude(
    workflow: Workflow,
    decision: Decision,
    delivery: Delivery,
    outcome: Outcome,
    *,
    before: CheckpointView,
    after: CheckpointView | None,
) -> Ending:
    """Say how it ended by looking at the thread again; pure.

    Args:
        workflow: The workflow that was run.
        decision: What was decided.
        delivery: What it was run with.
        outcome: How the run ended.
        before: The thread as it was.
        after: The thread as it is now; None if the checkpointer did not say.
    """
    unread = () if after else ("unverified: the checkpointer could not be read after the run",)
    shortfalls = (*unread, *_lost_update(before, delivery, after))
    if isinstance(outcome.error, InDoubtError):
        return Ending(
            status="in_doubt",
            final_state=project(workflow, after or before),
            reasons=(f"in_doubt: {outcome.error}",),
            shortfalls=shortfalls,
        )
    if outcome.error is not None:
        return Ending(
            status="failed",
            final_state=project(workflow, after or before),
            reasons=(f"failed: {type(outcome.error).__name__}: {str(outcome.error)[:200]!r}",),
            shortfalls=shortfalls,
        )
    open_view = after if after and after.tasks else None
    if outcome.asked or open_view:
        return Ending(
            status="waiting_for_human",
            final_state=outcome.output,
            reasons=(_waits_for(open_view),) if open_view else (),
            shortfalls=shortfalls,
        )
    return Ending(
        status="restarted" if decision.action == "restart" else "resumed",
        final_state=outcome.output,
        shortfalls=shortfalls,
    )


def _lost_update(
    before: CheckpointView, delivery: Delivery, after: CheckpointView | None
) -> tuple[str, ...]:
    """See that the facts are stored with a superstep that is still open.

    A checkpointer may drop pending writes (langchain-ai/langgraph#8115); the next recovery would
    then go on without the facts and nobody would know.
    """
    if not delivery.is_new or after is None or after.checkpoint_id != before.checkpoint_id:
        return ()
    if delivery.channel in after.pending_channels:
        return ()
    return (f"update_lost: the checkpointer did not keep what was sent to {delivery.channel!r}",)


def project(workflow: Workflow, view: CheckpointView) -> Any:
    """Return of a thread's state what the workflow would return: its output channels."""
    names = workflow.output_channels
    if isinstance(names, str):
        return view.values.get(names)
    return {name: view.values[name] for name in names if name in view.values}
