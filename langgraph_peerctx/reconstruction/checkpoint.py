"""What a thread's newest checkpoint says: finished, waiting for a human, or cut off in its work.

`StateSnapshot.next` cannot tell these apart. A superstep whose tasks all finished, and that was
never committed, has an empty `next`; a thread paused at a static breakpoint looks like one that was
killed; and the answer to an `interrupt()` stays beside the question when the process dies between
the two. So the tasks and the pending writes of the head are read as well.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple, PendingWrite
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME
from langgraph.constants import TAG_HIDDEN
from langgraph.errors import InvalidUpdateError
from langgraph.pregel import Pregel
from langgraph.types import PregelTask, StateSnapshot
from pydantic import JsonValue

from langgraph_peerctx.durability.isolation import in_empty_context
from langgraph_peerctx.durability.workflow import (
    Workflow,
    checkpointer_of,
    compiled,
    is_functional,
    state_keys,
)
from langgraph_peerctx.errors import (
    ConfigurationError,
    PeerContextError,
    RecoveryError,
    StoreBusyError,
    StoreError,
)
from langgraph_peerctx.protocol.messages import Json

CheckpointStatus = Literal[
    "no_checkpointer", "no_checkpoint", "finished", "interrupted_work", "waiting_for_human"
]
TaskState = Literal["finished", "asking", "paused", "unfinished"]
AnswerState = Literal["none", "unread", "used"]

# The two values below are stored in every checkpointer's rows and have no public name.
_NO_TASK: Final = "00000000-0000-0000-0000-000000000000"
"""The task id of what a `Command` wrote."""
_ERROR_SOURCE: Final = "__error_source_node__"
"""Written beside the error of a node that has an error handler."""
_CONTROL: Final = frozenset({ERROR, INTERRUPT, RESUME, _ERROR_SOURCE})
"""Writes that say what happened to a task; any other write means that it finished."""

_MANY: Final = 1_000_000
"""Answers, where nobody can tell how many: none is given again."""
_READ_ATTEMPTS: Final = 3
_INNER_LIMIT: Final = 200
"""How many checkpoints are read to find what happened inside the open superstep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer to an `interrupt()` that is stored at the head.

    Attributes:
        state: `unread` by the node that asked, or `used`; a used one stays where it is, and
            LangGraph would give it to the next question too.
        value: The answer, if it is unread.
        received: How many answers the task that asks is seen to have received.
    """

    state: AnswerState = "none"
    value: Any = None
    received: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskView:
    """One task of the superstep that the head has before it.

    Attributes:
        state: `asking` waits for the answer to an `interrupt()`, `paused` stands at a static
            breakpoint inside a subgraph, `unfinished` was killed, failed, or never began.
        error: What it raised, as text of at most 200 characters.
        question_ids: The interrupts that wait for an answer.
        questions: What they ask, as text of at most 200 characters each.
    """

    task_id: str
    name: str
    state: TaskState
    error: str | None = None
    question_ids: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointView:
    """A thread as its newest checkpoint has it.

    Attributes:
        channels: The state keys that an update may name; empty for a functional workflow.
        checkpoint_id: None if there is no checkpoint.
        run_id: The run that wrote the head, if it said so in its metadata.
        step: The superstep that it closes; what a resume does has a higher one.
        values: The state as LangGraph restores it, with what finished siblings have written. A
            functional workflow's last result stands under `__end__`.
        tasks: Every task of the open superstep; empty if and only if the thread is finished.
        pending_channels: Channels that a `Command(update=...)` wrote on this head and that wait for
            the superstep to commit; sent again, they make the thread unreadable.
        answer: What a human has said to this superstep, if anything.
        breakpoints: Nodes whose static breakpoint the thread stands at.
    """

    thread_id: str
    status: CheckpointStatus
    is_functional: bool = False
    channels: frozenset[str] = frozenset()
    checkpoint_id: str | None = None
    run_id: str | None = None
    created_at: datetime | None = None
    step: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[TaskView, ...] = ()
    pending_channels: frozenset[str] = frozenset()
    answer: Answer = field(default_factory=Answer)
    breakpoints: tuple[str, ...] = ()

    @property
    def exists(self) -> bool:
        """Whether the thread has a checkpoint."""
        return self.checkpoint_id is not None

    @property
    def has_checkpointer(self) -> bool:
        """Whether the workflow has a checkpointer of its own."""
        return self.status != "no_checkpointer"

    @property
    def next_nodes(self) -> tuple[str, ...]:
        """The nodes whose work is not finished; a node stands once for each of its tasks."""
        return tuple(task.name for task in self.tasks if task.state != "finished")

    def as_json(self) -> Json:
        """Return the view as plain JSON, without the values."""
        tasks: list[JsonValue] = [
            {"name": task.name, "state": task.state, "error": task.error} for task in self.tasks
        ]
        return {
            "checkpoint_id": self.checkpoint_id,
            "created_at": self.created_at.isoformat() if self.created_at else None,
            "run_id": self.run_id,
            "step": self.step,
            "status": self.status,
            "tasks": tasks,
            "pending_channels": list[JsonValue](sorted(self.pending_channels)),
            "breakpoints": list[JsonValue](self.breakpoints),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """The newest checkpoint of one namespace, and the graph whose state it is."""

    graph: Workflow
    snapshot: StateSnapshot
    saved: CheckpointTuple

    @property
    def writes(self) -> Sequence[PendingWrite]:
        return self.saved.pending_writes or ()

    @property
    def has_begun(self) -> bool:
        """Whether anything was written since the checkpoint: then no breakpoint holds it."""
        return len(self.writes) > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Reads one thread of one workflow."""

    workflow: Workflow
    saver: BaseCheckpointSaver[Any]
    config: RunnableConfig

    async def view(self) -> CheckpointView | None:
        head = await self.head()
        if head is None:
            return None
        answer = await self.answer(head)
        tasks = [await self.task(head, task, answer) for task in head.snapshot.tasks]
        breakpoints = await self.breakpoints(head)
        return _view(head, tasks, answer, breakpoints)

    async def head(self) -> _Head | None:
        """Read checkpoint and state, and see that they are of one moment."""
        for _ in range(_READ_ATTEMPTS):
            saved = await self.saver.aget_tuple(self.config)
            snapshot = await self.workflow.aget_state(self.config)
            if saved is None:
                return None
            if saved.checkpoint["id"] == _checkpoint_id(snapshot):
                return _Head(graph=self.workflow, snapshot=snapshot, saved=saved)
        raise RecoveryError(
            "the thread moved on while it was read: its agent, or another recovery, is at work"
        )

    async def task(self, head: _Head, task: PregelTask, answer: Answer) -> TaskView:
        question_ids = tuple(question.id for question in task.interrupts)
        state: TaskState = "unfinished"
        if task.id in _finished(head.writes):
            state = "finished"
        elif question_ids and answer.state != "unread" and not _failed_later(head.writes, task.id):
            state = "asking"
        elif await self.pauses_inside(head, task):
            state = "paused"
        return TaskView(
            task_id=task.id,
            name=task.name,
            state=state,
            # LangGraph reads an error back as the text that it stored.
            error=None if task.error is None else str(task.error)[:200],
            question_ids=question_ids if state == "asking" else (),
            questions=_questions(task) if state == "asking" else (),
        )

    async def answer(self, head: _Head) -> Answer:
        """Tell whether an answer is stored at the head, and whether it was read already.

        An answer is stored beside the questions and stays there when it is used. It is taken for
        unread only if exactly one task asks and no task, of the graph or of a subgraph, is seen to
        have received an equal answer last: in doubt the human is asked again.
        """
        given = [value for task, name, value in head.writes if (task, name) == (_NO_TASK, RESUME)]
        if not given:
            return Answer()
        finished = _finished(head.writes)
        asking = [t for t in head.snapshot.tasks if t.interrupts and t.id not in finished]
        if len(asking) != 1:
            return Answer(state="used", received=_MANY)
        inner = await self._writes_inside(head, asking[0])
        if inner is None:
            return Answer(state="used", received=_MANY)
        count = max(_counts([*head.writes, *inner]), default=0)
        if given[0] in [*_received(head.writes), *_received(inner)]:
            return Answer(state="used", received=count)
        return Answer(state="unread", value=given[0], received=count)

    async def _writes_inside(self, head: _Head, task: PregelTask) -> list[PendingWrite] | None:
        """Return what was written in the subgraphs that a task ran; None if that is too long ago.

        A subgraph may have been called from inside a node function, where nobody can know its
        namespace, so the newest checkpoints of the whole thread are read.
        """
        # A subgraph's namespace begins with its task's, or with the node's name alone
        # if it was compiled with checkpointer=True.
        namespaces = (f"{task.name}:{task.id}", task.name)
        newest = [saved async for saved in self.saver.alist(self.place(), limit=_INNER_LIMIT)]
        if len(newest) == _INNER_LIMIT and not await self._has_all_since(head, newest, namespaces):
            return None
        return [
            write
            for saved in newest
            if str(saved.config["configurable"].get("checkpoint_ns", "")).split("|")[0]
            in namespaces
            for write in saved.pending_writes or ()
        ]

    async def _has_all_since(
        self, head: _Head, newest: Sequence[CheckpointTuple], namespaces: Iterable[str]
    ) -> bool:
        """Tell whether a list that was cut off has all of the thread's checkpoints after the head.

        Ids rise with time, and most checkpointers list by id; some list by namespace. Whatever was
        written further inside has a checkpoint in its outermost namespace.
        """
        ids, head_id = [saved.checkpoint["id"] for saved in newest], head.saved.checkpoint["id"]
        if head_id not in ids or ids != sorted(ids, reverse=True):
            return False
        for namespace in namespaces:
            last = await self.saver.aget_tuple(self.place(checkpoint_ns=namespace))
            if last is not None and last.checkpoint["id"] > head_id:
                return last.checkpoint["id"] in ids
        return True

    def place(self, **parts: str) -> RunnableConfig:
        """Return what names the thread to the checkpointer, without what the config says else."""
        return {"configurable": {"thread_id": self.config["configurable"]["thread_id"], **parts}}

    async def pauses_inside(self, head: _Head, task: PregelTask) -> bool:
        """Tell whether a task's subgraph stands at a static breakpoint."""
        inner = await self.inner_head(head, task)
        if inner is None:
            return False
        if await self.breakpoints(inner):
            return True
        finished = _finished(inner.writes)
        open_tasks = [task for task in inner.snapshot.tasks if task.id not in finished]
        for open_task in open_tasks:
            if await self.pauses_inside(inner, open_task):
                return True
        return False

    async def inner_head(self, head: _Head, task: PregelTask) -> _Head | None:
        """Return the head of the subgraph that a task runs, or None if it has none."""
        graph = dict(head.graph.get_subgraphs()).get(task.name)
        if not isinstance(graph, Pregel) or not isinstance(task.state, dict):
            return None
        snapshot = await self.workflow.aget_state(task.state)
        saved = await self.saver.aget_tuple(snapshot.config) if snapshot.tasks else None
        return None if saved is None else _Head(graph=graph, snapshot=snapshot, saved=saved)

    async def breakpoints(self, head: _Head) -> tuple[str, ...]:
        """Return the nodes whose static breakpoint stands between the head and its next tasks.

        A breakpoint that was passed by a process that died before it wrote anything looks like one
        that still holds. It counts as holding: the human is asked again.
        """
        graph = head.graph
        if head.has_begun or not _moved_since_pause(head.saved):
            return ()
        following = _stops(graph, graph.interrupt_before_nodes, head.snapshot.tasks)
        preceding: tuple[str, ...] = ()
        if graph.interrupt_after_nodes and head.snapshot.parent_config:
            parent = await self.workflow.aget_state(head.snapshot.parent_config)
            preceding = _stops(graph, graph.interrupt_after_nodes, parent.tasks)
        return (*following, *preceding) if head.snapshot.tasks else ()


async def load_checkpoint(
    workflow: Workflow, config: RunnableConfig, *, timeout_seconds: float = 5.0
) -> CheckpointView:
    """Read a thread's newest checkpoint; nothing is written.

    Args:
        workflow: The compiled workflow, with the checkpointer of the process that died.
        config: Names the thread; see `thread_config`.
        timeout_seconds: The longest wait for the checkpointer.

    Raises:
        ConfigurationError: If the workflow is not compiled, or its checkpointer is not async.
        StoreBusyError: If the checkpointer did not answer in time.
        StoreError: If the checkpointer failed.
        RecoveryError: If the checkpoint cannot be read as this workflow's state.
    """
    workflow = compiled(workflow)
    thread_id = str(config["configurable"]["thread_id"])
    saver = checkpointer_of(workflow)
    traits: dict[str, Any] = {
        "thread_id": thread_id,
        "is_functional": is_functional(workflow),
        "channels": state_keys(workflow),
    }
    if saver is None:
        return CheckpointView(status="no_checkpointer", **traits)
    reader = _Reader(workflow=workflow, saver=saver, config=config)
    async with reading(saver, timeout_seconds):
        view = await in_empty_context(reader.view(), name=f"load checkpoint of {thread_id}")
    return view or CheckpointView(status="no_checkpoint", **traits)


@asynccontextmanager
async def reading(saver: BaseCheckpointSaver[Any], timeout_seconds: float) -> AsyncIterator[None]:
    """Set the deadline, and say in our words what went wrong."""
    name = type(saver).__name__
    try:
        async with asyncio.timeout(timeout_seconds):
            yield
    except PeerContextError:
        raise
    except TimeoutError as error:
        raise StoreBusyError(
            f"the checkpointer ({name}) did not answer within {timeout_seconds:g} s: "
            "see whether its database is up and not locked, then try again"
        ) from error
    except NotImplementedError as error:
        raise ConfigurationError(
            f"the checkpointer ({name}) has no async methods: compile the workflow with its async "
            "twin, as AsyncSqliteSaver or AsyncPostgresSaver"
        ) from error
    except InvalidUpdateError as error:
        raise RecoveryError(
            "the thread cannot be read: an update was sent twice to the same broken step "
            f"({_short(error)}); fork it from the checkpoint before"
        ) from error
    except Exception as error:  # an adapter translates: each saver has its driver's own errors
        raise StoreError(f"the checkpointer ({name}) failed: {_short(error)}") from error


def _view(
    head: _Head, tasks: list[TaskView], answer: Answer, breakpoints: tuple[str, ...]
) -> CheckpointView:
    snapshot, metadata = head.snapshot, head.saved.metadata
    values = snapshot.values
    run_id, step = metadata.get("run_id"), metadata.get("step")
    return CheckpointView(
        thread_id=str(head.saved.config["configurable"]["thread_id"]),
        status=_status(tasks, breakpoints),
        is_functional=is_functional(head.graph),
        channels=state_keys(head.graph),
        checkpoint_id=head.saved.checkpoint["id"],
        run_id=run_id if isinstance(run_id, str) else None,
        created_at=datetime.fromisoformat(head.saved.checkpoint["ts"]),
        step=step if isinstance(step, int) else None,
        values=dict(values) if isinstance(values, Mapping) else _single(head.graph, values),
        tasks=tuple(tasks),
        pending_channels=_sent(head.writes) & state_keys(head.graph),
        answer=answer,
        breakpoints=breakpoints,
    )


def _single(graph: Workflow, value: object) -> dict[str, Any]:
    """Return the state of a graph whose state is one value, under that channel's name."""
    names = graph.output_channels
    return {} if value is None or not isinstance(names, str) else {names: value}


def _status(tasks: Collection[TaskView], breakpoints: Collection[str]) -> CheckpointStatus:
    if not tasks:
        return "finished"
    states = [task.state for task in tasks if task.state != "finished"]
    # To resume what was killed beside a paused subgraph would run the subgraph past its human.
    if breakpoints or "paused" in states:
        return "waiting_for_human"
    return "waiting_for_human" if states and set(states) == {"asking"} else "interrupted_work"


def _finished(writes: Iterable[PendingWrite]) -> set[str]:
    """Return the ids of the tasks that finished; as LangGraph sees it, partial output counts."""
    return {task for task, name, _ in writes if task != _NO_TASK and name not in _CONTROL}


def _received(writes: Iterable[PendingWrite]) -> list[Any]:
    """Return the answer that each task received last."""
    lists = (value for task, name, value in writes if task != _NO_TASK and name == RESUME)
    return [value[-1] if isinstance(value, list) and value else value for value in lists]


def _questions(task: PregelTask) -> tuple[str, ...]:
    return tuple(repr(question.value)[:200] for question in task.interrupts)


def _counts(writes: Iterable[PendingWrite]) -> list[int]:
    """Return how many answers each task received."""
    lists = (value for task, name, value in writes if task != _NO_TASK and name == RESUME)
    return [len(value) if isinstance(value, list) else 1 for value in lists]


def _failed_later(writes: Iterable[PendingWrite], task_id: str) -> bool:
    """Tell whether a task got an answer to its question, and then raised.

    The question stays stored beside the error. A node that raised first and asked then looks the
    same if it got an answer before: it is run again, and asks again.
    """
    names = {name for task, name, _ in writes if task == task_id}
    return ERROR in names and RESUME in names


def _sent(writes: Iterable[PendingWrite]) -> frozenset[str]:
    return frozenset(name for task, name, _ in writes if task == _NO_TASK)


def _stops(
    graph: Workflow, stops: Literal["*"] | Sequence[str], tasks: Iterable[PregelTask]
) -> tuple[str, ...]:
    """Return which of the tasks' nodes are among those that a graph stops at."""
    names = dict.fromkeys(task.name for task in tasks)
    if stops == "*":
        return tuple(name for name in names if TAG_HIDDEN not in (graph.nodes[name].tags or ()))
    return tuple(name for name in names if name in stops)


def _moved_since_pause(saved: CheckpointTuple) -> bool:
    """Tell whether any channel changed since the thread was last resumed: LangGraph's own test."""
    seen = saved.checkpoint["versions_seen"].get(INTERRUPT, {})
    versions = saved.checkpoint["channel_versions"]
    return any(
        name not in seen or version > seen[name]  # type: ignore[operator]  # all of one type
        for name, version in versions.items()
    )


def _checkpoint_id(snapshot: StateSnapshot) -> str | None:
    configurable = snapshot.config.get("configurable", {})
    value = configurable.get("checkpoint_id")
    return None if value is None else str(value)


def _short(error: BaseException) -> str:
    return repr(error)[:200]
