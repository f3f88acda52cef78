"""Runs of plain graphs, and what the recorder remembers of them."""

import asyncio
import json
import logging
import operator
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, RetryPolicy, Send, interrupt
from pydantic import BaseModel, SecretStr
from typing_extensions import TypedDict

from langgraph_peerctx.durability import recorder as recorder_module
from langgraph_peerctx.durability.record_writer import Fact, RecordWriter, Source
from langgraph_peerctx.durability.recorder import (
    END_DEADLINE_SECONDS,
    InteractionRecorder,
    legal_agent_id,
)
from langgraph_peerctx.errors import ConfigurationError, ProtocolError, StoreError
from langgraph_peerctx.identifiers import is_legal_id
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.protocol.messages import Interaction

AGENT = "order-agent"
OWNED: Any = {"configurable": {"thread_id": "t"}, "metadata": {"run_id": "r"}}


class State(TypedDict, total=False):
    log: Annotated[list[Any], operator.add]


class BreakableStore(EventStore):
    """Fails while `broken`; hangs while `gate` is closed."""

    broken = False

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.gate = threading.Event()
        self.gate.set()
        self.appends = 0

    def append_many(self, agent_id: str, items: Iterable[Interaction]) -> int:
        self.appends += 1
        self.gate.wait(20)
        if self.broken:
            raise StoreError("the disk is full")
        return super().append_many(agent_id, items)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BreakableStore]:
    with BreakableStore(f"sqlite:///{tmp_path}/own.db") as store:
        yield store
        store.gate.set()


Make = Callable[..., InteractionRecorder]


@pytest.fixture
def make(store: EventStore) -> Iterator[Make]:
    made: list[InteractionRecorder] = []

    def make(**options: Any) -> InteractionRecorder:
        made.append(InteractionRecorder(AGENT, **{"store": store, **options}))
        return made[-1]

    yield make
    for recorder in made:
        recorder.close()


@pytest.fixture
def recorder(make: Make) -> InteractionRecorder:
    return make()


def chain(*nodes: Any, **options: Any) -> Any:
    """Return a graph of these nodes, one after the other."""
    builder = StateGraph(State)
    before = START
    for node in nodes:
        name = node.__name__
        builder.add_node(name, node, **options)
        builder.add_edge(before, name)
        before = name
    return builder.compile(checkpointer=InMemorySaver())


def told(store: EventStore, agent_id: str = AGENT, thread_id: str = "t") -> list[Interaction]:
    return store.interactions_of(agent_id, thread_id=thread_id)[::-1]


def ids(store: EventStore, agent_id: str = AGENT) -> list[str]:
    return [event.interaction_id for event in told(store, agent_id)]


def one(store: EventStore, kind: str) -> Interaction:
    (found,) = [event for event in told(store) if event.kind == kind]
    return found


def reserve(_state: State) -> State:
    return {"log": ["reserved"]}


def ship(_state: State) -> State:
    return {"log": ["shipped"]}


async def areserve(_state: State) -> State:
    await asyncio.sleep(0)
    return {"log": ["reserved"]}


def test_a_run_is_recorded_by_the_positions_of_its_nodes(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    chain(reserve, ship).with_config(callbacks=[recorder]).invoke({"log": ["in"]}, OWNED)
    assert ids(store) == [
        "r::1:run_begin",
        "r:reserve@1:1:node",
        "r:ship@2:1:node",
        "r::1:run_end",
    ]
    begin, node, _, end = told(store)
    assert begin.payload == {"input": {"log": ["in"]}, "attempt": 1}
    assert node.payload == {
        "node": "reserve",
        "position": "reserve@1",
        "wrote": {"log": ["reserved"]},
        "attempt": 1,
    }
    assert end.payload == {"ended": "returned", "attempt": 1}
    assert {(e.from_agent, e.to_agent, e.run_id) for e in told(store)} == {(AGENT, AGENT, "r")}


async def test_an_async_run_is_recorded_when_it_returns(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    await chain(areserve, ship).with_config(callbacks=[recorder]).ainvoke({"log": []}, OWNED)
    assert [event.kind for event in told(store)] == ["run_begin", "node", "node", "run_end"]


def test_without_an_owned_run_it_is_the_root_callbacks_run(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    graph = chain(reserve).with_config(callbacks=[recorder])
    for _ in range(2):
        graph.invoke({"log": []}, {"configurable": {"thread_id": "t"}})
    runs = [event.run_id for event in told(store)]
    assert len(set(runs)) == 2
    assert len(runs) == 6


def test_sends_loops_and_subgraphs_have_positions_of_their_own(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    def fan(state: State) -> Command[Any]:
        if len(state["log"]) > 4:
            return Command(goto="__end__")
        sends = [Send("work", {"log": [1]}), Send("work", {"log": [2]})]
        return Command(goto=sends, update={"log": ["fan"]})

    inner = StateGraph(State).add_node("reserve", reserve).add_edge(START, "reserve").compile()
    builder = StateGraph(State).add_node("fan", fan).add_node("work", inner)
    builder.add_edge(START, "fan").add_edge("work", "fan")
    builder.compile().with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    assert sorted(i for i in ids(store) if "work" in i) == [
        "r:work@2[0]/reserve@1:1:node",
        "r:work@2[0]:1:node",
        "r:work@2[1]/reserve@1:1:node",
        "r:work@2[1]:1:node",
    ]
    assert [i for i in ids(store) if "fan" in i] == ["r:fan@1:1:node", "r:fan@3:1:node"]


def test_a_retry_is_another_attempt_at_the_same_position(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    tries = iter([ConnectionError("no network"), None])

    def flaky(_state: State) -> State:
        if error := next(tries):
            raise error
        return {"log": ["done"]}

    graph = chain(flaky, retry_policy=RetryPolicy(initial_interval=0.001))
    graph.with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    failed, done = told(store)[1:3]
    assert failed.interaction_id == "r:flaky@1:1:node_failed"
    assert failed.payload["error"] == "ConnectionError: no network"
    assert done.interaction_id == "r:flaky@1:2:node"


def test_a_question_to_a_human_is_no_failure_and_the_run_waits(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    def ask(_state: State) -> State:
        return {"log": [interrupt("how many?"), interrupt("when?")]}

    graph = chain(ask).with_config(callbacks=[recorder])
    for given in ({"log": []}, Command(resume="three"), Command(resume="now")):
        graph.invoke(given, OWNED)
    assert ids(store) == [
        *("r::1:run_begin", "r:ask@1:1:asked", "r::1:run_end"),
        *("r::2:run_begin", "r:ask@1:2:asked", "r::2:run_end"),
        *("r::3:run_begin", "r:ask@1:3:node", "r::3:run_end"),
    ]
    asked = [event.payload["questions"] for event in told(store) if event.kind == "asked"]
    assert asked == [["how many?"], ["when?"]]
    ended = [event.payload["ended"] for event in told(store) if event.kind == "run_end"]
    assert ended == ["waiting", "waiting", "returned"]


def test_a_question_in_a_subgraph_is_recorded_once(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    def ask(_state: State) -> State:
        return {"log": [interrupt("how many?")]}

    inner = StateGraph(State).add_node("ask", ask).add_edge(START, "ask").compile()
    builder = StateGraph(State).add_node("inner", inner).add_edge(START, "inner")
    graph = builder.compile(checkpointer=InMemorySaver()).with_config(callbacks=[recorder])
    graph.invoke({"log": []}, OWNED)
    assert [i for i in ids(store) if "asked" in i] == ["r:inner@1/ask@1:1:asked"]


def test_a_static_breakpoint_is_a_wait_too(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    graph = chain(reserve, ship).with_config(callbacks=[recorder])
    graph.invoke({"log": []}, OWNED, interrupt_before=["ship"])
    assert one(store, "run_end").payload["ended"] == "waiting"


def test_another_process_goes_on_counting_attempts(make: Make, store: EventStore) -> None:
    for _ in range(2):  # a recorder of its own is what another process has
        chain(reserve).with_config(callbacks=[make()]).invoke({"log": []}, OWNED)
    assert [i for i in ids(store) if ":node" in i] == ["r:reserve@1:1:node", "r:reserve@1:2:node"]
    assert ids(store)[-1] == "r::2:run_end"


def test_a_run_that_raises_says_so(recorder: InteractionRecorder, store: EventStore) -> None:
    def fail(_state: State) -> State:
        raise ValueError("no such product")

    graph = chain(fail).with_config(callbacks=[recorder])
    with pytest.raises(ValueError, match="no such"):
        graph.invoke({"log": []}, OWNED)
    assert [event.kind for event in told(store)] == ["run_begin", "node_failed", "run_end"]
    end = one(store, "run_end").payload
    assert (end["ended"], end["error"]) == ("raised", "ValueError: no such product")


async def test_a_cancelled_run_says_so(recorder: InteractionRecorder, store: EventStore) -> None:
    begun = asyncio.Event()

    async def hang(_state: State) -> State:
        begun.set()
        await asyncio.sleep(60)
        return {}

    graph = chain(hang).with_config(callbacks=[recorder])
    task = asyncio.create_task(graph.ainvoke({"log": []}, OWNED))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert one(store, "run_end").payload["ended"] == "cancelled"


def test_nothing_of_a_run_is_kept_in_memory_when_it_has_ended(
    recorder: InteractionRecorder,
) -> None:
    chain(reserve, ship).with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    assert (recorder._calls, recorder._frames) == ({}, {})
    assert recorder._positions._executions == {}


def test_a_graph_inside_of_a_foreign_run_is_a_run_of_its_own(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    inner = chain(reserve).with_config(callbacks=[recorder])

    def outer(state: State) -> State:
        inner.invoke({"log": []}, {"configurable": {"thread_id": "inner"}})
        return state

    chain(outer).invoke({"log": []}, {"configurable": {"thread_id": "t"}})
    assert [e.kind for e in told(store)] == ["run_begin", "node", "run_end"]


def test_a_graph_with_a_thread_of_its_own_stands_where_it_is_called(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    inner = chain(reserve)

    def outer(state: State) -> State:
        inner.invoke({"log": []}, {"configurable": {"thread_id": "inner"}})
        return state

    chain(outer).with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    assert [i for i in ids(store) if ":node" in i] == [
        "r:outer@1/reserve@1:1:node",
        "r:outer@1:1:node",
    ]


async def test_what_goes_on_after_the_end_of_its_run_begins_no_other(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()
    inner = chain(reserve)

    def late(_state: State) -> State:
        begun.set()
        go_on.wait(10)
        inner.invoke({"log": []}, {"configurable": {"thread_id": "inner"}})
        done.set()
        return {}

    graph = chain(late).with_config(callbacks=[recorder])
    task = asyncio.create_task(graph.ainvoke({"log": []}, OWNED))
    await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert await asyncio.to_thread(done.wait, 10)
    assert recorder.flush(20)
    assert [e.kind for e in told(store) if e.kind != "node_failed"] == ["run_begin", "run_end"]


def test_tools_are_notes_to_oneself_or_messages_to_whom_stands_behind_them(
    make: Make, store: EventStore
) -> None:
    @tool
    def weigh(product: str) -> str:
        """Weigh it."""
        return f"{product}: 3 kg"

    @tool
    def stock(product: str) -> int:
        """Count it."""
        raise KeyError(product)

    stock.metadata = {"agent_id": "inventory-agent"}

    def work(_state: State) -> State:
        weighed = weigh.invoke({"product": "umbrella"})
        with pytest.raises(KeyError):
            stock.invoke({"product": "umbrella"})
        return {"log": [weighed, weigh.invoke({"product": "hat"})]}

    recorder = make(peers={"nothing": "nobody"})
    chain(work).with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    tools = [e for e in told(store) if e.kind.startswith("tool")]
    assert [(e.interaction_id[len("r:work@1:1:") :], e.from_agent, e.to_agent) for e in tools] == [
        ("tool_call.1", AGENT, AGENT),
        ("tool_result.1", AGENT, AGENT),
        ("tool_call.2", AGENT, "inventory-agent"),
        ("tool_result.2", "inventory-agent", AGENT),
        ("tool_call.3", AGENT, AGENT),
        ("tool_result.3", AGENT, AGENT),
    ]
    assert tools[0].payload["input"] == {"product": "umbrella"}
    assert tools[1].payload["output"] == "umbrella: 3 kg"
    assert tools[3].payload["error"] == "KeyError: 'umbrella'"
    assert told(store, "inventory-agent") == []  # it is not here: it remembers for itself


def test_peers_names_the_agent_behind_a_tool(make: Make, store: EventStore) -> None:
    @tool
    def stock(product: str) -> int:
        """Count it."""
        return len(product)

    def work(_state: State) -> State:
        return {"log": [stock.invoke({"product": "hat"})]}

    graph = chain(work).with_config(callbacks=[make(peers={"stock": "inventory-agent"})])
    graph.invoke({"log": []}, OWNED)
    assert one(store, "tool_call").to_agent == "inventory-agent"


def test_a_node_behind_which_another_agent_stands_is_sent_a_message_and_replies(
    make: Make, store: EventStore
) -> None:
    recorder = make(peers={"ship": "shipping-agent"})
    builder = StateGraph(State).add_node("ship", ship)
    builder.add_node("reserve", reserve, metadata={"agent_id": "inventory agent"})
    builder.add_edge(START, "reserve").add_edge("reserve", "ship")
    builder.compile().with_config(callbacks=[recorder]).invoke({"log": ["in"]}, OWNED)
    parties = [
        (e.kind, e.from_agent, e.to_agent) for e in told(store) if e.kind in {"message", "reply"}
    ]
    assert parties == [
        ("message", AGENT, "inventory_agent"),
        ("reply", "inventory_agent", AGENT),
        ("message", AGENT, "shipping-agent"),
        ("reply", "shipping-agent", AGENT),
    ]
    message, reply = [e for e in told(store) if e.kind in {"message", "reply"}][:2]
    assert message.payload["sent"] == {"log": ["in"]}
    assert reply.payload["received"] == {"log": ["reserved"]}
    assert told(store, "shipping-agent") == []


class Card(BaseModel):
    number: SecretStr
    owner: str


class Stubborn:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


def test_strange_values_become_json_and_do_no_harm(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    loop: list[Any] = []
    loop.append(loop)
    numbers = iter([1, 2])

    def strange(_state: State) -> State:
        card = Card(number=SecretStr("4111"), owner="Ann")
        values = [Stubborn(), loop, numbers, card, {1: {2}}, float("nan"), b"\xff", "\0\ud800"]
        return {"log": [*values, 2**80, AIMessage("hello")]}

    builder = StateGraph(State).add_node("strange", strange).add_edge(START, "strange")
    builder.compile().with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    wrote: Any = one(store, "node").payload["wrote"]
    stubborn, looped, used, card, mapping, nan, binary, text, large, message = wrote["log"]
    assert stubborn.startswith(("cut", "<"))
    assert "cut: too deep" in json.dumps(looped)
    assert used.startswith("cut: ")
    assert list(numbers) == [1, 2]
    assert card == {"number": "**********", "owner": "Ann"}
    assert (mapping, nan, large) == ({"1": [2]}, None, str(2**80))
    assert binary == "_w=="
    assert "\0" not in text
    assert message["content"] == "hello"
    assert recorder.counters["unstorable"] == 0


def test_what_is_nested_too_deeply_is_cut_and_stored(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    deep: Any = "bottom"
    for _ in range(60):
        deep = {"in": [deep]}

    def write(_state: State) -> State:
        wrapped: Any = AIMessage("hello", additional_kwargs={"deep": deep})
        for _ in range(4):
            wrapped = [{"message": wrapped}]
        return {"log": [wrapped]}

    chain(write).with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    assert "cut: too deep" in json.dumps(one(store, "node").payload)
    assert recorder.counters == {"stored": 3}


def test_a_value_is_recorded_as_it_was_when_the_node_ended(
    make: Make, store: BreakableStore
) -> None:
    kept = ["as it was"]

    def first(_state: State) -> State:
        return {"log": [kept]}

    def second(_state: State) -> State:
        kept.append("changed")
        return {}

    recorder = make(batch_seconds=30)
    chain(first, second).with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    first_node = next(e for e in told(store) if e.payload.get("node") == "first")
    assert first_node.payload["wrote"] == {"log": [["as it was"]]}


def test_a_long_payload_is_cut_and_says_so(make: Make, store: EventStore) -> None:
    def write(_state: State) -> State:
        return {"log": ['"quoted" ' * 1_000]}

    def write_more(_state: State) -> State:
        return {"log": ["x" * 50] * 10_000}

    recorder = make(max_payload_bytes=1_000)
    chain(write, write_more).with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    cut, more = [e.payload for e in told(store) if e.kind == "node"]
    assert str(cut["cut"]).startswith('{"node":"write","position":"write@1","wrote":')
    assert cut["bytes"] == 11_070
    assert "at_least" not in cut
    assert more["at_least"] is True
    for payload in (cut, more):
        assert 900 < len(json.dumps(payload, separators=(",", ":"))) <= 1_000


def test_what_the_hook_takes_out_is_never_stored(make: Make, store: EventStore) -> None:
    def redact(payload: Any) -> Any:
        return json.loads(json.dumps(payload).replace("secret", "***"))

    def write(_state: State) -> State:
        return {"log": ["my secret", AIMessage("secret too")]}

    recorder = make(redact=redact)
    chain(write).with_config(callbacks=[recorder]).invoke({"log": ["a secret"]}, OWNED)
    text = json.dumps([event.payload for event in told(store)])
    assert text.count("***") == 3
    assert "secret" not in text


def raises(error: BaseException) -> Callable[[Any], Any]:
    def redact(_payload: Any) -> Any:
        raise error

    return redact


@pytest.mark.parametrize(
    ("redact", "said"),
    [
        (raises(ValueError("secret")), "the redact hook raised ValueError"),
        (raises(SystemExit("secret")), "the redact hook raised SystemExit"),
        (raises(KeyboardInterrupt("secret")), "the redact hook raised KeyboardInterrupt"),
        (lambda _: None, "the redact hook returned a NoneType, not a dict"),
        (lambda _: {"x": object()}, "the redact hook returned something that is no JSON"),
    ],
)
def test_a_hook_that_fails_lets_nothing_through(
    make: Make, store: EventStore, redact: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = make(redact=redact)
    chain(reserve).with_config(callbacks=[recorder]).invoke({"log": ["secret"]}, OWNED)
    assert [event.payload for event in told(store)] == [{"redacted": said}] * 3
    assert "secret" not in caplog.text


def test_what_cannot_be_made_an_event_is_counted_and_keeps_no_other_out(store: EventStore) -> None:
    def render(_store: EventStore, fact: Fact) -> Interaction:
        if fact.kind == "bad":
            raise SystemExit
        return Interaction(
            interaction_id="good",
            thread_id="t",
            from_agent=AGENT,
            to_agent=AGENT,
            kind=fact.kind,
            payload={},
            occurred_at=fact.occurred_at,
        )

    counters: Counter[str] = Counter()
    limits: Any = {"batch_seconds": 0.01, "max_facts": 10, "max_bytes": 10_000}
    writer = RecordWriter(lambda: store, render, counters=counters, **limits)
    source = Source("r", "t")
    for kind in ("bad", "good"):
        fact = Fact(
            source=source, place=None, kind=kind, from_agent=AGENT, to_agent=AGENT, payload={}
        )
        writer.put(fact, [AGENT])
    assert writer.flush(20)
    assert writer.close()
    assert counters == {"unstorable": 1, "stored": 1}
    assert ids(store) == ["good"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_has_died_is_followed_by_another(
    recorder: InteractionRecorder, store: BreakableStore
) -> None:
    died: queue.Queue[threading.Thread] = queue.Queue()

    class Fatal(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "events are not recorded" in record.getMessage():
                died.put(threading.current_thread())
                raise SystemExit

    logger, handler = logging.getLogger(RecordWriter.__module__), Fatal()
    logger.addHandler(handler)
    try:
        store.broken = True
        chain(reserve).with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
        died.get(timeout=20).join(20)
    finally:
        logger.removeHandler(handler)
    store.broken = False
    assert recorder.flush(20)
    assert len(told(store)) == 3


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_failing_store_is_said_once_counted_and_tried_again(
    recorder: InteractionRecorder, store: BreakableStore, caplog: pytest.LogCaptureFixture
) -> None:
    graph = chain(reserve, ship).with_config(callbacks=[recorder])
    store.broken = True
    for run_id in ("r", "s"):
        given: Any = {**OWNED, "metadata": {"run_id": run_id}}
        assert graph.invoke({"log": []}, given)["log"][-1] == "shipped"
    assert not recorder.flush(5)
    assert recorder.counters["failed_writes"] >= 3
    assert [m for m in warnings_in(caplog) if "disk is full" in m] == [
        "events are not recorded, and will be tried again: the disk is full"
    ]
    store.broken = False
    assert recorder.flush(20)
    assert len(told(store)) == recorder.counters["stored"] == 8


def test_a_silent_store_does_not_hold_up_the_end_of_a_run_for_long(
    recorder: InteractionRecorder, store: BreakableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "END_DEADLINE_SECONDS", END_DEADLINE_SECONDS)
    store.gate.clear()
    started = time.monotonic()
    chain(reserve).with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    assert END_DEADLINE_SECONDS - 0.1 < time.monotonic() - started < 15
    store.gate.set()
    assert recorder.flush(20)
    assert len(told(store)) == 3


def test_where_errors_are_raised_the_node_fails_whose_event_is_not_stored(
    make: Make, store: BreakableStore
) -> None:
    ran = []

    def work(_state: State) -> State:
        store.broken = True
        return {}

    def never(_state: State) -> State:
        ran.append("never")
        return {}

    graph = chain(work, never).with_config(callbacks=[make(raise_errors=True)])
    with pytest.raises(StoreError, match="disk is full"):
        graph.invoke({"log": []}, OWNED)
    assert ran == []
    store.broken = False


def test_where_errors_are_raised_a_node_is_stored_before_the_next_begins(
    make: Make, store: EventStore
) -> None:
    seen: list[str] = []

    def second(_state: State) -> State:
        seen.extend(ids(store))
        return {}

    graph = chain(reserve, second).with_config(
        callbacks=[make(raise_errors=True, batch_seconds=30)]
    )
    graph.invoke({"log": []}, OWNED)
    assert seen == ["r::1:run_begin", "r:reserve@1:1:node"]


def test_the_oldest_node_events_go_first_and_it_is_said_once(
    make: Make, store: BreakableStore, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"n{number}" for number in range(8)]
    builder = StateGraph(State)
    for one, other in zip([START, *names], names, strict=False):
        builder.add_node(other, reserve)
        builder.add_edge(one, other)
    recorder = make(max_queued=4, batch_seconds=30)
    builder.compile().with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    assert ids(store) == ["r::1:run_begin", "r:n6@7:1:node", "r:n7@8:1:node", "r::1:run_end"]
    assert recorder.counters == {"stored": 4, "dropped": 6}
    assert len([m for m in warnings_in(caplog) if "dropped" in m]) == 1


def test_the_queue_is_bounded_by_bytes_too(make: Make, store: EventStore) -> None:
    def write(_state: State) -> State:
        return {"log": ["x" * 4_000]}

    recorder = make(max_queued_bytes=3_000, batch_seconds=30)
    chain(write).with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    assert [event.kind for event in told(store)] == ["run_begin", "run_end"]


def test_events_wait_for_others_to_be_stored_with_them(make: Make, store: BreakableStore) -> None:
    recorder = make(batch_seconds=30)
    chain(reserve, ship).with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    assert store.appends == 1


def test_events_do_not_wait_for_the_end_of_a_run(make: Make, store: EventStore) -> None:
    seen: list[str] = []

    def second(_state: State) -> State:
        deadline = time.monotonic() + 20
        while len(ids(store)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.extend(ids(store))
        return {}

    recorder = make(batch_seconds=0.01)
    chain(reserve, second).with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    assert seen == ["r::1:run_begin", "r:reserve@1:1:node"]


def test_it_can_be_closed_twice_and_used_again(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    graph = chain(reserve).with_config(callbacks=[recorder])
    graph.invoke({"log": []}, OWNED)
    recorder.close()
    recorder.close()
    assert "peerctx-recorder" not in {thread.name for thread in threading.enumerate()}
    graph.invoke({"log": []}, {**OWNED, "metadata": {"run_id": "s"}})
    assert len(told(store)) == 6
    assert not store.closed


def test_by_default_it_records_into_the_environments_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/environment.db"
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", url)
    recorder = InteractionRecorder(AGENT)
    chain(reserve).with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    recorder.close()
    with EventStore(url) as opened:
        assert len(told(opened)) == 3


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_records_its_own_runs_and_not_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/environment.db"
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", url)
    recorder = InteractionRecorder(AGENT, batch_seconds=30)
    graph = chain(reserve).with_config(callbacks=[recorder])
    children = []

    def fork(_state: State) -> State:
        if not (child := os.fork()):
            try:
                graph.invoke({"log": []}, {**OWNED, "metadata": {"run_id": "childs"}})
            finally:
                os._exit(0)
        children.append(child)
        return {}

    chain(fork).with_config(callbacks=[recorder]).invoke({"log": []}, OWNED)
    os.waitpid(children[0], 0)
    recorder.close()
    with EventStore(url) as opened:
        events = told(opened)
    assert sorted(e.interaction_id for e in events if e.run_id == "childs") == [
        *("childs::1:run_begin", "childs::1:run_end", "childs:reserve@1:1:node")
    ]
    assert len([e for e in events if e.run_id == "r"]) == 3
    assert recorder.counters["stored"] == 3


def test_long_names_make_ids_that_are_legal_and_tell_apart(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    builder = StateGraph(State)
    names = [f"{'long name ' * 30}{number}" for number in range(2)]
    for name in names:
        builder.add_node(name, reserve)
        builder.add_edge(START, name)
    config = {"configurable": {"thread_id": "t"}, "metadata": {"run_id": "R\n" * 200}}
    builder.compile().with_config(callbacks=[recorder]).invoke({"log": []}, config)
    nodes = [i for i in ids(store) if i.endswith(":1:node")]
    assert len(set(nodes)) == 2
    assert all(len(i) <= 255 for i in nodes)
    assert recorder.counters["unstorable"] == 0


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("Alice", "Alice"),
        (" math expert ", "math_expert"),
        ("größe", "gr_e-"),
        ("__start", "start-"),
        ("専門家", "agent-"),
        ("a" * 80, "a" * 55 + "-"),
    ],
)
def test_illegal_names_of_agents_are_made_legal(name: str, legal: str) -> None:
    made = legal_agent_id(name)
    assert is_legal_id(made)
    assert made.startswith(legal)
    assert legal_agent_id(name) == made


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"agent_id": "no good"}, ProtocolError),
        ({"peers": {"tool": "no good"}}, ProtocolError),
        ({"max_payload_bytes": 10}, ConfigurationError),
        ({"batch_seconds": 0}, ConfigurationError),
        ({"max_queued": 0}, ConfigurationError),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        InteractionRecorder(**{"agent_id": AGENT, **options})
