"""The side effects of one run: where each stands, what is known of it, and who can tell."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final, Protocol, TypedDict, Unpack
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableConfig
from pydantic import JsonValue

from langgraph_peerctx.durability.positions import Execution, Positions, place_of
from langgraph_peerctx.durability.run_config import with_callback
from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.persistence.effect_ledger import (
    Effect,
    EffectLedger,
    EffectScope,
    EffectSource,
    IfUnknown,
    NewEffect,
    Standing,
)
from langgraph_peerctx.protocol.messages import InDoubtAnswer, InDoubtKey, Verdict
from langgraph_peerctx.protocol.tickets import NAME_LIMIT, EffectTicket

EFFECTS: Final = "__peerctx_effects"
"""Under which a run's effects stand in its config; never kept in a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Whose effect is asked about, and by whom.

    Attributes:
        epoch: The asker's.
        input_digest: Of what the run was given, where it is known; see `admission.digest_of`.
    """

    agent_id: str
    thread_id: str
    run_id: str
    epoch: int
    input_digest: str | None = None


class Peers(Protocol):
    """Who asks the peer that an effect names."""

    def ask(self, about: About, key: InDoubtKey) -> InDoubtAnswer | None:
        """Return what it says; None if it says nothing. Blocks; not for a loop."""
        ...

    async def aask(self, about: About, key: InDoubtKey) -> InDoubtAnswer | None:
        """See `ask`."""
        ...


class EffectTerms(TypedDict):
    """How an effect was asked for; see `effect`."""

    peer_id: str | None
    scope: EffectScope
    if_unknown: IfUnknown
    has_check: bool


class RunEffects(BaseCallbackHandler):
    """What `effect` needs of the run that it stands in; it goes along in the run's config.

    As a callback it is told which node is executed at which superstep, which a nested graph cannot
    know of the graphs around it.

    Args:
        ledger: The control database.
        about: Whose run it is, and under which epoch it is ours.
        incarnation: This life of our process.
        peers: Who asks the peers; None if they are not to be asked.
        doubted_since: The run's ledger was lost: what is not in it may have been done, at this
            moment at the earliest.
        digest: Returns what `about` does not tell: the digest of what the run was given. It takes
            its time; it is asked once, in the ledger's thread, and not before there is an effect.
    """

    run_inline = True

    def __init__(
        self,
        ledger: EffectLedger,
        about: About,
        *,
        incarnation: str,
        peers: Peers | None = None,
        doubted_since: datetime | None = None,
        digest: Callable[[], str | None] | None = None,
    ) -> None:
        self.ledger: EffectLedger = ledger
        self.about: About = about
        self.peers: Peers | None = peers
        self._incarnation = incarnation
        self._doubted_since = doubted_since
        self._input_digest = about.input_digest
        self._digest = digest
        self._digesting = threading.Lock()
        self._positions = Positions(max_failures=None)
        self._begun: dict[str, Effect] = {}
        self._doing: dict[str, Doing] = {}
        self._lock = threading.Lock()

    @property
    def unsettled(self) -> list[Effect]:
        """The effects that were begun here and of which nobody here knows what came."""
        with self._lock:
            return list(self._begun.values())

    def go_along(self, config: RunnableConfig) -> RunnableConfig:
        """Return a config with which a run has these effects."""
        configurable = {**(config.get("configurable") or {}), EFFECTS: self}
        return with_callback({**config, "configurable": configurable}, self)

    def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: Mapping[str, Any] | Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """See `BaseCallbackHandler`."""
        del serialized, inputs, kwargs
        self._positions.began(run_id, metadata, parent_run_id)

    def on_chain_end(
        self, outputs: Mapping[str, Any] | Any, *, run_id: UUID, **kwargs: Any
    ) -> None:
        """See `BaseCallbackHandler`."""
        del outputs, kwargs
        self._positions.ended(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """See `BaseCallbackHandler`."""
        del error, kwargs
        self._positions.ended(run_id, has_failed=True)

    def on_tool_start(
        self,
        serialized: dict[str, Any],
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """See `BaseCallbackHandler`: there may be graphs in a tool."""
        del serialized, input_str, kwargs
        self._positions.passing(run_id, parent_run_id)

    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """See `BaseCallbackHandler`."""
        del output, kwargs
        self._positions.ended(run_id)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """See `BaseCallbackHandler`."""
        del error, kwargs
        self._positions.ended(run_id)

    def use(self, config: RunnableConfig, name: str, what: object) -> Execution:
        """Use a name where code stands, and return where that is.

        Args:
            config: That of the node.
            name: The name.
            what: What is to be done: if it has failed, the same may be tried again under its name.

        Raises:
            ConfigurationError: If the name cannot be one, or was used there before.
        """
        if not isinstance(name, str) or not 1 <= len(name) <= NAME_LIMIT or not name.isprintable():
            raise ConfigurationError(
                f"the effect's key {name!r:.80} is no printable text of 1 to {NAME_LIMIT} "
                "characters"
            )
        namespace = (config.get("configurable") or {})["checkpoint_ns"]
        execution = self._positions.execution(namespace, config)
        with self._lock:
            if name in execution.used and not _is_same(execution.used[name], what):
                raise ConfigurationError(
                    f"the effect's key {name!r:.80} is used twice at {execution.position}: it "
                    "would be done once; give each effect of a node a key of its own"
                )
            execution.used[name] = None
        return execution

    def give_back(self, execution: Execution, name: str, what: object) -> None:
        """Let what has failed be tried again under its name: the ledger knows what came of it."""
        execution.used[name] = what

    def new(self, execution: Execution, name: str, **terms: Unpack[EffectTerms]) -> NewEffect:
        """Return the effect of a name at a place in the run.

        Raises:
            ConfigurationError: If the place is not known.
        """
        about = self.about
        return NewEffect(
            agent_id=about.agent_id,
            thread_id=about.thread_id,
            run_id=about.run_id,
            position=place_of(execution),
            name=name,
            **terms,
        )

    def ticket(self, effect: Effect) -> EffectTicket:
        """Return what travels with an effect."""
        return EffectTicket(
            effect_key=effect.key,
            name=effect.name,
            sender_id=effect.agent_id,
            thread_id=effect.thread_id,
            run_id=effect.run_id if effect.scope == "run" else effect.thread_id,
            input_digest=self._input_digest if effect.scope == "run" else None,
            epoch=effect.epoch,
        )

    def take_turn(self, new: NewEffect) -> "Doing | None":
        """Begin to do an effect, alone in this process; or return who is doing it.

        To the ledger, two nodes of one run are the same: it would take what is being done at this
        moment for something in doubt.
        """
        with self._lock:
            other = self._doing.get(new.effect_id)
            if other is None:
                self._doing[new.effect_id] = Doing()
            return other

    def end_turn(self, new: NewEffect) -> None:
        """Let whoever waits go on."""
        with self._lock:
            doing = self._doing.pop(new.effect_id)
        doing.end()

    def take_back(self, effect: Effect) -> None:
        """Have it written down later that a begun effect was never called; does not block."""
        if not effect.is_retried:
            self._settled(effect)
        self.ledger.later(partial(self.refute, effect))

    # What is written; each blocks.

    def intend(self, new: NewEffect, over: int | None = None) -> Standing:
        """See `EffectLedger.intend`."""
        self._take_digest()
        standing = self.ledger.intend(
            new,
            epoch=self.about.epoch,
            incarnation=self._incarnation,
            over=over,
            doubted_since=self._doubted_since,
        )
        if standing.has_begun:
            with self._lock:
                self._begun[standing.effect.effect_id] = standing.effect
        elif standing.effect.status == "done":
            self._settled(standing.effect)
        return standing

    def _take_digest(self) -> None:
        with self._digesting:
            if self._digest is not None:
                self._input_digest, self._digest = self._digest(), None

    def conclude(self, effect: Effect, outcome: JsonValue) -> None:
        """See `EffectLedger.conclude`."""
        self.ledger.conclude(effect, outcome)
        self._settled(effect)

    def refute(self, effect: Effect) -> None:
        """See `EffectLedger.refute`."""
        if self.ledger.refute(effect).status != "intent":
            self._settled(effect)

    def settle(
        self, effect: Effect, verdict: Verdict, source: EffectSource, reply: JsonValue = None
    ) -> Effect:
        """See `EffectLedger.settle_effect`."""
        settled = self.ledger.settle_effect(effect, verdict, source, reply)
        if settled.status != "intent":
            self._settled(settled)
        return settled

    def _settled(self, effect: Effect) -> None:
        with self._lock:
            self._begun.pop(effect.effect_id, None)


def _is_same(before: object, what: object) -> bool:
    """Tell whether what failed is tried again; anybody's arguments may do anything at a look."""
    try:
        return before is not None and bool(before == what)
    except Exception:  # noqa: BLE001 - anybody's arguments
        return False


class Doing:
    """An effect that is being done in this process; others wait for its end."""

    def __init__(self) -> None:
        self._loop = running_loop()
        self._over: Future[None] = Future()
        self._over.set_running_or_notify_cancel()  # who no longer waits does not end it

    @property
    def is_on_this_loop(self) -> bool:
        """Whether to block here would keep it from its end."""
        return self._loop is not None and self._loop is running_loop()

    def end(self) -> None:
        """Let those go on that wait."""
        self._over.set_result(None)

    def join(self) -> None:
        """Wait for its end; blocks."""
        self._over.result()

    async def ajoin(self) -> None:
        """Wait for its end, on any loop."""
        await asyncio.wrap_future(self._over)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the loop on which we stand; None in a thread without one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def effects_in(config: RunnableConfig) -> RunEffects | None:
    """Return the effects of the run that a config is of; None where it is not owned."""
    found = (config.get("configurable") or {}).get(EFFECTS)
    return found if isinstance(found, RunEffects) else None


__all__ = [
    "EFFECTS",
    "About",
    "Doing",
    "EffectTerms",
    "IfUnknown",
    "Peers",
    "RunEffects",
    "effects_in",
    "running_loop",
]
