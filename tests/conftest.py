"""What every test stands on: strict settings, no leftovers, and the real services."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator

os.environ["LANGGRAPH_STRICT_MSGPACK"] = "true"  # before LangGraph is imported

import pytest
import pytest_asyncio
from services.kafka import KafkaMissingError, KafkaServer
from services.postgres import PostgresMissingError, PostgresServer


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
