"""Agents die at every kind of place; nothing is lost, repeated or guessed, unlike without us.

One kill of each workflow, durability, peer's fate and store's fate, of three systems side by side;
`make matrix` makes 300 of each and writes docs/evidence.md.
"""

import os
import random

import pytest
from matrix.cells import drawn
from matrix.experiment import experiment
from matrix.judging import GOOD
from matrix.killing import all_killed
from services.kafka import KafkaServer

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(1_800)]


async def test_killed_workflows_end_as_uninterrupted_and_what_nobody_knows_is_asked(
    kafka: KafkaServer,
) -> None:
    kills = int(os.environ.get("PEERCTX_MATRIX", "90"))
    seed = int(os.environ.get("PEERCTX_MATRIX_SEED", random.SystemRandom().randrange(10**6)))
    print(f"PEERCTX_MATRIX_SEED={seed}")
    async with experiment(kafka.bootstrap_servers) as made:
        found = await all_killed(made, drawn(kills, seed), at_once=6, tell=print)
    bare = [kill for kill in found if kill.system == "langgraph"]
    # Without peers nobody remembers a run whose stores are lost: what it did is done again.
    alone = [k for k in found if k.system == "no peers" and k.cell.store == "kept"]
    whole = [kill for kill in found if kill.system == "peers"]
    assert len(whole) == kills
    assert [kill for kill in (*alone, *whole) if kill.verdict not in GOOD or kill.notes] == []
    assert any(kill.repeated for kill in bare), "the ledger sees no repeated effect any more"
