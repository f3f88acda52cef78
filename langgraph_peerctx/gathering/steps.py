"""A gather in three steps, each of which another process may take over from a checkpoint.

    position    where the answers will be read from, known before anything is asked
    ask         the question leaves
    collect     the answers, from that position on

In the process that positioned, answers are kept from then on. Any other process reads the response
topic from the position: it sees what had arrived, and asks only those that have not answered.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Collection, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from langgraph_peerctx import tracing
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import BrokerUnavailableError, SendOutcomeUnknownError
from langgraph_peerctx.gathering.gatherer import (
    Gatherer,
    NothingSentError,
    Wanted,
    switched_off,
    traits_of,
)
from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.identifiers import is_legal_id
from langgraph_peerctx.messaging.reply_inbox import ReplyInbox, Slot
from langgraph_peerctx.messaging.transport import Offsets, Transport
from langgraph_peerctx.protocol.messages import ADDRESSEE_LIMIT, ContextRequest

_logger = logging.getLogger(__name__)

MAX_OPEN = 32
"""Gathers that were positioned here and not collected; the oldest is forgotten, and read anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What became of the question.

    Attributes:
        at: When it was asked.
        trouble: Why it did not leave, or may not have left.
        is_certain: Whether it certainly did not leave: then nothing can come.
    """

    at: datetime
    trouble: str | None = None
    is_certain: bool = False


@dataclass(slots=True, kw_only=True)
class _Open:
    """A gather between its steps.

    Attributes:
        inbox: Where its answers come.
        asked_at: When this process asked, by the loop's clock; None if it did not.
        there: Who was there when it asked, if that was known.
        span: Open from the asking to the end; None before.
    """

    slot: Slot
    inbox: ReplyInbox
    stack: AsyncExitStack
    asked_at: float | None = None
    there: Collection[str] = ()
    span: tracing.Span | None = None


class GatherSteps:
    """Gathers whose steps may be taken by different processes; on the loop of the transport.

    Args:
        gatherer: Borrowed.
        transport: Borrowed, started.
        inbox: Borrowed, started: the gatherer's.
        settings: Topics, limits, defaults.
    """

    def __init__(
        self,
        gatherer: Gatherer,
        transport: Transport,
        inbox: ReplyInbox,
        settings: PeerContextSettings,
    ) -> None:
        self._gatherer = gatherer
        self._transport = transport
        self._inbox = inbox
        self._settings = settings
        self._open: OrderedDict[str, _Open] = OrderedDict()

    async def position(self, request: ContextRequest) -> Offsets:
        """Keep the answers to a question from now on; return where they will be read from.

        Empty where the broker does not say in time: whoever takes over then sees only what is
        answered to it.
        """
        try:
            async with asyncio.timeout(self._settings.kafka.connect_timeout_seconds):
                await self._inbox.positioned()
        except TimeoutError:
            _logger.warning("the position of the answers is not known: %s", self._inbox.lost)
        offsets = self._inbox.offsets
        if request.correlation_id not in self._open:
            await self._keep(request, self._inbox, AsyncExitStack())
        return offsets

    async def ask(
        self,
        request: ContextRequest,
        since: Offsets,
        expect: Collection[str] = (),
        *,
        timeout_seconds: float | None = None,
    ) -> Asked:
        """Send a question to those of whom no answer is there yet.

        Args:
            request: The question.
            since: What `position` returned, in whichever process.
            expect: Who should answer; without it, those who are there, or everybody.
            timeout_seconds: The window, in seconds; by default the settings'. It begins here.

        Raises:
            BrokerUnavailableError: If it could not be sent, and mock mode is `never`.
        """
        at = datetime.now(UTC)
        if not self._settings.enabled:
            return Asked(at=at)
        gather = await self._gather(request, since)
        _begin_span(gather, request)
        gather.asked_at = asyncio.get_running_loop().time()
        gather.there = () if expect else self._gatherer.there(request.failed_agent_id)
        try:
            async with asyncio.timeout(self._window(timeout_seconds)):
                await self._ask_missing(request, gather, expect or gather.there)
        except TimeoutError:
            return Asked(at=at, trouble="the broker did not confirm the request in time")
        except SendOutcomeUnknownError as error:
            return Asked(at=at, trouble=str(error))
        except BrokerUnavailableError as error:
            if self._settings.mock_mode == "never":
                raise
            return Asked(at=at, trouble=str(error), is_certain=True)
        return Asked(at=at)

    async def collect(
        self,
        request: ContextRequest,
        since: Offsets,
        asked: Asked,
        wanted: Wanted,
        *,
        timeout_seconds: float | None = None,
    ) -> PeerContext:
        """Wait for the answers; see `Gatherer.gather`. The window counts from the asking.

        A process that takes over sees what has arrived. Whoever was expected and has not answered
        is asked again, and has the whole window once more.

        Args:
            request: The question.
            since: What `position` returned, in whichever process.
            asked: What `ask` returned, in whichever process.
            wanted: Who is to answer, and when it is enough.
            timeout_seconds: The window, in seconds; by default the settings'.

        Raises:
            TooFewResponsesError: If fewer answered than the caller needs.
            BrokerUnavailableError: If there is no broker, and mock mode is `never`.
        """
        if not self._settings.enabled:
            return switched_off(request.failed_agent_id, request.thread_id)
        gather = await self._gather(request, since)
        span = _begin_span(gather, request)
        if not wanted.expected:
            asked_here = gather.asked_at is not None
            wanted.expect_instead(
                gather.there if asked_here else self._gatherer.there(request.failed_agent_id)
            )
        window = self._window(timeout_seconds)
        if gather.asked_at is not None:
            window -= asyncio.get_running_loop().time() - gather.asked_at
        elif not wanted.expected:
            window -= max(0.0, (datetime.now(UTC) - asked.at).total_seconds())
        # Whoever tries again reads anew what is there, and has a window of its own.
        del self._open[request.correlation_id]
        try:
            return await self._gatherer.collect(
                request,
                gather.slot,
                wanted,
                ask=partial(self._again, request, gather, asked, wanted.expected),
                timeout_seconds=max(0.0, window),
                inbox=gather.inbox,
                span=span,
            )
        finally:
            await gather.stack.aclose()

    async def close(self) -> None:
        """Forget every gather that is open. Safe to call twice."""
        while self._open:
            _, gather = self._open.popitem()
            await gather.stack.aclose()

    def _window(self, timeout_seconds: float | None) -> float:
        return self._settings.timeout_seconds if timeout_seconds is None else timeout_seconds

    def _again(
        self, request: ContextRequest, gather: _Open, asked: Asked, expect: Collection[str]
    ) -> Coroutine[Any, Any, None]:
        """Ask where another process did it, if we know whom; else pass on what became of it."""
        if gather.asked_at is not None or not expect:
            return _nothing_but(asked)
        return self._ask_missing(request, gather, expect)

    async def _ask_missing(
        self, request: ContextRequest, gather: _Open, expect: Collection[str]
    ) -> None:
        known = Wanted(expect)
        for response in gather.slot.responses.values():
            known.take(response)
        if expect and not known.missing:
            return
        await gather.inbox.positioned()  # else a fast peer's answer is lost, and nothing says so
        await self._gatherer.send(
            request,
            _addressees(known.missing if known.responses else ()),
            traceparent=None if gather.span is None else gather.span.traceparent,
        )

    async def _gather(self, request: ContextRequest, since: Offsets) -> _Open:
        """Return the gather as it is open here, or read it from the topic."""
        known = self._open.get(request.correlation_id)
        if known is not None:
            return known
        inbox = ReplyInbox(
            self._transport,
            self._settings.kafka.get_response_topic(self._settings.requester_id),
            max_message_bytes=self._settings.max_message_bytes,
        )
        stack = AsyncExitStack()
        stack.push_async_callback(inbox.close)
        gather = await self._keep(request, inbox, stack)
        try:
            await inbox.start(
                timeout_seconds=self._settings.kafka.connect_timeout_seconds, since=since
            )
            await self._caught_up(inbox)
        except BaseException:
            await self._forget(request)
            raise
        return gather

    async def _keep(
        self, request: ContextRequest, inbox: ReplyInbox, stack: AsyncExitStack
    ) -> _Open:
        slot = stack.enter_context(self._gatherer.open(request, inbox))
        gather = _Open(slot=slot, inbox=inbox, stack=stack)
        self._open[request.correlation_id] = gather
        while len(self._open) > MAX_OPEN:
            _, oldest = self._open.popitem(last=False)
            await oldest.stack.aclose()
        return gather

    async def _forget(self, request: ContextRequest) -> None:
        gather = self._open.pop(request.correlation_id, None)
        if gather is not None:
            await gather.stack.aclose()

    async def _caught_up(self, inbox: ReplyInbox) -> None:
        """Wait until everything is read that the process's own inbox knows to be there."""
        there = self._inbox.offsets
        try:
            async with asyncio.timeout(self._settings.kafka.connect_timeout_seconds):
                # A subscription has no event for it.
                while any(inbox.offsets.get(place, 0) < end for place, end in there.items()):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        except TimeoutError:
            _logger.warning("the answers that had arrived could not all be read: %s", inbox.lost)


def _begin_span(gather: _Open, request: ContextRequest) -> tracing.Span:
    """Return the gather's span; it is open until the gather is forgotten."""
    if gather.span is None:
        opened = tracing.open_span("peerctx.gather", kind="client", **traits_of(request))
        gather.span = gather.stack.enter_context(opened)
    return gather.span


async def _nothing_but(asked: Asked) -> None:
    if asked.trouble is not None:
        raise (NothingSentError if asked.is_certain else SendOutcomeUnknownError)(asked.trouble)


def _addressees(names: Collection[str]) -> Collection[str]:
    """Return whom a request can name; everybody, where it cannot name them all."""
    names = {name.partition("@")[0] for name in names}  # a life of a process: the process
    legal = all(is_legal_id(name) for name in names)
    return names if legal and len(names) <= ADDRESSEE_LIMIT else ()
