"""The main job with real processes and a real `kill -9`: the demonstration, on every ground."""

import asyncio
from pathlib import Path

import pytest
from rich.console import Console
from services.kafka import KafkaServer

from graphs.demo import Outcome, Story, bounded, main
from graphs.team.scenario import INVENTORY, MARKETING, RECOVERY, TEAM, Scenario


def check(outcome: Outcome, *, sources: set[str]) -> None:
    assert outcome.recovered["status"] == "resumed"
    assert outcome.recovered["peer_context_used"]
    assert outcome.recovered["reasons"] == []
    assert outcome.equal
    assert outcome.uninterrupted == {
        "product": "umbrella",
        "units": 3,
        "shelf": "north-7",
        "slogan": "The umbrella for commuters",
        "launched": True,
        "peer_context": {},
    }
    assert outcome.orders == {INVENTORY: 1, MARKETING: 1}
    facts = outcome.recovered["state"]["peer_context"].values()
    kinds = {"reserve", "reserve-done", "campaign", "campaign-done"}
    assert {fact["kind"] for fact in facts} == kinds
    assert all(fact["source"] in sources and fact["occurred_at"] for fact in facts)
    told = {peer: {i["kind"] for i in said} for peer, said in outcome.told.items()}
    assert told == {
        INVENTORY: {"reserve", "reserve-done"},
        MARKETING: {"campaign", "campaign-done"},
    }
    assert outcome.good


def test_make_demo_ends_well_on_the_embedded_broker_and_sqlite(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main() == 0
    shown = capsys.readouterr().out
    assert "kill -9" in shown
    assert "equal, and nothing happened twice" in shown


@pytest.mark.kafka
def test_a_killed_agent_is_recovered_over_kafka_with_sqlite(
    kafka: KafkaServer, tmp_path: Path
) -> None:
    scenario = Scenario(
        bootstrap_servers=kafka.bootstrap_servers,
        stores={who: f"sqlite:///{tmp_path}/{who}.db" for who in (*TEAM, RECOVERY)},
        checkpoints=f"{tmp_path}/checkpoints.db",
    )
    outcome = asyncio.run(bounded(scenario, Story(Console(quiet=True))))
    check(outcome, sources={"peer"})


@pytest.mark.kafka
@pytest.mark.postgres
def test_a_killed_agent_is_recovered_over_kafka_with_postgresql(
    kafka: KafkaServer, postgres_url: str
) -> None:
    scenario = Scenario(
        bootstrap_servers=kafka.bootstrap_servers,
        stores=dict.fromkeys((*TEAM, RECOVERY), postgres_url),
        checkpoints=postgres_url,
    )
    outcome = asyncio.run(bounded(scenario, Story(Console(quiet=True))))
    # The dead agent's own events outlived it there, and outrank what peers say of the same.
    check(outcome, sources={"own", "peer"})
