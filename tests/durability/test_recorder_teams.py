"""Teams of agents, and graphs on a server: who acts, who is handed over to, who is asked."""

import json
import operator
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import pytest
from httpx import TransportError
from langchain.agents import create_agent
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.pregel.remote import RemoteGraph
from langgraph.types import Command
from langgraph_sdk import get_sync_client
from langgraph_supervisor import create_supervisor
from langgraph_swarm import create_handoff_tool, create_swarm
from services.kafka import free_ports
from typing_extensions import TypedDict

from langgraph_peerctx.durability.recorder import InteractionRecorder
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.protocol.messages import Interaction

TEAM = "team-agent"
RUN: Any = {"configurable": {"thread_id": "t"}, "metadata": {"run_id": "r"}}
HELLO: Any = {"messages": [("user", "hello")]}
HERE = Path(__file__).parent
START_SECONDS = 60


class Order(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


class ScriptedModel(GenericFakeChatModel):
    """Says what it is given, one after the other."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> "ScriptedModel":
        del tools, kwargs
        return self


def says(*script: str | AIMessage) -> ScriptedModel:
    return ScriptedModel(messages=iter(script))


def calls(*names: str, **args: Any) -> AIMessage:
    return AIMessage(
        "", tool_calls=[{"name": name, "args": args, "id": f"id-{name}"} for name in names]
    )


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    with EventStore(f"sqlite:///{tmp_path}/own.db") as store:
        yield store


@pytest.fixture
def recorder(store: EventStore) -> Iterator[InteractionRecorder]:
    recorder = InteractionRecorder(TEAM, store=store)
    yield recorder
    recorder.close()


def told(store: EventStore, agent_id: str, *kinds: str, thread_id: str = "t") -> list[Interaction]:
    events = store.interactions_of(agent_id, thread_id=thread_id)[::-1]
    return [event for event in events if not kinds or event.kind in kinds]


def parties(events: Sequence[Interaction]) -> list[tuple[str, str]]:
    return [(event.from_agent, event.to_agent) for event in events]


def test_an_agent_of_its_own_acts_as_the_recorders(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    agent = create_agent(says(calls("add", a=1, b=2), "3"), [add], name="calculator")
    agent.with_config(callbacks=[recorder]).invoke(HELLO, RUN)
    assert [event.interaction_id for event in told(store, TEAM)] == [
        "r::1:run_begin",
        "r:model@1:1:node",
        "r:tools@2[0]:1:tool_call.1",
        "r:tools@2[0]:1:tool_result.1",
        "r:tools@2[0]:1:node",
        "r:model@3:1:node",
        "r::1:run_end",
    ]
    assert set(parties(told(store, TEAM))) == {(TEAM, TEAM)}


def swarm(**names: str) -> Any:
    alice, bob = names.get("alice", "Alice"), names.get("bob", "Bob")
    to_bob, to_alice = (create_handoff_tool(agent_name=name) for name in (bob, alice))
    first = create_agent(
        says(calls("add", a=1, b=2), calls(to_bob.name), "back again"), [add, to_bob], name=alice
    )
    second = create_agent(says(calls(to_alice.name)), [to_alice], name=bob)
    return create_swarm([first, second], default_active_agent=alice)


@pytest.mark.parametrize("is_async", [False, True], ids=["invoke", "ainvoke"])
async def test_a_swarms_hand_offs_are_remembered_by_both_once(
    recorder: InteractionRecorder, store: EventStore, *, is_async: bool
) -> None:
    graph = swarm().compile(checkpointer=InMemorySaver()).with_config(callbacks=[recorder])
    if is_async:
        await graph.ainvoke(HELLO, RUN)
    else:
        graph.invoke(HELLO, RUN)
    for agent in ("Alice", "Bob"):
        handed = told(store, agent, "handoff")
        assert parties(handed) == [("Alice", "Bob"), ("Bob", "Alice")]
        assert [event.interaction_id for event in handed] == [
            "r:Alice@1/tools@4[0]:1:handoff.1",
            "r:Bob@2/tools@2[0]:1:handoff.1",
        ]
    assert handed[0].payload["by_tool"] == "transfer_to_bob"
    for agent in (TEAM, "Alice", "Bob"):
        assert told(store, agent, "node_failed") == []
    inner = told(store, "Alice", "node", "tool_call", "tool_result")
    assert set(parties(inner)) == {("Alice", "Alice")}
    assert [e.payload["position"] for e in told(store, TEAM, "node")] == [
        "Alice@1",
        "Bob@2",
        "Alice@3",
    ]


def test_illegal_names_in_a_team_are_made_legal(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    graph = swarm(alice="Alice A", bob="größe").compile().with_config(callbacks=[recorder])
    graph.invoke(HELLO, RUN)
    (there, back) = told(store, "Alice_A", "handoff")
    assert there.from_agent == back.to_agent == "Alice_A"
    assert there.to_agent == back.from_agent
    assert there.to_agent.startswith("gr_e-")


@pytest.mark.filterwarnings("ignore:create_react_agent has been moved")  # theirs
def test_a_supervisors_hand_off_is_remembered_by_both(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    expert = create_agent(says("done"), [], name="math expert")
    model = says(calls("transfer_to_math_expert"), "all done")
    graph = create_supervisor([expert], model=model).compile(checkpointer=InMemorySaver())
    graph.with_config(callbacks=[recorder]).invoke(HELLO, RUN)
    for agent in ("supervisor", "math_expert"):
        assert parties(told(store, agent, "handoff")) == [("supervisor", "math_expert")]
    inner = told(store, "math_expert", "node")
    assert [event.payload["position"] for event in inner] == ["math expert@2/model@1"]
    assert told(store, TEAM, "node_failed") == []


def test_a_nodes_metadata_names_the_agent_that_acts_in_it(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    agent = create_agent(says(calls("add", a=1, b=2), "3"), [add], name="calculator")
    builder = StateGraph(MessagesState)
    builder.add_node("ask", agent, metadata={"agent_id": "math-agent"})
    builder.add_edge(START, "ask")
    builder.compile().with_config(callbacks=[recorder]).invoke(HELLO, RUN)
    exchanged = [(TEAM, "math-agent"), ("math-agent", TEAM)]
    assert parties(told(store, TEAM, "message", "reply")) == exchanged
    # It acts in this process, and so it remembers here, too.
    assert parties(told(store, "math-agent", "message", "reply")) == exchanged
    assert len(told(store, "math-agent", "node")) == 3
    assert told(store, "calculator") == []


def handing_over(builder: StateGraph[Any], name: str, agent: Any, goto: str) -> None:
    def node(state: MessagesState) -> Command[Any]:
        return Command(goto=goto, update=agent.invoke(state))

    builder.add_node(name, node)


def test_a_nodes_command_is_a_hand_off_only_between_agents(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    builder = StateGraph(MessagesState)
    handing_over(builder, "alice", create_agent(says("I am Alice"), [], name="alice"), "sort")
    builder.add_node("sort", lambda _: Command(goto="bob"))
    handing_over(builder, "bob", create_agent(says("I am Bob"), [], name="bob"), "carol")
    handing_over(builder, "carol", create_agent(says("I am Carol"), [], name="carol"), "end")
    builder.add_node("end", lambda _: Command(goto="last"))
    builder.add_node("last", lambda _: None)
    builder.add_edge(START, "alice")
    builder.compile().with_config(callbacks=[recorder]).invoke(HELLO, RUN)
    assert parties(told(store, "bob", "handoff")) == [(TEAM, "bob"), ("bob", "carol")]
    assert parties(told(store, TEAM, "handoff")) == [
        ("alice", TEAM),
        (TEAM, "bob"),
        ("carol", TEAM),
    ]


def test_a_command_to_the_parent_is_no_failure_and_no_hand_off_within_one_agent(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    up: Any = Command(graph=Command.PARENT, goto="after", update={"messages": [AIMessage("up")]})
    inner = StateGraph(MessagesState).add_node("up", lambda _: up).add_edge(START, "up").compile()
    builder = StateGraph(MessagesState).add_node("inner", inner).add_node("after", lambda _: None)
    builder.add_edge(START, "inner").compile().with_config(callbacks=[recorder]).invoke(HELLO, RUN)
    kinds = [event.kind for event in told(store, TEAM)]
    assert kinds == ["run_begin", "node", "node", "node", "run_end"]


def test_an_agent_as_a_tool_acts_for_itself(
    recorder: InteractionRecorder, store: EventStore
) -> None:
    helper = create_agent(says(calls("add", a=1, b=2), "3"), [add], name="helper")

    @tool
    def ask_helper(question: str) -> str:
        """Ask the helper."""
        return str(helper.invoke({"messages": [("user", question)]})["messages"][-1].content)

    ask_helper.metadata = {"agent_id": "helper"}
    agent = create_agent(says(calls("ask_helper", question="1 + 2?"), "3"), [ask_helper])
    agent.with_config(callbacks=[recorder]).invoke(HELLO, RUN)
    asked = told(store, TEAM, "tool_call", "tool_result")
    assert parties(asked) == [(TEAM, "helper"), ("helper", TEAM)]
    assert len(told(store, "helper", "node")) == 3
    assert len(told(store, TEAM, "node")) == 3


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A real server of `served_pricing.py`, with a store of its own."""
    module = "./served_pricing.py"
    (tmp_path / "served_pricing.py").symlink_to(HERE / "served_pricing.py")
    graphs = {"pricing": f"{module}:plain", "recorded": f"{module}:recorded"}
    served = {"dependencies": ["."], "graphs": graphs}
    (tmp_path / "langgraph.json").write_text(json.dumps(served))
    (port,) = free_ports(1)
    variables = {
        "LANGGRAPH_CLI_NO_ANALYTICS": "1",
        "LANGGRAPH_NO_VERSION_CHECK": "true",
        "LANGSMITH_TRACING": "false",
        "PEER_CONTEXT_DATABASE_URL": f"sqlite:///{tmp_path}/served.db",
    }
    command = [sys.executable, "-m", "langgraph_cli", "dev", "--no-browser", "--no-reload"]
    log = tmp_path / "server.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=tmp_path,
            env={**os.environ, **variables},
            stdout=output,
            stderr=output,
        ) as process,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}", lambda: process.poll() is None, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def wait_for(url: str, is_running: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    with get_sync_client(url=url, api_key=None) as client:
        while time.monotonic() < deadline and is_running():
            try:
                client.http.get("/ok")
            except TransportError:
                time.sleep(0.1)
            else:
                return
    raise AssertionError(log.read_text()[-3_000:])


def test_a_remote_graph_is_sent_a_message_and_replies(
    url: str, tmp_path: Path, store: EventStore
) -> None:
    recorder = InteractionRecorder(TEAM, store=store, peers={"pricing": "pricing-agent"})
    with get_sync_client(url=url, api_key=None) as client:
        remote = RemoteGraph("pricing", url=url, sync_client=client)
        builder = StateGraph(Order).add_node("pricing", remote).add_edge(START, "pricing")
        graph = builder.compile().with_config(callbacks=[recorder])
        thread_id = str(uuid4())  # the server has it of its caller
        done = graph.invoke({"log": []}, {"configurable": {"thread_id": thread_id}})
        assert done == {"log": ["3 euro"]}
        exchanged = told(store, TEAM, "message", "reply", thread_id=thread_id)
        assert parties(exchanged) == [(TEAM, "pricing-agent"), ("pricing-agent", TEAM)]
        assert exchanged[1].payload["received"] == {"log": ["3 euro"]}
        # It remembers for itself, elsewhere.
        assert told(store, "pricing-agent", thread_id=thread_id) == []

        # The server's own graph records too, although its loop may not be blocked.
        thread_id = client.threads.create()["thread_id"]
        client.runs.wait(thread_id, "recorded", input={"log": ["in"]})
    recorder.close()
    deadline = time.monotonic() + 20
    with EventStore(f"sqlite:///{tmp_path}/served.db") as served:
        while len(events := told(served, "pricing-agent", thread_id=thread_id)) < 3:
            assert time.monotonic() < deadline, events
            time.sleep(0.05)
    assert [event.kind for event in events] == ["run_begin", "node", "run_end"]
    log = (tmp_path / "server.log").read_text()
    assert "InteractionRecorder" not in log
    assert "Blocking" not in log
