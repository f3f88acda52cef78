"""A run keeps the span in which it began, so that its recovery can refer to it."""

from collections.abc import Iterator
from typing import Any

import pytest
from langgraph.types import Command
from owning import AGENT, AT, IN, asks, newest, workflow
from spans import Spans, tracing_on

from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.tracing import span

pytestmark = pytest.mark.usefixtures("_no_runtime_left")


@pytest.fixture
def spans() -> Iterator[Spans]:
    with tracing_on() as found:
        yield found


def asking() -> Any:
    return own_runs(workflow(asks), agent_id=AGENT)


def kept(control: ControlDatabase) -> str | None:
    traceparent: str | None = newest(control).traceparent
    return traceparent


@pytest.mark.usefixtures("spans")
async def test_a_run_is_admitted_with_the_span_in_which_it_began(control: ControlDatabase) -> None:
    app = asking()
    with span("first") as first:
        await app.ainvoke(IN, AT)
    assert kept(control) == first.traceparent is not None
    with span("second") as second:
        await app.ainvoke(Command(resume="yes"), AT)
    assert kept(control) == second.traceparent


@pytest.mark.usefixtures("spans")
def test_so_is_one_of_sync_code(control: ControlDatabase) -> None:
    with span("first") as first:
        asking().invoke(IN, AT)
    assert kept(control) == first.traceparent is not None


async def test_a_run_that_is_not_traced_has_none(control: ControlDatabase) -> None:
    await asking().ainvoke(IN, AT)
    assert kept(control) is None
