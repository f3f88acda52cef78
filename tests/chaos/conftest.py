"""How often each experiment is made: twenty times, or as PEERCTX_CHAOS says."""

import os
import random

import pytest


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
def database(request: pytest.FixtureRequest) -> str:
    """Control database and checkpoints."""
    if request.param == "sqlite":
        return "sqlite"
    address: str = request.getfixturevalue("postgres_url")
    return address
