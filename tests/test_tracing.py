"""Spans are made where somebody has set OpenTelemetry up, and are never a reason to fail."""

import subprocess
import sys
from collections.abc import Iterator
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import StatusCode
from spans import Spans, id_of, links_of, parent_of, trace_of, tracing_on

from langgraph_peerctx import tracing
from langgraph_peerctx.tracing import (
    add_span,
    carried_into,
    current_traceparent,
    open_span,
    span,
    valid_traceparent,
)

ELSEWHERE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans() -> Iterator[Spans]:
    with tracing_on() as found:
        yield found


def test_what_is_done_inside_is_a_child(spans: Spans) -> None:
    with span("outer") as outer:
        assert current_traceparent() == outer.traceparent
        with span("inner", thread_id="t", count=3, run_id=None) as inner:
            inner.set(ok=True, many=["a"])
    assert current_traceparent() is None
    assert parent_of(spans.one("inner")) == id_of(spans.one("outer"))
    assert dict(spans.one("inner").attributes or {}) == {
        "peerctx.thread_id": "t",
        "peerctx.count": 3,
        "peerctx.ok": True,
        "peerctx.many": "['a']",
    }


def test_a_parent_from_elsewhere_is_followed(spans: Spans) -> None:
    with span("outer"), span("here", parent=ELSEWHERE, kind="server"):
        pass
    here = spans.one("here")
    assert f"{trace_of(here):032x}" == ELSEWHERE.split("-")[1]
    assert f"{parent_of(here):016x}" == ELSEWHERE.split("-")[2]
    assert here.kind.name == "SERVER"


MALFORMED = [
    "",
    "00-ab-cd-01",
    "nonsense",
    ELSEWHERE.upper(),
    f"{ELSEWHERE}\n",
    f" {ELSEWHERE}",
    f"{ELSEWHERE}-more",
    f"ff{ELSEWHERE[2:]}",
    f"00-{'0' * 32}-b7ad6b7169203331-01",
    f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_trace_context_is_ignored(spans: Spans, text: str) -> None:
    assert valid_traceparent(text) is None
    with span("outer"), span("here", parent=text, links=[text]) as here:
        here.link(text)
    assert parent_of(spans.one("here")) == id_of(spans.one("outer"))
    assert spans.one("here").links == ()


@given(st.text())
def test_no_text_is_a_trace_context_by_chance(text: str) -> None:
    assert valid_traceparent(text) is None


def test_a_trace_context_is_what_its_span_says_of_itself(spans: Spans) -> None:
    with span("one", parent=ELSEWHERE) as one:
        own = one.traceparent
    assert valid_traceparent(own) == own
    assert own == f"{ELSEWHERE[:36]}{id_of(spans.one('one')):016x}-01"


def test_another_span_is_linked_and_a_span_never_to_itself(spans: Spans) -> None:
    with span("one", links=[ELSEWHERE, None]) as one:
        one.link(one.traceparent)
    assert [f"{found:016x}" for found in links_of(spans.one("one"))] == ["b7ad6b7169203331"]


def test_what_is_raised_is_named_and_its_words_are_not_told(spans: Spans) -> None:
    with pytest.raises(ValueError, match="secret"), span("one"):
        raise ValueError("secret")
    one = spans.one("one")
    assert (one.status.status_code, one.status.description) == (StatusCode.ERROR, "ValueError")
    assert one.events == ()


def test_an_open_span_is_not_the_current_one(spans: Spans) -> None:
    with open_span("kept"), span("other"):
        pass
    assert parent_of(spans.one("other")) is None


def test_only_inside_a_trace_means_none_without_one(spans: Spans) -> None:
    with span("alone", only_inside=True) as nothing:
        assert nothing.traceparent is None
    with span("outer"), span("inside", only_inside=True):
        pass
    assert [one.name for one in spans.all()] == ["inside", "outer"]


def test_what_is_over_is_added_with_its_own_times(spans: Spans) -> None:
    began = datetime(2030, 1, 1, tzinfo=UTC)
    with span("outer", started_at=began):
        add_span("claim", began, 0.25, epoch=2)
    claim = spans.one("claim")
    assert claim.start_time is not None
    assert claim.end_time is not None
    assert claim.end_time - claim.start_time == 250_000_000
    assert spans.one("outer").start_time == claim.start_time
    assert parent_of(claim) == id_of(spans.one("outer"))


def test_the_current_span_can_be_carried_into_an_empty_context(spans: Spans) -> None:
    with span("outer") as outer:
        empty, carried = Context(), carried_into(Context())
    assert empty.run(current_traceparent) is None
    assert carried.run(current_traceparent) == outer.traceparent
    assert len(list(carried_into(Context()))) == 0
    assert spans.one("outer")


class Broken(SpanProcessor):
    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise RuntimeError("no place for spans", span, parent_context)

    def on_end(self, span: Any) -> None:
        raise RuntimeError("no place for spans", span)


def test_a_tracer_that_raises_costs_nothing(spans: Spans) -> None:
    spans.provider.add_span_processor(Broken())
    with span("one", thread_id="t") as one:
        one.set(count=1)
        one.link(ELSEWHERE)
    add_span("two", datetime.now(UTC), 0.1)


def test_a_span_processor_that_fails_at_the_end_costs_nothing(spans: Spans) -> None:
    class FailsLate(Broken):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            pass

    spans.provider.add_span_processor(FailsLate())
    with span("one") as one:
        assert one.traceparent is not None
    assert spans.named("one")


def test_without_a_provider_nothing_is_made() -> None:
    with span("one", thread_id="t") as one, open_span("two"):
        one.set(count=1)
        assert one.traceparent is None
        assert current_traceparent() is None
    add_span("three", datetime.now(UTC) - timedelta(seconds=1), 1.0)


def test_a_context_that_others_began_is_handed_on_without_a_provider() -> None:
    with span("one", parent=ELSEWHERE) as one:
        assert one.traceparent == ELSEWHERE
        assert current_traceparent() == ELSEWHERE


def test_without_opentelemetry_everything_is_there_and_does_nothing() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from contextvars import Context\n"
        "from datetime import UTC, datetime\n"
        "from langgraph_peerctx import tracing\n"
        f"with tracing.span('one', parent={ELSEWHERE!r}, links=[{ELSEWHERE!r}], a=1) as one:\n"
        "    one.set(b=2); one.link('x'); one.fail('y')\n"
        "    assert one is tracing.NO_SPAN and one.traceparent is None\n"
        "    assert tracing.current_traceparent() is None\n"
        "tracing.add_span('two', datetime.now(UTC), 1.0)\n"
        "assert len(list(tracing.carried_into(Context()))) == 0\n"
        f"assert tracing.valid_traceparent({ELSEWHERE!r})\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_long_texts_are_cut(spans: Spans) -> None:
    with span("one", thread_id="t" * 1_000):
        pass
    assert (spans.one("one").attributes or {})["peerctx.thread_id"] == "t" * tracing._TEXT_LIMIT
