"""Ask every peer what it remembers, and wait no longer than it is worth."""

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import partial
from typing import Any, NotRequired, TypedDict, TypeGuard

from pydantic import ValidationError

from langgraph_peerctx import tracing
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    PeerContextError,
    SendOutcomeUnknownError,
    TooFewResponsesError,
)
from langgraph_peerctx.gathering.merge import Merged, merge
from langgraph_peerctx.gathering.peer_context import Answered, Coverage, PeerContext
from langgraph_peerctx.identifiers import new_id
from langgraph_peerctx.messaging.producer import as_protocol_error, publish
from langgraph_peerctx.messaging.reply_inbox import ReplyInbox, Slot
from langgraph_peerctx.messaging.roster import Roster
from langgraph_peerctx.messaging.transport import Transport
from langgraph_peerctx.protocol.messages import ContextRequest, ContextResponse, InDoubtKey

_logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.01
"""How often those that are waited for are looked after."""
BEATS_WAITED_FOR = 2
"""So many intervals it is waited for our own heartbeat, to know who hosts a peer."""

OnAnswer = Callable[[ContextResponse], None]
OnSent = Callable[[], None]
Enough = Callable[[Sequence[ContextResponse]], bool]


class Question(TypedDict):
    """What `Gatherer.request` takes."""

    failed_agent_id: str
    thread_id: str
    time_window_seconds: NotRequired[float | None]
    run_id: NotRequired[str | None]
    epoch: NotRequired[int]
    attempt: NotRequired[int]
    in_doubt: NotRequired[Iterable[InDoubtKey]]
    correlation_id: NotRequired[str | None]


class Gatherer:
    """Asks on the request topic, collects from the inbox.

    Args:
        transport: Borrowed, started.
        inbox: Borrowed, started; of the requester id in the settings.
        settings: Topics, limits, defaults.
        roster: Who is there, if it is known: whom to expect where the caller names nobody.
    """

    def __init__(
        self,
        transport: Transport,
        inbox: ReplyInbox,
        settings: PeerContextSettings,
        roster: Roster | None = None,
    ) -> None:
        self._transport = transport
        self._inbox = inbox
        self._settings = settings
        self._roster = roster
        self._running: set[Wanted] = set()
        self._closed = False

    def close(self) -> None:
        """End what is being gathered, with what is there; the results say so."""
        self._closed = True
        for wanted in self._running:
            wanted.satisfied.set()

    def request(
        self,
        *,
        failed_agent_id: str,
        thread_id: str,
        time_window_seconds: float | None = None,
        run_id: str | None = None,
        epoch: int = 0,
        attempt: int = 1,
        in_doubt: Iterable[InDoubtKey] = (),
        correlation_id: str | None = None,
    ) -> ContextRequest:
        """Return the question, with the settings' defaults; nothing is sent.

        Raises:
            ProtocolError: If an id is illegal or a value out of its range.
        """
        try:
            return ContextRequest(
                sent_at=datetime.now(UTC),
                correlation_id=correlation_id or new_id(),
                requester_id=self._settings.requester_id,
                failed_agent_id=failed_agent_id,
                thread_id=thread_id,
                run_id=run_id,
                epoch=epoch,
                attempt=attempt,
                time_window_seconds=(
                    self._settings.time_window_seconds
                    if time_window_seconds is None
                    else time_window_seconds
                ),
                max_interactions=self._settings.max_interactions,
                in_doubt=tuple(in_doubt),
            )
        except ValidationError as error:
            raise as_protocol_error(error) from None

    async def send(
        self,
        request: ContextRequest,
        addressees: Collection[str] = (),
        *,
        traceparent: str | None = None,
    ) -> None:
        """Broadcast the question; each sending has a message id of its own.

        Args:
            request: The question.
            addressees: The agents or processes that are to answer; everybody, if none is named.
            traceparent: The span that asks; by default the current one.

        Raises:
            BrokerUnavailableError: If it could not be sent; in mock mode too.
        """
        sending = request.model_copy(
            update={
                "message_id": new_id(),
                "sent_at": datetime.now(UTC),
                "addressees": tuple(sorted(addressees)),
            }
        )
        receipt = await publish(
            self._transport,
            self._settings.kafka.context_request_topic,
            sending,
            max_bytes=self._settings.max_message_bytes,
            traceparent=traceparent or tracing.current_traceparent(),
        )
        if receipt.delivery == "mock":
            raise NothingSentError("; ".join(self._transport.degraded))

    async def _send_and_tell(self, request: ContextRequest, on_sent: OnSent | None) -> None:
        await self._inbox.positioned()  # else a fast peer's answer is lost, and nothing says so
        await self.send(request)
        if on_sent is not None:
            on_sent()

    async def gather(
        self,
        request: ContextRequest,
        *,
        timeout_seconds: float | None = None,
        expect: Collection[str] = (),
        min_responses: int | None = None,
        enough: Enough | None = None,
        on_sent: OnSent | None = None,
        on_answer: OnAnswer | None = None,
    ) -> PeerContext:
        """Broadcast a question and collect the peers' answers.

        Where the caller expects nobody by name, those are expected who are there when it is sent,
        once that is known for certain; who leaves or falls silent meanwhile is waited for no more,
        and where nobody is there it is over within a heartbeat's interval.
        It ends at the first of: everybody expected has answered; `min_responses` have; `enough`
        says so; the window is over; nothing can come (mock mode, no broker). Of an effect in doubt
        it waits for every process that is known to host the effect's peer: what one of them has
        not seen another one may have.

        Args:
            request: The question.
            timeout_seconds: The window, in seconds; by default the settings'.
            expect: Who should answer, as agent ids or process ids. An agent has answered when its
                process has.
            min_responses: Stop at so many answers; fewer are an error.
            enough: Stop when this is true of the answers so far.
            on_sent: Called when the broker has the question, on the loop.
            on_answer: Called with each answer as it comes, on the loop.

        Returns:
            The merged answers, with a coverage report. What was missing stands in `degraded`.

        Raises:
            TooFewResponsesError: If fewer than `min_responses` answered in time.
            BrokerUnavailableError: If there is no broker and mock mode is `never`.
        """
        if not self._settings.enabled:
            return switched_off(request.failed_agent_id, request.thread_id)
        names = expect or self.there(request.failed_agent_id)
        wanted = Wanted(names, min_responses, enough, on_answer)
        traced = tracing.span("peerctx.gather", kind="client", **traits_of(request))
        with self.open(request) as slot, traced as span:
            return await self.collect(
                request,
                slot,
                wanted,
                ask=partial(self._send_and_tell, request, on_sent),
                timeout_seconds=timeout_seconds,
                span=span,
            )

    def open(
        self, request: ContextRequest, inbox: ReplyInbox | None = None
    ) -> AbstractContextManager[Slot]:
        """Take answers to a question for as long as the block lasts; nothing is sent.

        Args:
            request: The question.
            inbox: Where they come; by default the process's own.
        """
        return (inbox or self._inbox).expect(
            request,
            _keep,
            max_responders=self._settings.max_responders,
            max_total_bytes=self._settings.max_total_bytes,
        )

    async def collect(
        self,
        request: ContextRequest,
        slot: Slot,
        wanted: "Wanted",
        *,
        ask: Callable[[], Coroutine[Any, Any, None]],
        timeout_seconds: float | None = None,
        inbox: ReplyInbox | None = None,
        span: tracing.Span = tracing.NO_SPAN,
    ) -> PeerContext:
        """Wait for the answers to a question; see `gather`.

        Args:
            request: The question.
            slot: Where its answers come; see `open`. What is there already counts.
            wanted: Who is to answer, and when it is enough.
            ask: What asks; it is called at once, whatever is there already.
            timeout_seconds: The window, in seconds; by default the settings'.
            inbox: The slot's; by default the process's own.
            span: The gather's.
        """
        window = self._settings.timeout_seconds if timeout_seconds is None else timeout_seconds
        if not wanted.expected and self._is_alone(request.failed_agent_id):
            # Whoever is about to come beats within an interval.
            window = min(window, self._settings.heartbeat_interval_seconds)
        loop = asyncio.get_running_loop()
        started = loop.time()
        self._find_hosts(request, wanted)
        slot.on_response = wanted.take
        for response in list(slot.responses.values()):
            wanted.take(response)
        self._running.add(wanted)
        watching = asyncio.create_task(self._watch(request, wanted), name="peerctx-watch")
        try:
            trouble = await _until_enough(ask, wanted, window)
        finally:
            self._running.discard(wanted)
            watching.cancel()
            await asyncio.wait({watching})
            _trace(span, wanted, slot)
        if wanted.fault is not None:
            raise wanted.fault
        if self._settings.mock_mode == "never" and _certain(trouble):
            raise trouble
        needed = wanted.min_responses
        if needed is not None and len(slot.responders) < needed:
            raise TooFewResponsesError(len(slot.responders), needed)
        silenced = self._silenced(trouble, (inbox or self._inbox).lost)
        context = _report(request, wanted, slot, silenced, loop.time() - started)
        span.set(complete=context.coverage.complete, facts=len(context.facts))
        return context

    def there(self, failed_agent_id: str) -> list[str]:
        """Return the lives of processes that can answer, as names to expect.

        Empty where it is not known who is there.
        """
        roster = self._roster
        if roster is None or not roster.is_warm:
            return []
        return [
            f"{process_id}@{incarnation}"
            for process_id, incarnation in (
                member.key
                for member in roster.present()
                if set(member.beat.agents) - {failed_agent_id}
            )
        ]

    def _is_alone(self, failed_agent_id: str) -> bool:
        """Tell whether it is known that nobody is there who could answer."""
        roster = self._roster
        return roster is not None and roster.is_warm and not self.there(failed_agent_id)

    def _find_hosts(self, request: ContextRequest, wanted: "Wanted") -> None:
        """Say which processes host the peers that are asked about an effect.

        Once our own heartbeat has come back, everybody has been read who beat before it.
        """
        if not request.in_doubt:
            return
        roster = self._roster
        present = () if roster is None else roster.present()
        hosts = {
            peer_id: frozenset(m.beat.process_id for m in present if peer_id in m.beat.agents)
            for peer_id in {key.peer_id for key in request.in_doubt}
        }
        wanted.find_hosts(hosts, are_all=roster is None or roster.is_hearing)

    async def _watch(self, request: ContextRequest, wanted: "Wanted") -> None:
        """Give up who leaves or falls silent, of those that the roster named."""
        roster, loop = self._roster, asyncio.get_running_loop()
        patience = loop.time() + BEATS_WAITED_FOR * self._settings.heartbeat_interval_seconds
        while roster is not None and wanted.waits_for_the_roster:
            for name in sorted(wanted.missing):
                process_id, _, incarnation = name.partition("@")
                if incarnation and not roster.is_present((process_id, incarnation)):
                    wanted.give_up(name)
            if not wanted.has_all_hosts:
                self._find_hosts(request, wanted)
                if loop.time() > patience:
                    wanted.find_hosts(wanted.hosts, are_all=True)
            if wanted.hosts:
                wanted.give_up_hosts_but({member.beat.process_id for member in roster.present()})
            await asyncio.sleep(WATCH_SECONDS)

    def _silenced(self, trouble: PeerContextError | None, lost: str | None) -> list[str]:
        """Say why answers may have had no way to us."""
        said = [*self._transport.degraded]
        if trouble is not None and str(trouble) not in said:
            said.append(str(trouble))
        if lost is not None and lost not in said:
            said.append(f"answers could not arrive: {lost}")
        if self._closed:
            said.append("the runtime was closed while answers were awaited")
        return said


class NothingSentError(BrokerUnavailableError):
    """The request certainly did not leave, as in mock mode: nothing can come."""


class Wanted:
    """Who is still to answer, and whether it is enough; the arguments are those of `gather`.

    Attributes:
        hosts: The processes that host each peer that is asked about an effect, or did when it was.
        has_all_hosts: Whether those are all.
    """

    def __init__(
        self,
        expect: Collection[str] = (),
        min_responses: int | None = None,
        enough: Enough | None = None,
        on_answer: OnAnswer | None = None,
    ) -> None:
        self.expected = frozenset(expect)
        self.missing = set(expect)
        self.left: set[str] = set()
        self.responses: list[ContextResponse] = []
        self.responders: set[str] = set()
        self.satisfied = asyncio.Event()
        self.fault: Exception | None = None
        self.hosts: dict[str, frozenset[str]] = {}
        self.has_all_hosts = True
        self.min_responses = min_responses
        self._gone_hosts: set[str] = set()
        self._is_enough = False
        self._enough = enough
        self._on_answer = on_answer

    def expect_instead(self, names: Collection[str]) -> None:
        """Expect those who are there, where the caller named nobody; before any answer counts."""
        self.expected = frozenset(names)
        self.missing = set(names)

    def take(self, response: ContextResponse) -> None:
        """Count one answer."""
        self.responses.append(response)
        self.responders.add(response.responder_id)
        self.missing -= _names(response)
        try:
            self._judge(response)
        except Exception as error:  # noqa: BLE001 - the caller's code: the caller gets it
            self.fault = error
            self.satisfied.set()

    def give_up(self, name: str) -> None:
        """Wait no longer for somebody who is gone."""
        self.missing.discard(name)
        self.left.add(name)
        self._is_enough = self._is_enough or not self.missing
        self._conclude()

    def find_hosts(self, hosts: Mapping[str, frozenset[str]], *, are_all: bool) -> None:
        """Wait for these as well, and for others as long as they are not all."""
        for peer_id, found in hosts.items():
            self.hosts[peer_id] = self.hosts.get(peer_id, frozenset()) | found
        self.has_all_hosts = are_all
        self._conclude()

    def give_up_hosts_but(self, present: Collection[str]) -> None:
        """Wait no longer for processes that are gone; what they have seen is not known."""
        self._gone_hosts |= {host for hosts in self.hosts.values() for host in hosts} - {*present}
        self._conclude()

    @property
    def waits_for_the_roster(self) -> bool:
        """Whether it may be over because somebody is gone."""
        return (
            any("@" in name for name in self.expected)
            or any(self.hosts.values())
            or not self.has_all_hosts
        )

    @property
    def unheard(self) -> dict[str, tuple[str, ...]]:
        """The processes that host a peer, and have not said what they know of its effects.

        One that declines has answered, and has not said it; who answers for a peer hosts it.
        """
        missing = {
            peer: (hosts | _hosting(peer, self.responses)) - _telling(peer, self.responses)
            for peer, hosts in self.hosts.items()
        }
        return {peer: tuple(sorted(hosts)) for peer, hosts in missing.items() if hosts}

    def _judge(self, response: ContextResponse) -> None:
        everybody = bool(self.expected) and not self.missing
        some = self.min_responses is not None and len(self.responders) >= self.min_responses
        if everybody or some or (self._enough is not None and self._enough(self.responses)):
            self._is_enough = True
        self._conclude()
        if self._on_answer is not None:
            self._on_answer(response)

    def _conclude(self) -> None:
        hosts = {host for hosts in self.hosts.values() for host in hosts}
        awaited = hosts - self.responders - self._gone_hosts
        if self._is_enough and self.has_all_hosts and not awaited:
            self.satisfied.set()

    def coverage(self, merged: Merged, slot: Slot, *, degraded: bool) -> Coverage:
        """Say who was asked and what became of it."""
        statuses: dict[str, set[str]] = {}
        for response in self.responses:
            for answer in response.agents:
                statuses.setdefault(answer.status, set()).add(answer.agent_id)
        answered = self.expected - self.missing - self.left if self.expected else self.responders
        unasked = {r.responder_id for r in self.responses if not _names(r) & self.expected}
        return Coverage(
            asked=_shown(self.expected),
            answered=_shown(answered),
            empty=tuple(sorted(statuses.get("nothing", ()))),
            declined=tuple(sorted(statuses.get("declined", ()))),
            busy=tuple(sorted(statuses.get("busy", ()))),
            silent=_shown(self.missing),
            left=_shown(self.left),
            extra=tuple(sorted(unasked)) if self.expected else (),
            truncated=merged.truncated,
            contradicted=tuple(sorted({*slot.contradicted, *merged.contested})),
            duplicate=slot.duplicate,
            dropped=slot.dropped,
            roster_known=bool(self.expected),
            degraded=degraded,
        )


def traits_of(request: ContextRequest) -> dict[str, Any]:
    """Return what a span says of a question."""
    return {
        "agent_id": request.failed_agent_id,
        "thread_id": request.thread_id,
        "run_id": request.run_id,
        "correlation_id": request.correlation_id,
    }


def _trace(span: tracing.Span, wanted: Wanted, slot: Slot) -> None:
    """Say who was asked and how many answered, and link the answers' spans."""
    span.set(expected=len(wanted.expected), answers=len(slot.responses))
    for traceparent in slot.traceparents:
        span.link(traceparent)


def _answers(slot: Slot) -> tuple[Answered, ...]:
    return tuple(
        Answered(
            responder_id=response.responder_id,
            agents={answer.agent_id: answer.status for answer in response.agents},
            at=slot.came_at[responder],
        )
        for responder, response in slot.responses.items()
    )


def _report(
    request: ContextRequest,
    wanted: Wanted,
    slot: Slot,
    silenced: Sequence[str],
    elapsed_seconds: float,
) -> PeerContext:
    merged = merge(
        wanted.responses, failed_agent_id=request.failed_agent_id, thread_id=request.thread_id
    )
    coverage = wanted.coverage(merged, slot, degraded=bool(silenced))
    return PeerContext(
        correlation_id=request.correlation_id,
        failed_agent_id=request.failed_agent_id,
        thread_id=request.thread_id,
        gathered_at=datetime.now(UTC),
        facts=merged.facts,
        memory=merged.memory,
        in_doubt=merged.in_doubt,
        conflicts=merged.conflicts,
        coverage=coverage,
        degraded=(*silenced, *_shortcomings(coverage, slot, merged)),
        elapsed_seconds=elapsed_seconds,
        answers=_answers(slot),
        unheard=wanted.unheard,
    )


async def _until_enough(
    ask: Callable[[], Coroutine[Any, Any, None]], wanted: Wanted, window: float
) -> PeerContextError | None:
    """Ask, and wait until it is enough, hopeless or over; return what was wrong, if it was.

    Collecting does not wait for the broker's word: a fast peer's answer may be there first.
    """
    sending = asyncio.create_task(ask(), name="peerctx-send-request")
    satisfied = asyncio.create_task(wanted.satisfied.wait(), name="peerctx-collect")
    both = {sending, satisfied}
    try:
        async with asyncio.timeout(window):
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not satisfied.done() and not _hopeless(sending):
                await satisfied
    except TimeoutError:
        pass
    finally:
        unconfirmed = not sending.done()
        for task in both:
            task.cancel()
        await asyncio.wait(both)
    if unconfirmed and not wanted.responses:
        return SendOutcomeUnknownError("the broker did not confirm the request in time")
    if sending.cancelled():
        return None
    return _trouble(sending)


def _keep(_response: ContextResponse) -> None:
    """The slot itself keeps it until somebody collects."""


def _names(response: ContextResponse) -> set[str]:
    process = response.responder_id
    agents = (answer.agent_id for answer in response.agents)
    return {process, f"{process}@{response.incarnation}", *agents}


def _hosting(peer_id: str, responses: Iterable[ContextResponse]) -> set[str]:
    """Return the processes that answer for a peer, whatever they say."""
    return {r.responder_id for r in responses if peer_id in {a.agent_id for a in r.agents}}


def _telling(peer_id: str, responses: Iterable[ContextResponse]) -> set[str]:
    """Return the processes that say what they know of a peer's effects; who declines does not."""
    return {r.responder_id for r in responses if peer_id in {w.agent_id for w in r.in_doubt}}


def _shown(names: Iterable[str]) -> tuple[str, ...]:
    """Name a life of a process by the process; no id has an @ in it."""
    return tuple(sorted({name.partition("@")[0] for name in names}))


def _hopeless(sending: "asyncio.Task[None]") -> bool:
    """Tell whether the request certainly did not leave: nothing can come."""
    return sending.done() and not sending.cancelled() and _certain(_trouble(sending))


def _certain(trouble: PeerContextError | None) -> TypeGuard[PeerContextError]:
    return trouble is not None and not isinstance(trouble, SendOutcomeUnknownError)


def _trouble(sending: "asyncio.Task[None]") -> PeerContextError | None:
    error = sending.exception()
    if error is None or isinstance(error, PeerContextError):
        return error
    raise error


def _shortcomings(coverage: Coverage, slot: Slot, merged: Merged) -> list[str]:
    """Say what else is missing, in the reader's words."""
    said = []
    if not slot.responses:
        said.append("no peer answered")
    elif coverage.silent:
        said.append(f"silent: {', '.join(coverage.silent)}")
    for what, names in (
        ("gone before they answered", coverage.left),
        ("busy", coverage.busy),
        ("declined", coverage.declined),
        ("cut to fit", coverage.truncated),
        ("told in two ways", coverage.contradicted),
    ):
        if names:
            said.append(f"{what}: {', '.join(names)}")
    if slot.dropped:
        said.append(f"{slot.dropped} answers were over the limits")
    if slot.rejected:
        faults = ", ".join(sorted(slot.rejected))
        said.append(f"{slot.rejected.total()} answers could not be read ({faults})")
    if merged.misfits:
        said.append(f"{merged.misfits} interactions did not concern the question")
    return said


def switched_off(failed_agent_id: str, thread_id: str) -> PeerContext:
    """Return what a gather brings where peer context is switched off: nobody is asked."""
    return PeerContext(
        correlation_id=new_id(),
        failed_agent_id=failed_agent_id,
        thread_id=thread_id,
        gathered_at=datetime.now(UTC),
        degraded=("peer context is switched off (PEER_CONTEXT_ENABLED=false)",),
        coverage=Coverage(degraded=True),
    )
