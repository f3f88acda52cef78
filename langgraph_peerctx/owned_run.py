"""One owned run: what is written down before its first step, and how it ended."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config, merge_configs
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.types import Durability

from langgraph_peerctx import background
from langgraph_peerctx.asking import EffectPeers
from langgraph_peerctx.background import BackgroundRuntime
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.admission import (
    Redact,
    digest_of_input,
    digest_of_run,
    fenced,
    is_continuation,
    is_durable,
    of_admitted_run,
    packed_config,
    packed_context,
    packed_input,
)
from langgraph_peerctx.durability.ownership import AgentFence, Held, Ownership
from langgraph_peerctx.durability.recorder import InteractionRecorder
from langgraph_peerctx.durability.recording import recorded, recorder_of
from langgraph_peerctx.durability.run_config import but_its_own
from langgraph_peerctx.durability.run_effects import About, RunEffects, effects_in
from langgraph_peerctx.durability.workflow import (
    Workflow,
    checkpointer_of,
    safest_durability,
    thread_config,
)
from langgraph_peerctx.errors import (
    CheckpointerError,
    ConfigurationError,
    InDoubtError,
    StaleOwnerError,
    StoreBusyError,
    StoreError,
    ThreadBusyError,
)
from langgraph_peerctx.identifiers import new_id
from langgraph_peerctx.persistence.runs import EndKind, NewRun, Run, RunInput
from langgraph_peerctx.tracing import current_traceparent

_logger = logging.getLogger(__name__)

_FORK = ("checkpoint_id", "checkpoint_map")
"""What names the checkpoint of a root graph from which a run is to fork, and its subgraphs'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Under which a workflow's runs are owned."""

    agent_id: str
    name: str
    recorder: InteractionRecorder | None
    redact: Redact | None
    settings: PeerContextSettings | None


def thread_of(config: RunnableConfig) -> str:
    """Return the thread that a config names.

    Raises:
        ConfigurationError: If it names none, or one that a recovery could not name.
    """
    configurable = config.get("configurable") or {}
    if "thread_id" not in configurable:
        raise ConfigurationError(
            "an owned run needs a thread: config={'configurable': {'thread_id': ...}}"
        )
    thread_id = str(configurable["thread_id"])
    thread_config(None, thread_id)
    return thread_id


Begun = tuple[Workflow, RunnableConfig, dict[str, Any]]
"""What is run: the workflow behind its fence, its config, and the options."""


@asynccontextmanager
async def begun(
    plain: Workflow, terms: Terms, given: Any, config: RunnableConfig | None, options: Any
) -> AsyncIterator[Begun]:
    """Admit a run, and write down how it ended at the end of the block.

    Args:
        plain: The workflow as it was before its runs were owned.
        terms: Under which they are.
        given: The input.
        config: The run's.
        options: What else it is run with; see `Pregel.astream`.

    Raises:
        ThreadBusyError: If anybody is at work on the thread.
        ConfigurationError: If the input cannot be stored, or no thread is named.
        StoreError: If the control database failed, or the checkpointer did not answer in time.
    """
    order = _Order(plain, terms, given, config, options)
    lease = background.lease(terms.settings, keep=True)
    try:
        runtime = await lease.aruntime()
        ownership = await runtime.own()
        newest = None
        async with _taken(order, terms.agent_id, ownership):
            if order.continues or order.names_checkpoint:
                seconds = runtime.settings.database_timeout_seconds
                order.stand_at(await _heads_in_time(order, ownership, seconds))
            if order.continues:
                newest = await ownership.control.anewest_run(terms.agent_id, order.thread_id)
            run = order.run(newest)
        held = await _admitted(order, run, ownership, goes_on=newest is not None)
        runtime.watch.add(held.key, asyncio.get_running_loop(), order.patience(runtime.settings))
        place: RunnableConfig = {}
        try:
            place = order.place_of(run, held, ownership, runtime)
            yield order.fenced(ownership), place, order.options
        except BaseException as error:
            kind, said = order.how_it_ended(error, ownership)
            warn_of_doubts(place, kind)
            await write_end(ownership, held, run.run_id, kind, said)
            raise
        else:
            warn_of_doubts(place, "returned")
            await write_end(ownership, held, run.run_id, "returned", None)
        finally:
            runtime.watch.remove(held.key)
    finally:
        lease.release()


@contextmanager
def begun_now(
    plain: Workflow, terms: Terms, given: Any, config: RunnableConfig | None, options: Any
) -> Iterator[Begun]:
    """See `begun`: the same in sync code, which has no loop that could be watched."""
    order = _Order(plain, terms, given, config, options)
    lease = background.lease(terms.settings, keep=True)
    try:
        runtime = lease.runtime()
        ownership = runtime.own_now()
        newest = None
        with _taken_now(order, terms.agent_id, ownership):
            if order.continues or order.names_checkpoint:
                saver = order.behind(ownership)
                order.stand_at([saver.get_tuple(at) for at in order.places] if saver else [])
            if order.continues:
                newest = ownership.control.newest_run(terms.agent_id, order.thread_id)
            run = order.run(newest)
        held = _admitted_now(order, run, ownership, goes_on=newest is not None)
        place: RunnableConfig = {}
        try:
            place = order.place_of(run, held, ownership, runtime)
            yield order.fenced(ownership), place, order.options
        except BaseException as error:
            kind, said = order.how_it_ended(error, ownership)
            warn_of_doubts(place, kind)
            _ended_now(ownership, held, run.run_id, kind, said)
            raise
        else:
            warn_of_doubts(place, "returned")
            _ended_now(ownership, held, run.run_id, "returned", None)
    finally:
        lease.release()


@asynccontextmanager
async def _taken(order: "_Order", agent_id: str, ownership: Ownership) -> AsyncIterator[None]:
    """Keep others off the thread while it is seen whether the checkpoint that is named is its head.

    At the end it is taken for the run, and so held no longer; in the database it stays ours.
    """
    if not order.names_checkpoint:
        yield
        return
    in_thread = ownership.leases.in_thread
    take = partial(ownership.take, agent_id, order.thread_id)
    held = await in_thread(take, undo=ownership.drop)
    try:
        yield
    except BaseException:
        await in_thread(partial(ownership.give, held))
        raise
    ownership.drop(held)


@contextmanager
def _taken_now(order: "_Order", agent_id: str, ownership: Ownership) -> Iterator[None]:
    """See `_taken`."""
    if not order.names_checkpoint:
        yield
        return
    held = ownership.take(agent_id, order.thread_id)
    try:
        yield
    except BaseException:
        ownership.give(held)
        raise
    ownership.drop(held)


async def _admitted(order: "_Order", run: NewRun, ownership: Ownership, *, goes_on: bool) -> Held:
    """Admit a run; a thread that was taken for one that is not admitted is given back."""
    try:
        return await ownership.aadmit(run, goes_on=goes_on)
    except BaseException:
        if order.names_checkpoint:
            in_thread = ownership.leases.in_thread
            with _lease_may_run_out(run):
                await in_thread(partial(_give_back, ownership, run))
        raise


def _admitted_now(order: "_Order", run: NewRun, ownership: Ownership, *, goes_on: bool) -> Held:
    """See `_admitted`."""
    try:
        return ownership.admit(run, goes_on=goes_on)
    except BaseException:
        if order.names_checkpoint:
            with _lease_may_run_out(run):
                _give_back(ownership, run)
        raise


def _give_back(ownership: Ownership, run: NewRun) -> None:
    """Give back a thread that we hold no longer, unless somebody else in here has it by now."""
    with suppress(ThreadBusyError):
        ownership.give(ownership.take(run.agent_id, run.thread_id))


@contextmanager
def _lease_may_run_out(run: NewRun) -> Iterator[None]:
    try:
        yield
    except StoreError as error:  # what kept the run from being admitted counts more
        _logger.warning("%r is not given back, its lease runs out: %s", run.thread_id, error)


async def _heads_in_time(
    order: "_Order", ownership: Ownership, seconds: float
) -> list[CheckpointTuple | None]:
    saver = order.behind(ownership)
    if saver is None:
        return []
    try:
        async with asyncio.timeout(seconds):
            return [await saver.aget_tuple(place) for place in order.places]
    except TimeoutError as error:
        raise StoreBusyError(
            f"the checkpointer did not say within {seconds:g} s where the thread stands: see "
            "whether its database is up and not locked, then try again"
        ) from error


def _of_root(config: RunnableConfig) -> RunnableConfig:
    """Return a config as LangGraph understands it for a root graph.

    In a subgraph's, what is named is the subgraph's checkpoint; the root's is in its map.
    """
    configurable = config.get("configurable") or {}
    named = configurable.get("checkpoint_map") or {}
    if not configurable.get("checkpoint_ns") and "" not in named:
        return config
    kept = {k: v for k, v in configurable.items() if k not in ("checkpoint_ns", "checkpoint_id")}
    root = {"checkpoint_id": named[""]} if "" in named else {}
    return {**config, "configurable": {**kept, **root}}


class _Order:
    """A run that is asked for.

    Raises:
        ConfigurationError: If no thread is named.
    """

    def __init__(
        self,
        plain: Workflow,
        terms: Terms,
        given: Any,
        config: RunnableConfig | None,
        options: dict[str, Any],
    ) -> None:
        self._plain = plain
        self._terms = terms
        self._given = given
        self._digest: Callable[[], str | None] | None = None
        self._head_id: str | None = None
        self.config: RunnableConfig = _of_root(ensure_config(merge_configs(plain.config, config)))
        configurable = self.config.get("configurable") or {}
        self.thread_id = thread_of(self.config)
        self.options: dict[str, Any] = {**options, "durability": self._durability(options)}
        self.names_checkpoint: bool = any(name in configurable for name in _FORK)
        # A fork from an earlier checkpoint is a run of its own.
        self.continues: bool = is_continuation(given) and not self.names_checkpoint
        self._named: dict[str, Any] = {"": configurable.get("checkpoint_id")}
        self._named = {**(configurable.get("checkpoint_map") or {}), **self._named}

    @property
    def places(self) -> list[RunnableConfig]:
        """Where the heads are that tell whether it forks: the thread's, and named subgraphs'."""
        at = {"thread_id": self.thread_id}
        return [{"configurable": {**at, "checkpoint_ns": name}} for name in self._named]

    def stand_at(self, heads: Sequence[CheckpointTuple | None]) -> None:
        """Take note of the heads, as in `places`: who names those, forks from nothing."""
        ids = [None if head is None else head.checkpoint["id"] for head in heads]
        stands = dict.fromkeys(self._named) | dict(zip(self._named, ids, strict=False))
        self._head_id = stands[""]
        if any(named not in (None, "", stands[name]) for name, named in self._named.items()):
            return
        configurable = self.config.get("configurable") or {}
        kept = {name: value for name, value in configurable.items() if name not in _FORK}
        self.config = {**self.config, "configurable": kept}
        self.continues = is_continuation(self._given)

    def run(self, newest: Run | None) -> NewRun:
        """Return what to write down: a new run, or one more input of the newest.

        Raises:
            ConfigurationError: If the input cannot be stored.
        """
        plain = self._plain
        value = packed_input(plain, self._given, self._terms.redact)
        self._digest = (
            partial(digest_of_run, plain, newest)
            if newest
            else partial(digest_of_input, plain, self._given, value)
        )
        return NewRun(
            run_id=newest.run_id if newest else new_id(),
            agent_id=self._terms.agent_id,
            thread_id=self.thread_id,
            workflow=self._terms.name,
            given=RunInput(value=value, checkpoint_id=self._head_id if self.continues else None),
            config=packed_config(plain, self.config, self.options),
            context=packed_context(plain, self.options.get("context")),
            durability=self.options["durability"],
            traceparent=current_traceparent(),
        )

    def place_of(
        self, run: NewRun, held: Held, ownership: Ownership, runtime: BackgroundRuntime
    ) -> RunnableConfig:
        """Return the config that an admitted run runs with."""
        about = About(
            agent_id=run.agent_id,
            thread_id=run.thread_id,
            run_id=run.run_id,
            epoch=held.epoch,
        )
        effects = RunEffects(
            ownership.control,
            about,
            incarnation=ownership.owner.incarnation,
            peers=EffectPeers(runtime),
            digest=self._digest,
        )
        place = effects.go_along(of_admitted_run(self.config, run.run_id))
        recorder = self._terms.recorder or recorder_of(run.agent_id)
        return but_its_own(recorded(place, recorder), self._plain.config)

    def how_it_ended(
        self, error: BaseException, ownership: Ownership
    ) -> tuple[EndKind, str | None]:
        """See there."""
        return how_it_ended(error, ownership, is_hidden=self._terms.redact is not None)

    def fenced(self, ownership: Ownership) -> Workflow:
        """Return the workflow behind the fence of what this process owns."""
        return fenced(self._plain, AgentFence(self._terms.agent_id, ownership))

    def behind(self, ownership: Ownership) -> BaseCheckpointSaver[Any] | None:
        """Return its checkpointer, if it has one, behind the same fence."""
        return checkpointer_of(self.fenced(ownership))

    def patience(self, settings: PeerContextSettings) -> float:
        """Return how long the run's loop may stand still, in seconds."""
        step = self._plain.step_timeout
        # LangGraph ends a step that is late; where the loop hangs, it cannot.
        late = settings.stuck_seconds if step is None else step + settings.silence_seconds
        return min(settings.stuck_seconds, late)

    def _durability(self, options: dict[str, Any]) -> Durability | None:
        chosen: Durability | None = options.get("durability") or safest_durability(self._plain)
        if not is_durable(chosen):
            _logger.warning(
                "%s runs with durability=%r: steps that have ended can be lost in a crash",
                self._terms.name,
                chosen,
            )
        return chosen


def how_it_ended(
    error: BaseException, ownership: Ownership, *, is_hidden: bool
) -> tuple[EndKind, str | None]:
    """Say how a run ended that did not return.

    Args:
        error: What it raised.
        ownership: Of the process.
        is_hidden: Whether an input is redacted: an error's message may tell what was in it.
    """
    named = type(error).__name__
    said = named if is_hidden else f"{named}: {error}"
    if isinstance(error, StaleOwnerError | CheckpointerError):
        # It did not fail by itself: whoever has the thread next, goes on with it.
        return "handed_over", said
    if isinstance(error, InDoubtError) and not error.is_final:
        return "handed_over", said
    if isinstance(error, Exception):
        return "raised", said
    return ("handed_over" if ownership.is_leaving else "cancelled"), named


def warn_of_doubts(place: RunnableConfig, kind: EndKind) -> None:
    """Say aloud which effects a run leaves in doubt that nobody goes on with."""
    effects = effects_in(place)
    found = [] if effects is None or kind == "handed_over" else effects.unsettled
    if not found:
        return
    _logger.warning(
        "the run has ended (%s), and whether its effects happened is not known: %s",
        kind,
        ", ".join(sorted(repr(effect.name[:80]) for effect in found))[:200],
        extra={
            "agent_id": found[0].agent_id,
            "thread_id": found[0].thread_id,
            "run_id": found[0].run_id,
            "effect_keys": [effect.key for effect in found],
        },
    )


async def write_end(
    ownership: Ownership, held: Held, run_id: str, kind: EndKind, error: str | None
) -> None:
    """Write the end down, whoever is cancelled meanwhile; the run's own outcome counts more."""
    write = partial(_ended_now, ownership, held, run_id, kind, error)
    ending = asyncio.ensure_future(ownership.leases.in_thread(write))
    try:
        await asyncio.shield(ending)
    except asyncio.CancelledError:
        await asyncio.wait({ending})
        raise
    except StoreError as fault:  # it did not get a thread, or takes too long
        _owe(ownership, held, partial(ownership.end, held, run_id, kind, error=error), fault)


def _ended_now(
    ownership: Ownership, held: Held, run_id: str, kind: EndKind, error: str | None
) -> None:
    """Write the end down now, or else as soon as the database answers."""
    end = partial(ownership.end, held, run_id, kind, error=error)
    try:
        is_ours = end()
    except StoreError as fault:
        _owe(ownership, held, end, fault)
        return
    if not is_ours and kind != "handed_over":
        _logger.warning("run %s was taken over meanwhile: its end here counts for nothing", run_id)


def _owe(ownership: Ownership, held: Held, end: Callable[[], bool], fault: StoreError) -> None:
    """Have the end written down later; until then its lease runs out."""
    _logger.warning("the end of a run is not written down yet: %s", fault)
    ownership.drop(held)
    ownership.owe(*held.key, end)
