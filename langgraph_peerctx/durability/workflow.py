"""What we need to know of a workflow itself, whatever its threads look like."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.constants import END, START
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel
from langgraph.types import Durability

from langgraph_peerctx.errors import ConfigurationError, UnknownChannelError

Workflow: TypeAlias = Pregel[Any, Any, Any, Any]
"""A compiled `StateGraph`, or a function decorated with `@entrypoint`."""

THREAD_ID_LIMIT: Final = 255
_PLACE_OF_LANGGRAPH = ("checkpoint_id", "checkpoint_ns", "checkpoint_map")


def compiled(workflow: object) -> Workflow:
    """Return `workflow` if it is one that can be resumed in this process.

    Raises:
        ConfigurationError: If it is not compiled, or something else altogether.
    """
    if isinstance(workflow, Pregel):
        return workflow
    if isinstance(workflow, StateGraph):
        raise ConfigurationError(
            "workflow is a StateGraph that is not compiled: "
            "pass builder.compile(checkpointer=...), with the checkpointer of the dead process"
        )
    raise ConfigurationError(
        f"workflow is a {type(workflow).__name__}: expected a compiled StateGraph or an @entrypoint"
    )


def checkpointer_of(workflow: Workflow) -> BaseCheckpointSaver[Any] | None:
    """Return the checkpointer that a root run of this workflow writes to, or None.

    `True` and `False` speak of subgraphs: a root graph compiled with them has none.
    """
    saver = workflow.checkpointer
    return saver if isinstance(saver, BaseCheckpointSaver) else None


def is_functional(workflow: Workflow) -> bool:
    """Tell whether this is an `@entrypoint` workflow: it has a result and no state."""
    return not isinstance(workflow, CompiledStateGraph) and {START, END} <= workflow.channels.keys()


def state_keys(workflow: Workflow) -> frozenset[str]:
    """Return the names of the channels that an update may write to; none of LangGraph's own."""
    if isinstance(workflow, CompiledStateGraph):
        return frozenset(workflow.builder.channels) - {"__root__"}
    if is_functional(workflow):
        return frozenset()
    return frozenset(name for name in workflow.channels if not name.startswith("__"))


def input_keys(workflow: Workflow) -> frozenset[str]:
    """Return the names that a fresh run takes; none where the input is no mapping of channels."""
    if isinstance(workflow, CompiledStateGraph):
        return frozenset(workflow.builder.schemas[workflow.builder.input_schema]) - {"__root__"}
    names = workflow.input_channels
    return frozenset() if isinstance(names, str) else frozenset(names)


def check_initial_state(workflow: Workflow, initial_state: object) -> None:
    """Refuse an initial state of which LangGraph would drop a part without a word.

    Raises:
        UnknownChannelError: If it has a key that the workflow's input schema lacks.
    """
    known = input_keys(workflow)
    if not known or not isinstance(initial_state, Mapping):
        return
    if unknown := sorted(str(key) for key in initial_state.keys() - known):
        raise UnknownChannelError(
            f"initial_state has {', '.join(unknown)}, which the workflow's input schema lacks; "
            f"it has {', '.join(sorted(known))}"
        )


def thread_config(config: RunnableConfig | None, thread_id: str) -> RunnableConfig:
    """Return the caller's config, pointed at the newest checkpoint of one thread.

    What LangGraph keeps in a node's config for its own use is left out: with it the workflow would
    run as a part of the graph that the caller stands in.

    Raises:
        ConfigurationError: If the config names another thread or a checkpoint, or `thread_id` is
            no text of 1 to 255 characters.
    """
    if not isinstance(thread_id, str) or not 1 <= len(thread_id) <= THREAD_ID_LIMIT:
        raise ConfigurationError(f"thread_id={thread_id!r:.80} is no text of 1 to 255 characters")
    merged: RunnableConfig = {**(config or {})}
    given = dict(merged.get("configurable") or {})
    kept = {key: value for key, value in given.items() if not key.startswith("__pregel_")}
    _check_place(kept, thread_id)
    for key in _PLACE_OF_LANGGRAPH:
        kept.pop(key, None)
    merged["configurable"] = {**kept, "thread_id": thread_id}
    return merged


def _check_place(configurable: Mapping[str, Any], thread_id: str) -> None:
    other = configurable.get("thread_id")
    if other is not None and str(other) != thread_id:
        raise ConfigurationError(
            f"config names the thread {str(other)!r:.80} and thread_id={thread_id!r:.80}: "
            "leave it out of config"
        )
    for key in ("checkpoint_id", "checkpoint_ns"):
        if configurable.get(key):
            raise ConfigurationError(
                f"config names a {key}: a recovery goes on from the thread's newest checkpoint"
            )


def of_run(config: RunnableConfig, run_id: str | None) -> RunnableConfig:
    """Return a config whose checkpoints belong to the run that is resumed.

    LangGraph tells by `metadata["run_id"]` whether an input continues the newest checkpoint's run.
    What a recovery writes must go on saying so. A run id of the caller's is kept.
    """
    metadata = config.get("metadata") or {}
    if run_id is None or "run_id" in metadata:
        return config
    return {**config, "metadata": {**metadata, "run_id": run_id}}


def safest_durability(workflow: Workflow) -> Durability | None:
    """Return `sync` wherever LangGraph can run the workflow so; None without a checkpointer.

    Under `sync` it fails in a subgraph that was compiled with `checkpointer=False`
    (AttributeError: `_put_checkpoint_fut`, langgraph 1.2.22).
    """
    if checkpointer_of(workflow) is None:
        return None
    return "async" if any(_unsaved_subgraphs(workflow)) else "sync"


def _unsaved_subgraphs(workflow: Workflow) -> Iterator[Workflow]:
    """Yield the subgraphs without a checkpointer; those hidden in functions are not seen."""
    for node in workflow.nodes.values():
        if isinstance(node.bound, Pregel):
            if node.bound.checkpointer is False:
                yield node.bound
            yield from _unsaved_subgraphs(node.bound)
