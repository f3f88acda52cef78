"""What every test stands on: strict settings, no leftovers, and the real services."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from uuid import uuid4

os.environ["LANGGRAPH_STRICT_MSGPACK"] = "true"  # before LangGraph is imported

import hypothesis
import pytest
import pytest_asyncio
from runtime_threads import no_runtime_left
from services.kafka import KafkaMissingError, KafkaServer
from services.postgres import PostgresMissingError, PostgresServer
from two_peers import Peers, two_peers

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.messaging.embedded_broker import EmbeddedBroker
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.persistence.incidents import ControlDatabase

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")


_LONGEST = (
    "test_kafka_transport",
    "integration/",
    "reconstruction/",
    "test_outages",
    "test_freezes",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what takes longest: of several processes each takes a file, and another."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in _LONGEST))


def missing(what: str, why: object) -> None:
    """Skip, saying why; where everything must be there, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing: {why}", pytrace=False)
    pytest.skip(f"{what} is missing: {why}")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's variables but the test's own."""
    for name in list(os.environ):
        if name.startswith(("KAFKA_", "PEER_CONTEXT_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PEER_CONTEXT_SENTINEL", "off")  # who tests it says so


@pytest_asyncio.fixture(autouse=True)
async def _no_task_is_left_behind() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    assert not left, f"tasks are left behind: {left}"


@pytest.fixture(scope="session")
def kafka() -> Iterator[KafkaServer]:
    """One real broker for all tests: do not stop it."""
    server = KafkaServer()
    try:
        server.start()
    except KafkaMissingError as error:
        server.__exit__()
        missing("Apache Kafka", error)
    yield server
    server.__exit__()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One real server for all tests: do not stop it."""
    try:
        server = PostgresServer({"fsync": "off"}).start()
    except PostgresMissingError as error:
        missing("PostgreSQL", error)
    yield server
    server.__exit__()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A fresh empty database's address."""
    with postgres_server.database() as url:
        yield url


@pytest.fixture(scope="module")
def embedded_servers() -> Iterator[str]:
    with EmbeddedBroker(["agent.context.request", "agent.context.response.reconstructor"]) as b:
        yield b.bootstrap_servers


@pytest.fixture
def settings_in_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., PeerContextSettings]:
    """Say in the environment, too, on which broker and topics; the agent's own store is empty."""

    def say(servers: str, **topics: str) -> PeerContextSettings:
        monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", servers)
        for name, value in topics.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", f"sqlite:///{tmp_path}/own.db")
        monkeypatch.setenv("PEER_CONTEXT_MOCK_MODE", "never")
        settings = PeerContextSettings()
        EventStore(settings.database_url).close()
        return settings

    return say


@pytest.fixture
def embedded_settings(
    embedded_servers: str, settings_in_environment: Callable[..., PeerContextSettings]
) -> PeerContextSettings:
    return settings_in_environment(embedded_servers)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeerContextSettings:
    """No broker, a control database of its own, and a heart that beats fast."""
    monkeypatch.setenv("PEER_CONTEXT_MOCK_MODE", "always")
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", f"sqlite:///{tmp_path}/control.db")
    monkeypatch.setenv("PEER_CONTEXT_HEARTBEAT_INTERVAL_SECONDS", "0.05")
    monkeypatch.setenv("PEER_CONTEXT_HEARTBEAT_PAUSE_SECONDS", "0.35")
    return PeerContextSettings()


@pytest.fixture
def control(settings: PeerContextSettings) -> Iterator[ControlDatabase]:
    with ControlDatabase(settings.control_url) as opened:
        yield opened


@pytest.fixture
async def _no_runtime_left(settings: PeerContextSettings) -> AsyncIterator[None]:
    del settings
    with no_runtime_left():
        yield


@pytest.fixture
async def two(embedded_settings: PeerContextSettings, tmp_path: Path) -> AsyncIterator[Peers]:
    """Two peers on the embedded broker, and no runtime left at the end."""
    with no_runtime_left():
        async with two_peers(embedded_settings, tmp_path) as peers:
            yield peers


@pytest.fixture
async def two_on_kafka(
    kafka: KafkaServer,
    settings_in_environment: Callable[..., PeerContextSettings],
    tmp_path: Path,
) -> AsyncIterator[Peers]:
    """Two peers on a real Apache Kafka, on topics of their own."""
    name = uuid4().hex
    settings = settings_in_environment(
        kafka.bootstrap_servers,
        KAFKA_CONTEXT_REQUEST_TOPIC=f"{name}.request",
        KAFKA_CONTEXT_RESPONSE_TOPIC_PREFIX=f"{name}.response",
    )
    with no_runtime_left():
        async with two_peers(settings, tmp_path) as peers:
            yield peers
