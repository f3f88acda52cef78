"""Spans for OpenTelemetry, where it is installed and set up; otherwise nothing at all.

What a tracer raises is logged and goes no further: a trace is never worth a recovery. Attributes
are ids, counts and statuses, never payloads.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, TypeVar

_context: Any = None
_trace: Any = None
try:
    from opentelemetry import context, trace
except ImportError:  # the extra is not installed
    pass
else:
    _context, _trace = context, trace

_logger = logging.getLogger(__name__)

T = TypeVar("T")

Kind = Literal["internal", "server", "client"]

PREFIX: Final = "peerctx."
"""Before every attribute's name."""
_TEXT_LIMIT = 200
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<span>(?!0{16})[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})"
)
"""W3C Trace Context, level 1, section 3.2; what a later version may append is not read."""


def valid_traceparent(text: str | None) -> str | None:
    """Return a `traceparent` that may be used; None for any other text."""
    return text if text is not None and _TRACEPARENT.fullmatch(text) else None


class Span:
    """A span that may be there: without OpenTelemetry all of this does nothing."""

    __slots__ = ("_span",)

    def __init__(self, span: Any = None) -> None:
        self._span = span

    @property
    def traceparent(self) -> str | None:
        """How others refer to it: the W3C header; None if there is nothing to refer to."""
        return _quietly(_traceparent_of, self._span)

    def set(self, **attributes: object) -> None:
        """Say something of it: texts, numbers and truths; None says nothing."""
        if self._span is not None:
            _quietly(self._span.set_attributes, _attributes(attributes))

    def link(self, traceparent: str | None) -> None:
        """Refer to a span of another trace, or process; what is malformed is ignored."""
        if self._span is not None:
            _quietly(_add_link, self._span, traceparent)

    def fail(self, what: str) -> None:
        """Say that it did not go well, in a word."""
        if self._span is not None:
            _quietly(_set_error, self._span, what)


NO_SPAN: Final = Span()


@contextmanager
def span(
    name: str,
    *,
    parent: str | None = None,
    links: Iterable[str | None] = (),
    kind: Kind = "internal",
    started_at: datetime | None = None,
    only_inside: bool = False,
    **attributes: object,
) -> Iterator[Span]:
    """Do something in a span, which is the current one meanwhile.

    Args:
        name: What is done.
        parent: A `traceparent` from elsewhere; by default the current span.
        links: `traceparent`s of what it has to do with.
        kind: `server` answers somebody, `client` asks.
        started_at: By default now.
        only_inside: Whether to do without where it would begin a trace of its own.
        **attributes: See `Span.set`.
    """
    if only_inside and current_traceparent() is None:
        yield NO_SPAN
        return
    with open_span(
        name, parent=parent, links=links, kind=kind, started_at=started_at, **attributes
    ) as opened:
        token = None if opened.traceparent is None else _quietly(_make_current, opened._span)  # noqa: SLF001 - ours
        try:
            yield opened
        finally:
            if token is not None:
                _quietly(_context.detach, token)


@contextmanager
def open_span(
    name: str,
    *,
    parent: str | None = None,
    links: Iterable[str | None] = (),
    kind: Kind = "internal",
    started_at: datetime | None = None,
    **attributes: object,
) -> Iterator[Span]:
    """Keep a span open that is nobody's current one; see `span`."""
    if _trace is None:
        yield NO_SPAN
        return
    opened = Span(_quietly(_started, name, parent, kind, started_at, attributes))
    for traceparent in links:
        opened.link(traceparent)
    try:
        yield opened
    except BaseException as error:
        opened.fail(type(error).__name__)  # its words may be a payload's
        raise
    finally:
        if opened._span is not None:  # noqa: SLF001 - ours
            _quietly(opened._span.end)  # noqa: SLF001 - ours


def add_span(name: str, started_at: datetime, elapsed_seconds: float, **attributes: object) -> None:
    """Add a child of the current span that is over already."""
    if _trace is None:
        return
    ended_at = started_at + timedelta(seconds=elapsed_seconds)
    added = _quietly(_started, name, None, "internal", started_at, attributes)
    if added is not None:
        _quietly(added.end, _nanoseconds(ended_at))


def current_traceparent() -> str | None:
    """Return the current span's W3C header; None outside of any trace."""
    if _trace is None:
        return None
    return _quietly(lambda: _traceparent_of(_trace.get_current_span()))


def carried_into(context: Context) -> Context:
    """Return the context with the current span in it, and nothing else of ours."""
    if current_traceparent() is not None:
        _quietly(context.run, _make_current, _trace.get_current_span())
    return context


def _started(
    name: str,
    parent: str | None,
    kind: Kind,
    started_at: datetime | None,
    attributes: dict[str, object],
) -> Any:
    found = _referred_to(parent)
    context = None if found is None else _trace.set_span_in_context(_trace.NonRecordingSpan(found))
    return _trace.get_tracer("langgraph_peerctx").start_span(
        name,
        context,
        _trace.SpanKind[kind.upper()],
        _attributes(attributes),
        start_time=None if started_at is None else _nanoseconds(started_at),
    )


def _make_current(span: Any) -> Any:
    return _context.attach(_trace.set_span_in_context(span))


def _traceparent_of(span: Any) -> str | None:
    found = None if span is None else span.get_span_context()
    if found is None or not found.is_valid:
        return None
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"


def _referred_to(traceparent: str | None) -> Any:
    parts = None if traceparent is None else _TRACEPARENT.fullmatch(traceparent)
    if parts is None:
        return None
    return _trace.SpanContext(
        int(parts["trace"], 16),
        int(parts["span"], 16),
        is_remote=True,
        trace_flags=_trace.TraceFlags(int(parts["flags"], 16)),
    )


def _add_link(span: Any, traceparent: str | None) -> None:
    found = _referred_to(traceparent)
    # A peer that makes no spans hands on what it was given: that would be ourselves.
    if found is not None and found.span_id != span.get_span_context().span_id:
        span.add_link(found)


def _set_error(span: Any, what: str) -> None:
    span.set_status(_trace.StatusCode.ERROR, what[:_TEXT_LIMIT])


def _attributes(attributes: dict[str, object]) -> dict[str, Any]:
    return {
        f"{PREFIX}{name}": value if isinstance(value, int | float) else str(value)[:_TEXT_LIMIT]
        for name, value in attributes.items()
        if value is not None
    }


def _nanoseconds(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1) * 1_000


def _quietly(work: Callable[..., T], *args: Any) -> T | None:
    """Do something with the tracer; return None if it raised."""
    try:
        return work(*args)
    except Exception:  # an adapter: anybody's span processor is called here
        _logger.debug("a span failed", exc_info=True)
        return None
