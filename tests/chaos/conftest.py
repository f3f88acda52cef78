"""How often each experiment is made: twenty times, or as PEERCTX_CHAOS says."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
from services.postgres import PostgresServer


@pytest.fixture
def times() -> int:
    return int(os.environ.get("PEERCTX_CHAOS", "20"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Printed, so that a run can be repeated: PEERCTX_CHAOS_SEED."""
    number = int(os.environ.get("PEERCTX_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"{request.node.name}: PEERCTX_CHAOS_SEED={number}")
    return number


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def databases(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[str]]:
    """Makes a control database with checkpoints, for as long as the block lasts."""
    if request.param == "sqlite":
        return partial(nullcontext, "sqlite")
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.database


@pytest.fixture
def database(databases: Callable[[], AbstractContextManager[str]]) -> Iterator[str]:
    """Control database and checkpoints."""
    with databases() as made:
        yield made
