"""Where in a run a piece of code stands: the same again when the run is repeated after a crash.

Task and checkpoint ids change when checkpoints are lost, and a subgraph in a loop reports its inner
step 1 each time. So at each level of the checkpoint namespace there stand node, superstep, the
index of a `Send` or of a task's call, and the number of the nested graph: `fan@2/work@4[1]`.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote
from uuid import UUID

from langgraph_peerctx.errors import ConfigurationError

_LEVELS = "|"
_TASK = ":"
_PULL = "__pregel_pull"
_UNKNOWN = "the place in the run is not known: the callbacks of this run do not reach here"


@dataclass(slots=True)
class Execution:
    """One execution of a node: a retry is another one at the same place.

    Attributes:
        place: Node, superstep and index, as they stand in a position.
        node: The node's name.
        step: The superstep.
        used: Keys of effects that it has used.
    """

    place: str
    node: str
    step: int
    used: set[str] = field(default_factory=set)


class Positions:
    """The nodes that are being executed, told by their callbacks. Safe to use from any thread."""

    def __init__(self) -> None:
        self._executions: dict[str, Execution] = {}
        self._namespaces: dict[UUID, str] = {}
        self._lock = threading.Lock()

    def began(self, run_id: UUID, metadata: Mapping[str, Any] | None) -> Execution | None:
        """Take note of a callback's start; return what begins with it, if it is a node's."""
        namespace = (metadata or {}).get("langgraph_checkpoint_ns")
        if metadata is None or not namespace:
            return None
        with self._lock:
            if namespace in self._executions:  # something inside of it
                return None
            execution = Execution(
                place=_place(metadata),
                node=str(metadata["langgraph_node"]),
                step=int(metadata["langgraph_step"]),
            )
            self._executions[namespace] = execution
            self._namespaces[run_id] = namespace
            return execution

    def ended(self, run_id: UUID) -> str | None:
        """Take note of a callback's end; return the namespace of the node that ended with it."""
        with self._lock:
            namespace = self._namespaces.pop(run_id, None)
            if namespace is not None:
                self._executions.pop(namespace, None)
            return namespace

    def namespace_of(self, run_id: UUID) -> str | None:
        """Return the namespace of the node that began with a callback and has not ended."""
        return self._namespaces.get(run_id)

    def execution(self, namespace: str) -> Execution:
        """Return what is being executed there.

        Raises:
            ConfigurationError: If nothing is.
        """
        found = self._executions.get(namespace)
        if found is None:
            raise ConfigurationError(_UNKNOWN)
        return found

    def position(self, namespace: str) -> str:
        """Return the position of a namespace whose nodes are being executed.

        Above a graph with checkpoints of its own (`checkpointer=True`) LangGraph leaves out the
        task ids: there it is the execution that began last.

        Raises:
            ConfigurationError: If they are not.
        """
        places: list[str] = []
        parts: list[str] = []
        for part in namespace.split(_LEVELS):
            parts.append(part)
            if _TASK in part:
                places.append(self.execution(_LEVELS.join(parts)).place)
            elif not part.isdigit():
                places.append(self._latest(_LEVELS.join(parts)).place)
            else:  # the number of a graph that one node calls more than once
                places[-1] += f"+{part}"
        return "/".join(places)

    def _latest(self, without_tasks: str) -> Execution:
        with self._lock:
            found = [e for n, e in self._executions.items() if _without_tasks(n) == without_tasks]
        if not found:
            raise ConfigurationError(_UNKNOWN)
        return found[-1]


def _without_tasks(namespace: str) -> str:
    return _LEVELS.join(part.partition(_TASK)[0] for part in namespace.split(_LEVELS))


def _place(metadata: Mapping[str, Any]) -> str:
    node = quote(str(metadata["langgraph_node"]), safe=" ")
    index = _index(metadata.get("langgraph_path") or ())
    return f"{node}@{metadata['langgraph_step']}{index}"


def _index(path: Sequence[Any]) -> str:
    """Return what tells apart the tasks of one node in one superstep.

    LangGraph's paths (1.2.22): a node that was triggered, `(PULL, name)`; a `Send`,
    `(PUSH, index, False)`; a task's call, `(PUSH, the caller's path, number, True)`.
    """
    if not path or path[0] == _PULL:
        return ""
    *_, number, is_call = path
    return f"({number})" if is_call is True else f"[{number}]"
