"""Where in a run a piece of code stands: the same again when the run is repeated after a crash.

Task and checkpoint ids change when checkpoints are lost, and a subgraph in a loop reports its inner
step 1 each time. So at each level of the checkpoint namespace there stand node, superstep, the
index of a `Send` or of a task's call, and the number of the nested graph: `fan@2/work@4[1]`.

LangGraph goes on counting a node's calls and nested graphs when it retries the node (1.2.22). Here
each attempt counts its own, or a retry would stand in other places than the attempt before it.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote
from uuid import UUID

from langgraph_peerctx.errors import ConfigurationError

REMEMBERED_FAILURES: Final = 100
"""So many attempts that failed are known: what they called may begin late."""

_LEVELS = "|"
_TASK = ":"
_PULL = "__pregel_pull"
_UNKNOWN = (
    "the place in the run is not known: the callbacks of this run do not reach here, or graphs run "
    "side by side that cannot be told apart"
)


@dataclass(slots=True, eq=False, kw_only=True)
class Execution:
    """One execution of a node: a retry is another one at the same place.

    Attributes:
        place: Node, superstep and index, as they stand in a position.
        position: The places from the root to this one; None if that is not known.
        node: The node's name.
        step: The superstep.
        namespace: Of its checkpoints.
        used: Keys of effects that it has used.
        before: The attempts before it, of which each failed.
        call_base: The number of its own first call.
        last_call: The highest of its own.
        graph_base: The number of its own first nested graph.
    """

    place: str
    position: str | None
    node: str
    step: int
    namespace: str
    used: set[str] = field(default_factory=set)
    before: tuple["Execution", ...] = ()
    call_base: int | None = None
    last_call: int = -1
    graph_base: int | None = None

    def own_call(self, number: int) -> int:
        """Return the number of a call among this attempt's own."""
        if self.call_base is None:
            last = max((attempt.last_call for attempt in self.before), default=-1)
            # A run that takes the node up again begins to count anew.
            self.call_base = last + 1 if number > last else 0
        self.last_call = max(self.last_call, number)
        return number - self.call_base

    def own_graph(self, number: int) -> int:
        """Return the number of a nested graph among this attempt's own; it may be below zero.

        Which numbers the attempt before has used up is not seen where a graph failed before its
        first node: here the first that is seen counts.
        """
        if self.graph_base is None:
            self.graph_base = number if self.before else 0
        return number - self.graph_base


class Positions:
    """The nodes that are being executed, told by their callbacks. Safe to use from any thread."""

    def __init__(self) -> None:
        self._parents: dict[UUID, UUID] = {}
        self._nodes: dict[UUID, Execution] = {}
        self._failed: OrderedDict[UUID, Execution] = OrderedDict()
        self._executions: dict[str, Execution] = {}
        self._lock = threading.Lock()

    def began(
        self,
        run_id: UUID,
        metadata: Mapping[str, Any] | None,
        parent_run_id: UUID | None = None,
    ) -> Execution | None:
        """Take note of a callback's start; return what begins with it, if it is a node's."""
        namespace = (metadata or {}).get("langgraph_checkpoint_ns")
        with self._lock:
            if parent_run_id is not None:
                self._parents[run_id] = parent_run_id
            if metadata is None or not namespace or namespace in self._executions:
                return None  # no node's, or something inside of it
            execution = self._execution(namespace, metadata, parent_run_id)
            self._executions[namespace] = self._nodes[run_id] = execution
            return execution

    def ended(self, run_id: UUID, *, has_failed: bool = False) -> str | None:
        """Take note of a callback's end; return the namespace of the node that ended with it."""
        with self._lock:
            self._parents.pop(run_id, None)
            execution = self._nodes.pop(run_id, None)
            if execution is None:
                return None
            del self._executions[execution.namespace]
            if has_failed:
                self._failed[run_id] = execution
                while len(self._failed) > REMEMBERED_FAILURES:
                    self._failed.popitem(last=False)
            return execution.namespace

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
        """Return the position of what is being executed there.

        Raises:
            ConfigurationError: If nothing is, or what is around it is not known.
        """
        found = self.execution(namespace).position
        if found is None:
            raise ConfigurationError(_UNKNOWN)
        return found

    def forget_name(self, namespace: str, name: str) -> None:
        """Let what is being executed there use the key of an effect once more."""
        if (found := self._executions.get(namespace)) is not None:
            found.used.discard(name)

    def _execution(
        self, namespace: str, metadata: Mapping[str, Any], parent_run_id: UUID | None
    ) -> Execution:
        node, step = str(metadata["langgraph_node"]), int(metadata["langgraph_step"])
        path = metadata.get("langgraph_path") or ()
        name = f"{quote(node, safe=' ')}@{step}"
        graph = namespace.rpartition(_TASK)[0].removesuffix(node).removesuffix(_LEVELS)
        caller, number = self._caller(graph, parent_run_id)
        place = f"{name}{_index(path, caller)}"
        return Execution(
            place=place,
            position=_position(graph, caller, None if _is_call(path) else number, place),
            node=node,
            step=step,
            namespace=namespace,
            before=tuple(e for e in self._failed.values() if e.namespace == namespace),
        )

    def _caller(self, graph: str, parent_run_id: UUID | None) -> tuple[Execution | None, int]:
        """Return whose nested graph, or call, begins, and its number; None at the root."""
        if not graph:
            return None, 0
        run_id = parent_run_id
        while run_id is not None:
            around = self._nodes.get(run_id) or self._failed.get(run_id)
            if around is not None and (number := _number(graph, around.namespace)) is not None:
                return around, number
            run_id = self._parents.get(run_id)
        # Its callbacks have come here another way.
        numbers = [(e, _number(graph, e.namespace)) for e in self._executions.values()]
        found = [(e, number) for e, number in numbers if number is not None]
        return found[0] if len(found) == 1 else (None, 0)


def _position(graph: str, caller: Execution | None, number: int | None, place: str) -> str | None:
    if not graph:
        return place
    if caller is None or caller.position is None:
        return None
    own = 0 if number is None else caller.own_graph(number)
    if own < 0:
        return None
    return f"{caller.position}{f'+{own}' if own else ''}/{place}"


def _number(graph: str, namespace: str) -> int | None:
    """Return which nested graph of a node a namespace is of; None if it is not of one.

    A graph with checkpoints of its own (`checkpointer=True`) has no task ids in its namespace.
    """
    for around in (namespace, _without_tasks(namespace)):
        if graph == around:
            return 0
        rest = graph.removeprefix(around + _LEVELS)
        if rest != graph and rest.isdecimal():
            return int(rest)
    return None


def _without_tasks(namespace: str) -> str:
    parts = namespace.split(_LEVELS)
    return _LEVELS.join(part.partition(_TASK)[0] for part in parts if not part.isdigit())


def _is_call(path: Sequence[Any]) -> bool:
    return bool(path) and path[-1] is True


def _index(path: Sequence[Any], caller: Execution | None) -> str:
    """Return what tells apart the tasks of one node in one superstep.

    LangGraph's paths (1.2.22): a node that was triggered, `(PULL, name)`; a `Send`,
    `(PUSH, index, False)`; a task's call, `(PUSH, the caller's path, number, True)`.
    """
    if not path or path[0] == _PULL:
        return ""
    *_, number, is_call = path
    if is_call is not True:
        return f"[{number}]"
    return f"({number if caller is None else caller.own_call(number)})"
