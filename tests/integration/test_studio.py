"""The graphs as LangGraph Studio opens them: a real server, offline, killed and started again."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from httpx import TransportError
from langgraph_sdk import get_client
from langgraph_sdk.client import LangGraphClient
from services.kafka import free_ports

from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.runs import Run

REPOSITORY = Path(__file__).parents[2]
OFFLINE = {
    "LANGGRAPH_CLI_NO_ANALYTICS": "1",
    "LANGGRAPH_NO_VERSION_CHECK": "true",
    "LANGSMITH_TRACING": "false",
}
START_SECONDS = 60
AGENT = "product-agent"
STEPS = [
    "load_checkpoint",
    "position",
    "request_context",
    "collect_context",
    "reconstruct",
    "settle",
    "approve",
    "resume_workflow",
]


class Studio:
    """`langgraph dev` as the documentation starts it, in a folder of its own: it writes there.

    Args:
        folder: The folder.
        names: What of the repository is in it.
    """

    def __init__(self, folder: Path, names: Iterable[str] = ("langgraph.json", "graphs")) -> None:
        self.folder = folder
        for name in names:
            (folder / name).symlink_to(REPOSITORY / name)
        (self.port,) = free_ports(1)
        self.log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, **variables: str) -> Self:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KAFKA_")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "langgraph_cli", "dev", "--no-browser", "--no-reload"),
                    *("--host", "127.0.0.1", "--port", str(self.port)),
                ],
                cwd=self.folder,
                env={
                    **environment,
                    **OFFLINE,
                    "PEERCTX_STUDIO_FOLDER": str(self.folder / "kept"),
                    **variables,
                },
                stdout=log,
                stderr=log,
            )
        return self

    @asynccontextmanager
    async def client(self) -> AsyncIterator[LangGraphClient]:
        """Wait until it serves."""
        deadline = time.monotonic() + START_SECONDS
        async with get_client(url=f"http://127.0.0.1:{self.port}", api_key=None) as client:
            while time.monotonic() < deadline and self.is_running:
                try:
                    await client.http.get("/ok")
                except TransportError:
                    await asyncio.sleep(0.1)
                else:
                    yield client
                    return
        raise AssertionError(self.log.read_text()[-3_000:])

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(10)

    def close(self) -> None:
        if self.is_running:
            self.kill()


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    server = Studio(tmp_path).start()
    yield server
    server.close()


@pytest.fixture
async def client(studio: Studio) -> AsyncIterator[LangGraphClient]:
    async with studio.client() as client:
        yield client


async def dead_launch(client: LangGraphClient) -> str:
    """Run a launch that dies in the middle of a step, and return its thread."""
    thread: str = (await client.threads.create())["thread_id"]
    with pytest.raises(Exception, match="AgentDiedError"):
        await client.runs.wait(
            thread, "launch", input={"product": "umbrella", "dies_in": "advertise"}
        )
    state: Any = await client.threads.get_state(thread)
    assert state["next"] == ["advertise"]
    assert "slogan" not in state["values"]
    return thread


async def finished(client: LangGraphClient, thread: str) -> None:
    """See that the launch ended as if nothing had happened, and asked no peer twice."""
    state: Any = await client.threads.get_state(thread)
    values = state["values"]
    assert (values["slogan"], values["launched"]) == ("Never without your umbrella", True)
    assert values["asked"] == 1
    assert state["next"] == []


async def test_what_studio_shows_reads_well(client: LangGraphClient) -> None:
    assistants = {a["graph_id"]: a["assistant_id"] for a in await client.assistants.search()}
    assert set(assistants) == {"launch", "recovery", "peer_context"}
    for name, assistant in assistants.items():
        graph = await client.assistants.get_graph(assistant, xray=1)
        nodes = [str(node["id"]) for node in graph["nodes"]][1:-1]
        schemas: Any = await client.assistants.get_schemas(assistant)
        assert await client.assistants.get_subgraphs(assistant) == {}
        if name == "recovery":
            assert nodes == STEPS
        for field, described in schemas["input_schema"]["properties"].items():
            assert {"title", "description", "examples"} <= described.keys(), field


async def test_a_dead_launch_is_recovered_as_studio_does_it(client: LangGraphClient) -> None:
    launch = await dead_launch(client)
    thread = (await client.threads.create())["thread_id"]
    nodes, events = [], []
    async for part in client.runs.stream(
        thread,
        "recovery",
        input={"failed_agent_id": AGENT, "thread_id": launch},
        stream_mode=["updates", "custom"],
        stream_subgraphs=True,
    ):
        if part.event == "updates":
            nodes += list(part.data)
        elif part.event == "custom":
            events.append(part.data["peer_context"]["event"])
        assert part.event != "error", part.data
    assert nodes == STEPS
    assert events == ["asking", "request_sent", "answer", "coverage"]
    state: Any = await client.threads.get_state(thread)
    result = state["values"]["result"]
    assert (result["status"], result["reasons"]) == ("resumed", [])
    assert len(await client.threads.get_history(thread)) == len(STEPS) + 2
    await finished(client, launch)


async def test_a_human_is_asked_where_a_peer_is_silent(client: LangGraphClient) -> None:
    launch = await dead_launch(client)
    thread = (await client.threads.create())["thread_id"]
    order = {
        "failed_agent_id": AGENT,
        "thread_id": launch,
        "expect": ["inventory-agent", "nobody"],
        "timeout_seconds": 3,
    }
    asked: Any = await client.runs.wait(thread, "recovery", input=order)
    question = asked["__interrupt__"][0]["value"]
    assert question["why"] == ["coverage is 0.50, below 1"]
    assert len(question["would_write"]["facts"]) == 2
    state: Any = await client.threads.get_state(thread)
    assert state["next"] == ["approve"]
    done: Any = await client.runs.wait(thread, "recovery", command={"resume": True})
    assert done["result"]["reasons"] == ["silent: nobody"]
    await finished(client, launch)


async def test_runs_on_loops_of_their_own_share_the_servers_runtime(tmp_path: Path) -> None:
    studio = Studio(tmp_path).start(BG_JOB_ISOLATED_LOOPS="true")
    try:
        async with studio.client() as client:
            launches = [await dead_launch(client) for _ in range(3)]
            threads = [(await client.threads.create())["thread_id"] for _ in launches]
            orders = [{"failed_agent_id": AGENT, "thread_id": launch} for launch in launches]
            results: list[Any] = await asyncio.gather(
                *(
                    client.runs.wait(thread, "recovery", input=order)
                    for thread, order in zip(threads, orders, strict=True)
                )
            )
            assert [(r["result"]["status"], r["result"]["reasons"]) for r in results] == [
                ("resumed", [])
            ] * 3
            for launch in launches:
                await finished(client, launch)
    finally:
        studio.close()
    assert "isolated" in studio.log.read_text().lower()


async def test_a_server_killed_in_the_middle_of_a_recovery_finishes_it_when_it_is_back(
    studio: Studio, client: LangGraphClient
) -> None:
    launch = await dead_launch(client)
    thread = (await client.threads.create())["thread_id"]
    order = {
        "failed_agent_id": AGENT,
        "thread_id": launch,
        "expect": ["inventory-agent", "marketing-agent", "nobody"],
        "timeout_seconds": 10,
    }

    await client.runs.create(thread, "recovery", input=order, durability="sync")
    async with asyncio.timeout(30):
        while (await client.threads.get_state(thread))["next"] != ["collect_context"]:
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)  # two peers have answered, the third will not
    studio.kill()

    async with studio.start().client() as again:
        for forgotten, graph in ((thread, "recovery"), (launch, "launch")):
            # The server forgets its list of threads; the checkpoints are in our file.
            await again.threads.create(thread_id=forgotten, if_exists="do_nothing", graph_id=graph)
        await finish_the_recovery(again, thread)
        await finished(again, launch)


async def finish_the_recovery(client: LangGraphClient, thread: str) -> None:
    state: Any = await client.threads.get_state(thread)
    assert state["next"] == ["collect_context"]
    asked: Any = await client.runs.wait(thread, "recovery", input=None)
    question = asked["__interrupt__"][0]["value"]
    assert question["coverage"]["answered"] == ["inventory-agent", "marketing-agent"]
    done: Any = await client.runs.wait(thread, "recovery", command={"resume": {"approve": True}})
    assert done["result"]["status"] == "resumed"


ORDER_AGENT = "order-agent"


@pytest.fixture
def control_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/control.db"


@pytest.fixture
async def orders(tmp_path: Path, control_url: str) -> AsyncIterator[LangGraphClient]:
    """A server of a graph whose runs are owned."""
    path = "./tests/integration/owned_order.py:graph"
    served = {"dependencies": ["."], "graphs": {"order": path}}
    (tmp_path / "langgraph.json").write_text(json.dumps(served))
    server = Studio(tmp_path, ["tests"]).start(
        PEER_CONTEXT_MOCK_MODE="always",
        PEER_CONTEXT_SENTINEL="off",
        PEER_CONTEXT_DATABASE_URL=control_url,
        PEER_CONTEXT_CONTROL_DATABASE_URL=control_url,
    )
    try:
        async with server.client() as client:
            yield client
    finally:
        server.close()


async def test_a_servers_runs_are_owned_where_its_graph_says_so(
    orders: LangGraphClient, control_url: str
) -> None:
    thread: str = (await orders.threads.create())["thread_id"]

    def written_down() -> Run:
        with ControlDatabase(control_url) as control:
            lease = control.lease_of(ORDER_AGENT, thread)
            assert lease is not None
            assert lease.is_free
            run = control.newest_run(ORDER_AGENT, thread)
        assert run is not None
        assert (run.workflow, run.end_kind) == ("order", "returned")
        return run

    asked: Any = await orders.runs.wait(thread, "order", input={"log": ["in"]})
    assert asked["__interrupt__"][0]["value"] == "how many?"
    first = written_down()
    assert len(first.inputs) == 1
    state: Any = await orders.threads.get_state(thread)
    assert (state["next"], state["metadata"]["run_id"]) == (["ask"], first.run_id)
    (task,) = state["tasks"]
    assert task["interrupts"][0]["value"] == "how many?"

    await orders.threads.update_state(thread, {"log": ["edited"]}, as_node="reserve")
    done: Any = await orders.runs.wait(thread, "order", command={"resume": "three"})
    assert done == {"log": ["in", "reserved", "edited", "three"]}
    second = written_down()
    assert (second.run_id, len(second.inputs)) == (first.run_id, 2)
    assert second.inputs[1].checkpoint_id is not None

    state = await orders.threads.get_state(thread)
    assert (state["next"], state["values"]) == ([], done)
    history: Any = await orders.threads.get_history(thread)
    assert [past["next"] for past in history] == [
        [],
        ["ask"],  # edited
        ["ask"],
        ["reserve"],
        ["__start__"],
    ]
    assert {past["metadata"].get("run_id") for past in history} == {first.run_id, None}
