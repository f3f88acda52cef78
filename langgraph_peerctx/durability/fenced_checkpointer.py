"""A checkpointer that refuses a superseded writer, around any other.

Refusing is not enough: a process can be frozen between the check and the write. So what it writes
then must not count either. Each checkpoint carries the epoch of its writer in its metadata, and the
head of a namespace is the newest by (epoch, checkpoint id): ids are wall-clock, and a dead host's
clock may be ahead. Pending writes are stored under a task id with the epoch in it, since writers
share the id of a task; of one task the writes of the highest epoch count, whole.
"""

import sys
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    PendingWrite,
)

from langgraph_peerctx.durability.ownership import process_fence
from langgraph_peerctx.errors import (
    CheckpointerError,
    ConfigurationError,
    PeerContextError,
    StaleOwnerError,
    StoreError,
)

if TYPE_CHECKING:
    from langgraph_peerctx.durability.postgres_fence import SharedTransactions

T = TypeVar("T")

EPOCH = "peerctx_epoch"
"""The key of a checkpoint's metadata that holds its writer's epoch."""
_MARK = "#peerctx-epoch:"

_OPTIONAL = (
    *("delete_thread", "delete_for_runs", "copy_thread", "prune"),
    *("adelete_thread", "adelete_for_runs", "acopy_thread", "aprune"),
)
"""Methods that not every checkpointer has: who asks whether we have them, must get its answer."""


class Fence(Protocol):
    """Says under which epoch a thread may be written by us, and which epochs there have been."""

    def may_write(self, thread_id: str) -> int | None:
        """Return the epoch to write under; None for a thread that never had a lease.

        Raises:
            StaleOwnerError: If the thread is not ours.
        """
        ...

    async def amay_write(self, thread_id: str) -> int | None:
        """See `may_write`."""
        ...

    def epoch_of(self, thread_id: str) -> int:
        """Return the highest epoch that a thread has had; 0 if it never had a lease."""
        ...

    async def aepoch_of(self, thread_id: str) -> int:
        """See `epoch_of`."""
        ...


class FencedCheckpointer(BaseCheckpointSaver[Any]):
    """Any checkpointer, behind a fence; it has exactly the methods that the other has.

    Args:
        saver: The checkpointer that keeps what is written.
        fence: Who may write; by default what this process's runtime owns.

    Raises, when it writes:
        StaleOwnerError: If the thread is another owner's by now.
        CheckpointerError: If the database of the leases, or the saver's, failed.
    """

    def __new__(cls, saver: BaseCheckpointSaver[Any], fence: Fence | None = None) -> Self:
        """Return one that has the optional methods that the saver has, and no other."""
        del fence
        if not isinstance(saver, BaseCheckpointSaver):
            raise ConfigurationError(
                f"a {type(saver).__name__} is no checkpointer: give a BaseCheckpointSaver"
            )
        if isinstance(saver, FencedCheckpointer):
            raise ConfigurationError("this checkpointer has a fence already")
        made: Self = super().__new__(_with_the_methods_of(cls, type(saver)))
        return made

    def __init__(self, saver: BaseCheckpointSaver[Any], fence: Fence | None = None) -> None:
        self._saver = saver
        self._fence: Fence = fence or process_fence
        self._transactions = _transactions_of(saver, self._fence)

    @property
    def bare(self) -> BaseCheckpointSaver[Any]:
        """The saver without its fence."""
        return self._saver

    @property
    def serde(self) -> Any:  # type: ignore[override]  # an attribute there, the saver's here
        """The saver's serializer."""
        return self._saver.serde

    @property
    def config_specs(self) -> list[Any]:
        """The saver's."""
        return self._saver.config_specs

    def get_next_version(self, current: Any, channel: None) -> Any:
        """See the saver's."""
        return self._saver.get_next_version(current, channel)

    def with_allowlist(
        self, extra_allowlist: Collection[tuple[str, ...]]
    ) -> BaseCheckpointSaver[Any]:
        """Return one around the saver's clone: LangGraph clones what it compiles with."""
        saver = self._saver.with_allowlist(extra_allowlist)
        if saver is self._saver:
            return self
        clone = type(self)(saver, self._fence)
        clone._transactions = self._transactions  # noqa: SLF001 - on the same connections
        return clone

    async def aclose(self) -> None:
        """Close the fence's own connections, if it has any; without it, they go when this goes.

        The saver is its owner's. Safe to call twice, and to write afterwards.
        """
        if self._transactions is not None:
            await self._transactions.aclose()

    # Reading: the head is the newest of the highest epoch.

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Return a checkpoint, or the head; see `BaseCheckpointSaver.get_tuple`."""
        with _translated(self._saver):
            newest = self._saver.get_tuple(config)
            if newest is None or _names_one(config):
                return _bare(newest)
            for epoch in _higher_epochs(newest, self._fence.epoch_of(_thread(config))):
                written = self._saver.list(_namespace(config), filter={EPOCH: epoch}, limit=1)
                for found in [*written]:  # to the end: savers hold their lock until then
                    return _bare(self._saver.get_tuple(found.config))
            return _bare(newest)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """See `get_tuple`."""
        with _translated(self._saver):
            newest = await self._saver.aget_tuple(config)
            if newest is None or _names_one(config):
                return _bare(newest)
            for epoch in _higher_epochs(newest, await self._fence.aepoch_of(_thread(config))):
                written = self._saver.alist(_namespace(config), filter={EPOCH: epoch}, limit=1)
                for found in [head async for head in written]:
                    return _bare(await self._saver.aget_tuple(found.config))
            return _bare(newest)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """List checkpoints, a superseded writer's too; see `BaseCheckpointSaver.list`."""
        for found in self._saver.list(config, filter=filter, before=before, limit=limit):
            yield _without_epochs(found)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """See `list`."""
        async for found in self._saver.alist(config, filter=filter, before=before, limit=limit):
            yield _without_epochs(found)

    # Delta history is the base class's own: it walks through `get_tuple`, whose writes are ours.

    # Writing: under our epoch, or not at all.

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint under our epoch; see `BaseCheckpointSaver.put`."""
        if self._transactions is not None:
            return self._transactions.wait_for(
                self.aput(config, checkpoint, metadata, new_versions)
            )
        with _translated(self._saver):
            epoch = self._fence.may_write(_thread(config))
            return self._saver.put(config, checkpoint, _stamped(metadata, epoch), new_versions)

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """See `put`."""

        async def write(saver: BaseCheckpointSaver[Any], epoch: int | None) -> RunnableConfig:
            return await saver.aput(config, checkpoint, _stamped(metadata, epoch), new_versions)

        return await self._awrite(_thread(config), write)

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Store a task's writes under our epoch; see `BaseCheckpointSaver.put_writes`."""
        if self._transactions is not None:
            return self._transactions.wait_for(self.aput_writes(config, writes, task_id, task_path))
        with _translated(self._saver):
            epoch = self._fence.may_write(_thread(config))
            return self._saver.put_writes(config, writes, _marked(task_id, epoch), task_path)

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """See `put_writes`."""

        async def write(saver: BaseCheckpointSaver[Any], epoch: int | None) -> None:
            await saver.aput_writes(config, writes, _marked(task_id, epoch), task_path)

        await self._awrite(_thread(config), write)

    async def _awrite(
        self,
        thread_id: str,
        write: Callable[[BaseCheckpointSaver[Any], int | None], Awaitable[T]],
    ) -> T:
        """Write in one transaction with the lease where that can be had, or else after a look."""
        with _translated(self._saver):
            if self._transactions is not None:
                saver: Any = self._saver
                ownership = await self._transactions.ownership(saver)
                if ownership is not None:
                    return await self._transactions.write(saver, ownership, thread_id, write)
            return await write(self._saver, await self._fence.amay_write(thread_id))


@contextmanager
def _translated(saver: BaseCheckpointSaver[Any]) -> Iterator[None]:
    """Say of a database's failure that it is one: the run did not fail by itself."""
    try:
        yield
    except StoreError as error:
        raise CheckpointerError(str(error)) from error
    except (PeerContextError, NotImplementedError, TypeError, ValueError, LookupError):
        raise
    except Exception as error:  # an adapter translates: each saver has its driver's own errors
        raise CheckpointerError(
            f"the checkpointer ({type(saver).__name__}) failed: {error!r:.200}"
        ) from error


def _transactions_of(saver: Any, fence: Any) -> "SharedTransactions | None":
    """Return what writes a saver's checkpoints together with the leases; None if nothing can."""
    postgres = sys.modules.get("langgraph.checkpoint.postgres.aio")  # who has such a saver, has it
    if postgres is None or not isinstance(saver, postgres.AsyncPostgresSaver):
        return None
    if not hasattr(fence, "aownership"):
        return None
    from langgraph_peerctx.durability.postgres_fence import (  # noqa: PLC0415 - an optional extra
        SharedTransactions,
    )

    return SharedTransactions(saver, fence)


def _with_the_methods_of(
    cls: type[FencedCheckpointer], saver: type[BaseCheckpointSaver[Any]]
) -> type[Any]:
    """Return a subclass that forwards the optional methods that a saver's class has."""
    base = BaseCheckpointSaver
    theirs = [name for name in _OPTIONAL if getattr(saver, name) is not getattr(base, name)]
    return type(cls.__name__, (cls,), {name: _forwarding(name) for name in theirs})


def _forwarding(name: str) -> Callable[..., Any]:
    def forward(self: FencedCheckpointer, *arguments: Any, **options: Any) -> Any:
        return getattr(self._saver, name)(*arguments, **options)

    forward.__name__ = name
    forward.__doc__ = f"See `BaseCheckpointSaver.{name}`."
    return forward


def _thread(config: RunnableConfig) -> str:
    return str(config["configurable"]["thread_id"])


def _names_one(config: RunnableConfig) -> bool:
    return bool(config["configurable"].get("checkpoint_id"))


def _namespace(config: RunnableConfig) -> RunnableConfig:
    """Return what `list` needs to look into one namespace: without its name, it looks into all."""
    namespace = config["configurable"].get("checkpoint_ns", "")
    return {"configurable": {"thread_id": _thread(config), "checkpoint_ns": namespace}}


def _higher_epochs(newest: CheckpointTuple, highest: int) -> range:
    """Return the epochs, highest first, whose checkpoints would be the head instead."""
    return range(highest, _epoch_of(newest.metadata), -1)


def _epoch_of(metadata: Mapping[str, Any]) -> int:
    epoch = metadata.get(EPOCH, 0)
    return epoch if isinstance(epoch, int) else 0


def _stamped(metadata: CheckpointMetadata, epoch: int | None) -> CheckpointMetadata:
    if epoch is None:
        return metadata
    stamped: CheckpointMetadata = {**metadata, EPOCH: epoch}  # type: ignore[misc]  # ours
    return stamped


def _marked(task_id: str, epoch: int | None) -> str:
    return task_id if epoch is None else f"{task_id}{_MARK}{epoch:020}"


def _unmarked(task_id: str) -> tuple[str, int]:
    bare, mark, epoch = task_id.rpartition(_MARK)
    return (bare, int(epoch)) if mark and epoch.isdigit() else (task_id, 0)


def _bare(found: CheckpointTuple | None) -> CheckpointTuple | None:
    return None if found is None else _without_epochs(found)


def _without_epochs(found: CheckpointTuple) -> CheckpointTuple:
    """Return a checkpoint as LangGraph knows it: no epochs in it, of each task the last word."""
    metadata: Any = {name: value for name, value in found.metadata.items() if name != EPOCH}
    writes = found.pending_writes
    return found._replace(
        metadata=metadata, pending_writes=writes and _of_the_highest_epochs(writes)
    )


def _of_the_highest_epochs(writes: Sequence[PendingWrite]) -> list[PendingWrite]:
    marked = [(*_unmarked(task_id), channel, value) for task_id, channel, value in writes]
    highest: dict[str, int] = {}
    for task_id, epoch, _, _ in marked:
        highest[task_id] = max(epoch, highest.get(task_id, 0))
    return [
        (task_id, channel, value)
        for task_id, epoch, channel, value in marked
        if highest[task_id] == epoch
    ]


__all__ = ["EPOCH", "Fence", "FencedCheckpointer", "StaleOwnerError"]
