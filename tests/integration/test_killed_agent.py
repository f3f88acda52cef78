"""The main job with real processes, a real `kill -9` and a real freeze, on every ground."""

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
from rich.console import Console
from services.kafka import KafkaServer

from graphs.demo import PROMISE, Outcome, Story, Takeover, bounded, main
from graphs.team.scenario import EVERYBODY, INVENTORY, MARKETING, PRODUCT, Scenario
from langgraph_peerctx import ControlDatabase

FINAL = {
    "product": "umbrella",
    "units": 3,
    "shelf": "north-7",
    "slogan": "The umbrella for commuters",
    "launched": True,
    "peer_context": {},
}
TOLD = {
    INVENTORY: {"reserve", "effect", "reserve-done"},
    MARKETING: {"campaign", "effect", "campaign-done"},
}
SETTLED = [("reserve", "done", "own", 1), ("campaign", "done", "peer", 1)]
"""Nothing of act one and two is tried twice; of the campaign its peer tells."""
ONCE = {INVENTORY: 1, MARKETING: 1}
ORDER = ["known", "claimed", "answers", "resumed", "finished"]


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A directory whose name leaves room for a socket's."""
    with TemporaryDirectory(prefix="s") as folder:
        yield folder


def check(outcome: Outcome, scenario: Scenario, *, sources: set[str]) -> None:
    assert outcome.uninterrupted == FINAL
    assert outcome.orders == ONCE
    for takeover in (outcome.killed, outcome.frozen):
        check_takeover(takeover, sources=sources)
        assert outcome.is_equal(takeover)
        check_control(scenario, takeover.final["thread_id"])
    assert outcome.killed.refused is None
    refused = outcome.frozen.refused
    assert refused is not None
    assert refused["error"] == "StaleOwnerError"
    assert refused["state"] == outcome.frozen.final["state"]
    assert outcome.shortfalls == []


def check_takeover(takeover: Takeover, *, sources: set[str]) -> None:
    final = takeover.final
    assert final["status"] == "resumed"
    assert final["peer_context_used"]
    assert final["reasons"] == []
    assert takeover.orders == ONCE
    effects = [(e["name"], e["status"], e["source"], e["attempt"]) for e in final["effects"]]
    assert effects == SETTLED
    assert "asking" not in {event["event"] for event in takeover.said}
    facts = final["state"]["peer_context"].values()
    assert {fact["kind"] for fact in facts} == set().union(*TOLD.values())
    assert {fact["source"] for fact in facts if fact["kind"] != "effect"} == sources
    assert {fact["source"] for fact in facts if fact["kind"] == "effect"} == {"peer"}
    assert all(fact["occurred_at"] for fact in facts)
    told = {peer: {i["kind"] for i in said} for peer, said in takeover.told.items()}
    assert told == TOLD
    moments = takeover.moments
    assert sorted(moments, key=moments.__getitem__) == ORDER
    assert moments["known"] > 0


def check_control(scenario: Scenario, thread_id: str) -> None:
    """See that the successor's end counts, whoever came back since."""
    with ControlDatabase(scenario.control, timeout_seconds=5) as control:
        run, incident = (
            control.newest_run(PRODUCT, thread_id),
            control.incident_of(PRODUCT, thread_id),
        )
    assert run is not None
    assert run.end_kind == "returned"
    assert incident is not None
    assert (incident.status, incident.attempts) == ("recovered", 1)


def how_known(takeover: Takeover) -> tuple[str, str]:
    return takeover.known["why"], takeover.known["by"]


def played(scenario: Scenario) -> Outcome:
    return asyncio.run(bounded(scenario, Story(Console(quiet=True))))


def test_make_demo_ends_well_on_the_embedded_broker_and_sqlite(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main() == 0
    shown, complaints = capfd.readouterr()
    shown = re.sub(r"[\s│]+", " ", shown)
    doubt = ("in doubt: was the campaign made?", "marketing-agent says: yes")
    for words in ("kill -9", "the sentinel saw it end", *doubt):
        assert words in shown.partition("act two")[0]
    for words in ("kill -STOP", "its lease ran out", "kill -CONT", "refused: StaleOwnerError"):
        assert words in shown.partition("act two")[2]
    assert PROMISE in shown
    assert complaints == ""


@pytest.mark.kafka
def test_lost_agents_are_replaced_over_kafka_with_sqlite(
    kafka: KafkaServer, tmp_path: Path, short_folder: str
) -> None:
    scenario = Scenario.in_folder(
        kafka.bootstrap_servers, str(tmp_path), sentinel_directory=f"{short_folder}/s"
    )
    outcome = played(scenario)
    check(outcome, scenario, sources={"peer"})
    assert how_known(outcome.killed) == ("died", "sentinel")
    assert how_known(outcome.frozen) == ("silent", "heartbeats")


@pytest.mark.kafka
@pytest.mark.postgres
def test_lost_agents_are_replaced_over_kafka_with_postgresql_and_no_sentinel(
    kafka: KafkaServer, postgres_url: str
) -> None:
    scenario = Scenario(
        bootstrap_servers=kafka.bootstrap_servers,
        stores=dict.fromkeys(EVERYBODY, postgres_url),
        checkpoints=postgres_url,
        control=postgres_url,
    )
    outcome = played(scenario)
    # The lost agent's own events outlived it there, and outrank what peers say of the same.
    check(outcome, scenario, sources={"own"})
    for takeover in (outcome.killed, outcome.frozen):
        assert how_known(takeover) == ("silent", "heartbeats")


@pytest.mark.parametrize(
    ("number", "when", "code"),
    [
        pytest.param(signal.SIGINT, "frozen (kill -STOP", 130, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, "process", 130, id="told to end"),
        pytest.param(signal.SIGKILL, "has not written it down", -9, id="killed"),
    ],
)
def test_a_demo_that_is_broken_off_leaves_no_process_behind(
    number: signal.Signals, when: str, code: int
) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "graphs.demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if when in line.decode():
                break
        members = psutil.Process(demo.pid).children(recursive=True)
        demo.send_signal(number)
        _, complaints = demo.communicate(timeout=60)
    _, alive = psutil.wait_procs(members, timeout=30)
    assert members
    assert alive == []
    assert demo.returncode == code
    assert complaints == b""


def takeover(**changes: Any) -> Takeover:
    final = {"event": "final", "at": 1.0, "status": "resumed", "state": FINAL, **changes}
    return Takeover(blow_at=0.0, said=[final], orders=ONCE)


REFUSED = {"error": "StaleOwnerError", "state": FINAL}
GOOD = Outcome(
    uninterrupted=FINAL,
    orders=ONCE,
    killed=takeover(),
    frozen=replace(takeover(), refused=REFUSED),
)
TWICE = ONCE | {MARKETING: 2}


@pytest.mark.parametrize(
    ("outcome", "missing"),
    [
        (GOOD, []),
        (replace(GOOD, killed=takeover(status="failed")), ["the killed launch is failed"]),
        (
            replace(GOOD, killed=takeover(state={**FINAL, "units": 4})),
            ["the killed launch ended in another state"],
        ),
        (
            replace(GOOD, frozen=replace(GOOD.frozen, orders=TWICE)),
            [f"the frozen launch ordered {TWICE}"],
        ),
        (
            replace(GOOD, frozen=replace(GOOD.frozen, refused={"error": "X", "state": FINAL})),
            ["the frozen agent was not refused"],
        ),
        (
            replace(GOOD, frozen=replace(GOOD.frozen, refused={**REFUSED, "state": {}})),
            ["the frozen agent found another state than its successor's"],
        ),
    ],
)
def test_the_demo_says_what_has_not_come_true(outcome: Outcome, missing: list[str]) -> None:
    assert outcome.shortfalls == missing
