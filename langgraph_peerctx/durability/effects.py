"""Side effects that are done once, though the node around them may run again.

An effect is written down before it is done and again when its outcome is there, so that a node
that runs again gets the outcome and calls nothing. What was meant and has no outcome is in doubt:
only the peer that it reaches can tell, or a look of the caller's own. Nothing is guessed.
"""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, Final, Generic, ParamSpec, Protocol, Self, TypeAlias, TypeVar, overload

from langchain_core.runnables import RunnableConfig
from langgraph.config import get_config
from pydantic import JsonValue

from langgraph_peerctx.durability.run_effects import (
    About,
    Doing,
    IfUnknown,
    Peers,
    RunEffects,
    effects_in,
)
from langgraph_peerctx.errors import (
    CheckpointerError,
    ConfigurationError,
    InDoubtError,
    ProtocolError,
    StoreError,
)
from langgraph_peerctx.identifiers import check_id
from langgraph_peerctx.persistence.database import Database
from langgraph_peerctx.persistence.effect_ledger import (
    Effect,
    EffectScope,
    EffectSource,
    NewEffect,
    Standing,
)
from langgraph_peerctx.protocol.json_values import plain
from langgraph_peerctx.protocol.messages import InDoubtAnswer, InDoubtKey, Verdict
from langgraph_peerctx.protocol.tickets import EffectTicket

_logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What a look of the caller's own has found out of an effect in doubt.

    Attributes:
        verdict: `seen`: it happened. `not_seen`: it did not, and will not any more. `cannot_tell`.
        reply: What came of it, plain JSON, if it happened.
    """

    verdict: Verdict
    reply: JsonValue = None

    @classmethod
    def happened(cls, reply: JsonValue = None) -> Self:
        """Return that it happened, and what came of it."""
        return cls(verdict="seen", reply=reply)

    @classmethod
    def did_not_happen(cls) -> Self:
        """Return that it did not happen and will not any more: it is done again."""
        return cls(verdict="not_seen")

    @classmethod
    def unknown(cls) -> Self:
        """Return that nobody can tell."""
        return cls(verdict="cannot_tell")


Check: TypeAlias = Callable[[EffectTicket], Settled | Awaitable[Settled]]

_current: ContextVar[EffectTicket | None] = ContextVar("peerctx_effect", default=None)


def current_effect() -> EffectTicket:
    """Return the ticket of the effect that is being done: it travels to the peer with the call.

    As a header, `current_effect().as_headers()`, or as a field, `.as_field()`.

    Raises:
        ConfigurationError: If no effect is being done here.
    """
    ticket = _current.get()
    if ticket is None:
        raise ConfigurationError("no effect is being done here: call it through effect(...)")
    return ticket


class Effectful(Protocol):
    """Makes a function's calls effects."""

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return the function such that each call of it is an effect."""
        ...


@overload
def effect(
    key: str,
    call: Callable[..., T],
    /,
    *arguments: Any,
    peer: str | None = None,
    check: Check | None = None,
    not_done_on: Sequence[type[BaseException]] = (),
    scope: EffectScope = "run",
    if_unknown: IfUnknown = "ask",
) -> T: ...


@overload
def effect(
    key: str | Callable[..., str],
    /,
    *,
    peer: str | None = None,
    check: Check | None = None,
    not_done_on: Sequence[type[BaseException]] = (),
    scope: EffectScope = "run",
    if_unknown: IfUnknown = "ask",
) -> Effectful: ...


def effect(
    key: str | Callable[..., str],
    call: Callable[..., Any] | None = None,
    /,
    *arguments: Any,
    peer: str | None = None,
    check: Check | None = None,
    not_done_on: Sequence[type[BaseException]] = (),
    scope: EffectScope = "run",
    if_unknown: IfUnknown = "ask",
) -> Any:
    """Do something that must not happen twice; in a node, tool or task of an owned run.

    As a call, `await effect("order", send, order, peer="inventory-agent")`, or as a decorator,
    `@effect("order", peer="inventory-agent")`. Of a sync function it blocks; of an async one it is
    awaited. When the node runs again, after a crash or as a retry, a recorded outcome is returned
    and nothing is called.

    If an earlier attempt left no outcome, the peer is asked over Kafka, then `check`: what happened
    is not done again, what did not happen is; and if nobody can tell, `if_unknown` decides.

    Args:
        key: Names the effect among those of its node; 1 to 200 printable characters. Loops, Sends
            and nested graphs need no key of their own: the place in the run counts as well. For a
            decorator it may be a function of the call's arguments.
        call: What is to be done; its outcome is plain JSON.
        *arguments: What it is called with.
        peer: The agent that it reaches. It should take it with `Receiver`, under the ticket that
            `current_effect()` returns inside of the call: then it can always tell.
        check: Looks whether an effect in doubt has happened; it is given the ticket, and returns a
            `Settled`. It may be async if `call` is.
        not_done_on: Exceptions that mean that it was not done, a refused connection for instance,
            in a tuple or a list. Any other leaves it in doubt.
        scope: `run`: once at this place of this run. `thread`: once in the thread, whatever the
            run and the place; for business keys.
        if_unknown: `ask` a human, by way of an `InDoubtError` and the recovery; `retry`: do it
            again; `fail` with the `InDoubtError`.

    Returns:
        The outcome, as plain JSON: a tuple becomes a list.

    Raises:
        ConfigurationError: If the run is not owned, the key is used twice at one place, an argument
            cannot be right, or the outcome is no plain JSON; then it stays in doubt.
        InDoubtError: If nobody can tell whether an earlier attempt happened.
        StaleOwnerError: If another process has taken the thread over: nothing was called.
        CheckpointerError: If the control database failed.
    """
    terms = _Terms(
        key=key,
        peer_id=None if peer is None else check_id(peer, "peer"),
        check=check,
        not_done_on=_exceptions(not_done_on),
        scope=scope,
        if_unknown=if_unknown,
    )
    if call is None:
        return partial(_decorated, terms)
    return terms.done(call, arguments, {})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """How an effect was asked for."""

    key: str | Callable[..., str]
    peer_id: str | None
    check: Check | None
    not_done_on: tuple[type[BaseException], ...]
    scope: EffectScope
    if_unknown: IfUnknown

    def __post_init__(self) -> None:
        if self.scope not in ("run", "thread"):
            raise ConfigurationError(f"scope={self.scope!r:.40}: expected 'run' or 'thread'")
        if self.if_unknown not in ("ask", "retry", "fail"):
            raise ConfigurationError(
                f"if_unknown={self.if_unknown!r:.40}: expected 'ask', 'retry' or 'fail'"
            )

    def done(self, call: Callable[..., Any], arguments: Any, named: Any) -> Any:
        """Do it: blocking, or as something to be awaited."""
        doing = self._doing(call, arguments, named)
        return _later(doing) if _is_async(call) else _now(doing)

    def _doing(self, call: Callable[..., Any], arguments: Any, named: Any) -> "_Doing":
        run, config = _here()
        name = self.key(*arguments, **named) if callable(self.key) else self.key
        what = call, arguments, named
        execution = run.use(config, name, what)
        new = run.new(
            execution,
            name,
            peer_id=self.peer_id,
            scope=self.scope,
            if_unknown=self.if_unknown,
            has_check=self.check is not None,
        )
        give_back = partial(run.give_back, execution, name, what)
        return _effect(run, new, self, partial(call, *arguments, **named), give_back)


def _exceptions(given: Sequence[type[BaseException]]) -> tuple[type[BaseException], ...]:
    if not isinstance(given, tuple | list) or not all(
        isinstance(one, type) and issubclass(one, BaseException) for one in given
    ):
        raise ConfigurationError(
            f"not_done_on={given!r:.80}: expected a tuple of exception classes"
        )
    return tuple(given)


def _decorated(terms: _Terms, function: Callable[..., Any]) -> Callable[..., Any]:
    if _is_async(function):

        @wraps(function)
        async def adone(*arguments: Any, **named: Any) -> Any:
            return await terms.done(function, arguments, named)

        return adone

    @wraps(function)
    def done(*arguments: Any, **named: Any) -> Any:
        return terms.done(function, arguments, named)

    return done


def _is_async(call: Callable[..., Any]) -> bool:
    bare = call
    while isinstance(bare, partial):
        bare = bare.func
    return inspect.iscoroutinefunction(bare) or inspect.iscoroutinefunction(
        getattr(bare, "__call__", None)  # noqa: B004 - its own, if it is an object
    )


def _here() -> tuple[RunEffects, RunnableConfig]:
    """Return the effects of the run that we stand in, and the config of the node."""
    try:
        config = get_config()
    except RuntimeError:
        raise ConfigurationError(_NOT_IN_A_NODE) from None
    run = effects_in(config)
    namespace = config["configurable"].get("checkpoint_ns")
    if run is None or not namespace:
        raise ConfigurationError(_NOT_OWNED)
    return run, config


_NOT_IN_A_NODE: Final = "effect(...) stands in no node, tool or task of a graph that runs"
_NOT_OWNED: Final = (
    "effect(...) needs an owned run, since its outcome is kept with it: run the workflow with "
    "`owned` or `own_runs`; a thread of which no record is left is recovered with its effects if "
    "PEER_CONTEXT_CONTROL_DATABASE_URL is set"
)

# What an effect is made of, the same in sync and in async code.


@dataclass(frozen=True, slots=True)
class _Write(Generic[T]):
    """Something to be done with the ledger: in one of its threads, for a loop.

    Attributes:
        undo: Is given what came of it if nobody waits for it any more.
        must_be: It is written whoever is cancelled meanwhile: only we know it.
    """

    ledger: Database
    work: Callable[[], T]
    undo: Callable[[T], object] | None = None
    must_be: bool = False

    def now(self) -> T:
        with _as_a_checkpoint():
            return self.work()

    async def later(self) -> T:
        with _as_a_checkpoint():
            writing = self.ledger.in_thread(self.work, undo=self.undo)
            return await (_to_its_end(writing) if self.must_be else writing)


async def _to_its_end(writing: Coroutine[Any, Any, T]) -> T:
    """Wait for something that has a deadline of its own; a cancellation comes after it."""
    doing = asyncio.create_task(writing, name="peerctx-outcome")
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        while not doing.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({doing})
        if not doing.cancelled() and (error := doing.exception()) is not None:
            _logger.warning("what came of an effect is not written down: %s", error)
        raise


@dataclass(frozen=True, slots=True)
class _Wait:
    """For the end of the same effect, where it is being done in this process."""

    other: Doing
    name: str

    def now(self) -> None:
        if self.other.is_on_this_loop or _current.get() is not None:
            raise self._busy()
        self.other.join()

    async def later(self) -> None:
        if _current.get() is not None:  # maybe a part of the very same, which would never end
            raise self._busy()
        await self.other.ajoin()

    def _busy(self) -> ConfigurationError:
        return ConfigurationError(
            f"the effect {self.name!r:.80} is being done at this moment, by something that cannot "
            "be waited for here: give each its own key, or pass an async function, outside of "
            "another effect"
        )


@dataclass(frozen=True, slots=True)
class _Ask:
    """A question to the peer."""

    peers: Peers
    about: About
    key: InDoubtKey

    def now(self) -> InDoubtAnswer | None:
        return self.peers.ask(self.about, self.key)

    async def later(self) -> InDoubtAnswer | None:
        return await self.peers.aask(self.about, self.key)


@dataclass(frozen=True, slots=True)
class _Call:
    """The caller's own function, with the ticket at hand."""

    call: Callable[[], Any]
    ticket: EffectTicket

    def now(self) -> Any:
        with _as_current(self.ticket):
            result = self.call()
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise ConfigurationError(
                "the effect's function returns something to be awaited: pass an async function"
            )
        return result

    async def later(self) -> Any:
        with _as_current(self.ticket):
            result = self.call()
            return await result if inspect.isawaitable(result) else result


_Step: TypeAlias = _Write[Any] | _Wait | _Ask | _Call
_Doing: TypeAlias = Generator[_Step, Any, JsonValue]


def _now(doing: _Doing) -> JsonValue:
    """Take an effect's steps, and block."""
    step = next(doing)
    try:
        while True:
            try:
                result = step.now()
            except BaseException as error:  # noqa: BLE001 - the effect decides what it means
                step = doing.throw(error)
            else:
                step = doing.send(result)
    except StopIteration as end:
        outcome: JsonValue = end.value
        return outcome


async def _later(doing: _Doing) -> JsonValue:
    """Take an effect's steps on a loop."""
    step = next(doing)
    while True:
        try:
            try:
                result = await step.later()
            except BaseException as error:  # noqa: BLE001 - the effect decides what it means
                step = doing.throw(error)
            else:
                step = doing.send(result)
        except StopIteration as end:
            outcome: JsonValue = end.value
            return outcome


def _effect(
    run: RunEffects,
    new: NewEffect,
    terms: _Terms,
    call: Callable[[], Any],
    give_back: Callable[[], None],
) -> _Doing:
    """Do an effect, unless it was done; alone, as far as this process goes.

    Args:
        run: The run's effects.
        new: The effect.
        terms: How it was asked for.
        call: What does it.
        give_back: Lets its node try it again: the ledger knows what came of the first try.
    """
    try:
        while (other := run.take_turn(new)) is not None:
            yield _Wait(other, new.name)
        try:
            return (yield from _alone(run, new, terms, call))
        finally:
            run.end_turn(new)
    except BaseException:
        give_back()
        raise


def _alone(run: RunEffects, new: NewEffect, terms: _Terms, call: Callable[[], Any]) -> _Doing:
    standing = yield _intent(run, new)
    while not standing.has_begun:
        known: Effect = standing.effect
        if known.status == "intent":
            known = yield from _settled(run, known, terms)
        if known.status == "done":
            return known.outcome
        if known.status == "intent" and terms.if_unknown != "retry":
            raise InDoubtError(question_about(known), terms.if_unknown == "fail")
        standing = yield _intent(run, new, known.attempt)
    begun: Effect = standing.effect
    try:
        result = yield _Call(call, run.ticket(begun))
    except terms.not_done_on:
        yield _Write(run.ledger, partial(run.refute, begun), must_be=True)
        raise
    outcome = _plain(begun, result)
    yield _Write(run.ledger, partial(run.conclude, begun, outcome), must_be=True)
    return outcome


def _intent(run: RunEffects, new: NewEffect, over: int | None = None) -> _Write[Standing]:
    """Write down that an effect is meant.

    Whoever is cancelled meanwhile, as LangGraph does with the siblings of a node that failed, has
    called nothing: that is written down too.
    """

    def undo(standing: Standing) -> None:
        if standing.has_begun:
            run.take_back(standing.effect)

    return _Write(run.ledger, partial(run.intend, new, over), undo)


def _settled(run: RunEffects, known: Effect, terms: _Terms) -> Generator[_Step, Any, Effect]:
    """Find out about an effect in doubt: from its peer, then by the caller's own look."""
    key = known.in_doubt_key
    if key is not None and run.peers is not None:
        told: InDoubtAnswer | None = yield _Ask(run.peers, run.about, key)
        if told is not None:
            known = yield _settle(run, known, told, "peer")
    if known.status != "intent" or terms.check is None:
        return known
    found = yield _Call(partial(terms.check, run.ticket(known)), run.ticket(known))
    if not isinstance(found, Settled):
        raise ConfigurationError(f"check= returned a {type(found).__name__}: expected a Settled")
    found = replace(found, reply=_plain(known, found.reply))
    settled: Effect = yield _settle(run, known, found, "check")
    return settled


def _settle(
    run: RunEffects, known: Effect, told: InDoubtAnswer | Settled, source: EffectSource
) -> _Write[Effect]:
    """Write down what somebody says of an effect."""
    return _Write(run.ledger, partial(run.settle, known, told.verdict, source, told.reply))


def question_about(effect: Effect) -> str:
    """Put plainly what nobody could tell of an effect."""
    if effect.peer_id is None:
        return f"Did {effect.name!r} happen? It names no peer that could tell."
    return f"Did {effect.name!r} reach {effect.peer_id}? Nobody there could tell."


@contextmanager
def _as_a_checkpoint() -> Iterator[None]:
    """Let a ledger that fails hand the run over, as a checkpointer does that fails."""
    try:
        yield
    except StoreError as error:
        raise CheckpointerError(f"the effect ledger failed: {error}") from error


@contextmanager
def _as_current(ticket: EffectTicket) -> Iterator[None]:
    token = _current.set(ticket)
    try:
        yield
    finally:
        _current.reset(token)


def _plain(effect: Effect, outcome: object) -> JsonValue:
    try:
        return plain(outcome, name="outcome")
    except ProtocolError as error:
        raise ConfigurationError(
            f"the effect {effect.name!r:.80} was done, and its outcome cannot be kept: {error}"
        ) from error
