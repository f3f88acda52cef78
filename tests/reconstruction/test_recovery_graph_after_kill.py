"""A recoverer killed at any place is taken up by another, which asks only who is missing."""

import asyncio
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dying import PLACES
from forking import exit_code_of
from reconstruction.dying_recovery import AFTER, INSIDE, NODES, RECOVERY, main, recovery
from two_peers import Peers


async def killed(place: Path, role: str, kill_at: str) -> None:
    ended = await asyncio.to_thread(exit_code_of, main, place, role, kill_at)
    assert ended == -signal.SIGKILL


def visits(place: Path) -> int:
    return Counter((place / "visits").read_text().split())["reserve"]


async def finished_by_another(place: Path) -> Any:
    async with recovery(place) as app:
        state = await app.ainvoke(None, RECOVERY, durability="sync")
    return state["result"]


def check(result: Any) -> None:
    assert (result["status"], result["reasons"]) == ("resumed", [])
    assert result["final_state"]["log"] == ["in", "plan", "reserve", "launch"]
    assert result["final_state"]["facts"] == ["order-a", "order-b"]
    assert result["peer_context_used"]
    assert result["incident"]["coverage"]["answered"] == ["a", "b"]


@pytest.mark.parametrize("place", ["position", *PLACES[1:4]])
async def test_killed_while_it_asked(two: Peers, tmp_path: Path, place: str) -> None:
    place = "before position" if place == "position" else place
    await killed(tmp_path, "agent", INSIDE)
    await killed(tmp_path, "recoverer", place)
    before = len(two.requests)
    if place in ("before position", "before request"):
        await two.start("b")

    check(await finished_by_another(tmp_path))

    assert visits(tmp_path) == 2
    addressed = [request.addressees for request in two.requests]
    assert addressed == ([()] if before == 0 else [(), ("b",)])
    assert len({request.correlation_id for request in two.requests}) == 1


@pytest.mark.kafka
async def test_killed_in_the_middle_of_collecting_on_a_real_kafka(
    two_on_kafka: Peers, tmp_path: Path
) -> None:
    await killed(tmp_path, "agent", INSIDE)
    await killed(tmp_path, "recoverer", "in the middle of collect")

    check(await finished_by_another(tmp_path))

    assert [request.addressees for request in two_on_kafka.requests] == [(), ("b",)]
    assert visits(tmp_path) == 2


@pytest.mark.parametrize("place", [*NODES, INSIDE])
async def test_killed_at_any_other_node(two: Peers, tmp_path: Path, place: str) -> None:
    await two.start("b")
    await killed(tmp_path, "agent", INSIDE)
    await killed(tmp_path, "recoverer", place)
    if place == INSIDE:  # and the second one too
        await killed(tmp_path, "successor", place)

    check(await finished_by_another(tmp_path))

    assert len(two.requests) == 1
    assert visits(tmp_path) == (4 if place == INSIDE else 2)


async def test_killed_when_the_workflow_had_ended_it_is_not_run_again(
    two: Peers, tmp_path: Path
) -> None:
    await two.start("b")
    await killed(tmp_path, "agent", INSIDE)
    await killed(tmp_path, "recoverer", AFTER)

    result = await finished_by_another(tmp_path)

    assert result["status"] == "already_finished"
    assert result["final_state"]["log"] == ["in", "plan", "reserve", "launch"]
    assert result["final_state"]["facts"] == ["order-a", "order-b"]
    assert visits(tmp_path) == 2
