"""Where in a run a piece of code stands: the same again when the run is repeated after a crash.

Task and checkpoint ids change when checkpoints are lost, and a subgraph in a loop reports its inner
step 1 each time. So at each level of the checkpoint namespace there stand node, superstep, the
index of a `Send` or of a task's call, and the number of the nested graph: `fan@2/work@4[1]`.

LangGraph goes on counting a node's calls and nested graphs when it retries the node (1.2.22), and a
retry would stand in other places than the attempt before it. So its counters are read when an
attempt begins, and the calls of each attempt are counted from there. Where they were not seen
before, since a cache or earlier writes have answered everything, the place is not known.
"""

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from urllib.parse import quote
from uuid import UUID

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config

from langgraph_peerctx.errors import ConfigurationError

REMEMBERED_ENDS: Final = 1_000
"""So many executions are known that have ended: what they called may begin late."""
REMEMBERED_FAILURES: Final = 10_000
"""So many nodes are known that have failed, and not ended well since."""

_LEVELS = "|"
_TASK = ":"
_PULL = "__pregel_pull"
_SCRATCHPAD = "__pregel_scratchpad"
_COUNTERS = ("call_counter", "subgraph_counter")
_COUNT = re.compile(r"count\((\d+)\)")
_UNKNOWN = (
    "the place in the run is not known: the callbacks of this run do not reach here; or a node is "
    "retried of whose attempts before nothing was seen but what a cache or an earlier process has "
    "answered: then go on with ainvoke(None)"
)


class Counters(NamedTuple):
    """LangGraph's own, of one node's calls and nested graphs; None where it has no such thing."""

    calls: Callable[[], int] | None
    graphs: Callable[[], int] | None


class _Counts(NamedTuple):
    """How far they were; None where that is not known."""

    calls: int | None
    graphs: int | None


@dataclass(slots=True, eq=False, kw_only=True)
class Execution:
    """One execution of a node: a retry is another one at the same place.

    Attributes:
        place: Node, superstep and index, as they stand in a position.
        position: The places from the root to this one; None if that is not known.
        node: The node's name.
        step: The superstep.
        namespace: Of its checkpoints.
        used: Keys of effects that it has used; of one that has failed, what was to be done.
        counters: Its calls and graphs are counted by them, once that is seen.
        began_at: From where; None if that is not known yet.
    """

    place: str
    position: str | None
    node: str
    step: int
    namespace: str
    used: dict[str, object] = field(default_factory=dict)
    counters: Counters | None = None
    began_at: _Counts | None = None

    def own(self, number: int, which: int) -> int | None:
        """Return the number of a call, or of a nested graph, among this attempt's own."""
        since = None if self.began_at is None else self.began_at[which]
        if since is None or number < since:
            return 0 if number == 0 else None
        return number - since


class Positions:
    """The nodes that are being executed, told by their callbacks. Safe to use from any thread.

    Args:
        max_failures: So many nodes are known that have failed, and not ended well since: a retry of
            another one would be taken for its first attempt. None: all of them.
    """

    def __init__(self, max_failures: int | None = REMEMBERED_FAILURES) -> None:
        self._max_failures = max_failures
        self._parents: dict[UUID, UUID | None] = {}
        self._nodes: dict[UUID, Execution] = {}
        self._executions: dict[str, Execution] = {}
        self._ended: OrderedDict[UUID, Execution] = OrderedDict()
        self._failed: OrderedDict[str, tuple[Counters | None, _Counts]] = OrderedDict()
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
            self._see(var_child_runnable_config.get())
            # Whatever is around the first of all is not ours.
            self._parents[run_id] = parent_run_id if self._parents else None
            if metadata is None or not namespace or self._is_inside(namespace, parent_run_id):
                return None
            execution = self._execution(namespace, metadata, parent_run_id)
            self._executions[namespace] = self._nodes[run_id] = execution
            return execution

    def passing(self, run_id: UUID, parent_run_id: UUID | None) -> None:
        """Take note of the start of something that may have graphs in it, a tool for instance."""
        with self._lock:
            self._see(var_child_runnable_config.get())
            self._parents[run_id] = parent_run_id

    def ended(self, run_id: UUID, *, has_failed: bool = False) -> str | None:
        """Take note of a callback's end; return the namespace of the node that ended with it."""
        with self._lock:
            self._parents.pop(run_id, None)
            execution = self._nodes.pop(run_id, None)
            if execution is None:
                return None
            _remember(self._ended, run_id, execution, REMEMBERED_ENDS)
            if self._executions.get(execution.namespace) is execution:
                del self._executions[execution.namespace]
                if has_failed:
                    self._note_failure(execution)
                else:
                    self._failed.pop(execution.namespace, None)
            return execution.namespace

    def execution(self, namespace: str, config: RunnableConfig | None = None) -> Execution:
        """Return what is being executed there.

        Args:
            namespace: Of its checkpoints.
            config: Of whoever asks: an attempt that was given up may still be at work beside the
                next one.

        Raises:
            ConfigurationError: If nothing is.
        """
        with self._lock:
            self._see(config)
            run_id = getattr((config or {}).get("callbacks"), "parent_run_id", None)
            found = self._around(run_id, lambda one: one.namespace == namespace)
            found = found or self._executions.get(namespace)
        if found is None:
            raise ConfigurationError(_UNKNOWN)
        return found

    def _see(self, config: RunnableConfig | None) -> None:
        """Take note of the counters of the node whose config it is."""
        given = (config or {}).get("configurable") or {}
        execution = self._executions.get(given.get("checkpoint_ns") or "")
        scratchpad = given.get(_SCRATCHPAD)
        if execution is None or execution.counters is not None or scratchpad is None:
            return
        counters = Counters(*(getattr(scratchpad, name, None) for name in _COUNTERS))
        execution.counters = counters
        if execution.began_at is not None:
            return
        known, began_at = self._failed.get(execution.namespace, (None, _Counts(0, 0)))
        if known is not None:
            # A run that takes the node up again counts anew.
            is_same = known.calls is counters.calls
            execution.began_at = began_at if is_same else _Counts(0, 0)
        else:
            # No nested graph has begun yet, or it would have been seen; but calls may have.
            now = _read(counters)
            execution.began_at = _Counts(0 if now.calls == 0 else None, now.graphs)

    def _note_failure(self, execution: Execution) -> None:
        """Keep of an attempt what the next one at its place must know."""
        known, _ = self._failed.get(execution.namespace, (None, None))
        noted = execution.counters or known, _Counts(0, 0)
        _remember(self._failed, execution.namespace, noted, self._max_failures)

    def _is_inside(self, namespace: str, parent_run_id: UUID | None) -> bool:
        """Tell whether something stands inside of a node's execution, though that may be over."""
        run_id = parent_run_id
        while run_id is not None and run_id in self._parents:
            if (around := self._nodes.get(run_id)) is not None:
                return around.namespace == namespace
            run_id = self._parents[run_id]
        if run_id is None:  # the root
            return False
        over = self._ended.get(run_id)
        return namespace in self._executions if over is None else over.namespace == namespace

    def _around(self, run_id: UUID | None, is_it: Callable[[Execution], bool]) -> Execution | None:
        """Return the nearest execution around a callback for which something is true."""
        while run_id is not None:
            found = self._nodes.get(run_id) or self._ended.get(run_id)
            if found is not None and is_it(found):
                return found
            run_id = self._parents.get(run_id)
        return None

    def _execution(
        self, namespace: str, metadata: Mapping[str, Any], parent_run_id: UUID | None
    ) -> Execution:
        if (before := self._executions.get(namespace)) is not None:
            self._note_failure(before)  # it was given up, and may still be at work
        node, step = str(metadata["langgraph_node"]), int(metadata["langgraph_step"])
        path = metadata.get("langgraph_path") or ()
        graph = namespace.rpartition(_TASK)[0].removesuffix(node).removesuffix(_LEVELS)
        caller = self._caller(graph, parent_run_id)
        index = _index(path, caller)
        place = f"{quote(node, safe=' ')}@{step}{index or ''}"
        around = _position_around(graph, path, caller)
        is_known = index is not None and around is not None
        began_at: _Counts | None = _Counts(0, 0)
        if namespace in self._failed:
            known, _ = self._failed[namespace]
            began_at = None
            if known is not None:
                self._failed[namespace] = known, _read(known)
        return Execution(
            place=place,
            position=f"{around}{place}" if is_known else None,
            node=node,
            step=step,
            namespace=namespace,
            began_at=began_at,
        )

    def _caller(self, graph: str, parent_run_id: UUID | None) -> Execution | None:
        """Return in whose nested graph, or call, something begins; None at the root."""
        if not graph:
            return None
        found = self._around(parent_run_id, lambda one: _number(graph, one.namespace) is not None)
        if found is None:  # its callbacks have come here another way
            found = self._executions.get(graph) or self._executions.get(_without_number(graph))
        if found is None:
            around = [
                e for e in self._executions.values() if _number(graph, e.namespace) is not None
            ]
            found = around[0] if len(around) == 1 else None
        return found


def place_of(execution: Execution) -> str:
    """Return where something is executed.

    Raises:
        ConfigurationError: If that is not known.
    """
    if execution.position is None:
        raise ConfigurationError(_UNKNOWN)
    return execution.position


def _remember(kept: OrderedDict[Any, Any], key: object, value: object, most: int | None) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if most is not None and len(kept) > most:
        kept.popitem(last=False)


def _read(counters: Counters) -> _Counts:
    return _Counts(_value_of(counters.calls), _value_of(counters.graphs))


def _value_of(counter: Any) -> int | None:
    """Return what one of LangGraph's counters would give next, without asking it (1.2.22)."""
    try:
        counting = counter._counter  # noqa: SLF001 - to call it would count
        if counting is None:
            return 0
        found = _COUNT.fullmatch(repr(counting.__self__))
    except AttributeError:
        return None
    return int(found[1]) if found else None


def _position_around(graph: str, path: Sequence[Any], caller: Execution | None) -> str | None:
    """Return what stands before a place; None if it is not known."""
    if not graph:
        return ""
    if caller is None or caller.position is None:
        return None
    number = 0 if _is_call(path) else caller.own(_number(graph, caller.namespace) or 0, 1)
    if number is None:
        return None
    return f"{caller.position}{f'+{number}' if number else ''}/"


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


def _without_number(graph: str) -> str:
    around, _, number = graph.rpartition(_LEVELS)
    return around if number.isdecimal() else graph


def _without_tasks(namespace: str) -> str:
    parts = namespace.split(_LEVELS)
    return _LEVELS.join(part.partition(_TASK)[0] for part in parts if not part.isdigit())


def _is_call(path: Sequence[Any]) -> bool:
    return bool(path) and path[-1] is True


def _index(path: Sequence[Any], caller: Execution | None) -> str | None:
    """Return what tells apart the tasks of one node in one superstep; None if it is not known.

    LangGraph's paths (1.2.22): a node that was triggered, `(PULL, name)`; a `Send`,
    `(PUSH, index, False)`; a task's call, `(PUSH, the caller's path, number, True)`.
    """
    if not path or path[0] == _PULL:
        return ""
    number = path[-2]
    if not _is_call(path):
        return f"[{number}]"
    own = number if caller is None else caller.own(number, 0)
    return None if own is None else f"({own})"
