"""When a resumed workflow had written its first new checkpoint."""

import asyncio
import logging

from langchain_core.runnables import RunnableConfig

from langgraph_peerctx.durability.isolation import in_empty_context
from langgraph_peerctx.durability.workflow import Workflow, checkpointer_of

_logger = logging.getLogger(__name__)

_FORKS = 20
"""Checkpoints of one superstep that are looked at: forks, and what a superseded writer left."""


async def first_checkpoint_after(
    workflow: Workflow,
    config: RunnableConfig,
    head_id: str | None,
    *,
    timeout_seconds: float = 5.0,
) -> str | None:
    """Return when the checkpoint after the one at which a thread stood was written.

    Its superstep says which one it is, so that a long run's checkpoints need not all be read.

    Args:
        workflow: The workflow, with its checkpointer.
        config: Names the thread.
        head_id: The checkpoint at which it stood; None if it had none.
        timeout_seconds: The longest wait for the checkpointer.

    Returns:
        ISO 8601; None if there is none, or the checkpointer does not say: a time in a report is no
        reason for a recovery to fail.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            reading = _first_after(workflow, config["configurable"]["thread_id"], head_id)
            return await in_empty_context(reading, name="first checkpoint")
    except Exception:  # each saver has its driver's own errors, and none of them counts here
        _logger.debug("the first new checkpoint is not known", exc_info=True)
        return None


async def _first_after(workflow: Workflow, thread_id: str, head_id: str | None) -> str | None:
    saver = checkpointer_of(workflow)
    if saver is None:
        return None
    place: RunnableConfig = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}
    step = -1
    if head_id is not None:
        at_head: RunnableConfig = {
            "configurable": {**place["configurable"], "checkpoint_id": head_id}
        }
        head = await saver.aget_tuple(at_head)
        if head is None:
            return None
        step = head.metadata["step"] + 1
    found = [
        str(saved.checkpoint["ts"])
        async for saved in saver.alist(place, filter={"step": step}, limit=_FORKS)
        if _parent_of(saved.parent_config) == head_id
    ]
    return max(found, default=None)  # the last to have been written from there is ours


def _parent_of(config: RunnableConfig | None) -> str | None:
    return None if config is None else config["configurable"].get("checkpoint_id")
